import math

import numpy as np
import pytest
import torch

from eaml_ext.rl import a2c_loss, advantages, normalised, ppo_loss, reinforce_loss


def floats(*values):
    return torch.tensor(values, dtype=torch.float64)


def bools(*values):
    return torch.tensor(values, dtype=torch.bool)


def test_advantages_lambda_one_and_zero_values_are_discounted_returns():
    # Two episodes, 3 + 2 steps, the first terminated, the second cut.
    rewards, zeros = floats(1, 2, 4, 8, 16), torch.zeros(5, dtype=torch.float64)
    terminated = ended = bools(0, 0, 1, 0, 0)
    got = advantages(rewards, zeros, zeros, terminated, ended, gamma=0.5, gae_lambda=1.0)
    assert got.tolist() == [1 + 0.5 * 2 + 0.25 * 4, 2 + 0.5 * 4, 4, 8 + 0.5 * 16, 16]


def test_advantages_equal_hand_computed():
    # gamma 0.5, lambda 0.5; terminated at step 1, cut by a time limit at step 3, by the end of the recording at step 4.
    rewards, values, following = floats(1, 1, 1, 1, 1), floats(2, 4, 6, 8, 10), floats(4, 100, 8, 20, 12)
    got = advantages(rewards, values, following, bools(0, 1, 0, 0, 0), bools(0, 1, 0, 1, 0), gamma=0.5, gae_lambda=0.5)
    delta = [1 + 2 - 2, 1 - 4, 1 + 4 - 6, 1 + 10 - 8, 1 + 6 - 10]
    want = [delta[0] + 0.25 * delta[1], delta[1], delta[2] + 0.25 * delta[3], delta[3], delta[4]]
    assert got.tolist() == want


def test_advantages_truncation_bootstraps_and_termination_does_not():
    one, zero, no, yes = floats(1), floats(0), bools(0), bools(1)
    assert advantages(one, zero, 10 * one, no, yes, gamma=0.9).item() == pytest.approx(10)
    assert advantages(one, zero, 10 * one, yes, yes, gamma=0.9).item() == 1


def test_advantages_lambda_one_is_return_minus_value():
    rewards, values = torch.randn(3, 20, dtype=torch.float64), torch.randn(3, 20, dtype=torch.float64)
    following = torch.cat([values[:, 1:], torch.randn(3, 1, dtype=torch.float64)], dim=1)
    no = torch.zeros(3, 20, dtype=torch.bool)
    powers = 0.9 ** torch.arange(20, dtype=torch.float64)
    want = (rewards * powers).sum(1) + 0.9**20 * following[:, -1] - values[:, 0]
    assert torch.allclose(advantages(rewards, values, following, no, no, 0.9, 1.0)[:, 0], want)


def test_advantages_infinite_episode_leaves_earlier_ones_unchanged():
    rewards = floats(1, 1, math.inf, 1)
    zeros = torch.zeros(4, dtype=torch.float64)
    got = advantages(rewards, zeros, zeros, bools(0, 1, 0, 0), bools(0, 1, 0, 0), gamma=1.0, gae_lambda=1.0)
    assert got[:2].tolist() == [2, 1] and got[2] == math.inf


def test_advantages_empty_sequences_are_empty():
    empty, no = torch.zeros(3, 0), torch.zeros(3, 0, dtype=torch.bool)
    assert advantages(empty, empty, empty, no, no).shape == (3, 0)


def test_losses_equal_hand_computed():
    log_probs, values, entropy = floats(-1, -2, -3), floats(1, 2, 3), floats(0.5, 0.25, 9)
    adv, targets, mask = floats(2, -1, 50), floats(2, 4, -9), bools(1, 1, 0)
    assert reinforce_loss(log_probs, adv, mask).item() == (2 - 2) / 2
    assert reinforce_loss(log_probs[:2], adv[:2]).item() == 0
    a2c = ((2 + 0.5 * 1 - 0.1 * 0.5) + (-2 + 0.5 * 4 - 0.1 * 0.25)) / 2
    got = a2c_loss(log_probs, values, entropy, adv, targets, mask, vf_coef=0.5, ent_coef=0.1)
    assert got.item() == pytest.approx(a2c)
    old = log_probs - floats(math.log(1.5), math.log(0.5), 7)
    # A ratio above 1.2 is clipped where the advantage is positive; min(0.5 * -1, 0.8 * -1) = -0.8 where it is negative.
    ppo = ((-1.2 * 2 + 0.5 * 1) + (0.8 + 0.5 * 4)) / 2
    got = ppo_loss(log_probs, values, entropy, adv, targets, old, mask, clip_coef=0.2, vf_coef=0.5, ent_coef=0.0)
    assert got.item() == pytest.approx(ppo)


def test_ppo_loss_gradient_beyond_the_clip_is_zero_or_points_back():
    old = floats(-1, -1, -1, -1)
    log_probs = (old + floats(0.5, -0.5, 0.5, -0.5)).requires_grad_()
    adv, zeros = floats(1, 1, -1, -1), torch.zeros(4, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(ppo_loss(log_probs, zeros, zeros, adv, zeros, old), log_probs)
    # Beyond the clip are a ratio of e^0.5 with a positive advantage and one of e^-0.5 with a negative advantage.
    ratios = (log_probs.detach() - old).exp()
    assert torch.allclose(gradient, torch.stack([zeros[0], -ratios[1] / 4, ratios[2] / 4, zeros[0]]))


def test_ppo_loss_at_the_old_policy_has_the_gradient_of_a2c_loss():
    log_probs, values = (
        torch.randn(2, 6, dtype=torch.float64, requires_grad=True),
        torch.randn(2, 6, dtype=torch.float64),
    )
    entropy, adv, targets = (torch.randn(2, 6, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(2, 6) < 0.7
    args = (log_probs, values, entropy, adv, targets)
    (a,) = torch.autograd.grad(a2c_loss(*args, mask), log_probs)
    (b,) = torch.autograd.grad(ppo_loss(*args, log_probs.detach(), mask), log_probs)
    assert torch.allclose(a, b) and (a[~mask] == 0).all()


def test_a2c_loss_targets_and_advantages_have_no_gradient():
    tensors = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(5)]
    a2c_loss(*tensors).backward()
    assert [t.grad is None for t in tensors] == [False, False, False, True, True]


def test_reinforce_loss_expected_gradient_is_that_of_the_return():
    # The rewards of this bandit are known, so the expectation of the gradient over actions is exact.
    payoff, logits = floats(1, 3, -2), torch.randn(3, dtype=torch.float64, requires_grad=True)
    probs = logits.softmax(0)
    (want,) = torch.autograd.grad((probs * payoff).sum(), logits)
    got = torch.zeros_like(want)
    for action in range(3):
        loss = reinforce_loss(logits.log_softmax(0)[action : action + 1], payoff[action : action + 1])
        got -= probs[action].detach() * torch.autograd.grad(loss, logits)[0]
    assert torch.allclose(got, want)


def test_normalised_equals_hand_computed():
    got = normalised(floats(1, 3, 100), bools(1, 1, 0))
    assert torch.allclose(got, floats(-1, 1, 0))


OK = {"rewards": torch.ones(3), "values": torch.ones(3), "next_values": torch.ones(3)}
OK |= {"terminations": bools(0, 0, 0), "episode_ends": bools(0, 0, 1)}


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"rewards": [1.0]}, TypeError, "rewards must be a torch.Tensor, got list"),
        ({"rewards": torch.ones(3).long()}, TypeError, "rewards must be floating point .*, got int64 of shape .3,."),
        ({"values": torch.ones(2)}, ValueError, "values must have shape .3,., got .2,."),
        ({"next_values": torch.ones(3).double()}, TypeError, "next_values must be float32, got float64"),
        ({"terminations": torch.ones(3)}, TypeError, "terminations must be bool, got float32"),
        ({"episode_ends": bools(1)}, ValueError, "episode_ends must have shape .3,., got .1,."),
        ({"gamma": 1.5}, ValueError, "gamma must be <= 1, got 1.5"),
        ({"gae_lambda": -1}, ValueError, "gae_lambda must be >= 0, got -1"),
    ],
)
def test_advantages_bad_argument_raises(kwargs, error, text):
    with pytest.raises(error, match=f"^advantages: {text}$"):
        advantages(**{**OK, **kwargs})


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"log_probs": 1.0}, TypeError, "log_probs must be a torch.Tensor, got float"),
        ({"values": torch.ones(2)}, ValueError, "values must have shape .3,., got .2,."),
        ({"entropy": torch.ones(3).double()}, TypeError, "entropy must be float32, got float64"),
        ({"advantages": torch.ones(3, 1)}, ValueError, "advantages must have shape .3,., got .3, 1."),
        ({"targets": None}, TypeError, "targets must be a torch.Tensor, got NoneType"),
        ({"old_log_probs": torch.ones(1)}, ValueError, "old_log_probs must have shape .3,., got .1,."),
        ({"mask": torch.ones(3)}, TypeError, "mask must be bool, got float32"),
        ({"clip_coef": 0.0}, ValueError, "clip_coef must be > 0, got 0.0"),
        ({"vf_coef": -1.0}, ValueError, "vf_coef must be >= 0, got -1.0"),
        ({"ent_coef": "0"}, TypeError, "ent_coef must be a number, got '0'"),
    ],
)
def test_losses_bad_argument_raises(kwargs, error, text):
    names = ("log_probs", "values", "entropy", "advantages", "targets", "old_log_probs")
    arguments = {**{name: torch.ones(3) for name in names}, **kwargs}
    with pytest.raises(error, match=f"^ppo_loss: {text}$"):
        ppo_loss(**arguments)
    if not kwargs.keys() & {"old_log_probs", "clip_coef"}:
        del arguments["old_log_probs"]
        with pytest.raises(error, match=f"^a2c_loss: {text}$"):
            a2c_loss(**arguments)
    if kwargs.keys() & {"log_probs", "mask"}:
        given = {"log_probs": arguments["log_probs"], "returns": torch.ones(3), "mask": arguments.get("mask")}
        with pytest.raises(error, match=f"^reinforce_loss: {text}$"):
            reinforce_loss(**given)


def test_reinforce_loss_and_normalised_bad_argument_raises():
    with pytest.raises(ValueError, match=r"^reinforce_loss: returns must have shape \(3,\), got \(2,\)$"):
        reinforce_loss(torch.ones(3), torch.ones(2))
    with pytest.raises(TypeError, match=r"^normalised: advantages must be a torch.Tensor, got int$"):
        normalised(1)


def test_losses_numpy_scalars_equal_python_numbers():
    values = torch.rand(4, 3, requires_grad=True)
    rest = {"advantages": torch.rand(3), "targets": torch.rand(3)}
    weights = {"vf_coef": 0.5, "ent_coef": 0.25}
    for loss, options in ((a2c_loss, weights), (ppo_loss, {**weights, "clip_coef": 0.125})):
        old = {"old_log_probs": values[3].detach()} if loss is ppo_loss else {}
        plain = loss(*values[:3], **rest, **old, **options)
        for kind in (np.float32, np.float64):
            assert torch.equal(loss(*values[:3], **rest, **old, **{n: kind(v) for n, v in options.items()}), plain)
    no = torch.zeros(3, dtype=torch.bool)
    a, b = (advantages(*values[:3].detach(), no, no, *numbers) for numbers in ((0.5, 0.25), np.float64([0.5, 0.25])))
    assert torch.equal(a, b) and a.dtype == torch.float32
