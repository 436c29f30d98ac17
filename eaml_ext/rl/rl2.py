"""max E[sum of the rewards of a trial]: train a policy with memory to adapt in context (Duan et al. 2016, "RL^2")."""

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
from eaml_ext.rl._learner import Learner, return_per_episode
from eaml_ext.rl.losses import a2c_loss, normalised, ppo_loss
from eaml_ext.rl.policy import SSMMetaPolicy
from eaml_ext.rl.trials import MAX_EPISODE_STEPS, Trials, check_length, rollout
from eaml_ext.tasks.base import Task, TaskDistribution


class RL2(Learner):
    """Train a policy with memory by PPO or A2C on whole trials.

    A trial is several episodes of one task. The policy's inputs are the observation, the last action, the last reward
    and a flag at the start of an episode. Its state is kept from episode to episode and zeroed between trials, so that
    the policy can identify the task by acting. Gradients flow through whole trials; each is one scan.

    Args:
        policy: of ``state_dim`` ``feature_dim(dist)``; trained in place. The first update sets its observation
            normalisation, unless it is set already.
        dist: the distribution of the training tasks.
        steps: steps of a training trial; or
        episodes: episodes of a training trial. Exactly one of the two is given.
        loss: "ppo", or "a2c", which takes one gradient step per update.
        tasks_per_update: trials per update, each of a newly drawn task.
        lr: learning rate of Adam.
        anneal_lr: decrease the learning rate linearly to 0 over :meth:`train`.
        update_epochs: epochs of PPO over the trials of an update.
        num_minibatches: minibatches per epoch of PPO; a minibatch consists of whole trials.
        gamma, gae_lambda, episodic: as in ``Trials.advantages``.
        clip_coef, vf_coef, ent_coef: as in :func:`eaml_ext.rl.ppo_loss`.
        reward_scale: factor of the rewards in the losses, so that values are of the order of 1. With larger values the
            critic's gradient dominates under ``max_grad_norm``.
        max_grad_norm: gradients are scaled down to this norm.
        max_episode_steps: as in :func:`eaml_ext.rl.rollout`, for training trials of whole ``episodes``.
        seed: in [0, 2**32); tasks, starting states, actions and minibatches depend on it.

    Attributes:
        updates: updates made so far, including skipped ones; each has tasks of its own.
        skipped_updates: updates in which a gradient step was skipped, because a reward, an observation, a loss or a
            gradient was not finite.
        steps: environment steps in all updates so far.

    Raises:
        TypeError, ValueError: an argument has another type or is out of its range.

    >>> from eaml_ext.tasks import CartPoleTasks
    >>> dist = CartPoleTasks(hide_velocity=True)
    >>> from eaml_ext.rl import feature_dim
    >>> policy = SSMMetaPolicy(feature_dim(dist), dist.action_dim, hidden_dim=16, state_size=4)
    >>> trainer = RL2(policy, dist, steps=40, tasks_per_update=8)
    >>> returns = trainer.train(updates=2)
    >>> trainer.evaluate(dist.sample(4, "test"), episodes=3).shape
    torch.Size([4, 3])

    Another trainer continues from the state of this one:

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
        episodic: bool = True,
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
        gae, coefs = (gamma, gae_lambda), (vf_coef, ent_coef)
        optimizer = {"lr": self.lr, "eps": 1e-5}
        super().__init__(policy, dist, optimizer, tasks_per_update, gae, coefs, reward_scale, max_grad_norm, seed)
        limit = _check.positive(where, "max_episode_steps", max_episode_steps, integer=True)
        self._length: dict[str, Any] = {**check_length(where, episodes, steps), "max_episode_steps": limit}
        update_epochs = _check.positive(where, "update_epochs", update_epochs, integer=True)
        num_minibatches = _check.positive(where, "num_minibatches", num_minibatches, integer=True)
        if self.tasks_per_update < num_minibatches:
            wanted = f"<= tasks_per_update {self.tasks_per_update}"
            raise ValueError(f"{where}: num_minibatches must be {wanted}, got {num_minibatches}")
        if loss not in ("ppo", "a2c"):
            raise ValueError(f"{where}: loss must be 'ppo' or 'a2c', got {loss!r}")
        self.anneal_lr = _check.flag(where, "anneal_lr", anneal_lr)
        self._gae_options["episodic"] = _check.flag(where, "episodic", episodic)
        self._loss, self._clip_coef = loss, _check.positive(where, "clip_coef", clip_coef)
        self._update_epochs, self._num_minibatches = (update_epochs, num_minibatches) if loss == "ppo" else (1, 1)
        self.steps = 0

    def train(
        self, updates: int, report: Callable[[int, float], Any] | None = None, *, total: int | None = None
    ) -> list[float]:
        """Make ``updates`` updates.

        Args:
            updates: how many, > 0.
            report: called as ``report(update, value)`` after each update, with the number of the update in this call
                from 0 and its value in the returned list. The state is whole then: it may be saved.
            total: number of updates since the first one of this trainer after which the annealed learning rate is 0.
                Default: ``updates``, counted from this call. With ``total``, training in several calls, or after
                :meth:`load_state_dict`, equals training in one call.

        Returns:
            The return per episode of each update: the sum of all rewards divided by the number of episodes. With
            ``steps`` the end of a trial may cut its last episode. NaN if a reward or an observation was not finite. A
            RuntimeWarning at the end counts the skipped updates.

        Raises:
            TypeError, ValueError: an argument has another type or is out of its range, or as :meth:`update`.
        """
        where = "RL2.train"
        updates = _check.positive(where, "updates", updates, integer=True)
        before = 0 if total is None else self.updates
        total = before + updates if total is None else _check.integer(where, "total", total, before + updates)
        returns = []
        for i in self._progress(where, updates):
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * (1 - (before + i) / total) if self.anneal_lr else self.lr
            returns.append(self.update())
            if report is not None:
                report(i, returns[-1])
        return returns

    def _rollout(self, tasks: Sequence[Task], seed: int) -> Trials:
        return rollout(self.dist, tasks, self.policy, seed, **self._length)

    def _update(self, tasks: Sequence[Task]) -> float:
        trials = self._rollout(tasks, derive_seed(self.seed, Purpose.RL2_TRIALS, self.updates, bits=32))
        self.steps += int(trials.mask.sum())
        self.learn(trials)
        return return_per_episode(trials)

    @outside_inference_mode()
    @torch.enable_grad()
    def learn(self, trials: Trials) -> None:
        """Take the gradient steps of one update.

        Args:
            trials: trials of the current policy.
        """
        trials = replace(trials, **recordable(vars(trials)))
        advantages, targets = self._advantages(trials)
        if not finite(trials.inputs[trials.mask], targets[trials.mask]):
            self._skip("RL2.learn: inputs, rewards and values must be finite")
            return
        generator = torch.Generator().manual_seed(derive_seed(self.seed, Purpose.RL2_MINIBATCHES, self.updates))
        taken = True
        for _ in range(self._update_epochs):
            for rows in torch.randperm(len(advantages), generator=generator).tensor_split(self._num_minibatches):
                minibatch = trials[rows.to(advantages.device)]
                time = int(minibatch.mask.sum(1).max())  # padding common to all rows is not scanned
                loss = self._objective(minibatch[:, :time], advantages[rows, :time], targets[rows, :time])
                taken = self._step(loss) and taken
        if not taken:
            self._skip("RL2.learn: losses and gradients must be finite")

    def _objective(self, trials: Trials, advantages: Tensor, targets: Tensor) -> Tensor:
        distribution, values, _ = self.policy.scan(trials.inputs, None, trials.resets)
        log_probs, mask = distribution.log_prob(trials.actions), trials.mask
        args = (log_probs, values, distribution.entropy(), normalised(advantages, mask), targets)
        if self._loss == "a2c":
            return a2c_loss(*args, mask, **self._loss_coefs)
        return ppo_loss(*args, trials.log_probs, mask, clip_coef=self._clip_coef, **self._loss_coefs)

    def evaluate(
        self,
        tasks: Sequence[Task],
        episodes: int,
        seed: int = 0,
        greedy: bool = True,
        *,
        keep_state: bool = True,
        max_episode_steps: int = MAX_EPISODE_STEPS,
    ) -> Tensor:
        """Return the returns of all episodes of one trial per task.

        Args:
            tasks: the tasks to evaluate on.
            episodes: episodes of each trial.
            seed, greedy, max_episode_steps: as in :func:`eaml_ext.rl.rollout`.
            keep_state: False: zero the policy's state at every start of an episode, so that it cannot adapt.

        Returns:
            ``(len(tasks), episodes)``, float32.

        Raises:
            TypeError, ValueError: as :func:`eaml_ext.rl.rollout`.
        """
        seed = derive_seed(check_seed("RL2.evaluate", "seed", seed), Purpose.RL2_EVALUATION, bits=32)
        options: dict[str, Any] = {"episodes": episodes, "max_episode_steps": max_episode_steps}
        trials = rollout(self.dist, tasks, self.policy, seed, **options, keep_state=keep_state, greedy=greedy)
        return trials.episode_returns(episodes)
