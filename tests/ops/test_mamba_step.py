"""mamba_step: the conformance tests of every op, its bits beside those of the ops one by one, reduced precision."""

import functools

import pytest
import torch
from hypothesis import strategies as st
from op_calls import Build, Call, close, outputs, to_float64
from op_conformance import Op, OpConformance
from torch import Tensor

from eaml_ext.ops import mamba_step as module
from eaml_ext.ops.mamba_step import mamba_step, mamba_step_reference
from eaml_ext.ops.row_invariant_linear import row_invariant_linear

NAMES = (
    *("x", "conv_state", "ssm_state", "in_proj", "in_bias", "conv_weight", "conv_bias", "x_proj", "dt_proj", "dt_bias"),
    *("A_log", "D", "out_proj", "out_bias"),
)
FULL = ("ssm_state", "conv_weight", "conv_bias", "dt_bias", "A_log", "D")  # the others have the dtype of the model
# Successive roundings: four projections' sums, the convolution, softplus, exp, the recurrence, the sum over states.
FACTOR = 256


def build(
    batch: int = 2,
    dim: int = 3,
    width: int = 4,
    dstate: int = 2,
    rank: int = 1,
    inputs: int = 2,
    biases: bool = True,
    seed: int = 0,
) -> Build:
    def make(dtype: torch.dtype, device: str) -> Call:
        draw = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw)

        tensors = {
            "x": randn(batch, inputs),
            "conv_state": randn(batch, dim, width),
            "ssm_state": randn(batch, dim, dstate),
            "in_proj": randn(2 * dim, inputs) / inputs**0.5,
            "in_bias": randn(2 * dim) if biases else None,
            "conv_weight": randn(dim, 1, width) / width**0.5,
            "conv_bias": randn(dim) if biases else None,
            "x_proj": randn(rank + 2 * dstate, dim) / max(dim, 1) ** 0.5,
            "dt_proj": randn(dim, rank) / max(rank, 1) ** 0.5,
            "dt_bias": randn(dim) if biases else None,
            "A_log": randn(dim, dstate),
            "D": randn(dim),
            "out_proj": randn(inputs + 1, dim) / max(dim, 1) ** 0.5,
            "out_bias": randn(inputs + 1) if biases else None,
        }
        full = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        kept = {name: x.to(full if name in FULL else dtype).to(device) for name, x in tensors.items() if x is not None}
        return Call(kept, {} if biases else dict.fromkeys(("in_bias", "conv_bias", "dt_bias", "out_bias")))

    return make


def raw_calls(call: Call):
    op = torch.ops.eaml_ext.mamba_step.default
    return [(op, tuple({**call.tensors, **call.options}[name] for name in NAMES))]


class TestMambaStep(OpConformance):
    op = Op(
        function=mamba_step,
        reference=mamba_step_reference,
        differentiable=NAMES,
        cases={"no_bias": build(biases=False), "all": build()},
        shapes={
            "batch0": build(batch=0),
            "dim0": build(dim=0),
            "dstate0": build(dstate=0),
            "rank0": build(rank=0),
            "width1": build(width=1),
            "width5": build(width=5),  # beyond the convolution's kernels
            "lanes": build(batch=3, dim=33, dstate=16, rank=5, inputs=17),
            "rows9": build(batch=9, dim=5),  # beyond the rows of the raw op
        },
        parallel=build(batch=8, dim=600, dstate=16, rank=20),
        drawn=st.builds(
            build,
            batch=st.integers(0, 9),
            dim=st.integers(1, 40),
            width=st.integers(1, 5),
            dstate=st.integers(1, 20),
            rank=st.integers(1, 9),
            inputs=st.integers(1, 20),
            biases=st.booleans(),
            seed=st.integers(0, 999),
        ),
        raw=raw_calls,
        factor=FACTOR,
    )


@pytest.fixture
def op_by_op(monkeypatch):
    def run(call: Call, linear) -> tuple[Tensor, ...]:
        with monkeypatch.context() as patch:
            patch.setattr(module, "_raw_op_accepts", lambda inputs, weights: False)
            return outputs(functools.partial(mamba_step, linear=linear), call)

    return run


@pytest.fixture
def compiled(reference_only):
    if reference_only:
        pytest.skip("without the kernel a step runs op by op")


@pytest.mark.kernels
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(1, 1536, 16, 48), (3, 33, 16, 5), (8, 70, 5, 3), (2, 4, 64, 1)], ids=str)
@pytest.mark.parametrize("biases", [True, False])
def test_mamba_step_has_the_bits_of_its_ops_one_by_one(sizes, dtype, biases, op_by_op):
    batch, dim, dstate, rank = sizes
    call = build(batch, dim, 4, dstate, rank, 40, biases)(dtype, "cpu")
    args = tuple({**call.tensors, **call.options}[name] for name in NAMES)
    assert module._raw_op_accepts(args[:3], args[3:])
    got, want = outputs(mamba_step, call), op_by_op(call, row_invariant_linear)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    alone = {n: x[:1] if n in ("x", "conv_state", "ssm_state") else x for n, x in call.tensors.items()}
    row = outputs(mamba_step, call._replace(tensors=alone))
    assert all(torch.equal(a, b[:1]) for a, b in zip(row, got, strict=True))


@pytest.mark.kernels
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mamba_step_in_reduced_precision_rounds_at_the_projections_alone(dtype):
    call = build(3, 40, 4, 16, 5, 24)(dtype, "cpu")
    y, conv_state, ssm_state = outputs(mamba_step, call)
    assert y.dtype == conv_state.dtype == dtype and ssm_state.dtype == torch.float32
    args = call.tensors
    xz = row_invariant_linear(args["x"], args["in_proj"], args["in_bias"])
    assert torch.equal(conv_state, torch.cat([args["conv_state"][..., 1:], xz[:, :40, None]], dim=-1))
    # The projections by the identity leave the step between them, of rounded inputs.
    eye = {"in_proj": torch.eye(80), "in_bias": torch.zeros(80), "out_proj": torch.eye(40), "out_bias": torch.zeros(40)}
    between = to_float64(call._replace(tensors={**args, "x": xz, **eye}))
    rounded, _, want_state = outputs(mamba_step_reference, between)
    close([ssm_state], [want_state], FACTOR)
    want = torch.nn.functional.linear(rounded.to(dtype).double(), args["out_proj"].double(), args["out_bias"].double())
    rounding = 2 * torch.finfo(dtype).eps * want.abs().max()  # of y, and of the few results of the scan at a tie
    assert ((y.double() - want).abs() <= rounding).all()


@pytest.mark.kernels
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("changed", NAMES)
def test_mamba_step_wrong_shape_or_dtype_raises(changed):
    call = build(2, 6, 4, 3, 2, 5)(torch.float32, "cpu")
    op = torch.ops.eaml_ext.mamba_step.default
    args = dict(call.tensors)
    value = args[changed]
    for bad in (torch.cat([value, value], dim=-1), value.half(), value[..., None]):
        with pytest.raises((ValueError, RuntimeError), match=r"^mamba_step: "):
            op(*({**args, changed: bad}[name] for name in NAMES))


@pytest.mark.kernels
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kind", [ValueError, RuntimeError])  # of torch before 2.15, and later
def test_mamba_step_runs_op_by_op_after_a_check_of_the_op_and_passes_other_errors(kind, monkeypatch):
    call = build(2, 6, 4, 3, 2)(torch.float32, "cpu")
    want = outputs(mamba_step, call)

    def fail(*args):
        raise kind(sentence)

    monkeypatch.setattr(module, "_op", fail)
    sentence = "mamba_step: D has a wrong shape"
    torch.testing.assert_close(outputs(mamba_step, call), want)
    if kind is RuntimeError:
        sentence = "not enough memory: you tried to allocate 8 bytes"
        with pytest.raises(RuntimeError, match=r"^not enough memory"):
            outputs(mamba_step, call)


@pytest.mark.kernels
def test_mamba_step_is_counted_by_flop_counter():
    from torch.utils.flop_counter import FlopCounterMode

    call = build(2, 6, 4, 3, 2, 5)(torch.float32, "cpu")
    ((op, args),) = raw_calls(call)
    with FlopCounterMode(display=False) as counter:
        op(*args)
    projections = 12 * 5 + 8 * 6 + 6 * 2 + 6 * 6
    assert counter.get_total_flops() == 2 * 2 * 6 * 4 + 2 * 2 * projections + 6 * 2 * 6 * 3
