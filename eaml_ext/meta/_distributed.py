"""Exchanges of the ranks that share a meta-batch: initial parameters, counts, losses, gradients, errors."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from eaml_ext.distributed import Group
from eaml_ext.meta._meta_gradient import Gradients, MetaGradient
from eaml_ext.meta._types import LossFn, Task
from eaml_ext.meta.kl_dro import kl_dro_weights

T = TypeVar("T")


def broadcast_model(where: str, group: Group, model: nn.Module) -> None:
    """Copy parameters and buffers of rank 0 to all ranks; ValueError on all where a model has others."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    about = [f"{name} {tuple(t.shape)} {t.dtype} {t.requires_grad}" for name, t in tensors.items()]
    sums = group.all_gather(torch.tensor(zlib.crc32("\n".join(about).encode())))
    for rank in (sums != sums[0]).nonzero().flatten().tolist():
        raise ValueError(f"{where}: model has other parameters or buffers on rank {rank} than on rank 0")
    group.broadcast_(list(tensors.values()))


def all_ranks_succeed(
    where: str, group: Group, function: Callable[[], T], width: int, numbers: Callable[[T], Sequence[int]]
) -> tuple[T, Tensor]:
    """Call ``function``, which has no collectives, on every rank; raise on all ranks if one fails.

    Args:
        where: begins the error.
        group: the ranks.
        function: its error is raised on its own rank, and a RankError on the others.
        width: how many numbers there are.
        numbers: ``(result) -> width`` integers that the ranks exchange.

    Returns:
        The result of this rank, and the numbers of all, ``(size, width)``, int64.
    """
    failed: Exception | None = None
    flags = [1] + [0] * width
    try:
        result = function()
        flags = [0, *numbers(result)]
    except Exception as error:
        failed = error
    gathered = group.all_gather(torch.tensor(flags, dtype=torch.int64))
    if failed is not None:
        raise failed
    group.raise_on_any_rank(where, gathered[:, 0])
    return result, gathered[:, 1:]


def gradient_over_ranks(
    where: str,
    group: Group,
    gradient: MetaGradient,
    tasks: list[Task],
    loss_fns: list[LossFn],
    kl_radius: float,
    counts: list[int],
) -> tuple[Tensor, Gradients]:
    """The losses of all ranks' tasks, rank after rank, and the sum of the ranks' gradients: the same bits on all.

    Args:
        where: begins an error.
        group: the ranks.
        gradient: computes this rank's part.
        tasks, loss_fns: this rank's; there may be none.
        kl_radius: as of :meth:`eaml_ext.meta.MetaMAML.meta_update`.
        counts: number of tasks of each rank.
    """
    leaves, weights = gradient.leaves, None
    no_losses = leaves[0].new_zeros(0)
    if kl_radius:
        before, _ = all_ranks_succeed(
            where, group, lambda: gradient.losses(tasks, loss_fns) if tasks else no_losses, 0, lambda _: ()
        )
        start = sum(counts[: group.rank])
        weights = kl_dro_weights(_gather(group, before, counts), kl_radius)[start : start + len(tasks)]

    def compute() -> tuple[Tensor, Gradients]:
        return gradient.weighted(tasks, loss_fns, sum(counts), weights) if tasks else (no_losses, [None] * len(leaves))

    (losses, grads), used = all_ranks_succeed(
        where, group, compute, len(leaves), lambda result: [g is not None for g in result[1]]
    )
    # A parameter that no task of any rank uses has no gradient, as in one process.
    for i in used.any(dim=0).nonzero().flatten().tolist():
        own = grads[i]
        grads[i] = torch.zeros_like(leaves[i]) if own is None else own.clone()
    group.all_reduce_([g for g in grads if g is not None])
    return _gather(group, losses, counts), grads


def _gather(group: Group, losses: Tensor, counts: list[int]) -> Tensor:
    """The losses of all ranks, one rank after the other."""
    padded = losses.new_zeros(max(counts))
    padded[: len(losses)] = losses
    return torch.cat([part[:count] for part, count in zip(group.all_gather(padded), counts, strict=True)])
