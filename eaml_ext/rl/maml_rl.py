"""theta -= outer_lr d/dtheta mean_i L(theta_i; D_i'),  theta_i = theta - inner_lr dL(theta; D_i)/dtheta: MAML for RL.

D_i are rollouts with theta, D_i' with theta_i; L is the loss of the policy gradient (Finn et al. 2017, algorithm 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from eaml_ext.rl._learner import Learner, return_per_episode
from eaml_ext.rl.losses import a2c_loss, normalised
from eaml_ext.rl.policy import SSMMetaPolicy
from eaml_ext.rl.trials import MAX_EPISODE_STEPS, Trials, rollout
from eaml_ext.tasks.base import Task, TaskDistribution, check_tasks


class MAMLRL(Learner):
    """Meta-learn initial parameters for adaptation by policy gradient, to exact second order.

    All tasks run as one batch. Each task acts with its own parameters; the step of the policy is vmapped over tasks,
    and so is the inner loop of :class:`eaml_ext.meta.MetaMAML`. The policy's state is zeroed at every episode, so that
    only the parameters hold information about a task. As in the paper, the outer gradient does not include the
    dependence of D_i on theta.

    Args:
        policy: of ``state_dim`` ``feature_dim(dist)``; its parameters are meta-learned in place. The first update sets
            its observation normalisation, unless it is set already.
        dist: the distribution of the training tasks.
        inner_lr: step size of the inner loop.
        outer_lr: learning rate of Adam.
        inner_steps: inner steps, each on rollouts with the parameters before it.
        first_order: treat inner gradients as constants.
        tasks_per_update: tasks of a meta-batch, newly drawn for each update.
        rollouts_per_task: environments of each task, before every inner step and after the last one.
        steps: steps of each rollout.
        gamma, gae_lambda: as in :func:`eaml_ext.rl.advantages`.
        vf_coef, ent_coef: as in :func:`eaml_ext.rl.a2c_loss`, which is the inner and the outer loss.
        reward_scale: factor of the rewards in the losses, so that values are of the order of 1.
        max_grad_norm: outer gradients are scaled down to this norm.
        seed: in [0, 2**32); tasks, starting states and actions depend on it.

    Attributes:
        updates: meta-updates made so far, including skipped ones; each has tasks of its own.
        skipped_updates: meta-updates skipped because a reward, an observation, a loss or a gradient was not finite.

    Raises:
        TypeError, ValueError: an argument has another type or is out of its range.

    >>> from eaml_ext.tasks import CartPoleTasks
    >>> dist = CartPoleTasks()
    >>> from eaml_ext.rl import feature_dim
    >>> policy = SSMMetaPolicy(feature_dim(dist), dist.action_dim, hidden_dim=16, state_size=4)
    >>> maml = MAMLRL(policy, dist, tasks_per_update=4, rollouts_per_task=4, steps=30)
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
        rollouts_per_task: int = 8,
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
        gae, coefs = (gamma, gae_lambda), (vf_coef, ent_coef)
        optimizer = {"lr": outer_lr}
        super().__init__(policy, dist, optimizer, tasks_per_update, gae, coefs, reward_scale, max_grad_norm, seed)
        inner_lr = _check.positive(where, "inner_lr", inner_lr)
        inner_steps = _check.positive(where, "inner_steps", inner_steps, integer=True)
        self.rollouts_per_task = _check.positive(where, "rollouts_per_task", rollouts_per_task, integer=True)
        self.steps = _check.positive(where, "steps", steps, integer=True)
        _check.flag(where, "first_order", first_order)
        self.maml = MetaMAML(_Sequences(policy), inner_lr, outer_lr, first_order, inner_steps=inner_steps)

    def train(self, updates: int, report: Callable[[int, float], Any] | None = None) -> list[float]:
        """Make ``updates`` meta-updates.

        Args:
            updates: how many, > 0.
            report: as in :meth:`eaml_ext.rl.RL2.train`.

        Returns:
            The return per episode after adaptation, for each update: the sum of all rewards divided by the number of
            episodes. The end of a rollout may cut its last episode. NaN if a reward or an observation was not finite. A
            RuntimeWarning at the end counts the skipped updates.

        Raises:
            TypeError, ValueError: ``updates`` is no positive integer, or as :meth:`update`.
        """
        updates = _check.positive("MAMLRL.train", "updates", updates, integer=True)
        returns = []
        for i in self._progress("MAMLRL.train", updates):
            returns.append(self.update())
            if report is not None:
                report(i, returns[-1])
        return returns

    def _rollout(self, tasks: Sequence[Task], seed: int) -> Trials:
        return self._rollout_with(tasks, self._expand_params(len(tasks)), seed, steps=self.steps)

    def _update(self, tasks: Sequence[Task]) -> float:
        adapted, inner_batches = self._inner_loop(tasks, self._expand_params(len(tasks)))
        query = self._rollout_for_step(tasks, adapted, self.maml.inner_steps)
        if not self._step(self.task_losses([*inner_batches, self._batch(query, len(tasks))]).mean()):
            self._skip("MAMLRL.update: loss and gradients must be finite")
        return return_per_episode(query)

    def task_losses(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the loss of each task on the last batch, after one inner step on each batch before it.

        The losses are differentiable in the policy's parameters.

        Args:
            batches: inputs and targets of rollouts, ``(tasks, rollouts_per_task, time, ...)`` each.

        Returns:
            ``(tasks,)``.
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
        """Return a detached copy of the policy after the inner loop on rollouts of one task.

        Args:
            task: of the distribution.
            seed: in [0, 2**32); starting states and actions depend on it.

        Raises:
            TypeError, ValueError: an argument has another type or is out of its range, or as
                :func:`eaml_ext.rl.rollout`.
        """
        if not isinstance(task, Task):
            raise TypeError(f"MAMLRL.adapt: task must be a Task, got {type(task).__name__}")
        params, _ = self._inner_loop([task], self._expand_params(1), check_seed("MAMLRL.adapt", "seed", seed))
        policy = detached_copy(self.policy)
        with torch.no_grad():
            for name, p in policy.named_parameters():
                if f"policy.{name}" in params:
                    p.copy_(params[f"policy.{name}"][0])
        return policy

    @outside_inference_mode()
    def evaluate(self, tasks: Sequence[Task], seed: int = 0, *, max_episode_steps: int = MAX_EPISODE_STEPS) -> Tensor:
        """Return the mean return of ``rollouts_per_task`` episodes before the inner loop and after each inner step.

        Evaluation and adaptation use different starting states and actions. All evaluations use the same ones.

        Args:
            tasks: of the distribution.
            seed: in [0, 2**32); starting states and actions of adaptation and evaluation depend on it.
            max_episode_steps: as in :func:`eaml_ext.rl.rollout`.

        Returns:
            ``(len(tasks), inner_steps + 1)``, float32.

        Raises:
            TypeError, ValueError: an argument has another type or is out of its range, or as
                :func:`eaml_ext.rl.rollout`.
        """
        check_tasks("MAMLRL.evaluate", tasks, Task)
        seed = check_seed("MAMLRL.evaluate", "seed", seed)
        options: dict[str, Any] = {"episodes": 1, "max_episode_steps": max_episode_steps}
        params, returns = self._expand_params(len(tasks)), []
        for step in range(self.maml.inner_steps + 1):
            stream = derive_seed(seed, Purpose.MAML_RL_EVALUATION, bits=32)
            trials = self._rollout_with(tasks, params, stream, **options)
            returns.append(trials.episode_returns(1).view(len(tasks), self.rollouts_per_task).mean(1))
            if step < self.maml.inner_steps:
                trials = self._rollout_for_step(tasks, params, step, seed)
                params = self._inner_step(params, self._batch(trials, len(tasks)))
        return torch.stack(returns, dim=1)

    def _inner_loop(
        self, tasks: Sequence[Task], params: Params, seed: int | None = None
    ) -> tuple[Params, list[tuple[Tensor, Tensor]]]:
        """Return the detached parameters of each task after the inner loop, and the batch of each inner step."""
        batches = []
        for step in range(self.maml.inner_steps):
            batches.append(self._batch(self._rollout_for_step(tasks, params, step, seed), len(tasks)))
            params = self._inner_step(params, batches[-1])
        return params, batches

    def _inner_step(self, params: Params, batch: tuple[Tensor, Tensor]) -> Params:
        def adapt(params: Params, x: Tensor, y: Tensor) -> Params:
            return self.maml.adapt_params(params, x, y, self._loss, 1)

        with torch.no_grad():
            return vmap(adapt)(params, *batch)

    def _expand_params(self, tasks: int) -> Params:
        """Return the meta-parameters, expanded to ``(tasks, ...)``."""
        return {name: p.detach().expand(tasks, *p.shape) for name, p in self.maml.parameters().items()}

    def _rollout_for_step(self, tasks: Sequence[Task], params: Params, step: int, seed: int | None = None) -> Trials:
        """Roll out the data of inner step ``step`` of a meta-update, or with ``seed`` of an adaptation."""
        purpose = Purpose.MAML_RL_TRAINING if seed is None else Purpose.MAML_RL_ADAPTATION
        indices = (self.updates, step) if seed is None else (step,)
        stream = derive_seed(self.seed if seed is None else seed, purpose, *indices, bits=32)
        return self._rollout_with(tasks, params, stream, steps=self.steps)

    def _rollout_with(self, tasks: Sequence[Task], params: Params, seed: int, **options: Any) -> Trials:
        """Roll out each task with its own parameters; the rollouts of a task are adjacent rows."""
        repeated = [task for task in tasks for _ in range(self.rollouts_per_task)]
        policy = _PerTaskPolicy(self.policy, params, self.rollouts_per_task)
        return rollout(self.dist, repeated, policy, seed, keep_state=False, **options)

    def _batch(self, trials: Trials, tasks: int) -> tuple[Tensor, Tensor]:
        """Return inputs of the model and targets of the loss, ``(tasks, rollouts_per_task, time, ...)`` each.

        The last entry of the inputs is the reset flag. Targets are the action, the advantage and the critic's target.
        """
        advantages, targets = self._advantages(trials)
        x = torch.cat([trials.inputs, trials.resets.unsqueeze(-1).to(trials.inputs.dtype)], dim=-1)
        actions = trials.actions if self.policy.continuous else trials.actions.unsqueeze(-1)
        x, actions, advantages, targets = (
            t.reshape(tasks, self.rollouts_per_task, *t.shape[1:])
            for t in (x, actions.to(x.dtype), advantages, targets)
        )
        advantages = torch.stack([normalised(a) for a in advantages])  # separately for each task
        return x, torch.cat([actions, advantages.unsqueeze(-1), targets.unsqueeze(-1)], dim=-1)

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        action, advantages, targets = targets[..., :-2], targets[..., -2], targets[..., -1]
        distribution, values = self.policy.distribution(outputs[..., :-1]), outputs[..., -1]
        log_probs = distribution.log_prob(action if self.policy.continuous else action.squeeze(-1).long())
        return a2c_loss(log_probs, values, distribution.entropy(), advantages, targets, **self._loss_coefs)


class _Sequences(nn.Module):
    """A policy as MetaMAML's model: inputs with the reset flag as last entry -> distribution parameters and value."""

    def __init__(self, policy: SSMMetaPolicy):
        super().__init__()
        self.policy = policy

    def forward(self, x: Tensor) -> Tensor:
        parameters, value, _ = self.policy.scan_tensors(x[..., :-1], None, x[..., -1] > 0.5)
        return torch.cat([parameters, value.unsqueeze(-1)], dim=-1)


class _Steps(nn.Module):
    """The step of a policy as a module, for functional_call."""

    def __init__(self, policy: SSMMetaPolicy):
        super().__init__()
        self.policy = policy

    def forward(self, *args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.policy.step_tensors(*args)


class _PerTaskPolicy:
    """A policy with parameters of its own for each task; a task has ``rollouts`` adjacent rows of the batch."""

    def __init__(self, policy: SSMMetaPolicy, params: Params, rollouts: int):
        self._policy, self._params, self._rollouts = policy, params, rollouts
        module = _Steps(policy)
        self._call = vmap(lambda params, *args: functional_call(module, params, args))

    def init_hidden(self, batch: int) -> Tensor:
        return self._policy.init_hidden(batch)

    def step(self, *args: Tensor) -> tuple[Distribution, Tensor, Tensor]:
        out = self._call(self._params, *(t.reshape(-1, self._rollouts, *t.shape[1:]) for t in args))
        parameters, value, state = (t.flatten(0, 1) for t in out)
        return self._policy.distribution(parameters), value, state
