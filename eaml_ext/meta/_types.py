"""Types that meta-learning and adaptation share."""

from collections.abc import Callable

from torch import Tensor

LossFn = Callable[[Tensor, Tensor], Tensor]
"""``(prediction, target) -> scalar``."""

Params = dict[str, Tensor]
"""Parameters by their names in the model."""
