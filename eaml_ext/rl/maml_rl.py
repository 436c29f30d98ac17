"""theta -= outer_lr d/dtheta mean_i L(theta_i; D_i'),  theta_i = theta - inner_lr dL(theta; D_i)/dtheta: MAML for RL.

D_i is played with theta, D_i' with theta_i, L is the policy gradient's loss (Finn et al. 2017, algorithm 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import vmap

from eaml_ext import _check
from eaml_ext._random import Purpose, check_seed, derive_seed
from eaml_ext.meta import MetaMAML
from eaml_ext.meta._types import Params
from eaml_ext.meta.functional import detached_copy, functional_call, outside_inference_mode
from eaml_ext.rl._learner import Learner
from eaml_ext.rl.losses import a2c_loss, fraction, normalised
from eaml_ext.rl.policy import SSMMetaPolicy
from eaml_ext.rl.trials import MAX_EPISODE_STEPS, Trials, rollout
from eaml_ext.tasks.base import Task, TaskDistribution, check_tasks


class MAMLRL(Learner):
    """Learns initial parameters from which a step of policy gradient goes far, to exact second order.

    All tasks run as one batch: they act, each with the parameters of its own, by one vmapped step of the policy; the
    inner loop is that of :class:`eaml_ext.meta.MetaMAML`, vmapped over tasks. The policy's memory starts anew with
    every episode: what is kept of a task is in the parameters. As in the paper, the outer gradient leaves out how the
    first parameters choose the data of the inner step.

    Args:
        policy: of ``state_dim`` ``feature_dim(dist)``; its parameters are meta-learned in place. Its first trajectories
            give it the units of its observations, unless it has units already, as a trained policy does.
        dist: of the tasks to learn.
        inner_lr: step size of the inner loop.
        outer_lr: learning rate of Adam.
        inner_steps: inner steps, each on trajectories played with the parameters it starts from.
        first_order: treat inner gradients as constants.
        tasks_per_update: tasks of a meta-batch, drawn anew for each.
        rows, steps: a task is played in so many environments for so many steps each, before every inner step and after
            the last one.
        gamma, gae_lambda: as in :func:`eaml_ext.rl.losses.advantages`.
        vf_coef, ent_coef: as in :func:`eaml_ext.rl.losses.a2c_loss`, which is the loss inside and outside.
        reward_scale: rewards are multiplied by it for learning, so that values are of the order of 1.
        max_grad_norm: outer gradients are scaled down to this norm.
        seed: of tasks, starts and actions.

    Attributes:
        updates: meta-updates made so far, skipped ones included; each has tasks of its own.
        skipped_updates: meta-updates skipped because a reward, an observation, a loss or a gradient was not finite.

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
        gae_lambda: float = 0.95,
        vf_coef: float = 0.5,
        ent_coef: float = 0.0,
        reward_scale: float = 0.1,
        max_grad_norm: float = 0.5,
        seed: int = 0,
    ):
        where = "MAMLRL"
        outer_lr = _check.positive(where, "outer_lr", outer_lr)
        super().__init__(
            policy,
            dist,
            {"lr": outer_lr},
            tasks_per_update=tasks_per_update,
            reward_scale=reward_scale,
            max_grad_norm=max_grad_norm,
            seed=seed,
        )
        inner_lr = _check.positive(where, "inner_lr", inner_lr)
        inner_steps = _check.positive(where, "inner_steps", inner_steps, integer=True)
        self.rows = _check.positive(where, "rows", rows, integer=True)
        self.steps = _check.positive(where, "steps", steps, integer=True)
        self._discount: dict[str, Any] = {
            name: fraction(where, name, number) for name, number in (("gamma", gamma), ("gae_lambda", gae_lambda))
        }
        weights = {"vf_coef": vf_coef, "ent_coef": ent_coef}
        self._weights: dict[str, Any] = {
            name: _check.positive(where, name, weight, zero=True) for name, weight in weights.items()
        }
        _check.flag(where, "first_order", first_order)
        self.maml = MetaMAML(_Sequences(policy), inner_lr, outer_lr, first_order, inner_steps=inner_steps)

    def train(self, updates: int) -> list[float]:
        """Make ``updates`` meta-updates.

        Returns:
            For each the mean reward of a step after adaptation, NaN if the update was skipped before that. A
            RuntimeWarning at the end counts the skipped updates.

        Raises:
            TypeError, ValueError: ``updates`` is no positive integer, or as :meth:`update`.
        """
        updates = _check.positive("MAMLRL.train", "updates", updates, integer=True)
        return [self.update() for _ in self._numbers("MAMLRL.train", updates)]

    def _trials(self, tasks: Sequence[Task], seed: int) -> Trials:
        return self._rollout(tasks, self._spread(len(tasks)), seed, steps=self.steps)

    def _update(self, tasks: Sequence[Task]) -> float:
        adapted, inner = self._inner_loop(tasks, self._spread(len(tasks)))
        after = self._play(tasks, adapted, self.maml.inner_steps)
        if not self._step(self.task_losses([*inner, self._batch(after, len(tasks))]).mean()):
            self._skip("MAMLRL.update: loss and gradients must be finite")
        return float(after.rewards.mean())

    def task_losses(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The loss of each task on the last batch, after one inner step on each batch before it, ``(tasks,)``.

        Differentiable in the policy's parameters. A batch is the inputs and the targets of all trajectories of a step,
        ``(tasks, rows, time, ...)``.
        """

        def task_loss(*batches: tuple[Tensor, Tensor]) -> Tensor:
            params = self.maml.parameters()
            for x, y in batches[:-1]:
                params = self.maml.adapt_params(params, x, y, self._loss, 1)
            x, y = batches[-1]
            return self._loss(self.maml.call(params, x), y)

        return vmap(task_loss)(*batches)

    @outside_inference_mode()
    def adapt(self, task: Task, seed: int = 0) -> SSMMetaPolicy:
        """A copy of the policy after the inner loop on trajectories of one task. Detached.

        Raises:
            TypeError, ValueError: an argument is of another type or out of its range, or as
                :func:`eaml_ext.rl.rollout`.
        """
        if not isinstance(task, Task):
            raise TypeError(f"MAMLRL.adapt: task must be a Task, got {type(task).__name__}")
        params, _ = self._inner_loop([task], self._spread(1), check_seed("MAMLRL.adapt", "seed", seed))
        policy = detached_copy(self.policy)
        with torch.no_grad():
            for name, p in policy.named_parameters():
                if f"policy.{name}" in params:
                    p.copy_(params[f"policy.{name}"][0])
        return policy

    @outside_inference_mode()
    def evaluate(self, tasks: Sequence[Task], seed: int = 0, *, max_episode_steps: int = MAX_EPISODE_STEPS) -> Tensor:
        """Mean return of an episode, over ``rows`` of them, before the inner loop and after each of its steps.

        The episodes have starts and actions of their own, the same after every step.

        Args:
            tasks: of the distribution.
            seed: of adaptation and evaluation.
            max_episode_steps: as in :func:`eaml_ext.rl.rollout`.

        Returns:
            ``(len(tasks), inner_steps + 1)``.

        Raises:
            TypeError, ValueError: an argument is of another type or out of its range, or as
                :func:`eaml_ext.rl.rollout`.
        """
        check_tasks("MAMLRL.evaluate", tasks, Task)
        seed = check_seed("MAMLRL.evaluate", "seed", seed)
        options: dict[str, Any] = {"episodes": 1, "max_episode_steps": max_episode_steps}
        params, returns = self._spread(len(tasks)), []
        for step in range(self.maml.inner_steps + 1):
            trials = self._rollout(tasks, params, derive_seed(seed, Purpose.MAML_RL_EVALUATION, bits=32), **options)
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

    def _play(self, tasks: Sequence[Task], params: Params, step: int, seed: int | None = None) -> Trials:
        """Trajectories for inner step ``step``: of a meta-update, or with a ``seed`` of an adaptation."""
        purpose = Purpose.MAML_RL_TRAINING if seed is None else Purpose.MAML_RL_ADAPTATION
        indices = (self.updates, step) if seed is None else (step,)
        stream = derive_seed(self.seed if seed is None else seed, purpose, *indices, bits=32)
        return self._rollout(tasks, params, stream, steps=self.steps)

    def _rollout(self, tasks: Sequence[Task], params: Params, stream: int, **options: Any) -> Trials:
        """Trajectories of all tasks, each played with its own parameters, task-major: rows of a task are neighbours."""
        repeated = [task for task in tasks for _ in range(self.rows)]
        return rollout(
            self.dist, repeated, _PerTask(self.policy, params, self.rows), stream, keep_state=False, **options
        )

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

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        action, advantages, targets = targets[..., :-2], targets[..., -2], targets[..., -1]
        distribution, values = self.policy.distribution(outputs[..., :-1]), outputs[..., -1]
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
