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

Numbers = list[float] | Tensor
"""One number per user: a list on the host, or a tensor ``(users,)``."""

Scale = float | Tensor
"""A factor <= 1 per user: a number if it is the same for all, or ``(users, 1)``, float64."""

StepRule = Callable[[Tensor, Tensor, Scale], Tensor]
"""``(theta, gradient, scale) -> theta``, with ``(users, parameters)`` each: a step along ``scale·gradient``.

With a history it is called only if the gradient of some user is finite.
"""


class Evaluation(NamedTuple):
    """The losses of all users at their parameters.

    Attributes:
        totals: total losses, ``(users,)``, floating.
        gradient: returns the gradient of the objectives, ``(users, parameters)``, 0 for frozen parameters. With a
            history it is called only if the loss of some user is accepted.
    """

    totals: Tensor
    gradient: Callable[[], Tensor]


def gradient_descent(lr: float, step_sizes: Tensor | None = None) -> StepRule:
    """Return the rule ``theta - lr·scale·gradient``; in place of ``lr`` there may be step sizes, ``(parameters,)``."""
    if step_sizes is not None:
        return lambda theta, gradient, scale: _add_scaled(theta, -scale, step_sizes * gradient)
    return lambda theta, gradient, scale: _add_scaled(theta, -lr * scale, gradient)


def optimizer_step(where: str, optimizer: torch.optim.Optimizer, flat: FlatParams) -> StepRule:
    """Return the rule that steps with an optimizer of the model's own parameters; for one user.

    Args:
        where: the beginning of messages.
        optimizer: the optimizer; it sets the model's parameters.
        flat: the parameters, whose ``.grad`` does not change.
    """

    def step(theta: Tensor, gradient: Tensor, scale: Scale) -> Tensor:
        gradient = gradient * scale
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
    on_host = history is not None
    radius = _radius(anchor, cfg.trust_region_eps, on_host)
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
            norm = _norm(g, on_host)
            stepped = _finite(accepted, norm)
        if isinstance(stepped, Tensor) or any(stepped):
            proposed = step(theta, g, _shrink(norm, cfg.grad_clip_norm or None, theta.device))
            proposed, distance = _project(proposed, anchor, radius, on_host)
            stepped = _finite(stepped, distance)
        if isinstance(stepped, Tensor) or stepped != active:
            fallback_params = anchor if history is None or history.average is None else history.average
            if trainable is not None:
                fallback_params = torch.where(trainable, fallback_params, theta)
            theta = select_users(active, fallback_params, theta)
        theta = select_users(stepped, proposed, theta)
        if history is not None:
            history.count_step(active, stepped, first=first)
            if not any(stepped):
                break
        active = stepped
    return theta, values


def _radius(anchor: Tensor, trust_region_eps: float | None, on_host: bool) -> Numbers | None:
    """Return the radius of each trust region, ``eps·|anchor|``, or ``eps`` where the anchor is 0; None: no region."""
    if not trust_region_eps:
        return None
    norm = _norm(anchor, on_host)
    if isinstance(norm, Tensor):
        return trust_region_eps * torch.where(norm > 0, norm, 1.0).double()
    return [trust_region_eps * (value or 1.0) for value in norm]


def _project(theta: Tensor, anchor: Tensor, radius: Numbers | None, on_host: bool) -> tuple[Tensor, Numbers]:
    """Return the parameters projected onto the trust region, and their distances from the anchor before."""
    moved = theta - anchor
    distance = _norm(moved, on_host)
    ratio = _shrink(distance, radius, theta.device)
    if isinstance(ratio, Tensor):
        theta = torch.where(ratio < 1, _add_scaled(anchor, ratio, moved), theta)
    elif ratio < 1:
        theta = _add_scaled(anchor, ratio, moved)
    return theta, distance


def _shrink(values: Numbers, bounds: Numbers | float | None, device: torch.device) -> Scale:
    """Return ``min(1, bound / value)`` for each user; bounds are one for each user, one for all, or None."""
    if bounds is None:
        return 1.0
    if isinstance(values, Tensor):
        assert not isinstance(bounds, list)
        return (bounds / values.double()).clamp(max=1).unsqueeze(1)
    each = bounds if isinstance(bounds, list) else [bounds] * len(values)
    scales = [bound / value if value > bound else 1.0 for value, bound in zip(values, each, strict=True)]
    if min(scales) == max(scales):
        return scales[0]
    return torch.tensor(scales, dtype=torch.float64, device=device).unsqueeze(1)


def _add_scaled(vectors: Tensor, scale: Scale, others: Tensor) -> Tensor:
    """Return ``vectors + scale·others``; reduced precision is rounded once."""
    if not isinstance(scale, Tensor):
        return torch.add(vectors, others, alpha=scale)
    scale = scale.to(torch.promote_types(vectors.dtype, torch.float32))
    return torch.addcmul(vectors, scale, others).to(vectors.dtype)


def _norm(vectors: Tensor, on_host: bool) -> Numbers:
    """Return the Euclidean norms of the rows."""
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return list(norms.tolist()) if on_host else norms


def _finite(mask: Mask, *values: Numbers) -> Mask:
    """Return the mask, False also where one of the values is not finite."""
    for each in values:
        if isinstance(mask, Tensor) and isinstance(each, Tensor):
            mask = mask & torch.isfinite(each)
        else:
            mask = [bool(on) and math.isfinite(value) for on, value in zip(mask, each, strict=True)]
    return mask
