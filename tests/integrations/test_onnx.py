"""translation_table(): exported models have the outputs of the ops in onnxruntime, at other batches and lengths."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.export import Dim

pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install 'eaml_ext[onnx]'")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install onnxruntime")

import onnxruntime

from eaml_ext import SSM, Mamba, Mamba2
from eaml_ext.integrations.onnx import translation_table
from eaml_ext.ops import causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step

BATCH, TIME = Dim("batch"), Dim("time")
SEQUENCE, ROWS = {0: BATCH, 1: TIME}, {0: BATCH}
SIZES = [(1, 7), (3, 1), (3, 7), (2, 300)]
REAL_CORES = ["s6", "mamba", "ssd", "rwkv"]
COMPLEX_CORES = ["s4d", "s5", "lru", "retention"]

leaves = torch.utils._pytree.tree_leaves


class Call(nn.Module):
    """A module whose forward is a function of the arguments; it holds the layer of the function."""

    def __init__(self, function, layer=None):
        super().__init__()
        self.function, self.layer = function, layer

    def forward(self, *args):
        return self.function(*args)


def export(function, args, dynamic_shapes, layer=None, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        return torch.onnx.export(
            Call(function, layer),
            args,
            dynamic_shapes=(dynamic_shapes,),
            custom_translation_table=translation_table(),
            verbose=False,
            **options,
        )


def check(program, function, draws):
    """Compare onnxruntime with the function on arguments, relative to the largest number of each output."""
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [node.name for node in session.get_inputs()]
    for args in draws:
        feeds = {name: value.numpy() for name, value in zip(names, leaves(args), strict=True)}
        for want, got in zip(leaves(function(*args)), session.run(None, feeds), strict=True):
            got = torch.from_numpy(got)
            assert got.dtype == want.dtype and got.shape == want.shape
            atol = 1e-5 * max(1.0, want.abs().max().item() if want.numel() else 0.0)
            rtol = torch.finfo(want.dtype).eps if want.dtype == torch.float16 else 0  # sums in float32, rounded once
            torch.testing.assert_close(got, want.detach(), rtol=rtol, atol=atol)


def op_types(program):
    return [node.op_type for node in program.model.graph]


def random_reset(batch, length):
    return torch.rand(batch, length) < 0.2


# ---- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("core", REAL_CORES)
def test_ssm_export_equals_model(core):
    model = SSM(3, 16, 2, state_size=4, core=core)
    before = copy.deepcopy(model.state_dict())

    def function(x, state, reset, lengths, observation):
        return model(x), model.scan(x, state, reset), model.scan(x, None, None, lengths), model.step(observation, state)

    def draw(batch, length):
        state, lengths = torch.randn(model.init_hidden(batch).shape), torch.randint(length + 1, (batch,))
        return torch.randn(batch, length, 3), state, random_reset(batch, length), lengths, torch.randn(batch, 3)

    program = export(function, draw(2, 5), (SEQUENCE, ROWS, SEQUENCE, ROWS, ROWS), model)
    check(program, function, [draw(*sizes) for sizes in SIZES])
    # A step of RWKV is a scan of two steps.
    assert op_types(program).count("Scan") == 3 + (core == "rwkv")
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("layer", [Mamba(8, d_state=4), Mamba2(8, d_state=4, headdim=4, ngroups=2)], ids=str)
def test_mamba_export_equals_layer(layer):
    def function(x, states, reset, lengths):
        return (
            layer(x),
            layer.scan(x, states, reset),
            layer.scan(x, states, reset, lengths),
            layer.step(x[:, 0], *states),
        )

    def draw(batch, length):
        states = tuple(torch.randn(state.shape) for state in layer.allocate_inference_cache(batch))
        lengths = torch.randint(length + 1, (batch,))
        return torch.randn(batch, length, 8), states, random_reset(batch, length), lengths

    program = export(function, draw(2, 5), (SEQUENCE, (ROWS, ROWS), SEQUENCE, ROWS), layer)
    check(program, function, [draw(*sizes) for sizes in SIZES])
    assert "Conv" in op_types(program)


def test_ssm_export_without_table_names_the_op():
    with pytest.raises(Exception, match=r"eaml_ext\.selective_scan"):
        torch.onnx.export(SSM(3, 4, 2).eval(), (torch.randn(2, 5, 3),), verbose=False)


@pytest.mark.parametrize("core", COMPLEX_CORES)
def test_ssm_export_complex_core_raises(core):
    model = SSM(3, 4, 2, state_size=2, core=core)
    with pytest.raises(Exception, match="selective_scan: A must be real in an export to ONNX, got complex64"):
        export(model, (torch.randn(2, 5, 3),), (SEQUENCE,), model)
    assert model(torch.randn(2, 5, 3)).shape == (2, 5, 2)


def test_mamba_export_cu_seqlens_raises():
    layer = Mamba(8)
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    with pytest.raises(Exception, match="cu_seqlens must be None in an export to ONNX, got a tensor"):
        export(lambda x, c: layer(x, cu_seqlens=c), (torch.randn(1, 5, 8), cu_seqlens), (None, None), layer)


# ---- ops -------------------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, *(pytest.param(d, marks=pytest.mark.exhaustive) for d in (torch.float64, torch.float16))]
DIM, DSTATE, GROUPS, WIDTH, TASKS = 6, 4, 3, 4, 2


def scan_variants(dtype):
    """Return functions of (u, delta, B, C, z, state, reset), which together use every option of the scan."""
    A, A_tasks = -torch.rand(DIM, DSTATE, dtype=dtype), -torch.rand(TASKS, DIM, DSTATE, dtype=dtype)
    D, D_tasks, bias = (
        torch.randn(DIM, dtype=dtype),
        torch.randn(TASKS, DIM, dtype=dtype),
        torch.randn(DIM, dtype=dtype),
    )
    bias_tasks = torch.randn(TASKS, DIM, dtype=dtype)
    M, M_tasks = torch.randn(DIM, DSTATE, dtype=dtype), torch.randn(TASKS, DIM, DSTATE, dtype=dtype)
    return [
        lambda u, delta, B, C, z, state, reset: selective_scan(u, delta.sigmoid(), A, B, C),
        lambda u, delta, B, C, z, state, reset: selective_scan(
            u, delta, A, B[:, 0], C[:, 0], D, z, bias, True, True, initial_state=state, reset=reset
        ),
        lambda u, delta, B, C, z, state, reset: selective_scan(
            u, delta, A_tasks, B, C, D_tasks, z, bias_tasks, True, True, initial_state=state
        ),
        lambda u, delta, B, C, z, state, reset: selective_scan(u, delta, A, M, C, D, delta_softplus=True),
        lambda u, delta, B, C, z, state, reset: selective_scan(u, delta - 9, A, B, M, delta_softplus=True),
        lambda u, delta, B, C, z, state, reset: selective_scan(u, delta, A, M, C, None, z, bias, True, reset=reset),
        # Under torch.vmap, matrices that are the same at every step may have one entry per task.
        lambda u, delta, B, C, z, state, reset: torch.ops.eaml_ext.selective_scan(
            u, delta, A, M_tasks, M_tasks, D, None, None, state, None, None, True, True, True, False, False
        )[:2],
        lambda u, delta, B, C, z, state, reset: selective_scan(
            u, delta, A, B, C, D, seq_idx=reset.cumsum(1).int(), delta_softplus=True
        ),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selective_scan_export_equals_op(dtype):
    opmath = torch.float64 if dtype == torch.float64 else torch.float32
    variants = scan_variants(opmath)

    def function(*args):
        return [variant(*args) for variant in variants]

    def draw(batch, length):
        u, delta, z = (torch.randn(batch, length, DIM, dtype=dtype).mT for _ in range(3))
        B, C = (torch.randn(batch, GROUPS, DSTATE, length, dtype=dtype) for _ in range(2))
        return u, delta, B, C, z, torch.randn(batch, DIM, DSTATE, dtype=opmath), random_reset(batch, length)

    rows = {0: TASKS * Dim("rows")}
    sequence, matrix = {**rows, 2: TIME}, {**rows, 3: TIME}
    shapes = (sequence, sequence, matrix, matrix, sequence, rows, {**rows, 1: TIME})
    program = export(function, draw(4, 5), shapes)
    check(program, function, [draw(*sizes) for sizes in ((2, 1), (4, 7), (2, 100))])


@torch.no_grad()
@pytest.mark.parametrize("matrices_rank", [2, 3])
def test_steps_export_equals_ops(matrices_rank):
    A, D, bias, weight = -torch.rand(TASKS, DIM, DSTATE), torch.randn(DIM), torch.randn(DIM), torch.randn(DIM, WIDTH)

    def function(u, delta, B, C, state, conv_state):
        x, conv_state = causal_conv1d_step(u, conv_state, weight, bias, "silu")
        one_step = selective_scan(*(v.unsqueeze(-1) for v in (x, delta)), A, *(v.unsqueeze(-1) for v in (B, C)), D)
        return selective_scan_step(state, x, delta, A, B, C, D, u, bias, True), one_step, conv_state

    def draw(batch):
        sizes = (DSTATE,) if matrices_rank == 2 else (GROUPS, DSTATE)
        B, C = (torch.randn(batch, *sizes) for _ in range(2))
        u, delta = torch.randn(batch, DIM), torch.randn(batch, DIM)
        return u, delta, B, C, torch.randn(batch, DIM, DSTATE), torch.randn(batch, DIM, WIDTH)

    program = export(function, draw(4), ({0: TASKS * Dim("rows")},) * 6)
    assert "Scan" not in op_types(program)
    check(program, function, [draw(batch) for batch in (2, 4, 6)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_causal_conv1d_export_equals_op(dtype):
    opmath = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = torch.randn(TASKS, DIM, WIDTH, dtype=opmath), torch.randn(TASKS, DIM, dtype=opmath)
    wide = torch.randn(DIM, 6, dtype=opmath)  # more taps than the kernels take

    def function(x, states, reset):
        return [
            causal_conv1d(x, weight[0]),
            causal_conv1d(x, weight[1], bias[0], None, states, True, activation="silu"),
            causal_conv1d(x, weight[0], bias[0], initial_states=states, return_final_states=True, reset=reset),
            causal_conv1d(x, weight, bias, None, states, activation="silu", reset=reset),
            causal_conv1d(x, weight),
            causal_conv1d(x, weight[0, :, :1]),
            causal_conv1d(x, weight[0], seq_idx=reset.cumsum(1).int(), initial_states=states),
            causal_conv1d(x, wide, bias[0]),
        ]

    def draw(batch, length):
        x, states = torch.randn(batch, length, DIM, dtype=dtype).mT, torch.randn(batch, DIM, WIDTH - 1, dtype=dtype)
        return x, states, random_reset(batch, length)

    rows = {0: TASKS * Dim("rows")}
    program = export(function, draw(4, 5), ({**rows, 2: TIME}, rows, {**rows, 1: TIME}))
    check(program, function, [draw(*sizes) for sizes in ((2, 1), (4, 7), (2, 100))])
