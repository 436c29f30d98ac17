import math
import re

import numpy as np
import pytest
import torch

from eaml_ext.tasks.baselines import fit_linear, fit_mlp, kalman_filter


def scalar_system(a, q, r, length=4000, rows=50):
    """z' = a z + w, x = z + v, started at stationarity."""
    generator = np.random.default_rng(0)
    z = generator.standard_normal(rows) * math.sqrt(q / (1 - a * a))
    x = np.empty((rows, length))
    for t in range(length):
        x[:, t] = z + math.sqrt(r) * generator.standard_normal(rows)
        z = a * z + math.sqrt(q) * generator.standard_normal(rows)
    return torch.from_numpy(x).unsqueeze(-1)


@pytest.mark.parametrize(("a", "q", "r"), [(0.9, 0.19, 0.5), (0.99, 0.02, 1.0), (0.5, 1.0, 0.1)])
def test_kalman_filter_error_equals_the_steady_state_of_theory(a, q, r):
    """In steady state the variance of z_{t+1} given the past solves p = a² p r / (p + r) + q."""
    b = r - a * a * r - q
    steady = (-b + math.sqrt(b * b + 4 * q * r)) / 2
    one = torch.ones(1, 1, dtype=torch.float64)
    x = scalar_system(a, q, r)
    A = torch.full((x.shape[1], 1, 1), a, dtype=torch.float64)
    predictions, covariances = kalman_filter(x, A, one, q * one, r * one, q / (1 - a * a) * one)
    torch.testing.assert_close(covariances[-1].item(), steady + r, rtol=1e-6, atol=0)
    error = (predictions - x[:, 1:]).square().mean()
    # Innovations are white: the relative standard error of their variance is sqrt(2 / count).
    assert abs(float(error) / (steady + r) - 1) < 5 * math.sqrt(2 / predictions.numel())
    linear = (fit_linear(x, 4)(x) - x[:, 4:]).square().mean()
    # With a short memory four frames suffice; the affine predictor, fitted to this data, is then equally good.
    assert float(error) < 1.001 * float(linear) < float((x[:, 1:] - x[:, :-1]).square().mean())


def test_kalman_filter_equals_conditioning_of_the_joint_gaussian():
    n, d, length = 3, 2, 6
    A = 0.6 * torch.randn(length, n, n, dtype=torch.float64)
    C = torch.randn(d, n, dtype=torch.float64)
    Q, R, P = (m @ m.T + 0.1 * torch.eye(len(m)) for m in (torch.randn(k, k).double() for k in (n, d, n)))
    # cov(z_s, z_t), step by step; x = C z + v.
    variances = [P]
    for t in range(1, length):
        variances.append(A[t] @ variances[-1] @ A[t].T + Q)
    joint = torch.zeros(length * d, length * d, dtype=torch.float64)
    for s in range(length):
        across = variances[s]
        for t in range(s, length):
            across = across if t == s else across @ A[t].T
            block = C @ across @ C.T + (R if s == t else 0)
            joint[s * d : (s + 1) * d, t * d : (t + 1) * d] = block
            joint[t * d : (t + 1) * d, s * d : (s + 1) * d] = block.T
    x = torch.randn(4, length, d, dtype=torch.float64)
    predictions, covariances = kalman_filter(x, A, C, Q, R, P)
    for t in range(1, length):
        past, now = slice(0, t * d), slice(t * d, (t + 1) * d)
        weights = torch.linalg.solve(joint[past, past], joint[past, now]).T
        torch.testing.assert_close(predictions[:, t - 1], x[:, :t].flatten(1) @ weights.T)
        torch.testing.assert_close(covariances[t - 1], joint[now, now] - weights @ joint[past, now])


def test_kalman_filter_broadcasts_and_short_sequences_are_empty():
    eye = torch.eye(2)
    predictions, covariances = kalman_filter(torch.randn(3, 1, 2), eye.expand(1, 2, 2), eye, eye, eye, eye)
    assert predictions.shape == (3, 0, 2) and covariances.shape[-3:] == (0, 2, 2)
    many = kalman_filter(torch.randn(5, 3, 7, 2), eye.expand(5, 1, 7, 2, 2), eye, eye, eye, eye)
    assert many[0].shape == (5, 3, 6, 2)


def test_fit_linear_autoregression_is_predicted_exactly():
    weights = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    rows = [torch.randn(8, 3, dtype=torch.float64)]
    x = rows[0]
    for _ in range(40):
        x = torch.cat([x, (x[:, -3:] @ weights).unsqueeze(1) + 0.7], 1)
    x = x.unsqueeze(-1)
    predictions = fit_linear(x, 3)(x)
    torch.testing.assert_close(predictions, x[:, 3:])


def test_fit_mlp_logistic_map_beats_linear_and_leaves_the_generator_unchanged():
    x = torch.rand(64, 1, 1)
    for _ in range(20):
        x = torch.cat([x, 3.8 * x[:, -1:] * (1 - x[:, -1:])], 1)  # the logistic map
    state = torch.get_rng_state()
    fits = {"linear": fit_linear(x, 2), "mlp": fit_mlp(x, 2, steps=300)}
    assert torch.equal(state, torch.get_rng_state())
    errors = {name: float((predict(x) - x[:, 2:]).square().mean()) for name, predict in fits.items()}
    assert errors["mlp"] < 0.1 * errors["linear"]
    assert torch.equal(fit_mlp(x, 2, steps=20)(x), fit_mlp(x, 2, steps=20)(x))


X = torch.zeros(2, 6, 1)


@pytest.mark.parametrize("fit", [fit_linear, fit_mlp])
@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((X.tolist(),), TypeError, "x must be a torch.Tensor, got list"),
        ((X.long(),), TypeError, "x must be floating, got int64"),
        ((X, 6), ValueError, "x must have shape (*, length, dim), length > frames = 6, got (2, 6, 1)"),
        ((X[:0],), ValueError, "x must have shape (*, length, dim), length > frames = 4, got (0, 6, 1)"),
        ((X, 0), ValueError, "frames must be > 0, got 0"),
        ((X, 1.0), TypeError, "frames must be an integer, got 1.0"),
    ],
)
def test_fit_linear_and_fit_mlp_bad_argument_raises(fit, arguments, error, text):
    with pytest.raises(error, match=f"^baselines.{fit.__name__}: " + re.escape(text)):
        fit(*arguments)


@pytest.mark.parametrize("name", ["hidden", "steps", "seed"])
def test_fit_mlp_bad_option_raises(name):
    with pytest.raises(ValueError, match=f"^baselines.fit_mlp: {name} must be >"):
        fit_mlp(X, **{name: -1})
    with pytest.raises(TypeError, match=f"^baselines.fit_mlp: {name} must be an integer, got 'many'"):
        fit_mlp(X, **{name: "many"})


def test_fit_linear_predict_too_short_sequence_raises():
    with pytest.raises(ValueError, match=r"^baselines.fit_linear: x must have shape"):
        fit_linear(X)(X[:, :4])


@pytest.mark.parametrize("name", ["x", "A", "C", "Q", "R", "P"])
def test_kalman_filter_bad_argument_raises(name):
    eye = torch.eye(2)
    good = {"x": torch.zeros(5, 2), "A": eye.expand(5, 2, 2), "C": eye, "Q": eye, "R": eye, "P": eye}
    with pytest.raises(TypeError, match=f"^baselines.kalman_filter: {name} must be a torch.Tensor, got int"):
        kalman_filter(**{**good, name: 1})
    with pytest.raises(ValueError, match=f"^baselines.kalman_filter: {name} must have at least"):
        kalman_filter(**{**good, name: torch.zeros(2)})
    with pytest.raises(ValueError, match=r"^baselines.kalman_filter: \w must have shape \(\*, "):
        kalman_filter(**{**good, name: torch.zeros(5, 3, 3)})
