"""causal_conv1d: values against plain loops, equal bits however a row is computed, states, and errors."""

import itertools
from typing import Any

import pytest
import torch
from conv_cases import CASES, FACTOR, SHAPES, build, by_episodes
from op_calls import channel_last, close, outputs
from torch import Tensor

from eaml_ext.ops import causal_conv1d, causal_conv1d_reference, causal_conv1d_step

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LARGE = build("bias", "initial_states", "reset", batch=3, dim=150, length=150, activation="silu")


def drawn(build: Any, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Return the tensors of a call, x and states in ``dtype``."""
    tensors = build(torch.float64 if dtype == torch.float64 else torch.float32, device).tensors
    return {n: v.to(dtype) if n in ("x", "initial_states") else v for n, v in tensors.items()}


@pytest.mark.parametrize("name", [*CASES, *SHAPES])
@pytest.mark.parametrize("function", [causal_conv1d, causal_conv1d_reference])
def test_causal_conv1d_every_case_matches_convolutions_of_episodes(name, function, device):
    call = {**CASES, **SHAPES}[name](torch.float64, device)
    if "per_task" in name or call.tensors["x"].numel() == 0:
        pytest.skip("the oracle has one filter, and no empty rows")
    options = {n: v for n, v in call.options.items() if n != "return_final_states"}
    want = by_episodes(**call.tensors, **options)
    close(outputs(function, call), want[: 1 + call.options["return_final_states"]], FACTOR)


# ---- bits --------------------------------------------------------------------------------------------------------


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channel_last])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_bits_of_rows_independent_of_batch_splits_and_layout(dtype, layout, activation, device):
    x, weight, bias, states, reset = drawn(LARGE, dtype, device).values()

    def conv(x: Tensor, states: Tensor, reset: Tensor) -> tuple[Tensor, Tensor]:
        options = {"initial_states": states, "reset": reset, "activation": activation}
        return causal_conv1d(layout(x), weight, bias, return_final_states=True, **options)

    y, last = conv(x, states, reset)
    for row in range(3):
        alone, alone_last = conv(x[row : row + 1], states[row : row + 1], reset[row : row + 1])
        assert torch.equal(alone[0], y[row]) and torch.equal(alone_last[0], last[row])
    for cuts in ((1, 2, 3, 5), (31, 33, 64), (128,), (150,)):
        state, parts = states, []
        for begin, end in itertools.pairwise((0, *cuts, 150)):
            part, state = conv(x[..., begin:end], state, reset[:, begin:end])
            parts.append(part)
        assert torch.equal(torch.cat(parts, -1), y) and torch.equal(state, last)
    other = causal_conv1d(x.mT.contiguous().mT, weight, bias, None, states, activation=activation, reset=reset)
    assert torch.equal(other, y)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [3, 4, 6])
def test_bits_of_steps_are_those_of_the_sequence(dtype, size, device):
    x, weight, bias, states, _ = drawn(LARGE, dtype, device).values()
    y, last = causal_conv1d(x, weight, bias, None, states, True, activation="silu")
    state = torch.cat([torch.full_like(x[..., : size - 3], torch.nan), states], dim=-1)
    for t in range(x.shape[2]):
        step, state = causal_conv1d_step(x[..., t], state, weight, bias, "silu")
        assert state.shape[2] == size and torch.equal(step, y[..., t])
    assert torch.equal(state[..., size - 3 :], last)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_packed_sequences_are_those_of_sequences_alone(dtype, device):
    bounds = (0, 1, 1, 3, 40, 41, 105, 150)
    tensors = drawn(build("bias", "initial_states", batch=1, dim=40, length=150, cu_seqlens=bounds), dtype, device)
    x, weight, bias, states = tensors.values()
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    y, last = causal_conv1d(x, weight, bias, None, states, True, activation="silu", cu_seqlens=cu_seqlens)
    for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
        alone, final = causal_conv1d(x[..., begin:end], weight, bias, None, states[i : i + 1], True, activation="silu")
        assert torch.equal(alone, y[..., begin:end]) and torch.equal(final[0], last[i])
    seq_idx = torch.repeat_interleave(torch.arange(7, device=device), cu_seqlens.diff())[None].int()
    by_idx = causal_conv1d(x, weight, bias, seq_idx, activation="silu")
    without = causal_conv1d(x, weight, bias, activation="silu", cu_seqlens=cu_seqlens)
    assert torch.equal(by_idx, without)


def test_seq_idx_first_sequence_continues_initial_states(device):
    x, weight, states = torch.ones(1, 1, 4), torch.ones(1, 3), torch.full((1, 1, 2), 10.0)
    x, weight, states = (v.to(device) for v in (x, weight, states))
    seq_idx = torch.tensor([[5, 5, 5, 2]], dtype=torch.int32, device=device)
    y, final = causal_conv1d(x, weight, None, seq_idx, states, True)
    assert y.tolist() == [[[21, 12, 3, 1]]] and final.tolist() == [[[0, 1]]]


# ---- states and gradients ----------------------------------------------------------------------------------------


def test_reset_stops_nan_of_the_episode_before_in_outputs_and_gradients(device):
    x = torch.tensor([[[torch.nan, 1.0, 2.0, 3.0]]], device=device, requires_grad=True)
    weight = torch.tensor([[1.0, 10.0]], device=device)
    reset = torch.tensor([[False, True, False, False]], device=device)
    y, final = causal_conv1d(x, weight, reset=reset, return_final_states=True, activation="silu")
    (y[..., 1:].sum() + final.sum()).backward()
    assert y.isnan().tolist() == [[[True, False, False, False]]]
    assert x.grad is not None and x.grad[..., 1:].isfinite().all()


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channel_last])
def test_gradient_of_weight_infinite_input_of_the_next_segment_matches_reference(layout, device):
    # The segment of 512 steps ends in a run that fills no vector; only the newest tap meets the infinite input.
    x = layout(torch.ones(1, 2, 513, device=device).index_fill(2, torch.tensor(512, device=device), torch.inf))
    reset = torch.arange(513, device=device)[None] == 505
    weight = torch.ones(2, 4, device=device, requires_grad=True)
    got, want = (
        torch.autograd.grad(function(x, weight, reset=reset).sum(), weight)[0]
        for function in (causal_conv1d, causal_conv1d_reference)
    )
    assert torch.equal(got, want)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_gradients_of_inputs_independent_of_layout(dtype, device):
    x, weight, bias, states, reset = drawn(LARGE, dtype, device).values()

    def input_gradients(x: Tensor) -> tuple[Tensor, ...]:
        inputs = x.requires_grad_(), states.clone().requires_grad_()
        y = causal_conv1d(inputs[0], weight, bias, None, inputs[1], activation="silu", reset=reset)
        return torch.autograd.grad(y, inputs, torch.linspace(-1, 1, y.numel(), device=device).view_as(y).to(dtype))

    assert all(map(torch.equal, input_gradients(x.clone()), input_gradients(channel_last(x))))


def test_final_states_out_is_written_and_returned(device):
    x, weight = torch.randn(2, 3, 5, device=device), torch.randn(3, 4, device=device)
    out = torch.full((2, 3, 3), torch.nan, device=device)
    _, final = causal_conv1d(x, weight, return_final_states=True, final_states_out=out)
    assert final is out and torch.equal(out, x[..., 2:])


def test_final_states_do_not_share_memory_with_x(device):
    x, weight = torch.randn(2, 3, 5, device=device), torch.randn(3, 4, device=device)
    _, final = causal_conv1d(x, weight, return_final_states=True)
    before = final.clone()
    x.zero_()
    assert torch.equal(final, before)


def test_gradients_of_weights_have_the_same_bits_each_time(device):
    x, weight, bias, states, reset = drawn(LARGE, torch.float32, device).values()
    weight.requires_grad_(), bias.requires_grad_()

    def gradients() -> tuple[Tensor, ...]:
        y = causal_conv1d(x, weight, bias, None, states, activation="silu", reset=reset)
        return torch.autograd.grad(y.square().sum(), (weight, bias))

    first = gradients()
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


def test_per_task_parameters_equal_a_call_for_each_task(device):
    call = build("bias", tasks=("weight",), batch=4, activation="silu", final=False)(torch.float64, device)
    x, weight, bias = (call.tensors[n] for n in ("x", "weight", "bias"))
    got = causal_conv1d(x, weight, bias, activation="silu")
    want = torch.cat([causal_conv1d(x[2 * i : 2 * i + 2], weight[i], bias, activation="silu") for i in range(2)])
    assert torch.equal(got, want)


def test_compile_packed_dynamic_sizes_compiles_once():
    torch._dynamo.reset()

    def function(x: Tensor, states: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv1d(x, WEIGHT, None, None, states, True, cu_seqlens=cu_seqlens)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for bounds in ((0, 4, 10), (0, 3, 5, 12), (0, 0, 7, 9, 20)):
            call = build("initial_states", batch=1, length=bounds[-1], cu_seqlens=bounds)(torch.float32, "cpu")
            x, states, cu_seqlens = call.tensors["x"], call.tensors["initial_states"], call.options["cu_seqlens"]
            want = function(x, states, cu_seqlens)
            for v, dynamic in ((x, 2), (states, 0), (cu_seqlens, 0)):
                torch._dynamo.mark_dynamic(v, dynamic)
            assert all(map(torch.equal, compiled(x, states, cu_seqlens), want))


# ---- errors ------------------------------------------------------------------------------------------------------

X, WEIGHT = torch.zeros(2, 3, 5), torch.zeros(3, 4)
RESET, SEQ_IDX = torch.zeros(2, 5, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.int32)
CU_SEQLENS = torch.tensor([0, 2, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": X[0]}, ValueError, r"x must have shape \(batch, dim, length\), got \(3, 5\)"),
        ({"x": X.int()}, TypeError, "x must be float32 or float64 or bfloat16 or float16, got int32"),
        ({"x": X.long(), "weight": WEIGHT.long()}, TypeError, "x must be float32 or .*, got int64"),
        ({"weight": WEIGHT[0, 0]}, ValueError, r"weight must have shape .* with dim = 3, got \(\)"),
        ({"weight": WEIGHT[:2]}, ValueError, r"weight must have shape .* with dim = 3, got \(2, 4\)"),
        ({"weight": WEIGHT[:, :0]}, ValueError, r"weight must have shape .* with dim = 3, got \(3, 0\)"),
        ({"weight": WEIGHT.double()}, TypeError, "weight must be float32 for x of float32, got float64"),
        ({"weight": WEIGHT.expand(3, 3, 4)}, ValueError, "weight has 3 tasks, which do not divide the batch of 2"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape .* with dim = 3, got \(4,\)"),
        ({"bias": torch.zeros(2, 3), "weight": WEIGHT[None]}, ValueError, "bias has 2 tasks, weight has 1"),
        (
            {"initial_states": torch.zeros(2, 3, 4)},
            ValueError,
            r"initial_states must have shape .* \(2, 3, 3\), got .*",
        ),
        ({"initial_states": torch.zeros(2, 3, 3).half()}, TypeError, "initial_states must be float32, got float16"),
        ({"reset": RESET.int()}, TypeError, "reset must be bool, got int32"),
        ({"reset": RESET[:1]}, ValueError, r"reset must have shape \(batch, length\) = \(2, 5\), got \(1, 5\)"),
        ({"seq_idx": SEQ_IDX.long()}, TypeError, "seq_idx must be int32, got int64"),
        ({"seq_idx": SEQ_IDX, "reset": RESET}, ValueError, "seq_idx must be None beside reset, got Tensor"),
        ({"cu_seqlens": CU_SEQLENS}, ValueError, "with cu_seqlens the batch must be 1, got 2"),
        ({"activation": "relu"}, ValueError, "activation must be None, 'silu' or 'swish', got 'relu'"),
        ({"return_final_states": 1}, TypeError, "return_final_states must be True or False, got int"),
        ({"final_states_out": torch.zeros(2, 3, 3)}, ValueError, "final_states_out must be None without .*"),
        (
            {"final_states_out": torch.zeros(2, 3, 4), "return_final_states": True},
            ValueError,
            r"final_states_out must have shape of the final states, \(2, 3, 3\), got \(2, 3, 4\)",
        ),
    ],
)
def test_causal_conv1d_invalid_argument_raises(changes, error, message):
    with pytest.raises(error, match=f"^causal_conv1d: {message}$"):
        causal_conv1d(**{"x": X, "weight": WEIGHT, **changes})


def test_causal_conv1d_states_of_packed_sequences_have_their_shape():
    message = r"^causal_conv1d: initial_states must have shape \(sequences, dim, width - 1\) = \(2, 3, 3\), got .*"
    with pytest.raises(ValueError, match=message):
        causal_conv1d(X[:1], WEIGHT, None, None, torch.zeros(1, 3, 3), cu_seqlens=CU_SEQLENS)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": X}, ValueError, r"x must have shape \(batch, dim\), got \(2, 3, 5\)"),
        ({"conv_state": torch.zeros(2, 3, 2)}, ValueError, r"conv_state must have shape .* 3 or more\) .*"),
        ({"conv_state": torch.zeros(2, 3, 3).double()}, TypeError, "conv_state must be float32, got float64"),
        ({"conv_state": None}, TypeError, "conv_state must be a torch.Tensor, got NoneType"),
        ({"activation": "tanh"}, ValueError, "activation must be None, 'silu' or 'swish', got 'tanh'"),
    ],
)
def test_causal_conv1d_step_invalid_argument_raises(changes, error, message):
    arguments = {"x": X[..., 0], "conv_state": torch.zeros(2, 3, 3), "weight": WEIGHT}
    with pytest.raises(error, match=f"^causal_conv1d_step: {message}$"):
        causal_conv1d_step(**{**arguments, **changes})


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_raw_op_dtype_without_kernels_raises(dtype):
    with pytest.raises((ValueError, RuntimeError), match="causal_conv1d: x must be floating-point"):
        torch.ops.eaml_ext.causal_conv1d(X.to(dtype), WEIGHT.to(dtype), None, None, None, None, False)


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(2, 3), "x has 2 dimensions"),
        (1, torch.zeros(3, 5), "weight has width 5, the kernels take 1 to 4"),
        (1, torch.zeros(2, 4), "weight has a wrong shape"),
        (2, torch.zeros(4), "bias has a wrong shape"),
        (3, torch.zeros(2, 1, 3, 2), "initial_states has a wrong shape"),
        (4, torch.zeros(2, 4, dtype=torch.bool), "reset has a wrong shape"),
        (5, torch.zeros(3, 2, dtype=torch.int32), "cu_seqlens has a wrong shape"),
    ],
)
def test_raw_op_wrong_shape_raises_before_a_kernel_runs(index, value, message):
    arguments: list[Any] = [X, WEIGHT, None, None, None, None, False]
    arguments[index] = value
    with pytest.raises((ValueError, RuntimeError), match=f"causal_conv1d: {message}"):
        torch.ops.eaml_ext.causal_conv1d(*arguments)
