"""The logistic function, with bits that do not depend on an element's place or on the number of threads."""

import math

import torch
from torch import Tensor


def sigmoid(x: Tensor) -> Tensor:
    """``1 / (1 + exp(-x))``.

    ``torch.sigmoid`` rounds the last elements of a thread's part in another way than the others; ``torch.exp`` does
    not.

    Args:
        x: any shape, floating.

    Returns:
        The shape and dtype of ``x``.

    >>> sigmoid(torch.tensor([-1000.0, 0.0, 1000.0]))[1:]
    tensor([0.5000, 1.0000])
    """
    # The bound, -80 in float32, keeps exp and its products finite: the gradients would be 0 times infinity.
    lowest = -math.floor(0.91 * math.log(torch.finfo(x.dtype).max))
    return 1 / (1 + torch.exp(-x.clamp(min=lowest)))
