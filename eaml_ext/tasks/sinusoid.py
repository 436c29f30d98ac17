"""y = amplitude * sin(x - phase) + noise: the regression tasks of MAML (Finn, Abbeel & Levine 2017, section 5.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from eaml_ext import _check
from eaml_ext._random import check_seed
from eaml_ext.tasks.base import SampledTasks, Task, check_sample, task_stream

AMPLITUDES = (0.1, 5.0)
PHASES = (0.0, math.pi)
INPUTS = (-5.0, 5.0)
"""The uniform range of amplitude, phase and input, as in the paper."""


@dataclass(frozen=True)
class SinusoidTask(Task):
    """One sinusoid; each call of :meth:`sample` draws ``shots`` support points and ``queries`` query points.

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
        """Draw support and query points from torch's global generator.

        Returns:
            ``support_x``, ``support_y``: ``(shots, 1)``; ``query_x``, ``query_y``: ``(queries, 1)``.
        """
        x = torch.empty(self.shots + self.queries, 1).uniform_(*INPUTS)
        y = self.amplitude * torch.sin(x - self.phase) + self.noise * torch.randn_like(x)
        return x[: self.shots], y[: self.shots], x[self.shots :], y[self.shots :]

    loss = staticmethod(mse_loss)


class SinusoidTasks(SampledTasks[SinusoidTask]):
    """Sinusoids whose amplitude, phase and inputs are uniform in ``AMPLITUDES``, ``PHASES`` and ``INPUTS``.

    The version in ``name`` fixes ranges and seeding.

    Args:
        shots: support points of a task.
        queries: query points. Default: ``shots``.
        noise: standard deviation of the Gaussian noise on every y, of support and query points.
        amplitudes: another range of amplitudes than MAML's; it becomes part of ``name``.

    Raises:
        TypeError, ValueError: an argument has another type or is out of its range.

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

    def _draw_tasks(self, ids: Sequence[str], split: str, seed: int, epoch: int) -> list[SinusoidTask]:
        parameters = self._parameters(len(ids), split, seed, epoch).tolist()
        return [
            SinusoidTask(task_id, split, amplitude, phase, self.noise, self.shots, self.queries)
            for task_id, (amplitude, phase) in zip(ids, parameters, strict=True)
        ]

    def draw(
        self, n: int, split: str = "train", seed: int = 0, epoch: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw the data of the tasks that :meth:`sample` returns for the same arguments.

        Args:
            n: number of tasks, at least 0; the data of task i do not depend on it.
            split: "train", "valid" or "test".
            seed, epoch: in [0, 2**32).

        Returns:
            ``support_x``, ``support_y``: ``(n, shots, 1)``; ``query_x``, ``query_y``: ``(n, queries, 1)``; float32.

        Raises:
            TypeError, ValueError: an argument has another type or is out of its range.
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
        """Return mean squared errors on query points of ``n`` test tasks: two upper baselines and a lower bound.

        - ``"zero"``: predict 0.
        - ``"mean"``: predict the mean function of the distribution, the best prediction without adaptation.
        - ``"bayes"``: predict the posterior mean given the support set, by quadrature over amplitude and phase. No
          learner without knowledge of the task is better on average. It is 0 without noise, because two points then
          identify the task. With one or two shots and noise below 0.003 it is too large, because the posterior is
          narrower than the grid.

        Args:
            n: test tasks, > 0.
            seed: in [0, 2**32).

        Raises:
            TypeError, ValueError: an argument has another type or is out of its range, or there is one shot without
                noise.

        >>> baselines = SinusoidTasks(shots=5).baselines()
        >>> baselines["bayes"] < baselines["mean"] < baselines["zero"]
        True
        """
        n = _check.positive("SinusoidTasks.baselines", "n", n, integer=True)
        seed = check_seed("SinusoidTasks.baselines", "seed", seed)
        if not self.noise and self.shots < 2:
            raise ValueError("SinusoidTasks.baselines: shots must be at least 2 where noise is 0, got 1")
        support_x, support_y, query_x, query_y = (t.squeeze(-1).double() for t in self.draw(n, "test", seed))
        mean = sum(self.amplitudes) / 2 * _mean_sine(query_x)
        baselines = {
            "zero": float(query_y.square().mean()),
            "mean": float((query_y - mean).square().mean()),
            "bayes": 0.0,
        }
        if self.noise:
            midpoints = (torch.arange(128).double() + 0.5) / 128
            error = 0.0
            for sx, sy, qx, qy in zip(support_x, support_y, query_x, query_y, strict=True):
                # A grid of 128 x 128 cells shrinks towards the posterior until its cells are smaller than that.
                low, high = torch.tensor([self.amplitudes, PHASES], dtype=torch.float64).T
                for _ in range(4):
                    cell = (high - low) / len(midpoints)
                    grid = torch.cartesian_prod(*(low + (high - low) * midpoints[:, None]).T)
                    a, p = grid.T
                    # a sin(x - p) is linear in (a cos p, a sin p), so that a cell costs a product instead of a sine.
                    cells = torch.stack([a * p.cos(), -a * p.sin()])
                    residual = torch.stack([sx.sin(), sx.cos()], 1) @ cells - sy[:, None]
                    posterior = torch.softmax(-residual.square().sum(0) / (2 * self.noise**2), 0)
                    center = posterior @ grid
                    radius = 8 * (posterior @ (grid - center).square()).sqrt() + 4 * cell
                    low, high = torch.maximum(low, center - radius), torch.minimum(high, center + radius)
                weights = cells @ posterior
                error += float((torch.stack([qx.sin(), qx.cos()], 1) @ weights - qy).square().mean())
            baselines["bayes"] = error / n
        return baselines

    def _parameters(self, n: int, split: str, seed: int, epoch: int) -> np.ndarray:
        """Return amplitude and phase of each task, ``(n, 2)``."""
        low, high = np.array([self.amplitudes, PHASES]).T
        return np.asarray(low + (high - low) * _generator(split, seed, epoch, 0).random((n, 2)))


def _mean_sine(x: Tensor) -> Tensor:
    """Return the mean of sin(x - phase) over the phases."""
    low, high = PHASES
    return (torch.cos(x - high) - torch.cos(x - low)) / (high - low)


def _generator(split: str, seed: int, epoch: int, word: int) -> np.random.Generator:
    """Return the generator of one stream, which draws the numbers of all tasks in their order."""
    return np.random.default_rng(task_stream(split, seed, epoch, word))
