"""theta -= outer_lr d/dtheta mean_i L(theta_i; query_i),  theta_i = theta - inner_lr dL(theta; support_i)/dtheta."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from eaml_ext import _check

Params = dict[str, Tensor]
LossFn = Callable[[Tensor, Tensor], Tensor]
Task = tuple[Tensor, Tensor, Tensor, Tensor]  # support_x, support_y, query_x, query_y


class MetaMAML:
    """Model-agnostic meta-learning (Finn, Abbeel & Levine 2017, algorithm 1) over any ``nn.Module`` that changes no
    buffer in place (batch norm: put it in eval mode).

    Tasks of equal shapes run as one vmapped batch, so that every op sees them in one call; tasks of different shapes
    are bucketed. Meta-gradients are exact second order, also through :func:`eaml_ext.ops.selective_scan`.

    Args:
        model: called as ``model(x)``; its parameters that require grad are adapted, and meta-learned in place.
        inner_lr: step size of the inner loop's gradient descent.
        outer_lr: learning rate of the outer optimizer.
        first_order: treat inner gradients as constants (FOMAML).
        inner_steps: inner steps in :meth:`meta_update`, and in :meth:`adapt` unless told otherwise.
        optimizer: outer optimizer, built as ``optimizer(parameters, lr=outer_lr)``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or size, or a model without trainable parameters.

    >>> model = torch.nn.Linear(4, 1)
    >>> maml = MetaMAML(model, inner_lr=0.1, outer_lr=0.01)
    >>> x, y = torch.randn(10, 4), torch.randn(10, 1)
    >>> loss = maml.meta_update([(x, y, x, y)] * 8, torch.nn.functional.mse_loss)
    >>> adapted = maml.adapt(x, y, torch.nn.functional.mse_loss, num_steps=5)
    """

    def __init__(
        self,
        model: nn.Module,
        inner_lr: float,
        outer_lr: float,
        first_order: bool = False,
        *,
        inner_steps: int = 1,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"MetaMAML: model must be a torch.nn.Module, got {type(model).__name__}")
        _check.positive("MetaMAML", "inner_lr", inner_lr)
        _check.positive("MetaMAML", "outer_lr", outer_lr)
        _check.positive("MetaMAML", "inner_steps", inner_steps, integer=True)
        self.model, self.inner_lr, self.outer_lr = model, float(inner_lr), float(outer_lr)
        self.first_order, self.inner_steps = bool(first_order), inner_steps
        if not self.parameters():
            raise ValueError("MetaMAML: model has no parameters that require grad")
        self.optimizer = optimizer(list(self.parameters().values()), lr=self.outer_lr)
        self.skipped_updates = 0  # meta-updates left out because a loss or gradient was not finite

    def parameters(self) -> Params:
        """The model's trainable parameters by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def call(self, params: Params, x: Tensor) -> Tensor:
        """``model(x)`` under other parameters."""
        return functional_call(self.model, params, (x,))

    def adapt_params(
        self, params: Params, support_x: Tensor, support_y: Tensor, loss_fn: LossFn, num_steps: int | None = None
    ) -> Params:
        """The inner loop: ``num_steps`` of gradient descent from ``params`` on one support set.

        A pure function, differentiable to every order the model is (twice, through the selective scan), and vmappable.

        Args:
            params: parameters by name, as from :meth:`parameters`.
            support_x, support_y: what ``loss_fn(model(support_x), support_y)`` takes.
            loss_fn: returns a scalar.
            num_steps: ``inner_steps`` if absent; 0 returns ``params``.

        Returns:
            The adapted parameters by name, connected to ``params`` where gradients are recorded.
        """
        num_steps = self.inner_steps if num_steps is None else num_steps
        _check.positive("MetaMAML.adapt_params", "num_steps", num_steps, zero=True, integer=True)

        def loss(p: Params) -> Tensor:
            return _scalar(loss_fn(self.call(p, support_x), support_y))

        for _ in range(num_steps):
            grads = grad(loss)(params)
            if self.first_order:
                grads = {name: g.detach() for name, g in grads.items()}
            params = {name: p - self.inner_lr * grads[name] for name, p in params.items()}
        return params

    def adapt(self, support_x: Tensor, support_y: Tensor, loss_fn: LossFn, num_steps: int | None = None) -> nn.Module:
        """A copy of the model adapted to one support set. **Detached**: no gradient reaches the meta-parameters.

        For a differentiable inner loop use :meth:`adapt_params`. The model itself is left as it is.
        """
        _check_pair("MetaMAML.adapt", "support", support_x, support_y)
        start = {name: p.detach() for name, p in self.parameters().items()}
        adapted = self.adapt_params(start, support_x, support_y, loss_fn, num_steps)
        module = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, p in module.named_parameters():
                if name in adapted:
                    p.copy_(adapted[name])
        return module

    def task_losses(self, params: Params, tasks: Sequence[Task], loss_fn: LossFn) -> Tensor:
        """Query loss after adaptation of each task, ``(len(tasks),)``, in their order, differentiable in ``params``."""

        def task_loss(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
            adapted = self.adapt_params(params, support_x, support_y, loss_fn)
            return _scalar(loss_fn(self.call(adapted, query_x), query_y))

        buckets: dict[Any, list[int]] = defaultdict(list)
        for i, task in enumerate(tasks):
            buckets[tuple((t.shape, t.dtype, t.device) for t in task)].append(i)
        losses: dict[int, Tensor] = {}
        for indices in buckets.values():
            if len(indices) == 1:
                losses[indices[0]] = task_loss(*tasks[indices[0]])
                continue
            stacked = [torch.stack(column) for column in zip(*(tasks[i] for i in indices), strict=True)]
            bucket = vmap(task_loss, randomness="different")(*stacked)
            losses.update(zip(indices, bucket.unbind(0), strict=True))
        return torch.stack([losses[i] for i in range(len(tasks))])

    def meta_update(self, tasks: Iterable[Task], loss_fn: LossFn) -> float:
        """One outer step on a batch of tasks.

        A step whose loss or gradients are not finite is left out, and counted in ``skipped_updates``.

        Args:
            tasks: ``(support_x, support_y, query_x, query_y)`` each; shapes may differ from task to task.
            loss_fn: ``(prediction, target) -> scalar``.

        Returns:
            The mean query loss after adaptation, before the step.
        """
        tasks = _check_tasks("MetaMAML.meta_update", tasks)
        params = self.parameters()
        loss = self.task_losses(params, tasks, loss_fn).mean()
        grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        if not all(bool(torch.isfinite(t).all()) for t in (loss, *grads) if t is not None):
            self.skipped_updates += 1
            return float(loss.detach())
        for p, g in zip(params.values(), grads, strict=True):
            p.grad = g
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        came = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"MetaMAML: loss_fn must return a scalar tensor, got {came}")
    return loss


def _check_pair(where: str, name: str, x: Any, y: Any) -> None:
    _check.tensor(where, f"{name}_x", x)
    _check.tensor(where, f"{name}_y", y)
    if x.dim() == 0 or y.dim() == 0 or x.shape[0] != y.shape[0]:
        raise ValueError(f"{where}: {name}_x has shape {tuple(x.shape)}, {name}_y has shape {tuple(y.shape)}")
    if x.shape[0] == 0:
        raise ValueError(f"{where}: {name}_x is empty")
    _check.device(where, f"{name}_y", y, x.device, f"{name}_x")


def _check_tasks(where: str, tasks: Iterable[Task]) -> list[Task]:
    tasks = list(tasks)
    if not tasks:
        raise ValueError(f"{where}: tasks is empty")
    for i, task in enumerate(tasks):
        if not isinstance(task, (tuple, list)) or len(task) != 4:
            raise ValueError(f"{where}: tasks[{i}] must be (support_x, support_y, query_x, query_y)")
        _check_pair(f"{where}, tasks[{i}]", "support", task[0], task[1])
        _check_pair(f"{where}, tasks[{i}]", "query", task[2], task[3])
    return tasks
