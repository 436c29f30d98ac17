"""Updates, observation units and resumable state of :class:`eaml_ext.rl.RL2` and :class:`eaml_ext.rl.MAMLRL`."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from eaml_ext import _check
from eaml_ext._random import Purpose, check_seed, derive_seed
from eaml_ext._terminal import progress_bar
from eaml_ext.meta._optimizer import check_state, finite, load_state
from eaml_ext.meta._validation import check_parameters, check_tensors
from eaml_ext.meta.functional import outside_inference_mode
from eaml_ext.rl.policy import SSMMetaPolicy
from eaml_ext.rl.rollout import NonFiniteError
from eaml_ext.rl.trials import Trials, check_learner
from eaml_ext.tasks.base import Task, TaskDistribution


class Learner(ABC):
    """Hold a policy and its tasks, and take gradient steps of Adam on the policy.

    The optimizer holds all parameters, frozen ones included: an update changes those that require grad at that time.
    """

    _counts: tuple[str, ...] = ("updates", "skipped_updates")

    def __init__(
        self,
        policy: SSMMetaPolicy,
        dist: TaskDistribution[Any],
        optimizer: dict[str, Any],
        *,
        tasks_per_update: int,
        reward_scale: float,
        max_grad_norm: float,
        seed: int,
    ):
        self._name = where = type(self).__name__
        check_learner(where, policy, dist)
        self.policy, self.dist, self.seed = policy, dist, check_seed(where, "seed", seed)
        self.tasks_per_update = _check.positive(where, "tasks_per_update", tasks_per_update, integer=True)
        self.reward_scale = _check.positive(where, "reward_scale", reward_scale)
        self.max_grad_norm = _check.positive(where, "max_grad_norm", max_grad_norm)
        self.optimizer = torch.optim.Adam(policy.parameters(), **optimizer)
        self._check_policy(where)
        self.updates = 0
        self.skipped_updates = 0
        self._reason = ""  # for which the last skipped update was skipped

    @abstractmethod
    def _trials(self, tasks: list[Task], seed: int) -> Trials:
        """Play trials of the tasks with the policy as it is."""

    @abstractmethod
    def _update(self, tasks: list[Task]) -> float:
        """Make one update; raise NonFiniteError, nothing modified, if a reward or an observation is not finite."""

    @outside_inference_mode()
    @torch.enable_grad()
    def update(self) -> float:
        """Play freshly drawn tasks and learn from them.

        The update is skipped and counted in ``skipped_updates`` if a reward, an observation, a loss or a gradient is
        not finite. The policy stays as it is.

        Returns:
            One entry of the list that ``train`` returns; NaN if the trials could not be played to their end.

        Raises:
            ValueError: a parameter was replaced after the learner was made, none requires grad, or one is not finite.
        """
        self._check_policy(f"{self._name}.update")
        tasks = self.dist.sample(self.tasks_per_update, "train", self.seed, self.updates)
        try:
            if self.updates <= self.skipped_updates and not self.policy.has_units:
                trials = self._trials(tasks, derive_seed(self.seed, Purpose.OBSERVATION_UNITS, bits=32))
                self.policy.normalise(trials.inputs[trials.mask])
            value = self._update(tasks)
        except NonFiniteError as error:
            self._skip(str(error))
            value = torch.nan
        self.updates += 1
        return value

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all that :meth:`update` changes: policy with its units, optimizer, counts.

        ``checkpoint.save_state`` writes it to a file.
        """
        counts = {name: getattr(self, name) for name in self._counts}
        state = {"policy": dict(self.policy.state_dict()), "optimizer": self.optimizer.state_dict(), **counts}
        return copy.deepcopy(state)

    @outside_inference_mode()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was called, with the bits of an uninterrupted training.

        The learner must have been made with the same arguments.

        Raises:
            TypeError, ValueError: the state is of another learner or policy; nothing is modified.
        """
        where = f"{self._name}.load_state_dict"
        mine = self.state_dict()
        if not isinstance(state, dict) or set(state) != set(mine):
            raise ValueError(f"{where}: state must be a dict with the entries {', '.join(mine)}")
        counts = {n: _check.positive(where, n, state[n], zero=True, integer=True) for n in self._counts}
        check_tensors(where, "policy", state["policy"], mine["policy"])
        _check_finite(where, state["policy"])
        check_state(where, state["optimizer"], self.optimizer, [*self.policy.parameters()], ("exp_avg", "exp_avg_sq"))
        self.policy.load_state_dict(state["policy"])
        load_state(self.optimizer, state["optimizer"])
        for name, count in counts.items():
            setattr(self, name, count)

    def _numbers(self, where: str, updates: int) -> Iterator[int]:
        """Yield 0 to ``updates`` - 1 under a progress bar, then warn if updates were skipped in between."""
        skipped = self.skipped_updates
        yield from progress_bar(range(updates), desc="meta-training", unit="update")
        skipped = self.skipped_updates - skipped
        if skipped:
            text = f"{where}: {skipped} of {updates} updates were not finite and skipped, the last for: {self._reason}"
            warnings.warn(text, RuntimeWarning, stacklevel=3)

    def _step(self, loss: Tensor) -> bool:
        """Take one gradient step; return False, without a step, if the loss or a gradient is not finite."""
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        taken = finite(loss, norm)
        if taken:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return taken

    def _skip(self, reason: str) -> None:
        self.skipped_updates += 1
        self._reason = reason

    def _check_policy(self, where: str) -> None:
        """Raise ValueError unless the policy has finite parameters that are those of the optimizer."""
        learned = {name: p for name, p in self.policy.named_parameters() if p.requires_grad}
        if not learned:
            raise ValueError(f"{where}: policy has no parameters that require grad")
        check_parameters(where, self._name, self.policy, self.optimizer.param_groups[0]["params"])
        _check_finite(where, {**learned, "mean": self.policy.mean, "std": self.policy.std})


def _check_finite(where: str, tensors: Mapping[str, Tensor]) -> None:
    for name, value in tensors.items():
        if not finite(value):
            got = value.detach()[~value.isfinite()][0].item()
            raise ValueError(f"{where}: policy must be finite, got {got} in {name}")
    if not (tensors["std"] > 0).all():
        raise ValueError(f"{where}: policy must have std > 0, got {tensors['std'].min().item()}")
