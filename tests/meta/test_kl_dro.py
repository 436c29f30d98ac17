"""The worst weights within a shift: on the boundary of the KL ball, worse than any other weights inside it."""

import math

import pytest
import torch

from eaml_ext.meta.kl_dro import kl_dro_weights


def divergence(weights):
    return float(torch.special.xlogy(weights, weights * len(weights)).sum())


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("kl_radius", [1e-3, 0.1, 1.0])
def test_kl_dro_weights_lie_on_the_boundary_and_follow_losses(kl_radius, scale):
    losses = scale * torch.rand(20, dtype=torch.float64)
    weights = kl_dro_weights(losses, kl_radius)
    assert float(weights.sum()) == pytest.approx(1) and bool((weights >= 0).all())
    assert divergence(weights) == pytest.approx(kl_radius, rel=1e-6)
    assert torch.equal(weights.argsort(), losses.argsort())
    # Other weights at the same distance are not worse: mixtures of uniform and drawn ones, cut to the ball.
    for _ in range(200):
        other = torch.distributions.Dirichlet(torch.ones(20, dtype=torch.float64)).sample()
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if divergence(middle * other + (1 - middle) / 20) < kl_radius else (low, middle)
        assert float((low * other + (1 - low) / 20) @ losses) <= float(weights @ losses) * (1 + 1e-9)


def test_kl_dro_weights_radius_zero_or_large_are_uniform_or_worst_tasks():
    losses = torch.tensor([1.0, 3.0, 3.0, 2.0])
    assert torch.equal(kl_dro_weights(losses, 0), torch.full((4,), 0.25).double())
    assert kl_dro_weights(losses, math.log(2)).tolist() == [0, 0.5, 0.5, 0]
    assert kl_dro_weights(losses, 100.0).tolist() == [0, 0.5, 0.5, 0]
    assert kl_dro_weights(torch.ones(3), 1.0).tolist() == [1 / 3] * 3
    assert kl_dro_weights(torch.tensor([2.0]), 1.0).tolist() == [1.0]
    assert kl_dro_weights(torch.tensor([1.0, torch.nan]), 1.0).tolist() == [0.5, 0.5]
    assert kl_dro_weights(torch.tensor([1.0, torch.inf]), 1.0).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("losses", "kl_radius", "error", "text"),
    [
        ([1.0], 1.0, TypeError, "losses must be a torch.Tensor, got list"),
        (torch.ones(2, 2), 1.0, ValueError, r"losses must have shape \(n,\), n at least 1, got \(2, 2\)"),
        (torch.ones(0), 1.0, ValueError, r"losses must have shape \(n,\), n at least 1, got \(0,\)"),
        (torch.ones(2), -1.0, ValueError, "kl_radius must be >= 0, got -1.0"),
        (torch.ones(2), None, TypeError, "kl_radius must be a number, got None"),
        (torch.ones(2), math.nan, ValueError, "kl_radius must be >= 0, got nan"),
    ],
)
def test_kl_dro_weights_bad_argument_raises_one_sentence(losses, kl_radius, error, text):
    with pytest.raises(error, match=f"^kl_dro_weights: {text}$"):
        kl_dro_weights(losses, kl_radius)
