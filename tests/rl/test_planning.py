from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary

from eaml_ext.rl import Planner, collect, planned_returns
from eaml_ext.tasks import CartPoleTasks

DIST = CartPoleTasks()


class Physics:
    """A model without error: the equations of Barto, Sutton & Anderson (1983), integrated as in Gymnasium."""

    def __init__(self, tasks):
        names = ("length", "masscart", "masspole", "force_mag", "gravity", "flip")
        self.p = {name: torch.tensor([getattr(task, name) for task in tasks])[:, None] for name in names}

    def init_hidden(self, tasks):
        return torch.zeros(tasks, 1, 0)

    def step(self, obs, action, start, state):
        p, (x, v, angle, w) = self.p, obs.unbind(-1)
        force = torch.where((action[..., 1] > 0.5) ^ p["flip"], p["force_mag"], -p["force_mag"])
        mass, moment = p["masscart"] + p["masspole"], p["masspole"] * p["length"]
        cos, sin = angle.cos(), angle.sin()
        push = (force + moment * w**2 * sin) / mass
        turn = (p["gravity"] * sin - cos * push) / (p["length"] * (4 / 3 - p["masspole"] * cos**2 / mass))
        pull = push - moment * turn * cos / mass
        return torch.stack([x + 0.02 * v, v + 0.02 * pull, angle + 0.02 * w, w + 0.02 * turn], -1), state


class Counter:
    """A model of a point that moves by its action; its state counts the steps since the start of the episode."""

    def __init__(self):
        self.seen = []

    def init_hidden(self, tasks):
        return torch.zeros(tasks, 1, 1)

    def step(self, obs, action, start, state):
        state = state.masked_fill(start[..., None], 0.0)
        self.seen.append((tuple(obs.shape), state.clone()))
        return obs + action, state + 1


def towards(goal):
    """Rewards minus the squared distance from ``goal`` ``(tasks, 2)``; no termination."""

    def outcomes(obs, action, next_obs):
        reward = -(next_obs - goal[:, None]).square().sum(-1)
        return reward, torch.zeros_like(reward, dtype=torch.bool)

    return outcomes


def test_physics_predict_gymnasiums_transitions():
    tasks = DIST.sample(6, "test")
    data = collect(DIST, tasks, 40, seed=0)
    predicted, _ = Physics(tasks).step(data.observations, data.actions, None, None)
    torch.testing.assert_close(predicted, data.next_observations, rtol=1e-4, atol=1e-5)
    _, ends = DIST.outcomes(tasks, data.observations, data.actions, data.next_observations)
    assert torch.equal(ends, data.terminations) and ends.any()


@pytest.mark.parametrize("iterations", [1, 2])
def test_planner_balances_poles_with_the_right_model_only(iterations):
    tasks = DIST.sample(6, "test")
    returns = {}
    for name, shown in (("right", tasks), ("flipped", [replace(task, flip=not task.flip) for task in tasks])):
        outcomes = partial(DIST.outcomes, tasks)
        planner = Planner(
            Physics(shown), outcomes, DIST.action_space, horizon=15, candidates=24, iterations=iterations, elites=4
        )
        returns[name] = planned_returns(DIST, tasks, planner, steps=60)
    chance = planned_returns(DIST, tasks, None, steps=60).mean()
    assert returns["right"].mean() > 50 and chance < 25, (returns, chance)
    assert returns["flipped"].mean() < 20


@pytest.mark.parametrize("iterations", [1, 8])
def test_planner_continuous_actions_approach_the_goal_of_each_task(iterations):
    goal = torch.tensor([[0.3, -0.4], [-0.2, 0.1], [0.0, 0.45]])
    planner = Planner(
        Counter(), towards(goal), Box(-0.5, 0.5, (2,)), horizon=2, candidates=200, iterations=iterations, elites=20
    )
    generator = np.random.default_rng(0)
    action = planner(np.zeros((3, 2), np.float32), np.ones(3, bool), generator)
    assert action.shape == (3, 2) and action.dtype == np.float32 and (np.abs(action) <= 0.5).all()
    error = np.abs(action - goal.numpy()).max()
    assert error < (0.02 if iterations > 1 else 0.3), error  # 200 draws are about 0.07 apart; CEM gets closer


def test_planner_state_is_kept_over_an_episode_and_zeroed_at_the_next():
    model = Counter()
    planner = Planner(model, towards(torch.zeros(2, 2)), Box(-1, 1, (2,)), horizon=3, candidates=5)
    generator = np.random.default_rng(0)
    for resets in ([True, True], [False, False], [False, True]):
        model.seen.clear()
        planner(np.zeros((2, 2), np.float32), np.array(resets), generator)
        assert [shape for shape, _ in model.seen] == [(2, 5, 2)] * 3 + [(2, 1, 2)]
    before = model.seen[0][1][:, 0, 0]  # at the third step of task 0, the first of task 1
    assert before.tolist() == [2.0, 0.0] and model.seen[2][1][:, 0, 0].tolist() == [4.0, 2.0]


def test_planner_equal_returns_continue_the_last_plan():
    def nothing_matters(obs, action, next_obs):
        return torch.zeros(obs.shape[:2]), torch.zeros(obs.shape[:2], dtype=torch.bool)

    planner = Planner(Counter(), nothing_matters, Box(-1, 1, (2,)), horizon=4, candidates=6)
    generator, done = np.random.default_rng(0), []
    for t in range(4):
        done.append(planner(np.zeros((1, 2), np.float32), np.array([t == 0]), generator))
        if t == 0:
            plan = planner._plan[0].numpy()
    np.testing.assert_array_equal(np.concatenate(done), plan)


def test_planner_rewards_after_termination_or_not_finite_do_not_count():
    def outcomes(obs, action, next_obs):
        over = next_obs[..., 0] > 0.5
        reward = torch.where(obs[..., 0] > 0.5, torch.inf, action[..., 0])  # after the end
        return torch.where(action[..., 1] > 0.5, torch.nan, reward), over

    planner = Planner(Counter(), outcomes, Box(-1, 1, (2,)), horizon=2, candidates=400)
    action = planner(np.zeros((1, 2), np.float32), np.array([True]), np.random.default_rng(0))
    assert np.isfinite(action).all() and action[0, 0] > 0.3 and action[0, 1] <= 0.5, action


def test_planner_same_seed_gives_same_actions():
    tasks = DIST.sample(4, "test")
    actions = []
    for seed in (0, 0, 1):
        planner = Planner(Physics(tasks), partial(DIST.outcomes, tasks), DIST.action_space, candidates=4)
        actions.append(collect(DIST, tasks, 12, seed, planner).actions)
    assert torch.equal(actions[0], actions[1]) and not torch.equal(actions[0], actions[2])


def test_planned_returns_are_those_of_the_first_episode():
    tasks = DIST.sample(5, "test")
    data = collect(DIST, tasks, 60, seed=3)
    lengths = [int(ends.nonzero()[0]) + 1 if ends.any() else 60 for ends in data.terminations]
    want = [float(rewards[:n].sum()) for rewards, n in zip(data.rewards, lengths, strict=True)]
    assert planned_returns(DIST, tasks, None, 60, seed=3).tolist() == want


class Nothing:
    pass


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"model": Nothing()}, TypeError, "model must have step and init_hidden, got Nothing"),
        ({"outcomes": 3}, TypeError, "outcomes must be callable, got int"),
        ({"action_space": MultiBinary(3)}, TypeError, "action_space must be Discrete or Box, got MultiBinary"),
        ({"action_space": Box(-np.inf, 1, (1,))}, ValueError, "action_space must be bounded, got Box.*"),
        ({"horizon": 0}, ValueError, "horizon must be > 0, got 0"),
        ({"candidates": 2.0}, TypeError, "candidates must be an integer, got 2.0"),
        ({"candidates": 1, "elites": 1}, ValueError, "candidates must be >= 2, got 1"),
        ({"iterations": 0}, ValueError, "iterations must be > 0, got 0"),
        ({"elites": 65}, ValueError, "elites must be <= candidates 64, got 65"),
        ({"elites": "2"}, TypeError, "elites must be an integer, got '2'"),
        ({"gamma": 1.1}, ValueError, "gamma must be <= 1, got 1.1"),
        ({"gamma": -0.1}, ValueError, "gamma must be >= 0, got -0.1"),
    ],
)
def test_planner_bad_argument_raises(kwargs, error, text):
    with pytest.raises(error, match=f"^Planner: {text}$"):
        Planner(**{"model": Counter(), "outcomes": towards, "action_space": Discrete(2), **kwargs})


def test_planner_numpy_scalars_equal_python_numbers():
    counts = {"horizon": np.int64(3), "candidates": np.int32(40), "iterations": np.int8(2)}
    planner = Planner(Counter(), towards(torch.zeros(1, 2)), Box(-1, 1, (2,)), **counts, gamma=np.float32(0.5))
    numbers = (planner.horizon, planner.candidates, planner.iterations, planner.elites, planner.gamma)
    assert numbers == (3, 40, 2, 4, 0.5) and [type(n) for n in numbers] == [int, int, int, int, float]
    planner(np.zeros((1, 2), np.float32), np.array([True]), np.random.default_rng(0))
    data = collect(DIST, tasks := DIST.sample(2, "test"), 12, 3)
    returns = planned_returns(DIST, tasks, None, np.int64(12), np.int64(3))
    assert torch.equal(returns, data.rewards.masked_fill(data.resets.cumsum(1) != 1, 0.0).sum(1))
