"""A_t = delta_t + gamma lambda A_{t+1},  delta_t = r_t + gamma V_{t+1} - V_t;  L = -mean(log pi(a_t) A_t) + ...

Tensors are ``(..., time)``, one row per environment. Rows may be padded at their end; a ``mask`` is True on real steps.
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
    episode_ends: Tensor,
    gamma: float = 0.99,
    gae_lambda: float = 0.95,
) -> Tensor:
    """Return generalised advantage estimates (Schulman et al. 2016, equation 16).

    The critic's targets are the advantages plus ``values``. With ``gae_lambda=1`` and ``values`` of zero the
    advantages are discounted returns.

    The value after a termination is 0. Where an episode ends without a termination, the return is bootstrapped from
    ``next_values``: a time limit or the end of the recording (Pardo et al. 2018, "Time limits in reinforcement
    learning").

    Args:
        rewards: ``(..., time)``, floating.
        values: ``(..., time)``, dtype of ``rewards``; the critic's values of the observations acted on.
        next_values: ``(..., time)``, dtype of ``rewards``; its values of the next observations. At the end of an
            episode that is the episode's final observation.
        terminations: ``(..., time)``, bool; the episode terminated at this step.
        episode_ends: ``(..., time)``, bool; the next step belongs to another episode. The last step counts as an end
            whatever its flag is; padding must be flagged.
        gamma: discount of one step, in [0, 1].
        gae_lambda: in [0, 1]; 0 gives one-step estimates, 1 Monte Carlo returns.

    Returns:
        ``(..., time)``, without a gradient.

    Raises:
        TypeError, ValueError: a tensor has another shape or dtype, or a number is out of its range.

    >>> ones, no = torch.ones(4), torch.zeros(4, dtype=torch.bool)
    >>> advantages(ones, 0 * ones, 0 * ones, no, no, gamma=0.5, gae_lambda=1.0)
    tensor([1.8750, 1.7500, 1.5000, 1.0000])
    """
    where = "advantages"
    _check.tensor(where, "rewards", rewards)
    if not rewards.is_floating_point() or rewards.dim() == 0:
        got = f"{str(rewards.dtype).removeprefix('torch.')} of shape {tuple(rewards.shape)}"
        raise TypeError(f"{where}: rewards must be floating point (..., time), got {got}")
    for name, value, dtype in (
        ("values", values, rewards.dtype),
        ("next_values", next_values, rewards.dtype),
        ("terminations", terminations, torch.bool),
        ("episode_ends", episode_ends, torch.bool),
    ):
        _check_like(where, name, value, rewards.shape, dtype)
    gamma, gae_lambda = check_fraction(where, "gamma", gamma), check_fraction(where, "gae_lambda", gae_lambda)
    with torch.no_grad():
        deltas = rewards + gamma * next_values.masked_fill(terminations, 0.0) - values
        # The where, not a product, keeps an infinite or NaN advantage of the next episode out of this one.
        decay = (~(episode_ends | terminations)).to(rewards.dtype) * (gamma * gae_lambda)
        following, out = rewards.new_zeros(rewards.shape[:-1]), []
        for delta, d in zip(reversed(deltas.unbind(-1)), reversed(decay.unbind(-1)), strict=True):
            following = delta + torch.where(d == 0, d, d * following)
            out.append(following)
        return torch.stack(out[::-1], dim=-1) if out else torch.zeros_like(rewards)


def reinforce_loss(log_probs: Tensor, returns: Tensor, mask: Tensor | None = None) -> Tensor:
    """``-mean(log pi(a) G)`` (Williams 1992); its gradient is minus that of the expected return.

    Args:
        log_probs: any shape, floating; log-probabilities of the actions taken.
        returns: shape and dtype of ``log_probs``; discounted returns, with or without a baseline subtracted. A constant
            for the gradient.
        mask: shape of ``log_probs``, bool; the steps averaged over. Default: all.

    Returns:
        ``()``.

    Raises:
        TypeError, ValueError: a tensor has another shape or dtype.

    >>> reinforce_loss(torch.tensor([-1.0, -2.0]), torch.tensor([3.0, 1.0]))
    tensor(2.5000)
    """
    _check_sequences("reinforce_loss", mask, log_probs=log_probs, returns=returns)
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
        log_probs: any shape, floating; log-probabilities of the actions taken, under the current policy.
        values: shape and dtype of ``log_probs``; the critic's current values.
        entropy: shape and dtype of ``log_probs``; entropies of the current policy.
        advantages: shape and dtype of ``log_probs``; constants for the gradient.
        targets: shape and dtype of ``log_probs``; targets of the critic, constants for the gradient.
        mask: shape of ``log_probs``, bool; the steps averaged over. Default: all.
        vf_coef: weight of the critic's loss, at least 0.
        ent_coef: weight of the entropy bonus, at least 0.

    Returns:
        ``()``.

    Raises:
        TypeError, ValueError: a tensor has another shape or dtype, or a weight is negative.

    >>> one = torch.ones(3)
    >>> a2c_loss(-one, 2 * one, one, advantages=one, targets=one)
    tensor(1.4900)
    """
    where = "a2c_loss"
    tensors = {"values": values, "entropy": entropy, "advantages": advantages, "targets": targets}
    _check_sequences(where, mask, log_probs=log_probs, **tensors)
    policy_loss = -log_probs * advantages.detach()
    return _actor_critic_loss(where, policy_loss, values, entropy, targets, mask, vf_coef, ent_coef)


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
    """:func:`a2c_loss` with ``-min(ratio A, clamp(ratio, 1 ± clip_coef) A)`` in place of ``-log pi(a) A``.

    ``ratio`` is the current probability of the action divided by that under the policy which took it (Schulman et al.
    2017, equation 7).

    Args:
        log_probs: any shape, floating; log-probabilities of the actions taken, under the current policy.
        values: shape and dtype of ``log_probs``; the critic's current values.
        entropy: shape and dtype of ``log_probs``; entropies of the current policy.
        advantages: shape and dtype of ``log_probs``; constants for the gradient.
        targets: shape and dtype of ``log_probs``; targets of the critic, constants for the gradient.
        old_log_probs: shape and dtype of ``log_probs``; log-probabilities under the policy that took the actions.
        mask: shape of ``log_probs``, bool; the steps averaged over. Default: all.
        clip_coef: bound on ``|ratio - 1|`` beyond which the gradient is 0, > 0.
        vf_coef: weight of the critic's loss, at least 0.
        ent_coef: weight of the entropy bonus, at least 0.

    Returns:
        ``()``.

    Raises:
        TypeError, ValueError: a tensor has another shape or dtype, or a number is out of its range.

    >>> zero, one = torch.zeros(1), torch.ones(1)
    >>> ppo_loss(torch.tensor([0.5]), zero, zero, advantages=one, targets=zero, old_log_probs=zero)
    tensor(-1.2000)
    """
    where = "ppo_loss"
    tensors = {"values": values, "entropy": entropy, "advantages": advantages, "targets": targets}
    _check_sequences(where, mask, log_probs=log_probs, old_log_probs=old_log_probs, **tensors)
    clip_coef = _check.positive(where, "clip_coef", clip_coef)
    advantages = advantages.detach()
    ratio = (log_probs - old_log_probs.detach()).exp()
    policy_loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages)
    return _actor_critic_loss(where, policy_loss, values, entropy, targets, mask, vf_coef, ent_coef)


def normalised(advantages: Tensor, mask: Tensor | None = None) -> Tensor:
    """Subtract the mean and divide by the standard deviation, both over the steps in ``mask``.

    Args:
        advantages: any shape, floating.
        mask: shape of ``advantages``, bool. Default: all steps.

    Returns:
        Shape of ``advantages``; 0 outside ``mask``.

    >>> normalised(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
    tensor([-1.,  1.,  0.])
    """
    _check_sequences("normalised", mask, advantages=advantages)
    mean = _mean(advantages, mask)
    deviation = _mean((advantages - mean).square(), mask).sqrt()
    scaled = (advantages - mean) / (deviation + 1e-8)
    return scaled if mask is None else scaled.masked_fill(~mask, 0.0)


def check_fraction(where: str, name: str, value: Any) -> float:
    """Return ``value`` as a number; raise TypeError or ValueError unless it is one in [0, 1]."""
    number = _check.positive(where, name, value, zero=True)
    if number > 1:
        raise ValueError(f"{where}: {name} must be <= 1, got {number!r}")
    return number


def _actor_critic_loss(
    where: str,
    policy_loss: Tensor,
    values: Tensor,
    entropy: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    vf_coef: float,
    ent_coef: float,
) -> Tensor:
    vf_coef = _check.positive(where, "vf_coef", vf_coef, zero=True)
    ent_coef = _check.positive(where, "ent_coef", ent_coef, zero=True)
    value_loss = (values - targets.detach()).square()
    return _mean(policy_loss + vf_coef * value_loss - ent_coef * entropy, mask)


def _mean(loss: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return loss.mean()
    return loss.masked_fill(~mask, 0.0).sum() / mask.sum()


def _check_like(where: str, name: str, value: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    """Raise TypeError or ValueError unless ``value`` is a tensor of this shape and dtype."""
    _check.tensor(where, name, value)
    _check.dtype(where, name, value, (dtype,))
    _check.shape(where, name, value, shape, str(tuple(shape)))


def _check_sequences(where: str, mask: Tensor | None, **tensors: Tensor) -> None:
    """Raise TypeError or ValueError unless all tensors have the shape and dtype of the first one."""
    first, like = next(iter(tensors.items()))
    _check.tensor(where, first, like)
    for name, value in tensors.items():
        _check_like(where, name, value, like.shape, like.dtype)
    if mask is not None:
        _check_like(where, "mask", mask, like.shape, torch.bool)
