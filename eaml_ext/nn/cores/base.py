"""What cores share: one step as a scan over it, states that do not change in time, heads."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from eaml_ext import _check
from eaml_ext._renamed import core_parameters
from eaml_ext.ops._sizes import check_size


class Core(nn.Module):  # not an ABC: libraries that derive classes from a module's type need the metaclass ``type``
    """A sequence mixer of one width; see :mod:`eaml_ext.nn.cores` for the contract."""

    state_shape: tuple[int, ...]

    def __init__(self, dim: int, state_size: int):
        super().__init__()
        where = type(self).__name__
        self.dim, self.state_size = check_size(where, "dim", dim), check_size(where, "state_size", state_size)

    def scan(
        self, x: Tensor, state: Tensor | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``x`` (batch, time, dim), ``state`` (batch, *state_shape), ``reset`` (batch, time) bool -> (y, state)."""
        raise NotImplementedError(f"{type(self).__name__}: scan is not defined")

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` (batch, dim), ``state`` (batch, *state_shape) -> (y, state): one step of :meth:`scan`."""
        y, state = self.scan(x.unsqueeze(1), state)
        return y.squeeze(1), state

    def forward(
        self, x: Tensor, state: Tensor | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """:meth:`step` of 2-D ``x``, which needs a state, and :meth:`scan` of 3-D ``x``."""
        if x.dim() != 2:
            return self.scan(x, state, reset, lengths)
        _check.tensor(type(self).__name__, "state", state)
        assert state is not None
        return self.step(x, state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for old, new in core_parameters(state_dict, prefix).items():
            state_dict[new] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _step_sizes(self, size: int, dt_min: float, dt_max: float) -> Tensor:
        """Initial step sizes, log-uniform in [dt_min, dt_max]."""
        where = type(self).__name__
        dt_min, dt_max = _check.positive(where, "dt_min", dt_min), _check.positive(where, "dt_max", dt_max)
        if not dt_min <= dt_max < math.inf:
            raise ValueError(f"{where}: dt_max must be finite and at least dt_min, {dt_min}, got {dt_max}")
        return torch.exp(torch.empty(size).uniform_(math.log(dt_min), math.log(dt_max)))

    def _heads(self, num_heads: int | None, smallest: int = 1) -> tuple[int, int]:
        """How many heads and how wide; of about 16 channels, one vector of the kernel, if nothing is asked for."""
        where = type(self).__name__
        if num_heads is None:
            num_heads = math.gcd(self.dim, max(1, self.dim // 16))
        num_heads = check_size(where, "num_heads", num_heads)
        if self.dim % num_heads or self.dim // num_heads < smallest:
            wanted = f"divide dim {self.dim}" + f" into heads of {smallest} channels or more" * (smallest > 1)
            raise ValueError(f"{where}: num_heads must {wanted}, got {num_heads}")
        return num_heads, self.dim // num_heads
