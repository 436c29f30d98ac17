"""Bad arguments of the scan's public functions: each raises one sentence that names the argument."""

import sys
from typing import Any

import pytest
import torch
from scan_cases import OPTIONAL, as_step, build, check_error
from torch._subclasses import FakeTensorMode

from eaml_ext.ops import selective_scan, selective_scan_reference, selective_scan_step

functional = sys.modules["eaml_ext.ops.selective_scan._functional"]
GOOD = build(*OPTIONAL, batch=4, dim=6, length=5, state=3)(torch.float32, "cpu").tensors
GOOD_STEP = as_step(build("initial_state", "D", "z", "delta_bias", batch=4, dim=6, length=1, state=3))(
    torch.float32, "cpu"
).tensors
REQUIRED = ("state", "u", "delta", "A", "B", "C")

BAD_SHAPES: dict[str, list[tuple[int, ...]]] = {
    "u": [(), (6,), (4, 6), (4, 6, 5, 1)],
    "delta": [(), (4, 6), (4, 6, 4), (4, 5, 5), (1, 6, 5), (4, 6, 5, 1)],
    "A": [(), (6,), (6, 4), (5, 3), (3, 6, 3), (0, 6, 3), (2, 5, 3), (2, 2, 6, 3)],
    "B": [(), (3,), (6, 4), (5, 3), (4, 3, 4), (4, 2, 5), (1, 3, 5), (4, 4, 3, 5), (4, 0, 3, 5), (4, 2, 3, 4)],
    "C": [(), (3,), (6, 4), (5, 3), (4, 3, 4), (4, 2, 5), (1, 3, 5), (4, 4, 3, 5), (4, 2, 3, 5), (4, 1, 1, 3, 5)],
    "D": [(), (5,), (1,), (3, 6), (4, 5), (2, 2, 6)],
    "z": [(), (4, 6), (4, 6, 4), (4, 5, 5), (1, 6, 5)],
    "delta_bias": [(), (5,), (3, 6), (4, 5), (2, 2, 6)],
    "initial_state": [(), (4, 6), (4, 6, 4), (1, 6, 3), (4, 5, 3)],
    "reset": [(), (5,), (4, 6), (1, 5), (4, 5, 1)],
}
BAD_STEP_SHAPES: dict[str, list[tuple[int, ...]]] = {
    "state": [(), (4, 6), (4, 6, 4), (1, 6, 3), (4, 5, 3)],
    "u": [(), (6,), (4, 6, 1)],
    "delta": [(), (6,), (4, 5), (1, 6), (4, 6, 1)],
    "A": BAD_SHAPES["A"],
    "B": [(), (3,), (4, 4), (1, 3), (4, 4, 3), (4, 0, 3), (4, 1, 3, 1)],
    "C": [(), (3,), (4, 4), (1, 3), (4, 4, 3), (4, 2, 3), (4, 1, 3, 1)],
    "D": BAD_SHAPES["D"],
    "z": [(), (6,), (4, 5), (4, 6, 1)],
    "delta_bias": BAD_SHAPES["delta_bias"],
}


def mistakes() -> Any:
    """Yield every argument of every public function with a wrong type, shape, dtype and device."""
    for function, good, shapes in (
        (selective_scan, GOOD, BAD_SHAPES),
        (selective_scan_reference, GOOD, BAD_SHAPES),
        (selective_scan_step, GOOD_STEP, BAD_STEP_SHAPES),
    ):
        for name, x in good.items():
            types: list[Any] = [1.0, "x", [[0.0]], x.numpy(), *[None] * (name in REQUIRED)]
            dtypes = [torch.int64, torch.complex64, torch.float64, *[torch.bool] * (name != "reset")]
            if name == "reset":
                dtypes.append(torch.float32)
            wrong = [(f"type {type(v).__name__}", TypeError, v) for v in types]
            wrong += [(f"shape {shape}", ValueError, x.new_zeros(shape)) for shape in shapes[name]]
            wrong += [(f"dtype {dtype}", TypeError, x.to(dtype)) for dtype in dtypes]
            wrong += [("device meta", ValueError, x.to("meta"))]
            for what, error, value in wrong:
                yield pytest.param(
                    function, {**good, name: value}, name, error, id=f"{function.__name__}-{name}-{what}"
                )
        flags = ["delta_softplus"] + ["return_last_state"] * (function is not selective_scan_step)
        for flag in flags:
            for value in ("yes", 1, torch.ones(())):
                identifier = f"{function.__name__}-{flag}-{type(value).__name__}"
                yield pytest.param(function, {**good, flag: value}, flag, TypeError, id=identifier)
        sparse = good["u"].to_sparse()
        yield pytest.param(function, {**good, "u": sparse}, "u", TypeError, id=f"{function.__name__}-u-sparse")


@pytest.mark.parametrize("function, arguments, name, error", list(mistakes()))
def test_bad_argument_raises_one_sentence_that_names_it(function, arguments, name, error):
    check_error(function, arguments, name, error)


def unchecked_calls() -> dict[str, dict[str, Any]]:
    """Arguments that need no check in Python, because the raw op checks them."""
    half = {n: x.bfloat16() if n in ("u", "delta", "B", "C", "z") else x for n, x in GOOD.items()}
    return {
        "float32": GOOD,
        "float64": {n: x if x.dtype == torch.bool else x.double() for n, x in GOOD.items()},
        "bfloat16": half,
        "required": {n: GOOD[n] for n in REQUIRED[1:]},
        "per task": {**GOOD, "A": -torch.rand(2, 6, 3), "D": torch.rand(4, 6)},
        "invariant": {**GOOD, "B": torch.rand(6, 3), "C": torch.rand(6, 3)},
        "groups": {**GOOD, "B": torch.rand(4, 2, 3, 5), "C": torch.rand(4, 2, 3, 5)},
        "complex": {
            **GOOD,
            **{n: torch.complex(GOOD[n], GOOD[n]) for n in ("A", "B", "C", "initial_state")},
        },
    }


@pytest.mark.kernels
@pytest.mark.parametrize("arguments", unchecked_calls().values(), ids=unchecked_calls())
def test_scan_without_gradient_leaves_checks_to_raw_op_with_same_bits(arguments, monkeypatch, reference_only):
    if reference_only:
        pytest.skip("the references check no shapes")
    call = {**arguments, "return_last_state": True, "delta_softplus": True}
    with monkeypatch.context() as patch:
        patch.setattr(functional, "check_arguments", None)
        got = selective_scan(**call)
    monkeypatch.setattr(functional, "_raw_scan_accepts", lambda *_: False)
    assert all(map(torch.equal, got, selective_scan(**call)))


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_raw_op_dtype_without_kernels_raises(dtype):
    state, u, A, B = (torch.ones(shape, dtype=dtype) for shape in ((2, 3, 4), (2, 3, 5), (3, 4), (2, 4, 5)))
    none, flags = [None] * 6, [False] * 5
    with pytest.raises((ValueError, RuntimeError), match="selective_scan: u must be floating-point"):
        torch.ops.eaml_ext.selective_scan(u, u, A, B, B, *none, *flags)
    now = B[..., 0].contiguous()
    with pytest.raises((ValueError, RuntimeError), match="selective_scan_step: u must be floating-point"):
        torch.ops.eaml_ext.selective_scan_step(state, u[..., 0], u[..., 0], A, now, now, None, None, None, False)


@pytest.mark.parametrize("function", [selective_scan, selective_scan_reference])
@pytest.mark.parametrize("left_out", [(), ("A",), ("A", "D")])
def test_scan_channel_last_u_message_has_the_shape_of_u(function, left_out):
    """A parameter that fits u as ``(batch, dim, length)`` is left out, so that the check reaches the next one."""
    name = next(n for n in ("A", "D", "delta_bias") if n not in left_out)
    channel_last = {**GOOD, "u": GOOD["u"].mT, "delta": GOOD["delta"].mT}
    fitting = {"A": -torch.rand(5, 3), "D": torch.rand(5), "B": torch.rand(4, 3, 6), "C": torch.rand(4, 3, 6)}
    arguments = {**channel_last, **{n: fitting[n] for n in (*left_out, "B", "C")}}
    text = r", alone or per task, got \(6,.*\), and u has \(batch, dim, length\) = \(4, 5, 6\)$"
    with pytest.raises(ValueError, match=rf"{name} must have shape \(dim,.*\) = \(5,.*\){text}"):
        function(**{n: v for n, v in arguments.items() if n not in ("reset", "initial_state", "z")})


def test_scan_and_step_parameter_that_fits_no_axis_has_a_message_without_u():
    for function, arguments in ((selective_scan, GOOD), (selective_scan_step, GOOD_STEP)):
        with pytest.raises(ValueError, match=r"A must have shape .* = \(6, 3\), alone or per task, got \(1, 3\)$"):
            function(**{**arguments, "A": -torch.rand(1, 3)})


@pytest.mark.parametrize("interleaved", ["B", "C"])
def test_scan_interleaved_matrix_without_gradient_equals_complex_one(interleaved):
    states = {n: torch.complex(GOOD[n], 1 - GOOD[n]) for n in ("A", "B", "C", "initial_state")}
    packed = torch.view_as_real(states[interleaved]).flatten(-2)
    want = selective_scan(**{**GOOD, **states})
    assert torch.equal(selective_scan(**{**GOOD, **states, interleaved: packed}), want)


def test_scan_and_step_under_fake_mode_check_shapes_of_plain_tensors():
    u, A, B = torch.randn(2, 3, 5), -torch.rand(3, 4), torch.randn(2, 4, 5)
    state, now, wrong = torch.zeros(2, 3, 4), torch.randn(2, 3), torch.randn(2, 4, 6)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert selective_scan(u, u, A, B, B).shape == u.shape
        assert selective_scan_step(state, now, now, A, B[..., 0].clone(), B[..., 0].clone())[0].shape == now.shape
        with pytest.raises(ValueError, match=r"^selective_scan: B has length 6, u has length 5$"):
            selective_scan(u, u, A, wrong, B)
        with pytest.raises(ValueError, match=r"^selective_scan_step: B has 5 states, A has 4$"):
            selective_scan_step(state, now, now, A, torch.randn(2, 5), torch.randn(2, 4))
