"""Data of benchmarks.experiments.forecasting: series, splits, windows and the rows that others published."""

import csv
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.experiments.runs import open_data

HORIZON = 96
DAY = 24

# MSE and MAE of 96 -> 96 by (data set, model), at look-back 96. 2310.06625 is iTransformer, table 10; its figures are
# printed again in 2403.11144 (S-Mamba), from which they were read. 2501.04970 is TAFAS and 2506.23424 is PETSA: the
# best row over backbones. They were read from an index of results (wizwand.com), not from the papers' tables, and have
# no MAE there. Both papers split ETT as 60/20/20 % of all 17,420 rows, so their rows stand beside that split alone.
PUBLISHED: dict[str, dict[str, tuple[float, float | None, str]]] = {
    "ETTh1": {
        "DLinear": (0.386, 0.400, "2310.06625"),
        "PatchTST": (0.414, 0.419, "2310.06625"),
        "iTransformer": (0.386, 0.405, "2310.06625"),
    },
    "ETTh2": {
        "DLinear": (0.333, 0.387, "2310.06625"),
        "PatchTST": (0.302, 0.348, "2310.06625"),
        "iTransformer": (0.297, 0.349, "2310.06625"),
    },
    "Exchange": {
        "DLinear": (0.088, 0.218, "2310.06625"),
        "PatchTST": (0.088, 0.205, "2310.06625"),
        "iTransformer": (0.086, 0.206, "2310.06625"),
        "TAFAS": (0.0796, None, "2501.04970"),
        "PETSA": (0.0813, None, "2506.23424"),
    },
    "ETTh1 60/20/20": {"TAFAS": (0.427, None, "2501.04970"), "PETSA": (0.4255, None, "2506.23424")},
    "ETTh2 60/20/20": {"TAFAS": (0.2289, None, "2501.04970"), "PETSA": (0.2293, None, "2506.23424")},
}
DATASETS = tuple(PUBLISHED)


class Series(NamedTuple):
    """A standardised series.

    Attributes:
        values: ``(time, channels)``, with the mean and standard deviation of the training part.
        borders: where the training part, the validation part and the test part end.
        period: steps of the cycle.
    """

    values: Tensor
    borders: tuple[int, int, int]
    period: int

    def targets(self, split: str) -> tuple[int, int]:
        """Return the first step of the targets of a split and the step after the last."""
        k = ("train", "valid", "test").index(split)
        return (0, *self.borders)[k], self.borders[k]


def read(directory: Path, dataset: str) -> Series:
    """Read a data set and standardise it by its training part."""
    name, _, percent = dataset.partition(" ")
    if name == "Exchange":
        with open_data(directory, "exchange_rate.txt") as file:
            rows = [[float(v) for v in line] for line in csv.reader(file)]
    else:
        with open_data(directory, f"{name}.csv") as file:
            rows = [[float(v) for v in line[1:]] for line in list(csv.reader(file))[1:]]
    values, n = torch.tensor(rows, dtype=torch.float64), len(rows)
    borders = (8640, 11520, 14400)  # 12, 4 and 4 months
    if percent or name == "Exchange":
        borders = int((0.6 if percent else 0.7) * n), n - int(0.2 * n), n
    train = values[: borders[0]]
    values = (values - train.mean(0)) / train.std(0, correction=0)
    return Series(values.float(), borders, 1 if name == "Exchange" else DAY)


def windows(series: Series, first: int, last: int, look_back: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of the forecast origins ``first, ..., last - 1``.

    Args:
        series: the series.
        first: the origin, the last step seen, of the first window; at least ``look_back - 1``.
        last: the origin after the last; at most ``len(values) - HORIZON``.
        look_back: values that a window sees.

    Returns:
        ``(origins, 1 + look_back, channels)``: the phase of the first value seen, then the values; and
        ``(origins, HORIZON, channels)``: the values after the origin.
    """
    start = first - look_back + 1
    cut = series.values[start : last + HORIZON].unfold(0, look_back + HORIZON, 1).transpose(1, 2)
    phase = (torch.arange(start, start + len(cut)) % series.period).float()
    phase = phase.view(-1, 1, 1).expand(-1, 1, cut.shape[2])
    return torch.cat([phase, cut[:, :look_back]], 1), cut[:, look_back:].contiguous()
