"""The adapted parameters as one vector: a guard is then a few operations, not a few for every parameter."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from eaml_ext import _check
from eaml_ext._torch_compat import foreach_copy_, own_buffers
from eaml_ext.meta._types import Params
from eaml_ext.meta.functional import SUBSTITUTION_LOCK
from eaml_ext.meta.selection import ParameterFilter, select


class FlatParams:
    """Selected parameters of a model, their names, and conversions from and to vectors of all their entries.

    Parameters of several dtypes make a vector of the dtype to which all of them promote.

    Gradients are recorded where the caller records them.

    Args:
        model: the model.
        choice: which of its parameters; the constructor of Adapter describes it.
        step_sizes: without a choice, the parameters that it names; None: all.

    Attributes:
        names, params: the selected parameters, in the order of the vector.
    """

    def __init__(
        self, model: nn.Module, choice: ParameterFilter | None, step_sizes: Mapping[str, float | Tensor] | None = None
    ):
        if step_sizes is not None and (
            not isinstance(step_sizes, Mapping) or not all(isinstance(name, str) for name in step_sizes)
        ):
            got = [*step_sizes] if isinstance(step_sizes, Mapping) else type(step_sizes).__name__
            raise TypeError(f"Adapter: step_sizes must be a dict by name, got {got}")
        selected = select("Adapter", model, choice)
        if step_sizes is not None:
            unknown = [name for name in step_sizes if name not in selected]
            if unknown or (choice is None and not step_sizes):
                wanted, first = ", ".join(selected), repr(unknown[0]) if unknown else "none"
                raise ValueError(f"Adapter: step_sizes must have names of parameters that adapt, {wanted}, got {first}")
            if choice is None:
                choice, selected = [*step_sizes], {n: p for n, p in selected.items() if n in step_sizes}
        for name, parameter in selected.items():
            if not torch.isfinite(parameter).all():
                raise ValueError(f"Adapter: the parameter {name} is not finite")
        self._model, self._choice = model, choice
        self._known = [p for p in model.parameters() if p.requires_grad]
        self.names = list(selected)
        self.params: list[Tensor] = list(selected.values())
        self._sizes = [p.numel() for p in self.params]
        self._buffer = self.vector()
        self._views = self._buffer_views()

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._views = self._buffer_views()  # pickle stores a view as a tensor with its own memory

    def vector(self) -> Tensor:
        """Return a copy of the parameters, ``(1, parameters)``."""
        return self.concatenate(self.params)

    def concatenate(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return tensors of the parameters' shapes as one vector, ``(1, parameters)``."""
        return torch.cat([t.reshape(1, -1) for t in tensors], 1)

    def split(self, vectors: Tensor) -> list[Tensor]:
        """Return views of vectors, ``(..., parameters)``, one ``(..., *shape)`` for each parameter."""
        parts = vectors.split(self._sizes, -1)
        return [part.view(*part.shape[:-1], *p.shape) for part, p in zip(parts, self.params, strict=True)]

    def step_sizes(self, where: str, lr: float, step_sizes: Mapping[str, float | Tensor]) -> Tensor:
        """Return the step size of every entry of the vector, ``(parameters,)``; ``lr`` where ``step_sizes`` has none.

        Args:
            where: the beginning of messages.
            lr: step size of the parameters that ``step_sizes`` does not name.
            step_sizes: by name, numbers or tensors that broadcast to the parameter, >= 0.

        Raises:
            TypeError, ValueError: a step size does not fit.
        """
        rates = []
        for name, p in zip(self.names, self.params, strict=True):
            value = step_sizes.get(name, lr)
            if not isinstance(value, Tensor):
                number = _check.positive(where, f"step_sizes[{name!r}]", value, zero=True)
                value = torch.tensor(number, dtype=torch.float64)
            rate = value.detach()
            if not rate.is_complex():
                rate = rate.to(p.device, p.dtype.to_real())  # a large one is infinite in reduced precision
            if rate.dim() > p.dim() or any(
                a not in (1, b) for a, b in zip(rate.shape[::-1], p.shape[::-1], strict=False)
            ):
                got = tuple(rate.shape)
                raise ValueError(f"{where}: step_sizes[{name!r}] must broadcast to {tuple(p.shape)}, got shape {got}")
            if rate.is_complex() or not (torch.isfinite(rate) & (rate >= 0)).all():
                raise ValueError(f"{where}: step_sizes[{name!r}] must be >= 0 and finite in the parameter's dtype")
            rates.append(rate.to(p).expand(p.shape))
        return self.concatenate(rates)[0]

    def named(self, vectors: Tensor) -> Params:
        """Return the parameters in vectors, ``(..., parameters)``, by name, ``(..., *shape)``, in their own dtypes."""
        parts = zip(self.names, self.split(vectors), self.params, strict=True)
        return {name: part.to(p.dtype) for name, part, p in parts}

    def write(self, vector: Tensor) -> None:
        """Set the parameters that are not frozen from a vector, ``(1, parameters)``."""
        self._buffer.copy_(vector)
        params, views = self.params, self._views
        if not all([p.requires_grad for p in params]):
            chosen = [i for i, p in enumerate(params) if p.requires_grad]
            params, views = [params[i] for i in chosen], [views[i] for i in chosen]
        if params:
            foreach_copy_(params, views)

    def check_replaced(self, where: str) -> None:
        """Raise ValueError unless the selected parameters are still the model's; they may be frozen."""
        with SUBSTITUTION_LOCK:
            present, known = set(map(id, self._model.parameters())), set(map(id, self._known))
            changed = [n for n, p in zip(self.names, self.params, strict=True) if id(p) not in present]
            if any(p.requires_grad and id(p) not in known for p in self._model.parameters()):
                changed += [
                    name for name, p in select("Adapter", self._model, self._choice).items() if id(p) not in known
                ]
        if changed:
            text = f"{changed[0]} was unfrozen or replaced after this Adapter was made: make a new Adapter"
            raise ValueError(f"{where}: {text}")

    def check_trainable(self, where: str) -> None:
        """Raise ValueError if parameters were replaced, or if none of the selected ones requires a gradient."""
        self.check_replaced(where)
        if not any(p.requires_grad for p in self.params):
            raise ValueError(f"{where}: all adapted parameters are frozen, {', '.join(self.names)}")

    def trainable(self) -> Tensor | None:
        """Return which entries belong to parameters that are not frozen, ``(parameters,)``, bool; None: all do."""
        if all([p.requires_grad for p in self.params]):
            return None
        return torch.cat([torch.full((p.numel(),), p.requires_grad, device=p.device) for p in self.params])

    def stack(self, where: str, params: Mapping[str, Tensor], users: int) -> Tensor:
        """Return the parameters of users, ``(users, *shape)`` by name, as vectors, ``(users, parameters)``.

        Raises:
            TypeError, ValueError: names, shapes, dtypes or devices are not those of the parameters.
        """
        if not isinstance(params, Mapping):
            raise TypeError(f"{where}: params must be a dict of tensors by name, got {type(params).__name__}")
        if set(params) != set(self.names):
            raise ValueError(f"{where}: params has {', '.join(params)}, wanted {', '.join(self.names)}")
        for name, p in zip(self.names, self.params, strict=True):
            value, label = params[name], f"params[{name!r}]"
            _check.tensor(where, label, value)
            _check.shape(where, label, value, (users, *p.shape), str((users, *p.shape)))
            _check.dtype(where, label, value, (p.dtype,))
            _check.device(where, label, value, p.device, "the model")
        return torch.cat([params[name].detach().reshape(users, -1) for name in self.names], 1)

    def _buffer_views(self) -> list[Tensor]:
        return self.split(self._buffer[0])


class ModelBuffers:
    """The buffers of a model, saved and restored together.

    Args:
        model: the model; buffers that it registers later are not included.
    """

    def __init__(self, model: nn.Module):
        self._entries = [(m, name) for m in model.modules() for name, b in own_buffers(m).items() if b is not None]

    def copy(self) -> list[Tensor]:
        """Return copies of the buffers."""
        return [own_buffers(module)[name].detach().clone() for module, name in self._entries]

    def write(self, buffers: list[Tensor]) -> None:
        """Set the buffers; one whose shape has changed, or that was made in inference mode, becomes a new tensor."""
        for (module, name), value in zip(self._entries, buffers, strict=True):
            own = own_buffers(module).get(name)
            if own is None or own.shape != value.shape or own.is_inference():
                own_buffers(module)[name] = value.clone()
            else:
                own.copy_(value)
