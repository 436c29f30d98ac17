"""Held-out loss of a meta-learned model on a new task, by cross-validation on its support set."""

from __future__ import annotations

import torch
from torch import Tensor

from eaml_ext.meta._padding import pad_set
from eaml_ext.meta._types import DataSet, LossFn, Params
from eaml_ext.meta.maml import MetaMAML
from eaml_ext.meta.masked_loss import apply_loss

_FOLDS = 5


@torch.no_grad()
def held_out_loss(maml: MetaMAML, x: DataSet, y: DataSet, loss_fn: LossFn, num_steps: int | None) -> float:
    """Return the mean loss on each fold of the model adapted to the others; of one row, before adaptation.

    Args:
        maml: its model and inner loop.
        x, y: the support set, ``(n, ...)`` or n sequences; row i is in fold ``i % 5``.
        loss_fn: ``(prediction, target) -> scalar``; of sequences a MaskedLoss.
        num_steps: of the inner loop; None: the default of ``maml``.
    """
    start = {name: p.detach() for name, p in maml.parameters().items()}
    if len(x) == 1:
        return _loss(maml, start, x, y, loss_fn)
    losses, folds = [], min(_FOLDS, len(x))
    for fold in range(folds):
        held = [i % folds == fold for i in range(len(x))]
        rest = [not on for on in held]
        adapted = maml.adapt_params(start, _rows(x, rest), _rows(y, rest), loss_fn, num_steps)
        losses.append(_loss(maml, adapted, _rows(x, held), _rows(y, held), loss_fn))
    return sum(losses) / len(losses)


def _loss(maml: MetaMAML, params: Params, x: DataSet, y: DataSet, loss_fn: LossFn) -> float:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return float(loss_fn(maml.call(params, x), y))
    x, y, mask = pad_set(x, y)
    return float(apply_loss(loss_fn, maml.call(params, x, mask.sum(1)), y, mask))


def _rows(data: DataSet, chosen: list[bool]) -> DataSet:
    if isinstance(data, Tensor):
        return data[torch.tensor(chosen, device=data.device)]
    return [row for row, on in zip(data, chosen, strict=True) if on]
