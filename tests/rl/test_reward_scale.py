"""The reward scale that the meta-RL jobs measure, and the baseline of random actions."""

import os
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from bandit import Bandit
from gymnasium.vector import SyncVectorEnv
from learners import CARTPOLE, make_policy
from scripted import Script

from eaml_ext.jobs import rl, rl_evaluation
from eaml_ext.jobs.rl_config import MAMLConfig, RL2Config
from eaml_ext.jobs.rl_evaluation import measured_reward_scale, random_returns, time_limit
from eaml_ext.rl import RL2
from eaml_ext.tasks import make_tasks


def last_return(dist, reward_scale):
    """Train on a bandit of three arms; return the mean return of the last of six episodes, in units of the reward."""
    torch.manual_seed(0)
    trainer = RL2(make_policy(dist), dist, episodes=6, lr=1e-2, reward_scale=reward_scale)
    trainer.train(25)
    return float(trainer.evaluate(dist.sample(200, "test"), 6)[:, -1].mean()) / dist.scale


@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_measured_reward_scale_lets_rl2_learn_where_a_fixed_one_fails(scale):
    dist = Bandit(arms=3, scale=scale)
    measured = measured_reward_scale(RL2Config(steps=6), dist)
    assert measured == pytest.approx(3**0.5 / scale, rel=0.1)  # a third of the rewards is ``scale``
    assert last_return(dist, measured) > 0.9
    assert last_return(dist, 0.1) < 0.45  # without memory the mean of an episode is at most 1/3


def test_measured_reward_scale_equals_the_hand_computed_one():
    # An episode pays in its second and last step: the discounted returns are 1.5 and 3, then -3 and -6.
    dist = Script((3.0, -6.0), length=2)
    rms = np.sqrt(np.square([1.5, 3.0, -3.0, -6.0]).mean())
    assert measured_reward_scale(MAMLConfig(steps=4, gamma=0.5), dist) == float(f"{1 / rms:.2g}") == 0.27
    assert measured_reward_scale(MAMLConfig(steps=1, gamma=0.5), dist) == 1.0  # no reward within one step
    assert measured_reward_scale(MAMLConfig(steps=2, gamma=0.5), Script((3e38,), length=2)) == 4.2e-39


def test_measured_reward_scale_is_a_function_of_the_seed():
    first, again, other = (measured_reward_scale(RL2Config(seed=seed), CARTPOLE) for seed in (0, 0, 3))
    assert first == again and 0.03 < first < 0.2 and 0.03 < other < 0.2


def test_measured_reward_scale_non_finite_reward_raises():
    dist = Script((1.0,), length=2, fault=("reward", 1, 1, np.nan))
    with pytest.raises(ValueError, match=r"^measured_reward_scale: reward must be finite, got nan at step 1 of tasks"):
        measured_reward_scale(RL2Config(steps=4), dist)


@pytest.mark.parametrize("continuous", [False, True])
def test_random_returns_equal_those_of_the_script(continuous):
    dist = Script((1.0, 2.0, 4.0), length=3, continuous=continuous)
    returns = random_returns(dist, dist.sample(2, "test"), 3, seed=0)
    assert returns.tolist() == [[1.0, 2.0, 4.0]] * 2


def test_random_returns_of_a_bandit_are_those_of_chance():
    dist = Bandit(arms=4)
    assert random_returns(dist, dist.sample(200, "test"), 5, seed=0).mean() == pytest.approx(0.25, abs=0.04)


def test_time_limit_is_that_of_the_spec_or_unknown(monkeypatch):
    assert time_limit(CARTPOLE) == 500 and time_limit(make_tasks("Pendulum-v1")) == 200
    assert time_limit(Bandit()) is None
    # Gymnasium gives no spec to a vector of environments that a distribution makes itself.
    tasks, vector = make_tasks("CartPole-v1"), SyncVectorEnv([partial(gymnasium.make, "Pendulum-v1")])
    assert vector.spec is None
    monkeypatch.setattr(type(tasks), "make_env", lambda *_: vector)
    assert time_limit(tasks) == 200


@pytest.mark.parametrize("kind", [RL2Config, MAMLConfig])
def test_run_random_episodes_without_an_end_are_refused_before_training(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(rl, "prepare", lambda _: Script(length=float("inf")))
    monkeypatch.setattr(rl_evaluation, "MAX_EPISODE_STEPS", 30)
    with pytest.raises(ValueError, match=r"max_episode_steps, got 30 steps without an end in tasks\[0\] of"):
        rl.run(kind(out=str(tmp_path), num_epochs=1, steps=20))
    assert not os.listdir(tmp_path)
