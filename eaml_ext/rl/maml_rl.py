"""theta -= outer_lr d/dtheta mean_i L(theta_i; D_i'),  theta_i = theta - inner_lr dL(theta; D_i)/dtheta: MAML for RL.

D_i is played with theta, D_i' with theta_i, L is the policy gradient's loss (Finn et al. 2017, algorithm 3).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import functional_call, vmap
from tqdm import tqdm

from eaml_ext import _check
from eaml_ext.meta import MetaMAML
from eaml_ext.rl.losses import a2c_loss, normalised
from eaml_ext.rl.policy import SSMMetaPolicy
from eaml_ext.rl.trials import Trials, check_learner, play
from eaml_ext.tasks.base import Task, TaskDistribution, check_seed

Params = dict[str, Tensor]


class MAMLRL:
    """Learns initial parameters from which a step of policy gradient goes far, to exact second order.

    All tasks run as one batch: they act, each with the parameters of its own, by one vmapped step of the policy; the
    inner loop is that of :class:`eaml_ext.meta.MetaMAML`, vmapped over tasks. The policy's memory starts anew with
    every episode: what is kept of a task is in the parameters. As in the paper, the outer gradient leaves out how the
    first parameters choose the data of the inner step.

    Args:
        policy: of ``state_dim`` ``feature_dim(dist)``; its parameters are meta-learned in place. Its first trajectories
            give it the units of its observations.
        dist: of the tasks to learn.
        inner_lr: step size of the inner loop.
        outer_lr: learning rate of Adam.
        inner_steps: inner steps, each on trajectories played with the parameters it starts from.
        first_order: treat inner gradients as constants.
        tasks_per_update: tasks of a meta-batch, drawn anew for each.
        rows, steps: a task is played in so many environments for so many steps each, before every inner step and after
            the last one.
        gamma, lam: as in :func:`eaml_ext.rl.losses.advantages`.
        value_weight, entropy_weight: as in :func:`eaml_ext.rl.losses.a2c_loss`, which is the loss inside and outside.
        reward_scale: rewards are multiplied by it for learning, so that values are of the order of 1.
        max_grad_norm: outer gradients are scaled down to this norm.
        seed: of tasks, starts and actions.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of its range.

    >>> from eaml_ext.tasks import CartPoleTasks
    >>> dist = CartPoleTasks()
    >>> from eaml_ext.rl import feature_dim
    >>> policy = SSMMetaPolicy(feature_dim(dist), dist.action_dim, hidden_dim=16, state_size=4)
    >>> maml = MAMLRL(policy, dist, tasks_per_update=4, rows=4, steps=30)
    >>> returns = maml.train(updates=2)
    >>> adapted = maml.adapt(dist.sample(1, "test")[0])
    >>> maml.evaluate(dist.sample(4, "test")).shape  # before and after the inner step
    torch.Size([4, 2])
    """

    def __init__(
        self,
        policy: SSMMetaPolicy,
        dist: TaskDistribution[Any],
        *,
        inner_lr: float = 0.1,
        outer_lr: float = 1e-3,
        inner_steps: int = 1,
        first_order: bool = False,
        tasks_per_update: int = 16,
        rows: int = 8,
        steps: int = 100,
        gamma: float = 0.99,
        lam: float = 0.95,
        value_weight: float = 0.5,
        entropy_weight: float = 0.0,
        reward_scale: float = 0.1,
        max_grad_norm: float = 0.5,
        seed: int = 0,
    ):
        where = "MAMLRL"
        check_learner(where, policy, dist)
        counts = {"inner_steps": inner_steps, "tasks_per_update": tasks_per_update, "rows": rows, "steps": steps}
        for name, count in counts.items():
            _check.positive(where, name, count, integer=True)
        rates = {"inner_lr": inner_lr, "outer_lr": outer_lr}
        for name, number in {**rates, "reward_scale": reward_scale, "max_grad_norm": max_grad_norm}.items():
            _check.positive(where, name, number)
        for name, number in (("value_weight", value_weight), ("entropy_weight", entropy_weight)):
            _check.positive(where, name, number, zero=True)
        for name, number in (("gamma", gamma), ("lam", lam)):
            _check.positive(where, name, number, zero=True)
            if number > 1:
                raise ValueError(f"{where}: {name} must be <= 1, got {number!r}")
        _check.flag(where, "first_order", first_order)
        check_seed(where, "seed", seed)
        self.policy, self.dist, self.seed = policy, dist, seed
        self.tasks_per_update, self.rows, self.steps = tasks_per_update, rows, steps
        self.reward_scale, self.max_grad_norm = reward_scale, max_grad_norm
        self._discount: dict[str, Any] = {"gamma": gamma, "lam": lam}
        self._weights: dict[str, Any] = {"value_weight": value_weight, "entropy_weight": entropy_weight}
        self.maml = MetaMAML(_Sequences(policy), inner_lr, outer_lr, first_order, inner_steps=inner_steps)
        self.updates = 0  # made so far: each meets tasks of its own
        self.skipped_updates = 0  # meta-updates left out because a loss or gradient was not finite

    def train(self, updates: int) -> list[float]:
        """So many meta-updates. Returns, for each, the mean reward of a step after adaptation."""
        _check.positive("MAMLRL.train", "updates", updates, integer=True)
        return [self.update() for _ in tqdm(range(updates), desc="meta-training", leave=False, disable=None)]

    def update(self) -> float:
        """One meta-update on freshly drawn tasks. Returns the mean reward of a step after adaptation."""
        tasks = self.dist.sample(self.tasks_per_update, "train", self.seed, self.updates)
        start = self._spread(len(tasks))
        if not self.updates:
            trials = self._play(tasks, start, 0)
            self.policy.normalise(trials.inputs[trials.mask])
        adapted, inner = self._inner_loop(tasks, start)
        after = self._play(tasks, adapted, self.maml.inner_steps)
        self.updates += 1
        loss = self.task_losses([*inner, self._batch(after, len(tasks))]).mean()
        params = list(self.maml.parameters().values())
        grads = torch.autograd.grad(loss, params)
        reward = float(after.rewards.mean())
        if not all(bool(torch.isfinite(t).all()) for t in (loss, *grads)):
            self.skipped_updates += 1
            return reward
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        torch.nn.utils.clip_grad_norm_(params, self.max_grad_norm)
        self.maml.optimizer.step()
        self.maml.optimizer.zero_grad()
        return reward

    def task_losses(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The loss of each task on the last batch, after one inner step on each batch before it, ``(tasks,)``.

        Differentiable in the policy's parameters. ``batches`` as :meth:`task_batch` makes them.
        """

        def task_loss(*batches: tuple[Tensor, Tensor]) -> Tensor:
            params = self.maml.parameters()
            for x, y in batches[:-1]:
                params = self.maml.adapt_params(params, x, y, self._loss, 1)
            x, y = batches[-1]
            return self._loss(self.maml.call(params, x), y)

        return vmap(task_loss)(*batches)

    def adapt(self, task: Task, seed: int = 0) -> SSMMetaPolicy:
        """A copy of the policy after the inner loop on trajectories of one task. Detached."""
        params, _ = self._inner_loop([task], self._spread(1), seed)
        policy = copy.deepcopy(self.policy)
        with torch.no_grad():
            for name, p in policy.named_parameters():
                p.copy_(params[f"policy.{name}"][0])
        return policy

    def evaluate(self, tasks: Sequence[Task], seed: int = 0) -> Tensor:
        """Mean return of an episode, over ``rows`` of them, before the inner loop and after each of its steps.

        Returns ``(len(tasks), inner_steps + 1)``.
        """
        params, returns = self._spread(len(tasks)), []
        for step in range(self.maml.inner_steps + 1):
            repeated = [task for task in tasks for _ in range(self.rows)]
            trials = play(self.dist, repeated, self._actor(params), seed + 1, episodes=1, keep_state=False)
            returns.append(trials.episode_returns(1).view(len(tasks), self.rows).mean(1))
            if step < self.maml.inner_steps:
                params = self._inner_step(params, self._batch(self._play(tasks, params, step, seed), len(tasks)))
        return torch.stack(returns, dim=1)

    def _inner_loop(
        self, tasks: Sequence[Task], params: Params, seed: int | None = None
    ) -> tuple[Params, list[tuple[Tensor, Tensor]]]:
        """Parameters of each task after the inner loop, detached, and the data of each of its steps."""
        batches = []
        for step in range(self.maml.inner_steps):
            batches.append(self._batch(self._play(tasks, params, step, seed), len(tasks)))
            params = self._inner_step(params, batches[-1])
        return params, batches

    def _inner_step(self, params: Params, batch: tuple[Tensor, Tensor]) -> Params:
        def adapt(params: Params, x: Tensor, y: Tensor) -> Params:
            return self.maml.adapt_params(params, x, y, self._loss, 1)

        with torch.no_grad():
            return vmap(adapt)(params, *batch)

    def _spread(self, tasks: int) -> Params:
        """The meta-parameters, once for each task."""
        return {name: p.detach().expand(tasks, *p.shape) for name, p in self.maml.parameters().items()}

    def _actor(self, params: Params) -> _PerTask:
        return _PerTask(self.policy, params, self.rows)

    def _play(self, tasks: Sequence[Task], params: Params, step: int, seed: int | None = None) -> Trials:
        """Trajectories of all tasks, each played with its own parameters, task-major: rows of a task are neighbours."""
        repeated = [task for task in tasks for _ in range(self.rows)]
        seed = self.seed if seed is None else seed
        stream = (seed * (self.maml.inner_steps + 1) + step) % 2**32  # other starts and actions at every inner step
        return play(self.dist, repeated, self._actor(params), stream, steps=self.steps, keep_state=False)

    def _batch(self, trials: Trials, tasks: int) -> tuple[Tensor, Tensor]:
        """What the model and the loss take, ``(tasks, rows, time, ...)``; all a loss needs is in one tensor."""
        trials = replace(trials, rewards=self.reward_scale * trials.rewards)
        advantages = trials.advantages(**self._discount)
        targets = advantages + trials.values
        x = torch.cat([trials.inputs, trials.resets.unsqueeze(-1).to(trials.inputs.dtype)], dim=-1)
        actions = trials.actions if self.policy.continuous else trials.actions.unsqueeze(-1)
        x, actions, advantages, targets = (
            t.reshape(tasks, self.rows, *t.shape[1:]) for t in (x, actions.to(x.dtype), advantages, targets)
        )
        advantages = torch.stack([normalised(a) for a in advantages])  # of each task by itself
        return x, torch.cat([actions, advantages.unsqueeze(-1), targets.unsqueeze(-1)], dim=-1)

    def _loss(self, said: Tensor, happened: Tensor) -> Tensor:
        action, advantages, targets = happened[..., :-2], happened[..., -2], happened[..., -1]
        distribution, values = self.policy.distribution(said[..., :-1]), said[..., -1]
        log_probs = distribution.log_prob(action if self.policy.continuous else action.squeeze(-1).long())
        return a2c_loss(log_probs, values, distribution.entropy(), advantages, targets, **self._weights)


class _Sequences(nn.Module):
    """A policy as MetaMAML calls it: inputs with the reset flag as last entry -> distribution parameters and value."""

    def __init__(self, policy: SSMMetaPolicy):
        super().__init__()
        self.policy = policy

    def forward(self, x: Tensor) -> Tensor:
        parameters, value, _ = self.policy.scan_tensors(x[..., :-1], None, x[..., -1] > 0.5)
        return torch.cat([parameters, value.unsqueeze(-1)], dim=-1)


class _Steps(nn.Module):
    """A policy's step as functional_call calls it."""

    def __init__(self, policy: SSMMetaPolicy):
        super().__init__()
        self.policy = policy

    def forward(self, *args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.policy.step_tensors(*args)


class _PerTask:
    """One policy under parameters of each task; ``rows`` neighbours in the batch are of one task."""

    def __init__(self, policy: SSMMetaPolicy, params: Params, rows: int):
        self._policy, self._params, self._rows = policy, params, rows
        module = _Steps(policy)
        self._call = vmap(lambda params, *args: functional_call(module, params, args))

    def init_hidden(self, batch: int) -> Tensor:
        return self._policy.init_hidden(batch)

    def step(self, *args: Tensor) -> tuple[Distribution, Tensor, Tensor]:
        out = self._call(self._params, *(t.reshape(-1, self._rows, *t.shape[1:]) for t in args))
        parameters, value, state = (t.flatten(0, 1) for t in out)
        return self._policy.distribution(parameters), value, state
