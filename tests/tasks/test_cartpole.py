import numpy as np
import pytest

from eaml_ext.tasks import SPLITS, CartPoleTask, CartPoleTasks, SeedTask
from eaml_ext.tasks.cartpole import RANGES

DIST = CartPoleTasks()
NOMINAL = {"length": 0.5, "masscart": 1.0, "masspole": 0.1, "force_mag": 10.0, "gravity": 9.8}


def task(flip=False, **physics):
    return CartPoleTask("t", "train", **{**NOMINAL, **physics}, flip=flip)


def step(tasks, actions, seed=0):
    """One step of every task from the same state; returns (before, after)."""
    env = DIST.make_env(tasks)
    before = env.reset(seed=seed)[0]
    state = env.unwrapped.state
    state[:] = state[:, :1]
    before = state.T.astype(np.float32)
    after = env.step(np.asarray(actions))[0]
    env.close()
    return before, after


def physics(task):
    return tuple(getattr(task, name) for name in RANGES)


def test_sample_is_pure_and_stable_in_n():
    assert DIST.sample(9, "test", 3, 4) == DIST.sample(9, "test", 3, 4)
    assert DIST.sample(9, "test", 3, 4)[:5] == DIST.sample(5, "test", 3, 4)
    assert DIST.sample(0) == []


def test_splits_seeds_and_epochs_share_no_task():
    drawn = [
        t for split in SPLITS for seed in range(3) for epoch in range(3) for t in DIST.sample(40, split, seed, epoch)
    ]
    assert len({t.id for t in drawn}) == len({physics(t) for t in drawn}) == len(drawn)
    # Not one single parameter is shared either.
    for name in RANGES:
        assert len({getattr(t, name) for t in drawn}) == len(drawn)


def test_split_is_no_offset_of_seed_epoch_or_index():
    train = {physics(t) for seed in range(4) for epoch in range(4) for t in DIST.sample(20, "train", seed, epoch)}
    test = {physics(t) for seed in range(4) for epoch in range(4) for t in DIST.sample(20, "test", seed, epoch)}
    assert not train & test


def test_ranges_are_filled_and_log_uniform():
    drawn = DIST.sample(2000)
    for name, (low, high) in RANGES.items():
        place = np.log(np.array([getattr(t, name) for t in drawn]) / low) / np.log(high / low)
        assert place.min() >= 0 and place.max() <= 1
        # Standard error of a uniform mean over 2000 draws: 0.0065.
        assert abs(place.mean() - 0.5) < 0.03 and place.min() < 0.01 and place.max() > 0.99


def test_half_of_the_tasks_are_flipped_without_a_pattern():
    flips = np.array([t.flip for t in DIST.sample(2000)])
    assert flips.sum() == 1000
    assert 430 < flips[::2].sum() < 570


@pytest.mark.parametrize("name", RANGES)
def test_every_parameter_changes_the_next_observation(name):
    tilted = step([task(), task(**{name: NOMINAL[name] * 1.5})], [1, 1])
    assert (tilted[0][0] == tilted[0][1]).all()
    assert not np.allclose(tilted[1][0], tilted[1][1], rtol=0, atol=1e-7)


def test_flip_mirrors_the_action():
    plain, flipped = task(), task(flip=True)
    after = step([plain, plain, flipped, flipped], [0, 1, 0, 1])[1]
    assert (after[0] == after[3]).all() and (after[1] == after[2]).all()
    # The push decides the velocities: opposite directions.
    assert after[0][1] < 0 < after[1][1]


def test_nominal_physics_is_gymnasiums_cartpole():
    import gymnasium

    env = gymnasium.make("CartPole-v1").unwrapped
    env.reset(seed=1)
    before = np.array(env.state)
    vector = DIST.make_env([task()])
    vector.reset(seed=0)
    vector.unwrapped.state[:, 0] = before
    np.testing.assert_allclose(vector.step(np.array([1]))[0][0], env.step(1)[0], rtol=1e-6)


def test_env_parameters_are_the_tasks():
    tasks = DIST.sample(6, seed=5)
    env = DIST.make_env(tasks)
    for name in RANGES:
        assert getattr(env.unwrapped, name).tolist() == [getattr(t, name) for t in tasks]
    assert env.unwrapped.total_mass.tolist() == [t.masscart + t.masspole for t in tasks]
    assert env.unwrapped.polemass_length.tolist() == [t.masspole * t.length for t in tasks]
    assert env.unwrapped.max_episode_steps == 500


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"n": 1.5}, TypeError, "n must be an integer, got 1.5"),
        ({"n": True}, TypeError, "n must be an integer, got True"),
        ({"n": -1}, ValueError, "n must be in .*, got -1"),
        ({"n": 1, "split": "dev"}, ValueError, "split must be one of 'train', 'valid', 'test', got 'dev'"),
        ({"n": 1, "seed": -1}, ValueError, "seed must be in .*, got -1"),
        ({"n": 1, "seed": 2**32}, ValueError, "seed must be in .*, got 4294967296"),
        ({"n": 1, "seed": "0"}, TypeError, "seed must be an integer, got '0'"),
        ({"n": 1, "epoch": -2}, ValueError, "epoch must be in .*, got -2"),
        ({"n": 1, "epoch": None}, TypeError, "epoch must be an integer, got None"),
    ],
)
def test_sample_refuses(kwargs, error, text):
    with pytest.raises(error, match=f"^CartPoleTasks.sample: {text}$"):
        DIST.sample(**kwargs)


@pytest.mark.parametrize(
    ("tasks", "error", "text"),
    [
        ([], ValueError, "tasks must hold at least one CartPoleTask, got none"),
        (3, TypeError, "tasks must be a list of CartPoleTask, got int"),
        ([SeedTask("a", "train", 1)], TypeError, r"tasks\[0\] must be a CartPoleTask, got SeedTask"),
    ],
)
def test_make_env_refuses(tasks, error, text):
    with pytest.raises(error, match=f"^CartPoleTasks.make_env: {text}$"):
        DIST.make_env(tasks)


def test_reset_seeds_refuses():
    with pytest.raises(ValueError, match=r"^CartPoleTasks.reset_seeds: seed must be in .*, got -1$"):
        DIST.reset_seeds(DIST.sample(1), -1)
