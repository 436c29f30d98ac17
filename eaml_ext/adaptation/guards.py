"""The guards that need a memory between calls: averaged parameters, loss statistics and the spike rule, per user."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

WARMUP_CALLS = 10  # No loss is a spike before: fewer calls do not determine a standard deviation.
SPIKE_SIGMAS = 6.0  # Heavy tails of small batches stay below it, corrupted targets do not.
SPIKES_OF_NEW_REGIME = 3  # Spikes in this many consecutive calls are a changed task, to which the model adapts.

Mask = Sequence[bool] | Tensor
"""One bool per user: a list where the guards run on the host, or a tensor ``(users,)``."""

STATISTICS = ("count", "mean", "ema_sq_dev", "consecutive_spikes", "warmup_losses")
"""The attributes of a UserHistory that hold the loss statistics, one entry per user."""


class UserHistory:
    """Averaged parameters, loss statistics and counters of users; ``Adapter.history`` makes it.

    The statistics are the exponentially weighted mean and variance of the losses with which accepted calls begin.

    Args:
        users: the number of users.
        decay: d of AdaptationConfig's ``ema_decay``; 0: no finite loss is a spike.

    Attributes:
        average: averaged parameters, ``(users, parameters)``; None before the first call.
        rollbacks: the number of calls that ended in a rollback, one integer per user.
        last_steps: the number of gradient steps of the last call, one integer per user.
        count, mean: the number of losses in the statistics and their weighted mean, one number per user.
        ema_sq_dev: the weighted sum of squared deviations from the mean, one number per user.
        consecutive_spikes: the number of calls in a row that began with a spike, one integer per user.
        warmup_losses: the losses of the first ``WARMUP_CALLS`` calls, one tuple per user.
    """

    def __init__(self, users: int, decay: float):
        self.decay = decay
        self.average: Tensor | None = None
        self.rollbacks = [0] * users
        self.last_steps = [0] * users
        self.count = [0] * users
        self.mean = [0.0] * users
        self.ema_sq_dev = [0.0] * users
        self.consecutive_spikes = [0] * users
        self.warmup_losses: list[tuple[float, ...]] = [()] * users

    def accept(self, theta: Tensor, values: Tensor, active: Mask, *, first: bool) -> list[bool]:
        """Return which active users have a finite loss that is no spike.

        Args:
            theta: the parameters with these losses, ``(users, parameters)``; the first ones begin the average.
            values: the losses, ``(users,)``.
            active: the users whose call continues.
            first: whether these are the losses with which the call begins; only they count as consecutive spikes.
        """
        if self.average is None:
            self.average = theta
        losses = values.tolist()
        return [bool(on) and self._accepts(user, losses[user], first) for user, on in enumerate(active)]

    def add(self, theta: Tensor, values: Tensor, accepted: Mask, *, first: bool) -> None:
        """Average the parameters of accepted users; at the first step of a call, add their losses to the statistics.

        Args:
            theta, values, first: as in :meth:`accept`.
            accepted: the result of :meth:`accept`.
        """
        for user, value in enumerate(values.tolist() if first else ()):
            if accepted[user]:
                self.add_loss(user, value)
        before = theta if self.average is None else self.average
        self.average = select_users(accepted, before.lerp(theta, 1 - self.decay), before)

    def count_step(self, active: Mask, stepped: Mask, *, first: bool) -> None:
        """Count a gradient step for the users that stepped, and a rollback for the other active ones."""
        for user, (on, steps) in enumerate(zip(active, stepped, strict=True)):
            self.last_steps[user] = bool(steps) + (0 if first else self.last_steps[user])
            self.rollbacks[user] += bool(on and not steps)

    def is_spike(self, user: int, value: float) -> bool:
        """Return whether ``value - mean > max(6 standard deviations, |mean|)``, once the warm-up is over."""
        if not self.decay or self.count[user] < WARMUP_CALLS:
            return False
        mean = self.mean[user]
        deviation = math.sqrt(max(self.ema_sq_dev[user], 0.0) / (1 - self.decay ** self.count[user]))
        return not value - mean <= max(SPIKE_SIGMAS * deviation, abs(mean))

    def add_loss(self, user: int, value: float) -> None:
        """Add a loss that was accepted to the statistics of a user."""
        self.consecutive_spikes[user] = 0
        self._accumulate(user, value)
        if self.count[user] == WARMUP_CALLS:
            # The warm-up accepts every loss. A huge one would raise the threshold for a long time, so it is removed.
            losses = self.warmup_losses[user]
            median = statistics.median(losses)
            # 1.4826 times the median absolute deviation is the standard deviation of a normal distribution.
            deviation = 1.4826 * statistics.median(abs(v - median) for v in losses)
            kept = tuple(v for v in losses if v - median <= max(SPIKE_SIGMAS * deviation, abs(median)))
            if len(kept) < WARMUP_CALLS:
                self._restart(user, kept)

    def state_of(self, user: int) -> dict[str, Any]:
        """Return the loss statistics of one user by name."""
        return {name: getattr(self, name)[user] for name in STATISTICS}

    def load_state_of(self, user: int, state: dict[str, Any]) -> None:
        """Restore the loss statistics of one user from :meth:`state_of`."""
        for name in STATISTICS:
            getattr(self, name)[user] = state[name]

    def _accepts(self, user: int, value: float, first: bool) -> bool:
        if not math.isfinite(value):
            return False
        if not self.is_spike(user, value):
            return True
        if not first:
            return False
        self.consecutive_spikes[user] += 1
        if self.consecutive_spikes[user] < SPIKES_OF_NEW_REGIME:
            return False
        self._restart(user)
        return True

    def _restart(self, user: int, losses: Sequence[float] = ()) -> None:
        self.count[user] = self.consecutive_spikes[user] = 0
        self.mean[user] = self.ema_sq_dev[user] = 0.0
        self.warmup_losses[user] = ()
        for value in losses:
            self._accumulate(user, value)

    def _accumulate(self, user: int, value: float) -> None:
        self.count[user] += 1
        if self.count[user] <= WARMUP_CALLS:
            self.warmup_losses[user] += (value,)
        deviation = value - self.mean[user]
        # Welford's recurrence with weights (1 - d)·d^age, whose sum is 1 - d^count.
        self.mean[user] += deviation * (1 - self.decay) / (1 - self.decay ** self.count[user])
        added = (1 - self.decay) * deviation * (value - self.mean[user])
        self.ema_sq_dev[user] = self.decay * self.ema_sq_dev[user] + added


def check_history(where: str, history: Any, theta: Tensor) -> None:
    """Raise unless ``history`` is None or fits parameters of users, ``(users, parameters)``."""
    if history is None:
        return
    if not isinstance(history, UserHistory):
        raise TypeError(f"{where}: history must come from Adapter.history, got {type(history).__name__}")
    users, count = theta.shape
    if len(history.rollbacks) != users:
        raise ValueError(f"{where}: history is of {len(history.rollbacks)} users, the batch of {users}")
    if history.average is not None and history.average.shape != theta.shape:
        got = history.average.shape[1]
        raise ValueError(f"{where}: history is of {got} numbers per user, the adapted parameters are {count}")


def select_users(mask: Mask, chosen: Tensor, others: Tensor) -> Tensor:
    """Return each user's row of ``chosen`` where the mask is True, of ``others`` elsewhere.

    Args:
        mask: bool per user; a list avoids the selection where all entries are equal.
        chosen, others: ``(users, ...)`` of one shape.
    """
    if not isinstance(mask, Tensor):
        if all(mask):
            return chosen
        if not any(mask):
            return others
        mask = torch.tensor(mask, device=chosen.device)
    return torch.where(mask.view(-1, *[1] * (chosen.dim() - 1)), chosen, others)
