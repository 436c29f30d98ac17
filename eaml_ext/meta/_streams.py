"""Batches of streams: their checks, and the chunks into which they are cut."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from eaml_ext import _check
from eaml_ext._torch_compat import tree_leaves, tree_map
from eaml_ext.meta.functional import recordable


class Streams(NamedTuple):
    """A batch of streams, cut into chunks.

    Attributes:
        chunks: for each chunk ``x`` and ``y`` ``(streams, 1, time, ...)``, perhaps ``reset`` and ``mask``
            ``(streams, 1, time)``, bool.
        state: the state before the first chunk, ``{"state": (streams, 1, ...)}`` or empty.
        items: with experience, ``x`` and ``y`` ``(streams, past + chunks, time, ...)`` of all chunks that the memory
            ever holds, in the order in which they are written; else empty.
        past: how many of them it holds from the start.
    """

    chunks: list[dict[str, Tensor]]
    state: dict[str, Any]
    items: dict[str, Tensor]
    past: int


def is_recurrent(model: nn.Module) -> bool:
    """Return whether a model keeps a state along a stream: it has ``scan`` and ``step``, as ``nn.SSM``."""
    return hasattr(model, "scan") and hasattr(model, "step")


def takes(model: nn.Module, name: str) -> bool:
    """Return whether the call of a model on a chunk has an argument with this name."""
    call: Any = model.scan if is_recurrent(model) else model.forward
    arguments = inspect.signature(call).parameters
    return name in arguments or any(a.kind is a.VAR_KEYWORD for a in arguments.values())


def check_pair(where: str, model: nn.Module, result: Any) -> tuple[Any, Any]:
    """Return the result of ``scan`` or ``step``; raise TypeError unless it is ``(prediction, state)``."""
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        got = f"{len(result)} values" if isinstance(result, (tuple, list)) else type(result).__name__
        raise TypeError(f"{where}: scan and step of {type(model).__name__} must return (prediction, state), got {got}")
    return result[0], result[1]


def check_streams(
    where: str,
    model: nn.Module,
    chunk_size: int,
    slots: int | None,
    x: Tensor,
    y: Tensor,
    *,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    hidden_state: Any = None,
    past: tuple[Tensor, Tensor] | None = None,
) -> tuple[Streams, Tensor]:
    """Check the streams; return their chunks, and the weights of their losses ``(streams, chunks)``."""
    for name, value in (("x", x), ("y", y)):
        _check.tensor(where, name, value)
        if value.dim() < 2 or value.shape[:2] != x.shape[:2] or not value.shape[0] * value.shape[1]:
            begin = f"begin with {tuple(x.shape[:2])}, as x does"
            text = "have shape (streams, time, ...), not empty" if name == "x" else begin
            raise ValueError(f"{where}: {name} must {text}, got {tuple(value.shape)}")
    _check.device(where, "y", y, x.device, "x")
    if reset is not None:
        _check.tensor(where, "reset", reset)
        _check.dtype(where, "reset", reset, (torch.bool,))
        _check.shape(where, "reset", reset, x.shape[:2], str(tuple(x.shape[:2])))
        _check.device(where, "reset", reset, x.device, "x")
    for name, given in (("reset", reset), ("hidden_state", hidden_state)):
        if given is not None and not is_recurrent(model):
            kind = type(model).__name__
            raise ValueError(f"{where}: {name} needs a model with scan and step, got {kind}")
    for name, used in (("reset", reset is not None), ("lengths", lengths is not None or cu_seqlens is not None)):
        if used and not takes(model, name):
            raise TypeError(f"{where}: {name} needs a model that takes {name}, got {type(model).__name__}")
    x, y, reset = _constant((x, y, reset))
    if cu_seqlens is not None:
        if lengths is not None:
            raise ValueError(f"{where}: lengths must be None with cu_seqlens")
        x, y, reset, lengths = _unpacked(where, x, y, reset, cu_seqlens)
    count, time = x.shape[:2]
    mask = None
    if lengths is not None:
        _check.tensor(where, "lengths", lengths)
        _check.dtype(where, "lengths", lengths, (torch.int64, torch.int32))
        _check.shape(where, "lengths", lengths, (count,), f"({count},)")
        if not ((lengths >= 1) & (lengths <= time)).all():
            raise ValueError(f"{where}: lengths must be in [1, {time}], got {lengths.tolist()}")
        mask = torch.arange(time, device=x.device) < lengths.to(x.device).unsqueeze(1)
        # Padding must be finite, because one step of a chunk without data is evaluated and multiplied by 0.
        x, y = (t.masked_fill(~mask.view(*mask.shape, *[1] * (t.dim() - 2)), 0) for t in (x, y))
    parts = {"x": x, "y": y, "reset": reset, "mask": mask}
    chunks = [
        {name: t[:, None, start : start + chunk_size] for name, t in parts.items() if t is not None}
        for start in range(0, time, chunk_size)
    ]
    if mask is None:
        mask = torch.ones(count, time, dtype=torch.bool, device=x.device)
    steps = torch.stack([part.sum(1) for part in mask.split(chunk_size, 1)], 1)  # exact: 257 is no bfloat16
    state = {} if hidden_state is None else {"state": _state(where, hidden_state, count)}
    items, before = _items(where, chunk_size, slots, chunks, past)
    return Streams(chunks, state, items, before), steps.double() / steps.sum()


def _constant(nest: Any) -> Any:
    """Return a nest with tensors that autograd can save and that have no history, which a gradient would free."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, recordable(nest))


def _state(where: str, hidden_state: Any, count: int) -> Any:
    """Return the state before the first step, ``(streams, 1, ...)``."""
    for leaf in tree_leaves(hidden_state):
        _check.tensor(where, "hidden_state", leaf)
        if leaf.shape[:1] != (count,):
            got = tuple(leaf.shape)
            raise ValueError(f"{where}: hidden_state must have shape (streams, ...), streams = {count}, got {got}")
    return tree_map(lambda t: t.unsqueeze(1), _constant(hidden_state))


def _items(
    where: str,
    chunk_size: int,
    slots: int | None,
    chunks: list[dict[str, Tensor]],
    past: tuple[Tensor, Tensor] | None,
) -> tuple[dict[str, Tensor], int]:
    """Return all chunks that the memory ever holds, and how many of them it holds from the start."""
    if slots is None:
        if past is not None:
            raise ValueError(f"{where}: past must be None without experience")
        return {}, 0
    full = chunks if len(chunks) == 1 or chunks[-1]["x"].shape == chunks[0]["x"].shape else chunks[:-1]
    items = {name: torch.cat([c[name] for c in full], 1) for name in ("x", "y")}
    if past is None:
        return items, 0
    if not isinstance(past, (tuple, list)) or len(past) != 2:
        raise TypeError(f"{where}: past must be (x, y), got {type(past).__name__}")
    for name, value in zip(("x", "y"), past, strict=True):
        own = (items[name].shape[0], None, chunk_size, *items[name].shape[3:])
        _check.tensor(where, f"past {name}", value)
        text = f"(streams, n, chunk_size, ...) = ({', '.join('n' if s is None else str(s) for s in own)})"
        _check.shape(where, f"past {name}", value, own, text)
        _check.dtype(where, f"past {name}", value, (items[name].dtype,))
        _check.device(where, f"past {name}", value, items[name].device, "x")
    count = past[0].shape[1]
    if count > slots or past[1].shape[1] != count:
        got = (count, past[1].shape[1])
        raise ValueError(f"{where}: past must hold at most {slots} chunks in x and y, got {got}")
    if not count:
        return items, 0
    given = dict(zip(("x", "y"), _constant(tuple(past)), strict=True))
    if items["x"].shape[2] < chunk_size:  # a stream of less than a chunk, which the memory does not hold
        return given, count
    return {name: torch.cat([given[name], own], 1) for name, own in items.items()}, count


def _unpacked(
    where: str, x: Tensor, y: Tensor, reset: Tensor | None, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return packed streams as rows, padded with zeros, and their lengths."""
    _check.tensor(where, "cu_seqlens", cu_seqlens)
    _check.dtype(where, "cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
    lengths = cu_seqlens.flatten().diff()
    ends = (int(cu_seqlens[0]), int(cu_seqlens[-1])) if cu_seqlens.dim() == 1 and len(cu_seqlens) > 1 else None
    if len(x) != 1 or ends != (0, x.shape[1]) or not (lengths > 0).all():
        got = f"{tuple(cu_seqlens.shape)} with x {tuple(x.shape)}"
        raise ValueError(f"{where}: cu_seqlens must rise from 0 to the time of the one row of x, got {got}")

    def rows(packed: Tensor) -> Tensor:
        return pad_sequence(packed[0].split(lengths.tolist()), batch_first=True)

    return rows(x), rows(y), None if reset is None else rows(reset), lengths.to(torch.int64)
