"""max E[sum of rewards of a trial]: a policy with memory learns to learn, in context (Duan et al. 2016, "RL^2")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from eaml_ext import _check
from eaml_ext.rl.losses import a2c_loss, normalised, ppo_loss
from eaml_ext.rl.policy import SSMMetaPolicy
from eaml_ext.rl.trials import Trials, check_learner, play
from eaml_ext.tasks.base import Task, TaskDistribution, check_seed


class RL2:
    """Trains a policy whose memory outlives the episodes of a trial, by PPO or A2C on whole trials.

    A trial is several episodes of one task. Beside the observation the policy sees the last action, the last reward and
    where an episode starts. Its state is kept from episode to episode and zeroed between trials: what is particular to
    the task it can only find out by acting. Gradients run through whole trials: one scan each.

    Args:
        policy: of ``state_dim`` ``feature_dim(dist)``; learns in place. Its first trials give it the units of its
            observations.
        dist: of the tasks to learn.
        steps: length of a training trial in steps, whatever episodes they hold; or
        episodes: of a training trial in whole episodes. One of the two.
        loss: "ppo" or "a2c" (which takes one gradient step for each batch of trials).
        tasks_per_update: trials played side by side, each of a task drawn anew.
        lr: step size of Adam, falling linearly to 0 over :meth:`train` where ``anneal``.
        epochs, minibatches: of PPO; a minibatch is of whole trials.
        gamma, lam, across_episodes: as in :meth:`Trials.advantages`.
        clip, value_weight, entropy_weight: as in :func:`eaml_ext.rl.losses.ppo_loss`.
        reward_scale: rewards are multiplied by it for learning, so that values are of the order of 1. Else the critic's
            gradient is all that passes ``max_grad_norm``.
        max_grad_norm: gradients are scaled down to this norm.
        seed: of tasks, starts, actions and minibatches.

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
    """

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
        anneal: bool = True,
        epochs: int = 4,
        minibatches: int = 4,
        gamma: float = 0.99,
        lam: float = 0.95,
        across_episodes: bool = False,
        clip: float = 0.2,
        value_weight: float = 0.5,
        entropy_weight: float = 0.01,
        reward_scale: float = 0.1,
        max_grad_norm: float = 0.5,
        seed: int = 0,
    ):
        check_learner("RL2", policy, dist)
        if (episodes is None) == (steps is None):
            raise ValueError(f"RL2: one of episodes and steps must be given, got {episodes} and {steps}")
        length = {"steps": steps} if episodes is None else {"episodes": episodes}
        counts = {**length, "tasks_per_update": tasks_per_update, "epochs": epochs, "minibatches": minibatches}
        for name, count in counts.items():
            _check.positive("RL2", name, count, integer=True)  # type: ignore[arg-type]
        for name, number in (("lr", lr), ("clip", clip), ("reward_scale", reward_scale)):
            _check.positive("RL2", name, number)
        _check.positive("RL2", "max_grad_norm", max_grad_norm)
        for name, number in (("value_weight", value_weight), ("entropy_weight", entropy_weight)):
            _check.positive("RL2", name, number, zero=True)
        for name, number in (("gamma", gamma), ("lam", lam)):
            _check.positive("RL2", name, number, zero=True)
            if number > 1:
                raise ValueError(f"RL2: {name} must be <= 1, got {number!r}")
        for name, flag in (("anneal", anneal), ("across_episodes", across_episodes)):
            _check.flag("RL2", name, flag)
        if loss not in ("ppo", "a2c"):
            raise ValueError(f"RL2: loss must be 'ppo' or 'a2c', got {loss!r}")
        if tasks_per_update < minibatches:
            raise ValueError(f"RL2: minibatches must be <= tasks_per_update {tasks_per_update}, got {minibatches}")
        check_seed("RL2", "seed", seed)
        self.policy, self.dist, self.seed, self.tasks_per_update = policy, dist, seed, tasks_per_update
        self.reward_scale = reward_scale
        self.lr, self.anneal, self.max_grad_norm = lr, anneal, max_grad_norm
        self._length: dict[str, Any] = length
        self._loss, self._clip = loss, clip
        self._passes = (epochs, minibatches) if loss == "ppo" else (1, 1)
        self._weights: dict[str, Any] = {"value_weight": value_weight, "entropy_weight": entropy_weight}
        self._discount: dict[str, Any] = {"gamma": gamma, "lam": lam, "across_episodes": across_episodes}
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=lr, eps=1e-5)
        self.updates = 0  # made so far: each meets tasks of its own
        self.steps = 0  # environment steps taken so far

    def train(self, updates: int, report: Callable[[int, float], Any] | None = None) -> list[float]:
        """So many updates; ``report(update, mean return)`` is called after each. Returns the mean return of each one's
        finished episodes (NaN where none finished)."""
        _check.positive("RL2.train", "updates", updates, integer=True)
        returns = []
        for i in tqdm(range(updates), desc="meta-training", unit="update", leave=False, disable=None):
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * (1 - i / updates) if self.anneal else self.lr
            returns.append(self.update())
            if report is not None:
                report(i, returns[-1])
        return returns

    def update(self) -> float:
        """Plays trials of freshly drawn tasks and learns from them. Returns their finished episodes' mean return."""
        tasks = self.dist.sample(self.tasks_per_update, "train", self.seed, self.updates)
        trials = play(self.dist, tasks, self.policy, self.seed, **self._length)
        if not self.updates:
            self.policy.normalise(trials.inputs[trials.mask])
            trials = play(self.dist, tasks, self.policy, self.seed, **self._length)
        self.updates += 1
        self.steps += int(trials.mask.sum())
        self.learn(trials)
        return _mean_return(trials)

    def learn(self, trials: Trials) -> None:
        """The gradient steps on trials that the policy, as it is, has just played."""
        trials = replace(trials, rewards=self.reward_scale * trials.rewards)
        advantages = trials.advantages(**self._discount)
        targets = advantages + trials.values
        generator = torch.Generator().manual_seed(self.seed + self.updates)
        epochs, minibatches = self._passes
        for _ in range(epochs):
            for rows in torch.randperm(len(advantages), generator=generator).chunk(minibatches):
                part = trials[rows.to(advantages.device)]
                time = int(part.mask.sum(1).max())  # the padding of the longest trial of all need not be scanned
                loss = self._objective(part[:, :time], advantages[rows, :time], targets[rows, :time])
                self.optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
                self.optimizer.step()

    def _objective(self, trials: Trials, advantages: Tensor, targets: Tensor) -> Tensor:
        distribution, values, _ = self.policy.scan(trials.inputs, None, trials.resets)
        log_probs, mask = distribution.log_prob(trials.actions), trials.mask
        now = (log_probs, values, distribution.entropy(), normalised(advantages, mask), targets)
        if self._loss == "a2c":
            return a2c_loss(*now, mask, **self._weights)
        return ppo_loss(*now, trials.log_probs, mask, clip=self._clip, **self._weights)

    def evaluate(self, tasks: Sequence[Task], episodes: int, seed: int = 0, greedy: bool = True) -> Tensor:
        """The return of each episode of one trial per task, ``(len(tasks), episodes)``."""
        trials = play(self.dist, tasks, self.policy, seed, episodes=episodes, greedy=greedy)
        return trials.episode_returns(episodes)


def _mean_return(trials: Trials) -> float:
    """Of the episodes that were played to their end."""
    starts, done = int(trials.starts.sum()), trials.starts.long().cumsum(1)
    returns = trials.episode_returns(int(done.max())) if starts else trials.rewards.new_zeros(0, 0)
    # The last episode of a trial may have been cut by the end of the recording.
    whole = torch.where(torch.arange(returns.shape[1], device=returns.device) < done[:, -1:] - 1, returns, torch.nan)
    return float(whole.nanmean())
