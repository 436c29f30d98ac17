"""What keeps an adaptation in bounds: the spike rule, and the norms of parameters taken as one vector."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

WARMUP = 10  # calls before a loss can count as a spike: fewer do not tell a spread
SIGMAS = 6.0  # heavy tails of small batches stay below it, corrupted targets do not
PATIENCE = 3  # a spike in this many calls in a row is a new regime, to be adapted to


class LossStatistics:
    """Exponentially weighted mean and variance of the losses with which calls begin, and the spike rule."""

    def __init__(self, decay: float):
        self.decay = decay
        self.count = 0
        self.mean = 0.0
        self.scatter = 0.0  # the weighted sum of squared deviations
        self.strange = 0  # calls in a row that began with a spike

    def update(self, value: float) -> None:
        self.count += 1
        self.strange = 0
        deviation = value - self.mean
        # Welford's recurrence with weights (1 - d)·d^age, whose sum is 1 - d^count.
        self.mean += deviation * (1 - self.decay) / (1 - self.decay**self.count)
        self.scatter = self.decay * self.scatter + (1 - self.decay) * deviation * (value - self.mean)

    def spikes(self, value: float, *, first: bool) -> bool:
        """Whether a finite loss is a spike; ``first``: it is the loss with which a call begins."""
        if not self.decay or self.count < WARMUP:
            return False
        deviation = math.sqrt(max(self.scatter, 0.0) / (1 - self.decay**self.count))
        if value - self.mean <= max(SIGMAS * deviation, abs(self.mean)):
            return False
        if first:
            self.strange += 1
            if self.strange >= PATIENCE:
                self.count, self.mean, self.scatter, self.strange = 0, 0.0, 0.0, 0
                return False
        return True

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "decay"}


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all of them as one vector."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """One norm per user: over everything but the leading dimension."""
    parts = [torch.linalg.vector_norm(t.flatten(1), dim=1) if t.dim() > 1 else t.abs() for t in tensors]
    return torch.linalg.vector_norm(torch.stack(parts), dim=0)


def rows(value: Tensor, like: Tensor) -> Tensor:
    """``value``, one per user, shaped to broadcast over ``like``."""
    return value.view(-1, *[1] * (like.dim() - 1))
