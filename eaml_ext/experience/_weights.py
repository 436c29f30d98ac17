"""w = p · 2^(-age / H): the weight of an item with priority p and half-life H; its age is the number of later items."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from eaml_ext.experience._ring import RingStorage
from eaml_ext.experience._schema import as_field, check_values


def has_weights(fields: Collection[str], age_half_life: float | None) -> bool:
    """Return whether the items of a buffer with these fields have weights."""
    return age_half_life is not None or "priority" in fields


def log_weights(priority: Tensor | None, numbers: Tensor, age_half_life: float | None) -> Tensor:
    """Return ``log p + numbers · log(2) / H``, the log-weights of items up to a constant that all of them share.

    Args:
        priority: floating, of any shape; None: p = 1. At least one of ``priority`` and ``age_half_life`` is given.
        numbers: int64, same shape: item numbers, less any origin.
        age_half_life: H; None: age does not count.

    Returns:
        float64, same shape.
    """
    weights = None if priority is None else priority.double().log()  # not in place: priority may be the stored column
    if age_half_life is not None:
        by_age = numbers.double() * (math.log(2) / age_half_life)
        weights = by_age if weights is None else weights.add_(by_age)
    assert weights is not None
    return weights


def age_cost(items: int, age_half_life: float) -> float:
    """Return ``items · log(2) / H``, the amount by which ``items`` later items lower a log-weight."""
    return items * (math.log(2) / age_half_life)


def draw_by_weight(weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Draw ``n`` indices with replacement, in proportion to ``exp(weights)``.

    Args:
        weights: ``(items,)``, float64 log-weights.
        n: number of draws.
        generator: on the CPU, so that a seed gives the same draws on every device.

    Returns:
        int64 ``(n,)``, on the device of the weights.
    """
    total = (weights - weights.max()).exp().cumsum(0)
    point = torch.rand(n, dtype=torch.float64, generator=generator).to(weights.device) * total[-1]
    # Rounding can make point equal to the total, for which searchsorted would return an index past the end.
    below = total[-1].nextafter(torch.zeros_like(total[-1]))
    return torch.searchsorted(total, torch.minimum(point, below), right=True)


def set_priority(
    where: str, storage: RingStorage, indices: Tensor, priority: Tensor | float, generations: Tensor | None
) -> Tensor:
    """Write priorities of stored items. Arguments and errors are those of :meth:`ExperienceBuffer.set_priority`.

    Returns:
        bool, shape of ``indices``: which items have changed.
    """
    stored = storage.column(where, "priority")
    storage.check_writable(where)
    live = storage.are_live(where, indices, generations)
    if generations is None:
        storage.check_live(where, live)
    values = as_field(where, "priority", priority, stored.dtype, storage.device)
    if values.dim() and values.shape != indices.shape:
        got, wanted = tuple(values.shape), tuple(indices.shape)
        raise ValueError(f"{where}: priority has shape {got}, wanted {wanted} or one number")
    check_values(where, "priority", values)
    stored[indices[live]] = values.expand(indices.shape)[live]
    return live
