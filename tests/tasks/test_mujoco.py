"""Tasks of the extra ``mujoco``; tests that need no simulator run without it."""

import math

import numpy as np
import pytest
import torch

from eaml_ext import cli
from eaml_ext.rl import collect
from eaml_ext.tasks import (
    AntDirectionTasks,
    HalfCheetahDirectionTasks,
    HalfCheetahVelocityTasks,
    TaskDistribution,
    make_tasks,
    mujoco,
)

NAMES = {
    "HalfCheetah-Vel": HalfCheetahVelocityTasks,
    "HalfCheetah-Dir": HalfCheetahDirectionTasks,
    "Ant-Dir": AntDirectionTasks,
}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(params=NAMES)
def dist(request, monkeypatch):
    """Each distribution, also without MuJoCo: only ``make_env`` requires it."""
    monkeypatch.setattr(mujoco, "find_spec", lambda name: object())
    return make_tasks(request.param)


@pytest.fixture(params=NAMES)
def simulated(request):
    pytest.importorskip("mujoco", reason="the extra mujoco is not installed")
    return make_tasks(request.param)


def goal(task):
    return task.velocity if hasattr(task, "velocity") else task.angle


def test_sample_is_a_function_of_its_stream_and_splits_share_no_task(dist):
    assert isinstance(dist, TaskDistribution) and dist.action_space.shape == (dist.action_dim,)
    streams = {(s, e, x): dist.sample(40, s, e, x) for s in ("train", "valid", "test") for e in (0, 1) for x in (0, 1)}
    for stream, tasks in streams.items():
        assert tasks == dist.sample(40, *stream) and tasks[:7] == dist.sample(7, *stream)
        assert all(task.split == stream[0] and task.id.startswith(dist.name) for task in tasks)
    ids = [task.id for tasks in streams.values() for task in tasks]
    assert len(set(ids)) == len(ids)
    goals = [tuple(goal(task) for task in tasks) for tasks in streams.values()]
    assert len(set(goals)) == len(goals)
    if not isinstance(dist, HalfCheetahDirectionTasks):
        assert len({g for stream in goals for g in stream}) == len(ids)  # all goals differ, so no goal is in two splits


def test_sample_goals_have_the_documented_distribution(dist):
    goals = np.array([goal(task) for task in dist.sample(2000)])
    if isinstance(dist, HalfCheetahDirectionTasks):
        assert set(goals) == {0.0, math.pi} and (goals.reshape(-1, 2).sum(1) == math.pi).all()
    else:
        top = 2.0 if isinstance(dist, HalfCheetahVelocityTasks) else 2 * math.pi
        assert goals.min() >= 0 and goals.max() < top
        place = np.sort(goals / top)
        assert np.abs(place - np.arange(2000) / 2000).max() < 0.04  # Kolmogorov-Smirnov: 0.036 at one in a hundred


def test_make_tasks_without_mujoco_names_the_extra(monkeypatch):
    monkeypatch.setattr(mujoco, "find_spec", lambda name: None)
    for name, kind in NAMES.items():
        text = r"needs MuJoCo, which pip install 'eaml_ext\[mujoco\]' brings$"
        with pytest.raises(ImportError, match=f"^{kind.__name__}: {text}"):
            kind()
        with pytest.raises(ValueError, match=f"^make_tasks: env_name '{name}' cannot be made: {kind.__name__}: {text}"):
            make_tasks(name)


def test_make_env_rewards_are_those_of_the_goal(simulated):
    tasks = simulated.sample(4, "test")
    env = simulated.make_env(tasks)
    plain = [env.unwrapped.envs[i].unwrapped for i in range(4)]
    env.reset(seed=1)
    generator = np.random.default_rng(0)

    def places():
        # Ant's velocity is that of its torso's frame, which the simulator updates before the joints move.
        ant = isinstance(simulated, AntDirectionTasks)
        return np.array([p.data.body("torso").xpos[:2] if ant else p.data.qpos[:2] for p in plain])

    before = places()
    rewards, ended = [], []
    for t in range(mujoco.EPISODE_STEPS + 2):
        action = generator.uniform(-1, 1, (4, simulated.action_dim)).astype(np.float32)
        _, reward, terminated, truncated, info = env.step(action)
        after = places()
        v = (after - before) / plain[0].dt
        before = after
        for i, task in enumerate(tasks):
            if t and ended[-1][i]:  # the call that resets the environment
                assert reward[i] == 0
                continue
            if isinstance(simulated, HalfCheetahVelocityTasks):
                want = -abs(v[i, 0] - task.velocity)
            elif isinstance(simulated, HalfCheetahDirectionTasks):
                want = v[i, 0] * (1 if task.angle == 0 else -1)
            else:
                want = v[i, 0] * math.cos(task.angle) + v[i, 1] * math.sin(task.angle)
                want += info["reward_survive"][i] + info["reward_contact"][i]
            want -= simulated._control_cost * np.square(action[i]).sum()
            assert abs(reward[i] - want) < 1e-4, (t, i)
        rewards.append(reward)
        ended.append(terminated | truncated)
    env.close()
    cut = np.array(ended)
    assert cut[: mujoco.EPISODE_STEPS].any(0).all()  # every episode has ended by the time limit
    if "Cheetah" in simulated.name:
        assert (cut.argmax(0) == mujoco.EPISODE_STEPS - 1).all()


def test_outcomes_are_close_to_those_of_the_simulator(simulated):
    tasks = simulated.sample(3, "test")
    data = collect(simulated, tasks, 60, seed=0)
    assert data.observations.shape == (3, 60, simulated.obs_dim)
    reward, ends = simulated.outcomes(tasks, data.observations, data.actions, data.next_observations)
    assert torch.equal(ends, data.terminations)
    # Contacts with the ground change velocities within a step, so the mean of two velocities is not exact.
    assert torch.corrcoef(torch.stack([reward.flatten(), data.rewards.flatten()]))[0, 1] > 0.9
    assert (reward - data.rewards).abs().mean() < 0.35 * data.rewards.std()


def test_half_cheetah_standing_still_returns_minus_the_goal_velocity():
    pytest.importorskip("mujoco", reason="the extra mujoco is not installed")
    dist = HalfCheetahVelocityTasks()
    tasks = dist.sample(3, "test")
    data = collect(dist, tasks, 100, 0, lambda seen, resets, generator: np.zeros((3, 6), np.float32))
    bound = torch.tensor([-100 * task.velocity for task in tasks])
    torch.testing.assert_close(data.rewards.sum(1), bound, rtol=0.05, atol=5.0)
    assert (data.rewards <= 0).all()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"tasks": []}, ValueError, "tasks must hold at least one VelocityTask, got none"),
        ({"obs": torch.zeros(2, 17)}, ValueError, r"obs must have shape \(1, \*, 17\), got \(2, 17\)"),
        ({"action": torch.zeros(1, 5)}, ValueError, r"action must have shape \(1, \*, 6\), got \(1, 5\)"),
        ({"next_obs": None}, TypeError, "next_obs must be a torch.Tensor, got NoneType"),
    ],
)
def test_outcomes_bad_argument_raises(change, error, text, monkeypatch):
    monkeypatch.setattr(mujoco, "find_spec", lambda name: object())
    dist = HalfCheetahVelocityTasks()
    good = {"tasks": dist.sample(1), "obs": torch.zeros(1, 17), "action": torch.zeros(1, 6)}
    with pytest.raises(error, match=f"^HalfCheetahVelocityTasks.outcomes: {text}$"):
        dist.outcomes(**{**good, "next_obs": torch.zeros(1, 17), **change})


def test_methods_bad_argument_raises(dist):
    where = type(dist).__name__
    with pytest.raises(ValueError, match=f"^{where}.sample: split must be one of 'train', 'valid', 'test', got 'dev'$"):
        dist.sample(1, "dev")
    with pytest.raises(ValueError, match=f"^{where}.make_env: tasks must hold at least one .*Task, got none$"):
        dist.make_env([])
    with pytest.raises(ValueError, match=rf"^{where}.reset_seeds: seed must be in \[0, 2\*\*32\), got -1$"):
        dist.reset_seeds(dist.sample(1), -1)


@pytest.mark.parametrize("algo", ["dynamics", "rl2"])
def test_cli_jobs_run_on_half_cheetah(algo, tmp_path, capsys):
    pytest.importorskip("mujoco", reason="the extra mujoco is not installed")
    flags = {
        "dynamics": ["--updates_per_epoch=1", "--adaptation_calls=1", "--plan_tasks=1", "--plan_steps=2", "--query=8"],
        "rl2": ["--steps=8", "--episodes=1"],
    }[algo]
    common = ["--num_epochs=1", "--tasks_per_update=2", "--test_tasks=2", "--hidden_dim=8", f"--out={tmp_path}"]
    assert cli.main([f"--algo={algo}", "--env_name=HalfCheetah-Vel", *common, *flags]) == 0
    assert (tmp_path / "report.json").exists() and "Results" in capsys.readouterr().out


def test_step_simulator_without_forward_reward_raises(simulated, monkeypatch):
    env = simulated.make_env(simulated.sample(2))
    step = env.env.step

    def renamed(actions):
        *values, info = step(actions)
        return (*values, {name.replace("reward_forward", "forward_reward"): value for name, value in info.items()})

    monkeypatch.setattr(env.env, "step", renamed)
    env.reset(seed=0)
    text = r"gymnasium \S+ does not report reward_forward, which the goal replaces: install a version that"
    with pytest.raises(ValueError, match=f"^{simulated.name}: {text} eaml_ext supports$"):
        env.step(np.zeros((2, simulated.action_dim), np.float32))
    env.close()
