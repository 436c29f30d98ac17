"""Experiences: items that a buffer returned, and the batches, weights and means made from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from eaml_ext import _check

# The name of a stored field, names of fields to concatenate, or a function of the experiences.
Selector = str | Sequence[str] | Callable[["Experiences"], Tensor]


class Experiences:
    """Stored items, field by field; each field is an attribute: ``experiences.state``, ``experiences.action``, ...

    The data are copies: writing to the buffer afterwards does not change them.

    Attributes:
        fields: name to tensor ``(n, *item shape)``, in the dtypes stored; ``(queries, n, ...)`` after a search with
            several queries, where ``experiences[i]`` are those of query i.
        indices: int64 ``(n,)``, the slots of the items.
        generations: int64 ``(n,)``, the number of times each slot had been reused. An index and a generation together
            identify one item permanently.
        distances: ``(n,)``, ascending, after a search; if the buffer has weights, minus the log-weights. Else None.
        ragged: names of the ragged fields, ``(n, time, ...)`` with zeros after each item's last step. With them there
            are two more fields: ``lengths``, int64 ``(n,)``, and ``mask``, bool ``(n, time)``, True at steps.

    >>> import torch
    >>> from eaml_ext.experience import ExperienceBuffer
    >>> buffer = ExperienceBuffer(100, state_dim=2, action_dim=1)
    >>> buffer.add(state=torch.ones(3, 2), action=torch.zeros(3, 1), next_state=torch.full((3, 2), 2.0))
    >>> experiences = buffer.get_batch(5)
    >>> len(experiences), experiences.state.shape
    (5, torch.Size([5, 2]))
    >>> batch = experiences.batch(states=("state", "action"), targets=lambda e: e.next_state - e.state)
    >>> batch["states"].shape, batch["targets"].shape
    (torch.Size([5, 3]), torch.Size([5, 2]))
    """

    ragged: tuple[str, ...] = ()  # of the class too, so that no field can have this name

    def __init__(
        self,
        fields: dict[str, Tensor],
        indices: Tensor,
        generations: Tensor,
        distances: Tensor | None = None,
        ragged: Sequence[str] = (),
    ):
        self.fields = fields
        self.indices = indices
        self.generations = generations
        self.distances = distances
        self.ragged = tuple(ragged)

    def __getattr__(self, name: str) -> Tensor:
        fields: dict[str, Tensor] = self.__dict__.get("fields", {})
        if name in fields:
            return fields[name]
        raise AttributeError(f"Experiences: there is no field {name!r}, the stored fields are {', '.join(fields)}")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Experiences:
        """Return the chosen items. An integer gives one item, whose fields have no leading dimension."""
        return Experiences(
            {name: value[index] for name, value in self.fields.items()},
            self.indices[index],
            self.generations[index],
            None if self.distances is None else self.distances[index],
            self.ragged,
        )

    def __iter__(self) -> Iterator[Experiences]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name} {tuple(value.shape)}" for name, value in self.fields.items())
        return f"Experiences({fields})"

    def batch(self, states: Selector | None = None, targets: Selector | None = None) -> dict[str, Tensor]:
        """Return a batch for the Adapter: ``{"states": (n, ...), "targets": (n, ...)}``.

        Where the targets are ragged, it also has the entry ``mask``, ``(n, time)``: the Adapter's loss then leaves out
        the steps after the last of each item. A function's result counts as ragged if its second dimension is time.
        Where its size equals the number of steps, the function is called once more, with one more step of padding.

        Args:
            states: a selector, which is the name of a stored field, several names, or a function of the experiences
                that returns a tensor. Several fields are concatenated along the last dimension in the dtype of the
                first. A field with one dimension fewer, such as a discrete action, becomes one column. Default:
                ``state``, or ``observation`` if items were added as ``(observation, target)``.
            targets: a selector. Default: ``next_state``, or ``target``.

        Raises:
            ValueError: a field is not stored, or a function returned another number of items.
            TypeError: a function did not return a tensor.
        """
        batch = {
            "states": self._select("states", states, ("state", "observation")),
            "targets": self._select("targets", targets, ("next_state", "target")),
        }
        if self.ragged and self._is_ragged(targets, batch["targets"]):
            batch["mask"] = self.fields["mask"]
        return batch

    def attention(self, temperature: float = 1.0) -> Tensor:
        """Return ``softmax(-distances / temperature)`` over the items: ``(n,)``, or ``(queries, n)``.

        The weights are differentiable with respect to the query of the search.

        Raises:
            ValueError: the items do not come from a search, or ``temperature`` is not positive and finite.
            TypeError: ``temperature`` is not a number.
        """
        temperature = check_temperature("Experiences.attention", temperature)
        if self.distances is None:
            raise ValueError("Experiences.attention: there are no distances, the items do not come from retrieve")
        return torch.softmax(-self.distances / temperature, dim=-1)

    def read(self, values: Selector, temperature: float = 1.0) -> Tensor:
        """Return the mean of ``values`` over the items, weighted by :meth:`attention`: ``(*item shape)``.

        After a search with several queries the shape is ``(queries, *item shape)``. The mean is differentiable with
        respect to the query. If there are no items, it is 0.

        Args:
            values: a selector of floating values, as in :meth:`batch`.
            temperature: of the attention. A small one selects the nearest item, a large one gives all equal weight.

        Raises:
            ValueError: as :meth:`attention` and :meth:`batch`, or the values are ragged.
            TypeError: as :meth:`attention` and :meth:`batch`, or the values are not floating.

        Source: the soft read of Graves et al., "Neural Turing machines", 2014, over the k nearest only (Rae et al.,
        "Scaling memory-augmented neural networks with sparse reads and writes", 2016).

        >>> import torch
        >>> from eaml_ext.experience import ExperienceBuffer
        >>> buffer = ExperienceBuffer(100)
        >>> buffer.add(value=torch.tensor([1.0, 3.0, 100.0]), context_embedding=torch.tensor([[-1.0], [1.0], [50.0]]))
        >>> query = torch.zeros(1, requires_grad=True)
        >>> read = buffer.retrieve(query, k=2).read("value")
        >>> read.item(), torch.autograd.grad(read, query)[0].item()  # a larger query is nearer to the item of value 3
        (2.0, 2.0)
        """
        weights = self.attention(temperature)
        chosen = self._select("values", values, ("value", "value"), where="Experiences.read")
        if not chosen.is_floating_point():
            raise TypeError(
                f"Experiences.read: values must be floating, got {str(chosen.dtype).removeprefix('torch.')}"
            )
        if self.ragged and self._is_ragged(values, chosen):
            raise ValueError("Experiences.read: values must not be ragged, because a mean would include padding")
        weights = weights.to(chosen.dtype).reshape(*weights.shape, *[1] * (chosen.dim() - weights.dim()))
        return (weights * chosen).sum(self.indices.dim() - 1)

    def _is_ragged(self, selector: Selector | None, value: Tensor) -> bool:
        """Return whether ``value``, which ``selector`` gave, has a time dimension that the mask describes."""
        if callable(selector):
            dims = self.fields["mask"].dim()
            if value.shape[:dims] != self.fields["mask"].shape:
                return False
            # Another dimension may have the size of time by chance, so time is made one step longer.
            longer = self._with_one_more_step()
            return selector(longer).shape[:dims] == longer.fields["mask"].shape
        names = [selector] if isinstance(selector, str) else selector
        if names is None:
            names = ["next_state" if "next_state" in self.fields else "target"]
        return any(name in self.ragged for name in names)

    def _with_one_more_step(self) -> Experiences:
        """Return the same items with one more step of padding."""
        time = self.indices.dim()

        def pad(value: Tensor) -> Tensor:
            return torch.cat([value, value.new_zeros(*value.shape[:time], 1, *value.shape[time + 1 :])], dim=time)

        ragged = (*self.ragged, "mask")
        fields = {name: pad(value) if name in ragged else value for name, value in self.fields.items()}
        return Experiences(fields, self.indices, self.generations, self.distances, self.ragged)

    def _select(
        self, argument: str, selector: Selector | None, default: tuple[str, str], where: str = "Experiences.batch"
    ) -> Tensor:
        where = f"{where}: {argument}"
        if selector is None:
            selector = next((name for name in default if name in self.fields), default[0])
        if callable(selector):
            value = selector(self)
            if not isinstance(value, Tensor):
                raise TypeError(f"{where} must return a torch.Tensor, got {type(value).__name__}")
            if value.shape[: self.indices.dim()] != self.indices.shape:
                raise ValueError(f"{where} returned shape {tuple(value.shape)} for {tuple(self.indices.shape)} items")
            return value
        names = (selector,) if isinstance(selector, str) else tuple(selector)
        for name in names:
            if name not in self.fields:
                raise ValueError(f"{where} names {name!r}, the stored fields are {', '.join(self.fields)}")
        if len(names) == 1:
            return self.fields[names[0]]
        parts = [self.fields[name] for name in names]
        max_dim = max(part.dim() for part in parts)
        parts = [(part if part.dim() == max_dim else part.unsqueeze(-1)).to(parts[0].dtype) for part in parts]
        if any(part.shape[:-1] != parts[0].shape[:-1] for part in parts):
            shapes = ", ".join(f"{name} {tuple(self.fields[name].shape)}" for name in names)
            raise ValueError(f"{where} cannot be concatenated along the last dimension: {shapes}")
        return torch.cat(parts, dim=-1)


def check_temperature(where: str, temperature: Any) -> float:
    temperature = _check.positive(where, "temperature", temperature)
    if math.isinf(temperature):
        raise ValueError(f"{where}: temperature must be finite, got {temperature!r}")
    return float(temperature)
