"""max E[sum of rewards of a trial]: a policy with memory learns to learn, in context (Duan et al. 2016, "RL^2")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eaml_ext import _check
from eaml_ext._random import Purpose, check_seed, derive_seed
from eaml_ext.meta._optimizer import finite
from eaml_ext.meta.functional import outside_inference_mode, recordable
from eaml_ext.rl._learner import Learner
from eaml_ext.rl.losses import a2c_loss, fraction, normalised, ppo_loss
from eaml_ext.rl.policy import SSMMetaPolicy
from eaml_ext.rl.trials import MAX_EPISODE_STEPS, Trials, check_length, rollout
from eaml_ext.tasks.base import Task, TaskDistribution


class RL2(Learner):
    """Trains a policy whose memory outlives the episodes of a trial, by PPO or A2C on whole trials.

    A trial is several episodes of one task. Beside the observation the policy sees the last action, the last reward and
    where an episode starts. Its state is kept from episode to episode and zeroed between trials: what is particular to
    the task it can only find out by acting. Gradients run through whole trials: one scan each.

    Args:
        policy: of ``state_dim`` ``feature_dim(dist)``; learns in place. Its first trials give it the units of its
            observations, unless it has units already, as a trained policy does.
        dist: of the tasks to learn.
        steps: length of a training trial in steps, whatever episodes they hold; or
        episodes: of a training trial in whole episodes. One of the two.
        loss: "ppo" or "a2c" (which takes one gradient step for each batch of trials).
        tasks_per_update: trials played side by side, each of a task drawn anew.
        lr: step size of Adam, falling linearly to 0 over :meth:`train` where ``anneal_lr``.
        update_epochs, num_minibatches: of PPO; a minibatch is of whole trials.
        gamma, gae_lambda, across_episodes: as in :meth:`Trials.advantages`.
        clip_coef, vf_coef, ent_coef: as in :func:`eaml_ext.rl.losses.ppo_loss`.
        reward_scale: rewards are multiplied by it for learning, so that values are of the order of 1. Else the critic's
            gradient is all that passes ``max_grad_norm``.
        max_grad_norm: gradients are scaled down to this norm.
        max_episode_steps: as in :func:`eaml_ext.rl.rollout`, for training trials of whole ``episodes``.
        seed: of tasks, starts, actions and num_minibatches.

    Attributes:
        updates: updates made so far, skipped ones included; each has tasks of its own.
        skipped_updates: updates skipped, or some of whose gradient steps were, because a reward, an observation, a loss
            or a gradient was not finite.
        steps: environment steps learned from so far.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of its range.

    >>> from eaml_ext.tasks import CartPoleTasks
    >>> dist = CartPoleTasks(hide_velocity=True)
    >>> from eaml_ext.rl import feature_dim
    >>> policy = SSMMetaPolicy(feature_dim(dist), dist.action_dim, hidden_dim=16, state_size=4)
    >>> trainer = RL2(policy, dist, steps=40, tasks_per_update=8)
    >>> returns = trainer.train(updates=2)
    >>> trainer.evaluate(dist.sample(4, "test"), episodes=3).shape
    torch.Size([4, 3])

    Another trainer continues where this one is:

    >>> again = RL2(policy, dist, steps=40, tasks_per_update=8)
    >>> again.load_state_dict(trainer.state_dict())
    >>> again.updates
    2
    """

    _counts = ("updates", "skipped_updates", "steps")

    def __init__(
        self,
        policy: SSMMetaPolicy,
        dist: TaskDistribution[Any],
        *,
        steps: int | None = None,
        episodes: int | None = None,
        loss: str = "ppo",
        tasks_per_update: int = 64,
        lr: float = 1e-3,
        anneal_lr: bool = True,
        update_epochs: int = 4,
        num_minibatches: int = 4,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        across_episodes: bool = False,
        clip_coef: float = 0.2,
        vf_coef: float = 0.5,
        ent_coef: float = 0.01,
        reward_scale: float = 0.1,
        max_grad_norm: float = 0.5,
        max_episode_steps: int = MAX_EPISODE_STEPS,
        seed: int = 0,
    ):
        where = "RL2"
        self.lr = _check.positive(where, "lr", lr)
        super().__init__(
            policy,
            dist,
            {"lr": self.lr, "eps": 1e-5},
            tasks_per_update=tasks_per_update,
            reward_scale=reward_scale,
            max_grad_norm=max_grad_norm,
            seed=seed,
        )
        limit = _check.positive(where, "max_episode_steps", max_episode_steps, integer=True)
        self._length: dict[str, Any] = {**check_length(where, episodes, steps), "max_episode_steps": limit}
        passes = {"update_epochs": update_epochs, "num_minibatches": num_minibatches}
        update_epochs, num_minibatches = (_check.positive(where, name, n, integer=True) for name, n in passes.items())
        if self.tasks_per_update < num_minibatches:
            wanted = f"<= tasks_per_update {self.tasks_per_update}"
            raise ValueError(f"{where}: num_minibatches must be {wanted}, got {num_minibatches}")
        if loss not in ("ppo", "a2c"):
            raise ValueError(f"{where}: loss must be 'ppo' or 'a2c', got {loss!r}")
        for name, flag in (("anneal_lr", anneal_lr), ("across_episodes", across_episodes)):
            _check.flag(where, name, flag)
        self.anneal_lr = bool(anneal_lr)
        self._loss, self._clip = loss, _check.positive(where, "clip_coef", clip_coef)
        self._passes = (update_epochs, num_minibatches) if loss == "ppo" else (1, 1)
        weights = {"vf_coef": vf_coef, "ent_coef": ent_coef}
        self._weights: dict[str, Any] = {
            name: _check.positive(where, name, weight, zero=True) for name, weight in weights.items()
        }
        self._discount: dict[str, Any] = {
            name: fraction(where, name, n) for name, n in (("gamma", gamma), ("gae_lambda", gae_lambda))
        }
        self._discount["across_episodes"] = bool(across_episodes)
        self.steps = 0

    def train(
        self, updates: int, report: Callable[[int, float], Any] | None = None, *, total: int | None = None
    ) -> list[float]:
        """Make ``updates`` updates.

        Args:
            updates: how many.
            report: ``report(update, mean return)`` is called after each, with numbers from 0.
            total: number of updates, counted from the first of this trainer, after which the step size would be 0;
                ``updates`` of this call if absent. With it, training in several calls, or continued by
                :meth:`load_state_dict`, equals training in one call.

        Returns:
            For each update the mean return of its finished episodes, NaN if none finished or the update was skipped.
            A RuntimeWarning at the end counts the skipped updates.

        Raises:
            TypeError, ValueError: an argument is of another type or out of its range, or as :meth:`update`.
        """
        where = "RL2.train"
        updates = _check.positive(where, "updates", updates, integer=True)
        before = 0 if total is None else self.updates
        total = before + updates if total is None else _check.integer(where, "total", total, before + updates)
        returns = []
        for i in self._numbers(where, updates):
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * (1 - (before + i) / total) if self.anneal_lr else self.lr
            returns.append(self.update())
            if report is not None:
                report(i, returns[-1])
        return returns

    def _trials(self, tasks: Sequence[Task], seed: int) -> Trials:
        return rollout(self.dist, tasks, self.policy, seed, **self._length)

    def _update(self, tasks: Sequence[Task]) -> float:
        trials = self._trials(tasks, derive_seed(self.seed, Purpose.RL2_TRIALS, self.updates, bits=32))
        self.steps += int(trials.mask.sum())
        self.learn(trials)
        return float(trials.finished_returns().mean())

    @outside_inference_mode()
    @torch.enable_grad()
    def learn(self, trials: Trials) -> None:
        """The gradient steps on trials that the policy, as it is, has just played."""
        trials = replace(trials, **recordable(vars(trials)))
        trials = replace(trials, rewards=self.reward_scale * trials.rewards)
        advantages = trials.advantages(**self._discount)
        targets = advantages + trials.values
        if not finite(trials.inputs[trials.mask], targets[trials.mask]):
            self._skip("RL2.learn: inputs, rewards and values must be finite")
            return
        generator = torch.Generator().manual_seed(derive_seed(self.seed, Purpose.RL2_MINIBATCHES, self.updates))
        update_epochs, num_minibatches = self._passes
        taken = True
        for _ in range(update_epochs):
            for rows in torch.randperm(len(advantages), generator=generator).tensor_split(num_minibatches):
                part = trials[rows.to(advantages.device)]
                time = int(part.mask.sum(1).max())  # the padding of the longest trial of all need not be scanned
                loss = self._objective(part[:, :time], advantages[rows, :time], targets[rows, :time])
                taken = self._step(loss) and taken
        if not taken:
            self._skip("RL2.learn: losses and gradients must be finite")

    def _objective(self, trials: Trials, advantages: Tensor, targets: Tensor) -> Tensor:
        distribution, values, _ = self.policy.scan(trials.inputs, None, trials.resets)
        log_probs, mask = distribution.log_prob(trials.actions), trials.mask
        now = (log_probs, values, distribution.entropy(), normalised(advantages, mask), targets)
        if self._loss == "a2c":
            return a2c_loss(*now, mask, **self._weights)
        return ppo_loss(*now, trials.log_probs, mask, clip_coef=self._clip, **self._weights)

    def evaluate(
        self,
        tasks: Sequence[Task],
        episodes: int,
        seed: int = 0,
        greedy: bool = True,
        *,
        max_episode_steps: int = MAX_EPISODE_STEPS,
    ) -> Tensor:
        """The return of each episode of one trial per task, ``(len(tasks), episodes)``.

        Arguments and errors as of :func:`eaml_ext.rl.rollout`.
        """
        seed = derive_seed(check_seed("RL2.evaluate", "seed", seed), Purpose.RL2_EVALUATION, bits=32)
        length: dict[str, Any] = {"episodes": episodes, "max_episode_steps": max_episode_steps}
        trials = rollout(self.dist, tasks, self.policy, seed, **length, greedy=greedy)
        return trials.episode_returns(episodes)
