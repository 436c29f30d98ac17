"""Baselines for the SSM, as cores of the same policy: no memory, a window of four frames, a GRU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FRAMES = 4


class Memoryless(nn.Module):
    """Two layers on the present input."""

    state_shape = (0,)

    def __init__(self, dim: int, state_size: int = 0):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))

    def scan(self, x: Tensor, state: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.net(x), x.new_zeros(len(x), 0)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x), state


class Frames(nn.Module):
    """Two layers on the last four inputs; zeros stand where the sequence has not begun."""

    def __init__(self, dim: int, state_size: int = 0):
        super().__init__()
        self.state_shape = (FRAMES - 1, dim)
        self.net = nn.Sequential(nn.Linear(FRAMES * dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))

    def scan(self, x: Tensor, state: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        batch, time = x.shape[:2]
        state = x.new_zeros(batch, *self.state_shape) if state is None else state
        reset = torch.zeros(batch, time, dtype=torch.bool, device=x.device) if reset is None else reset
        frames = torch.cat([state, x], dim=1)
        episode = F.pad(reset.long().cumsum(1), (FRAMES - 1, 0))
        same = episode.unfold(1, FRAMES, 1) == episode[:, FRAMES - 1 :, None]  # (batch, time, FRAMES)
        window = frames.unfold(1, FRAMES, 1).mT * same.unsqueeze(-1)
        last = frames[:, time:] * (episode[:, time:] == episode[:, -1:]).unsqueeze(-1)
        return self.net(window.flatten(2)), last

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        frames = torch.cat([state, x.unsqueeze(1)], dim=1)
        return self.net(frames.flatten(1)), frames[:, 1:]


class GRU(nn.Module):
    """torch.nn.GRU, which knows of no resets inside a sequence: they may stand at its start only."""

    def __init__(self, dim: int, state_size: int = 0):
        super().__init__()
        self.state_shape = (dim,)
        self.gru = nn.GRU(dim, dim, batch_first=True)

    def scan(self, x: Tensor, state: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state = x.new_zeros(len(x), *self.state_shape) if state is None else state
        if reset is not None:
            if reset[:, 1:].any():
                raise ValueError("GRU.scan: reset must be False after the first step, torch.nn.GRU cannot be reset")
            state = state.masked_fill(reset[:, :1], 0.0)
        y, state = self.gru(x, state.unsqueeze(0))
        return y, state.squeeze(0)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.scan(x.unsqueeze(1), state)
        return y.squeeze(1), state
