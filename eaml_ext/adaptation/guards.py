"""What keeps an adaptation in bounds: the spike rule, the history of many users, parameters taken as one vector."""

import math
import statistics
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
        self._start()

    def _start(self, early: tuple[float, ...] = ()) -> None:
        self.count = 0
        self.mean = 0.0
        self.scatter = 0.0  # the weighted sum of squared deviations
        self.strange = 0  # calls in a row that began with a spike
        self.early: tuple[float, ...] = ()  # the losses of the warm-up
        for value in early:
            self._add(value)

    def _add(self, value: float) -> None:
        self.count += 1
        if self.count <= WARMUP:
            self.early += (value,)
        deviation = value - self.mean
        # Welford's recurrence with weights (1 - d)·d^age, whose sum is 1 - d^count.
        self.mean += deviation * (1 - self.decay) / (1 - self.decay**self.count)
        self.scatter = self.decay * self.scatter + (1 - self.decay) * deviation * (value - self.mean)

    def update(self, value: float) -> None:
        self.strange = 0
        self._add(value)
        if self.count == WARMUP:
            # Nothing has been refused so far: one huge loss would hide the next ones for a long time.
            middle = statistics.median(self.early)
            spread = 1.4826 * statistics.median(abs(v - middle) for v in self.early)  # of a normal: its deviation
            kept = tuple(v for v in self.early if v - middle <= max(SIGMAS * spread, abs(middle)))
            if len(kept) < WARMUP:
                self._start(kept)

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
                self._start()
                return False
        return True

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "decay"}


class UserHistory:
    """Averages, loss statistics and counters of many users, one each; made by ``Adapter.history``."""

    def __init__(self, users: int, decay: float):
        self.statistics = [LossStatistics(decay) for _ in range(users)]
        self.average: Tensor | None = None  # (users, parameters)
        self.rollbacks = [0] * users
        self.last_steps = [0] * users

    def observe(self, theta: Tensor, values: Tensor, alive: Tensor, *, first: bool) -> Tensor:
        """Judge the losses ``values`` of ``theta``; returns who of ``alive`` is sound, and counts those in."""
        sound = alive.tolist()
        for i, (own, value) in enumerate(zip(self.statistics, values.tolist(), strict=True)):
            if sound[i]:
                sound[i] = not own.spikes(value, first=first)
                if sound[i] and first:
                    own.update(value)
        kept = torch.tensor(sound, device=theta.device)
        if self.average is None:
            self.average = theta
        mixed = self.average.lerp(theta, 1 - self.statistics[0].decay)
        self.average = torch.where(kept.unsqueeze(1), mixed, self.average)
        return kept

    def count(self, alive: Tensor, failed: Tensor, *, first: bool) -> None:
        for i, (lives, fails) in enumerate(zip(alive.tolist(), failed.tolist(), strict=True)):
            self.last_steps[i] = lives + (0 if first else self.last_steps[i])
            self.rollbacks[i] += fails


def norm(vector: Tensor) -> Tensor:
    """Along the last dimension."""
    norms: Tensor = torch.linalg.vector_norm(vector, dim=-1)
    return norms


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a vector, shaped as the tensors whose entries it holds one after another."""
    parts = vector.split([t.numel() for t in like])
    return [part.view(t.shape) for part, t in zip(parts, like, strict=True)]
