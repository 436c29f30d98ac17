"""Check second derivatives of scans and recurrent layers: python -m benchmarks.second_order_peers [PEER ...].

Every peer runs in a process of its own. A verdict of ``eaml_ext.testing.check_second_order`` counts only if the same
check passes on the formula, and if outputs and first derivatives of the peer equal the formula's. ``--table`` prints
the table of docs/second-order.md from the file. A peer that cannot be imported is absent, with the reason.
"""

import argparse
import importlib.metadata
import os
import warnings
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch

from benchmarks.common import RESULTS, in_fresh_process, load, write
from benchmarks.results_page import table
from benchmarks.second_order_cases import CPU, INTERPRETER, PEERS, REPLACED, Case, Peer
from eaml_ext.testing import check_second_order

FILE = "second_order_peers"
# Largest relative error of outputs and first derivatives, by the precision of the check.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
LONGEST_REASON = 160  # characters of an error's text that the file keeps
KERNELS = {CPU: "as installed", INTERPRETER: "interpreter", REPLACED: "replaced"}
Row = dict[str, Any]


def first_order_error(case: Case, dtype: torch.dtype) -> float:
    """Largest error of outputs and first derivatives, relative to the largest entry of each tensor."""

    def tensors(function: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in case.inputs]
        y = function(*leaves)
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
        return [y.detach(), *torch.autograd.grad(y, leaves, cotangent)]

    pairs = zip(tensors(case.function, dtype), tensors(case.formula, torch.float64), strict=True)
    return max(float((a.double() - e).abs().max() / e.abs().max()) for a, e in pairs)


def row_of(name: str) -> Row:
    """Return the row of a peer of the table, in a process of its own."""
    warnings.simplefilter("ignore")
    return measure(name, PEERS[name])


def measure(name: str, peer: Peer) -> Row:
    """Return the row of a peer."""
    row: Row = {"peer": name, "version": "", "kernel": KERNELS[peer.kernel], "verdict": "absent", "dtype": ""}
    row |= {"grad": "", "grad_error": None, "backward": "", "backward_error": None, "first_error": None, "reason": ""}
    torch.manual_seed(0)
    try:
        row["version"] = importlib.metadata.version(peer.distribution)
        case = peer.case()
    except ImportError as error:  # PackageNotFoundError is one
        return row | {"reason": brief(error)}
    row["verdict"] = "not measured"
    try:
        control = check_second_order(case.formula, *case.inputs)
        found = check_second_order(case.function, *case.inputs)
        error = first_order_error(case, found.dtype)
    except Exception as failure:  # whatever a package raises
        return row | {"reason": brief(failure)}
    row |= {"first_error": error, "dtype": str(found.dtype).removeprefix("torch.")}
    if control.verdict != "right" or control.dtype is not torch.float64:
        return row | {"reason": f"the formula is {control}"}
    if not error <= TOLERANCE[found.dtype]:
        return row | {"reason": "outputs or first derivatives differ from the formula"}
    ways = {"grad": found.grad, "backward": found.backward}
    row |= {key: way.verdict for key, way in ways.items()}
    row |= {f"{key}_error": way.relative_error for key, way in ways.items()}
    reasons = dict.fromkeys(way.error[:LONGEST_REASON] for way in ways.values() if way.error)
    return row | {"verdict": found.verdict, "reason": "; ".join(reasons)}


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST_REASON]


def cell(row: Row, way: str) -> str:
    """A verdict by one entry point of autograd with its relative error."""
    if not row[way]:
        return row["verdict"]
    error = row[f"{way}_error"]
    words = f"**{row[way]}**" if row[way] == "silently wrong" else row[way]
    return words if error is None else f"{words}, {error:.2f}" if error > 0.01 else f"{words}, {error:.0e}"


def page_table(rows: Sequence[Row]) -> str:
    head = ["function", "version", "kernel", "by `torch.autograd.grad`", "by `.backward()`"]
    return table(head, [[r["peer"], r["version"], r["kernel"], cell(r, "grad"), cell(r, "backward")] for r in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", metavar="PEER", help="parts of names: these alone, no file written")
    parser.add_argument("--table", action="store_true", help="print the table of the file, measure nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(page_table(load(RESULTS / f"{FILE}.json")["results"]))
        return
    names = [n for n in PEERS if not arguments.peers or any(part in n for part in arguments.peers)]
    rows = []
    for name in names:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):  # read when Triton is imported, possibly by torch
            rows.append(in_fresh_process(row_of, name))
        print(rows[-1], flush=True)
    print(page_table(rows))
    if not arguments.peers:
        print(write(FILE, rows, timed=False))


if __name__ == "__main__":
    main()
