"""causal_conv1d and causal_conv1d_step pass the conformance tests of every op."""

from typing import Any

import pytest
import torch
from conv_cases import (
    CASES,
    DIFFERENTIABLE,
    FACTOR,
    REPRESENTATIVE,
    SHAPES,
    build,
    differentiable,
    drawn,
    raw_calls,
)
from hypothesis import strategies as st
from op_calls import Build, Call, channel_last, close, gradients, leaves, noise, outputs, to_float64
from op_conformance import Op, OpConformance
from torch import Tensor

from eaml_ext.ops import causal_conv1d, causal_conv1d_reference, causal_conv1d_step


class TestConv(OpConformance):
    op = Op(
        function=causal_conv1d,
        reference=causal_conv1d_reference,
        differentiable=DIFFERENTIABLE,
        cases=CASES,
        shapes=SHAPES,
        parallel=build("bias", "initial_states", "reset", batch=4, dim=300, length=600, activation="silu"),
        drawn=drawn(),
        raw=raw_calls,
        factor=FACTOR,
        compiled=("plain", "per_task", "packed", "all"),
        representative=REPRESENTATIVE,
    )


def as_step(conv: Build) -> Build:
    """Return the call of causal_conv1d_step that equals a convolution of length 1."""

    def make(dtype: torch.dtype, device: str) -> Call:
        tensors, options = conv(dtype, device)
        rest = {n: v for n, v in tensors.items() if n in ("weight", "bias")}
        state = tensors["initial_states"]
        return Call({"x": tensors["x"][..., 0], "conv_state": state, **rest}, {"activation": options["activation"]})

    return make


def step_reference(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Any = None, activation: Any = None) -> Any:
    options = {"return_final_states": True, "activation": activation}
    y, state = causal_conv1d_reference(x.unsqueeze(-1), weight, bias, initial_states=conv_state, **options)
    return y.squeeze(-1), state


class TestStep(OpConformance):
    op = Op(
        function=causal_conv1d_step,
        reference=step_reference,
        differentiable=("x", "conv_state", "weight", "bias"),
        cases={
            "plain": as_step(build("initial_states", length=1, width=2)),
            "per_task": as_step(build("initial_states", "bias", tasks=("weight", "bias"), batch=4, dim=2, length=1)),
            "all": as_step(build("initial_states", "bias", length=1, activation="silu")),
        },
        shapes={
            "batch0": as_step(build("initial_states", "bias", length=1, batch=0)),
            "units": as_step(build("initial_states", "bias", batch=3, dim=150, length=1, activation="silu")),
        },
        parallel=as_step(build("initial_states", "bias", batch=500, dim=300, length=1, activation="silu")),
        drawn=st.builds(
            lambda *present, **sizes: as_step(build("initial_states", *present, length=1, **sizes)),
            batch=st.integers(0, 5),
            dim=st.integers(1, 100),
            width=st.integers(1, 5),
            seed=st.integers(0, 999),
        ),
        raw=lambda call: raw_calls(
            Call(
                {"x": call.tensors["x"].unsqueeze(-1), "weight": call.tensors["weight"]},
                {**call.options, "return_final_states": False},
            )
        ),
        factor=FACTOR,
        compiled=("all",),
    )


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("order", [3, 4])
def test_causal_conv1d_higher_order_derivatives_match_reference_without_a_warning(activation, order, device, recwarn):
    call = build("bias", "initial_states", "reset", activation=activation, dim=2)(torch.float64, device)
    names = differentiable(call)

    def nested(function: Any) -> list[Tensor]:
        def loss(*values: Tensor) -> Tensor:
            y, states = function(**{**call.tensors, **dict(zip(names, values, strict=True))}, **call.options)
            return y.pow(3).sum() + states.pow(3).sum()

        f = loss
        for _ in range(order - 1):
            f = (lambda g: lambda *v: sum(d.square().sum() for d in torch.func.grad(g, (0, 1, 2, 3))(*v)))(f)
        return list(torch.func.grad(f, (0, 1, 2, 3))(*(call.tensors[n] for n in names)))

    close(nested(causal_conv1d), nested(causal_conv1d_reference), 64 * FACTOR)
    assert not [w for w in recwarn if "no kernel" in str(w.message)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["plain", "silu", "per_task", "packed", "all", "lanes_and_one", "units"])
def test_causal_conv1d_reduced_precision_close_to_float64(name, dtype, device):
    """Sums are in float32, so each result has one rounding to half precision, and no difference if it cancels."""
    call = {**CASES, **SHAPES}[name](torch.float32, device)
    tensors = {n: v.to(dtype) if n in ("x", "initial_states") else v for n, v in call.tensors.items()}
    call = call._replace(tensors=tensors)
    exact, names = to_float64(call), differentiable(call)
    v = [direction.to(tensors[n].dtype) for n, direction in zip(names, noise([tensors[n] for n in names]), strict=True)]

    def results(function: Any, call: Call) -> list[Tensor]:
        x = leaves(call, names)
        outs = outputs(function, call, **x)
        first = gradients(outs, list(x.values()), [out.detach() * 0 + 0.5 for out in outs], create_graph=True)
        second = gradients(first, list(x.values()), [d.to(g.dtype) for g, d in zip(first, v, strict=True)])
        return [*(out.detach() for out in outs), *(g.detach() for g in first), *second]

    want = results(causal_conv1d_reference, exact)
    for layout in (torch.Tensor.contiguous, channel_last):
        call.tensors["x"] = layout(call.tensors["x"])
        for got, exact_result in zip(results(causal_conv1d, call), want, strict=True):
            close([got], [exact_result], 1 if got.dtype == dtype else FACTOR)
