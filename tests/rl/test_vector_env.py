"""Environments that return values of wrong types: one sentence names task, step, the value and the wanted one."""

import copy
import re

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from scripted import Script

from eaml_ext.rl import collect
from eaml_ext.rl._vector_env import CheckedVectorEnv
from eaml_ext.tasks import SeedTasks

BOX = spaces.Box(-1.0, 1.0, (2,))
DICT = spaces.Dict({"at": BOX, "door": spaces.Discrete(3)})
AT = np.zeros(2, np.float32)
CHANGE = 5  # step from which on the environment returns other values
STEP = "step must take an action and return (observation, reward, terminated, truncated, info), got "
RESET = "reset must take seed and options and return (observation, info), got "


class Changing(gymnasium.Env):
    """Returns ``first``, and from the step ``CHANGE`` on ``later``; both are results of ``step``."""

    action_space = spaces.Discrete(2)

    def __init__(self, space, first, later, initial=None):
        self.observation_space, self.first, self.later = space, first, later
        self.initial = (first[0], {}) if initial is None else initial

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.initial

    def step(self, action):
        self.steps += 1
        result = self.first if self.steps < CHANGE else self.later
        if isinstance(result, Exception):
            raise result
        return result


class OwnTasks(SeedTasks):
    """The distribution of a user, whose vector environment has no wrapper."""

    def make_env(self, tasks):
        return SyncVectorEnv([lambda: Changing(**self.arguments) for _ in tasks])


def collected(kind, number, arguments, steps=8):
    name = f"Eaml{kind.__name__}Changing{number}-v0"
    gymnasium.register(name, Changing, kwargs=arguments)
    distribution = kind(name)
    distribution.arguments = arguments
    return collect(distribution, distribution.sample(2), steps, 0)


def refused(kind, number, arguments):
    with pytest.raises(ValueError) as caught:
        collected(kind, number, arguments)
    name = f"Eaml{kind.__name__}Changing{number}-v0-seeds-v1"
    found = re.fullmatch(rf"collect: (.*) at step (\d) of tasks\[0\] of {name}, {name}/train/0/0/0", str(caught.value))
    assert found, caught.value
    return found[1], int(found[2])


def result(observation=AT, reward=0.5, terminated=False, truncated=False, info=None):
    return observation, reward, terminated, truncated, {} if info is None else info


both = pytest.mark.parametrize("kind", [SeedTasks, OwnTasks])
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Gymnasium warns of the first such values, too


@both
@pytest.mark.parametrize(
    ("space", "good", "bad", "got"),
    [
        (BOX, AT, np.zeros(3, np.float32), "float32 of shape (3,)"),
        (BOX, AT, np.zeros((2, 1), np.float32), "float32 of shape (2, 1)"),
        (BOX, AT, np.zeros(2, complex), "complex128 of shape (2,)"),
        (BOX, AT, 0.5, "0.5"),
        (BOX, AT, None, "None"),
        (BOX, AT, "ab", "'ab'"),
        (BOX, AT, [1.0, [2.0, 3.0]], "[1.0, [2.0, 3.0]]"),
        (spaces.Discrete(3), 1, 3, "3"),
        (spaces.Discrete(3), 1, -1, "-1"),
        (spaces.MultiDiscrete([2, 3]), np.array([1, 2]), np.array([2, 0]), "int64 of shape (2,)"),
        (DICT, {"at": AT, "door": 0}, {"at": np.zeros(3), "door": 1}, "{'at': float64 of shape (3,), 'door': 1}"),
        (DICT, {"at": AT, "door": 0}, {"at": AT, "door": -1}, "{'at': float32 of shape (2,), 'door': -1}"),
        (spaces.Tuple((BOX, BOX)), (AT, AT), (AT, np.zeros(1)), "(float32 of shape (2,), float64 of shape (1,))"),
    ],
)
def test_collect_observation_that_does_not_fit_its_space_raises(space, good, bad, got, kind, request):
    number = f"Space{request.node.callspec.indices['space']}"
    arguments = {"space": space, "first": result(good), "later": result(bad)}
    text = f"observation must fit {space}, got {got}"
    assert refused(kind, f"{number}Later", arguments) == (text, CHANGE)
    assert refused(kind, f"{number}First", {**arguments, "initial": (bad, {})}) == (text, 0)


@both
def test_collect_observation_without_a_key_of_its_space_raises(kind):
    arguments = {"space": DICT, "first": result({"at": AT, "door": 0}), "later": result({"at": AT})}
    text = f"observation must fit {DICT}, got {{'at': float32 of shape (2,)}}"
    assert refused(kind, "Key", arguments) == (text, CHANGE)


@both
@pytest.mark.parametrize(
    ("later", "text"),
    [
        (result(reward=None), "reward must be a number, got None"),
        (result(reward="1.5"), "reward must be a number, got '1.5'"),
        (result(reward=np.zeros(2)), "reward must be a number, got float64 of shape (2,)"),
        (result(reward=1j), "reward must be a number, got 1j"),
        (result(terminated=None), "terminated must be True or False, got None"),
        (result(terminated=np.zeros(2, bool)), "terminated must be True or False, got bool of shape (2,)"),
        (result(truncated="no"), "truncated must be True or False, got 'no'"),
        (result(info=[1]), "info must be a dict, got [1]"),
    ],
)
def test_collect_reward_flag_or_info_of_another_type_raises(later, text, kind, request):
    arguments = {"space": BOX, "first": result(), "later": later}
    assert refused(kind, f"Type{request.node.callspec.indices['later']}", arguments) == (text, CHANGE)


@both
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("later", [(AT, 0.5, False, {}), (*result(), 1), None])
def test_collect_step_of_another_number_of_values_raises(first, later, kind, request):
    number = f"Step{request.node.callspec.indices['later']}{first}"
    # Gymnasium's own wrappers fail first where the environment is registered.
    got = re.escape(f"{len(later)} values" if later else "None") if kind is OwnTasks else r"\w*Error: .*"
    initial = {"initial": (AT, {})}
    text, step = refused(kind, number, {"space": BOX, "first": later if first else result(), "later": later, **initial})
    assert re.fullmatch(re.escape(STEP) + got, text) and step == (1 if first else CHANGE)


@both
@pytest.mark.parametrize(
    ("initial", "got"), [(AT, "float32 of shape (2,)"), ((AT, {}, 1), "3 values"), ((AT, None), "None")]
)
def test_collect_reset_that_returns_other_values_raises(initial, got, kind, request):
    number = f"Reset{request.node.callspec.indices['initial']}"
    text, step = refused(kind, number, {"space": BOX, "first": result(), "later": result(), "initial": initial})
    if got == "None":
        assert text == "info must be a dict, got None" or text.startswith(RESET + "AssertionError: ")
    else:
        assert text == RESET + got
    assert step == 0


def test_collect_reset_without_seed_raises():
    class NoSeed(Changing):
        def reset(self):
            return AT, {}

    class NoSeedTasks(OwnTasks):
        def make_env(self, tasks):
            return SyncVectorEnv([lambda: NoSeed(**self.arguments) for _ in tasks])

    text, step = refused(NoSeedTasks, 0, {"space": BOX, "first": result(), "later": result()})
    assert text.startswith(RESET + "TypeError: ") and "unexpected keyword argument" in text and step == 0


@both
def test_collect_exception_of_environment_passes_unchanged(kind):
    error = ValueError("not enough values to unpack")
    with pytest.raises(ValueError, match=r"^not enough values to unpack$") as caught:
        collected(kind, "Raises", {"space": BOX, "first": result(), "later": error})
    assert caught.traceback[-1].path.name == "test_vector_env.py"


@both
@pytest.mark.parametrize("reward", [1, True, np.float32(1), np.array(1.0), np.int64(1)])
@pytest.mark.parametrize("flag", [False, np.False_, 0, np.array([False])])
def test_collect_numbers_of_any_kind_are_accepted(reward, flag, kind, request):
    indices = request.node.callspec.indices
    later = result(reward=reward, terminated=flag, truncated=flag)
    number = f"Number{indices['reward']}{indices['flag']}"
    trajectories = collected(kind, number, {"space": BOX, "first": result(), "later": later}, steps=6)
    assert trajectories.rewards.tolist() == [[0.5] * 4 + [1.0] * 2] * 2 and trajectories.resets.sum() == 2


@both
@pytest.mark.parametrize("value", [np.full(2, 1.5), np.array([2, 3]), [0.5, 0.25]])
def test_collect_observation_out_of_bounds_or_of_another_number_type_is_accepted(value, kind, request):
    number = f"Loose{request.node.callspec.indices['value']}"
    trajectories = collected(kind, number, {"space": BOX, "first": result(value), "later": result(value)}, steps=2)
    np.testing.assert_array_equal(trajectories.observations, np.broadcast_to(np.float32(value), (2, 2, 2)))


def test_checked_environments_have_their_attributes_until_close():
    distribution = OwnTasks("CartPole-v1")
    distribution.arguments = {"space": BOX, "first": result(), "later": result()}
    checked = CheckedVectorEnv("here", distribution, distribution.sample(2))
    environments = [environment.unwrapped for environment in checked.env.envs]
    checked.reset(0)
    checked.env.envs[0].gravity = 3.0
    assert environments[0].gravity == 3.0 and checked.env.get_attr("steps") == (0, 0)
    assert copy.deepcopy(checked.env).envs[0].gravity == 3.0
    with pytest.raises(AttributeError, match="no_such_attribute"):
        checked.env.envs[1].no_such_attribute  # noqa: B018
    checked.close()
    assert checked.env.envs == environments


class Faulty(Script):
    """A script whose vector environment is changed by ``change``."""

    def __init__(self, change):
        super().__init__(length=3)
        self.change = change

    def make_env(self, tasks):
        env = super().make_env(tasks)
        return self.change(env) or env


@pytest.mark.parametrize("name", ["single_observation_space", "action_space", "observation_space"])
def test_collect_vector_environment_without_attribute_raises(name):
    closed = []

    def change(env):
        if name == "observation_space":
            env.single_observation_space = spaces.Discrete(2)
        delattr(env, name)
        env.close = lambda: closed.append(True)

    text = f"dist must make vector environments with the attribute {name}, got ScriptedEnv without it from script-v1"
    with pytest.raises(ValueError, match=f"^collect: {text}$"):
        collect(Faulty(change), Script().sample(2), 5, 0)
    assert closed == [True]


@pytest.mark.parametrize("made", [None, gymnasium.make("CartPole-v1")])
def test_collect_distribution_that_makes_no_vector_environment_raises(made):
    class Other(Script):
        def make_env(self, tasks):
            return made

    text = r"with the attribute \w+, got \w+ without it from script-v1"
    with pytest.raises(ValueError, match=f"^collect: dist must make vector environments {text}$"):
        collect(Other(), Script().sample(2), 5, 0)


def test_collect_vector_environment_without_single_action_space_runs():
    whole = collect(Script(length=3), Script().sample(2), 5, 0)
    without = collect(Faulty(lambda env: delattr(env, "single_action_space")), Script().sample(2), 5, 0)
    assert without.actions.equal(whole.actions) and without.observations.equal(whole.observations)


def test_collect_vector_environment_of_another_size_raises():
    text = "dist must make one environment for each of 2 tasks, got 3"
    with pytest.raises(ValueError, match=f"^collect: {text}$"):
        collect(Faulty(lambda _: Script().make_env(Script().sample(3))), Script().sample(2), 5, 0)


@pytest.mark.parametrize(
    ("index", "value", "text"),
    [
        (0, np.zeros((2, 3)), "observations must have shape (2, 2) as those of reset, got (2, 3)"),
        (0, [np.zeros(2), np.zeros(3)], f"observations must fit 2 of {spaces.Box(-np.inf, np.inf, (2,))}, got ["),
        (1, np.zeros((2, 1)), "rewards must be 2 numbers, got float64 of shape (2, 1)"),
        (1, [0.5, None], "rewards must be 2 numbers, got [0.5, None]"),
        (2, None, "terminations must be 2 numbers, got None"),
        (3, np.array(["no", "no"]), "truncations must be 2 numbers, got <U2 of shape (2,)"),
        (4, None, "step must return (observations, rewards, terminations, truncations, infos), got 4 values"),
    ],
)
def test_collect_vector_environment_that_returns_other_values_raises(index, value, text):
    def change(env):
        def step(action, step=env.step):
            values = step(action)
            if env.moves[0] < 2:
                return values
            return (*values[:index], value, *values[index + 1 :])[: 5 if index < 4 else 4]

        env.step = step

    with pytest.raises(
        ValueError, match=f"^collect: {re.escape(text)}.* at step 2 of the vector environment of script"
    ):
        collect(Faulty(change), Script().sample(2), 5, 0)
