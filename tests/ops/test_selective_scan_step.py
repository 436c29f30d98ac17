"""selective_scan_step: reduced precision, mixed dtypes, and faults of its kernel."""

import sys
from typing import Any

import pytest
import torch
from op_calls import Call, outputs
from scan_cases import HALVES, as_step, build
from torch import Tensor

from eaml_ext.ops import selective_scan_step

functional = sys.modules["eaml_ext.ops.selective_scan._functional"]
GOOD_STEP = as_step(build("initial_state", "D", "z", "delta_bias", batch=4, dim=6, length=1, state=3))(
    torch.float32, "cpu"
).tensors
MIXABLE = ("u", "delta", "B", "C", "z")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_step_half_types_equal_the_float32_step_rounded_once(dtype, device):
    """Under torch.compile too, where the op's arguments have shapes and no values."""
    call = as_step(build("initial_state", "D", "z", length=1))(torch.float32, device)
    half = call._replace(
        tensors={n: x.to(dtype) if n in ("u", "delta", "z", "B", "C") else x for n, x in call.tensors.items()}
    )
    y, state = outputs(selective_scan_step, call._replace(tensors={n: x.float() for n, x in half.tensors.items()}))

    def step(**tensors: Tensor) -> tuple[Tensor, ...]:
        return outputs(selective_scan_step, half, **tensors)

    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        got = function(**half.tensors)
        assert got[0].dtype == dtype and torch.equal(got[0], y.to(dtype)) and torch.equal(got[1], state)


@pytest.mark.parametrize("no_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("names", [("B", "C"), ("delta",), ("z", "C"), ("u",)], ids=str)
def test_step_mixed_dtypes_equal_the_float32_step(names, dtype, no_grad, device):
    """``names`` are in another dtype than the rest, as in calls of mamba_ssm's selective_state_update."""
    call = as_step(build("initial_state", "D", "z", "delta_bias", length=1, softplus=True))(torch.float32, device)
    for other in {torch.float32, *HALVES} - {dtype}:
        mixed = {n: x.to(other if n in names else dtype) if n in MIXABLE else x for n, x in call.tensors.items()}
        with torch.set_grad_enabled(not no_grad):
            mixed = {n: x.clone().requires_grad_(not no_grad) for n, x in mixed.items()}
            full = {n: x.detach().float().requires_grad_(not no_grad) for n, x in mixed.items()}
            got = outputs(selective_scan_step, Call(mixed, call.options))
            want = outputs(selective_scan_step, Call(full, call.options))
            assert got[0].dtype == mixed["u"].dtype and got[1].dtype == torch.float32
            assert torch.equal(got[0], want[0].to(got[0].dtype)) and torch.equal(got[1], want[1])
        if not no_grad:
            grads, wanted = (
                torch.autograd.grad(y.float().sum() + state.sum(), list(x.values()))
                for (y, state), x in ((got, mixed), (want, full))
            )
            for x, g, w in zip(mixed.values(), grads, wanted, strict=True):
                assert g.dtype == x.dtype and torch.equal(g, w.to(x.dtype))


def test_step_float64_beside_float32_raises_type_error(device):
    for name in MIXABLE:
        with pytest.raises(
            TypeError, match=r"^selective_scan_step: [a-zA-Z]+ must be float(32|64) for u of float(32|64)"
        ):
            selective_scan_step(**GOOD_STEP | {name: GOOD_STEP[name].double()})


def test_step_call_of_selective_state_update_with_heads_matches_formula():
    """Check a call of mamba_ssm's selective_state_update: half inputs, float32 B and C, heads and groups."""
    batch, heads, dim, states, groups = 2, 4, 3, 5, 2
    state, A = torch.randn(batch, heads, dim, states), -torch.rand(heads, dim, states)
    x, dt, z = (torch.randn(batch, heads, dim).bfloat16() for _ in range(3))
    B, C = torch.randn(batch, groups, states), torch.randn(batch, groups, states)
    D, dt_bias = torch.randn(heads, dim), torch.randn(heads, dim)
    step = torch.nn.functional.softplus(dt.float() + dt_bias).unsqueeze(-1)
    B_head, C_head = (m.repeat_interleave(heads // groups, dim=1).unsqueeze(2) for m in (B, C))
    last = torch.exp(step * A) * state + step * B_head * x.float().unsqueeze(-1)
    want = ((last * C_head).sum(-1) + D * x.float()) * torch.nn.functional.silu(z.float())
    y, got = selective_scan_step(
        state.flatten(1, 2),
        x.flatten(1),
        dt.flatten(1),
        A.flatten(0, 1),
        B,
        C,
        D.flatten(),
        z.flatten(1),
        dt_bias.flatten(),
        True,
    )
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(got, last.flatten(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y, want.bfloat16().flatten(1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "fault", [RuntimeError("CUDA error: an illegal memory access"), MemoryError("host"), OSError()]
)
def test_step_fault_of_kernel_is_raised_without_second_run(fault, monkeypatch):
    def fails(*_: Any) -> None:
        raise fault

    def never(*_: Any) -> None:
        raise AssertionError("ran a second time")

    with torch.no_grad():
        selective_scan_step(**GOOD_STEP)  # the raw op takes these arguments
        kernels = type("Ops", (), {"selective_scan_step": staticmethod(fails), "selective_scan": staticmethod(never)})
        monkeypatch.setattr(functional, "library", kernels)
        monkeypatch.setattr(functional, "reference", never)
        with pytest.raises(type(fault)) as caught:
            selective_scan_step(**GOOD_STEP)
    assert caught.value is fault


def test_step_shape_error_of_raw_op_alone_is_raised(monkeypatch):
    def raises(*_: Any) -> None:
        raise ValueError("selective_scan: u has a wrong dtype")

    monkeypatch.setattr(functional, "library", type("Ops", (), {"selective_scan_step": staticmethod(raises)}))
    with pytest.raises(ValueError, match=r"^selective_scan: u has a wrong dtype$"):
        selective_scan_step(**GOOD_STEP)
