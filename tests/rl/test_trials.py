import numpy as np
import pytest
import torch
from gymnasium.wrappers.vector import TransformObservation
from torch.distributions import Categorical, Independent, Normal

from eaml_ext.rl import SSMMetaPolicy, Trials, feature_dim, play
from eaml_ext.tasks import CartPoleTasks, SeedTasks

HIDDEN = CartPoleTasks(hide_velocity=True)


class Witness:
    """Acts at random, remembers what it was given; its state counts its steps, its value is the state before it."""

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


def policy(dist=HIDDEN, **options):
    return SSMMetaPolicy(feature_dim(dist), dist.action_dim, 8, state_size=4, **options)


@pytest.mark.parametrize("keep_state", [True, False])
def test_what_a_policy_sees_follows_from_what_happened(keep_state):
    witness = Witness(HIDDEN)
    trials = play(HIDDEN, HIDDEN.sample(5), witness, 0, episodes=4, keep_state=keep_state)
    assert trials.starts.sum(1).tolist() == [4] * 5 and (trials.starts & trials.ends).sum() == 0
    for row in trials:
        time = int(row.mask.sum())
        observation, action, reward, start = row.inputs[:time].split((2, 2, 1, 1), dim=1)
        assert torch.equal(start[:, 0] == 1, row.starts[:time]) and row.starts[0]
        assert torch.equal(row.ends[: time - 1], row.starts[1:time]) and row.ends[time - 1]
        fresh = row.starts[1:time] & (not keep_state)
        before = torch.nn.functional.one_hot(row.actions[: time - 1], 2).float()
        assert torch.equal(action[1:], before.masked_fill(fresh[:, None], 0)) and (action[0] == 0).all()
        assert torch.equal(reward[1:, 0], row.rewards[: time - 1].masked_fill(fresh, 0)) and reward[0] == 0
        # The state counts the steps since it was zeroed, and stands still while the environment resets.
        resets = row.resets[:time]
        assert torch.equal(resets, row.starts[:time] if not keep_state else torch.arange(time) == 0)
        since = torch.arange(time) - torch.where(resets, torch.arange(time), 0).cummax(0).values
        state = row.values[:time] - 1000 * observation[:, 1]
        assert torch.allclose(state, since.float(), atol=1e-2)
        # An observation within an episode starts as within 0.05 of the origin only at its start.
        assert (observation[row.starts[:time]].abs() <= 0.05).all()


def test_next_values_see_the_true_final_observation():
    trials = play(HIDDEN, HIDDEN.sample(6), Witness(HIDDEN), 1, episodes=3)
    inside = trials.mask[:, :-1] & ~trials.ends[:, :-1]
    assert torch.equal(trials.next_values[:, :-1][inside], trials.values[:, 1:][inside])
    # A random episode ends because the pole is beyond 12 degrees; the memory has one step more than at the last action.
    last = trials.ends & trials.mask
    steps = torch.arange(trials.mask.shape[1]) + 1.0
    angle = (trials.next_values - steps) / 1000
    assert trials.terminations[last].all() and (angle[last].abs() > 0.2094).all() and (angle[last].abs() < 0.4).all()


def test_a_time_limit_is_no_termination():
    dist = SeedTasks("Pendulum-v1")
    trials = play(dist, dist.sample(2), Witness(dist, continuous=True), 0, steps=450)
    assert trials.mask.all() and not trials.terminations.any()
    assert trials.ends.nonzero()[:, 1].tolist() == [199, 399, 449] * 2
    assert trials.actions.shape == (2, 450, 1) and trials.actions.abs().max() > 2  # as drawn, not as clipped
    assert trials.episode_returns(2).shape == (2, 2)


@pytest.mark.parametrize("length", [{"episodes": 3}, {"steps": 70}])
def test_the_log_of_acting_is_what_a_scan_over_the_trial_says(length):
    net = policy()
    trials = play(HIDDEN, HIDDEN.sample(4), net, 0, **length)
    distribution, values, _ = net.scan(trials.inputs, None, trials.resets)
    assert torch.allclose(distribution.log_prob(trials.actions)[trials.mask], trials.log_probs[trials.mask], atol=1e-5)
    assert torch.allclose(values[trials.mask], trials.values[trials.mask], atol=1e-5)
    assert trials.starts.sum() > 4  # memory crosses an episode's end


def test_the_log_of_a_continuous_policy_is_what_a_scan_says():
    dist = SeedTasks("Pendulum-v1")
    net = policy(dist, continuous=True)
    trials = play(dist, dist.sample(3), net, 0, steps=210, keep_state=False)
    distribution, _, _ = net.scan(trials.inputs, None, trials.resets)
    assert torch.allclose(distribution.log_prob(trials.actions), trials.log_probs, atol=1e-4)
    assert trials.resets.sum(1).tolist() == [2] * 3


def test_same_arguments_same_bits_other_seeds_other_actions_whatever_torchs_own_generator():
    net, tasks = policy(), HIDDEN.sample(3)
    first = play(HIDDEN, tasks, net, 0, steps=40)
    torch.manual_seed(123)
    again, other = (play(HIDDEN, tasks, net, seed, steps=40) for seed in (0, 1))
    for field in Trials.__dataclass_fields__:
        assert torch.equal(getattr(first, field), getattr(again, field))
    assert not torch.equal(first.actions, other.actions)


def test_a_row_is_padded_after_its_last_episode_and_its_neighbours_go_on():
    trials = play(HIDDEN, HIDDEN.sample(8), Witness(HIDDEN), 0, episodes=2)
    lengths = trials.mask.sum(1)
    assert lengths.max() == trials.mask.shape[1] > lengths.min()
    assert torch.equal(trials.mask, torch.arange(trials.mask.shape[1]) < lengths[:, None])
    assert (trials.rewards == trials.mask.float()).all() and torch.equal(trials.rewards.sum(1), lengths.float())


def test_episode_returns_by_hand():
    def row(*values):
        return torch.tensor([values])

    starts, mask = row(1, 0, 1, 1, 0, 0).bool(), row(1, 1, 1, 1, 1, 0).bool()
    rewards = row(1.0, 2, 4, 8, 16, 0)
    trials = Trials(
        *[rewards] * 5, rewards=rewards, starts=starts, terminations=mask, ends=mask, mask=mask, resets=starts
    )
    assert trials.episode_returns(3).tolist() == [[3, 4, 24]]
    assert trials.episode_returns(2).tolist() == [[3, 4]]
    assert trials.episode_returns(4).isnan().tolist() == [[False, False, False, True]]


def test_advantages_within_and_across_episodes_by_hand():
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
        starts=row(1, 0, 1, 0).bool(),
        terminations=row(0, 1, 0, 0).bool(),
        ends=ends,
        mask=mask,
        resets=row(1, 0, 0, 0).bool(),
    )
    within = trials.advantages(0.5, 0.0)[mask]
    assert within.tolist() == [1 + 0.5 * 20 - 10, 1 - 20, 1 + 0.5 * 60 - 30]
    across = trials.advantages(0.5, 0.0, across_episodes=True)[mask]
    assert across.tolist() == [1 + 0.5 * 20 - 10, 1 + 0.5 * 30 - 20, 1 + 0.5 * 60 - 30]
    summed = trials.advantages(1.0, 1.0, across_episodes=True)[mask]
    assert summed.tolist() == [3 + 60 - 10, 2 + 60 - 20, 1 + 60 - 30]


def test_greedy_takes_the_likeliest_action():
    class Decided(Witness):
        def step(self, obs, state, reset):
            _, value, state = super().step(obs, state, reset)
            return Categorical(logits=torch.tensor([[0.0, 0.1]]).expand(len(obs), 2)), value, state

    assert (play(HIDDEN, HIDDEN.sample(2), Decided(HIDDEN), 0, steps=20, greedy=True).actions == 1).all()
    assert (play(HIDDEN, HIDDEN.sample(2), Decided(HIDDEN), 0, steps=20).actions == 0).any()


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
def test_play_refuses(kwargs, error, text):
    arguments = {"dist": HIDDEN, "tasks": SameStep().sample(1), "policy": Witness(HIDDEN), "seed": 0, "episodes": 1}
    with pytest.raises(error, match=f"^play: {text}$"):
        play(**{**arguments, **kwargs})


def test_trials_refuse():
    trials = play(HIDDEN, HIDDEN.sample(1), Witness(HIDDEN), 0, episodes=1)
    with pytest.raises(ValueError, match=r"^Trials.episode_returns: episodes must be > 0, got 0$"):
        trials.episode_returns(0)
    with pytest.raises(TypeError, match=r"^Trials.advantages: across_episodes must be True or False, got int$"):
        trials.advantages(across_episodes=1)


def test_projected_observations_reach_the_policy():
    dist = CartPoleTasks(hide_velocity=True, projection=5)
    tasks = dist.sample(3)
    assert isinstance(dist.make_env(tasks), TransformObservation)
    trials = play(dist, tasks, policy(dist), 0, steps=10)
    spans = np.array([task.projection for task in tasks])
    for i in range(3):  # observations lie in the plane that the task's matrix spans
        seen = trials.inputs[i, :, :5].numpy()
        assert np.abs(seen - seen @ spans[i] @ spans[i].T).max() < 1e-6 < np.abs(seen).max()
