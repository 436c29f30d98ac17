"""lambda_k = lambda_{k+1} - H(theta_k) (lr lambda_{k+1}): the meta-gradient without the graph of the inner loop.

theta_{k+1} = theta_k - lr g(theta_k) are the inner steps, with gradient g and Hessian H of the support loss. lambda_K
is the gradient of the query loss at theta_K. The sum over tasks of lambda_0 is the meta-gradient. A sweep over the
steps, from the last to the first, needs theta_k alone and computes the activations of one step at a time.

- A step size has the gradient -<lambda_{k+1}, g(theta_k)>, summed over the steps.
- A parameter phi that the inner loop does not adapt has the gradient of the query loss, less that of
  <lr lambda_{k+1}, g(theta_k, phi)> for every step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from eaml_ext._torch_compat import dispatch_mode_active
from eaml_ext.meta._batching import Map, caller_level, generator_states, vmapped
from eaml_ext.meta._inner_loop import InnerLoop, descend
from eaml_ext.meta._types import LossFn, Params
from eaml_ext.meta.functional import without_saved_tensor_hooks

Memory = Literal["reverse_over_reverse", "recompute", "forward_over_reverse"]
"""How a meta-gradient of second order is computed: see ``memory`` of :class:`eaml_ext.meta.MetaMAML`."""

Losses = Callable[[Params, Params], Tensor]
"""``(adapted, others) -> losses``, one for each task: adapted parameters of each task, others that all tasks share."""


class Product(NamedTuple):
    """The gradient of the sum of losses and the derivative of the gradient in a direction.

    Attributes:
        losses: detached.
        gradient: for each adapted parameter; None where the loss does not depend on it.
        derivative: for each adapted parameter, then for each other one; None where it is zero for all directions.
    """

    losses: Tensor
    gradient: list[Tensor | None]
    derivative: list[Tensor | None]


def check_memory(where: str, memory: Any, compile: bool) -> None:
    """Raise ValueError unless ``memory`` is one of :data:`Memory`, with ``compile`` the default."""
    if memory not in get_args(Memory):
        raise ValueError(f"{where}: memory must be one of {', '.join(get_args(Memory))}, got {memory!r}")
    if compile and memory != "reverse_over_reverse":
        raise ValueError(f"{where}: compile records all inner steps, memory must be reverse_over_reverse, got {memory}")


def check_repeated(where: str, first: Tensor, second: Tensor) -> None:
    """Raise ValueError unless the support losses of both passes agree."""
    # In units of the largest loss, because kernels with atomics round differently from call to call.
    tolerance = torch.finfo(first.dtype).eps ** 0.5 * torch.nan_to_num(first, 0.0, 0.0, 0.0).abs().max()
    equal = (first == second) | (first.isnan() & second.isnan()) | ((first - second).abs() <= tolerance)
    if not bool(equal.all()):
        text = "model or loss_fn keeps state or draws random numbers outside torch's default generators"
        raise ValueError(f"{where}: memory must be 'reverse_over_reverse', because {text}")


class HessianVectorProducts:
    """Meta-gradients by Hessian-vector products.

    Args:
        where: begins errors and the warning.
        forward: compute the products by forward mode over reverse mode; else by reverse mode over reverse mode. A model
            that forward mode cannot run gets the latter, after one RuntimeWarning. The latter also runs under dispatch
            modes (FlopCounterMode), in which forward mode crashes the interpreter of torch 2.13.
    """

    def __init__(self, where: str, forward: bool):
        self.where, self.forward = where, forward

    def meta_gradient(
        self,
        batch: Map,
        inner: InnerLoop,
        params: Params,
        rates: Params,
        loss_fn: LossFn,
        weights: Tensor,
        *stacked: Tensor,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the tasks' query losses, ``(tasks,)``, and the gradient of their weighted sum.

        Model and loss draw the same numbers from torch's default generators in both passes over a step.

        Args:
            batch: maps functions over tasks; with another map than ``vmapped`` tasks run one after the other.
            inner: the inner loop, second order.
            params: the learned parameters by name.
            rates: the learned step sizes by name; empty: none.
            loss_fn: ``(prediction, target) -> scalar``.
            weights: ``(tasks,)``, floating.
            stacked: the tasks of a launch, four tensors ``(tasks, n, ...)``, or six of padded tasks: masks of support
                and query set follow, and ``loss_fn`` is a MaskedLoss.

        Returns:
            The losses, detached, and one gradient for each of ``params`` and ``rates``; None where no task uses it.

        Raises:
            ValueError: the support loss of a step changes between two passes at equal parameters.
        """
        if batch is vmapped and len(weights) > 1:
            return self._sweep(batch, inner, params, rates, loss_fn, weights, *stacked)
        losses: list[Tensor] = []
        total: list[Tensor | None] = [None] * (len(params) + len(rates))
        for weight, *task in zip(weights, *stacked, strict=True):
            loss, grads = self._sweep(lambda function: function, inner, params, rates, loss_fn, weight, *task)
            losses.append(loss)
            total = [_add(t, g) for t, g in zip(total, grads, strict=True)]
        return torch.stack(losses), total

    def _sweep(
        self,
        batch: Map,
        inner: InnerLoop,
        params: Params,
        rates: Params,
        loss_fn: LossFn,
        weights: Tensor,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        support_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The meta-gradient of a batch of tasks, or of one task whose tensors have no dimension of tasks."""
        device = support_x.device
        adapted = {name: params[name].detach().expand(*weights.shape, *params[name].shape) for name in inner.names}
        others = {name: p for name, p in params.items() if name not in adapted}
        constants = {name: p.detach() for name, p in others.items()}
        lr = {name: rate.detach() for name, rate in rates.items()} or inner.lr
        first: list[Tensor] = []  # support losses of the first pass
        second: list[Tensor] = []

        def losses(adapted: Params, others: Params, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
            def loss(fast: Params, x: Tensor, y: Tensor, *mask: Tensor) -> Tensor:
                return inner.loss({**others, **fast}, x, y, loss_fn, *mask)

            values: Tensor = batch(loss)(adapted, x, y, *([] if mask is None else [mask]))
            return values

        def support_losses(adapted: Params, others: Params) -> Tensor:
            return losses(adapted, others, support_x, support_y, support_mask)

        def recorded_loss(adapted: Params) -> Tensor:
            values = support_losses(adapted, constants)
            first.append(values.detach())
            return values.sum()

        steps = []
        for _ in range(inner.steps):
            steps.append((adapted, generator_states(device)))
            with torch.no_grad():
                adapted = descend(recorded_loss, adapted, lr, 1)

        adapted = {name: p.requires_grad_() for name, p in adapted.items()}
        values = losses(adapted, others, query_x, query_y, query_mask)
        weighted = (values * weights.to(values)).sum()
        found = torch.autograd.grad(weighted, [*adapted.values(), *others.values()], allow_unused=True)
        after = generator_states(device)
        grads: dict[str, Tensor | None] = dict(zip([*adapted, *others], found, strict=True))
        rate_grads: dict[str, Tensor | None] = dict.fromkeys(rates)
        while steps:
            adapted, restore = steps.pop()
            cotangents = {name: g for name in adapted if (g := grads[name]) is not None}
            directions = {name: -(lr[name] if isinstance(lr, dict) else lr) * g for name, g in cotangents.items()}
            product = self._product(support_losses, adapted, others, directions, restore)
            second.append(product.losses)
            for name, g in zip(adapted, product.gradient, strict=True):
                if name in rates and name in cotangents:
                    part = torch.zeros_like(rates[name]) if g is None else -cotangents[name] * g
                    rate_grads[name] = _add(rate_grads[name], part.sum_to_size(rates[name].shape))
            for name, d in zip(grads, product.derivative, strict=True):
                grads[name] = _add(grads[name], d)
        after()
        check_repeated(self.where, torch.stack(first), torch.stack(second[::-1]))
        summed = [None if (g := grads[name]) is None else g.sum_to_size(p.shape) for name, p in params.items()]
        return values.detach(), [*summed, *rate_grads.values()]

    def _product(
        self, losses: Losses, adapted: Params, others: Params, directions: Params, restore: Callable[[], None]
    ) -> Product:
        """The product by the mode in use; ``restore`` sets the generators to their states before the step."""
        restore()
        if not self.forward or dispatch_mode_active():
            return reverse_product(losses, adapted, others, directions)
        try:
            return forward_product(losses, adapted, others, directions)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
        restore()
        product = reverse_product(losses, adapted, others, directions)
        self.forward = False
        text = f"{self.where}: forward mode cannot run the model, so reverse mode recomputes inner steps: {reason}"
        warnings.warn(text, RuntimeWarning, stacklevel=caller_level())
        return product


def reverse_product(losses: Losses, adapted: Params, others: Params, directions: Params) -> Product:
    """d<directions, g>/d(adapted, others), g the gradient of ``losses(adapted, others).sum()``."""
    points = {name: p.detach().requires_grad_() for name, p in adapted.items()}
    leaves, values = [*points.values(), *others.values()], losses(points, others)
    gradient: Sequence[Tensor | None] = [None] * len(points)
    derivative: Sequence[Tensor | None] = [None] * len(leaves)
    if values.requires_grad:
        gradient = torch.autograd.grad(values.sum(), [*points.values()], create_graph=True, allow_unused=True)
    of_names = dict(zip(points, gradient, strict=True))
    pairs = [(g, v) for name, v in directions.items() if (g := of_names[name]) is not None and g.requires_grad]
    if pairs:
        outputs, cotangents = zip(*pairs, strict=True)
        derivative = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
    return Product(values.detach(), [None if g is None else g.detach() for g in gradient], [*derivative])


def forward_product(losses: Losses, adapted: Params, others: Params, directions: Params) -> Product:
    """d/de of the gradient of ``losses(adapted + e directions, others).sum()`` at e = 0: equal to the reverse one."""
    # A recomputation in the backward pass would read the model's own parameters, so checkpoints must raise.
    with forward_ad.dual_level(), without_saved_tensor_hooks():
        points = {}
        for name, p in adapted.items():
            # Contiguous, because a tangent has the strides of its primal and cannot have those of an expanded tensor.
            dual = forward_ad.make_dual(p.contiguous(), directions[name]) if name in directions else p.detach()
            points[name] = dual.requires_grad_()
        leaves, values = [*points.values(), *others.values()], losses(points, others)
        gradient: Sequence[Tensor | None] = [None] * len(leaves)
        if values.requires_grad:
            gradient = torch.autograd.grad(values.sum(), leaves, allow_unused=True)
        duals = [(None, None) if g is None else forward_ad.unpack_dual(g) for g in gradient]
        primal_losses = forward_ad.unpack_dual(values.detach()).primal
    return Product(primal_losses, [primal for primal, _ in duals[: len(points)]], [tangent for _, tangent in duals])


def _add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """``total + part``, where None is zero."""
    return part if total is None else total if part is None else total + part
