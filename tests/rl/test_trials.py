import inspect

import numpy as np
import pytest
import torch
from gymnasium.wrappers.vector import TransformObservation
from learners import HIDDEN, make_policy
from scripted import Script
from torch.distributions import Categorical, Independent, Normal

from eaml_ext.rl import MAMLRL, RL2, Trials, feature_dim, rollout
from eaml_ext.tasks import CartPoleTasks, SeedTasks


class Witness:
    """Act at random and record the arguments; the state counts the steps, and the value adds the state before it."""

    def __init__(self, dist, continuous=False):
        self.dist, self.continuous, self.calls = dist, continuous, []

    def init_hidden(self, batch):
        return torch.zeros(batch, 1)

    def step(self, obs, state, reset):
        self.calls.append((obs.clone(), state.clone(), reset.clone()))
        state = state.masked_fill(reset[:, None], 0.0)
        n = len(obs)
        if self.continuous:
            distribution = Independent(Normal(torch.zeros(n, self.dist.action_dim), torch.full((n, 1), 3.0)), 1)
        else:
            distribution = Categorical(logits=torch.zeros(n, self.dist.action_dim))
        return distribution, 1000 * obs[:, 1] + state[:, 0], state + 1


@pytest.mark.parametrize("keep_state", [True, False])
def test_rollout_inputs_follow_from_actions_rewards_and_resets(keep_state):
    witness = Witness(HIDDEN)
    trials = rollout(HIDDEN, HIDDEN.sample(5), witness, 0, episodes=4, keep_state=keep_state)
    assert trials.episode_starts.sum(1).tolist() == [4] * 5 and (trials.episode_starts & trials.episode_ends).sum() == 0
    for row in trials:
        time = int(row.mask.sum())
        observation, action, reward, start = row.inputs[:time].split((2, 2, 1, 1), dim=1)
        assert torch.equal(start[:, 0] == 1, row.episode_starts[:time]) and row.episode_starts[0]
        assert torch.equal(row.episode_ends[: time - 1], row.episode_starts[1:time]) and row.episode_ends[time - 1]
        fresh = row.episode_starts[1:time] & (not keep_state)
        before = torch.nn.functional.one_hot(row.actions[: time - 1], 2).float()
        assert torch.equal(action[1:], before.masked_fill(fresh[:, None], 0)) and (action[0] == 0).all()
        assert torch.equal(reward[1:, 0], row.rewards[: time - 1].masked_fill(fresh, 0)) and reward[0] == 0
        # The state counts the steps since it was zeroed, without the calls that reset the environment.
        resets = row.resets[:time]
        assert torch.equal(resets, row.episode_starts[:time] if not keep_state else torch.arange(time) == 0)
        since = torch.arange(time) - torch.where(resets, torch.arange(time), 0).cummax(0).values
        state = row.values[:time] - 1000 * observation[:, 1]
        assert torch.allclose(state, since.float(), atol=1e-2)
        # CartPole's initial observations are within 0.05 of the origin.
        assert (observation[row.episode_starts[:time]].abs() <= 0.05).all()


def test_rollout_next_values_at_episode_end_are_of_the_final_observation():
    trials = rollout(HIDDEN, HIDDEN.sample(6), Witness(HIDDEN), 1, episodes=3)
    inside = trials.mask[:, :-1] & ~trials.episode_ends[:, :-1]
    assert torch.equal(trials.next_values[:, :-1][inside], trials.values[:, 1:][inside])
    # Random episodes end with the pole beyond 12 degrees. The final state has counted the last step, too.
    last = trials.episode_ends & trials.mask
    steps = torch.arange(trials.mask.shape[1]) + 1.0
    angle = (trials.next_values - steps) / 1000
    assert trials.terminations[last].all() and (angle[last].abs() > 0.2094).all() and (angle[last].abs() < 0.4).all()


def test_rollout_time_limit_is_no_termination():
    dist = SeedTasks("Pendulum-v1")
    trials = rollout(dist, dist.sample(2), Witness(dist, continuous=True), 0, steps=450)
    assert trials.mask.all() and not trials.terminations.any()
    assert trials.episode_ends.nonzero()[:, 1].tolist() == [199, 399, 449] * 2
    assert trials.actions.shape == (2, 450, 1) and trials.actions.abs().max() > 2  # as drawn, not as clipped
    assert trials.episode_returns(2).shape == (2, 2)


@pytest.mark.parametrize("length", [{"episodes": 3}, {"steps": 70}])
def test_rollout_log_probs_and_values_equal_those_of_a_scan(length):
    net = make_policy(HIDDEN)
    trials = rollout(HIDDEN, HIDDEN.sample(4), net, 0, **length)
    distribution, values, _ = net.scan(trials.inputs, None, trials.resets)
    assert torch.allclose(distribution.log_prob(trials.actions)[trials.mask], trials.log_probs[trials.mask], atol=1e-5)
    assert torch.allclose(values[trials.mask], trials.values[trials.mask], atol=1e-5)
    assert trials.episode_starts.sum() > 4  # the state is kept over the end of an episode


def test_rollout_continuous_log_probs_equal_those_of_a_scan():
    dist = SeedTasks("Pendulum-v1")
    net = make_policy(dist, continuous=True)
    trials = rollout(dist, dist.sample(3), net, 0, steps=210, keep_state=False)
    distribution, _, _ = net.scan(trials.inputs, None, trials.resets)
    assert torch.allclose(distribution.log_prob(trials.actions), trials.log_probs, atol=1e-4)
    assert trials.resets.sum(1).tolist() == [2] * 3


def test_rollout_same_arguments_give_same_bits_whatever_the_global_generator():
    net, tasks = make_policy(HIDDEN), HIDDEN.sample(3)
    first = rollout(HIDDEN, tasks, net, 0, steps=40)
    torch.manual_seed(123)
    again, other = (rollout(HIDDEN, tasks, net, seed, steps=40) for seed in (0, 1))
    for field in Trials.__dataclass_fields__:
        assert torch.equal(getattr(first, field), getattr(again, field))
    assert not torch.equal(first.actions, other.actions)


def test_rollout_shorter_trials_are_padded_at_the_end():
    trials = rollout(HIDDEN, HIDDEN.sample(8), Witness(HIDDEN), 0, episodes=2)
    lengths = trials.mask.sum(1)
    assert lengths.max() == trials.mask.shape[1] > lengths.min()
    assert torch.equal(trials.mask, torch.arange(trials.mask.shape[1]) < lengths[:, None])
    assert (trials.rewards == trials.mask.float()).all() and torch.equal(trials.rewards.sum(1), lengths.float())


def test_episode_returns_equal_hand_computed():
    def row(*values):
        return torch.tensor([values])

    starts, mask = row(1, 0, 1, 1, 0, 0).bool(), row(1, 1, 1, 1, 1, 0).bool()
    rewards = row(1.0, 2, 4, 8, 16, 0)
    trials = Trials(
        *[rewards] * 5,
        rewards=rewards,
        episode_starts=starts,
        terminations=mask,
        episode_ends=mask,
        mask=mask,
        resets=starts,
        truncations=torch.zeros_like(mask),
    )
    assert trials.episode_returns(3).tolist() == [[3, 4, 24]]
    assert trials.episode_returns(2).tolist() == [[3, 4]]
    assert trials.episode_returns(4).isnan().tolist() == [[False, False, False, True]]


def test_trials_advantages_episodic_and_not_equal_hand_computed():
    def row(*values):
        return torch.tensor([values])

    one, values = row(1.0, 1, 1, 0), row(10.0, 20, 30, 99)
    ends, mask = row(0, 1, 1, 1).bool(), row(1, 1, 1, 0).bool()
    trials = Trials(
        inputs=one,
        actions=one,
        log_probs=one,
        values=values,
        next_values=row(20.0, 50, 60, 99),
        rewards=one,
        episode_starts=row(1, 0, 1, 0).bool(),
        terminations=row(0, 1, 0, 0).bool(),
        episode_ends=ends,
        mask=mask,
        resets=row(1, 0, 0, 0).bool(),
        truncations=row(0, 0, 0, 0).bool(),
    )
    within = trials.advantages(0.5, 0.0)[mask]
    assert within.tolist() == [1 + 0.5 * 20 - 10, 1 - 20, 1 + 0.5 * 60 - 30]
    across = trials.advantages(0.5, 0.0, episodic=False)[mask]
    assert across.tolist() == [1 + 0.5 * 20 - 10, 1 + 0.5 * 30 - 20, 1 + 0.5 * 60 - 30]
    summed = trials.advantages(1.0, 1.0, episodic=False)[mask]
    assert summed.tolist() == [3 + 60 - 10, 2 + 60 - 20, 1 + 60 - 30]


def test_rollout_greedy_takes_the_most_probable_action():
    class Decided(Witness):
        def step(self, obs, state, reset):
            _, value, state = super().step(obs, state, reset)
            return Categorical(logits=torch.tensor([[0.0, 0.1]]).expand(len(obs), 2)), value, state

    assert (rollout(HIDDEN, HIDDEN.sample(2), Decided(HIDDEN), 0, steps=20, greedy=True).actions == 1).all()
    assert (rollout(HIDDEN, HIDDEN.sample(2), Decided(HIDDEN), 0, steps=20).actions == 0).any()


class SameStep(CartPoleTasks):
    def make_env(self, tasks):
        env = super().make_env(tasks)
        env.metadata = {**env.metadata, "autoreset_mode": "SAME_STEP"}
        return env


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"dist": CartPoleTasks}, TypeError, "dist must be a task distribution as of make_tasks, got type"),
        ({"tasks": []}, ValueError, "tasks must hold at least one Task, got none"),
        ({"policy": print}, TypeError, "policy must have step and init_hidden, got builtin_function_or_method"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*32\), got -1"),
        ({"steps": 3}, ValueError, "one of episodes and steps must be given, got 1 and 3"),
        ({"episodes": None}, ValueError, "one of episodes and steps must be given, got None and None"),
        ({"episodes": 0}, ValueError, "episodes must be > 0, got 0"),
        ({"episodes": None, "steps": 1.5}, TypeError, "steps must be an integer, got 1.5"),
        ({"keep_state": 1}, TypeError, "keep_state must be True or False, got int"),
        ({"greedy": None}, TypeError, "greedy must be True or False, got NoneType"),
        ({"dist": SameStep()}, ValueError, "dist must make environments in autoreset mode NEXT_STEP, got SAME_STEP"),
    ],
)
def test_rollout_bad_argument_raises(kwargs, error, text):
    arguments = {"dist": HIDDEN, "tasks": SameStep().sample(1), "policy": Witness(HIDDEN), "seed": 0, "episodes": 1}
    with pytest.raises(error, match=f"^rollout: {text}$"):
        rollout(**{**arguments, **kwargs})


def test_trials_bad_argument_raises():
    trials = rollout(HIDDEN, HIDDEN.sample(1), Witness(HIDDEN), 0, episodes=1)
    with pytest.raises(ValueError, match=r"^Trials.episode_returns: episodes must be > 0, got 0$"):
        trials.episode_returns(0)
    with pytest.raises(TypeError, match=r"^Trials.advantages: episodic must be True or False, got int$"):
        trials.advantages(episodic=1)


def test_rollout_projected_observations_reach_the_policy():
    dist = CartPoleTasks(hide_velocity=True, projection=5)
    tasks = dist.sample(3)
    assert isinstance(dist.make_env(tasks), TransformObservation)
    trials = rollout(dist, tasks, make_policy(dist), 0, steps=10)
    spans = np.array([task.projection for task in tasks])
    for i in range(3):  # observations lie in the span of the task's matrix
        seen = trials.inputs[i, :, :5].numpy()
        assert np.abs(seen - seen @ spans[i] @ spans[i].T).max() < 1e-6 < np.abs(seen).max()


@pytest.mark.parametrize("truncates", [False, True])
@pytest.mark.parametrize("returns", [(3.0,), (3.0, 6.0), (3.0, 6.0, 9.0)])
def test_finished_returns_whole_episodes_include_the_last(returns, truncates):
    dist = Script(returns, length=2, truncates=truncates)
    trials = rollout(dist, dist.sample(2), make_policy(dist), 0, episodes=len(returns))
    assert trials.finished_returns().tolist() == [*returns, *returns]
    trainer = RL2(
        make_policy(dist), dist, episodes=len(returns), tasks_per_update=2, num_minibatches=1, update_epochs=1
    )
    assert trainer.update() == sum(returns) / len(returns)


@pytest.mark.parametrize("truncates", [False, True])
@pytest.mark.parametrize(
    ("steps", "finished", "per_episode"),
    [(1, [], 0.0), (2, [3.0], 3.0), (3, [3.0], 1.5), (4, [3.0, 6.0], 4.5), (5, [3.0, 6.0], 3.0)],
)
def test_finished_returns_episode_cut_by_the_recording_is_left_out(steps, finished, per_episode, truncates):
    dist = Script((3.0, 6.0, 9.0), length=2, truncates=truncates)
    trials = rollout(dist, dist.sample(2), make_policy(dist), 0, steps=steps)
    assert trials.finished_returns().tolist() == 2 * finished
    assert trials.truncations.sum() == truncates * 2 * len(finished) and trials.truncations.dtype == torch.bool
    trainer = RL2(make_policy(dist), dist, steps=steps, tasks_per_update=2, num_minibatches=1, update_epochs=1)
    assert trainer.update() == per_episode


def test_finished_returns_trials_with_different_episode_counts_equal_hand_computed():
    starts = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 0, 0]]).bool()
    terminations = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 0]]).bool()
    rewards, mask = torch.tensor([[1.0, 2, 4], [8, 16, 32], [64, 128, 0]]), torch.ones(3, 3, dtype=torch.bool)
    mask[2, 2] = False
    trials = Trials(
        *[rewards] * 5,
        rewards=rewards,
        episode_starts=starts,
        terminations=terminations,
        episode_ends=mask,
        mask=mask,
        resets=starts,
        truncations=torch.zeros_like(mask),
    )
    assert trials.finished_returns().tolist() == [1, 2, 56]


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("length", [{"episodes": 4}, {"steps": 12}])
@pytest.mark.parametrize(("kind", "move", "value"), [("reward", 5, np.nan), ("observation", 5, -np.inf)])
def test_rollout_non_finite_number_names_environment_task_and_step(kind, move, value, length, continuous):
    dist = Script(length=3, continuous=continuous, fault=(kind, 1, move, value))
    text = rf"^rollout: {kind} must be finite, got {value} at step 5 of tasks\[1\] of script-v1, script/train/0/0/1$"
    with pytest.raises(ValueError, match=text):
        rollout(dist, dist.sample(3), make_policy(dist, continuous=continuous), 0, **length)


def test_rollout_non_finite_first_observation_is_at_step_0():
    dist = Script(fault=("observation", 0, 0, np.nan))
    text = r"^rollout: observation must be finite, got nan at step 0 of tasks\[0\] of script-v1, script/train/0/0/0$"
    with pytest.raises(ValueError, match=text):
        rollout(dist, dist.sample(1), make_policy(dist), 0, steps=1)


@pytest.mark.parametrize("kind", ["reward", "observation"])
def test_rollout_non_finite_number_after_a_tasks_last_step_does_not_count(kind):
    class Uneven(Script):
        def make_env(self, tasks):
            env = super().make_env(tasks)
            env.step = lambda action, step=env.step: self.slow(*step(action))
            return env

        def slow(self, observation, reward, terminated, truncated, info):
            self.calls += 1
            if self.calls == 3:
                (observation if kind == "observation" else reward)[0] = np.nan
            terminated[1] = self.calls == 8
            return observation, reward, terminated, truncated, info

    dist = Uneven(length=1)
    dist.calls = 0
    trials = rollout(dist, dist.sample(2), make_policy(dist), 0, episodes=1)
    assert trials.mask.sum(1).tolist() == [1, 8] and all(value.isfinite().all() for value in vars(trials).values())


@pytest.mark.parametrize("continuous", [False, True])
def test_rollout_non_finite_policy_raises(continuous):
    dist = Script(length=3, continuous=continuous)
    net = make_policy(dist, continuous=continuous)
    with torch.no_grad():
        net.actor.bias.fill_(torch.nan)
    text = r"^rollout: policy's action distribution must be finite, got nan at step 0 of tasks\[0\] of script-v1, "
    with pytest.raises(ValueError, match=text):
        rollout(dist, dist.sample(2), net, 0, steps=1)


def test_rollout_episode_without_an_end_raises_at_the_limit():
    dist = Script(length=np.inf)
    text = (
        r"^rollout: episodes must end within max_episode_steps, got 7 steps without an end in tasks\[0\] of script-v1, "
        "script/train/0/0/0$"
    )
    with pytest.raises(ValueError, match=text):
        rollout(dist, dist.sample(1), Witness(dist), 0, episodes=1, max_episode_steps=7)
    for function in (rollout, RL2, RL2.evaluate, MAMLRL.evaluate):
        assert inspect.signature(function).parameters["max_episode_steps"].default == 10_000


def test_rollout_limit_is_for_each_episode_and_for_whole_episodes_only():
    dist = Script(length=5)
    tasks, net = dist.sample(2), make_policy(dist)
    trials = rollout(dist, tasks, net, 0, episodes=3, max_episode_steps=5)
    assert trials.mask.sum(1).tolist() == [15, 15]
    with pytest.raises(ValueError, match="got 4 steps without an end"):
        rollout(dist, tasks, net, 0, episodes=3, max_episode_steps=4)
    assert rollout(Script(length=np.inf), tasks, net, 0, steps=20, max_episode_steps=4).mask.all()
    with pytest.raises(TypeError, match=r"^rollout: max_episode_steps must be an integer, got 4.5$"):
        rollout(dist, tasks, net, 0, episodes=3, max_episode_steps=4.5)


@pytest.mark.parametrize("length", [{"episodes": np.int64(2)}, {"steps": np.int32(6)}])
def test_rollout_numpy_scalars_equal_python_numbers(length):
    dist = Script(length=3)
    tasks, net = dist.sample(2), make_policy(dist)
    trials = rollout(dist, tasks, net, np.uint32(1), **length, max_episode_steps=np.int16(9))
    plain = rollout(dist, tasks, net, 1, **{name: int(value) for name, value in length.items()})
    assert all(torch.equal(value, getattr(plain, name)) for name, value in vars(trials).items())
    assert trials.episode_returns(np.int64(2)).tolist() == [[1.0, 1.0]] * 2
    assert type(feature_dim(dist)) is int
    advantages = trials.advantages(np.float32(0.5), np.float64(0.25))
    assert torch.equal(advantages, trials.advantages(0.5, 0.25)) and advantages.dtype == torch.float32
