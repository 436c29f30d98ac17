"""Tasks of different sizes in one launch: their sets are padded to the largest, and masks mark the data."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from eaml_ext.meta._batching import buckets
from eaml_ext.meta._types import DataSet, LossFn, Task
from eaml_ext.meta.masked_loss import MaskedLoss

# Size of a padded launch over the sum of its tasks' own sizes. On a CPU padding costs in proportion, a launch little.
MAX_PADDING = 2


def launches(tasks: Sequence[Task], loss_fns: Sequence[LossFn]) -> list[list[int]]:
    """Return the indices of the tasks of each launch.

    Tasks of a launch have one loss, and tensors of equal dtypes and devices. Their shapes are equal too, but with a
    MaskedLoss the sizes of sets and the lengths of sequences may differ. Such tasks are in descending order of size,
    and a launch has at most ``MAX_PADDING`` times the rows or steps that its tasks have, each padded by itself.
    """
    result: list[list[int]] = []
    for bucket in buckets(_key(task, fn) for task, fn in zip(tasks, loss_fns, strict=True)):
        masked = isinstance(loss_fns[bucket[0]], MaskedLoss)
        result += _split({i: tasks[i] for i in bucket}) if masked else [bucket]
    return result


def pad_tasks(tasks: Sequence[Task]) -> list[tuple[Tensor, ...]]:
    """Return the tasks of a launch as tensors of equal shapes.

    Returns:
        ``(support_x, support_y, query_x, query_y)`` each; where sizes differ or sets are sequences, followed by the
        masks of support and query set.
    """
    tensors = [tuple(part for part in task if isinstance(part, Tensor)) for task in tasks]
    if all(len(task) == 4 for task in tensors) and len({tuple(part.shape for part in task) for task in tensors}) == 1:
        return tensors
    sizes = [_sizes(task) for task in tasks]
    support, query = (tuple(map(max, zip(*(pair[s] for pair in sizes), strict=True))) for s in (0, 1))
    padded: list[tuple[Tensor, ...]] = []
    for task in tasks:
        support_x, support_y, support_mask = pad_set(task[0], task[1], support)
        query_x, query_y, query_mask = pad_set(task[2], task[3], query)
        padded.append((support_x, support_y, query_x, query_y, support_mask, query_mask))
    return padded


def pad_set(x: DataSet, y: DataSet, size: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``x``, ``y`` and the mask of a set, padded with zeros.

    Args:
        x, y: ``(n, ...)``, or n sequences ``(time_i, ...)``.
        size: ``(rows,)`` or ``(rows, steps)`` of the result; None: those of the set.

    Returns:
        ``(rows, ...)`` twice and the mask ``(rows,)``; for sequences ``(rows, steps, ...)`` and ``(rows, steps)``.
    """
    size = _size(x) if size is None else size
    if isinstance(x, Tensor):
        mask = torch.arange(size[0], device=x.device) < len(x)
    else:
        lengths = torch.tensor([len(row) for row in x] + [0] * (size[0] - len(x)), device=x[0].device)
        mask = torch.arange(size[1], device=x[0].device) < lengths.unsqueeze(1)
    return _padded(x, size), _padded(y, size), mask


def _padded(data: DataSet, size: tuple[int, ...]) -> Tensor:
    dense = data if isinstance(data, Tensor) else pad_sequence([*data], batch_first=True)
    missing = [wanted - got for wanted, got in zip(size, dense.shape, strict=False)]
    if not any(missing):
        return dense
    return F.pad(dense, [0, 0] * (dense.dim() - len(size)) + [n for m in reversed(missing) for n in (0, m)])


def _key(task: Task, loss_fn: LossFn) -> Hashable:
    """Return the properties that are equal in all tasks of a launch."""
    return loss_fn, *(_layout(part, isinstance(loss_fn, MaskedLoss)) for part in task)


def _layout(part: DataSet, masked: bool) -> tuple[Any, ...]:
    if isinstance(part, Tensor):
        return part.shape[1:] if masked else part.shape, part.dtype, part.device
    return "sequences", part[0].shape[1:], part[0].dtype, part[0].device


def _split(tasks: dict[int, Task]) -> list[list[int]]:
    """Return the launches of tasks with one MaskedLoss, by index."""
    sizes = {i: _sizes(task) for i, task in tasks.items()}
    volume = {i: sum(map(math.prod, pair)) for i, pair in sizes.items()}
    result: list[list[int]] = []
    largest: list[list[int]] = []
    total = 0
    for i in sorted(tasks, key=lambda i: -volume[i]):  # a stable sort: tasks of one size stay in order
        wanted = [[max(pair) for pair in zip(*both, strict=True)] for both in zip(largest, sizes[i], strict=False)]
        if result and sum(map(math.prod, wanted)) * (len(result[-1]) + 1) <= MAX_PADDING * (total + volume[i]):
            result[-1].append(i)
            largest, total = wanted, total + volume[i]
        else:
            result.append([i])
            largest, total = [[*size] for size in sizes[i]], volume[i]
    return result


def _sizes(task: Task) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return _size(task[0]), _size(task[2])


def _size(x: DataSet) -> tuple[int, ...]:
    return (len(x),) if isinstance(x, Tensor) else (len(x), max(map(len, x)))
