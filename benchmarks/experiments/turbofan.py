"""C-MAPSS FD001: sensors of turbofan engines, their remaining cycles, and the scores of predictions.

Files and formats are those of A. Saxena and K. Goebel (2008), "Turbofan Engine Degradation Simulation Data Set", NASA
Prognostics Data Repository. Training engines run until they fail; test engines stop some cycles before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.experiments.runs import open_data

SENSORS = (2, 3, 4, 7, 8, 9, 11, 12, 13, 14, 15, 17, 20, 21)  # the other seven are constant in FD001
CAP = 125.0  # cycles; labels above it are cut in training, as in the published results
HELD_OUT = 20  # training engines for validation
FIRST_SCORED = 30  # cycles of a validation engine before its first prediction; test engines have 31 or more

# Columns of a target: the next row of sensors, whether there is one, and the capped label of remaining cycles. The
# inner loss reads the label only where SHOWN is 1, which it is on chunks of past engines alone.
NEXT, HAS_NEXT, LABEL, SHOWN = slice(0, len(SENSORS)), len(SENSORS), len(SENSORS) + 1, len(SENSORS) + 2


@dataclass(frozen=True)
class Engines:
    """Sensors ``(time, 14)`` and remaining cycles ``(time,)`` of each engine, not normalised and not capped."""

    sensors: list[Tensor]
    remaining: list[Tensor]

    def pick(self, numbers: Sequence[int]) -> "Engines":
        return Engines([self.sensors[i] for i in numbers], [self.remaining[i] for i in numbers])


class Scale(NamedTuple):
    """Mean and standard deviation of each sensor ``(14,)``."""

    mean: Tensor
    std: Tensor


class Batch(NamedTuple):
    """Engines as padded rows: input ``(engines, time, 15)``, target ``(engines, time, 17)`` and lengths."""

    x: Tensor
    y: Tensor
    lengths: Tensor

    def pick(self, numbers: Tensor) -> "Batch":
        """Return some engines, padded to the longest of them."""
        time = int(self.lengths[numbers].max())
        return Batch(self.x[numbers, :time], self.y[numbers, :time], self.lengths[numbers])


def _rows(directory: Path, name: str) -> Tensor:
    with open_data(directory, name) as file:
        return torch.tensor([[float(field) for field in line.split()] for line in file if line.strip()])


def read(directory: Path) -> tuple[Engines, Engines]:
    """Return the engines of training and test."""
    sets = []
    for part in ("train", "test"):
        rows = _rows(directory, f"{part}_FD001.txt")
        units = rows[:, 0].long()
        sensors = [rows[units == unit][:, [4 + s for s in SENSORS]] for unit in units.unique()]
        last = _rows(directory, "RUL_FD001.txt")[:, 0] if part == "test" else torch.zeros(len(sensors))
        cycles = [torch.arange(len(one) - 1, -1, -1.0) for one in sensors]
        sets.append(Engines(sensors, [c + end for c, end in zip(cycles, last, strict=True)]))
    return sets[0], sets[1]


def split(train: Engines, seed: int, held_out: int = HELD_OUT) -> tuple[Engines, Engines]:
    """Return the engines to fit and those held out, drawn by the seed."""
    order = torch.randperm(len(train.sensors), generator=torch.Generator().manual_seed(seed)).tolist()
    return train.pick(sorted(order[held_out:])), train.pick(sorted(order[:held_out]))


def scale(engines: Engines) -> Scale:
    rows = torch.cat(engines.sensors)
    return Scale(rows.mean(0), rows.std(0))


def batch(engines: Engines, by: Scale, labels: bool) -> Batch:
    """Return normalised engines; without ``labels`` those in the targets are NaN.

    The input is the sensors and the cycle in hundreds, minus one.
    """
    xs, ys = [], []
    for sensors, remaining in zip(engines.sensors, engines.remaining, strict=True):
        z = (sensors - by.mean) / by.std
        steps = torch.arange(1.0, len(z) + 1)
        following = torch.cat([z[1:], z[-1:]])
        known = (steps < len(z)).float()
        label = remaining.clamp(max=CAP) / CAP - 0.5 if labels else torch.full_like(remaining, torch.nan)
        xs.append(torch.cat([z, steps.unsqueeze(1) / 100 - 1], 1))
        ys.append(torch.cat([following, torch.stack([known, label, torch.zeros_like(label)], 1)], 1))
    lengths = torch.tensor([len(x) for x in xs])
    return Batch(pad_sequence(xs, batch_first=True), pad_sequence(ys, batch_first=True), lengths)


def chunks(engines: Batch, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return all whole chunks ``(n, size, ...)`` of x and of y with shown labels, and their engines ``(n,)``."""
    xs, ys, owners = [], [], []
    for i, length in enumerate(engines.lengths.tolist()):
        for start in range(length % size, length, size):  # from the end, so that failures are among them
            xs.append(engines.x[i, start : start + size])
            ys.append(engines.y[i, start : start + size])
            owners.append(i)
    y = torch.stack(ys)
    y[..., SHOWN] = 1
    return torch.stack(xs), y, torch.tensor(owners)


# --- scores ----------------------------------------------------------------------------------------------------------


def nasa_score(predicted: Tensor, remaining: Tensor) -> float:
    """sum_i exp(d_i / 10) - 1 where d_i >= 0, exp(-d_i / 13) - 1 elsewhere, with d = predicted - remaining."""
    d = (predicted - remaining).double()
    return float(torch.expm1(torch.where(d < 0, -d / 13, d / 10)).sum())


def scores(predicted: Tensor, remaining: Tensor) -> dict[str, float]:
    """RMSE and NASA's score in cycles, against capped labels and against labels as they are."""
    found = {}
    for suffix, labels in (("", remaining.clamp(max=CAP)), (" uncapped", remaining)):
        found[f"rmse{suffix}"] = float((predicted - labels).double().square().mean().sqrt())
        found[f"score{suffix}"] = nasa_score(predicted, labels)
    return {name: round(value, 4) for name, value in found.items()}


def last_predictions(predicted: Tensor, engines: Engines) -> tuple[Tensor, Tensor]:
    """Return prediction and label after the last row of each engine."""
    ends = torch.tensor([len(r) - 1 for r in engines.remaining])
    return predicted[torch.arange(len(ends)), ends], torch.stack([r[-1] for r in engines.remaining])


def truncated_predictions(predicted: Tensor, engines: Engines) -> tuple[Tensor, Tensor]:
    """Return prediction and label at every cycle at which an engine may be cut: the mean over all random cuts."""
    pairs = [(p[FIRST_SCORED : len(r)], r[FIRST_SCORED:]) for p, r in zip(predicted, engines.remaining, strict=True)]
    return torch.cat([p for p, _ in pairs]), torch.cat([r for _, r in pairs])
