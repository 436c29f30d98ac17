"""Tasks of the extra ``metaworld``, on a fake module, and on Meta-World where it is installed."""

import sys
from types import ModuleType, SimpleNamespace

import gymnasium
import numpy as np
import pytest

from eaml_ext.rl import collect
from eaml_ext.tasks import MetaWorldTask, MetaWorldTasks, TaskDistribution, make_tasks, metaworld

GOALS = 50


class Arm(gymnasium.Env):
    """An environment whose last observed entry is the goal, where Meta-World's environments have zeros."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (39,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (4,), np.float32)
    goal = None

    def set_task(self, task):
        assert task.env_name == self.env_name
        self.goal = task.data

    def reset(self, seed=None, options=None):
        assert self.goal is not None
        super().reset(seed=seed)
        self.steps = 0
        return self._see(), {}

    def step(self, action):
        self.steps += 1
        return self._see(), float(action.sum()), False, self.steps == 6, {}

    def _see(self):
        return np.concatenate([np.full(38, self.steps), [self.goal]])


def benchmark(train, test):
    """A fake ``metaworld.Benchmark``: goals are 10000 * environment + index, plus 1000 in the test set."""
    names = list(dict.fromkeys([*train, *test]))
    classes = {name: type(name, (Arm,), {"env_name": name}) for name in names}

    def tasks(chosen, start):
        return [
            SimpleNamespace(env_name=n, data=10_000 * names.index(n) + start + g) for n in chosen for g in range(GOALS)
        ]

    return SimpleNamespace(
        train_classes={n: classes[n] for n in train},
        test_classes={n: classes[n] for n in test},
        train_tasks=tasks(train, 0),
        test_tasks=tasks(test, 1000),
    )


@pytest.fixture
def fake_metaworld(monkeypatch):
    module = ModuleType("metaworld")

    def ml1(env_name, seed=None):
        assert seed == metaworld.GOAL_SEED
        return benchmark([env_name], [env_name])

    ml1.ENV_NAMES = ["reach-v3", "push-v3", "pick-place-v3", "door-open-v3"]
    module.ML1 = ml1
    module.ML10 = lambda seed=None: benchmark([f"a{i}" for i in range(10)], [f"b{i}" for i in range(5)])
    monkeypatch.setitem(sys.modules, "metaworld", module)
    monkeypatch.setattr(metaworld, "find_spec", lambda name: object())


@pytest.mark.parametrize("name", ["ML1-reach-v3", "ML10"])
def test_sample_is_a_function_of_its_stream_and_splits_share_no_goal(fake_metaworld, name):
    dist = make_tasks(name)
    assert isinstance(dist, MetaWorldTasks) and isinstance(dist, TaskDistribution) and dist.name == f"{name}-v1"
    goals = {}
    for split in ("train", "valid", "test"):
        tasks = dist.sample(3000, split, 1, 2)
        assert tasks[:5] == dist.sample(5, split, 1, 2) != dist.sample(5, split, 1, 3)
        assert len({task.id for task in tasks}) == 3000
        with_goals = [dist._make(task) for task in tasks[:1000]]
        goals[split] = {env.goal for env in with_goals}
        assert {env.env_name for env in with_goals} == set(dist._goals[metaworld._set(split)])
    assert not (goals["train"] & goals["valid"]) and not (goals["test"] & (goals["train"] | goals["valid"]))
    if name != "ML10":
        assert [len(goals[split]) for split in ("train", "valid", "test")] == [40, 10, 50]


def test_make_env_keeps_the_goal_of_each_task_over_episodes(fake_metaworld):
    dist = MetaWorldTasks("ML1-push-v3")
    for split in ("train", "test"):
        tasks = dist.sample(4, split)
        data = collect(dist, tasks, 15, seed=0)
        assert data.resets[:, [0, 6, 12]].all() and data.resets.sum() == 12
        want = [1000 * (split == "test") + task.goal for task in tasks]
        assert data.observations[..., -1].tolist() == [[w] * 15 for w in want]


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        (10, TypeError, "benchmark must be a string, got int"),
        ("ML45", ValueError, "benchmark must be 'ML10' or 'ML1-<environment>', got 'ML45'"),
        ("ML1", ValueError, "benchmark must be 'ML10' or 'ML1-<environment>', got 'ML1'"),
        ("ML10-reach-v3", ValueError, "benchmark must be 'ML10' or 'ML1-<environment>', got 'ML10-reach-v3'"),
        (
            "ML1-reach-v2",
            ValueError,
            "benchmark must name an environment such as door-open-v3, pick-place-v3, push-v3, got 'reach-v2'",
        ),
    ],
)
def test_init_bad_benchmark_raises(fake_metaworld, name, error, text):
    with pytest.raises(error, match=f"^MetaWorldTasks: {text}$"):
        MetaWorldTasks(name)


def test_methods_bad_argument_raises(fake_metaworld):
    dist = MetaWorldTasks("ML1-push-v3")
    task = MetaWorldTask("x", "train", "reach-v3", 0)
    text = "tasks\\[0\\] must be of ML1-push-v3-v1, got goal 0 of 'reach-v3'"
    with pytest.raises(ValueError, match=f"^MetaWorldTasks.make_env: {text}$"):
        dist.make_env([task])
    with pytest.raises(
        ValueError, match=r"^MetaWorldTasks.make_env: tasks must hold at least one MetaWorldTask, got none$"
    ):
        dist.make_env([])
    with pytest.raises(ValueError, match=r"^MetaWorldTasks.sample: n must be in \[0, 2\*\*32\), got -1$"):
        dist.sample(-1)
    with pytest.raises(TypeError, match=r"^MetaWorldTasks.reset_seeds: seed must be an integer, got 1.0$"):
        dist.reset_seeds(dist.sample(1), 1.0)


def test_make_tasks_without_meta_world_names_the_extra(monkeypatch):
    monkeypatch.setattr(metaworld, "find_spec", lambda name: None)
    for name in ("ML10", "ML1-reach-v3"):
        text = r"MetaWorldTasks: needs Meta-World, which pip install 'eaml_ext\[metaworld\]' brings$"
        with pytest.raises(ValueError, match=f"^make_tasks: env_name '{name}' cannot be made: {text}"):
            make_tasks(name)


def test_installed_meta_world_hides_goals_and_shares_none_between_splits():
    pytest.importorskip("metaworld", reason="the extra metaworld is not installed")
    dist = make_tasks("ML1-reach-v3")
    goals = {}
    for split in ("train", "valid", "test"):
        goals[split] = [np.asarray(dist._make(task)._last_rand_vec) for task in dist.sample(12, split)]
    train, valid, test = (np.array(goals[split])[:, None] for split in ("train", "valid", "test"))
    for a, b in ((train, valid), (train, test), (valid, test)):
        assert np.abs(a - b.swapaxes(0, 1)).max(-1).min() > 1e-6  # no goal in two splits
    tasks = dist.sample(2, "test")
    data = collect(dist, tasks, 510, seed=0)
    assert data.observations.shape == (2, 510, 39) and data.actions.shape == (2, 510, 4)
    assert (data.observations[..., 36:] == 0).all()  # the goal is hidden
    assert data.resets.nonzero()[:, 1].tolist() == [0, 500, 0, 500] and not data.terminations.any()
    env = dist.make_env(tasks)
    env.reset(seed=1)
    kept = [e.unwrapped._target_pos.copy() for e in env.envs]
    env.reset(seed=2)
    assert all(np.array_equal(e.unwrapped._target_pos, k) for e, k in zip(env.envs, kept, strict=True))
    env.close()
