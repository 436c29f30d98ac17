"""Models of benchmarks.experiments.forecasting: a linear map around a learned daily cycle, and its closed forms."""

import torch
from torch import Tensor, nn

from benchmarks.experiments.forecasting_data import HORIZON, Series, windows
from eaml_ext.ops import knn

RIDGE = 0.01  # relative to the mean squared deviation of 1 of a standardised channel


class CycleLinear(nn.Module):
    """``y = c_y + last + (1 + gain) W (x - c_x - last) + shift``: the same W for every channel.

    c is a cycle of each channel, learned and removed before the linear map, as in CycleNet (arXiv 2409.18479), and
    ``last`` the last value without its cycle. Parameters are stored divided by a scale, because one inner step size
    serves all of them: a scale s multiplies the step of a weight by s squared.

    Args:
        weight: ``(look_back, HORIZON)``, where W starts.
        channels: of the series.
        period: of the cycle.
    """

    SCALES = (("cycle", 15.0), ("shift", 3.0), ("gain", 1.5))

    def __init__(self, weight: Tensor, channels: int, period: int):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.cycle = nn.Parameter(torch.zeros(period, channels))
        self.shift = nn.Parameter(torch.zeros(HORIZON, channels))
        self.gain = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map windows ``(..., 1 + look_back, channels)`` to forecasts ``(..., HORIZON, channels)``."""
        cycle, shift, gain = (getattr(self, name) * scale for name, scale in self.SCALES)
        values, steps = x[..., 1:, :], torch.arange(x.shape[-2] - 1 + HORIZON)
        phases = (x[..., 0, 0].long().unsqueeze(-1) + steps) % len(cycle)
        seasonal = cycle[phases]
        look_back = values.shape[-2]
        level = values - seasonal[..., :look_back, :]
        last = level[..., -1:, :]
        change = torch.matmul((level - last).transpose(-1, -2), self.weight).transpose(-1, -2)
        return last + seasonal[..., look_back:, :] + (1 + gain) * change + shift


def ridge(series: Series, look_back: int, split: str = "train") -> Tensor:
    """Return W of the ridge regression of changes after the origin on changes before it, over a split's windows."""
    first, last = series.targets(split)
    x, y = windows(series, max(first, look_back) - 1, last - HORIZON, look_back)
    base = x[:, -1:]
    a = (x[:, 1:] - base).transpose(1, 2).flatten(0, 1)
    b = (y - base).transpose(1, 2).flatten(0, 1)
    gram = a.T @ a / len(a) + RIDGE * torch.eye(look_back)
    return torch.linalg.solve(gram, a.T @ b / len(a))


def lookup(series: Series, split: str, look_back: int, k: int, chunk: int) -> Tensor:
    """Forecast every window of a split by the mean of what followed the ``k`` most similar windows of the past.

    Windows of a channel are compared by their means over 4 steps, without the last value. A window is in the memory
    once its targets are known. Returns ``(origins, HORIZON, channels)``.
    """
    first, last = series.targets(split)
    start = look_back - 1
    x, y = windows(series, start, last - HORIZON, look_back)
    base = x[:, -1:]
    keys = (x[:, 1:] - base).unflatten(1, (-1, 4)).mean(2).permute(2, 0, 1).contiguous()  # (channels, origins, ...)
    changes = (y - base).permute(2, 0, 1)
    result = []
    for origin in range(first - 1, last - HORIZON, chunk):
        now = origin - start
        known = now - HORIZON + 1  # the last of these windows has its last target at the origin
        found = knn(keys[:, now : now + chunk], keys[:, :known], k).indices  # (channels, chunk, k)
        mean = torch.stack([c[i].mean(1) for c, i in zip(changes, found, strict=True)], 2)
        result.append(base[now : now + chunk] + mean)
    return torch.cat(result)
