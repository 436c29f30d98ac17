"""theta -= outer_lr d/dtheta mean_i L(theta_i; query_i),  theta_i = theta - inner_lr dL(theta; support_i)/dtheta."""

from __future__ import annotations  # Dynamo cannot evaluate annotations of functions that it traces

import math
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from eaml_ext import _check
from eaml_ext._renamed import rename_keys
from eaml_ext._torch_compat import is_compiler_error
from eaml_ext.distributed import Group, check_group
from eaml_ext.meta._batching import Batching, Map, vmapped
from eaml_ext.meta._inner_loop import descend, twice_differentiable_attention, uses_tape
from eaml_ext.meta._optimizer import check_state, load_state, make_optimizer, take_step
from eaml_ext.meta._types import LossFn, Params
from eaml_ext.meta.functional import (
    SUBSTITUTION_LOCK,
    check_buffers_constant,
    check_model,
    check_parameters,
    check_tensors,
    detached_copy,
    functional_call,
    outside_inference_mode,
    recordable,
)
from eaml_ext.meta.kl_dro import kl_dro_weights

Task = tuple[Tensor, Tensor, Tensor, Tensor]  # support_x, support_y, query_x, query_y


class MetaMAML:
    """Model-agnostic meta-learning (Finn, Abbeel & Levine 2017, algorithm 1) over any ``nn.Module``, and its relatives.

    Tasks of equal shapes run as one vmapped batch, so that every op sees them in one call; tasks of different shapes
    are bucketed. Meta-gradients are exact second order, also through :func:`eaml_ext.ops.selective_scan`. Tasks run one
    at a time, after one RuntimeWarning, where ``vmap`` cannot run the model: recurrent layers of torch, control flow
    that depends on data, ``torch.utils.checkpoint``.

    The parameters that require grad at the time of a call are learned. Parameters may be frozen, and unfrozen again,
    at any time; one that is unfrozen or replaced for the first time after construction needs a new MetaMAML. Changes of
    buffers in ``forward`` are discarded, so batch norm must be in eval mode.

    *Several processes.* With a ``group`` (:class:`eaml_ext.distributed.Group`) each rank passes its own part of the
    meta-batch to :meth:`meta_update`, as many tasks as it likes, also none; losses are gathered, meta-gradients summed
    over the ranks, and all take the same step on the mean over all tasks, which is that of one process to rounding.
    What is not finite on one rank is left out on all. Parameters and buffers start as they are on rank 0.

    Args:
        model: called as ``model(x)``; its parameters that require grad are meta-learned in place.
        inner_lr: step size of the inner loop's gradient descent.
        outer_lr: learning rate of the outer optimizer.
        first_order: treat inner gradients as constants (FOMAML).
        inner_steps: inner steps in :meth:`meta_update`, and in :meth:`adapt` unless told otherwise.
        optimizer: outer optimizer, built as ``optimizer(parameters, lr=outer_lr)``; it must step without a closure.
        learn_inner_lr: learn a step size for each number in the adapted parameters, all starting at ``inner_lr``
            (Meta-SGD; Li, Zhou, Chen & Li 2017); they are in ``inner_lrs``.
        inner_parameters: what the inner loop adapts: a prefix of parameter names or several (``"head"`` means
            ``head.weight`` and ``head.bias``); None: all. The last layer alone is ANIL (Raghu et al. 2020).
        reptile: the meta-gradient is mean_i (theta - theta_i) / inner_lr, without any outer derivative (Reptile;
            Nichol, Achiam & Schulman 2018). The inner loop sees the support set; the query set is only measured.
        micro_batch: at most so many tasks at once, gradients accumulated: less memory, the same result to rounding.
        compile: ``torch.compile`` the inner loop and its outer gradient, once per loss and shape of a bucket (seconds
            to a minute each, so meant for few losses and shapes; what was compiled is kept). Where compilation fails,
            a RuntimeWarning says so and the usual path runs. Results are equal to rounding.
        group: the ranks that share the tasks of a meta-batch; None: this process has all of them.

    Attributes:
        skipped_updates: meta-updates left out because a loss or a gradient was not finite.
        last_losses: ``(tasks,)``, the query losses of the last meta-update, detached, those of all ranks one after the
            other; None before the first.
        inner_lrs: name to tensor of the parameter's shape, with ``learn_inner_lr``; else empty.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or size, a model without trainable parameters or made
            inside ``torch.inference_mode``, an optimizer that needs a closure (LBFGS, SAM), or ``reptile`` together
            with ``learn_inner_lr`` or ``inner_parameters``, to which it gives no gradient; the model has other
            parameters than on rank 0.

    >>> model = torch.nn.Linear(4, 1)
    >>> maml = MetaMAML(model, inner_lr=0.1, outer_lr=0.01)
    >>> x, y = torch.randn(10, 4), torch.randn(10, 1)
    >>> loss = maml.meta_update([(x, y, x, y)] * 8, torch.nn.functional.mse_loss)
    >>> adapted = maml.adapt(x, y, torch.nn.functional.mse_loss, num_steps=5)

    Learned step sizes for the last layer alone, four tasks at a time:

    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    >>> maml = MetaMAML(net, 0.1, 0.01, learn_inner_lr=True, inner_parameters="2", micro_batch=4)
    >>> loss = maml.meta_update([(x, y, x, y)] * 8, torch.nn.functional.mse_loss)
    >>> list(maml.inner_lrs), maml.last_losses.shape
    (['2.weight', '2.bias'], torch.Size([8]))
    """

    @outside_inference_mode()
    def __init__(
        self,
        model: nn.Module,
        inner_lr: float,
        outer_lr: float,
        first_order: bool = False,
        *,
        inner_steps: int = 1,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        learn_inner_lr: bool = False,
        inner_parameters: str | Sequence[str] | None = None,
        reptile: bool = False,
        micro_batch: int | None = None,
        compile: bool = False,
        group: Group | None = None,
    ):
        where = "MetaMAML"
        check_model(where, model)
        self.inner_lr = _check_rate(where, "inner_lr", inner_lr)
        self.outer_lr = _check_rate(where, "outer_lr", outer_lr)
        self.inner_steps = _check.positive(where, "inner_steps", inner_steps, integer=True)
        self.micro_batch = micro_batch
        if micro_batch is not None:
            self.micro_batch = _check.positive(where, "micro_batch", micro_batch, integer=True)
        flags = {"first_order": first_order, "learn_inner_lr": learn_inner_lr, "reptile": reptile, "compile": compile}
        for name, flag in flags.items():
            _check.flag(where, name, flag)
        if not callable(optimizer):
            raise TypeError(f"{where}: optimizer must be callable, got {type(optimizer).__name__}")
        if reptile and (learn_inner_lr or inner_parameters is not None):
            other = "learn_inner_lr" if learn_inner_lr else "inner_parameters"
            raise ValueError(f"{where}: reptile learns nothing but what the inner loop moves, {other} needs MAML")
        check_group(where, group)
        self.group, self.model = group, model
        self.first_order, self.reptile, self.compile = bool(first_order), bool(reptile), bool(compile)
        self._known = self.parameters()
        if not self._known:
            raise ValueError(f"{where}: model has no parameters that require grad")
        self._inner_prefixes = _check_prefixes(model, inner_parameters)
        self.inner_lrs: Params = {}
        names = self.inner_names
        if learn_inner_lr:
            rates = {n: torch.full_like(self._known[n], self.inner_lr, requires_grad=True) for n in names}
            self.inner_lrs = rates
        if group is not None:
            _start_alike(group, model)
        leaves = [*self._known.values(), *self.inner_lrs.values()]
        self.optimizer = make_optimizer(where, optimizer, leaves, self.outer_lr)
        self.skipped_updates = 0
        self.last_losses: Tensor | None = None
        self._compiled: dict[tuple[LossFn, tuple[str, ...]], Callable[..., Any]] = {}
        self._batching = Batching(where, "task")

    @property
    def inner_names(self) -> list[str]:
        """The names of the parameters that the inner loop adapts now."""
        return _inner_names(self.model, self._inner_prefixes)

    def parameters(self) -> Params:
        """The model's parameters that require grad now, by name."""
        with SUBSTITUTION_LOCK:
            return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def call(self, params: Params, x: Tensor) -> Tensor:
        """``model(x)`` under other parameters; the model itself is left as it is."""
        if not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled()):
            params, x = recordable((params, x))
        out: Tensor = functional_call(self.model, params, (x,))
        return out

    @outside_inference_mode()
    def adapt_params(
        self, params: Params, support_x: Tensor, support_y: Tensor, loss_fn: LossFn, num_steps: int | None = None
    ) -> Params:
        """The inner loop: ``num_steps`` of gradient descent from ``params`` on one support set.

        A pure function, differentiable to every order the model is (twice, through the selective scan), and vmappable.

        Args:
            params: parameters by name, as from :meth:`parameters`. Frozen parameters among them are not adapted.
            support_x, support_y: what ``loss_fn(model(support_x), support_y)`` takes.
            loss_fn: returns a scalar.
            num_steps: ``inner_steps`` if absent; 0 returns ``params``.

        Returns:
            The adapted parameters by name, connected to ``params`` (and ``inner_lrs``) where gradients are recorded.

        Raises:
            TypeError, ValueError: an argument of the wrong kind, no parameter is left to adapt, or one has no learned
                step size because it was frozen or had another shape when ``inner_lrs`` were made.
        """
        where = "MetaMAML.adapt_params"
        num_steps = self.inner_steps if num_steps is None else num_steps
        num_steps = _check.positive(where, "num_steps", num_steps, zero=True, integer=True)
        _check_loss_fn(where, loss_fn)
        names = self._adapted(where, params)
        params, x, y = recordable((params, support_x, support_y))
        with twice_differentiable_attention(not self.first_order and torch.is_grad_enabled()):
            return self._inner_loop(params, self.inner_lrs, x, y, loss_fn, num_steps, names)

    @outside_inference_mode()
    def adapt(self, support_x: Tensor, support_y: Tensor, loss_fn: LossFn, num_steps: int | None = None) -> nn.Module:
        """A copy of the model adapted to one support set. **Detached**: no gradient reaches the meta-parameters.

        For a differentiable inner loop use :meth:`adapt_params`. The model itself is left as it is.
        """
        _check_pair("MetaMAML.adapt", "support", support_x, support_y)
        start = {name: p.detach() for name, p in self.parameters().items()}
        with torch.no_grad():
            adapted = self.adapt_params(start, support_x, support_y, loss_fn, num_steps)
            module = detached_copy(self.model)
            for name, p in module.named_parameters():
                if name in adapted:
                    p.copy_(adapted[name])
        return module

    @outside_inference_mode()
    def task_losses(self, params: Params, tasks: Sequence[Task], loss_fn: LossFn | Sequence[LossFn]) -> Tensor:
        """Query loss after adaptation of each task, ``(len(tasks),)``, in their order, differentiable in ``params``.

        ``loss_fn`` is one for all tasks or one for each; tasks that share shapes and loss run as one batch.
        """
        where = "MetaMAML.task_losses"
        params, tasks = recordable((params, _check_tasks(where, tasks)))
        loss_fns = _loss_fns(where, loss_fn, len(tasks))
        names = self._adapted(where, params)
        with twice_differentiable_attention(not self.first_order and torch.is_grad_enabled()):
            return self._batching.run(
                lambda batch: self._task_losses(batch, params, names, tasks, loss_fns), tasks[0][0].device
            )

    @outside_inference_mode()
    def meta_update(
        self, tasks: Iterable[Task], loss_fn: LossFn | Sequence[LossFn], *, kl_radius: float = 0.0
    ) -> float:
        """One outer step on a batch of tasks.

        A step whose loss or gradients are not finite is left out: parameters and optimizer stay as they are, and
        ``skipped_updates`` counts it.

        Args:
            tasks: ``(support_x, support_y, query_x, query_y)`` each; shapes may differ from task to task. With a group,
                this rank's; all ranks call together.
            loss_fn: ``(prediction, target) -> scalar``, or a list of one for each task.
            kl_radius: step on the worst weighting of the tasks whose KL divergence from the plain mean is at most
                this many nats (:func:`eaml_ext.meta.kl_dro.kl_dro_weights`), found by one more pass without gradient.

        Returns:
            The mean query loss after adaptation, before the step.

        Raises:
            TypeError, ValueError: an argument of the wrong kind or size, a parameter requires grad that the optimizer
                does not hold, or the optimizer's step needs a closure; nothing modified.
            RankError: another rank was given such an argument, failed in its tasks, or has died.
        """
        where = "MetaMAML.meta_update"
        tasks, loss_fns, kl_radius, counts = self._admit(where, tasks, loss_fn, kl_radius)
        leaves = [*self.parameters().values(), *self._rates().values()]
        with torch.enable_grad():
            if self.group is None:
                losses, grads = self._meta_gradient(tasks, loss_fns, leaves, kl_radius)
            else:
                losses, grads = self._summed(where, self.group, tasks, loss_fns, leaves, kl_radius, counts)
        loss, self.last_losses = losses.mean(), losses
        if not finite(loss, *grads):
            self.skipped_updates += 1
            return float(loss)
        self.optimizer.zero_grad()  # a frozen parameter may hold a gradient of its own
        for p, g in zip(leaves, grads, strict=True):
            p.grad = g
        try:
            take_step(where, self.optimizer)
        finally:
            self.optimizer.zero_grad()
        return float(loss)

    def state_dict(self) -> dict[str, Any]:
        """Everything :meth:`meta_update` changes: model, step sizes, optimizer, count of skipped updates."""
        return {
            "model": self.model.state_dict(),
            "inner_lrs": {name: rate.detach() for name, rate in self.inner_lrs.items()},
            "optimizer": self.optimizer.state_dict(),
            "skipped_updates": self.skipped_updates,
        }

    @outside_inference_mode()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; raises ValueError, nothing modified, when it is of another model."""
        where = "MetaMAML.load_state_dict"
        if not isinstance(state, dict) or set(state) != set(self.state_dict()):
            wanted_keys = ", ".join(self.state_dict())
            raise ValueError(f"{where}: state must be a dict with the entries {wanted_keys}")
        own = self.model.state_dict()
        if isinstance(state["model"], dict) and set(state["model"]) != set(own):
            state = {**state, **_with_new_names(state["model"], state["inner_lrs"])}
        check_tensors(where, "model", state["model"], own)
        check_tensors(where, "inner_lrs", state["inner_lrs"], self.inner_lrs)
        check_state(where, state["optimizer"], self.optimizer)
        self.model.load_state_dict(state["model"])
        with torch.no_grad():
            for name, rate in self.inner_lrs.items():
                rate.copy_(state["inner_lrs"][name])
        load_state(self.optimizer, state["optimizer"])
        self.skipped_updates = state["skipped_updates"]

    # ------------------------------------------------------------------------------------------------- the ranks

    def _admit(
        self, where: str, tasks: Iterable[Task], loss_fn: Any, kl_radius: Any
    ) -> tuple[list[Task], list[LossFn], float, list[int]]:
        """The tasks, a loss for each and the level, checked, and how many tasks each rank has."""

        def check() -> tuple[list[Task], list[LossFn], float]:
            level = _check.positive(where, "kl_radius", kl_radius, zero=True)
            checked = recordable(_check_tasks(where, tasks, empty=self.group is not None))
            check_parameters(where, "MetaMAML", self.model, self._known.values())
            self._adapted(where, self.parameters())
            return checked, _loss_fns(where, loss_fn, len(checked)), level

        if self.group is None:
            mine, loss_fns, level = check()
            return mine, loss_fns, level, [len(mine)]
        refused: Exception | None = None
        try:
            mine, loss_fns, level = check()
        except (TypeError, ValueError) as error:
            refused = error
            mine, loss_fns, level = [], [], 0.0
        told = self.group.all_gather(torch.tensor([refused is not None, len(mine)], dtype=torch.int64))
        if refused is not None:
            raise refused
        self.group.raise_on_any_rank(where, told[:, 0])
        counts = told[:, 1].tolist()
        if not sum(counts):
            raise ValueError(f"{where}: tasks is empty on all ranks")
        return mine, loss_fns, level, counts

    def _summed(
        self,
        where: str,
        group: Group,
        tasks: list[Task],
        loss_fns: list[LossFn],
        leaves: list[Tensor],
        kl_radius: float,
        counts: list[int],
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The losses of all ranks' tasks, and the sum of the ranks' parts of the gradient: the same bits on all."""
        failed: Exception | None = None
        grads: list[Tensor | None] = [None] * len(leaves)
        losses = leaves[0].new_zeros(len(tasks))
        weights = None
        try:
            if kl_radius and tasks:
                with torch.no_grad():
                    losses = self._measure(tasks, loss_fns)
        except Exception as error:
            failed = error
        if kl_radius:
            self._all_alright(where, group, failed)
            start = sum(counts[: group.rank])
            weights = kl_dro_weights(_gather(group, losses, counts), kl_radius)[start : start + len(tasks)]
        try:
            if tasks:
                losses, grads = self._meta_gradient(tasks, loss_fns, leaves, kl_radius, sum(counts), weights)
        except Exception as error:
            failed = error
        told = self._all_alright(where, group, failed, [g is not None for g in grads])
        # A parameter that no task of any rank uses has no gradient, as in one process.
        used = [i for i in range(len(leaves)) if told[:, i].any()]
        for i in used:
            grads[i] = torch.zeros_like(leaves[i]) if grads[i] is None else grads[i].clone()  # type: ignore[union-attr]
        group.all_reduce_([g for g in grads if g is not None])
        return _gather(group, losses, counts), grads

    def _all_alright(self, where: str, group: Group, failed: Exception | None, flags: Sequence[bool] = ()) -> Tensor:
        """``(size, len(flags))``, those of each rank; raises on all where one has failed."""
        told = group.all_gather(torch.tensor([failed is not None, *flags], dtype=torch.uint8))
        if failed is not None:
            raise failed
        group.raise_on_any_rank(where, told[:, 0])
        return told[:, 1:]

    # ---------------------------------------------------------------------------------------------- the gradient

    def _adapted(self, where: str, params: Params) -> list[str]:
        """The names in ``params`` that the inner loop adapts; raises ValueError where it cannot adapt them."""
        check_buffers_constant(where, self.model)
        names = [name for name in self.inner_names if name in params]
        if not names:
            got = ", ".join(params) or "none"
            raise ValueError(f"{where}: params must hold an inner parameter that requires grad, got {got}")
        for name in names if self.inner_lrs else ():
            if name not in self.inner_lrs or self.inner_lrs[name].shape != params[name].shape:
                text = f"{name} was unfrozen or replaced after this MetaMAML was made and has no learned step size"
                raise ValueError(f"{where}: {text}: make a new MetaMAML")
        return names

    def _rates(self) -> Params:
        """The learned step sizes that are in use."""
        return {name: self.inner_lrs[name] for name in self.inner_names if name in self.inner_lrs}

    def _inner_loop(
        self, params: Params, rates: Params, x: Tensor, y: Tensor, loss_fn: LossFn, steps: int, names: list[str]
    ) -> Params:
        def loss(fast: Params) -> Tensor:
            return _scalar(loss_fn(self.call({**params, **fast}, x), y))

        fast = {name: params[name] for name in names}
        return {**params, **descend(loss, fast, rates or self.inner_lr, steps, self.first_order)}

    def _task_loss(self, params: Params, rates: Params, loss_fn: LossFn, names: list[str]) -> Callable[..., Tensor]:
        def task_loss(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
            adapted = self._inner_loop(params, rates, support_x, support_y, loss_fn, self.inner_steps, names)
            return _scalar(loss_fn(self.call(adapted, query_x), query_y))

        return task_loss

    def _task_losses(
        self, batch: Map, params: Params, names: list[str], tasks: Sequence[Task], loss_fns: Sequence[LossFn]
    ) -> Tensor:
        """The tasks' losses, ``(len(tasks),)``, bucket by bucket through ``batch``."""
        losses: dict[int, Tensor] = {}
        for bucket in _buckets(tasks, loss_fns):
            loss_fn = loss_fns[bucket[0]]
            one = self._task_loss(params, self.inner_lrs, loss_fn, names)
            if len(bucket) == 1:
                losses[bucket[0]] = one(*tasks[bucket[0]])
                continue
            stacked = _stack(tasks, bucket)
            batched = self._taped(batch, params, names, loss_fn, *stacked) if uses_tape() else batch(one)(*stacked)
            losses.update(zip(bucket, batched.unbind(0), strict=True))
        return torch.stack([losses[i] for i in range(len(tasks))])

    def _taped(
        self,
        batch: Map,
        params: Params,
        names: list[str],
        loss_fn: LossFn,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
    ) -> Tensor:
        """``batch`` of :meth:`_task_loss`, faster: inner gradients come from autograd's tape below vmap, not from a
        layer of torch.func above every op. Of a sum over tasks, a task's parameters have their own gradient.
        """

        def loss(fast: Params, x: Tensor, y: Tensor) -> Tensor:
            return _scalar(loss_fn(self.call({**params, **fast}, x), y))

        losses = batch(loss)
        fast = {name: params[name].expand(len(support_x), *params[name].shape) for name in names}
        rates = self.inner_lrs or self.inner_lr
        fast = descend(
            lambda fast: losses(fast, support_x, support_y).sum(), fast, rates, self.inner_steps, self.first_order
        )
        return losses(fast, query_x, query_y)  # type: ignore[no-any-return]

    def _chunks(self, tasks: list[Task], loss_fns: list[LossFn]) -> list[list[int]]:
        """What runs at once."""
        if not (self.reptile or self.compile or self.micro_batch):
            return [list(range(len(tasks)))]
        size = self.micro_batch or len(tasks)
        return [b[i : i + size] for b in _buckets(tasks, loss_fns) for i in range(0, len(b), size)]

    def _measure(self, tasks: list[Task], loss_fns: list[LossFn]) -> Tensor:
        """The tasks' losses, ``(len(tasks),)``."""
        chunks, params = self._chunks(tasks, loss_fns), self.parameters()
        parts = torch.cat([self.task_losses(params, *_take(chunk, tasks, loss_fns)) for chunk in chunks])
        losses = torch.empty_like(parts)
        losses[torch.tensor([i for chunk in chunks for i in chunk], device=parts.device)] = parts
        return losses

    def _meta_gradient(
        self,
        tasks: list[Task],
        loss_fns: list[LossFn],
        leaves: list[Tensor],
        kl_radius: float,
        count: int | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The tasks' losses and the gradient of their weighted mean, as a part of ``count`` tasks, chunk by chunk."""
        count, params, names = count or len(tasks), self.parameters(), self.inner_names
        if weights is None and kl_radius:
            with torch.no_grad():
                weights = kl_dro_weights(self._measure(tasks, loss_fns), kl_radius)
        plain = leaves[0].new_full((len(tasks),), 1 / count)
        weights = plain if weights is None else weights.to(plain)
        losses = torch.empty_like(weights)
        total: list[Tensor | None] = [None] * len(leaves)
        for chunk in self._chunks(tasks, loss_fns):

            def compute(batch: Map, chunk: list[int] = chunk) -> tuple[Tensor, list[Tensor | None]]:
                if self.reptile or (self.compile and batch is vmapped):
                    start = {name: p.detach() for name, p in params.items()}
                    rates = {name: rate.detach() for name, rate in self._rates().items()}
                    pure = self._pure(loss_fns[chunk[0]], names, batch)
                    with torch.set_grad_enabled(not self.reptile):
                        return pure(start, rates, weights[chunk], *_stack(tasks, chunk))  # type: ignore[no-any-return]
                values = self._task_losses(batch, params, names, *_take(chunk, tasks, loss_fns))
                # The mean by its own name: rounded as a plain mean, where tasks weigh alike.
                mean = values @ weights[chunk].to(values) if kl_radius else values.mean() * (len(chunk) / count)
                return values, list(torch.autograd.grad(mean, leaves, allow_unused=True))

            with twice_differentiable_attention(not self.first_order and not self.reptile):
                values, grads = self._batching.run(compute, leaves[0].device)
            losses[chunk] = values.detach().to(losses)
            total = [g if t is None else t if g is None else t + g for t, g in zip(total, grads, strict=True)]
        return losses, total

    def _pure(self, loss_fn: LossFn, names: list[str], batch: Map) -> Callable[..., Any]:
        """``(params, rates, weights, *stacked tasks) -> (losses, gradient of the weighted mean)``, no autograd tape."""
        key = (loss_fn, tuple(names))
        if batch is vmapped and key in self._compiled:
            return self._compiled[key]

        def reptile(params: Params, rates: Params, weights: Tensor, *stacked: Tensor) -> tuple[Tensor, list[Tensor]]:
            def one(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> tuple[Params, Tensor]:
                adapted = self._inner_loop(params, rates, support_x, support_y, loss_fn, self.inner_steps, names)
                return adapted, _scalar(loss_fn(self.call(adapted, query_x), query_y))

            adapted, losses = batch(one)(*stacked)
            moved = [torch.tensordot(weights, p - adapted[name], 1) for name, p in params.items()]
            return losses, [m / self.inner_lr for m in moved]

        def maml(params: Params, rates: Params, weights: Tensor, *stacked: Tensor) -> tuple[Tensor, list[Tensor]]:
            def mean(meta: tuple[Params, Params]) -> tuple[Tensor, Tensor]:
                losses = vmap(self._task_loss(*meta, loss_fn, names), randomness="different")(*stacked)
                return losses @ weights.to(losses), losses

            grads, losses = grad(mean, has_aux=True)((params, rates))
            return losses, [*grads[0].values(), *grads[1].values()]

        function: Callable[..., Any] = reptile if self.reptile else maml
        if self.compile and batch is vmapped:
            function = self._compiled[key] = _compiled(function)
        return function


def _with_new_names(model: dict[str, Tensor], inner_lrs: Any) -> dict[str, Any]:
    """The parts of a state of version 0.1 under the names of today."""
    rates = rename_keys(inner_lrs, model.keys()) if isinstance(inner_lrs, dict) else inner_lrs
    return {"model": rename_keys(model), "inner_lrs": rates}


def finite(*tensors: Tensor | None) -> bool:
    """Whether every number in the tensors is finite; None has none."""
    return all(bool(torch.isfinite(t).all()) for t in tensors if t is not None)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled, one graph per shape; itself, after a warning, where that fails."""
    run = torch.compile(function, dynamic=False)
    failed = False

    def call(*args: Any) -> Any:
        nonlocal failed
        if failed:
            return function(*args)
        try:
            return run(*args)
        except Exception as error:
            if not is_compiler_error(error):
                raise
            failed = True
            reason = str(error).partition("\n")[0]
            text = f"MetaMAML: compile failed, the meta-update runs uncompiled: {reason}"
            warnings.warn(text, RuntimeWarning, stacklevel=4)
            return function(*args)

    return call


def _check_prefixes(model: nn.Module, prefixes: Any) -> list[str]:
    """The prefixes of names that choose the inner parameters; raises unless each begins a trainable name."""
    if prefixes is None:
        return [""]
    prefixes = [prefixes] if isinstance(prefixes, str) else prefixes
    if not isinstance(prefixes, Sequence) or not all(isinstance(prefix, str) for prefix in prefixes):
        raise TypeError(f"MetaMAML: inner_parameters must be a prefix of names or several, got {prefixes!r}")
    for prefix in prefixes or [""]:
        if not prefix or not _inner_names(model, [prefix]):
            names = ", ".join(_inner_names(model, [""]))
            raise ValueError(f"MetaMAML: inner_parameters {prefix!r} begins no trainable name of {names}")
    return list(prefixes)


def _inner_names(model: nn.Module, prefixes: list[str]) -> list[str]:
    """The parameters that require grad, one of whose names has one of the prefixes; "" is a prefix of all."""
    with SUBSTITUTION_LOCK:
        every_name = list(model.named_parameters(remove_duplicate=False))  # a shared parameter has several
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    chosen = {id(p) for name, p in every_name if any(not x or f"{name}.".startswith(f"{x}.") for x in prefixes)}
    return [name for name, p in trainable if id(p) in chosen]


def _buckets(tasks: Sequence[Task], loss_fns: Sequence[LossFn]) -> list[list[int]]:
    """The tasks that can run as one batch: of equal shapes, dtypes, devices and loss."""
    buckets: dict[Any, list[int]] = defaultdict(list)
    for i, (task, loss_fn) in enumerate(zip(tasks, loss_fns, strict=True)):
        buckets[(loss_fn, *((t.shape, t.dtype, t.device) for t in task))].append(i)
    return list(buckets.values())


def _stack(tasks: Sequence[Task], indices: Sequence[int]) -> list[Tensor]:
    return [torch.stack(column) for column in zip(*(tasks[i] for i in indices), strict=True)]


def _take(indices: Sequence[int], tasks: list[Task], loss_fns: list[LossFn]) -> tuple[list[Task], list[LossFn]]:
    return [tasks[i] for i in indices], [loss_fns[i] for i in indices]


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        came = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"MetaMAML: loss_fn must return a scalar tensor, got {came}")
    return loss


def _check_rate(where: str, name: str, value: Any) -> float:
    """Return ``value`` as a positive, finite float."""
    rate = _check.positive(where, name, value)
    if math.isinf(rate):
        raise ValueError(f"{where}: {name} must be finite, got {rate!r}")
    return float(rate)


def _check_loss_fn(where: str, loss_fn: Any) -> None:
    if not callable(loss_fn):
        raise TypeError(f"{where}: loss_fn must be callable, got {type(loss_fn).__name__}")


def _loss_fns(where: str, loss_fn: Any, count: int) -> list[LossFn]:
    """One loss per task."""
    if not isinstance(loss_fn, (list, tuple)):
        _check_loss_fn(where, loss_fn)
        return [loss_fn] * count
    if len(loss_fn) != count:
        raise ValueError(f"{where}: loss_fn must be one or as many as the {count} tasks, got {len(loss_fn)}")
    for one in loss_fn:
        _check_loss_fn(where, one)
    return list(loss_fn)


def _check_pair(where: str, name: str, x: Any, y: Any) -> None:
    _check.tensor(where, f"{name}_x", x)
    _check.tensor(where, f"{name}_y", y)
    if x.dim() == 0 or y.dim() == 0 or x.shape[0] != y.shape[0]:
        raise ValueError(f"{where}: {name}_x has shape {tuple(x.shape)}, {name}_y has shape {tuple(y.shape)}")
    if x.shape[0] == 0:
        raise ValueError(f"{where}: {name}_x is empty")
    _check.device(where, f"{name}_y", y, x.device, f"{name}_x")


def _start_alike(group: Group, model: nn.Module) -> None:
    """Parameters and buffers as they are on rank 0; ValueError on all where the model is another."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    about = [f"{name} {tuple(t.shape)} {t.dtype} {t.requires_grad}" for name, t in tensors.items()]
    sums = group.all_gather(torch.tensor(zlib.crc32("\n".join(about).encode())))
    for rank in (sums != sums[0]).nonzero().flatten().tolist():
        raise ValueError(f"MetaMAML: model has other parameters or buffers on rank {rank} than on rank 0")
    group.broadcast_(list(tensors.values()))


def _gather(group: Group, losses: Tensor, counts: list[int]) -> Tensor:
    """The losses of all ranks, one rank after the other."""
    padded = losses.new_zeros(max(counts))
    padded[: len(losses)] = losses
    return torch.cat([part[:count] for part, count in zip(group.all_gather(padded), counts, strict=True)])


def _check_tasks(where: str, tasks: Iterable[Task], *, empty: bool = False) -> list[Task]:
    tasks = list(tasks)
    if not tasks and not empty:
        raise ValueError(f"{where}: tasks is empty")
    for i, task in enumerate(tasks):
        if not isinstance(task, (tuple, list)) or len(task) != 4:
            raise ValueError(f"{where}: tasks[{i}] must be (support_x, support_y, query_x, query_y)")
        _check_pair(f"{where}, tasks[{i}]", "support", task[0], task[1])
        _check_pair(f"{where}, tasks[{i}]", "query", task[2], task[3])
    return tasks
