"""The objective of an adaptation: the checked batch, its loss, the loss of its experience, the entropy."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eaml_ext import _check
from eaml_ext._torch_compat import tree_leaves, tree_map
from eaml_ext.meta._batching import Batching
from eaml_ext.meta._types import LossFn
from eaml_ext.meta.functional import recordable

Losses = Callable[[Callable[..., Any], dict[str, Any], dict[str, Any] | None], tuple[Tensor, Tensor]]
"""``(call, batch, experience) -> (total, objective)``: the last arguments of :func:`losses`."""

ENTRIES = ("states", "targets", "hidden_state", "rows", "mask_dims")
"""The entries of a checked batch on which :func:`losses` depends."""


_LEADING = {1: "(n, ...)", 2: "(users, n, ...)"}


def check_loss(where: str, loss_fn: LossFn) -> None:
    """Raise TypeError unless ``loss_fn`` can be called."""
    if not callable(loss_fn):
        raise TypeError(f"{where}: loss_fn must be callable, got {type(loss_fn).__name__}")


def check_entry(where: str, batch: Any, name: str, like: Tensor, lead: int) -> None:
    """Raise unless ``batch`` is a dict whose entry ``name`` is a tensor that the model can take; see check_batch."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"{where}: batch_dict must be a dict, got {type(batch).__name__}")
    if name not in batch:
        raise ValueError(f"{where}: batch_dict has no {name}, only {', '.join(map(str, batch))}")
    value = batch[name]
    _check.tensor(where, name, value)
    if value.dim() < lead:
        raise ValueError(f"{where}: {name} must have shape {_LEADING[lead]}, got {tuple(value.shape)}")
    if value.is_floating_point():
        _check.dtype(where, name, value, (like.dtype,))
    _check.device(where, name, value, like.device, "the model")


def check_batch(where: str, loss_fn: LossFn, batch: Mapping[str, Any], like: Tensor, lead: int) -> dict[str, Any]:
    """Return a copy of the batch, its tensors detached.

    The mask becomes ``rows``, the indices of its True entries, and ``mask_dims``, the number of its dimensions after
    the users. Boolean indexing has no fixed size, so vmap cannot do it.

    Args:
        where: the beginning of messages.
        loss_fn: checked to be callable.
        batch: the argument of ``Adapter.adapt`` or ``Adapter.adapt_many``.
        like: a tensor of the dtype and device that floating states and targets must have.
        lead: the number of leading dimensions that must agree: 1 for ``(n, ...)``, 2 for ``(users, n, ...)``.

    Raises:
        TypeError, ValueError: an entry is missing or does not fit.
    """
    check_loss(where, loss_fn)
    check_entry(where, batch, "states", like, lead)
    check_entry(where, batch, "targets", like, lead)
    states, targets = batch["states"], batch["targets"]
    if states.shape[:lead] != targets.shape[:lead]:
        got, wanted, leading = tuple(targets.shape), tuple(states.shape), _LEADING[lead]
        raise ValueError(f"{where}: targets has shape {got}, states has shape {wanted}: {leading} must agree")
    if 0 in states.shape[:lead]:
        raise ValueError(f"{where}: the batch is empty, states has shape {tuple(states.shape)}")
    checked = {name: value.detach() if isinstance(value, Tensor) else value for name, value in batch.items()}
    if checked.get("hidden_state") is None:
        checked.pop("hidden_state", None)
    else:
        checked["hidden_state"] = tree_map(
            lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, batch["hidden_state"]
        )
        for leaf in tree_leaves(checked["hidden_state"]) if lead == 2 else ():
            if isinstance(leaf, Tensor) and leaf.shape[:1] != states.shape[:1]:
                users, got = len(states), tuple(leaf.shape)
                raise ValueError(f"{where}: hidden_state must have shape (users, ...), users = {users}, got {got}")
    mask = checked.pop("mask", None)
    if mask is not None:
        _check.tensor(where, "mask", mask)
        _check.dtype(where, "mask", mask, (torch.bool,))
        _check.device(where, "mask", mask, like.device, "the model")
        if mask.dim() < lead or mask.shape != targets.shape[: mask.dim()]:
            got, wanted = tuple(mask.shape), tuple(targets.shape)
            raise ValueError(f"{where}: mask has shape {got}, wanted the leading dimensions of targets, {wanted}")
        flat = mask.reshape(-1) if lead == 1 else mask.flatten(1)
        counts = flat.sum(-1)
        if not counts.all():
            raise ValueError(f"{where}: mask is nowhere True, the batch is empty")
        if lead == 2 and (counts != counts[0]).any():
            raise ValueError(f"{where}: mask must have equally many True for all users, got {counts.tolist()}")
        rows = flat.nonzero()[:, -1]
        checked["rows"] = rows if lead == 1 else rows.view(len(states), -1)
        checked["mask_dims"] = mask.dim() - lead + 1
    return recordable(checked)


def losses(
    where: str,
    loss_fn: LossFn,
    experience_weight: float,
    entropy_weight: float,
    batching: Batching,
    call: Callable[..., Any],
    batch: Mapping[str, Any],
    experience: Mapping[str, Any] | None,
) -> tuple[Tensor, Tensor]:
    """Return ``(total, objective)`` of one batch and its experience, scalars.

    Args:
        where: the beginning of messages.
        loss_fn: ``(predictions, targets) -> scalar``.
        experience_weight, entropy_weight: the weights of the formulas in Adapter.
        batching: maps the loss over experience items that have weights.
        call: the model.
        batch: the result of :func:`check_batch`.
        experience: the result of ``check_experience``; None: none.

    Raises:
        TypeError, ValueError: the model or ``loss_fn`` returns something of another type or shape.
    """
    hidden = batch.get("hidden_state")
    inputs = (batch["states"],) if hidden is None else (batch["states"], hidden)
    predictions, targets = _prediction(where, call(*inputs)), batch["targets"]
    if "rows" in batch:
        depth = batch["mask_dims"]
        if predictions.shape[:depth] != targets.shape[:depth]:
            got, wanted = tuple(predictions.shape), tuple(targets.shape[:depth])
            raise ValueError(f"{where}: the model returned shape {got}, the mask has shape {wanted}")
        predictions = predictions.flatten(0, depth - 1)[batch["rows"]]
        targets = targets.flatten(0, depth - 1)[batch["rows"]]
    total = objective = _scalar(where, loss_fn(predictions, targets))
    if experience is not None:
        remembered = _prediction(where, call(experience["states"]))
        total = total + experience_weight * _experience_loss(where, loss_fn, remembered, experience, batching)
        objective = total / (1 + experience_weight)
    if entropy_weight:
        entropy = _entropy(predictions, targets)
        if entropy is not None:
            objective = objective + entropy_weight * entropy
    return total, objective


def _experience_loss(
    where: str, loss_fn: LossFn, predictions: Tensor, experience: Mapping[str, Any], batching: Batching
) -> Tensor:
    """Return the loss of all items, or with weights w the mean of their own losses: sum_i w_i l_i / sum_i w_i.

    With a mask, ``loss_fn`` receives the steps where it is True, flattened to ``(count, ...)``.
    """
    targets: Tensor = experience["targets"]
    masked = "rows" in experience
    if masked:
        if predictions.shape[:2] != targets.shape[:2]:
            got, wanted = tuple(predictions.shape), tuple(targets.shape[:2])
            raise ValueError(f"{where}: the model returned shape {got}, the mask of the experience has shape {wanted}")
        predictions, targets = (x.flatten(0, 1)[experience["rows"]] for x in (predictions, targets))
    if "weights" not in experience:
        return _scalar(where, loss_fn(predictions, targets))

    def alone(prediction: Tensor, target: Tensor) -> Tensor:
        return _scalar(where, loss_fn(prediction.unsqueeze(0), target.unsqueeze(0)))

    weights: Tensor = experience["weights"]
    losses: Tensor
    if masked:  # vmap cannot run items of different lengths
        items = zip(predictions.split(experience["counts"]), targets.split(experience["counts"]), strict=True)
        losses = torch.stack([alone(*item) for item in items])
        return (weights * losses).sum() / weights.sum()
    losses = batching.run(lambda batch: batch(alone)(predictions, targets), targets.device)
    return (weights * losses).sum() / weights.sum()


def gradients(where: str, objective: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradient of the objective with respect to each leaf; zeros for a frozen or unused leaf.

    Raises:
        ValueError: the objective depends on no leaf.
    """
    moving = [p for p in leaves if p.requires_grad]
    grads: Sequence[Tensor | None] = [None]
    if objective.requires_grad:
        grads = torch.autograd.grad(objective, moving, allow_unused=True)
    if all(g is None for g in grads):
        raise ValueError(f"{where}: the loss does not depend on the adapted parameters")
    found = iter(grads)
    each = ((p, next(found) if p.requires_grad else None) for p in leaves)
    return [torch.zeros_like(p) if g is None else g for p, g in each]


def _prediction(where: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: the model must return one tensor, got {type(value).__name__}")
    return value


def _scalar(where: str, loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        kind = f"a {loss.dtype!s} tensor" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"{where}: loss_fn must return a floating scalar tensor, got {kind}")
    if loss.dim():
        raise ValueError(f"{where}: loss_fn must return a scalar, got shape {tuple(loss.shape)}")
    return loss


def _entropy(predictions: Tensor, targets: Tensor) -> Tensor | None:
    """Return the mean entropy of the softmax over classes; None unless these are logits with integer targets.

    The dimension of the classes is the last, ``(n, ..., classes)``, or the second, ``(n, classes, ...)``, as in
    ``cross_entropy``.
    """
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        return None
    if not predictions.is_floating_point() or predictions.dim() < 2:
        return None
    if targets.shape == predictions.shape[:-1]:
        dim = -1
    elif targets.shape == predictions.shape[:1] + predictions.shape[2:]:
        dim = 1
    else:
        return None
    logs = predictions.log_softmax(dim)
    # The clamp makes a class with the logit -inf add 0, not 0 times -inf.
    return -(logs.exp() * logs.clamp(min=torch.finfo(logs.dtype).min)).sum(dim).mean()
