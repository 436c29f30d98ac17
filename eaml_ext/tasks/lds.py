"""z_t = decay R(angles) z_{t-1} + w_t,  x_t = c C z_t + v_t: rotations with partial, mixed observations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eaml_ext import _check
from eaml_ext._random import check_seed
from eaml_ext.tasks import baselines
from eaml_ext.tasks.base import SampledTasks, Task, check_tasks, collection_stream, task_stream

ANGLES = (0.1, 1.5)
"""The log-uniform range of a rotation, in radians per step: periods of 63 to 4 steps."""


@dataclass(frozen=True)
class LDSTask(Task):
    """One linear dynamical system.

    Attributes:
        angles: one row per mode; the rotation of each plane, radians per step.
        observation: C, ``obs_dim`` orthonormal rows of length ``2 * planes``.
        decay, noise, stay: as in :class:`LDSTasks`.
    """

    angles: tuple[tuple[float, ...], ...]
    observation: tuple[tuple[float, ...], ...]
    decay: float
    noise: float
    stay: float


@dataclass(frozen=True)
class LDSystem:
    """The matrices of z_t = A z_{t-1} + w_t, x_t = C z_t + v_t, in a basis where the covariance of z is the identity.

    Attributes:
        A: ``(tasks, modes, n, n)``, float64; n is ``2 * planes``.
        C: ``(tasks, obs_dim, n)``, float64.
        Q: ``(tasks, n, n)``, float64; the covariance of w.
        R: ``(tasks, obs_dim, obs_dim)``, float64; the covariance of v.
    """

    A: Tensor
    C: Tensor
    Q: Tensor
    R: Tensor


class LDSTasks(SampledTasks[LDSTask]):
    """Partially observed linear systems with a hidden rotation; with ``modes > 1`` the rotation switches.

    The latent state rotates in ``planes`` planes. The angles differ between tasks and are log-uniform in ``ANGLES``. A
    random orthonormal C of the task maps the state to ``obs_dim`` observed coordinates. One observation therefore
    predicts little of the next one, and the use of several depends on the task. In a switching system every mode has
    its own angles, and a Markov chain selects the mode of each step. The state is stationary and every observed
    coordinate has variance 1, so the squared error of predicting 0 is 1.

    Args:
        obs_dim: observed coordinates, fewer than ``2 * planes``.
        planes: planes of rotation; the state has ``2 * planes`` coordinates.
        modes: 1: linear; more: switching linear.
        stay: probability that a step keeps the mode of the last step, in [0, 1]. Other modes are equally probable.
        decay: factor of the state per step, in (0, 1); process noise has the variance ``1 − decay²``.
        noise: standard deviation of the observation noise, in [0, 1).

    ``name`` contains these numbers and the version, which fixes ranges and seeding.

    Raises:
        TypeError, ValueError: an argument has another type or is out of its range.

    >>> distribution = LDSTasks()
    >>> tasks = distribution.sample(3, split="train", seed=0)
    >>> x = distribution.simulate(tasks, sequences=5, length=20)[0]
    >>> x.shape  # (tasks, sequences, time, obs_dim)
    torch.Size([3, 5, 20, 2])
    >>> support_x, support_y = x[0, :, :-1], x[0, :, 1:]  # the next observation is the target
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

    def _draw_tasks(self, ids: Sequence[str], split: str, seed: int, epoch: int) -> list[LDSTask]:
        low, high = ANGLES
        tasks = []
        for index, task_id in enumerate(ids):
            generator = np.random.default_rng(task_stream(split, seed, epoch, index))
            angles = low * (high / low) ** generator.random((self.modes, self.planes))
            basis = np.linalg.qr(generator.standard_normal((2 * self.planes, self.obs_dim)))[0].T
            matrices = tuple(map(tuple, angles.tolist())), tuple(map(tuple, basis.tolist()))
            tasks.append(LDSTask(task_id, split, *matrices, self.decay, self.noise, self.stay))
        return tasks

    def system(self, tasks: Sequence[LDSTask]) -> LDSystem:
        """Return the matrices of ``tasks``.

        Raises:
            TypeError, ValueError: ``tasks`` is no non-empty sequence of ``LDSTask`` of this distribution's sizes.
        """
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
        """Simulate ``sequences`` independent runs of each task from the stationary distribution.

        Args:
            tasks: a non-empty sequence of ``LDSTask`` of this distribution's sizes.
            sequences: runs of each task, > 0.
            length: steps of a run, > 0.
            seed: of the collection, in [0, 2**32); the noise depends on it and on the tasks' ids.
            dtype: of the observations. Default: torch's default.

        Returns:
            Observations ``(tasks, sequences, length, obs_dim)``, on the CPU, and modes ``(tasks, sequences, length)``,
            int64. Step t was reached by its mode; the mode of step 0 only starts the Markov chain.

        Raises:
            TypeError, ValueError: an argument has another type or is out of its range.
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
        process_noise, observation_noise = (
            torch.from_numpy(generator.standard_normal((length, *runs, size))) for size in (n, self.obs_dim)
        )
        task = torch.arange(len(tasks)).unsqueeze(1)
        std = system.Q.diagonal(dim1=1, dim2=2).sqrt().unsqueeze(1)
        z, states = process_noise[0], [process_noise[0]]
        for t in range(1, length):
            z = (system.A[task, modes[:, :, t]] @ z.unsqueeze(-1)).squeeze(-1) + std * process_noise[t]
            states.append(z)
        v = observation_noise.permute(1, 2, 0, 3) * system.R.diagonal(dim1=1, dim2=2).sqrt()[:, None, None]
        return (torch.stack(states, 2) @ system.C.mT.unsqueeze(1) + v).to(dtype), modes

    def kalman(self, tasks: Sequence[LDSTask], observations: Tensor, modes: Tensor) -> tuple[Tensor, Tensor]:
        """Predict by a Kalman filter that is given each task's matrices and every step's mode.

        No predictor of ``x_{t+1}`` from ``x_0 … x_t`` has a smaller expected squared error. Where modes switch, the
        next mode is unpredictable, so this error is a lower bound that no predictor reaches.

        Args:
            tasks: a non-empty sequence of ``LDSTask`` of this distribution's sizes.
            observations: ``(tasks, sequences, length, obs_dim)``, floating, as :meth:`simulate` returns them.
            modes: ``(tasks, sequences, length)``, int64, as :meth:`simulate` returns them.

        Returns:
            Predictions of ``observations[:, :, 1:]``, ``(tasks, sequences, length − 1, obs_dim)``, and the covariances
            of their errors, ``(tasks, sequences, length − 1, obs_dim, obs_dim)``; float64.

        Raises:
            TypeError, ValueError: an argument has another type or shape, or a mode does not exist.

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
        """Return the errors of simple predictors of the next observation, and a lower bound for all predictors.

        Each task is simulated ``2 * sequences`` times. Predictors are fitted to one half and evaluated on the other,
        from step ``frames`` on:

        - ``"zero"``: the mean of all data;
        - ``"persistence"``: the last observation;
        - ``"linear"``: least squares on the last ``frames`` observations, fitted to each task;
        - ``"mlp"``: one network for all tasks, on the last ``frames`` observations;
        - ``"kalman"``: see :meth:`kalman`.

        Args:
            tasks: a non-empty sequence of ``LDSTask`` of this distribution's sizes.
            sequences: runs of each task in a half, > 0.
            length: steps of a run, > ``frames``.
            frames: observations that ``"linear"`` and ``"mlp"`` read, > 0.
            seed: in [0, 2**32).

        Returns:
            Mean squared errors by name, ``(tasks,)``, float64.

        Raises:
            TypeError, ValueError: an argument has another type or is out of its range.

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
        train, test, modes = x[:, :sequences], x[:, sequences:], modes[:, sequences:]
        targets = test[:, :, frames:]
        predictions = {
            "zero": torch.zeros_like(targets),
            "persistence": test[:, :, frames - 1 : -1],
            "linear": torch.stack([baselines.fit_linear(a, frames)(b) for a, b in zip(train, test, strict=True)]),
            "mlp": baselines.fit_mlp(train, frames, seed=seed)(test),
            "kalman": self.kalman(tasks, test, modes)[0][:, :, frames - 1 :],
        }
        return {name: (p - targets).square().mean((1, 2, 3)) for name, p in predictions.items()}

    def _modes(
        self, generator: np.random.Generator, tasks: Sequence[LDSTask], runs: tuple[int, int], length: int
    ) -> Tensor:
        """Draw the modes of all steps, ``(*runs, length)``, int64."""
        modes = np.zeros((*runs, length), dtype=np.int64)
        if self.modes > 1:
            leaves = generator.random((*runs, length)) >= np.array([task.stay for task in tasks])[:, None, None]
            jumps = np.where(leaves, generator.integers(1, self.modes, (*runs, length)), 0)
            jumps[:, :, 0] = generator.integers(0, self.modes, runs)
            modes = jumps.cumsum(-1) % self.modes
        return torch.from_numpy(modes)

    def _check_tasks(self, where: str, tasks: Sequence[LDSTask]) -> None:
        """Raise TypeError or ValueError unless ``tasks`` are LDSTasks of this distribution's sizes."""
        check_tasks(where, tasks, LDSTask)
        wanted = (self.modes, self.planes, self.obs_dim)
        for i, task in enumerate(tasks):
            got = (len(task.angles), len(task.angles[0]), len(task.observation))
            if got != wanted:
                raise ValueError(f"{where}: tasks[{i}] has (modes, planes, obs_dim) {got}, wanted {wanted}")
