"""L = sum_i m_i l(prediction_i, target_i) / sum_i m_i: a mean loss that leaves out padding."""

from __future__ import annotations  # Dynamo cannot evaluate annotations of functions that it traces

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eaml_ext.meta._types import LossFn


@dataclass(frozen=True)
class MaskedLoss:
    """The mean of ``elementwise`` over the data of a padded batch; padding adds nothing to it or to any gradient.

    As the ``loss_fn`` of :class:`MetaMAML` it declares that sets of different sizes may be padded, so that tasks of
    different sizes share a launch. Without a mask it is the plain mean. Two are equal if their ``elementwise`` is.

    Args:
        elementwise: ``(prediction, target) -> losses``, one loss for each element: any loss of torch with
            ``reduction="none"``. The shape of its result begins with ``(n,)``, for sequences with ``(n, time)``.

    Raises:
        TypeError: ``elementwise`` is not callable, or does not return a tensor.
        ValueError: it returns losses of another shape, for instance a mean.

    >>> loss_fn = MaskedLoss(torch.nn.MSELoss(reduction="none"))
    >>> prediction, target = torch.tensor([[1.0, 3.0, 9.0]]), torch.zeros(1, 3)
    >>> loss_fn(prediction, target, torch.tensor([[True, True, False]]))
    tensor(5.)
    """

    elementwise: Callable[[Tensor, Tensor], Tensor]

    def __post_init__(self) -> None:
        if not callable(self.elementwise):
            raise TypeError(f"MaskedLoss: elementwise must be callable, got {type(self.elementwise).__name__}")

    def __call__(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the mean loss, a scalar.

        Args:
            prediction: ``(n, ...)`` or ``(n, time, ...)``.
            target: ``(n, ...)`` or ``(n, time, ...)``.
            mask: ``(n,)`` or ``(n, time)``, bool, True at data and at least once; None: all is data.
        """
        if mask is None:
            return self._losses(prediction, target, prediction.shape[:1]).mean()
        if prediction.shape[: mask.dim()] != mask.shape:
            shape = tuple(prediction.shape)
            raise ValueError(f"MaskedLoss: prediction has shape {shape}, the mask has shape {tuple(mask.shape)}")
        # Predictions of padding may be anything. A product with the mask would turn NaN there into NaN everywhere, in
        # the loss or, where only its input is filled, in its derivatives.
        prediction = torch.where(_expanded(mask, prediction), prediction, 0)
        losses = self._losses(prediction, target, mask.shape)
        opmath = torch.promote_types(losses.dtype, torch.float32)  # a sum in float16 overflows where its mean does not
        total = torch.where(_expanded(mask, losses), losses, 0).sum(dtype=opmath)
        return (total / (mask.sum() * (losses.numel() // mask.numel()))).to(losses.dtype)

    def _losses(self, prediction: Tensor, target: Tensor, leading: torch.Size) -> Tensor:
        losses: Any = self.elementwise(prediction, target)
        if not isinstance(losses, Tensor):
            raise TypeError(f"MaskedLoss: elementwise must return a tensor, got {type(losses).__name__}")
        if losses.shape[: len(leading)] != leading:
            got, wanted = tuple(losses.shape), ", ".join(map(str, leading))
            raise ValueError(f"MaskedLoss: elementwise must return losses of shape ({wanted}, ...), got {got}")
        return losses


def apply_loss(loss_fn: LossFn, prediction: Tensor, target: Tensor, mask: Tensor | None) -> Any:
    """Return ``loss_fn`` of a set; with a mask it is a :class:`MaskedLoss`."""
    if mask is None:
        return loss_fn(prediction, target)
    assert isinstance(loss_fn, MaskedLoss)
    return loss_fn(prediction, target, mask)


def _expanded(mask: Tensor, like: Tensor) -> Tensor:
    """Return the mask with further dimensions of size 1, up to those of ``like``."""
    return mask.reshape(*mask.shape, *[1] * (like.dim() - mask.dim()))
