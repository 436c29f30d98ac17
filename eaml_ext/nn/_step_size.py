"""Initial step sizes of discretised state-space models: their range, and the bias whose softplus they are."""

import math
from typing import Any

import torch
from torch import Tensor

from eaml_ext import _check


def check_dt_range(where: str, dt_min: float, dt_max: float) -> tuple[float, float]:
    """Return both as Python numbers; raise unless ``0 < dt_min <= dt_max < inf``."""
    dt_min, dt_max = _check.positive(where, "dt_min", dt_min), _check.positive(where, "dt_max", dt_max)
    if not dt_min <= dt_max < math.inf:
        raise ValueError(f"{where}: dt_max must be finite and at least dt_min, {dt_min}, got {dt_max}")
    return dt_min, dt_max


def inverse_softplus(x: Tensor) -> Tensor:
    """``log(exp(x) - 1)`` of a positive x ``(*)``, exact for small x.

    >>> torch.nn.functional.softplus(inverse_softplus(torch.tensor([0.001]))).item()  # doctest: +ELLIPSIS
    0.00100...
    """
    return x + torch.log(-torch.expm1(-x))


def draw_step_sizes(size: int, dt_min: float, dt_max: float, floor: float, **factory: Any) -> Tensor:
    """Draw ``(size,)`` step sizes as mamba_ssm does: log-uniform in [dt_min, dt_max], then at least ``floor``.

    Args:
        size: number of step sizes.
        dt_min, dt_max: the range, positive.
        floor: the smallest value.
        factory: ``device`` and ``dtype`` of ``torch.rand``.
    """
    uniform = torch.rand(size, **factory)
    return torch.exp(uniform * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)).clamp(min=floor)
