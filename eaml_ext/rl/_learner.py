"""The base class of :class:`eaml_ext.rl.RL2` and :class:`eaml_ext.rl.MAMLRL`: updates, shared options, saved state."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eaml_ext import _check
from eaml_ext._random import Purpose, check_seed, derive_seed
from eaml_ext._terminal import progress_bar
from eaml_ext.meta._optimizer import check_state, finite, load_state
from eaml_ext.meta._validation import check_entries, check_parameters, check_tensors
from eaml_ext.meta.functional import outside_inference_mode
from eaml_ext.rl._rollout_loop import NonFiniteError
from eaml_ext.rl.losses import check_fraction
from eaml_ext.rl.policy import SSMMetaPolicy
from eaml_ext.rl.trials import Trials, check_policy
from eaml_ext.tasks.base import Task, TaskDistribution


class Learner(ABC):
    """Train a policy on the tasks of a distribution by Adam.

    The optimizer holds all parameters, including frozen ones. An update changes the parameters that require grad at
    that time.

    Args:
        policy: of ``state_dim`` ``feature_dim(dist)``; trained in place.
        dist: the distribution of the training tasks.
        optimizer: options of ``torch.optim.Adam``.
        tasks_per_update: tasks drawn for each update.
        gae: ``(gamma, gae_lambda)`` of :func:`eaml_ext.rl.losses.advantages`.
        coefs: ``(vf_coef, ent_coef)`` of :func:`eaml_ext.rl.a2c_loss`.
        reward_scale: factor of the rewards.
        max_grad_norm: gradients are scaled down to this norm.
        seed: in [0, 2**32).
    """

    _counts: tuple[str, ...] = ("updates", "skipped_updates")

    def __init__(
        self,
        policy: SSMMetaPolicy,
        dist: TaskDistribution[Any],
        optimizer: dict[str, Any],
        tasks_per_update: int,
        gae: tuple[float, float],
        coefs: tuple[float, float],
        reward_scale: float,
        max_grad_norm: float,
        seed: int,
    ):
        (gamma, gae_lambda), (vf_coef, ent_coef) = gae, coefs
        self._name = where = type(self).__name__
        check_policy(where, policy, dist)
        self.policy, self.dist, self.seed = policy, dist, check_seed(where, "seed", seed)
        self.tasks_per_update = _check.positive(where, "tasks_per_update", tasks_per_update, integer=True)
        self.reward_scale = _check.positive(where, "reward_scale", reward_scale)
        self.max_grad_norm = _check.positive(where, "max_grad_norm", max_grad_norm)
        self._gae_options: dict[str, Any] = {
            "gamma": check_fraction(where, "gamma", gamma),
            "gae_lambda": check_fraction(where, "gae_lambda", gae_lambda),
        }
        self._loss_coefs: dict[str, Any] = {
            "vf_coef": _check.positive(where, "vf_coef", vf_coef, zero=True),
            "ent_coef": _check.positive(where, "ent_coef", ent_coef, zero=True),
        }
        self.optimizer = torch.optim.Adam(policy.parameters(), **optimizer)
        self._check_policy(where)
        self.updates = 0
        self.skipped_updates = 0
        self._skip_reason = ""  # of the last skipped update

    @abstractmethod
    def _rollout(self, tasks: Sequence[Task], seed: int) -> Trials:
        """Roll out training trials of the tasks with the current policy."""

    @abstractmethod
    def _update(self, tasks: Sequence[Task]) -> float:
        """Make one update; raise NonFiniteError before any change if a reward or an observation is not finite."""

    @outside_inference_mode()
    @torch.enable_grad()
    def update(self) -> float:
        """Make one update on newly drawn tasks.

        If a reward, an observation, a loss or a gradient is not finite, the update is skipped and counted in
        ``skipped_updates``, and the policy is not changed. The first update sets the policy's observation
        normalisation, unless it is set already.

        Returns:
            One entry of the list that ``train`` returns; NaN if a reward or an observation was not finite.

        Raises:
            ValueError: a parameter was replaced after this learner was made, none requires grad, or one is not finite.
        """
        self._check_policy(f"{self._name}.update")
        tasks = self.dist.sample(self.tasks_per_update, "train", self.seed, self.updates)
        try:
            if self.updates <= self.skipped_updates and not self.policy.has_normalisation:
                trials = self._rollout(tasks, derive_seed(self.seed, Purpose.OBSERVATION_NORMALISATION, bits=32))
                self.policy.normalise(trials.inputs[trials.mask])
            value = self._update(tasks)
        except NonFiniteError as error:
            self._skip(str(error))
            value = torch.nan
        self.updates += 1
        return value

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the policy's state with its observation normalisation, the optimizer's state, the counts.

        ``checkpoint.save_state`` writes it to a file.
        """
        counts = {name: getattr(self, name) for name in self._counts}
        state = {"policy": dict(self.policy.state_dict()), "optimizer": self.optimizer.state_dict(), **counts}
        return copy.deepcopy(state)

    @outside_inference_mode()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state, so that training continues bit for bit as it would have without an interruption.

        Args:
            state: the value of :meth:`state_dict` of a learner with the same arguments.

        Raises:
            TypeError, ValueError: the state is that of another learner or policy; nothing is modified.
        """
        where = f"{self._name}.load_state_dict"
        own = self.state_dict()
        check_entries(where, state, own)
        counts = {n: _check.positive(where, n, state[n], zero=True, integer=True) for n in self._counts}
        check_tensors(where, "policy", state["policy"], own["policy"])
        _check_finite(where, state["policy"])
        check_state(where, state["optimizer"], self.optimizer, [*self.policy.parameters()], ("exp_avg", "exp_avg_sq"))
        self.policy.load_state_dict(state["policy"])
        load_state(self.optimizer, state["optimizer"])
        for name, count in counts.items():
            setattr(self, name, count)

    def _advantages(self, trials: Trials) -> tuple[Tensor, Tensor]:
        """Return advantages and the critic's targets for scaled rewards, ``(tasks, time)`` each."""
        trials = replace(trials, rewards=self.reward_scale * trials.rewards)
        advantages = trials.advantages(**self._gae_options)
        return advantages, advantages + trials.values

    def _progress(self, where: str, updates: int) -> Iterator[int]:
        """Yield 0 to ``updates`` - 1 under a progress bar, then warn if updates were skipped in between."""
        skipped = self.skipped_updates
        yield from progress_bar(range(updates), desc="meta-training", unit="update")
        skipped = self.skipped_updates - skipped
        if skipped:
            text = f"{where}: {skipped} of {updates} updates were not finite and skipped, the last for: "
            warnings.warn(text + self._skip_reason, RuntimeWarning, stacklevel=3)

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
        self._skip_reason = reason

    def _check_policy(self, where: str) -> None:
        """Raise ValueError unless the policy's parameters are finite and those of the optimizer."""
        trainable = {name: p for name, p in self.policy.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError(f"{where}: policy has no parameters that require grad")
        check_parameters(where, self._name, trainable, self.optimizer.param_groups[0]["params"])
        _check_finite(where, {**trainable, "mean": self.policy.mean, "std": self.policy.std})


def return_per_episode(trials: Trials) -> float:
    """Return the sum of all rewards divided by the number of episodes; the recording may cut the last of each trial."""
    return float(trials.rewards[trials.mask].double().sum() / trials.episode_starts.sum())


def _check_finite(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless all tensors are finite and ``std`` is positive."""
    for name, value in tensors.items():
        if not finite(value):
            got = value.detach()[~value.isfinite()][0].item()
            raise ValueError(f"{where}: policy must be finite, got {got} in {name}")
    if not (tensors["std"] > 0).all():
        raise ValueError(f"{where}: policy must have std > 0, got {tensors['std'].min().item()}")
