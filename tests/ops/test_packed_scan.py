"""selective_scan of packed sequences: the bits of each sequence alone, seq_idx, and wrong boundaries."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from op_calls import Call, close
from scan_bits import PER_ROW, PER_STEP, make_arguments
from scan_cases import FACTOR, OPTIONAL, build, check_error, cu_seqlens_of, drawn_lengths
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from eaml_ext.ops import selective_scan, selective_scan_reference
from eaml_ext.ops.selective_scan import ARGUMENTS, ScanOptions

ops = torch.ops.eaml_ext


def raw_results(x: dict[str, Tensor], along: dict[str, Tensor], options: ScanOptions) -> dict[str, Tensor]:
    """Return all outputs of the raw ops. ``along`` has cotangents (grad y, grad last) and tangents of all arguments."""
    values, v = ([of.get(name) for name in ARGUMENTS] for of in (x, along))
    cotangents = along["grad y"], along["grad last"]
    y, last, saved = ops.selective_scan(*values, *options, True)
    assert saved.isfinite().all()
    first = ops.selective_scan_backward(*cotangents, *values, *options, saved)
    recomputed = ops.selective_scan_backward(*cotangents, *values, *options, None)
    assert all(map(torch.equal, first, recomputed))
    tangents = ops.selective_scan_jvp(*values, *v, *options)
    second = ops.selective_scan_backward_jvp(*cotangents, *cotangents, *values, *v, *options, True)
    names = ["y", "last", *(f"first {n}" for n in ARGUMENTS), "tangent y", "tangent last"]
    names += ["second y", "second last", *(f"second {n}" for n in ARGUMENTS)]
    return dict(zip(names, (y, last, *first, *tangents, *second), strict=True))


def part(name: str, value: Tensor, i: int, steps: slice, invariant: str) -> Tensor:
    """Return the rows or steps of sequence ``i`` in a tensor that has some, else the tensor."""
    kind = name.split()[-1]
    if kind in ("last", "initial_state"):
        return value[i : i + 1]
    return value[..., steps] if kind in (*PER_STEP, "y", "reset") and kind not in invariant else value


def check_bits(x: dict[str, Tensor], lengths: list[int], invariant: str = "", softplus: bool = True) -> None:
    """Assert that every result of a sequence has the bits of a call with the sequence alone.

    The gradients of what sequences share are sums over them, up to rounding.
    """
    cu_seqlens = cu_seqlens_of(lengths).to(x["u"].device)
    flags = softplus, "B" in invariant, "C" in invariant, True

    def like(value: Tensor) -> Tensor:
        return torch.empty_like(value).copy_(torch.randn_like(value.contiguous()))

    state = x["A"].new_empty(len(lengths), *x["A"].shape)
    along = {n: like(v) for n, v in x.items() if n in ARGUMENTS} | {"grad y": like(x["u"]), "grad last": like(state)}
    got = raw_results(x, along, ScanOptions(x.get("reset"), cu_seqlens, *flags))
    sums: dict[str, Tensor] = {}
    for i, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        steps = slice(start, stop)
        alone, alone_along = ({n: part(n, v, i, steps, invariant) for n, v in of.items()} for of in (x, along))
        want = raw_results(alone, alone_along, ScanOptions(alone.get("reset"), None, *flags))
        for name, value in want.items():
            if name.split()[-1] in (*PER_ROW, "y", "last") and name.split()[-1] not in invariant:
                assert torch.equal(part(name, got[name], i, steps, invariant), value), f"{name} of sequence {i}"
            elif value.numel():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value
    real = torch.view_as_real if x["A"].is_complex() else lambda v: v
    for name, value in sums.items():
        of_got = real(got[name]) if got[name].is_complex() else got[name]
        close([of_got], [real(value) if value.is_complex() else value], 8 * FACTOR, floor=1)


# (dim, dstate, dtype of the sequences, or the dtype of A if it is complex)
KINDS = {
    "fast": (32, 16, torch.float32),  # fast kernels on CUDA
    "fast_half": (8, 64, torch.bfloat16),
    "float": (17, 5, torch.float32),
    "many_states": (3, 65, torch.float16),
    "double": (3, 4, torch.float64),
    "complex": (3, 4, torch.complex64),
}


def arguments(kind: str, lengths: list[int], device: str) -> dict[str, Tensor]:
    """Return arguments of packed sequences for the raw ops, channel-last in memory."""
    dim, dstate, dtype = KINDS[kind]
    x = make_arguments(1, dim, sum(lengths), dstate, dtype, device)
    if dtype in (torch.bfloat16, torch.float16):
        x |= {name: x[name].float() for name in "BC"}
    return {**x, "initial_state": torch.randn(len(lengths), dim, dstate, dtype=x["A"].dtype, device=device)}


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_have_the_bits_of_each_alone(kind, device):
    lengths = [33, 0, 1, 64, 31, 130, 2]
    x = arguments(kind, lengths, device)
    x["reset"] = torch.rand(1, sum(lengths), device=device) < 0.05
    check_bits(x, lengths)


@pytest.mark.parametrize("invariant", ["B", "BC"])
def test_packed_sequences_invariant_matrices_have_the_bits_of_each_alone(invariant, device):
    lengths = [5, 40, 0, 3]
    x = arguments("float", lengths, device)
    x |= {name: torch.randn_like(x["A"]) for name in invariant}
    check_bits(x, lengths, invariant)


def test_packed_sequences_channel_first_have_the_bits_of_each_alone(device):
    """The length is odd, so that no sequence alone is read in whole vectors."""
    lengths = [32, 5, 64, 8]
    x = arguments("fast", lengths, device)
    x |= {name: x[name].contiguous() for name in PER_STEP}
    check_bits(x, lengths)


@settings(suppress_health_check=[HealthCheck.differing_executors])
@given(lengths=drawn_lengths, kind=st.sampled_from(("fast", "float")), resets=st.booleans(), softplus=st.booleans())
@example(lengths=[1] * 40, kind="fast", resets=False, softplus=True)
@example(lengths=[0, 0, 40, 0], kind="fast", resets=True, softplus=True)
def test_packed_sequences_any_lengths_have_the_bits_of_each_alone(lengths, kind, resets, softplus, device):
    x = arguments(kind, lengths, device)
    if not softplus:
        x["delta"] = x["delta"].abs()
        x["delta_bias"] = x["delta_bias"].abs()
    if resets:
        x["reset"] = torch.rand(1, sum(lengths), device=device) < 0.2
    check_bits(x, lengths, softplus=softplus)


def test_packed_rows_of_a_raw_call_have_the_bits_of_each_row(device):
    """A raw call has several rows, here of two tasks, with the same boundaries; vmap makes such calls."""
    lengths = [3, 33, 0]
    call = build(*OPTIONAL, batch=4, dim=3, length=36, tasks=("A", "D"))(torch.float32, device)
    x = {**call.tensors, "initial_state": torch.randn(4 * 3, 3, 3, device=device)}
    options = ScanOptions(x["reset"], cu_seqlens_of(lengths).to(device), False, False, False, False)
    y, last, saved = ops.selective_scan(*(x.get(n) for n in ARGUMENTS), *options, True)
    grads = ops.selective_scan_backward(y, last, *(x.get(n) for n in ARGUMENTS), *options, saved)
    assert last.shape == (12, 3, 3) and saved.shape[0] == 4
    for row in range(4):
        states = slice(3 * row, 3 * row + 3)
        alone = {n: v[states if n == "initial_state" else slice(row, row + 1)] for n, v in x.items() if n in PER_ROW}
        alone |= {n: x[n][row // 2] for n in ("A", "D")} | {"delta_bias": x["delta_bias"]}
        values = [alone.get(n) for n in ARGUMENTS]
        options_of_row = options._replace(reset=x["reset"][row : row + 1])
        y_of_row, last_of_row, saved_of_row = ops.selective_scan(*values, *options_of_row, True)
        assert torch.equal(y[row : row + 1], y_of_row) and torch.equal(last[states], last_of_row)
        assert torch.equal(saved[row : row + 1], saved_of_row)
        want = ops.selective_scan_backward(y_of_row, last_of_row, *values, *options_of_row, saved_of_row)
        for name, a, b in zip(ARGUMENTS, grads, want, strict=True):
            if name in PER_ROW:
                assert torch.equal(a[states if name == "initial_state" else slice(row, row + 1)], b), name


def test_packed_empty_sequence_returns_its_initial_state_and_passes_its_gradient(device):
    call = build("initial_state", lengths=(2, 0, 3))(torch.float64, device)
    state = call.tensors["initial_state"].clone().requires_grad_()
    _, last = selective_scan(**{**call.tensors, "initial_state": state}, **call.options)
    assert torch.equal(last[1], state[1])
    (grad,) = torch.autograd.grad(last[1].sum(), state)
    assert torch.equal(grad[1], torch.ones_like(grad[1])) and not grad[[0, 2]].any()


def test_packed_state_of_one_sequence_reaches_no_other(device):
    call = build("initial_state", lengths=(4, 35, 3))(torch.float64, device)
    state = call.tensors["initial_state"].clone()
    y, last = selective_scan(**call.tensors, **call.options)
    state[1] = torch.nan
    y_nan, last_nan = selective_scan(**{**call.tensors, "initial_state": state}, **call.options)
    assert y_nan[..., 4:39].isnan().all() and last_nan[1].isnan().all()
    for steps in (slice(0, 4), slice(39, None)):
        assert torch.equal(y_nan[..., steps], y[..., steps])
    assert torch.equal(last_nan[[0, 2]], last[[0, 2]])


@pytest.mark.parametrize("function", [selective_scan, selective_scan_reference])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8], ids=str)
def test_seq_idx_equals_reset_where_it_changes(function, dtype, device):
    call = build("initial_state", batch=2, length=6)(torch.float64, device)
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 2], [7, 3, 3, 3, 7, 7]], dtype=dtype, device=device)
    reset = torch.tensor([[0, 0, 1, 0, 0, 1], [0, 1, 0, 0, 1, 0]], dtype=torch.bool, device=device)
    got, want = (function(**call.tensors, **call.options, **how) for how in ({"seq_idx": seq_idx}, {"reset": reset}))
    assert all(map(torch.equal, got, want))


# ---- PyTorch's tools ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [False, True])
def test_compile_packed_dynamic_sizes_compiles_once(gradients):
    torch._dynamo.reset()
    names = ("u", "delta", "A", "B", "C", "initial_state")

    def function(cu_seqlens: Tensor, *x: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(**dict(zip(names, x, strict=True)), return_last_state=True, cu_seqlens=cu_seqlens)

    def run(f: Any, cu_seqlens: Tensor, x: list[Tensor]) -> list[Tensor]:
        outs = f(cu_seqlens, *(v.requires_grad_(gradients) for v in x))
        return [*outs, *(torch.autograd.grad(sum(out.square().sum() for out in outs), x) if gradients else ())]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ((2, 3), (33, 0, 64), (1, 1, 1, 30)):
            call = build("initial_state", lengths=lengths)(torch.float64, "cpu")
            cu_seqlens, x = call.options["cu_seqlens"], [call.tensors[name] for name in names]
            want = run(function, cu_seqlens, x)
            for name, v in zip(("cu_seqlens", *names), (cu_seqlens, *x), strict=True):
                if name != "A":
                    torch._dynamo.mark_dynamic(v, 0 if name in ("cu_seqlens", "initial_state") else 2)
            torch.testing.assert_close(run(compiled, cu_seqlens, x), want)


def test_flop_counter_packed_scan_counts_each_step_once():
    call = build("initial_state", dim=3, state=2, lengths=(5, 0, 30))(torch.float32, "cpu")
    with FlopCounterMode(display=False) as counter:
        selective_scan(**call.tensors, **call.options)
    assert counter.get_flop_counts()["Global"][ops.selective_scan] == 7 * 3 * 2 * 35


# ---- errors ------------------------------------------------------------------------------------------------------

GOOD = build("initial_state", lengths=(2, 3))(torch.float32, "cpu")
RESET = torch.zeros(1, 5, dtype=torch.bool)


def boundaries(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def without_boundaries(**changes: Any) -> dict[str, Any]:
    return {**GOOD.tensors, "initial_state": GOOD.tensors["initial_state"][:1], "cu_seqlens": None, **changes}


BAD = {
    "type": ({"cu_seqlens": [0, 2, 5]}, "cu_seqlens", TypeError),
    "int64": ({"cu_seqlens": boundaries(0, 2, 5).long()}, "cu_seqlens", TypeError),
    "device": ({"cu_seqlens": boundaries(0, 2, 5).to("meta")}, "cu_seqlens", ValueError),
    "rank": ({"cu_seqlens": boundaries(0, 2, 5)[None]}, "cu_seqlens", ValueError),
    "no value": ({"cu_seqlens": boundaries()}, "cu_seqlens", ValueError),
    "first value": ({"cu_seqlens": boundaries(1, 2, 5)}, "cu_seqlens", ValueError),
    "last value": ({"cu_seqlens": boundaries(0, 2, 4)}, "cu_seqlens", ValueError),
    "order": ({"cu_seqlens": boundaries(0, 6, 5)}, "cu_seqlens", ValueError),
    "states": ({"cu_seqlens": boundaries(0, 1, 2, 5)}, "initial_state", ValueError),
    "with seq_idx": ({"seq_idx": boundaries(0, 0, 1, 1, 1)[None]}, "seq_idx", ValueError),
    "seq_idx and reset": (without_boundaries(seq_idx=RESET.int(), reset=RESET), "seq_idx", ValueError),
    "seq_idx type": (without_boundaries(seq_idx=[0] * 5), "seq_idx", TypeError),
    "seq_idx dtype": (without_boundaries(seq_idx=RESET.float()), "seq_idx", TypeError),
    "seq_idx bool": (without_boundaries(seq_idx=RESET), "seq_idx", TypeError),
    "seq_idx shape": (without_boundaries(seq_idx=RESET.int()[:, 1:]), "seq_idx", ValueError),
    "seq_idx device": (without_boundaries(seq_idx=RESET.int().to("meta")), "seq_idx", ValueError),
}


@pytest.mark.parametrize("function", [selective_scan, selective_scan_reference])
@pytest.mark.parametrize("changes, name, error", BAD.values(), ids=BAD)
def test_packed_bad_argument_raises_one_sentence_that_names_it(function, changes, name, error):
    check_error(function, {**GOOD.tensors, **GOOD.options, **changes}, name, error)


def test_packed_batch_of_two_raises():
    call = build(batch=2, length=5)(torch.float32, "cpu")
    check_error(selective_scan, {**call.tensors, "cu_seqlens": boundaries(0, 5)}, "cu_seqlens", ValueError)


def test_vmap_cu_seqlens_that_differ_raise():
    many = torch.stack((boundaries(0, 2, 5), boundaries(0, 3, 5)))
    with pytest.raises(ValueError, match=r"^selective_scan: cu_seqlens must be the same for all samples of a vmap$"):
        torch.vmap(lambda cu_seqlens: selective_scan(**GOOD.tensors, cu_seqlens=cu_seqlens))(many)


def test_packed_raw_op_wrong_boundaries_are_limited_to_the_row(on_cuda_emulator):
    """On a GPU nothing checks the values, which must not lead outside of the arrays."""
    if not on_cuda_emulator:
        pytest.skip("only the CUDA kernels take unchecked values")
    call: Call = build("initial_state", dim=3, lengths=(3, 37))(torch.float32, "cpu")
    values = [call.tensors.get(name) for name in ARGUMENTS]

    def results(*bounds: int) -> tuple[Tensor, ...]:
        return tuple(ops.selective_scan(*values, None, boundaries(*bounds), False, False, False, False, True))

    assert all(map(torch.equal, results(-5, 3, 2**31 - 1), results(0, 3, 40)))
    y, last, _ = results(40, 3, 40)  # the first sequence ends before it starts
    assert torch.equal(y[..., 3:], results(0, 3, 40)[0][..., 3:]) and torch.equal(
        last[0], call.tensors["initial_state"][0]
    )
