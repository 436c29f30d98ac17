"""Checks of models, tasks and losses, which several meta-learners share; each raises one sentence."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eaml_ext import _check
from eaml_ext._torch_compat import RUNNING_STATISTICS_NORMS
from eaml_ext.meta._types import DataSet, LossFn, Params, Task
from eaml_ext.meta.functional import select_parameters
from eaml_ext.meta.masked_loss import MaskedLoss


def check_rate(where: str, name: str, value: Any) -> float:
    """Return ``value`` as a positive, finite float."""
    rate = _check.positive(where, name, value)
    if math.isinf(rate):
        raise ValueError(f"{where}: {name} must be finite, got {rate!r}")
    return float(rate)


def check_loss_fn(where: str, loss_fn: Any) -> None:
    """Raise TypeError unless ``loss_fn`` is callable."""
    if not callable(loss_fn):
        raise TypeError(f"{where}: loss_fn must be callable, got {type(loss_fn).__name__}")


def check_loss_fns(where: str, loss_fn: Any, count: int) -> list[LossFn]:
    """Return one loss for each of ``count`` tasks, from one for all or a list."""
    if not isinstance(loss_fn, (list, tuple)):
        check_loss_fn(where, loss_fn)
        return [loss_fn] * count
    if len(loss_fn) != count:
        raise ValueError(f"{where}: loss_fn must be one or as many as the {count} tasks, got {len(loss_fn)}")
    for one in loss_fn:
        check_loss_fn(where, one)
    return list(loss_fn)


def check_scalar(where: str, loss: Any) -> Tensor:
    """Return the value of a loss; raise ValueError unless it is a tensor without dimensions."""
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"{where}: loss_fn must return a scalar tensor, got {got}")
    return loss


def check_pair(where: str, name: str, x: Any, y: Any) -> None:
    """Raise unless x and y are tensors on one device with equally many rows, at least one, or lists of such pairs."""
    if isinstance(x, (list, tuple)) and isinstance(y, (list, tuple)):
        _check_sequences(where, name, x, y)
        return
    _check.tensor(where, f"{name}_x", x)
    _check.tensor(where, f"{name}_y", y)
    if x.dim() == 0 or y.dim() == 0 or x.shape[0] != y.shape[0]:
        raise ValueError(f"{where}: {name}_x has shape {tuple(x.shape)}, {name}_y has shape {tuple(y.shape)}")
    if x.shape[0] == 0:
        raise ValueError(f"{where}: {name}_x is empty")
    _check.device(where, f"{name}_y", y, x.device, f"{name}_x")


def _check_sequences(where: str, name: str, x: Sequence[Any], y: Sequence[Any]) -> None:
    """Raise unless x and y are equally many sequences, at least one, alike but for their lengths."""
    if len(x) != len(y):
        raise ValueError(f"{where}: {name}_x has {len(x)} sequences, {name}_y has {len(y)}")
    if not x:
        raise ValueError(f"{where}: {name}_x is empty")
    for i, pair in enumerate(zip(x, y, strict=True)):
        for part, got in zip("xy", pair, strict=True):
            _check.tensor(f"{where}, sequence {i}", f"{name}_{part}", got)
        check_pair(f"{where}, sequence {i}", name, *pair)
        for part, got, first in zip("xy", pair, (x[0], y[0]), strict=True):
            _check.dtype(f"{where}, sequence {i}", f"{name}_{part}", got, (first.dtype,))
            _check.device(f"{where}, sequence {i}", f"{name}_{part}", got, first.device, "sequence 0")
            if got.shape[1:] != first.shape[1:]:
                wanted = ", ".join(["time", *map(str, first.shape[1:])])
                raise ValueError(
                    f"{where}, sequence {i}: {name}_{part} must have shape ({wanted}), got {tuple(got.shape)}"
                )


def check_sequence_support(
    where: str, tasks: Sequence[Sequence[DataSet]], model: nn.Module, loss_fns: Sequence[LossFn]
) -> None:
    """Raise TypeError if a set of a task consists of sequences, but the model takes no lengths or its loss no mask."""
    for task, loss_fn in zip(tasks, loss_fns, strict=True):
        if not all(isinstance(part, Tensor) for part in task):
            _check_takes_lengths(where, model, loss_fn)


def check_mask(where: str, mask: Any, x: Tensor, model: nn.Module, loss_fn: LossFn) -> None:
    """Raise unless ``mask`` is ``(n,)`` or ``(n, time)`` of ``x``, bool, and model and loss take it."""
    _check.tensor(where, "mask", mask)
    _check.dtype(where, "mask", mask, (torch.bool,))
    _check.device(where, "mask", mask, x.device, "support_x")
    if mask.dim() not in (1, 2) or mask.shape != x.shape[: mask.dim()]:
        got, wanted = tuple(mask.shape), tuple(x.shape[:2])
        raise ValueError(f"{where}: mask must have shape (n,) or (n, time) = {wanted}, got {got}")
    if mask.dim() == 2:
        _check_takes_lengths(where, model, loss_fn)
    elif not isinstance(loss_fn, MaskedLoss):
        kind = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise TypeError(f"{where}: a mask needs a MaskedLoss as loss_fn, got {kind}")


def _check_takes_lengths(where: str, model: nn.Module, loss_fn: LossFn) -> None:
    if "lengths" not in inspect.signature(model.forward).parameters:
        kind = type(model).__name__
        raise TypeError(f"{where}: sets of sequences need a model called as model(x, lengths=lengths), got {kind}")
    if not isinstance(loss_fn, MaskedLoss):
        kind = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise TypeError(f"{where}: sets of sequences need a MaskedLoss as loss_fn, got {kind}")


def check_support(where: str, new_task_data: Any) -> tuple[DataSet, DataSet]:
    """Return the support set of a new task, ``(support_x, support_y)``."""
    if not isinstance(new_task_data, (tuple, list)) or len(new_task_data) != 2:
        raise TypeError(f"{where}: new_task_data must be (support_x, support_y)")
    x, y = new_task_data
    check_pair(where, "support", x, y)
    return x, y


def check_tasks(where: str, tasks: Iterable[Task], *, empty: bool = False) -> list[Task]:
    """Return the tasks as a list; ``empty``: there may be none."""
    tasks = list(tasks)
    if not tasks and not empty:
        raise ValueError(f"{where}: tasks is empty")
    for i, task in enumerate(tasks):
        if not isinstance(task, (tuple, list)) or len(task) != 4:
            raise ValueError(f"{where}: tasks[{i}] must be (support_x, support_y, query_x, query_y)")
        check_pair(f"{where}, tasks[{i}]", "support", task[0], task[1])
        check_pair(f"{where}, tasks[{i}]", "query", task[2], task[3])
    return tasks


def check_prefixes(where: str, model: nn.Module, prefixes: Any) -> list[str]:
    """Return the prefixes of names that choose the inner parameters; raise unless each begins a trainable name."""
    if prefixes is None:
        return [""]
    prefixes = [prefixes] if isinstance(prefixes, str) else prefixes
    if not isinstance(prefixes, Sequence) or not all(isinstance(prefix, str) for prefix in prefixes):
        raise TypeError(f"{where}: inner_parameters must be a prefix of names or several, got {prefixes!r}")
    for prefix in prefixes or [""]:
        if not prefix or not select_parameters(model, [prefix]):
            names = ", ".join(select_parameters(model, [""]))
            raise ValueError(f"{where}: inner_parameters {prefix!r} begins no trainable name of {names}")
    return list(prefixes)


def check_model(where: str, model: Any) -> None:
    """Raise unless ``model`` is a module that autograd can train."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be a torch.nn.Module, got {type(model).__name__}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_inference():
            raise ValueError(f"{where}: model must be made outside torch.inference_mode, got {name} made inside")


def check_buffers_constant(where: str, model: nn.Module) -> None:
    """Raise ValueError if ``forward`` would update running statistics: the updates would be lost."""
    for name, module in model.named_modules():
        if isinstance(module, RUNNING_STATISTICS_NORMS) and module.training and module.running_mean is not None:
            kind = f"{name or 'model'} ({type(module).__name__})"
            raise ValueError(f"{where}: {kind} must be in eval mode, got training mode, which updates its statistics")


def check_parameters(where: str, owner: str, params: Mapping[str, Tensor], known: Iterable[Tensor]) -> None:
    """Raise ValueError if one of ``params``, which require grad, is not among those with which ``owner`` was made."""
    known_ids = set(map(id, known))
    for name, p in params.items():
        if id(p) not in known_ids:
            raise ValueError(
                f"{where}: {name} was unfrozen or replaced after this {owner} was made: make a new {owner}"
            )


def check_inner_parameters(where: str, params: Params, names: Sequence[str], inner_lrs: Params) -> None:
    """Raise ValueError unless there are ``names``, each with a learned step size of its shape if any are learned."""
    if not names:
        got = ", ".join(params) or "none"
        raise ValueError(f"{where}: params must hold an inner parameter that requires grad, got {got}")
    for name in names if inner_lrs else ():
        if name not in inner_lrs or inner_lrs[name].shape != params[name].shape:
            text = f"{name} was unfrozen or replaced after this MetaMAML was made and has no learned step size"
            raise ValueError(f"{where}: {text}: make a new MetaMAML")


def check_entries(where: str, state: Any, own: Mapping[str, Any]) -> None:
    """Raise ValueError unless ``state`` is a dict with the entries of ``own``, the state of the object itself."""
    if not isinstance(state, dict) or set(state) != set(own):
        raise ValueError(f"{where}: state must be a dict with the entries {', '.join(own)}")


def check_tensors(where: str, part: str, given: Any, own: Mapping[str, Any]) -> None:
    """Raise unless ``given``, the part of a state with this name, has the names and shapes of ``own``."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{where}: {part} must be a dict of tensors, got {type(given).__name__}")
    wanted, got = (
        {name: tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for name, t in each.items()}
        for each in (own, given)  # an extra state is no tensor
    )
    for name in [*wanted, *got]:
        if got.get(name) != wanted.get(name):
            text = f"{name} of shape {got.get(name, 'none')}, wanted {wanted.get(name, 'none')}"
            raise ValueError(f"{where}: {part} has {text}")
