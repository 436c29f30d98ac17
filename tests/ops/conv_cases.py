"""Calls of the causal convolution for the tests: cases, shapes, drawn calls, and an oracle of plain loops."""

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from op_calls import Build, Call
from torch import Tensor

from eaml_ext.ops.causal_conv1d import ConvOptions

ops = torch.ops.eaml_ext
DIFFERENTIABLE = ("x", "weight", "bias", "initial_states")

# Successive roundings of an output or gradient: those of the taps and of silu. Each derivative adds the same number.
FACTOR = 32


def build(
    *present: str,
    batch: int = 2,
    dim: int = 3,
    length: int = 6,
    width: int = 4,
    tasks: tuple[str, ...] = (),
    cu_seqlens: tuple[int, ...] | None = None,
    activation: str | None = None,
    final: bool = True,
    seed: int = 0,
) -> Build:
    """Build a call with the optional arguments ``present``; ``tasks`` names the parameters that differ per task."""

    def make(dtype: torch.dtype, device: str) -> Call:
        draw = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw)

        def parameter(name: str, *shape: int) -> Tensor:
            return randn(*(2,) * (name in tasks), *shape)

        rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
        tensors = {
            "x": randn(batch, dim, length),
            "weight": parameter("weight", dim, width),
            "bias": parameter("bias", dim),
            "initial_states": randn(rows, dim, width - 1),
            "reset": randn(batch, length) > 0.7,
        }
        kept = {
            name: (x.to(dtype) if x.is_floating_point() else x).to(device)
            for name, x in tensors.items()
            if name in ("x", "weight", *present)
        }
        options: dict[str, Any] = {"activation": activation, "return_final_states": final}
        if cu_seqlens is not None:  # not a tensor of the call: no layout or vmapped dimension changes its values
            options["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
        return Call(kept, options)

    return make


CASES = {
    "plain": build(width=2),
    "y_alone": build("bias", width=3, final=False),
    "silu": build("bias", "initial_states", activation="silu"),
    "per_task": build("bias", tasks=("weight", "bias"), batch=4, dim=2, activation="silu"),
    "reset": build("reset", "initial_states", width=3),
    "packed": build("bias", "initial_states", batch=1, length=7, cu_seqlens=(0, 3, 3, 4, 7), activation="silu"),
    "short": build("initial_states", length=2),
    "all": build("bias", "initial_states", "reset", dim=2, activation="silu"),
}
REPRESENTATIVE = ("per_task", "packed", "all")  # together, they have every argument
SHAPES = {
    "batch0": build("bias", "initial_states", "reset", batch=0),
    "dim0": build("bias", "initial_states", dim=0),
    "length0": build("bias", "initial_states", "reset", length=0),
    "length0_packed": build("initial_states", batch=1, length=0, cu_seqlens=(0, 0, 0)),
    "no_sequence": build("bias", "initial_states", batch=1, length=0, cu_seqlens=(0,)),
    "one_tap": build("bias", "initial_states", width=1),
    "five_taps": build("bias", "initial_states", "reset", width=5, activation="silu"),
    "one_step": build("bias", "initial_states", "reset", length=1, dim=20, activation="silu"),
    "tile_and_one": build("bias", "reset", length=33, dim=2, activation="silu"),
    "lanes_and_one": build("bias", "initial_states", dim=17, length=5, activation="silu"),
    "units": build("bias", "initial_states", "reset", batch=1, dim=150, length=5, activation="silu"),
    # With silu: without it the gradient of the bias is a sum of cotangents, which cancel.
    "segments": build("bias", "reset", batch=1, dim=2, length=1030, width=3, activation="silu"),
    "packed_long": build("bias", "initial_states", batch=1, dim=2, length=70, cu_seqlens=(0, 1, 3, 33, 33, 64, 70)),
}


def differentiable(call: Call) -> list[str]:
    """Return the differentiable arguments that are present."""
    return [name for name in DIFFERENTIABLE if name in call.tensors]


def raw_calls(call: Call) -> list[tuple[Any, tuple[Any, ...]]]:
    """Return the two raw ops with the arguments that this call gives them."""
    x, weight, bias, states, reset = (call.tensors.get(name) for name in (*DIFFERENTIABLE, "reset"))
    cu_seqlens = call.options.get("cu_seqlens")
    states = None if states is None else states.unsqueeze(1 if cu_seqlens is None else 0)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.unsqueeze(0)
    options = ConvOptions(reset, cu_seqlens, call.options["activation"] is not None)
    assert x is not None
    return [
        (ops.causal_conv1d.default, (x, weight, bias, states, *options)),
        (ops.causal_conv1d_backward.default, (torch.randn_like(x), x, weight, bias, states, *options)),
    ]


@st.composite
def drawn(draw: Any) -> Build:
    packed = draw(st.booleans())
    length = draw(st.integers(0, 40) | st.sampled_from((64, 65, 97)))
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=5))) if packed else []
    optional = draw(st.lists(st.sampled_from(("bias", "initial_states", "reset")), unique=True))
    tasks = () if packed else draw(st.sampled_from(((), ("weight",), ("weight", "bias"))))
    return build(
        *(name for name in optional if not packed or name != "reset"),
        batch=1 if packed else 2 * draw(st.integers(0, 2)) if tasks else draw(st.integers(0, 3)),
        dim=draw(st.integers(0, 40)),
        length=length,
        width=draw(st.integers(1, 5)),
        tasks=tasks,
        cu_seqlens=(0, *cuts, length) if packed else None,
        activation=draw(st.sampled_from((None, "silu"))),
        final=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )


# ---- an oracle that shares no code with the op ---------------------------------------------------------------------


def by_episodes(x, weight, bias=None, initial_states=None, reset=None, cu_seqlens=None, activation=None):
    """Convolve every episode of every row alone, after its own history; return y and the final states."""
    rows, size = [], weight.shape[-1] - 1
    zeros = x.new_zeros(x.shape[1], size)
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        states = [zeros] * (len(bounds) - 1) if initial_states is None else list(initial_states)
        rows = [(x[0, :, a:b], s, None) for a, b, s in zip(bounds, bounds[1:], states, strict=False)]
    else:
        states = [zeros] * len(x) if initial_states is None else list(initial_states)
        rows = [(x[i], states[i], None if reset is None else reset[i]) for i in range(len(x))]
    ys, finals = [], []
    for row, state, starts in rows:
        cuts = [] if starts is None else starts.nonzero().flatten().tolist()
        parts = []
        for begin, end in zip([0, *cuts], [*cuts, row.shape[1]], strict=True):
            history = state if begin == 0 and 0 not in cuts else zeros
            inputs = torch.cat([history, row[:, begin:end]], dim=1)
            if end > begin:
                parts.append(F.conv1d(inputs[None], weight[:, None], bias, groups=len(row))[0])
        final = torch.cat([history, row[:, begin:]], dim=1)
        ys.append(torch.cat(parts, 1) if parts else row)
        finals.append(final[:, final.shape[1] - size :])
    y = torch.cat(ys, 1)[None] if cu_seqlens is not None else torch.stack(ys)
    return (F.silu(y) if activation else y), torch.stack(finals)
