"""The guarded update: clipped gradient steps inside a trust region, with rollback, for a batch of users."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eaml_ext.adaptation._flat_params import FlatParams
from eaml_ext.adaptation.config import AdaptationConfig
from eaml_ext.adaptation.guards import Mask, UserHistory, select_users
from eaml_ext.meta._optimizer import take_step

StepRule = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``(theta, gradient, scale) -> theta``, with ``(users, parameters)`` and scale ``(users, 1)``, float64, None for 1."""


class Evaluation(NamedTuple):
    """The losses of all users at their parameters.

    Attributes:
        totals: total losses, ``(users,)``, floating.
        gradient: returns the gradient of the objectives, ``(users, parameters)``, 0 for frozen parameters. With a
            history it is called only if the loss of some user is accepted.
    """

    totals: Tensor
    gradient: Callable[[], Tensor]


def gradient_descent(lr: float) -> StepRule:
    """Return the rule ``theta - lr·scale·gradient``."""

    def step(theta: Tensor, gradient: Tensor, scale: Tensor | None) -> Tensor:
        if scale is None:
            return torch.sub(theta, gradient, alpha=lr)
        return _add_scaled(theta, -lr * scale, gradient)

    return step


def optimizer_step(where: str, optimizer: torch.optim.Optimizer, flat: FlatParams) -> StepRule:
    """Return the rule that steps with an optimizer of the model's own parameters; for one user.

    Args:
        where: the beginning of messages.
        optimizer: the optimizer; it sets the model's parameters.
        flat: the parameters, whose ``.grad`` does not change.
    """

    def step(theta: Tensor, gradient: Tensor, scale: Tensor | None) -> Tensor:
        if scale is not None:
            gradient = (gradient * scale.to(torch.promote_types(gradient.dtype, torch.float32))).to(gradient.dtype)
        if not torch.isfinite(gradient).all():
            return torch.full_like(theta, math.nan)  # a rollback follows; the optimizer requires finite gradients
        kept = [p.grad for p in flat.params]
        for p, g in zip(flat.params, flat.split(gradient[0]), strict=True):
            p.grad = g.to(p.dtype) if p.requires_grad else None
        try:
            take_step(where, optimizer)
        finally:
            for p, old in zip(flat.params, kept, strict=True):
                p.grad = old
        return flat.vector()

    return step


def guarded_update(
    evaluate: Callable[[Tensor], Evaluation],
    theta: Tensor,
    step: StepRule,
    cfg: AdaptationConfig,
    history: UserHistory | None = None,
    trainable: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Take up to ``max_steps_per_call`` guarded steps for each user, by the formulas of :class:`AdaptationConfig`.

    Without a history this is a pure function that reads no value on the host. A user whose loss, gradient or parameters
    are not finite returns to ``theta`` and stays there. With a history the spike rule applies too, users return to
    their averaged parameters, and the history is updated in place.

    Args:
        evaluate: ``theta -> Evaluation``, called once per step.
        theta: parameters at the start of the call, ``(users, parameters)``, floating; not modified.
        step: the rule of one step.
        cfg: the number of steps, the bound on the gradient's norm and the trust region; None or 0: no bound.
        history: averages and loss statistics of the users; None: no spike rule.
        trainable: ``(parameters,)``, bool; a rollback leaves the other parameters as they are. None: all are trainable.

    Returns:
        ``(theta, totals)``: the new parameters, ``(users, parameters)``, and each user's total loss at its last step,
        ``(users,)``.
    """
    anchor = theta
    radius = None
    if cfg.trust_region_eps:
        norm = _norm(anchor).double()
        radius = cfg.trust_region_eps * torch.where(norm > 0, norm, 1.0)
    active: Mask = [True] * len(theta) if history is not None else theta.new_ones(len(theta), dtype=torch.bool)
    values = theta.new_empty(len(theta))
    for index in range(cfg.max_steps_per_call):
        first = index == 0
        totals, gradient = evaluate(theta)
        values = totals if first else select_users(active, totals, values)
        accepted = _finite(active, values) if history is None else history.accept(theta, values, active, first=first)
        proposed, stepped = theta, accepted
        if isinstance(accepted, Tensor) or any(accepted):
            g = gradient()
            if history is not None:
                history.add(theta, values, accepted, first=first)
            proposed, norm, distance = _bounded_step(
                theta, anchor, g, step, cfg.grad_clip_norm, radius, history is not None
            )
            stepped = _finite(accepted, norm, distance)
        failed = _without(active, stepped)
        fallback_params = anchor if history is None or history.average is None else history.average
        if trainable is not None:
            fallback_params = torch.where(trainable, fallback_params, theta)
        theta = select_users(stepped, proposed, select_users(failed, fallback_params, theta))
        active = stepped
        if history is not None:
            history.count_step(stepped, failed, first=first)
            if not any(active):
                break
    return theta, values


def _bounded_step(
    theta: Tensor,
    anchor: Tensor,
    gradient: Tensor,
    step: StepRule,
    grad_clip_norm: float | None,
    radius: Tensor | None,
    on_host: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the parameters after a clipped and projected step, the gradient's norm and the distance before projection.

    ``on_host``: where no user exceeds a bound, its operations are left out; this does not change the result.
    """
    norm = _norm(gradient)
    scale = None
    if grad_clip_norm and not (on_host and all(value <= grad_clip_norm for value in norm.tolist())):
        scale = (grad_clip_norm / norm.double()).clamp(max=1).unsqueeze(1)
    proposed = step(theta, gradient, scale)
    moved = proposed - anchor
    distance = _norm(moved)
    if radius is not None:
        outside = distance > radius
        if not on_host or any(outside.tolist()):
            projected = _add_scaled(anchor, (radius / distance.double()).unsqueeze(1), moved)
            proposed = torch.where(outside.unsqueeze(1), projected, proposed)
    return proposed, norm, distance


def _add_scaled(vectors: Tensor, scale: Tensor, others: Tensor) -> Tensor:
    """Return ``vectors + scale·others`` with scale ``(users, 1)``; reduced precision is rounded once."""
    scale = scale.to(torch.promote_types(vectors.dtype, torch.float32))
    return torch.addcmul(vectors, scale, others).to(vectors.dtype)


def _norm(vectors: Tensor) -> Tensor:
    """Return the Euclidean norms of the rows, ``(users,)``."""
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return norms


def _finite(mask: Mask, *values: Tensor) -> Mask:
    """Return the mask, False also where one of the values, ``(users,)`` each, is not finite."""
    for value in values:
        if isinstance(mask, Tensor):
            mask = mask & torch.isfinite(value)
        else:
            mask = [on and math.isfinite(v) for on, v in zip(mask, value.tolist(), strict=True)]
    return mask


def _without(mask: Mask, other: Mask) -> Mask:
    """Return where ``mask`` is True and ``other`` is False."""
    if isinstance(mask, Tensor) and isinstance(other, Tensor):
        return mask & ~other
    return [bool(on and not off) for on, off in zip(mask, other, strict=True)]
