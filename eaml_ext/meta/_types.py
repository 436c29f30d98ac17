"""Types that meta-learning and adaptation share."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

LossFn = Callable[[Tensor, Tensor], Tensor]
"""``(prediction, target) -> scalar``."""

Params = dict[str, Tensor]
"""Parameters by their names in the model."""

DataSet = Tensor | Sequence[Tensor]
"""``(n, ...)``, or n sequences ``(time_i, ...)`` of any lengths."""

Task = tuple[DataSet, DataSet, DataSet, DataSet]
"""``(support_x, support_y, query_x, query_y)``; x and y of a set have equally many rows, or sequences and steps."""


@runtime_checkable
class Stateful(Protocol):
    """An object whose state a checkpoint can hold."""

    def state_dict(self) -> Any:
        """Return a nest of dicts, lists, tuples, tensors and JSON values."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Restore what :meth:`state_dict` returned."""
