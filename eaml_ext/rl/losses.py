"""A_t = delta_t + gamma lambda A_{t+1},  delta_t = r_t + gamma V_{t+1} - V_t;  L = -mean(log pi(a_t) A_t) + ...

Sequences are ``(..., time)``, a row per environment, real or padded at the end; ``mask`` marks what is real.
"""

from typing import Any

import torch
from torch import Tensor

from eaml_ext import _check


def advantages(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminations: Tensor,
    ends: Tensor,
    gamma: float = 0.99,
    gae_lambda: float = 0.95,
) -> Tensor:
    """Generalised advantages (Schulman et al. 2016, equation 16); ``+ values`` they are the targets of the critic.

    An episode that terminated is worth nothing after its last step; one that was cut by a time limit or by the end of
    the recording goes on, and is worth what the critic says of the observation it was cut at (Pardo et al. 2018, "Time
    limits in reinforcement learning"). ``gae_lambda=1`` with ``values`` of zero gives discounted returns.

    Args:
        rewards: ``(..., time)``, floating point.
        values: of the observations acted on, of the shape and dtype of ``rewards``.
        next_values: of the observations that came of it, the true final one where an episode ended.
        terminations: bool, the episode ended here of itself.
        ends: bool, the next step belongs to another episode, whose advantages do not count for this one. The last step
            ends in any case, and so must whatever padding follows.
        gamma: discount of a step, in [0, 1].
        gae_lambda: in [0, 1]: 0 trusts the critic after a step, 1 not at all.

    Returns:
        ``(..., time)``, without a gradient.

    Raises:
        TypeError, ValueError: a tensor of another shape or dtype, or a number out of its range.

    >>> ones, no = torch.ones(4), torch.zeros(4, dtype=torch.bool)
    >>> advantages(ones, 0 * ones, 0 * ones, no, no, gamma=0.5, gae_lambda=1.0)
    tensor([1.8750, 1.7500, 1.5000, 1.0000])
    """
    where = "advantages"
    _check.tensor(where, "rewards", rewards)
    if not rewards.is_floating_point() or rewards.dim() == 0:
        raise TypeError(f"{where}: rewards must be floating point (..., time), got {_came(rewards)}")
    for name, value, dtype in (
        ("values", values, rewards.dtype),
        ("next_values", next_values, rewards.dtype),
        ("terminations", terminations, torch.bool),
        ("ends", ends, torch.bool),
    ):
        _same(where, name, value, rewards.shape, dtype)
    gamma, gae_lambda = fraction(where, "gamma", gamma), fraction(where, "gae_lambda", gae_lambda)
    with torch.no_grad():
        deltas = rewards + gamma * next_values.masked_fill(terminations, 0.0) - values
        # An infinite or NaN advantage of the next episode must not reach this one through 0 * inf.
        keep = (~(ends | terminations)).to(rewards.dtype) * (gamma * gae_lambda)
        following, out = rewards.new_zeros(rewards.shape[:-1]), []
        for delta, k in zip(reversed(deltas.unbind(-1)), reversed(keep.unbind(-1)), strict=True):
            following = delta + torch.where(k == 0, k, k * following)
            out.append(following)
        return torch.stack(out[::-1], dim=-1) if out else torch.zeros_like(rewards)


def reinforce_loss(log_probs: Tensor, returns: Tensor, mask: Tensor | None = None) -> Tensor:
    """``-mean(log pi(a) G)`` (Williams 1992): its gradient is that of minus the expected return.

    Args:
        log_probs: of the actions taken, any shape.
        returns: of the same shape: discounted returns, less a baseline or not; a constant for the gradient.
        mask: bool, of the same shape: what is averaged over; everything if absent.

    Raises:
        TypeError, ValueError: a tensor of another shape or dtype.

    >>> reinforce_loss(torch.tensor([-1.0, -2.0]), torch.tensor([3.0, 1.0]))
    tensor(2.5000)
    """
    _sequences("reinforce_loss", mask, log_probs=log_probs, returns=returns)
    return _mean(-log_probs * returns.detach(), mask)


def a2c_loss(
    log_probs: Tensor,
    values: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    *,
    vf_coef: float = 0.5,
    ent_coef: float = 0.01,
) -> Tensor:
    """``mean(-log pi(a) A + vf_coef (V - target)² - ent_coef H)`` (Mnih et al. 2016).

    Args:
        log_probs, values, entropy: what the policy says now of the actions taken and the observations; any one shape.
        advantages, targets: of the same shape; constants for the gradient.
        mask: bool, of the same shape: what is averaged over; everything if absent.
        vf_coef, ent_coef: at least 0.

    Raises:
        TypeError, ValueError: a tensor of another shape or dtype, or a negative weight.

    >>> one = torch.ones(3)
    >>> a2c_loss(-one, 2 * one, one, advantages=one, targets=one)
    tensor(1.4900)
    """
    where = "a2c_loss"
    tensors = {"values": values, "entropy": entropy, "advantages": advantages, "targets": targets}
    _sequences(where, mask, log_probs=log_probs, **tensors)
    vf_coef, ent_coef = _weights(where, vf_coef, ent_coef)
    policy = -log_probs * advantages.detach()
    critic = (values - targets.detach()).square()
    return _mean(policy + vf_coef * critic - ent_coef * entropy, mask)


def ppo_loss(
    log_probs: Tensor,
    values: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    targets: Tensor,
    old_log_probs: Tensor,
    mask: Tensor | None = None,
    *,
    clip_coef: float = 0.2,
    vf_coef: float = 0.5,
    ent_coef: float = 0.01,
) -> Tensor:
    """:func:`a2c_loss` with ``-min(ratio A, clamp(ratio, 1 ± clip_coef) A)`` in the place of ``-log pi(a) A``.

    ``ratio`` is the probability of the action now over the one it was taken with (Schulman et al. 2017, equation 7).

    Args:
        old_log_probs: of the actions when they were taken, of the same shape as all the others.
        clip_coef: how far the ratio may go, > 0.

    Raises:
        TypeError, ValueError: a tensor of another shape or dtype, or a number out of its range.

    >>> zero, one = torch.zeros(1), torch.ones(1)
    >>> ppo_loss(torch.tensor([0.5]), zero, zero, advantages=one, targets=zero, old_log_probs=zero)
    tensor(-1.2000)
    """
    where = "ppo_loss"
    tensors = {"values": values, "entropy": entropy, "advantages": advantages, "targets": targets}
    _sequences(where, mask, log_probs=log_probs, old_log_probs=old_log_probs, **tensors)
    vf_coef, ent_coef = _weights(where, vf_coef, ent_coef)
    clip_coef = _check.positive(where, "clip_coef", clip_coef)
    advantages = advantages.detach()
    ratio = (log_probs - old_log_probs.detach()).exp()
    policy = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages)
    critic = (values - targets.detach()).square()
    return _mean(policy + vf_coef * critic - ent_coef * entropy, mask)


def normalised(advantages: Tensor, mask: Tensor | None = None) -> Tensor:
    """Less their mean, over their standard deviation, both over what ``mask`` marks; 0 elsewhere.

    >>> normalised(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
    tensor([-1.,  1.,  0.])
    """
    _sequences("normalised", mask, advantages=advantages)
    mean = _mean(advantages, mask)
    deviation = _mean((advantages - mean).square(), mask).sqrt()
    scaled = (advantages - mean) / (deviation + 1e-8)
    return scaled if mask is None else scaled.masked_fill(~mask, 0.0)


def _mean(loss: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return loss.mean()
    return loss.masked_fill(~mask, 0.0).sum() / mask.sum()


def _came(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"


def _same(where: str, name: str, value: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    _check.tensor(where, name, value)
    _check.dtype(where, name, value, (dtype,))
    if value.shape != shape:
        raise ValueError(f"{where}: {name} must have shape {tuple(shape)}, got {tuple(value.shape)}")


def _sequences(where: str, mask: Tensor | None, **tensors: Tensor) -> None:
    first, like = next(iter(tensors.items()))
    _check.tensor(where, first, like)
    for name, value in tensors.items():
        _same(where, name, value, like.shape, like.dtype)
    if mask is not None:
        _same(where, "mask", mask, like.shape, torch.bool)


def _weights(where: str, vf_coef: float, ent_coef: float) -> tuple[float, float]:
    vf_coef = _check.positive(where, "vf_coef", vf_coef, zero=True)
    return vf_coef, _check.positive(where, "ent_coef", ent_coef, zero=True)


def fraction(where: str, name: str, value: Any) -> float:
    """Return ``value`` as a number; raise TypeError or ValueError unless it is one in [0, 1]."""
    number = _check.positive(where, name, value, zero=True)
    if number > 1:
        raise ValueError(f"{where}: {name} must be <= 1, got {number!r}")
    return number
