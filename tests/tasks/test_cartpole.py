import copy

import gymnasium
import numpy as np
import pytest
import torch

from eaml_ext.rl import collect
from eaml_ext.tasks import SPLITS, CartPoleTask, CartPoleTasks, SeedTask
from eaml_ext.tasks.cartpole import NOMINAL, RANGES

DIST = CartPoleTasks()


def task(flip=False, **physics):
    return CartPoleTask("t", "train", **{**NOMINAL, **physics}, flip=flip)


def step(tasks, actions, seed=0):
    """Step every task once from the same state; return observations (before, after)."""
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


def test_sample_splits_seeds_and_epochs_share_no_task():
    drawn = [
        t for split in SPLITS for seed in range(3) for epoch in range(3) for t in DIST.sample(40, split, seed, epoch)
    ]
    assert len({t.id for t in drawn}) == len({physics(t) for t in drawn}) == len(drawn)
    # No value of a single parameter is shared, either.
    for name in RANGES:
        assert len({getattr(t, name) for t in drawn}) == len(drawn)


def test_sample_split_is_no_offset_of_seed_epoch_or_index():
    train = {physics(t) for seed in range(4) for epoch in range(4) for t in DIST.sample(20, "train", seed, epoch)}
    test = {physics(t) for seed in range(4) for epoch in range(4) for t in DIST.sample(20, "test", seed, epoch)}
    assert not train & test


def test_sample_parameters_are_log_uniform_in_their_ranges():
    drawn = DIST.sample(2000)
    for name, (low, high) in RANGES.items():
        place = np.log(np.array([getattr(t, name) for t in drawn]) / low) / np.log(high / low)
        assert place.min() >= 0 and place.max() <= 1
        # Standard error of a uniform mean over 2000 draws: 0.0065.
        assert abs(place.mean() - 0.5) < 0.03 and place.min() < 0.01 and place.max() > 0.99


def test_sample_flips_half_of_the_tasks_without_a_pattern():
    flips = np.array([t.flip for t in DIST.sample(2000)])
    assert flips.sum() == 1000
    assert 430 < flips[::2].sum() < 570


@pytest.mark.parametrize("name", RANGES)
def test_make_env_every_parameter_changes_the_next_observation(name):
    before, after = step([task(), task(**{name: NOMINAL[name] * 1.5})], [1, 1])
    assert (before[0] == before[1]).all()
    assert not np.allclose(after[0], after[1], rtol=0, atol=1e-7)


def test_make_env_flip_reverses_the_action():
    plain, flipped = task(), task(flip=True)
    after = step([plain, plain, flipped, flipped], [0, 1, 0, 1])[1]
    assert (after[0] == after[3]).all() and (after[1] == after[2]).all()
    # Opposite pushes give velocities of opposite signs.
    assert after[0][1] < 0 < after[1][1]


def test_make_env_nominal_physics_equals_gymnasiums_cartpole():
    import gymnasium

    env = gymnasium.make("CartPole-v1").unwrapped
    env.reset(seed=1)
    before = np.array(env.state)
    vector = DIST.make_env([task()])
    vector.reset(seed=0)
    vector.unwrapped.state[:, 0] = before
    np.testing.assert_allclose(vector.step(np.array([1]))[0][0], env.step(1)[0], rtol=1e-6)


def test_make_env_has_the_parameters_of_the_tasks():
    tasks = DIST.sample(6, seed=5)
    env = DIST.make_env(tasks)
    for name in RANGES:
        assert getattr(env.unwrapped, name).tolist() == [getattr(t, name) for t in tasks]
    assert env.unwrapped.total_mass.tolist() == [t.masscart + t.masspole for t in tasks]
    assert env.unwrapped.polemass_length.tolist() == [t.masspole * t.length for t in tasks]
    assert env.unwrapped.max_episode_steps == 500


@pytest.mark.parametrize(
    ("tasks", "error", "text"),
    [
        ([], ValueError, "tasks must hold at least one CartPoleTask, got none"),
        (3, TypeError, "tasks must be a list of CartPoleTask, got int"),
        ([SeedTask("a", "train", 1)], TypeError, r"tasks\[0\] must be a CartPoleTask, got SeedTask"),
    ],
)
def test_make_env_bad_tasks_raise(tasks, error, text):
    with pytest.raises(error, match=f"^CartPoleTasks.make_env: {text}$"):
        DIST.make_env(tasks)


def test_reset_seeds_bad_seed_raises():
    with pytest.raises(ValueError, match=r"^CartPoleTasks.reset_seeds: seed must be in .*, got -1$"):
        DIST.reset_seeds(DIST.sample(1), -1)


OPTIONS = [
    {"physics": False},
    {"flip": False},
    {"hide_velocity": True},
    {"projection": 4},
    {"hide_velocity": True, "projection": 2},
    {"physics": False, "flip": False, "hide_velocity": True, "projection": 7},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_init_option_changes_only_its_part_of_the_tasks_and_the_name(options):
    plain, other = DIST.sample(6, seed=2), CartPoleTasks(**options).sample(6, seed=2)
    for a, b in zip(plain, other, strict=True):
        assert physics(b) == (physics(a) if options.get("physics", True) else tuple(NOMINAL.values()))
        assert b.flip == (a.flip and options.get("flip", True))
        assert (b.projection is None) == ("projection" not in options) and a.id != b.id
    assert other == CartPoleTasks(**options).sample(9, seed=2)[:6]


def test_init_every_combination_of_options_has_its_own_name():
    names = {CartPoleTasks(**options).name for options in [{}, *OPTIONS]}
    assert len(names) == 7 and DIST.name == "CartPole-v1-physics-flip-v1"


@pytest.mark.parametrize("options", OPTIONS)
def test_make_env_observations_are_gymnasiums_hidden_and_projected(options):
    dist = CartPoleTasks(**options)
    tasks = dist.sample(4)
    env = dist.make_env(tasks)
    assert env.observation_space.shape == (4, dist.obs_dim) and env.single_observation_space.shape == (dist.obs_dim,)
    seen = [env.reset(seed=3)[0], *(env.step(np.array([0, 1, 1, 0]))[0] for _ in range(3))]
    state = env.unwrapped.state.T.astype(np.float32)
    want = state[:, [0, 2]] if options.get("hide_velocity") else state
    if "projection" in options:
        want = np.stack([np.array(task.projection) @ row for task, row in zip(tasks, want, strict=True)])
    assert seen[-1].dtype == np.float32 and env.observation_space.contains(seen[-1])
    np.testing.assert_allclose(seen[-1], want, rtol=1e-5, atol=1e-7)


def test_sample_projections_are_orthonormal_and_uniform():
    tasks = CartPoleTasks(projection=4).sample(2000)
    matrices = np.array([task.projection for task in tasks])
    np.testing.assert_allclose(
        matrices.transpose(0, 2, 1) @ matrices, np.broadcast_to(np.eye(4), (2000, 4, 4)), atol=1e-12
    )
    # Entries of a uniform orthogonal 4 x 4 matrix have mean 0 and variance 1/4: standard errors 0.011 and 0.006.
    assert np.abs(matrices.mean(0)).max() < 0.05 and np.abs(matrices.var(0) - 0.25).max() < 0.03
    assert 850 < (np.linalg.det(matrices) > 0).sum() < 1150


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"physics": 1}, TypeError, "physics must be True or False, got int"),
        ({"flip": None}, TypeError, "flip must be True or False, got NoneType"),
        ({"hide_velocity": "no"}, TypeError, "hide_velocity must be True or False, got str"),
        ({"projection": 2.0}, TypeError, "projection must be an integer, got 2.0"),
        ({"projection": 3}, ValueError, "projection must be >= 4, got 3: it would lose entries"),
        ({"projection": 1, "hide_velocity": True}, ValueError, "projection must be >= 2, got 1: it would lose entries"),
    ],
)
def test_init_bad_option_raises(options, error, text):
    with pytest.raises(error, match=f"^CartPoleTasks: {text}$"):
        CartPoleTasks(**options)


def test_make_env_tasks_of_another_projection_raise():
    with pytest.raises(ValueError, match=r"tasks\[0\] must have no projection, got \(4, 4\)$"):
        DIST.make_env(CartPoleTasks(projection=4).sample(1))
    with pytest.raises(ValueError, match=r"tasks\[0\] must have a projection of shape \(4, 4\), got None$"):
        CartPoleTasks(projection=4).make_env(DIST.sample(1))


@pytest.mark.parametrize(
    "options", [{}, {"hide_velocity": True}, {"projection": 6}, {"hide_velocity": True, "projection": 3}]
)
def test_outcomes_equal_those_of_the_simulator(options):
    dist = CartPoleTasks(**options)
    tasks = dist.sample(8, "test")
    data = collect(dist, tasks, 60, seed=0)
    rewards, ends = dist.outcomes(tasks, data.observations, data.actions, data.next_observations)
    assert torch.equal(rewards, data.rewards) and torch.equal(ends, data.terminations) and ends.sum() > 8
    many = data.next_observations.unsqueeze(1).expand(-1, 3, -1, -1)  # any number of dimensions in between
    assert torch.equal(dist.outcomes(tasks, many, many, many)[1], ends.unsqueeze(1).expand(-1, 3, -1))
    broken = torch.full((8, 1, dist.obs_dim), torch.nan)
    assert dist.outcomes(tasks, broken, broken, broken)[1].all()


def test_outcomes_bad_argument_raises():
    obs, tasks = torch.zeros(2, 5, 4), DIST.sample(2)
    with pytest.raises(
        ValueError, match=r"^CartPoleTasks.outcomes: next_obs must have shape \(2, \*, 4\), got \(2, 5, 3\)$"
    ):
        DIST.outcomes(tasks, obs, obs, obs[..., :3])
    with pytest.raises(TypeError, match=r"^CartPoleTasks.outcomes: next_obs must be a torch.Tensor, got list$"):
        DIST.outcomes(tasks, obs, obs, [0.0])
    with pytest.raises(
        ValueError, match=r"^CartPoleTasks.outcomes: tasks must hold at least one CartPoleTask, got none$"
    ):
        DIST.outcomes([], obs, obs, obs)
    with pytest.raises(ValueError, match=r"^CartPoleTasks.outcomes: tasks\[0\] must have a projection of shape"):
        CartPoleTasks(projection=4).outcomes(tasks, obs, obs, obs)


def test_make_env_simulator_without_the_parameters_raises(monkeypatch):
    class Renamed(gymnasium.envs.classic_control.cartpole.CartPoleVectorEnv):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.gravitation = vars(self).pop("gravity")

    spec = copy.deepcopy(gymnasium.spec("CartPole-v1"))
    spec.vector_entry_point = Renamed
    monkeypatch.setitem(gymnasium.registry, "CartPole-v1", spec)
    text = r"the CartPole-v1 of gymnasium \S+ has no attribute gravity: install a version that eaml_ext supports"
    with pytest.raises(ValueError, match=f"^CartPoleTasks.make_env: {text}$"):
        DIST.make_env(DIST.sample(2))
