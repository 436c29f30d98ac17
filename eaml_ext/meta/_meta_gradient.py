"""dL/dtheta,  L = sum_i w_i L(theta_i; query_i): losses of tasks after adaptation, and their meta-gradient."""

from __future__ import annotations  # Dynamo cannot evaluate annotations of functions that it traces

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from eaml_ext._torch_compat import is_compiler_error
from eaml_ext.meta._batching import Batching, Map, caller_level, stack, vmapped
from eaml_ext.meta._cuda_graphs import GraphCache
from eaml_ext.meta._hessian_vector_products import HessianVectorProducts
from eaml_ext.meta._inner_loop import InnerLoop, descend, twice_differentiable_attention
from eaml_ext.meta._padding import launches, pad_tasks
from eaml_ext.meta._python_state import PythonState
from eaml_ext.meta._types import LossFn, Params, Task
from eaml_ext.meta.functional import uses_tape
from eaml_ext.meta.kl_dro import kl_dro_weights

Gradients = list[Tensor | None]
"""One gradient for each learned tensor; None where no task uses it."""

PureFunction = Callable[..., tuple[Tensor, list[Tensor]]]
"""``(params, rates, weights, *stacked tasks) -> (losses, gradients)`` without autograd's tape."""


@dataclass(frozen=True)
class MetaGradient:
    """Losses of tasks after adaptation and the gradient of their weighted sum, chunk by chunk.

    Args:
        model: the model that ``inner`` calls.
        inner: the inner loop.
        params: the learned parameters by name.
        rates: the learned step sizes in use by name; empty: none.
        batching: maps functions over tasks.
        compiled: the functions compiled so far; ``compile`` adds to it.
        graphs: captures and replays compiled functions on CUDA; None: they run as usual.
        products: computes the gradient by Hessian-vector products; None: by the graph of the inner loop.
        micro_batch, reptile, compile: as of :class:`eaml_ext.meta.MetaMAML`.
    """

    model: nn.Module
    inner: InnerLoop
    params: Params
    rates: Params
    batching: Batching
    compiled: dict[tuple[LossFn, InnerLoop], PureFunction]
    graphs: GraphCache | None
    products: HessianVectorProducts | None
    micro_batch: int | None
    reptile: bool
    compile: bool

    @property
    def leaves(self) -> list[Tensor]:
        """The learned tensors: parameters, then step sizes."""
        return [*self.params.values(), *self.rates.values()]

    def run(self, tasks: list[Task], loss_fns: list[LossFn], kl_radius: float = 0.0) -> tuple[Tensor, Gradients]:
        """The tasks' losses, ``(len(tasks),)``, and the gradient of their mean or, with a radius, of the worst mean."""
        weights = kl_dro_weights(self.losses(tasks, loss_fns), kl_radius) if kl_radius else None
        return self.weighted(tasks, loss_fns, len(tasks), weights)

    @torch.no_grad()
    def losses(self, tasks: list[Task], loss_fns: list[LossFn]) -> Tensor:
        """The tasks' losses, ``(len(tasks),)``, detached."""
        chunks, parts = self._chunks(tasks, loss_fns), []
        for chunk in chunks:
            some, fns = _take(tasks, chunk), _take(loss_fns, chunk)

            def compute(batch: Map, some: list[Task] = some, fns: list[LossFn] = fns) -> Tensor:
                return task_losses(batch, self.inner, self.params, self.rates, some, fns)

            parts.append(self.batching.run(compute, self.leaves[0].device))
        return _in_order_of_tasks(parts, chunks)

    def weighted(
        self, tasks: list[Task], loss_fns: list[LossFn], count: int, weights: Tensor | None
    ) -> tuple[Tensor, Gradients]:
        """The tasks' losses and the gradient of their weighted sum.

        Args:
            tasks: the tasks of this process.
            loss_fns: one for each.
            count: tasks of all processes.
            weights: ``(len(tasks),)``, floating; None: 1 / count for each task.
        """
        leaves = self.leaves
        uniform = leaves[0].new_full((len(tasks),), 1 / count)
        total: Gradients = [None] * len(leaves)
        chunks, parts = self._chunks(tasks, loss_fns), []
        for chunk in chunks:
            some, fns = _take(tasks, chunk), _take(loss_fns, chunk)
            # A copy of the indices to a GPU would make the host wait, so equal weights are sliced.
            share = uniform[: len(chunk)] if weights is None else weights.to(uniform)[chunk]

            def compute(
                batch: Map, some: list[Task] = some, fns: list[LossFn] = fns, shares: Tensor = share
            ) -> tuple[Tensor, Gradients]:
                if self.reptile or (self.compile and batch is vmapped):
                    return self._without_tape(batch, some, fns[0], shares)
                if self.products is not None:
                    inner, params, rates, stacked = self.inner, self.params, self.rates, stack(pad_tasks(some))
                    return self.products.meta_gradient(batch, inner, params, rates, fns[0], shares, *stacked)
                values = task_losses(batch, self.inner, self.params, self.rates, some, fns)
                # A product with equal weights would round differently from a mean.
                equal = values.mean() * (len(some) / count)
                mean = equal if weights is None else values @ shares.to(values)
                return values, list(torch.autograd.grad(mean, leaves, allow_unused=True))

            with twice_differentiable_attention(not self.inner.first_order and not self.reptile):
                values, grads = self.batching.run(compute, leaves[0].device)
            parts.append(values.detach().to(uniform))
            total = [g if t is None else t if g is None else t + g for t, g in zip(total, grads, strict=True)]
        return _in_order_of_tasks(parts, chunks), total

    def _chunks(self, tasks: list[Task], loss_fns: list[LossFn]) -> list[list[int]]:
        """The indices of the tasks that run at once."""
        if not (self.reptile or self.compile or self.micro_batch or self.products is not None):
            return [list(range(len(tasks)))]
        size = self.micro_batch or len(tasks)
        return [bucket[i : i + size] for bucket in launches(tasks, loss_fns) for i in range(0, len(bucket), size)]

    def _without_tape(
        self, batch: Map, tasks: list[Task], loss_fn: LossFn, weights: Tensor
    ) -> tuple[Tensor, Gradients]:
        """Losses and gradients of the tasks of one launch by a pure function, compiled if wanted."""
        inputs, graphs, inner = [weights, *stack(pad_tasks(tasks))], self.graphs, self.inner

        def function(weights: Tensor, *stacked: Tensor) -> list[Tensor]:
            start, rates = ({name: t.detach() for name, t in tensors.items()} for tensors in (self.params, self.rates))
            losses, grads = self._pure(loss_fn, batch)(start, rates, weights, *stacked)
            return [losses, *grads]

        with torch.set_grad_enabled(not self.reptile):
            if self.compile and batch is vmapped and graphs is not None and graphs.serves(weights.device):
                state = PythonState(self.model, loss_fn)
                # Without inner.call, which would keep the learner and with it these graphs alive.
                options = inner.names, inner.lr, inner.steps, inner.first_order, self.reptile
                key = state.key, options, tuple(self.params), tuple(self.rates)
                losses, *grads = graphs.run(function, key, inputs, [*state.tensors, *self.rates.values()])
            else:
                losses, *grads = function(*inputs)
        return losses, [*grads]

    def _pure(self, loss_fn: LossFn, batch: Map) -> PureFunction:
        make, key = reptile_gradient if self.reptile else maml_gradient, (loss_fn, self.inner)
        if not (self.compile and batch is vmapped):
            return make(self.inner, loss_fn, batch)
        if key not in self.compiled:
            self.compiled[key] = try_compile(make(self.inner, loss_fn, batch))
        return self.compiled[key]


def task_losses(
    batch: Map, inner: InnerLoop, params: Params, rates: Params, tasks: Sequence[Task], loss_fns: Sequence[LossFn]
) -> Tensor:
    """The query losses after adaptation, ``(len(tasks),)``; the tasks of each launch go through ``batch``."""
    losses: dict[int, Tensor] = {}
    for bucket in launches(tasks, loss_fns):
        loss_fn, some = loss_fns[bucket[0]], pad_tasks(_take(tasks, bucket))
        if len(bucket) == 1:
            losses[bucket[0]] = inner.query_loss(params, rates, loss_fn)(*some[0])
        elif uses_tape():
            losses.update(zip(bucket, _losses_on_tape(batch, inner, params, rates, loss_fn, *stack(some)), strict=True))
        else:
            losses.update(zip(bucket, batch(inner.query_loss(params, rates, loss_fn))(*stack(some)), strict=True))
    return torch.stack([losses[i] for i in range(len(tasks))])


def _losses_on_tape(
    batch: Map,
    inner: InnerLoop,
    params: Params,
    rates: Params,
    loss_fn: LossFn,
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    support_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Tensor:
    """``batch(query_loss)``, faster: autograd's tape below vmap gives the inner gradients.

    ``torch.func.grad`` would add a layer above every op. The gradient of the summed losses with respect to the
    parameters of one task is the gradient of that task's loss.
    """

    def loss(fast: Params, x: Tensor, y: Tensor, *mask: Tensor) -> Tensor:
        return inner.loss({**params, **fast}, x, y, loss_fn, *mask)

    losses = batch(loss)
    support_masks, query_masks = ([] if mask is None else [mask] for mask in (support_mask, query_mask))
    fast = {name: params[name].expand(len(support_x), *params[name].shape) for name in inner.names}
    fast = descend(
        lambda fast: losses(fast, support_x, support_y, *support_masks).sum(),
        fast,
        rates or inner.lr,
        inner.steps,
        inner.first_order,
    )
    values: Tensor = losses(fast, query_x, query_y, *query_masks)
    return values


def reptile_gradient(inner: InnerLoop, loss_fn: LossFn, batch: Map) -> PureFunction:
    """Return the pure function of Reptile: the gradient is sum_i w_i (theta - theta_i) / lr."""

    def reptile(params: Params, rates: Params, weights: Tensor, *stacked: Tensor) -> tuple[Tensor, list[Tensor]]:
        def one(
            support_x: Tensor,
            support_y: Tensor,
            query_x: Tensor,
            query_y: Tensor,
            support_mask: Tensor | None = None,
            query_mask: Tensor | None = None,
        ) -> tuple[Params, Tensor]:
            adapted = inner.adapt(params, rates, support_x, support_y, loss_fn, support_mask)
            return adapted, inner.loss(adapted, query_x, query_y, loss_fn, query_mask)

        adapted, losses = batch(one)(*stacked)
        moved = [torch.tensordot(weights, p - adapted[name], 1) for name, p in params.items()]
        return losses, [m / inner.lr for m in moved]

    return reptile


def maml_gradient(inner: InnerLoop, loss_fn: LossFn, batch: Map) -> PureFunction:
    """Return the pure function of MAML; ``batch`` is ``vmapped``, as it is compiled only then."""

    def maml(params: Params, rates: Params, weights: Tensor, *stacked: Tensor) -> tuple[Tensor, list[Tensor]]:
        def mean(meta: tuple[Params, Params]) -> tuple[Tensor, Tensor]:
            losses = vmap(inner.query_loss(*meta, loss_fn), randomness="different")(*stacked)
            return losses @ weights.to(losses), losses

        grads, losses = grad(mean, has_aux=True)((params, rates))
        return losses, [*grads[0].values(), *grads[1].values()]

    return maml


def try_compile(function: PureFunction) -> PureFunction:
    """Return the function compiled, one graph per shape; where that fails, after a warning, it runs uncompiled."""
    run = torch.compile(function, dynamic=False)
    failed = False

    def call(*args: Any) -> tuple[Tensor, list[Tensor]]:
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
            warnings.warn(text, RuntimeWarning, stacklevel=caller_level())
            return function(*args)

    return call


def _in_order_of_tasks(parts: Sequence[Tensor], chunks: Sequence[Sequence[int]]) -> Tensor:
    """Concatenate the losses of all chunks, in the order of the tasks."""
    joined = torch.cat([*parts])
    order = [i for chunk in chunks for i in chunk]
    if order == list(range(len(order))):
        return joined
    losses = torch.empty_like(joined)
    losses[torch.tensor(order, device=joined.device)] = joined
    return losses


def _take(items: Sequence[Any], indices: list[int]) -> list[Any]:
    return [items[i] for i in indices]
