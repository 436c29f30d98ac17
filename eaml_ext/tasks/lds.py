"""z_t = decay R(angles) z_{t-1} + w_t,  x_t = c C z_t + v_t: rotations of which a few mixed coordinates are seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eaml_ext import _check
from eaml_ext._random import check_seed
from eaml_ext.tasks import baselines
from eaml_ext.tasks.base import Task, check_sample, check_tasks, collection_stream, task_stream

ANGLES = (0.1, 1.5)
"""The log-uniform range of a rotation, in radians per step: periods of 63 to 4 steps."""


@dataclass(frozen=True)
class LDSTask(Task):
    """One linear dynamical system.

    ``angles``: one row per mode, the rotation of each plane in radians per step. ``observation``: C, ``obs_dim`` rows
    of length ``2 * planes``, orthonormal. ``decay``, ``noise``, ``stay``: as in :class:`LDSTasks`.
    """

    angles: tuple[tuple[float, ...], ...]
    observation: tuple[tuple[float, ...], ...]
    decay: float
    noise: float
    stay: float


@dataclass(frozen=True)
class LDSystem:
    """The matrices of tasks, float64: z_t = A z_{t-1} + w_t, x_t = C z_t + v_t, in a basis where z has variance 1.

    ``A`` ``(tasks, modes, n, n)``, ``C`` ``(tasks, obs_dim, n)``, ``Q`` ``(tasks, n, n)`` the covariance of w,
    ``R`` ``(tasks, obs_dim, obs_dim)`` that of v; the covariance of z is the identity, in every mode.
    """

    A: Tensor
    C: Tensor
    Q: Tensor
    R: Tensor


class LDSTasks:
    """Partially observed linear systems with a hidden rotation; with ``modes > 1`` the rotation switches.

    The latent state turns in ``planes`` planes, by angles that differ from task to task and are drawn log-uniformly
    from ``ANGLES``, while ``obs_dim`` of its coordinates are seen, mixed by a random orthonormal C of the task. One
    frame therefore says little about the next, and how to use several depends on the task. In a switching system
    every mode has angles of its own and a Markov chain chooses the mode of each step. The state is stationary and
    every observed coordinate has variance 1, so errors are in units of that variance: guessing 0 costs 1.

    Args:
        obs_dim: observed coordinates, fewer than ``2 * planes``.
        planes: planes of rotation; the state has ``2 * planes`` coordinates.
        modes: 1: linear; more: switching linear.
        stay: probability that the mode of a step is that of the step before, in [0, 1]; otherwise all others are
            equally likely.
        decay: factor by which the state shrinks per step, in (0, 1); noise of variance ``1 − decay²`` replaces it.
        noise: standard deviation of the observation noise, in [0, 1); ``noise²`` of an observation's variance is noise.

    ``name`` carries these numbers and the version, which fixes ranges and seeding.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of its range.

    >>> distribution = LDSTasks()
    >>> tasks = distribution.sample(3, split="train", seed=0)
    >>> x = distribution.simulate(tasks, sequences=5, length=20)[0]
    >>> x.shape  # (tasks, sequences, time, obs_dim)
    torch.Size([3, 5, 20, 2])
    >>> support_x, support_y = x[0, :, :-1], x[0, :, 1:]  # what a model learns: the next observation
    """

    def __init__(
        self,
        obs_dim: int = 2,
        planes: int = 2,
        *,
        modes: int = 1,
        stay: float = 0.98,
        decay: float = 0.99,
        noise: float = 0.1,
    ) -> None:
        obs_dim, planes, modes = (
            _check.positive("LDSTasks", name, value, integer=True)
            for name, value in (("obs_dim", obs_dim), ("planes", planes), ("modes", modes))
        )
        if obs_dim >= 2 * planes:
            raise ValueError(f"LDSTasks: obs_dim must be < 2 * planes = {2 * planes}, got {obs_dim}")
        for name, number, wanted in (("stay", stay, "[0, 1]"), ("decay", decay, "(0, 1)"), ("noise", noise, "[0, 1)")):
            _check.positive("LDSTasks", name, number, zero=wanted[0] == "[")
            if number > 1 or (number == 1 and wanted[-1] == ")"):
                raise ValueError(f"LDSTasks: {name} must be in {wanted}, got {number!r}")
        self.obs_dim, self.planes, self.modes = obs_dim, planes, modes
        self.stay, self.decay, self.noise = float(stay), float(decay), float(noise)
        kind = "LDS" if modes == 1 else f"SwitchingLDS-{modes}modes-stay{self.stay!r}"
        self.name = f"{kind}-{obs_dim}of{2 * planes}-decay{self.decay!r}-noise{self.noise!r}-v1"

    def sample(self, n: int, split: str = "train", seed: int = 0, epoch: int = 0) -> list[LDSTask]:
        """The first ``n`` tasks of the stream (split, seed, epoch), a pure function of its arguments.

        ``split`` is "train", "valid" or "test"; ``seed`` and ``epoch`` are integers in [0, 2**32). Task i is the same
        whatever ``n``. Raises TypeError or ValueError naming the argument.

        >>> LDSTasks().sample(2, "test") == LDSTasks().sample(3, "test")[:2]
        True
        """
        n, split, seed, epoch = check_sample("LDSTasks.sample", n, split, seed, epoch)
        low, high = ANGLES
        tasks = []
        for index in range(n):
            generator = np.random.default_rng(task_stream(split, seed, epoch, index))
            angles = low * (high / low) ** generator.random((self.modes, self.planes))
            basis = np.linalg.qr(generator.standard_normal((2 * self.planes, self.obs_dim)))[0].T
            tasks.append(
                LDSTask(
                    f"{self.name}/{split}/{seed}/{epoch}/{index}",
                    split,
                    tuple(map(tuple, angles.tolist())),
                    tuple(map(tuple, basis.tolist())),
                    self.decay,
                    self.noise,
                    self.stay,
                )
            )
        return tasks

    def system(self, tasks: Sequence[LDSTask]) -> LDSystem:
        """The matrices of ``tasks``, all of this distribution's sizes. Raises TypeError or ValueError otherwise."""
        self._check_tasks("LDSTasks.system", tasks)
        angles = torch.tensor([task.angles for task in tasks], dtype=torch.float64)
        n = 2 * self.planes
        A = torch.zeros(*angles.shape[:2], n, n, dtype=torch.float64)
        even, odd = torch.arange(0, n, 2), torch.arange(1, n, 2)
        A[..., even, even] = A[..., odd, odd] = angles.cos()
        A[..., odd, even], A[..., even, odd] = angles.sin(), -angles.sin()
        decay, noise = (
            torch.tensor([getattr(task, name) for task in tasks], dtype=torch.float64).view(-1, 1, 1)
            for name in ("decay", "noise")
        )
        C = torch.tensor([task.observation for task in tasks], dtype=torch.float64)
        eye = torch.eye(n, dtype=torch.float64)
        R = noise**2 * torch.eye(self.obs_dim, dtype=torch.float64)
        return LDSystem(decay.unsqueeze(1) * A, (1 - noise**2).sqrt() * C, (1 - decay**2) * eye, R)

    def simulate(
        self, tasks: Sequence[LDSTask], sequences: int, length: int, seed: int = 0, *, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Observations and modes of ``sequences`` independent runs of each task, each started at stationarity.

        Args:
            tasks: a non-empty sequence of ``LDSTask`` of this distribution's sizes.
            sequences, length: how many runs of each task, and of how many steps, > 0.
            seed: of the collection, in [0, 2**32); other tasks or another seed meet other noise.
            dtype: of the observations; default: torch's default.

        Returns:
            ``(tasks, sequences, length, obs_dim)`` on the CPU, and ``(tasks, sequences, length)`` int64, the mode by
            which each step was reached from the one before (that of step 0 only starts the chain).

        Raises:
            TypeError, ValueError: an argument is of the wrong kind or out of its range.
        """
        where = "LDSTasks.simulate"
        self._check_tasks(where, tasks)
        sequences, length = (
            _check.positive(where, name, value, integer=True)
            for name, value in (("sequences", sequences), ("length", length))
        )
        seed = check_seed(where, "seed", seed)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"{where}: dtype must be a floating torch.dtype, got {dtype!r}")
        system = self.system(tasks)
        generator = np.random.default_rng(collection_stream(tasks, seed))
        runs, n = (len(tasks), sequences), 2 * self.planes
        modes = self._modes(generator, tasks, runs, length)
        kicks, errors = (
            torch.from_numpy(generator.standard_normal((length, *runs, size))) for size in (n, self.obs_dim)
        )
        task = torch.arange(len(tasks)).unsqueeze(1)
        spread = system.Q.diagonal(dim1=1, dim2=2).sqrt().unsqueeze(1)
        z, states = kicks[0], [kicks[0]]
        for t in range(1, length):
            z = (system.A[task, modes[:, :, t]] @ z.unsqueeze(-1)).squeeze(-1) + spread * kicks[t]
            states.append(z)
        v = errors.permute(1, 2, 0, 3) * system.R.diagonal(dim1=1, dim2=2).sqrt()[:, None, None]
        return (torch.stack(states, 2) @ system.C.mT.unsqueeze(1) + v).to(dtype), modes

    def kalman(self, tasks: Sequence[LDSTask], observations: Tensor, modes: Tensor) -> tuple[Tensor, Tensor]:
        """The best possible predictions: a Kalman filter that knows each task's matrices and every step's mode.

        No predictor of ``x_{t+1}`` from ``x_0 … x_t`` has a smaller expected squared error. Where modes switch, no
        predictor can know the next one, so this is a bound from below that is not reached.

        Args:
            tasks: whose matrices.
            observations, modes: as :meth:`simulate` returns them.

        Returns:
            Float64 predictions of ``observations[:, :, 1:]`` and the covariances of their errors,
            ``(tasks, sequences, length − 1, obs_dim[, obs_dim])``.

        Raises:
            TypeError, ValueError: the arguments do not fit together.

        >>> distribution = LDSTasks()
        >>> tasks = distribution.sample(4)
        >>> x, modes = distribution.simulate(tasks, sequences=8, length=200)
        >>> predictions, _ = distribution.kalman(tasks, x, modes)
        >>> bool((predictions - x[:, :, 1:]).square().mean() < 0.1)
        True
        """
        where = "LDSTasks.kalman"
        self._check_tasks(where, tasks)
        _check.tensor(where, "observations", observations)
        wanted = f"({len(tasks)}, sequences, length, {self.obs_dim})"
        _check.shape(where, "observations", observations, (len(tasks), None, None, self.obs_dim), wanted)
        _check.tensor(where, "modes", modes)
        _check.dtype(where, "modes", modes, (torch.int64,))
        _check.shape(where, "modes", modes, observations.shape[:3], str(tuple(observations.shape[:3])))
        if modes.numel() and not 0 <= int(modes.min()) <= int(modes.max()) < self.modes:
            raise ValueError(
                f"{where}: modes must be in [0, {self.modes}), got {int(modes.min())} to {int(modes.max())}"
            )
        system = self.system(tasks)
        A = system.A[torch.arange(len(tasks)).view(-1, 1, 1), modes]
        start = torch.eye(2 * self.planes, dtype=torch.float64)
        C, Q, R = (m.unsqueeze(1) for m in (system.C, system.Q, system.R))
        return baselines.kalman_filter(observations, A, C, Q, R, start)

    def baselines(
        self, tasks: Sequence[LDSTask], *, sequences: int = 16, length: int = 128, frames: int = 4, seed: int = 0
    ) -> dict[str, Tensor]:
        """What simple predictors of the next observation reach on ``tasks``, and what none can beat.

        Each task is run ``2 * sequences`` times; predictors are fitted to one half and judged on the other, from step
        ``frames`` on. Returns float64 mean squared errors, ``(tasks,)`` each, by name: ``"zero"`` (the mean of all
        data), ``"persistence"`` (the last observation), ``"linear"`` (least squares on ``frames`` frames, for each task
        its own), ``"mlp"`` (one network for all tasks on ``frames`` frames), ``"kalman"`` (see :meth:`kalman`).

        Raises:
            TypeError, ValueError: an argument is of the wrong kind, or ``length`` does not exceed ``frames``.

        >>> distribution = LDSTasks()
        >>> errors = distribution.baselines(distribution.sample(4, "test"))
        >>> bool((errors["kalman"] < torch.stack([errors["linear"], errors["mlp"], errors["persistence"]])).all())
        True
        """
        where = "LDSTasks.baselines"
        self._check_tasks(where, tasks)
        sequences, length, frames = (
            _check.positive(where, name, value, integer=True)
            for name, value in (("sequences", sequences), ("length", length), ("frames", frames))
        )
        if length <= frames:
            raise ValueError(f"{where}: length must exceed frames = {frames}, got {length}")
        seed = check_seed(where, "seed", seed)
        x, modes = self.simulate(tasks, 2 * sequences, length, seed, dtype=torch.float64)
        fit, judge, modes = x[:, :sequences], x[:, sequences:], modes[:, sequences:]
        wanted = judge[:, :, frames:]
        predictions = {
            "zero": torch.zeros_like(wanted),
            "persistence": judge[:, :, frames - 1 : -1],
            "linear": torch.stack(
                [baselines.fit_linear(mine, frames)(other) for mine, other in zip(fit, judge, strict=True)]
            ),
            "mlp": baselines.fit_mlp(fit, frames, seed=seed)(judge),
            "kalman": self.kalman(tasks, judge, modes)[0][:, :, frames - 1 :],
        }
        return {name: (p - wanted).square().mean((1, 2, 3)) for name, p in predictions.items()}

    def _modes(
        self, generator: np.random.Generator, tasks: Sequence[LDSTask], runs: tuple[int, int], length: int
    ) -> Tensor:
        modes = np.zeros((*runs, length), dtype=np.int64)
        if self.modes > 1:
            leaves = generator.random((*runs, length)) >= np.array([task.stay for task in tasks])[:, None, None]
            jumps = np.where(leaves, generator.integers(1, self.modes, (*runs, length)), 0)
            jumps[:, :, 0] = generator.integers(0, self.modes, runs)
            modes = jumps.cumsum(-1) % self.modes
        return torch.from_numpy(modes)

    def _check_tasks(self, where: str, tasks: Sequence[LDSTask]) -> None:
        check_tasks(where, tasks, LDSTask)
        wanted = (self.modes, self.planes, self.obs_dim)
        for i, task in enumerate(tasks):
            got = (len(task.angles), len(task.angles[0]), len(task.observation))
            if got != wanted:
                raise ValueError(f"{where}: tasks[{i}] has (modes, planes, obs_dim) {got}, wanted {wanted}")
