"""theta <- theta - lr dL(theta)/dtheta, repeated: the inner loop of every meta-learner."""

from __future__ import annotations  # Dynamo cannot evaluate annotations of functions that it traces

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad
from torch.nn.attention import SDPBackend, sdpa_kernel

from eaml_ext.meta._types import LossFn, Params
from eaml_ext.meta._validation import check_scalar
from eaml_ext.meta.functional import uses_tape
from eaml_ext.meta.masked_loss import apply_loss

_attention_lock = threading.Lock()
_attention_users = 0  # blocks of all threads that are open
_attention_settings = ExitStack()  # restores the settings from before the first of them


@dataclass(frozen=True)
class InnerLoop:
    """theta_i = theta - lr dL(call(theta, x), y)/dtheta, ``steps`` times: adaptation to one task.

    Args:
        call: ``(params, x[, lengths]) -> prediction``, the model under other parameters.
        names: the parameters that are adapted.
        lr: step size, unless each number has a learned one.
        steps: gradient steps.
        first_order: treat the gradients as constants.
    """

    call: Callable[..., Tensor]
    names: tuple[str, ...]
    lr: float
    steps: int
    first_order: bool

    def loss(self, params: Params, x: Tensor, y: Tensor, loss_fn: LossFn, mask: Tensor | None = None) -> Tensor:
        """``loss_fn`` of the model under ``params``, a scalar.

        Args:
            params: the parameters.
            x, y: ``(n, ...)``; with a mask of sequences ``(n, time, ...)``.
            loss_fn: with a mask a MaskedLoss.
            mask: ``(n,)``, or ``(n, time)`` for sequences, whose lengths are passed to the model; None: no padding.
        """
        sequences = mask is not None and mask.dim() == 2
        prediction = self.call(params, x, mask.sum(1)) if sequences else self.call(params, x)  # type: ignore[union-attr]
        return check_scalar("MetaMAML", apply_loss(loss_fn, prediction, y, mask))

    def adapt(
        self, params: Params, rates: Params, x: Tensor, y: Tensor, loss_fn: LossFn, mask: Tensor | None = None
    ) -> Params:
        """Return all of ``params``, those in ``names`` adapted; ``rates`` are their learned step sizes, if any."""

        def loss(fast: Params) -> Tensor:
            return self.loss({**params, **fast}, x, y, loss_fn, mask)

        fast = {name: params[name] for name in self.names}
        return {**params, **descend(loss, fast, rates or self.lr, self.steps, self.first_order)}

    def query_loss(self, params: Params, rates: Params, loss_fn: LossFn) -> Callable[..., Tensor]:
        """Return ``(support_x, support_y, query_x, query_y[, masks]) -> scalar``: the query loss after adaptation."""

        def query_loss(
            support_x: Tensor,
            support_y: Tensor,
            query_x: Tensor,
            query_y: Tensor,
            support_mask: Tensor | None = None,
            query_mask: Tensor | None = None,
        ) -> Tensor:
            adapted = self.adapt(params, rates, support_x, support_y, loss_fn, support_mask)
            return self.loss(adapted, query_x, query_y, loss_fn, query_mask)

        return query_loss


def descend(
    loss: Callable[[Params], Tensor], params: Params, lr: float | Params, steps: int, first_order: bool = False
) -> Params:
    """``steps`` of gradient descent on ``loss(params)``; ``lr`` is one number, or a tensor for each name."""
    for _ in range(steps):
        grads = gradient(loss, params, first_order)
        params = {n: p - (lr[n] if isinstance(lr, dict) else lr) * grads[n] for n, p in params.items()}
    return params


def combined_objective(loss: Tensor, experience_loss: Tensor, weight: Tensor | float) -> Tensor:
    """``(loss + weight·experience_loss) / (1 + weight)``: the step size does not depend on the weight."""
    return (loss + weight * experience_loss) / (1 + weight)


def gradient(loss: Callable[[Params], Tensor], params: Params, first_order: bool = False) -> Params:
    """dL/dparams by name, zeros where L does not depend on a parameter.

    Connected to all that L depends on where gradients are recorded, unless ``first_order``. Under a transform of
    torch.func it is ``torch.func.grad``. Elsewhere it comes from autograd's tape, which runs every model that autograd
    runs (hooks of saved tensors, in-place updates) and costs less.
    """
    if not uses_tape():
        grads = grad(loss)(params)
        return {name: g.detach() for name, g in grads.items()} if first_order else grads
    # Detached parameters may meet a loss that depends on something else that requires grad.
    recorded = torch.is_grad_enabled() and (any(p.requires_grad for p in params.values()) or loss(params).requires_grad)
    with torch.enable_grad():
        points = {n: p if recorded and p.requires_grad else p.detach().requires_grad_() for n, p in params.items()}
        value = loss(points)
        if not value.requires_grad:
            return {name: torch.zeros_like(p) for name, p in points.items()}
        leaves, keep = list(points.values()), recorded and not first_order
        tape_grads = torch.autograd.grad(value, leaves, create_graph=keep, materialize_grads=True)
    return dict(zip(points, tape_grads, strict=True))


@contextmanager
def twice_differentiable_attention(needed: bool = True) -> Iterator[None]:
    """Compute attention by its formula: torch's fused kernels have no second derivative, its fast path has none.

    The settings are those of the process: the first block of all threads changes them, the last one restores them.
    """
    global _attention_users
    if not needed or torch.compiler.is_compiling():
        yield
        return
    with _attention_lock:
        if not _attention_users:
            mha = torch.backends.mha
            _attention_settings.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
            _attention_settings.enter_context(sdpa_kernel(SDPBackend.MATH))
            mha.set_fastpath_enabled(False)
        _attention_users += 1
    try:
        yield
    finally:
        with _attention_lock:
            _attention_users -= 1
            if not _attention_users:
                _attention_settings.close()
