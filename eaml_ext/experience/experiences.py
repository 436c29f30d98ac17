"""What a look into the memory returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# A stored field, several to be concatenated, or a function of the experiences.
Selector = str | Sequence[str] | Callable[["Experiences"], Tensor]


class Experiences:
    """Stored items, field by field; each field is an attribute: ``experiences.state``, ``experiences.action``, ...

    The data are copies: writing to the buffer afterwards does not change them.

    Attributes:
        fields: name to tensor ``(n, *item shape)``, in the dtypes stored; ``(queries, n, ...)`` after a search with
            several queries, where ``experiences[i]`` are those of query i.
        indices: int64 ``(n,)``, the slots they came from.
        generations: int64 ``(n,)``, how often each slot had been reused: with ``indices`` it names an item for good.
        distances: ``(n,)``, ascending, of a search; None otherwise.

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

    def __init__(
        self, fields: dict[str, Tensor], indices: Tensor, generations: Tensor, distances: Tensor | None = None
    ):
        self.fields = fields
        self.indices = indices
        self.generations = generations
        self.distances = distances

    def __getattr__(self, name: str) -> Tensor:
        fields = self.__dict__.get("fields", {})
        if name in fields:
            return fields[name]
        raise AttributeError(f"Experiences: there is no field {name!r}, the stored fields are {', '.join(fields)}")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Experiences:
        """The chosen items; an integer gives one item, its fields without the leading dimension."""
        return Experiences(
            {name: value[index] for name, value in self.fields.items()},
            self.indices[index],
            self.generations[index],
            None if self.distances is None else self.distances[index],
        )

    def __iter__(self) -> Iterator[Experiences]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name} {tuple(value.shape)}" for name, value in self.fields.items())
        return f"Experiences({fields})"

    def batch(self, states: Selector | None = None, targets: Selector | None = None) -> dict[str, Tensor]:
        """What the Adapter trains on: ``{"states": (n, ...), "targets": (n, ...)}``.

        Args:
            states: the name of a stored field; or several, concatenated along the last dimension in the dtype of the
                first (a field with one dimension fewer, a discrete action, counts as one column); or a function of the
                experiences that returns a tensor. Default: ``state``, or ``observation`` where items were added as
                ``(observation, target)``.
            targets: likewise. Default: ``next_state``, or ``target``.

        Raises:
            ValueError: a field is not stored, or a function returned another number of items.
            TypeError: a function did not return a tensor.
        """
        return {
            "states": self._select("states", states, ("state", "observation")),
            "targets": self._select("targets", targets, ("next_state", "target")),
        }

    def _select(self, argument: str, selector: Selector | None, default: tuple[str, str]) -> Tensor:
        where = f"Experiences.batch: {argument}"
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
        width = max(part.dim() for part in parts)
        parts = [(part if part.dim() == width else part.unsqueeze(-1)).to(parts[0].dtype) for part in parts]
        if any(part.shape[:-1] != parts[0].shape[:-1] for part in parts):
            shapes = ", ".join(f"{name} {tuple(self.fields[name].shape)}" for name in names)
            raise ValueError(f"{where} cannot be concatenated along the last dimension: {shapes}")
        return torch.cat(parts, dim=-1)
