"""Calls of the scan and of its step for the tests: cases, shapes, drawn calls, and other ways to compute a scan."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from op_calls import Build, Call, outputs
from torch import Tensor

from eaml_ext.ops import selective_scan, selective_scan_reference, selective_scan_step
from eaml_ext.ops.selective_scan import ARGUMENTS, ScanOptions

ops = torch.ops.eaml_ext
OPTIONAL = ("D", "z", "delta_bias", "initial_state", "reset")
HALVES = (torch.bfloat16, torch.float16)

# Successive roundings of an output or gradient: a dozen in a step and its exp, over about three steps at the decay
# drawn here. Each of the two derivatives adds the same number.
FACTOR = 32


def build(
    *present: str,
    batch: int = 2,
    dim: int = 3,
    length: int = 5,
    state: int = 3,
    tasks: tuple[str, ...] = (),
    groups: int | None = None,
    invariant: tuple[str, ...] = (),
    lengths: Sequence[int] | None = None,
    softplus: bool = False,
    last: bool = True,
    seed: int = 0,
) -> Build:
    """Build a call with the optional arguments ``present``; ``tasks`` names the parameters that differ per task.

    With ``lengths``, the call has one row of packed sequences of these lengths; ``batch`` and ``length`` are unused.
    ``cu_seqlens`` is an option, because the values of an integer tensor cannot be changed at will.
    """
    if lengths is not None:
        batch, length = 1, sum(lengths)

    def make(dtype: torch.dtype, device: str) -> Call:
        draw = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw)

        def parameter(name: str, *shape: int) -> Tensor:
            return randn(*(2,) * (name in tasks), *shape)

        def matrix(name: str) -> Tensor:
            shape = (dim, state)
            if name not in invariant:
                shape = (batch, state, length) if groups is None else (batch, groups, state, length)
            return randn(*shape) * min(1.0, 4 * state**-0.5)  # bounds sums over more than 16 states

        tensors = {
            "u": randn(batch, dim, length),
            "delta": randn(batch, dim, length) if softplus else 0.2 + randn(batch, dim, length).abs(),
            "A": -0.3 - parameter("A", dim, state).abs(),
            "B": matrix("B"),
            "C": matrix("C"),
            "D": parameter("D", dim),
            "z": randn(batch, dim, length),
            "delta_bias": parameter("delta_bias", dim) if softplus else parameter("delta_bias", dim).abs(),  # dt > 0
            "initial_state": randn(batch if lengths is None else len(lengths), dim, state),
            "reset": randn(batch, length) > 0.7,
        }
        kept = {
            name: (x.to(dtype) if x.is_floating_point() else x).to(device)
            for name, x in tensors.items()
            if name not in OPTIONAL or name in present
        }
        options: dict[str, Any] = {"delta_softplus": softplus, "return_last_state": last}
        if lengths is not None:
            options["cu_seqlens"] = cu_seqlens_of(lengths).to(device)
        return Call(kept, options)

    return make


def cu_seqlens_of(lengths: Sequence[int]) -> Tensor:
    """Return the boundaries of packed sequences of these lengths."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


CASES = {
    "plain": build(state=1),
    "y_alone": build("z", last=False),
    "softplus": build("delta_bias", softplus=True),
    "per_task": build("D", "delta_bias", tasks=("A", "D", "delta_bias"), batch=4, dim=2, length=3, softplus=True),
    "groups": build("initial_state", groups=2, dim=4, length=3),
    "invariant": build("reset", invariant=("B", "C")),
    "mixed": build("D", "initial_state", invariant=("B",), groups=1),
    "step": build(*OPTIONAL, length=1, invariant=("C",)),
    "packed": build(*OPTIONAL, softplus=True, dim=2, lengths=(2, 0, 1, 2), state=2),
    "all": build(*OPTIONAL, softplus=True, dim=2, length=4, state=2),
}
REPRESENTATIVE = (
    "per_task",
    "groups",
    "invariant",
    "step",
    "packed",
)  # together, they have every optional argument and layout
SHAPES = {
    "batch0": build(*OPTIONAL, batch=0),
    "batch0_tasks": build(*OPTIONAL, batch=0, tasks=("A", "D"), invariant=("B",)),
    "length0": build(*OPTIONAL, length=0, softplus=True),
    "length0_invariant": build("initial_state", length=0, invariant=("B", "C")),
    "state16": build(*OPTIONAL, state=16, length=7, softplus=True),
    "state33": build("z", state=33, dim=5, length=6),
    "state256": build(*OPTIONAL, state=256, dim=5, length=6),
    "one_chunk": build("z", "reset", length=32, dim=2),
    "chunk_and_one": build("initial_state", length=33, dim=2, state=5),
    "three_chunks": build(*OPTIONAL, length=70, dim=2, state=2, softplus=True),
    "lanes_and_one": build("D", "delta_bias", dim=17, length=3, softplus=True),
    "units": build(*OPTIONAL, batch=1, dim=150, length=3, state=5),
    "units_groups": build("z", batch=1, dim=140, groups=2, length=3, state=2),
    "packed_none": build("initial_state", lengths=()),
    "packed_empty": build(*OPTIONAL, lengths=(0, 0)),
    "packed_chunks": build(*OPTIONAL, dim=2, lengths=(31, 0, 1, 33, 64, 2), softplus=True),
    "packed_groups": build(dim=34, groups=2, lengths=(3, 40), state=5, invariant=("C",)),
    "units_invariant": build("z", batch=2, dim=70, length=3, invariant=("B", "C"), tasks=("A",)),
}


def differentiable(call: Call) -> list[str]:
    """Return the differentiable arguments that are present."""
    return [name for name in ARGUMENTS if name in call.tensors]


def raw_calls(call: Call) -> list[tuple[Any, tuple[Any, ...]]]:
    """Return the four raw ops with the arguments that this call gives them."""
    x = [call.tensors.get(name) for name in ARGUMENTS]
    reset, softplus = call.tensors.get("reset"), call.options["delta_softplus"]
    invariant = [call.tensors[name].dim() == 2 for name in "BC"]
    options = ScanOptions(reset, call.options.get("cu_seqlens"), softplus, *invariant, False)
    y, last, saved = ops.selective_scan(*x, *options, True)
    along = [None if v is None else torch.randn_like(v) for v in x]
    along[-1] = None
    grad_y, grad_state = torch.randn_like(y), torch.randn_like(last)
    return [
        (ops.selective_scan.default, (*x, *options, True)),
        (ops.selective_scan.default, (*x, *options, False)),
        (ops.selective_scan_backward.default, (grad_y, grad_state, *x, *options, saved)),
        (ops.selective_scan_backward.default, (grad_y, None, *x, *options, None)),
        (ops.selective_scan_jvp.default, (*x, *along, *options)),
        (ops.selective_scan_backward_jvp.default, (grad_y, grad_state, grad_y, None, *x, *along, *options, True)),
        (ops.selective_scan_backward_jvp.default, (grad_y, None, None, None, *x, *along, *options, False)),
    ]


drawn_lengths = st.lists(st.integers(0, 40) | st.sampled_from((0, 1, 32, 33)), max_size=5)


@st.composite
def drawn(draw: Any) -> Build:
    tasks = draw(st.lists(st.sampled_from(("A", "D", "delta_bias", "B", "C")), unique=True))
    invariant = draw(st.sampled_from(((), ("B",), ("C",), ("B", "C"))))
    groups = draw(st.sampled_from((None, 1, 2, 3)))
    large = draw(st.integers(0, 7)) == 7  # many states, few channels and steps
    lengths = None if tasks else draw(st.none() | drawn_lengths)
    return build(
        *draw(st.lists(st.sampled_from(OPTIONAL), unique=True)),
        batch=2 * draw(st.integers(0, 2)) if tasks else draw(st.integers(0, 3)),
        dim=(1 if large else draw(st.integers(1, 40))) * (groups or 1),
        length=draw(st.integers(0, 5) if large else st.integers(0, 40) | st.sampled_from((64, 65, 97))),
        state=draw(st.sampled_from((16, 17, 33, 64)) if large else st.integers(1, 9)),
        tasks=tuple(tasks),
        groups=groups,
        invariant=invariant,
        lengths=lengths,
        softplus=draw(st.booleans()),
        last=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )


# ---- one step ----------------------------------------------------------------------------------------------------


def as_step(scan: Build) -> Build:
    """Return the call of selective_scan_step that equals a scan of length 1."""

    def make(dtype: torch.dtype, device: str) -> Call:
        tensors, options = scan(dtype, device)
        state = {"state": tensors["initial_state"]}
        rest = {n: x.squeeze(-1) if n in ("u", "delta", "z", "B", "C") else x for n, x in tensors.items()}
        rest.pop("initial_state")
        return Call({**state, **rest}, {"delta_softplus": options["delta_softplus"]})

    return make


def as_scan(state, u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False) -> Call:
    tensors = {
        "u": u.unsqueeze(-1),
        "delta": delta.unsqueeze(-1),
        "A": A,
        "B": B.unsqueeze(-1),
        "C": C.unsqueeze(-1),
        "D": D,
        "z": None if z is None else z.unsqueeze(-1),
        "delta_bias": delta_bias,
        "initial_state": state,
    }
    options = {"delta_softplus": delta_softplus, "return_last_state": True}
    return Call({n: x for n, x in tensors.items() if x is not None}, options)


def step_reference(**arguments: Any) -> tuple[Tensor, Tensor]:
    y, last = outputs(selective_scan_reference, as_scan(**arguments))
    return y.squeeze(-1), last


# ---- the same scan, computed in parts ----------------------------------------------------------------------------

SEQUENCES = ("u", "delta", "z", "reset")


def steps_of(tensors: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """Return the arguments of a scan over steps start..stop."""
    variable = {n for n in ("B", "C") if tensors[n].dim() > 2}
    return {n: x[..., start:stop] if n in SEQUENCES or n in variable else x for n, x in tensors.items()}


def in_segments(*starts: int) -> Any:
    """Return a scan in segments that start at these steps, each from the last state of the one before."""

    def function(delta_softplus: bool, return_last_state: bool, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        bounds = [0, *starts, tensors["u"].shape[-1]]
        state, ys = tensors["initial_state"], []
        for start, stop in itertools.pairwise(bounds):
            segment = steps_of({**tensors, "initial_state": state}, start, stop)
            y, state = selective_scan(**segment, delta_softplus=delta_softplus, return_last_state=True)
            ys.append(y)
        return torch.cat(ys, -1), state

    return function


def in_steps(delta_softplus: bool, return_last_state: bool, **tensors: Tensor) -> tuple[Tensor, Tensor]:
    state, ys = tensors["initial_state"], []
    for t in range(tensors["u"].shape[-1]):
        step = {
            n: x.squeeze(-1) if n in ("u", "delta", "z", "B", "C") else x
            for n, x in steps_of(tensors, t, t + 1).items()
        }
        reset = step.pop("reset", None)
        step.pop("initial_state")
        if reset is not None:
            state = torch.where(reset[..., None], 0, state)
        y, state = selective_scan_step(state, **step, delta_softplus=delta_softplus)
        ys.append(y)
    return torch.stack(ys, -1), state


def in_episodes(delta_softplus: bool, return_last_state: bool, **tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Scan every episode of every row from a zero state; a reset starts an episode."""
    ys, states = [], []
    reset = tensors.pop("reset")
    for row in range(reset.shape[0]):
        alone = {n: x[row : row + 1] if n not in ("A", "D", "delta_bias") else x for n, x in tensors.items()}
        bounds = sorted({0, *reset[row].nonzero().flatten().tolist(), reset.shape[1]})
        episodes = []
        for start, stop in itertools.pairwise(bounds):
            episode = steps_of(alone, start, stop)
            if reset[row, start]:
                episode["initial_state"] = torch.zeros_like(episode["initial_state"])
            y, state = selective_scan(**episode, delta_softplus=delta_softplus, return_last_state=True)
            episodes.append(y)
        ys.append(torch.cat(episodes, -1))
        states.append(state)
    return torch.cat(ys), torch.cat(states)


# ---- errors ------------------------------------------------------------------------------------------------------


def check_error(function: Any, arguments: dict[str, Any], name: str, error: type[Exception]) -> None:
    """Assert that a call raises ``error`` with one sentence that contains the argument's name and no path."""
    with pytest.raises((TypeError, ValueError)) as caught:
        function(**arguments)
    message = str(caught.value)
    assert caught.type is error
    assert message.startswith(f"{function.__name__}: ")
    words = message.replace(":", " ").replace(",", " ").split()
    assert name in words, message
    assert "\n" not in message and "/" not in message and ".py" not in message, message
    assert ". " not in message and not message.endswith("."), message
