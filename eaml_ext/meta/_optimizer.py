"""Optimizers that step from gradients alone: construction, steps, states."""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eaml_ext.meta.functional import recordable

# The maximum norm is one op, torch.isfinite and all are several, but vectorised: on a CPU they are as fast here.
MAX_NUMBERS_OF_NORM = 4096


def make_optimizer(where: str, factory: Callable[..., Any], params: Iterable[Tensor], lr: float) -> Any:
    """``factory(params, lr=lr)``; ValueError where its ``step`` requires a closure that computes the loss again."""
    optimizer = factory(list(params), lr=lr)
    if _needs_closure(optimizer):
        raise ValueError(f"{_wanted(where, optimizer)}, whose step needs a closure")
    return optimizer


def take_step(where: str, optimizer: Any) -> None:
    """Call ``optimizer.step()``; raise ValueError where it fails because it needs a closure."""
    try:
        optimizer.step()
    except Exception as error:
        of_closure = any(text in str(error).lower() for text in ("closure", "'nonetype' object is not callable"))
        if not of_closure and not isinstance(error, (AssertionError, NotImplementedError)):
            raise
        raise ValueError(f"{_wanted(where, optimizer)}, whose step raised {error!r}") from error


@torch.no_grad()
def finite(*tensors: Tensor | None) -> bool:
    """Return whether every number in the tensors is finite; None has none. A GPU is read once, not once per tensor."""
    present = [t for t in tensors if t is not None and t.numel()]
    present = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in present]
    present = [t for t in present if t.is_floating_point()]  # integers are finite
    on_gpu = [t for t in present if t.is_cuda]
    if on_gpu and not math.isfinite(torch.nn.utils.get_total_norm(on_gpu, math.inf)):
        return False
    return all(_finite_on_host(t) for t in present if not t.is_cuda)


def step_if_finite(
    where: str, optimizer: Any, leaves: Sequence[Tensor], grads: Sequence[Tensor | None], loss: Tensor
) -> bool:
    """Take a step with these gradients; return False, without a step, if the loss or a gradient is not finite.

    Args:
        where: begins the error.
        optimizer: holds the leaves.
        leaves: learned tensors of any shape. Gradients that they hold before are discarded.
        grads: one of its shape for each leaf; None: the optimizer skips the leaf.
        loss: scalar.
    """
    if not finite(loss, *grads):
        return False
    optimizer.zero_grad()  # a frozen parameter may hold a gradient of its own
    for p, g in zip(leaves, grads, strict=True):
        p.grad = None if g is None else g.resolve_conj()  # torch.optim cannot read lazy conjugates
    try:
        take_step(where, optimizer)
    finally:
        optimizer.zero_grad()
    return True


def check_state(
    where: str, state: Any, optimizer: torch.optim.Optimizer, params: Sequence[Tensor] = (), moments: Sequence[str] = ()
) -> None:
    """Raise unless ``state`` has the groups of ``optimizer``, and finite ``moments`` of the shapes of ``params``."""
    if not isinstance(state, Mapping) or set(state) != {"state", "param_groups"}:
        raise TypeError(f"{where}: optimizer must be the state_dict of an optimizer, got {type(state).__name__}")
    entries, groups = state["state"], state["param_groups"]
    if not isinstance(entries, Mapping) or not isinstance(groups, (list, tuple)):
        kinds = f"{type(entries).__name__} and {type(groups).__name__}"
        raise TypeError(f"{where}: optimizer must have a dict of states and a list of param_groups, got {kinds}")
    own = optimizer.state_dict()["param_groups"]
    wanted = [len(group["params"]) for group in own]
    sizes = [isinstance(group, Mapping) and len(group.get("params", ())) for group in groups]
    if sizes != wanted:
        raise ValueError(f"{where}: optimizer has parameter groups of {sizes}, wanted {wanted}")
    for group, mine in zip(groups, own, strict=True):
        for name in ("lr", "momentum", "betas", "eps", "weight_decay"):  # torch has defaults for later additions
            if name in mine and name not in group:
                raise ValueError(f"{where}: optimizer has a parameter group without {name}")
    for index, entry in entries.items():
        if index not in range(sum(wanted)) or not isinstance(entry, Mapping):
            raise ValueError(f"{where}: optimizer has a state of {index!r}, which is no parameter")
        for name in moments:
            value, shape = entry.get(name), tuple(params[index].shape)
            if not isinstance(value, Tensor) or value.shape != shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{where}: optimizer has {name} of shape {got}, wanted {shape}")
            if not torch.isfinite(value).all():
                raise ValueError(f"{where}: optimizer must be finite, got {name} of parameter {index} that is not")


def load_state(optimizer: Any, state: Any) -> None:
    """``optimizer.load_state_dict(state)`` with copies, because torch keeps the tensors; not in inference mode."""
    optimizer.load_state_dict(copy.deepcopy(recordable(state)))


def _finite_on_host(t: Tensor) -> bool:
    if t.numel() > MAX_NUMBERS_OF_NORM:
        return bool(torch.isfinite(t).all())
    # The maximum norm is NaN where an entry is, and has no overflow.
    return math.isfinite(torch.linalg.vector_norm(t, math.inf))


def _wanted(where: str, optimizer: Any) -> str:
    return f"{where}: optimizer must step from gradients alone, got {type(optimizer).__name__}"


def _needs_closure(optimizer: Any) -> bool:
    """Whether this is LBFGS, has the two steps of SAM, or has a ``step`` with a required argument."""
    if isinstance(optimizer, torch.optim.LBFGS) or (
        hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step")
    ):
        return True
    try:  # of the class: a learning rate scheduler replaces the method of the instance
        _, *arguments = inspect.signature(type(optimizer).step).parameters.values()
    except (AttributeError, TypeError, ValueError):
        return False
    return any(a.default is a.empty and a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD) for a in arguments)
