"""Baseline predictors of the next observation: linear and MLP autoregression, and the optimal Kalman filter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from eaml_ext import _check
from eaml_ext._random import Purpose, derive_seed

Predictor = Callable[[Tensor], Tensor]


def fit_linear(x: Tensor, frames: int = 4) -> Predictor:
    """Fit the affine predictor of ``x[..., t, :]`` from the last ``frames`` observations by least squares.

    Args:
        x: ``(*, length, dim)``, floating; sequences with ``length > frames``.
        frames: number of past observations that the predictor reads.

    Returns:
        ``predict(x)``: ``(*, length, dim)`` -> predictions of ``x[..., frames:, :]``, ``(*, length − frames, dim)``.

    Raises:
        TypeError, ValueError: ``x`` is no floating tensor of such a shape, or ``frames`` is no positive integer.

    >>> x = torch.tensor([0.5]).pow(torch.arange(8.0)).view(1, 8, 1)  # x_t = x_{t-1} / 2
    >>> predict = fit_linear(x, frames=1)
    >>> round(float(predict(torch.tensor([[[4.0], [0.0]]]))), 4)
    2.0
    """
    frames = _check_sequences("baselines.fit_linear", x, frames)
    inputs = _windows(x, frames).flatten(0, -2).double()
    targets = x[..., frames:, :].flatten(0, -2).double()
    # Only the CPU has a driver for matrices without full rank.
    solution = torch.linalg.lstsq(_affine(inputs).cpu(), targets.cpu(), driver="gelsd").solution.to(x.device)

    def predict(x: Tensor) -> Tensor:
        _check_sequences("baselines.fit_linear", x, frames)
        predicted: Tensor = (_affine(_windows(x, frames).double()) @ solution).to(x.dtype)
        return predicted

    return predict


def fit_mlp(x: Tensor, frames: int = 4, *, hidden: int = 64, steps: int = 500, seed: int = 0) -> Predictor:
    """Fit :func:`fit_linear` plus a network with two hidden layers, which corrects the affine prediction.

    The correction is 0 before training. Adam trains it with a cosine schedule, in float32, on 1024 windows per step.

    Args:
        x: ``(*, length, dim)``, floating; sequences with ``length > frames``.
        frames: number of past observations that the predictor reads.
        hidden: width of both hidden layers.
        steps: steps of Adam.
        seed: of initial weights and batches, at least 0; the global generator is not changed.

    Returns:
        ``predict(x)``: ``(*, length, dim)`` -> predictions of ``x[..., frames:, :]``, ``(*, length − frames, dim)``.

    Raises:
        TypeError, ValueError: an argument has another type or is out of its range.

    >>> x = torch.rand(8, 50, 1).cumsum(1)
    >>> fit_mlp(x, frames=2, steps=5)(x).shape
    torch.Size([8, 48, 1])
    """
    where = "baselines.fit_mlp"
    frames = _check_sequences(where, x, frames)
    hidden, steps = (
        _check.positive(where, name, value, integer=True) for name, value in (("hidden", hidden), ("steps", steps))
    )
    seed = _check.integer(where, "seed", seed, 0)
    linear, dim = fit_linear(x, frames), x.shape[-1]
    inputs = _windows(x, frames).flatten(0, -2).float()
    targets = (x[..., frames:, :] - linear(x)).flatten(0, -2).float()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        seed = derive_seed(seed, Purpose.MLP_FIT)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU
        body = (nn.Linear(frames * dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        head = nn.Linear(hidden, dim)
        nn.init.zeros_(head.weight)  # training starts at the affine map
        network = nn.Sequential(*body, head).to(x.device)
        optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows = torch.randint(len(inputs), (min(1024, len(inputs)),)).to(x.device)
            optimizer.zero_grad()
            nn.functional.mse_loss(network(inputs[rows]), targets[rows]).backward()
            optimizer.step()
            schedule.step()

    def predict(x: Tensor) -> Tensor:
        with torch.no_grad():
            predicted: Tensor = linear(x) + network(_windows(x, frames).float()).to(x.dtype)
            return predicted

    return predict


def kalman_filter(x: Tensor, A: Tensor, C: Tensor, Q: Tensor, R: Tensor, P: Tensor) -> tuple[Tensor, Tensor]:
    """``E[x_t | x_0 … x_{t-1}]`` for t > 0, and its error's covariance, of z_t = A_t z_{t-1} + w_t, x_t = C z_t + v_t.

    Leading dimensions broadcast; all computations are in float64. Source: Kalman, "A new approach to linear filtering
    and prediction problems", 1960. The covariance is updated in Joseph's form, which stays positive under rounding.

    Args:
        x: ``(*, length, d)``, floating; observations.
        A: ``(*, length, n, n)``, floating; ``A[t]`` is the transition from step t − 1 to t. ``A[0]`` is not used.
        C: ``(*, d, n)``, floating.
        Q: ``(*, n, n)``, floating; covariance of w.
        R: ``(*, d, d)``, floating; covariance of v. ``C P C' + R`` must be invertible at every step.
        P: ``(*, n, n)``, floating; covariance of z_0, whose mean is 0.

    Returns:
        Predictions ``(*, length − 1, d)`` and covariances ``(*, length − 1, d, d)``, float64.

    Raises:
        TypeError, ValueError: an argument is no tensor, or the shapes do not fit together.

    >>> one = torch.ones(1, 1)
    >>> x = torch.tensor([[1.0], [3.0], [2.0]])
    >>> predictions, _ = kalman_filter(x, one.expand(3, 1, 1), one, 0 * one, one, 1e9 * one)
    >>> predictions.squeeze()  # a constant with observation noise: the mean of the past
    tensor([1.0000, 2.0000], dtype=torch.float64)
    """
    where = "baselines.kalman_filter"
    for name, value, dims in (("x", x, 2), ("A", A, 3), ("C", C, 2), ("Q", Q, 2), ("R", R, 2), ("P", P, 2)):
        _check.tensor(where, name, value)
        if value.dim() < dims:
            raise ValueError(f"{where}: {name} must have at least {dims} dimensions, got shape {tuple(value.shape)}")
    (length, d), n = x.shape[-2:], C.shape[-1]
    for name, value, shape in (("A", A, (length, n, n)), ("C", C, (d, n)), ("Q", Q, (n, n)), ("R", R, (d, d)),
                               ("P", P, (n, n))):  # fmt: skip
        if value.shape[-len(shape) :] != shape:
            raise ValueError(f"{where}: {name} must have shape (*, {str(shape)[1:]}, got {tuple(value.shape)}")
    x, A, C, Q, R, P = (value.double() for value in (x, A, C, Q, R, P))
    eye = torch.eye(n, dtype=torch.float64, device=x.device)
    mean = torch.zeros(n, 1, dtype=torch.float64, device=x.device)
    predictions, covariances = [], []
    for t in range(length - 1):
        gain = torch.linalg.solve(C @ P @ C.mT + R, C @ P).mT
        mean = mean + gain @ (x[..., t, :, None] - C @ mean)
        kept = eye - gain @ C
        P = kept @ P @ kept.mT + gain @ R @ gain.mT
        step = A[..., t + 1, :, :]
        mean, P = step @ mean, step @ P @ step.mT + Q
        predictions.append((C @ mean).squeeze(-1))
        covariances.append(C @ P @ C.mT + R)
    if not predictions:
        lead = torch.broadcast_shapes(x.shape[:-2], A.shape[:-3])
        return x.new_zeros(*lead, 0, d), x.new_zeros(*lead, 0, d, d)
    return torch.stack(predictions, -2), torch.stack(covariances, -3)


def _windows(x: Tensor, frames: int) -> Tensor:
    """Return the last ``frames`` observations before each step, ``(*, length − frames, frames · dim)``."""
    return x[..., :-1, :].unfold(-2, frames, 1).flatten(-2)


def _affine(inputs: Tensor) -> Tensor:
    """Append a 1 to each row."""
    return torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1)


def _check_sequences(where: str, x: Tensor, frames: int) -> int:
    """Return ``frames`` as an int; raise TypeError or ValueError unless ``x`` has longer sequences."""
    frames = _check.positive(where, "frames", frames, integer=True)
    _check.tensor(where, "x", x)
    if not x.is_floating_point():
        raise TypeError(f"{where}: x must be floating, got {str(x.dtype).removeprefix('torch.')}")
    if x.dim() < 2 or x.shape[-2] <= frames or not x.numel():
        got = tuple(x.shape)
        raise ValueError(f"{where}: x must have shape (*, length, dim), length > frames = {frames}, got {got}")
    return frames
