"""Counts, seeds and settings of tasks may be NumPy scalars; what is stored and named are Python's numbers."""

import json
from dataclasses import asdict

import gymnasium
import numpy as np
import pytest
import torch

from eaml_ext.tasks import CartPoleTasks, HalfCheetahVelocityTasks, LDSTasks, SeedTask, SeedTasks, SinusoidTasks, mujoco
from eaml_ext.tasks.baselines import fit_linear, fit_mlp

INTEGERS = [np.int64, np.int32, np.uint8]


@pytest.fixture(params=[CartPoleTasks, LDSTasks, SinusoidTasks, HalfCheetahVelocityTasks, "seeds"])
def dist(request, monkeypatch):
    monkeypatch.setattr(mujoco, "find_spec", lambda name: object())
    return SeedTasks("Pendulum-v1") if request.param == "seeds" else request.param()


@pytest.mark.parametrize("integer", INTEGERS)
def test_sample_numpy_integers_give_the_tasks_of_ints(dist, integer):
    tasks = dist.sample(integer(2), np.str_("test"), seed=integer(3), epoch=integer(4))
    assert tasks == dist.sample(2, "test", seed=3, epoch=4)
    assert json.loads(json.dumps([asdict(task) for task in tasks])) and {type(task.split) for task in tasks} == {str}


@pytest.mark.parametrize("value", [np.float64(2), np.bool_(True), True, 2.0, "2", None, np.array([1, 2])])
@pytest.mark.parametrize("name", ["n", "seed", "epoch"])
def test_sample_other_types_are_refused(dist, name, value):
    with pytest.raises(TypeError, match=rf"^{type(dist).__name__}.sample: {name} must be an integer, got "):
        dist.sample(**{"n": 1, name: value})


def test_sample_numpy_integers_out_of_range_are_refused(dist):
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


def test_distributions_numpy_settings_equal_those_of_pythons_numbers():
    made = CartPoleTasks(projection=np.int64(6)), LDSTasks(np.int64(1), np.int32(2), modes=np.int8(2))
    like = CartPoleTasks(projection=6), LDSTasks(1, 2, modes=2)
    for ours, other in zip(made, like, strict=True):
        assert ours.name == other.name and type(ours.obs_dim) is int and ours.sample(3) == other.sample(3)
    sinusoids = SinusoidTasks(np.int64(5), np.int64(7), np.float32(0.5))
    assert repr(sinusoids) == "SinusoidTasks(shots=5, queries=7, noise=0.5)"
    assert sinusoids.baselines(np.int64(20), np.int64(1)) == SinusoidTasks(5, 7, 0.5).baselines(20, 1)
    with pytest.raises(ValueError, match=r"^LDSTasks: obs_dim must be < 2 \* planes = 4, got 4$"):
        LDSTasks(np.int64(4), 2)


def test_dimensions_numpy_sizes_of_spaces_become_ints():
    class Wide(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1.0, 1.0, (np.int64(2), np.int64(3)))
        action_space = gymnasium.spaces.Discrete(np.int64(3))

    gymnasium.register("EamlWide-v0", Wide)
    dist = SeedTasks("EamlWide-v0")
    assert (dist.obs_dim, dist.action_dim) == (6, 3) and type(dist.obs_dim) is type(dist.action_dim) is int


def test_bounds_numpy_integers_give_the_numbers_of_ints():
    dist = LDSTasks()
    tasks = dist.sample(2)
    x, modes = dist.simulate(tasks, np.int64(3), np.int64(12), seed=np.int64(5))
    wanted = dist.simulate(tasks, 3, 12, seed=5)
    assert torch.equal(x, wanted[0]) and torch.equal(modes, wanted[1])
    given = dist.baselines(tasks, sequences=np.int64(2), length=np.int64(12), frames=np.int64(2), seed=np.int64(1))
    for name, error in dist.baselines(tasks, sequences=2, length=12, frames=2, seed=1).items():
        assert torch.equal(given[name], error), name
    assert torch.equal(fit_linear(x, np.int64(2))(x), fit_linear(x, 2)(x))
    network = {"hidden": np.int64(8), "steps": np.int64(3), "seed": np.int64(4)}
    assert torch.equal(fit_mlp(x, np.int64(2), **network)(x), fit_mlp(x, 2, hidden=8, steps=3, seed=4)(x))
