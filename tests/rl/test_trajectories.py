import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from scripted import Script

from eaml_ext.rl import RandomPolicy, Trajectories, collect
from eaml_ext.tasks import CartPoleTasks, SeedTasks, make_tasks

CARTPOLE = CartPoleTasks()


class Counter(gymnasium.Env):
    """Observe (episode, time); episodes with an even number terminate after 3 steps, others never."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,))
    action_space = spaces.Box(-np.inf, np.inf, (1, 2))
    episode = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.time = self.episode + 1, 0
        return np.array([self.episode, 0], np.float32), {}

    def step(self, action):
        self.time += 1
        done = self.episode % 2 == 0 and self.time == 3
        return np.array([self.episode, self.time], np.float32), float(self.time), done, False, {}


gymnasium.register("EamlCounter-v0", Counter, max_episode_steps=4)


def names(trajectories):
    return {name: getattr(trajectories, name) for name in Trajectories.__dataclass_fields__}


def test_collect_returns_contiguous_float32_and_bool_tensors():
    trajectories = collect(CARTPOLE, CARTPOLE.sample(3), 50, seed=0)
    shapes = {"observations": (3, 50, 4), "actions": (3, 50, 2), "next_observations": (3, 50, 4)}
    for name, value in names(trajectories).items():
        assert tuple(value.shape) == shapes.get(name, (3, 50))
        assert value.dtype == (torch.bool if name in ("resets", "terminations") else torch.float32)
        assert value.is_contiguous() and value.device.type == "cpu"
    assert torch.equal(trajectories.actions.sum(-1), torch.ones(3, 50))


def test_trajectories_index_applies_to_every_field():
    trajectories = collect(CARTPOLE, CARTPOLE.sample(3), 20, seed=0)
    for name, value in names(trajectories[1:, :7]).items():
        assert torch.equal(value, getattr(trajectories, name)[1:, :7])


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "MountainCar-v0", "Acrobot-v1"])
def test_collect_same_arguments_give_same_bits_and_other_seeds_other_actions(name):
    distribution = make_tasks(name)
    tasks = distribution.sample(2)
    first, again, other = (collect(distribution, tasks, 30, seed) for seed in (1, 1, 2))
    for field, value in names(first).items():
        assert torch.equal(value, getattr(again, field))
    assert not torch.equal(first.actions, other.actions)


def test_collect_other_tasks_of_one_seed_have_other_starts_and_actions():
    epochs = [collect(CARTPOLE, CARTPOLE.sample(4, epoch=epoch), 30, seed=0) for epoch in (0, 1)]
    assert not torch.equal(epochs[0].observations[:, 0], epochs[1].observations[:, 0])
    assert not torch.equal(epochs[0].actions, epochs[1].actions)


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "MountainCar-v0", "Acrobot-v1"])
def test_collect_next_observations_are_the_following_ones_within_an_episode_only(name):
    distribution = make_tasks(name)
    steps = 450 if name in ("Pendulum-v1", "MountainCar-v0") else 120
    tr = collect(distribution, distribution.sample(2, seed=1), steps, seed=1)
    inside = ~tr.resets[:, 1:]
    assert tr.resets[:, 0].all()
    assert torch.equal(tr.observations[:, 1:][inside], tr.next_observations[:, :-1][inside])
    assert tr.resets.sum(1).min() >= 2 or name == "Acrobot-v1"
    jumped = (tr.observations[:, 1:] != tr.next_observations[:, :-1]).any(-1)
    assert torch.equal(jumped, ~inside)


def test_collect_transitions_satisfy_the_cartpole_equations_of_their_task():
    tasks = CARTPOLE.sample(16, seed=2)
    tr = collect(CARTPOLE, tasks, 300, seed=3)
    x, x_dot, theta, theta_dot = tr.observations.double().numpy().transpose(2, 0, 1)
    length, cart, pole, push, gravity = (
        np.array([getattr(t, name) for t in tasks])[:, None]
        for name in ("length", "masscart", "masspole", "force_mag", "gravity")
    )
    flip = np.array([t.flip for t in tasks])[:, None]
    right = (tr.actions[..., 1].numpy() == 1) != flip
    force = np.where(right, push, -push)
    # Barto, Sutton & Anderson (1983) without friction, explicit Euler at 50 Hz.
    mass, sin, cos = cart + pole, np.sin(theta), np.cos(theta)
    theta_acc = gravity * sin - cos * (force + pole * length * theta_dot**2 * sin) / mass
    theta_acc /= length * (4 / 3 - pole * cos**2 / mass)
    x_acc = (force + pole * length * (theta_dot**2 * sin - theta_acc * cos)) / mass
    expected = np.stack([x, x_dot, theta, theta_dot], -1) + 0.02 * np.stack([x_dot, x_acc, theta_dot, theta_acc], -1)
    # Observations are rounded to float32 (6e-8 relative), and reach 10 or so.
    np.testing.assert_allclose(tr.next_observations.numpy(), expected, rtol=0, atol=5e-6)
    assert flip.sum() == 8 and tr.resets.sum() > 100


def test_collect_next_observation_at_termination_is_the_final_one():
    tr = collect(CARTPOLE, CARTPOLE.sample(8), 200, seed=0)
    x, theta = tr.next_observations[..., 0].abs(), tr.next_observations[..., 2].abs()
    fallen = (x > 2.4) | (theta > np.deg2rad(12))
    assert torch.equal(fallen, tr.terminations)
    # The step after a fall is a start, near the origin; there are no other starts.
    assert torch.equal(tr.resets[:, 1:], fallen[:, :-1])
    assert tr.observations[tr.resets].abs().max() <= 0.05
    assert (tr.rewards == 1).all()


def test_collect_time_limit_is_a_reset_without_termination():
    distribution = SeedTasks("EamlCounter-v0")
    tr = collect(distribution, distribution.sample(2), 10, seed=0)
    # Episode 0 terminates after 3 steps, episode 1 is truncated after 4, episode 2 terminates after 3.
    for task in (0, 1):
        assert tr.observations[task].tolist() == [
            [0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [1, 3], [2, 0], [2, 1], [2, 2]
        ]  # fmt: skip
        assert tr.next_observations[task, :, 1].tolist() == [1, 2, 3, 1, 2, 3, 4, 1, 2, 3]
        assert tr.rewards[task].tolist() == [1, 2, 3, 1, 2, 3, 4, 1, 2, 3]
        assert tr.resets[task].nonzero().flatten().tolist() == [0, 3, 7]
        assert tr.terminations[task].nonzero().flatten().tolist() == [2, 9]
    assert tr.actions.shape == (2, 10, 2)


def test_collect_pendulum_transitions_satisfy_its_equations():
    distribution = make_tasks("Pendulum-v1")
    tr = collect(distribution, distribution.sample(3), 450, seed=0)
    # The pendulum turns by its new speed times 0.05 s; across a reset that relation would not hold.
    angle, turned = (torch.atan2(o[..., 1], o[..., 0]) for o in (tr.observations, tr.next_observations))
    turn = torch.remainder(turned - angle + torch.pi, 2 * torch.pi) - torch.pi
    torch.testing.assert_close(turn, 0.05 * tr.next_observations[..., 2], rtol=0, atol=1e-5)
    assert tr.resets.nonzero()[:3, 1].tolist() == [0, 200, 400] and not tr.terminations.any()
    assert tr.actions.abs().max() <= 2


def test_collect_mountain_car_transitions_satisfy_its_equations():
    distribution = make_tasks("MountainCar-v0")
    tr = collect(distribution, distribution.sample(3), 450, seed=0)
    position, velocity = tr.observations.unbind(-1)
    pushed = (velocity + 0.001 * (tr.actions.argmax(-1) - 1) - 0.0025 * torch.cos(3 * position)).clamp(-0.07, 0.07)
    moved = (position + pushed).clamp(-1.2, 0.6)
    free = moved > -1.2
    torch.testing.assert_close(tr.next_observations[..., 0], moved, rtol=0, atol=1e-6)
    torch.testing.assert_close(tr.next_observations[..., 1][free], pushed[free], rtol=0, atol=1e-6)
    assert tr.resets.nonzero()[:3, 1].tolist() == [0, 200, 400]


def test_collect_policy_receives_observations_and_resets_and_its_actions_are_recorded():
    seen = []

    def policy(observations, resets, generator):
        assert observations.shape == (4, 4) and observations.dtype == np.float32
        seen.append((observations.copy(), resets.copy()))
        return torch.from_numpy((observations[:, 2] > 0).astype(np.int64))

    tasks = CARTPOLE.sample(4)
    tr = collect(CARTPOLE, tasks, 100, seed=0, policy=policy)
    assert torch.equal(tr.actions[..., 1] == 1, tr.observations[..., 2] > 0)
    assert seen[0][1].all()
    started = {tuple(row) for observations, resets in seen for row in observations[resets].tolist()}
    assert {tuple(row) for row in tr.observations[tr.resets].tolist()} <= started
    # Pushing towards the fall keeps a pole up; pushing away from it makes the pole fall sooner.
    episodes = tr.resets.sum(1).tolist()
    flipped = [t.flip for t in tasks]
    assert max(e for e, f in zip(episodes, flipped, strict=True) if not f) < min(
        e for e, f in zip(episodes, flipped, strict=True) if f
    )


def test_random_policy_repeats_actions_and_draws_uniformly():
    policy = RandomPolicy(spaces.MultiDiscrete([2] * 500), hold=0.5)
    generator = np.random.default_rng(0)
    actions = np.stack([policy(np.zeros((500, 1)), np.zeros(500, bool), generator) for _ in range(100)])
    # Repeated with probability 1/2, drawn equal with 1/4; the standard error is 0.002.
    assert abs((actions[1:] == actions[:-1]).mean() - 0.75) < 0.01
    assert abs(actions.mean() - 0.5) < 0.02


def test_random_policy_is_normal_where_unbounded_and_uniform_where_bounded():
    box = spaces.Box(np.array([[-np.inf, -3.0]] * 4000, np.float32), np.array([[np.inf, 1.0]] * 4000, np.float32))
    actions = RandomPolicy(box)(np.zeros((4000, 1)), np.ones(4000, bool), np.random.default_rng(0))
    assert abs(actions[:, 0].mean()) < 0.1 and abs(actions[:, 0].std() - 1) < 0.1
    assert actions[:, 1].min() >= -3 and actions[:, 1].max() <= 1 and abs(actions[:, 1].mean() + 1) < 0.1


@pytest.mark.parametrize(
    ("space", "hold", "error", "text"),
    [
        (3, 0.5, TypeError, "action_space must be a Gymnasium space, got int"),
        (spaces.Discrete(2), "a", TypeError, "hold must be a number, got 'a'"),
        (spaces.Discrete(2), -0.1, ValueError, "hold must be >= 0, got -0.1"),
        (spaces.Discrete(2), 1.0, ValueError, "hold must be < 1, got 1.0"),
    ],
)
def test_random_policy_bad_argument_raises(space, hold, error, text):
    with pytest.raises(error, match=f"^RandomPolicy: {text}$"):
        RandomPolicy(space, hold)


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"dist": "CartPole-v1"}, TypeError, "dist must be a task distribution as of make_tasks, got str"),
        ({"dist": CartPoleTasks}, TypeError, "dist must be a task distribution as of make_tasks, got type"),
        ({"tasks": []}, ValueError, "tasks must hold at least one Task, got none"),
        ({"tasks": ["a"]}, TypeError, r"tasks\[0\] must be a Task, got str"),
        ({"tasks": None}, TypeError, "tasks must be a list of Task, got NoneType"),
        ({"steps": 0}, ValueError, "steps must be > 0, got 0"),
        ({"steps": 1.5}, TypeError, "steps must be an integer, got 1.5"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*32\), got -1"),
        ({"seed": None}, TypeError, "seed must be an integer, got None"),
        ({"policy": 3}, TypeError, "policy must be callable, got int"),
    ],
)
def test_collect_bad_argument_raises(changed, error, text):
    arguments = {"dist": CARTPOLE, "tasks": CARTPOLE.sample(1), "steps": 2, "seed": 0, **changed}
    with pytest.raises(error, match=f"^collect: {text}$"):
        collect(**arguments)


@pytest.mark.parametrize(
    ("action", "got"),
    [
        (np.array([0, 2]), r"int64 of shape \(2,\)"),
        (np.array([0.0, 1.0]), r"float64 of shape \(2,\)"),
        (np.array([0]), r"int64 of shape \(1,\)"),
        (None, r"object of shape \(\)"),
    ],
)
def test_collect_action_outside_the_space_raises(action, got):
    with pytest.raises(ValueError, match=rf"^collect: policy must return actions of MultiDiscrete.*, got {got}$"):
        collect(CARTPOLE, CARTPOLE.sample(2), 5, 0, policy=lambda *_: action)


def test_collect_other_autoreset_mode_raises():
    class SameStep(SeedTasks):
        def make_env(self, tasks):
            kwargs = {"autoreset_mode": AutoresetMode.SAME_STEP}
            return gymnasium.make_vec("Pendulum-v1", len(tasks), vectorization_mode="sync", vector_kwargs=kwargs)

    distribution = SameStep("Pendulum-v1")
    with pytest.raises(ValueError, match=r"^collect: dist must make environments in autoreset mode NEXT_STEP, got "):
        collect(distribution, distribution.sample(1), 5, 0)


@pytest.mark.parametrize(("kind", "value"), [("reward", np.nan), ("observation", np.inf)])
@pytest.mark.parametrize("move", [1, 5, 7])
def test_collect_non_finite_number_names_environment_task_and_step(kind, value, move):
    distribution = Script(length=3, fault=(kind, 1, move, value))
    text = (
        rf"^collect: {kind} must be finite, got {value} at step {move} of tasks\[1\] of script-v1, script/train/0/0/1$"
    )
    with pytest.raises(ValueError, match=text):
        collect(distribution, distribution.sample(3), 7, seed=0)


def test_collect_non_finite_first_observation_is_at_step_0():
    distribution = Script(fault=("observation", 0, 0, np.nan))
    with pytest.raises(ValueError, match=r"^collect: observation must be finite, got nan at step 0 of tasks\[0\]"):
        collect(distribution, distribution.sample(2), 3, seed=0)


@pytest.mark.parametrize("kind", ["reward", "observation"])
def test_collect_non_finite_number_after_a_tasks_last_step_does_not_count(kind):
    class Uneven(Script):  # the episodes of task 1 have one step, and the call after each moves nothing
        def make_env(self, tasks):
            env = super().make_env(tasks)
            env.step = lambda action, step=env.step: self.shorten(env, *step(action))
            return env

        def shorten(self, env, observation, reward, terminated, truncated, info):
            env.done[1] = terminated[1] = not self.before
            self.before = terminated[1]
            return observation, reward, terminated, truncated, info

    distribution = Uneven(length=np.inf, fault=(kind, 0, 5, np.nan))
    distribution.before = False
    trajectories = collect(distribution, distribution.sample(2), 4, seed=0)
    assert trajectories.resets.sum(1).tolist() == [1, 4]
    assert trajectories.rewards.isfinite().all() and trajectories.next_observations.isfinite().all()


def test_collect_numpy_scalars_equal_python_numbers():
    tasks = CARTPOLE.sample(2)
    first, again = collect(CARTPOLE, tasks, np.int64(9), np.uint32(1)), collect(CARTPOLE, tasks, 9, 1)
    assert all(torch.equal(value, getattr(again, name)) for name, value in names(first).items())
    assert type(RandomPolicy(spaces.Discrete(2), np.float32(0.5))._hold) is float


class Nested(Counter):
    """Observe a dict of (episode, time), one-hot time and a flag, in a space that is no Box."""

    observation_space = spaces.Dict(
        {"a": spaces.Box(-np.inf, np.inf, (2,)), "b": spaces.Discrete(5, start=1), "c": spaces.MultiBinary(1)}
    )

    def nested(self, observation):
        return {"a": observation, "b": np.int64(1 + observation[1]), "c": np.ones(1, np.int8)}

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed, options=options)
        return self.nested(observation), info

    def step(self, action):
        observation, *rest = super().step(action)
        return (self.nested(observation), *rest)


gymnasium.register("EamlNested-v0", Nested, max_episode_steps=4)


def test_collect_dict_observations_are_flattened_as_gymnasium_does():
    plain, nested = (SeedTasks(f"Eaml{name}-v0") for name in ("Counter", "Nested"))
    want = collect(plain, plain.sample(2), 9, seed=0)
    got = collect(nested, nested.sample(2), 9, seed=0)
    assert nested.obs_dim == 2 + 5 + 1
    for field in ("observations", "next_observations"):
        values, numbers = getattr(got, field), getattr(want, field)
        assert torch.equal(values[..., :2], numbers)
        assert torch.equal(values[..., 2:7], torch.nn.functional.one_hot(numbers[..., 1].long(), 5).float())
        assert torch.equal(values[..., 7], torch.ones(2, 9))


@pytest.mark.parametrize("name", ["Counter", "Nested"])
def test_collect_observations_of_another_size_than_obs_dim_raise(name):
    dist = SeedTasks(f"Eaml{name}-v0")
    size, dist.obs_dim = dist.obs_dim, 3
    text = f"collect: obs_dim must be the size of an observation, {size}, got 3 in Eaml{name}-v0-seeds-v1"
    with pytest.raises(ValueError, match=f"^{text}$"):
        collect(dist, dist.sample(2), 9, seed=0)
