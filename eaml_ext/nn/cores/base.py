"""Core: the base of all cores, with one step as a scan of length one, initial step sizes, and the number of heads."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from eaml_ext import _check
from eaml_ext._renamed import core_parameters
from eaml_ext.nn._step_size import check_dt_range
from eaml_ext.nn.padding import check_boundaries
from eaml_ext.ops._sizes import check_size


class Core(nn.Module):  # not an ABC: libraries that derive classes from a module's type need the metaclass ``type``
    """A sequence mixer of one width; see :mod:`eaml_ext.nn.cores` for the contract.

    Args:
        dim: width of input and output.
        state_size: states per channel, or per core where the channels share one state.

    Attributes:
        state_shape: shape of one row's state.
    """

    state_shape: tuple[int, ...]

    def __init__(self, dim: int, state_size: int):
        super().__init__()
        where = type(self).__name__
        self.dim, self.state_size = check_size(where, "dim", dim), check_size(where, "state_size", state_size)

    def scan(
        self,
        x: Tensor,
        state: Tensor | None = None,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run a sequence from a state.

        Args:
            x: ``(batch, length, dim)``, floating.
            state: ``(batch, *state_shape)``, floating, or ``(sequences, *state_shape)`` with ``cu_seqlens``; the state
                before the first step, zeros if absent.
            reset: ``(batch, length)``, bool; the state is zeroed before step t.
            lengths: ``(batch,)``, integer; row b has ``lengths[b]`` steps, after which its state stays.
            cu_seqlens: ``(sequences + 1,)``, int32; the boundaries of the sequences packed into the only row of ``x``,
                from 0 to ``length``. Excludes ``lengths``.
            seq_idx: ``(batch, length)``, int32 or int64; the state is zeroed where it changes. Excludes ``reset`` and
                ``cu_seqlens``.

        Returns:
            y ``(batch, length, dim)``, and the state after the last step of each row or packed sequence.
        """
        reset = check_boundaries(f"{type(self).__name__}.scan", x, reset, lengths, cu_seqlens, seq_idx)
        return self._run_scan(x, state, reset, lengths, cu_seqlens)

    def _run_scan(
        self,
        x: Tensor,
        state: Tensor | None,
        reset: Tensor | None,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Run :meth:`scan` on checked arguments."""
        raise NotImplementedError(f"{type(self).__name__}: scan is not defined")

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run one step of :meth:`scan`.

        Args:
            x: ``(batch, dim)``, floating.
            state: ``(batch, *state_shape)``, floating.

        Returns:
            y ``(batch, dim)``, and the next state.
        """
        y, state = self.scan(x.unsqueeze(1), state)
        return y.squeeze(1), state

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        **packing: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Run :meth:`step` for 2-D ``x``, which needs a state, and :meth:`scan` for 3-D ``x``."""
        if x.dim() != 2:  # a derived class may define scan without the arguments of packing
            return self.scan(x, state, reset, lengths, **packing)
        _check.tensor(type(self).__name__, "state", state)
        assert state is not None
        return self.step(x, state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = self._parameters.keys() | self._buffers.keys() | self._modules.keys()
        for old, new in core_parameters(state_dict, prefix).items():
            old_name, new_name = (key.removeprefix(prefix).partition(".")[0] for key in (old, new))
            if new_name in own and old_name not in own:  # a core derived from this class may use the old names
                state_dict[new] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _step_sizes(self, size: int, dt_min: float, dt_max: float) -> Tensor:
        """Draw ``(size,)`` initial step sizes, log-uniform in [dt_min, dt_max]."""
        dt_min, dt_max = check_dt_range(type(self).__name__, dt_min, dt_max)
        return torch.exp(torch.empty(size).uniform_(math.log(dt_min), math.log(dt_max)))

    def _heads(self, num_heads: int | None, smallest: int = 1) -> tuple[int, int]:
        """Return ``num_heads`` and ``head_dim``; None: heads of about 16 channels, one vector of the kernel."""
        where = type(self).__name__
        if num_heads is None:
            num_heads = math.gcd(self.dim, max(1, self.dim // 16))
        num_heads = check_size(where, "num_heads", num_heads)
        if self.dim % num_heads or self.dim // num_heads < smallest:
            wanted = f"divide dim {self.dim}" + f" into heads of {smallest} channels or more" * (smallest > 1)
            raise ValueError(f"{where}: num_heads must {wanted}, got {num_heads}")
        return num_heads, self.dim // num_heads
