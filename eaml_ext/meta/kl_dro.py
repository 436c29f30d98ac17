"""max_w sum_i w_i loss_i with KL(w || uniform) <= kl_radius: w_i = softmax(loss_i / t), t the least that it allows."""

import math

import torch
from torch import Tensor

from eaml_ext import _check


def kl_dro_weights(losses: Tensor, kl_radius: float) -> Tensor:
    """Return the weights of tasks with the largest mean loss within a KL divergence of ``kl_radius`` from uniform.

    They are the distributionally robust weights of Hu & Hong (2013, KL ball). Ajay et al. (2022) train a population of
    meta-policies for several radii with them.

    Args:
        losses: ``(n,)``, floating, n at least 1.
        kl_radius: nats, at least 0. From log(n / number of worst tasks) on, all weight is on the worst ones.

    Returns:
        ``(n,)``, float64, weights of at least 0 with sum 1; uniform where a loss is not finite.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or size.

    >>> kl_dro_weights(torch.tensor([0.0, 0.0, 0.0, 1.0]), 0.0)
    tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    >>> kl_dro_weights(torch.tensor([0.0, 0.0, 0.0, 1.0]), 5.0)
    tensor([0., 0., 0., 1.], dtype=torch.float64)
    """
    _check.tensor("kl_dro_weights", "losses", losses)
    if losses.dim() != 1 or not len(losses):
        raise ValueError(f"kl_dro_weights: losses must have shape (n,), n at least 1, got {tuple(losses.shape)}")
    kl_radius = _check.positive("kl_dro_weights", "kl_radius", kl_radius, zero=True)
    losses, count = losses.detach().double(), len(losses)
    uniform = torch.full_like(losses, 1 / count)
    gap = losses - losses.max()
    if kl_radius == 0 or not bool(torch.isfinite(gap).all()) or not bool(gap.any()):
        return uniform
    worst = (gap == 0).double()
    if kl_radius >= math.log(count / float(worst.sum())):
        return worst / worst.sum()

    def divergence(weights: Tensor) -> float:
        return float(torch.special.xlogy(weights, weights * count).sum())

    low, high = 1e-6, 1e6  # bounds of 1 / t, in units of 1 / (max loss - min loss); the divergence grows with 1 / t
    gap = gap / -gap.min()
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if divergence(torch.softmax(middle * gap, 0)) < kl_radius else (low, middle)
    return torch.softmax(low * gap, 0)
