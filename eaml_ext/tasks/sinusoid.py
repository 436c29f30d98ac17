"""y = amplitude * sin(x - phase) + noise: the regression tasks of MAML (Finn, Abbeel & Levine 2017, section 5.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from eaml_ext import _check
from eaml_ext._random import check_seed
from eaml_ext.tasks.base import Task, check_sample, task_stream

AMPLITUDES = (0.1, 5.0)
PHASES = (0.0, math.pi)
INPUTS = (-5.0, 5.0)
"""The uniform range of amplitude, phase and input, as in the paper."""


@dataclass(frozen=True)
class SinusoidTask(Task):
    """One sinusoid, with ``shots`` support points and ``queries`` query points at each draw.

    >>> support_x, support_y, query_x, query_y = SinusoidTasks(shots=5).sample(1)[0].sample()
    >>> support_x.shape, query_y.shape
    (torch.Size([5, 1]), torch.Size([5, 1]))
    """

    amplitude: float
    phase: float
    noise: float
    shots: int
    queries: int

    def sample(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(support_x, support_y, query_x, query_y)``, each ``(points, 1)``, from torch's global generator."""
        x = torch.empty(self.shots + self.queries, 1).uniform_(*INPUTS)
        y = self.amplitude * torch.sin(x - self.phase) + self.noise * torch.randn_like(x)
        return x[: self.shots], y[: self.shots], x[self.shots :], y[self.shots :]

    loss = staticmethod(mse_loss)


class SinusoidTasks:
    """The distribution of sinusoids: amplitude, phase and inputs uniform in ``AMPLITUDES``, ``PHASES``, ``INPUTS``.

    Args:
        shots: support points of a task.
        queries: query points; None: as many as ``shots``.
        noise: standard deviation of the Gaussian noise on every y, support and query.
        amplitudes: the range of amplitudes, of other tasks than MAML's; it becomes part of ``name``.

    The version in ``name`` fixes ranges and seeding. Raises TypeError or ValueError naming the argument.

    >>> distribution = SinusoidTasks(shots=10)
    >>> distribution.sample(3, "test") == distribution.sample(5, "test")[:3]
    True
    >>> [tuple(t.shape) for t in distribution.draw(25, "train", seed=0, epoch=7)]
    [(25, 10, 1), (25, 10, 1), (25, 10, 1), (25, 10, 1)]
    """

    name = "sinusoid-v1"

    def __init__(
        self,
        shots: int = 5,
        queries: int | None = None,
        noise: float = 0.0,
        *,
        amplitudes: tuple[float, float] = AMPLITUDES,
    ):
        shots = _check.positive("SinusoidTasks", "shots", shots, integer=True)
        queries = shots if queries is None else _check.positive("SinusoidTasks", "queries", queries, integer=True)
        noise = _check.positive("SinusoidTasks", "noise", noise, zero=True)
        if math.isinf(noise):
            raise ValueError(f"SinusoidTasks: noise must be finite, got {noise!r}")
        if not isinstance(amplitudes, tuple) or len(amplitudes) != 2:
            raise TypeError(f"SinusoidTasks: amplitudes must be a pair (low, high), got {amplitudes!r}")
        for edge in amplitudes:
            _check.positive("SinusoidTasks", "amplitudes", edge, zero=True)
        if not amplitudes[0] < amplitudes[1] < math.inf:
            raise ValueError(f"SinusoidTasks: amplitudes must be finite and rise, got {amplitudes!r}")
        self.shots, self.queries, self.noise = shots, queries, float(noise)
        self.amplitudes = (float(amplitudes[0]), float(amplitudes[1]))
        if self.amplitudes != AMPLITUDES:
            self.name = f"{self.name}-amplitude-{self.amplitudes[0]:g}-{self.amplitudes[1]:g}"

    def __repr__(self) -> str:
        amplitudes = f", amplitudes={self.amplitudes}" if self.amplitudes != AMPLITUDES else ""
        return f"SinusoidTasks(shots={self.shots}, queries={self.queries}, noise={self.noise}{amplitudes})"

    def sample(self, n: int, split: str = "train", seed: int = 0, epoch: int = 0) -> list[SinusoidTask]:
        """The first ``n`` tasks of the stream (split, seed, epoch), a pure function of its arguments.

        ``split`` is "train", "valid" or "test"; ``seed`` and ``epoch`` are integers in [0, 2**32). Task i is the same
        whatever ``n``. Raises TypeError or ValueError naming the argument.
        """
        n, split, seed, epoch = check_sample("SinusoidTasks.sample", n, split, seed, epoch)
        return [
            SinusoidTask(
                f"{self.name}/{split}/{seed}/{epoch}/{i}", split, amplitude, phase, self.noise, self.shots, self.queries
            )
            for i, (amplitude, phase) in enumerate(self._parameters(n, split, seed, epoch).tolist())
        ]

    def draw(
        self, n: int, split: str = "train", seed: int = 0, epoch: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One draw of data of the tasks that :meth:`sample` gives, stacked: support_x, support_y, query_x, query_y.

        Each is float32 ``(n, points, 1)``; the data of task i are the same whatever ``n``.
        """
        n, split, seed, epoch = check_sample("SinusoidTasks.draw", n, split, seed, epoch)
        amplitude, phase = self._parameters(n, split, seed, epoch).T[..., None]
        points, low = self.shots + self.queries, INPUTS[0]
        x = low + (INPUTS[1] - low) * _generator(split, seed, epoch, 1).random((n, points))
        y = amplitude * np.sin(x - phase)
        if self.noise:
            y = y + self.noise * _generator(split, seed, epoch, 2).standard_normal((n, points))
        inputs, targets = (torch.from_numpy(v).float().unsqueeze(-1) for v in (x, y))
        (support_x, query_x), (support_y, query_y) = (t.tensor_split([self.shots], 1) for t in (inputs, targets))
        return support_x, support_y, query_x, query_y

    def baselines(self, n: int = 2000, seed: int = 0) -> dict[str, float]:
        """Mean squared errors on query points between which any learner's lies, over ``n`` test tasks.

        ``zero`` predicts 0 and ``mean`` the mean function of the distribution (the best without adaptation);
        ``bayes`` is the posterior mean given the support set, by quadrature over amplitude and phase: no learner that
        does not know the task is better, on average (with one or two shots and noise below 0.003 the posterior is
        thinner than the grid, and the value too large). Without noise two points tell the task, and it is 0.

        Raises TypeError or ValueError naming the argument; ValueError for one shot without noise.

        >>> baselines = SinusoidTasks(shots=5).baselines()
        >>> baselines["bayes"] < baselines["mean"] < baselines["zero"]
        True
        """
        n = _check.positive("SinusoidTasks.baselines", "n", n, integer=True)
        seed = check_seed("SinusoidTasks.baselines", "seed", seed)
        if not self.noise and self.shots < 2:
            raise ValueError("SinusoidTasks.baselines: shots must be at least 2 where noise is 0, got 1")
        support_x, support_y, query_x, query_y = (t.squeeze(-1).double() for t in self.draw(n, "test", seed))
        mean = sum(self.amplitudes) / 2 * _sine_of_mean_phase(query_x)
        baselines = {
            "zero": float(query_y.square().mean()),
            "mean": float((query_y - mean).square().mean()),
            "bayes": 0.0,
        }
        if self.noise:
            places = (torch.arange(128).double() + 0.5) / 128
            error = 0.0
            for sx, sy, qx, qy in zip(support_x, support_y, query_x, query_y, strict=True):
                # A grid of 128 x 128 cells, drawn closer around the posterior until its cells are finer than that.
                low, high = torch.tensor([self.amplitudes, PHASES], dtype=torch.float64).T
                for _ in range(4):
                    cell = (high - low) / len(places)
                    grid = torch.cartesian_prod(*(low + (high - low) * places[:, None]).T)
                    a, p = grid.T
                    # a sin(x - p) is linear in (a cos p, a sin p): a product instead of a sine for each cell.
                    cells = torch.stack([a * p.cos(), -a * p.sin()])
                    misfit = torch.stack([sx.sin(), sx.cos()], 1) @ cells - sy[:, None]
                    posterior = torch.softmax(-misfit.square().sum(0) / (2 * self.noise**2), 0)
                    middle = posterior @ grid
                    around = 8 * (posterior @ (grid - middle).square()).sqrt() + 4 * cell
                    low, high = torch.maximum(low, middle - around), torch.minimum(high, middle + around)
                weights = cells @ posterior
                error += float((torch.stack([qx.sin(), qx.cos()], 1) @ weights - qy).square().mean())
            baselines["bayes"] = error / n
        return baselines

    def _parameters(self, n: int, split: str, seed: int, epoch: int) -> np.ndarray:
        """Amplitude and phase of each task, ``(n, 2)``."""
        low, high = np.array([self.amplitudes, PHASES]).T
        return np.asarray(low + (high - low) * _generator(split, seed, epoch, 0).random((n, 2)))


def _sine_of_mean_phase(x: Tensor) -> Tensor:
    """The mean of sin(x - phase) over the phases."""
    low, high = PHASES
    return (torch.cos(x - high) - torch.cos(x - low)) / (high - low)


def _generator(split: str, seed: int, epoch: int, word: int) -> np.random.Generator:
    """Numbers of one stream, task after task: the split is a word of its own, so no two splits share a stream."""
    return np.random.default_rng(task_stream(split, seed, epoch, word))
