"""The base classes of task distributions, on all of them, and encode_action."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from gymnasium import spaces

from eaml_ext.tasks import (
    CartPoleTasks,
    HalfCheetahVelocityTasks,
    LDSTasks,
    SeedTask,
    SeedTasks,
    SinusoidTasks,
    encode_action,
    mujoco,
)

BOX = spaces.Box(-1.0, 1.0, (2, 2))


@pytest.fixture(params=[CartPoleTasks, LDSTasks, "switching", SinusoidTasks, HalfCheetahVelocityTasks, "seeds"])
def dist(request, monkeypatch):
    monkeypatch.setattr(mujoco, "find_spec", lambda name: object())
    named = {"seeds": lambda: SeedTasks("Pendulum-v1"), "switching": lambda: LDSTasks(modes=3, stay=0.9)}
    return named.get(request.param, request.param)()


def test_sample_is_pure_and_prefix_of_longer_samples(dist):
    assert dist.sample(9, "test", 3, 4) == dist.sample(9, "test", 3, 4)
    assert dist.sample(9, "test", 3, 4)[:5] == dist.sample(5, "test", 3, 4)
    assert dist.sample(0) == []


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"n": 1.5}, TypeError, "n must be an integer, got 1.5"),
        ({"n": True}, TypeError, "n must be an integer, got True"),
        ({"n": "3"}, TypeError, "n must be an integer, got '3'"),
        ({"n": -1}, ValueError, r"n must be in \[0, 2\*\*32\), got -1"),
        ({"n": 1, "split": 0}, ValueError, "split must be one of 'train', 'valid', 'test', got 0"),
        ({"n": 1, "split": "dev"}, ValueError, "split must be one of 'train', 'valid', 'test', got 'dev'"),
        ({"n": 1, "seed": -1}, ValueError, "seed must be in .*, got -1"),
        ({"n": 1, "seed": 2**32}, ValueError, "seed must be in .*, got 4294967296"),
        ({"n": 1, "seed": "0"}, TypeError, "seed must be an integer, got '0'"),
        ({"n": 1, "seed": 1.0}, TypeError, "seed must be an integer, got 1.0"),
        ({"n": 1, "epoch": 2**32}, ValueError, "epoch must be in .*, got 4294967296"),
        ({"n": 1, "epoch": -2}, ValueError, "epoch must be in .*, got -2"),
        ({"n": 1, "epoch": None}, TypeError, "epoch must be an integer, got None"),
    ],
)
def test_sample_bad_argument_raises(dist, kwargs, error, text):
    with pytest.raises(error, match=f"^{type(dist).__name__}.sample: {text}$"):
        dist.sample(**kwargs)


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_sample_numpy_integers_give_the_tasks_of_ints(dist, integer):
    tasks = dist.sample(integer(2), np.str_("test"), seed=integer(3), epoch=integer(4))
    assert tasks == dist.sample(2, "test", seed=3, epoch=4)
    assert json.loads(json.dumps([asdict(task) for task in tasks])) and {type(task.split) for task in tasks} == {str}


@pytest.mark.parametrize("value", [np.float64(2), np.bool_(True), True, 2.0, "2", None, np.array([1, 2])])
@pytest.mark.parametrize("name", ["n", "seed", "epoch"])
def test_sample_other_types_raise(dist, name, value):
    with pytest.raises(TypeError, match=rf"^{type(dist).__name__}.sample: {name} must be an integer, got "):
        dist.sample(**{"n": 1, name: value})


def test_sample_numpy_integers_out_of_range_raise(dist):
    for kwargs in ({"n": np.int64(-1)}, {"n": 1, "seed": np.int64(2**32)}, {"n": 1, "epoch": np.int64(-1)}):
        with pytest.raises(ValueError, match=r"sample: \w+ must be in \[0, 2\*\*32\), got -?\d+$"):
            dist.sample(**kwargs)


def test_reset_seeds_numpy_seeds_become_ints_that_gymnasium_accepts():
    cartpole = CartPoleTasks()
    seed = cartpole.reset_seeds(cartpole.sample(2), np.int64(7))
    assert seed == 7 and type(seed) is int
    dist = SeedTasks("Pendulum-v1")
    tasks = [SeedTask("a", "train", np.int64(8)), SeedTask("b", "train", np.uint32(12))]
    seeds = dist.reset_seeds(tasks, 0)
    assert seeds == [8, 12] and {type(seed) for seed in seeds} == {int}
    dist.make_env(tasks).reset(seed=seeds)
    with pytest.raises(ValueError, match=r"^SeedTasks.reset_seeds: tasks\[0\].seed must be in \[0, 2\*\*32\), got -1$"):
        dist.reset_seeds([SeedTask("a", "train", -1)], 0)


def test_init_numpy_settings_equal_those_of_python_numbers():
    made = CartPoleTasks(projection=np.int64(6)), LDSTasks(np.int64(1), np.int32(2), modes=np.int8(2))
    like = CartPoleTasks(projection=6), LDSTasks(1, 2, modes=2)
    for ours, other in zip(made, like, strict=True):
        assert ours.name == other.name and type(ours.obs_dim) is int and ours.sample(3) == other.sample(3)
    sinusoids = SinusoidTasks(np.int64(5), np.int64(7), np.float32(0.5))
    assert repr(sinusoids) == "SinusoidTasks(shots=5, queries=7, noise=0.5)"
    assert sinusoids.baselines(np.int64(20), np.int64(1)) == SinusoidTasks(5, 7, 0.5).baselines(20, 1)
    with pytest.raises(ValueError, match=r"^LDSTasks: obs_dim must be < 2 \* planes = 4, got 4$"):
        LDSTasks(np.int64(4), 2)


def test_encode_action_discrete_is_one_hot_from_the_start_of_the_space():
    space = spaces.Discrete(3, start=-1)
    expected = torch.tensor([[[1.0, 0, 0], [0, 0, 1.0]]])
    assert torch.equal(encode_action(space, np.array([[-1, 1]])), expected)
    assert torch.equal(encode_action(space, torch.tensor(0)), torch.tensor([0.0, 1.0, 0.0]))


def test_encode_action_box_is_flattened():
    encoded = encode_action(BOX, np.arange(12.0).reshape(3, 2, 2))
    assert torch.equal(encoded, torch.arange(12.0).reshape(3, 4)) and encoded.dtype == torch.float32
    assert encode_action(BOX, np.zeros((2, 2))).shape == (4,)
    assert encode_action(spaces.Box(0.0, 1.0, ()), np.zeros(5)).shape == (5, 1)


def test_encode_action_empty_batch_is_empty():
    assert encode_action(spaces.Discrete(2), np.zeros((0, 3), int)).shape == (0, 3, 2)
    assert encode_action(BOX, np.zeros((0, 2, 2))).shape == (0, 4)


@pytest.mark.parametrize(
    ("space", "action", "error", "text"),
    [
        (spaces.MultiBinary(2), [0, 1], TypeError, r"space must be Discrete or Box, got MultiBinary\(2\)"),
        (spaces.Discrete(2), [0.5], TypeError, r"action must be integers for Discrete\(2\), got torch.float32"),
        (spaces.Discrete(2), [0, 2], ValueError, r"action must lie in Discrete\(2\), got 0 to 2"),
        (spaces.Discrete(2), [-1], ValueError, r"action must lie in Discrete\(2\), got -1 to -1"),
        (BOX, np.zeros((2, 3)), ValueError, r"action must have shape \(\*, \*\(2, 2\)\), got \(2, 3\)"),
        (BOX, np.zeros(2), ValueError, r"action must have shape \(\*, \*\(2, 2\)\), got \(2,\)"),
    ],
)
def test_encode_action_bad_argument_raises(space, action, error, text):
    with pytest.raises(error, match=f"^encode_action: {text}$"):
        encode_action(space, action)
