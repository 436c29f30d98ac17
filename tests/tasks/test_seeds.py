import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit, TransformObservation

from eaml_ext.tasks import SPLITS, CartPoleTasks, SeedTasks
from eaml_ext.tasks.seeds import EPISODE_STEPS


class Buttons(gymnasium.Env):
    observation_space = spaces.Box(-1.0, 1.0, (2, 3))
    action_space = spaces.MultiBinary(2)


@pytest.fixture(scope="module")
def pendulum():
    return SeedTasks("Pendulum-v1")


@pytest.mark.parametrize(
    ("name", "obs_dim", "action_dim"),
    [("Pendulum-v1", 3, 1), ("MountainCar-v0", 2, 3), ("Acrobot-v1", 6, 3), ("FrozenLake-v1", 16, 4)],
)
def test_init_dimensions_are_those_of_the_spaces(name, obs_dim, action_dim):
    distribution = SeedTasks(name)
    assert (distribution.obs_dim, distribution.action_dim, distribution.name) == (
        obs_dim,
        action_dim,
        f"{name}-seeds-v1",
    )


def test_sample_no_seed_is_in_two_splits(pendulum):
    seeds = {split: {t.seed for s in range(5) for t in pendulum.sample(400, split, s)} for split in SPLITS}
    assert not (seeds["train"] & seeds["test"] or seeds["train"] & seeds["valid"] or seeds["valid"] & seeds["test"])
    for i, split in enumerate(SPLITS):
        # By construction, because 30-bit seeds may collide by chance among 2,000 draws.
        assert {seed % 4 for seed in seeds[split]} == {i}
        assert len(seeds[split]) > 1990


def test_make_env_environment_i_is_task_i(pendulum):
    tasks = pendulum.sample(3, seed=1)
    env = pendulum.make_env(tasks)
    together = env.reset(seed=pendulum.reset_seeds(tasks, 0))[0]
    env.close()
    alone = gymnasium.make("Pendulum-v1")
    np.testing.assert_array_equal(together, np.stack([alone.reset(seed=t.seed)[0] for t in tasks]))


def test_init_other_action_space_raises():
    gymnasium.register("EamlButtons-v0", Buttons)
    with pytest.raises(
        ValueError,
        match=r"^make_tasks: env_name 'EamlButtons-v0' must have Discrete or Box actions, got MultiBinary\(2\)",
    ):
        SeedTasks("EamlButtons-v0")


def test_make_env_and_reset_seeds_bad_tasks_raise(pendulum):
    with pytest.raises(TypeError, match=r"^SeedTasks.make_env: tasks\[0\] must be a SeedTask, got CartPoleTask$"):
        pendulum.make_env(CartPoleTasks().sample(1))
    with pytest.raises(ValueError, match=r"^SeedTasks.reset_seeds: tasks must hold at least one SeedTask, got none$"):
        pendulum.reset_seeds([], 0)


def test_init_numpy_sizes_of_spaces_become_ints():
    class Wide(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1.0, 1.0, (np.int64(2), np.int64(3)))
        action_space = gymnasium.spaces.Discrete(np.int64(3))

    gymnasium.register("EamlWide-v0", Wide)
    dist = SeedTasks("EamlWide-v0")
    assert (dist.obs_dim, dist.action_dim) == (6, 3) and type(dist.obs_dim) is type(dist.action_dim) is int


class Drawn(gymnasium.Env):
    """Attributes of each kind: drawn in reset, a state, a clock of the machine, a constant, no number."""

    observation_space = spaces.Box(-1.0, 1.0, (1,))
    action_space = spaces.Discrete(2)
    time = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        Drawn.time += 1
        self.mass, self.goal = self.np_random.random(), self.np_random.random(2)
        self.state, self.resets, self.constant = self.np_random.random(), Drawn.time, 3.0
        self.name, self.pair = str(seed), (self.mass, self.mass)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.state += 0.1
        return np.zeros(1, np.float32), 0.0, False, False, {}


def test_drawn_in_reset_names_numbers_that_depend_on_the_seed_and_rest_in_steps():
    gymnasium.register("EamlDrawn-v0", Drawn)
    assert SeedTasks("EamlDrawn-v0").drawn_in_reset() == ["goal", "mass"]


@pytest.mark.parametrize("name", ["Acrobot-v1", "Pendulum-v1", "MountainCar-v0", "FrozenLake-v1", "Blackjack-v1"])
def test_drawn_in_reset_environments_with_constant_physics_have_none(name):
    assert SeedTasks(name).drawn_in_reset() == []


def test_make_env_environment_without_time_limit_is_truncated():
    gymnasium.register("EamlEndless-v0", Drawn)
    gymnasium.register("EamlLimited-v0", Drawn, max_episode_steps=5)
    assert SeedTasks("EamlEndless-v0").truncates and not SeedTasks("EamlLimited-v0").truncates
    for name, limit in (("EamlEndless-v0", EPISODE_STEPS), ("EamlLimited-v0", 5)):
        distribution = SeedTasks(name)
        env = distribution.make_env(distribution.sample(1))
        env.reset(seed=0)
        truncations = [bool(env.step(np.array([0]))[3][0]) for _ in range(limit)]
        env.close()
        assert truncations == [False] * (limit - 1) + [True]
    assert gymnasium.spec("EamlEndless-v0").max_episode_steps is None  # the registry keeps its own


def test_make_env_entry_point_that_wraps_by_a_function_makes_equal_environments():
    """A new environment has another function in the arguments of its wrapper."""

    def entry_point():
        return TimeLimit(TransformObservation(Drawn(), lambda x: x + 0.5, Drawn.observation_space), 5)

    gymnasium.register("EamlWrapped-v0", entry_point)
    distribution = SeedTasks("EamlWrapped-v0")
    assert not distribution.truncates and distribution.drawn_in_reset() == ["goal", "mass"]
    env = distribution.make_env(distribution.sample(2))
    assert env.spec.max_episode_steps == 5 and env.reset(seed=[0, 1])[0].tolist() == [[0.5], [0.5]]
    truncations = [env.step(np.array([0, 0]))[3].tolist() for _ in range(5)]
    env.close()
    assert truncations == [[False, False]] * 4 + [[True, True]]
