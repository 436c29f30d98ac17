"""rms_norm: the conformance tests of every op, and the bits of its rows."""

import pytest
import torch
from hypothesis import strategies as st
from op_calls import Build, Call
from op_conformance import Op, OpConformance

from eaml_ext.ops.rms_norm import rms_norm, rms_norm_reference


def build(rows: tuple[int, ...] = (2,), size: int = 3, weight: bool = True, seed: int = 0) -> Build:
    def make(dtype: torch.dtype, device: str) -> Call:
        draw = torch.Generator().manual_seed(seed)
        tensors = {"x": torch.randn(*rows, size, generator=draw), "weight": torch.randn(size, generator=draw)}
        kept = {name: x.to(dtype).to(device) for name, x in tensors.items() if weight or name == "x"}
        return Call(kept, {"eps": 0.1} if weight else {"eps": 0.1, "weight": None})

    return make


def raw_calls(call: Call):
    x, weight = call.tensors["x"], call.tensors.get("weight")
    return [(torch.ops.eaml_ext.rms_norm.default, (x.reshape(-1, x.shape[-1]), weight, call.options["eps"]))]


class TestRMSNorm(OpConformance):
    op = Op(
        function=rms_norm,
        reference=rms_norm_reference,
        differentiable=("x", "weight"),
        cases={"no_weight": build(weight=False), "all": build()},
        shapes={"rows0": build((0,)), "vector": build((), 5), "batch": build((2, 3), 77), "rows": build((40,), 33)},
        parallel=build((300,), 512),
        drawn=st.builds(
            build,
            rows=st.lists(st.integers(0, 4), max_size=2).map(tuple),
            size=st.integers(1, 100),
            weight=st.booleans(),
            seed=st.integers(0, 999),
        ),
        raw=raw_calls,
        factor=32,
    )


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 7, 64, 100, 768])
def test_rms_norm_row_has_the_bits_of_the_batch(size, dtype):
    x, weight = torch.randn(70, size, dtype=dtype), torch.randn(size, dtype=dtype)
    y = rms_norm(x, weight)
    assert all(torch.equal(rms_norm(x[i], weight), y[i]) for i in range(70))
    assert torch.equal(rms_norm(x.mT.contiguous().mT, weight), y)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_half_types_have_the_numbers_of_float32_rounded_once(dtype):
    x, weight = torch.randn(9, 100, dtype=dtype), torch.randn(100, dtype=dtype)
    assert torch.equal(rms_norm(x, weight), rms_norm(x.float(), weight.float()).to(dtype))


@pytest.mark.kernels
@pytest.mark.parametrize("bad", [torch.ones(4), torch.ones(3, 1), torch.ones(3).double()], ids=["size", "dim", "dtype"])
def test_rms_norm_op_wrong_weight_raises(bad):
    with pytest.raises((ValueError, RuntimeError), match=r"^rms_norm: x and weight must be"):
        torch.ops.eaml_ext.rms_norm.default(torch.ones(2, 3), bad, 0.1)
