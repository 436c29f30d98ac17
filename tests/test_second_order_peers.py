"""The verdicts on other packages: what counts as measured, and the page that has them."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))  # last, so as not to hide an installed eaml_ext

from benchmarks import common, second_order_peers
from benchmarks.second_order_cases import CPU, PEERS, REPLACED, Case, Peer, as_backward_kernel, as_kernel
from benchmarks.second_order_formulas import linear_scan

INPUTS = [torch.rand(2, 5, 3).requires_grad_(), torch.ones(2, 5, 3).requires_grad_()]


def kernel_scan(scale: float):
    """A scan with kernels that autograd does not see into; the gradient is right if ``scale`` is 1."""

    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a: Tensor, x: Tensor) -> Tensor:
            ctx.save_for_backward(a, x)
            return as_kernel(linear_scan, a, x)

        @staticmethod
        def backward(ctx, grad: Tensor):
            return tuple(scale * g for g in as_backward_kernel(linear_scan, ctx.saved_tensors, grad))

    return Scan.apply


def test_measure_own_scan_is_right():
    row = second_order_peers.measure("ours", PEERS["eaml_ext: `selective_scan`"])
    assert (row["verdict"], row["dtype"], row["reason"]) == ("right", "float64", "")


@pytest.mark.parametrize("scale, verdict", [(1.0, "silently wrong"), (1.001, "not measured")])
def test_measure_needs_right_first_derivatives(scale, verdict):
    case = Case(kernel_scan(scale), linear_scan, INPUTS)
    row = second_order_peers.measure("x", Peer("torch", REPLACED, lambda: case))
    assert row["verdict"] == verdict and bool(row["reason"]) == (verdict == "not measured")


def test_measure_needs_a_formula_with_right_second_derivatives():
    function = kernel_scan(1.0)
    row = second_order_peers.measure("x", Peer("torch", CPU, lambda: Case(function, function, INPUTS)))
    assert row["verdict"] == "not measured" and row["reason"].startswith("the formula is silently wrong")


def test_measure_missing_packages_are_absent():
    def missing():
        raise ImportError("no kernel")

    for distribution in ("eaml-ext-no-such-package", "torch"):
        row = second_order_peers.measure("x", Peer(distribution, CPU, missing))
        assert row["verdict"] == "absent" and row["reason"]


def test_page_has_the_table_of_the_file_with_every_peer_measured():
    rows = common.load(common.RESULTS / f"{second_order_peers.FILE}.json")["results"]
    assert [row["peer"] for row in rows] == list(PEERS)
    assert all(row["verdict"] in ("right", "raises", "silently wrong") for row in rows)
    page = (Path(__file__).parents[1] / "docs" / "second-order.md").read_text(encoding="utf-8")
    assert second_order_peers.page_table(rows) in page
