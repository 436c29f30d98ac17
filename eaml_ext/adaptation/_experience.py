"""The experience of a batch: the default retriever, the check of its result, and the part of each user in a batch."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eaml_ext import _check
from eaml_ext._torch_compat import tree_leaves, tree_map
from eaml_ext.experience import ExperienceBuffer, retrieval
from eaml_ext.meta.functional import recordable

_PER_USER = ("states", "targets", "hidden_state", "mask", "context_embedding", "task")


def default_retriever(buffer: ExperienceBuffer, batch: Mapping[str, Any]) -> Any:
    """Return the nearest experience to ``batch["context_embedding"]`` where there is one, uniform experience else."""
    strategy = retrieval.nearest if "context_embedding" in batch else retrieval.uniform
    return strategy(len(batch["states"]))(buffer, batch)


def check_experience(where: str, found: Any, like: Tensor) -> dict[str, Any] | None:
    """Return the result of a retriever, detached; None if it has no items.

    Args:
        where: the beginning of messages.
        found: the result, ``{"states": (n, ...), "targets": (n, ...)}``, perhaps with ``"weights"`` ``(n,)`` and
            ``"mask"`` ``(n, time)``, or None. The mask becomes ``rows``, the indices of its True entries, and
            ``counts``, their number in each item.
        like: a tensor of the dtype and device that floating values must have.

    Raises:
        TypeError, ValueError: ``found`` is something else.
    """
    if found is None:
        return None
    if not isinstance(found, Mapping) or not {"states", "targets"} <= set(found):
        kind = type(found).__name__
        raise TypeError(f"{where}: the retriever must return a dict with states and targets, or None, got {kind}")
    for name in ("states", "targets"):
        _check.tensor(where, f"the retriever's {name}", found[name])
        _check.device(where, f"the retriever's {name}", found[name], like.device, "the model")
        if found[name].is_floating_point():
            _check.dtype(where, f"the retriever's {name}", found[name], (like.dtype,))
    states, targets = found["states"].detach(), found["targets"].detach()
    if states.shape[:1] != targets.shape[:1]:
        got, wanted = tuple(targets.shape), tuple(states.shape)
        raise ValueError(f"{where}: the retriever's targets have shape {got}, its states {wanted}")
    experience: dict[str, Any] = {"states": states, "targets": targets}
    weights = found.get("weights")
    if weights is not None:
        name = "the retriever's weights"
        _check.tensor(where, name, weights)
        _check.device(where, name, weights, like.device, "the model")
        _check.dtype(where, name, weights, (like.dtype,))
        _check.shape(where, name, weights, states.shape[:1], str(tuple(states.shape[:1])))
        weights = experience["weights"] = weights.detach()
        if len(weights) and not (weights.min() >= 0 and 0 < weights.sum() < math.inf):
            raise ValueError(f"{where}: {name} must be finite, >= 0 and not all 0")
    mask = found.get("mask")
    if mask is not None and states.numel():
        name = "the retriever's mask"
        _check.tensor(where, name, mask)
        _check.dtype(where, name, mask, (torch.bool,))
        _check.device(where, name, mask, like.device, "the model")
        if mask.dim() != 2 or mask.shape != targets.shape[:2]:
            wanted = tuple(targets.shape[:2])
            raise ValueError(f"{where}: {name} must have shape (n, time) = {wanted}, got {tuple(mask.shape)}")
        counts = mask.sum(1).tolist()
        if not all(counts):
            raise ValueError(f"{where}: {name} must be True at least once in each item")
        experience |= {"rows": mask.flatten().nonzero().squeeze(1), "counts": tuple(counts)}
    return recordable(experience) if states.numel() else None


def stack_experience(where: str, found: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Stack the experience of all users, ``(users, n, ...)``; None if no user has any.

    Raises:
        ValueError: users have different numbers of items, or items of different lengths.
    """
    kept = [f for f in found if f is not None]
    if not kept:
        return None
    shapes = {tuple((name, x.shape if isinstance(x, Tensor) else x) for name, x in f.items()) for f in kept}
    if len(kept) < len(found) or len(shapes) > 1:
        raise ValueError(f"{where}: the retriever must find equally many experiences for all users, of equal lengths")
    return {n: torch.stack([f[n] for f in kept]) if isinstance(x, Tensor) else x for n, x in kept[0].items()}


def split_by_user(
    where: str, batch: Mapping[str, Any], users: int, per_user: str | Sequence[str]
) -> list[dict[str, Any]]:
    """Return a batch for each user: its part of the entries with one value per user, all other entries whole.

    Args:
        where: the beginning of messages.
        batch: the entries of ``Adapter.adapt_many``.
        users: the number of users.
        per_user: names of further entries with one value per user.

    Raises:
        TypeError, ValueError: an entry cannot be split, or has another number of values.
    """
    names = [per_user] if isinstance(per_user, str) else per_user
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{where}: per_user must be names of entries, got {per_user!r}")
    for name in names:
        if name not in batch:
            raise ValueError(f"{where}: per_user has {name}, batch_dict has only {', '.join(map(str, batch))}")
    own = {name: batch[name] for name in (*_PER_USER, *names) if batch.get(name) is not None}
    if "task" not in names and not _has_length(own.get("task")):
        own.pop("task", None)
    if "hidden_state" not in names and not _arrays(own.get("hidden_state")):
        own.pop("hidden_state", None)
    parts = {name: _parts(where, name, value, users) for name, value in own.items()}
    return [{**batch, **{name: part[i] for name, part in parts.items()}} for i in range(users)]


def _has_length(value: Any) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return bool(value.ndim)
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes))


def _arrays(value: Any) -> list[Tensor | np.ndarray]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, (Tensor, np.ndarray))]


def _parts(where: str, name: str, value: Any, users: int) -> list[Any]:
    """Return each user's part: an item of a sequence, or a nest with an item of each of its arrays."""
    arrays = _arrays(value)
    if not arrays and (not isinstance(value, Sequence) or isinstance(value, (str, bytes))):
        raise TypeError(f"{where}: {name} must be a tensor, an array or a sequence, got {type(value).__name__}")
    for shape in [tuple(leaf.shape) for leaf in arrays] or [(len(value),)]:
        if shape[:1] != (users,):
            raise ValueError(f"{where}: {name} must have shape (users, ...), users = {users}, got {shape}")
    if arrays:
        return [
            tree_map(lambda leaf: leaf[i] if isinstance(leaf, (Tensor, np.ndarray)) else leaf, value)  # noqa: B023
            for i in range(users)
        ]
    return list(value)
