"""Trajectories of two dynamical systems by the published settings of CoDA (2202.01889) and NCF (2405.02154).

Both papers generate them by ``scipy.integrate.solve_ivp`` with its default method and tolerances (rtol 1e-3, atol
1e-6). :func:`solve` is the same method: Dormand & Prince's pair (1980) with Shampine's interpolant (1986). The data
thus have the same error of the solver. For Lotka-Volterra it is a mean square of 8e-6 in the test environments: the
true vector field has this error, too.

An environment is one setting of the parameters. Initial conditions depend on the trajectory alone, as published:
NumPy's legacy generator with seed j in training, and with 2^31 - 1 - j in tests.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray
Environments = list[tuple[float, float]]
TESTED = [2**31 - 1 - j for j in range(32)]  # seeds of the initial conditions in tests

NODES = np.array([0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1])
STAGES = [
    [1 / 5],
    [3 / 40, 9 / 40],
    [44 / 45, -56 / 15, 32 / 9],
    [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
    [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
    [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84],  # the step itself, of order 5
]
ERROR = np.array([-71 / 57600, 0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40])
INTERPOLANT = np.array(  # by stage, the coefficients of s, s^2, s^3 and s^4
    [
        [1, -8048581381 / 2820520608, 8663915743 / 2820520608, -12715105075 / 11282082432],
        [0, 0, 0, 0],
        [0, 131558114200 / 32700410799, -68118460800 / 10900136933, 87487479700 / 32700410799],
        [0, -1754552775 / 470086768, 14199869525 / 1410260304, -10690763975 / 1880347072],
        [0, 127303824393 / 49829197408, -318862633887 / 49829197408, 701980252875 / 199316789632],
        [0, -282668133 / 205662961, 2019193451 / 616988883, -1453857185 / 822651844],
        [0, 40617522 / 29380423, -110615467 / 29380423, 69997945 / 29380423],
    ]
)


def solve(field: Callable[[Array], Array], start: Array, times: Array, rtol: float = 1e-3, atol: float = 1e-6) -> Array:
    """Solve dx/dt = field(x) and return x at ``times``, ``(len(times), dim)``; ``times[0]`` is the time of ``start``.

    Step sizes follow Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, section II.4, with the
    constants of SciPy: safety 0.9, factors of 0.2 to 10, an error estimate of order 4.
    """
    rms = lambda x: float(np.sqrt(np.mean(np.square(x))))  # noqa: E731
    t, end, x, out = float(times[0]), float(2 * times[-1] - times[-2]), start, []
    slope = field(x)
    scale = atol + np.abs(x) * rtol
    size, speed = rms(x / scale), rms(slope / scale)
    step = 1e-6 if size < 1e-5 or speed < 1e-5 else 0.01 * size / speed
    curvature = rms((field(x + step * slope) - slope) / scale) / step
    largest = max(speed, curvature)
    step = min(100 * step, max(1e-6, step * 1e-3) if largest <= 1e-15 else (0.01 / largest) ** 0.2)
    while t < end:
        rejected = False
        while True:
            step = min(step, end - t)
            stages = [slope]
            for row in STAGES:
                stages.append(field(x + step * np.dot(np.transpose(stages), row)))
            slopes = np.transpose(stages)
            new = x + step * slopes[:, :6] @ STAGES[5]
            error = rms(step * slopes @ ERROR / (atol + rtol * np.maximum(np.abs(x), np.abs(new))))
            if error < 1:
                break
            step, rejected = step * max(0.2, 0.9 * error**-0.2), True
        while len(out) < len(times) and times[len(out)] <= t + step:
            s = (times[len(out)] - t) / step
            out.append(x + step * slopes @ (INTERPOLANT @ s ** np.arange(1, 5)))
        growth = 10.0 if error == 0 else min(10.0, 0.9 * error**-0.2)
        t, x, slope = t + step, new, stages[-1]
        step *= min(1.0, growth) if rejected else growth
    return np.array(out)


def lotka_volterra(x: Array, beta: float, delta: float) -> Array:
    """The vector field with alpha = gamma = 0.5: prey and predators."""
    return np.array([0.5 * x[0] - beta * x[0] * x[1], delta * x[0] * x[1] - 0.5 * x[1]])


def glycolytic_oscillator(x: Array, k1: float, half: float) -> Array:
    """The vector field of seven concentrations in yeast glycolysis; ``half`` is the published K1."""
    v1 = k1 * x[0] * x[5] / (1 + (x[5] / half) ** 4)
    v2, v3, v4 = 6 * x[1] * (1 - x[4]), 16 * x[2] * (4 - x[5]), 100 * x[3] * x[4]
    side, outflow = 12 * x[1] * x[4], 13 * (x[3] - x[6])
    return np.array(
        [
            2.5 - v1,
            2 * v1 - v2 - side,
            v2 - v3,
            v3 - v4 - outflow,
            v2 - v4 - side,
            -2 * v1 + 2 * v3 - 1.28 * x[5],
            0.1 * outflow - 1.8 * x[6],
        ]
    )


@dataclass(frozen=True)
class System:
    """A system with its published environments, and further ones for validation.

    Attributes:
        field: ``(x, *environment) -> dx/dt``.
        low, high: the box of initial conditions.
        horizon: length in time of a trajectory of 20 states.
        trajectories: of each environment in training.
        train, test: the published environments of training and of adaptation.
        valid: environments of our own, in neither list; settings are chosen on them.
    """

    field: Callable[..., Array]
    low: list[float]
    high: list[float]
    horizon: float
    trajectories: int
    train: Environments
    valid: Environments
    test: Environments

    @property
    def times(self) -> Array:
        return np.linspace(0, self.horizon, 20, endpoint=False)

    @property
    def step(self) -> float:
        return self.horizon / 20

    def simulate(self, environments: Environments, seeds: Sequence[int], rtol: float = 1e-3) -> Tensor:
        """Return trajectories ``(environments, len(seeds), 20, dim)`` in float64; the published ``rtol`` is 1e-3."""
        low, high = np.array(self.low), np.array(self.high)
        starts = [low + np.random.RandomState(seed).random_sample(len(low)) * (high - low) for seed in seeds]
        runs = [
            [solve(lambda x, e=e: self.field(x, *e), x, self.times, rtol, rtol / 1e3) for x in starts]
            for e in environments
        ]
        return torch.from_numpy(np.array(runs))


SYSTEMS = {
    "lotka_volterra": System(
        lotka_volterra,
        [1.0, 1.0],
        [2.0, 2.0],
        10.0,
        4,
        [*product((0.5, 0.75, 1.0), (0.5, 0.75, 1.0))],
        [(0.625, 0.875), (0.875, 0.625), (0.875, 1.125), (1.125, 0.875)],
        [*product((0.625, 1.125), (0.625, 1.125))],
    ),
    "glycolytic_oscillator": System(
        glycolytic_oscillator,
        [0.15, 0.19, 0.04, 0.10, 0.08, 0.14, 0.05],
        [1.60, 2.16, 0.20, 0.35, 0.30, 2.67, 0.10],
        1.0,
        32,
        [*product((100, 90, 80), (1, 0.75, 0.5))],
        [*product((82.5, 97.5), (0.5625, 0.9375))],
        [*product((85, 95), (0.625, 0.875))],
    ),
}


@dataclass(frozen=True)
class Data:
    """Trajectories ``(environments, trajectories, 20, dim)`` in float64.

    Attributes:
        train: of the training environments; ``train_test``: of these from new initial conditions.
        train_valid: of these from others, for the choice of settings.
        valid, valid_test: one trajectory of each validation environment to adapt to, and 32 others.
        test, test_test: one trajectory of each new environment to adapt to, and 32 others.
    """

    train: Tensor
    train_valid: Tensor
    train_test: Tensor
    valid: Tensor
    valid_test: Tensor
    test: Tensor
    test_test: Tensor

    @classmethod
    def of(cls, system: System) -> "Data":
        validated = [10**6 + j for j in range(33)]
        return cls(
            system.simulate(system.train, [*range(system.trajectories)]),
            system.simulate(system.train, validated[1:]),
            system.simulate(system.train, TESTED),
            system.simulate(system.valid, validated[:1]),
            system.simulate(system.valid, validated[1:]),
            system.simulate(system.test, [0]),
            system.simulate(system.test, TESTED),
        )
