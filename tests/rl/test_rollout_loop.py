import numpy as np
import pytest
from scripted import Script

from eaml_ext.rl._rollout_loop import NonFiniteError, RolloutLoop


def run(dist, tasks=2, **length):
    """Step until all tasks are done; return the transitions and the number of calls."""
    with RolloutLoop("test", dist, dist.sample(tasks), 0, **length) as loop:
        calls = 0
        while loop.active.any():
            loop.step(np.zeros(tasks, int))
            calls += 1
    return loop.transitions(), calls


def test_rollout_loop_reset_calls_are_no_transitions():
    transitions, calls = run(Script((3.0, 6.0), length=2), steps=5)
    assert calls == 7  # two of them reset the environments
    assert transitions.calls.tolist() == [[0, 1, 3, 4, 6]] * 2 and transitions.mask.all()
    assert transitions.rewards.tolist() == [[0, 3, 0, 6, 0]] * 2
    assert transitions.episode_starts.tolist() == [[True, False, True, False, True]] * 2
    assert transitions.terminations.tolist() == [[False, True, False, True, False]] * 2


@pytest.mark.parametrize("truncates", [False, True])
def test_rollout_loop_episodes_end_by_termination_or_truncation(truncates):
    transitions, _ = run(Script(length=3, truncates=truncates), episodes=2)
    ends, others = transitions.terminations, transitions.truncations
    ends, others = (others, ends) if truncates else (ends, others)
    assert ends.tolist() == [[False, False, True] * 2] * 2 and not others.any()


def test_rollout_loop_task_with_fewer_steps_is_padded_and_not_recorded():
    class Uneven(Script):
        def make_env(self, tasks):
            env = super().make_env(tasks)
            env.step = lambda action, step=env.step: self.lengthen(env, *step(action))
            return env

        def lengthen(self, env, observation, reward, terminated, truncated, info):
            env.done[1] = terminated[1] = env.time[1] == 4
            return observation, reward + 1, terminated, truncated, info

    transitions, calls = run(Uneven(length=2), episodes=1)
    assert calls == 4 and transitions.mask.tolist() == [[True, True, False, False], [True] * 4]
    assert (transitions.rewards[0, 2:] == 0).all() and not transitions.episode_starts[0, 1:].any()


def test_rollout_loop_closes_the_environments_after_an_error():
    dist, closed = Script(fault=("observation", 0, 1, np.nan)), []
    make_env = dist.make_env

    def recorded(tasks):
        env = make_env(tasks)
        env.close = lambda: closed.append(True)
        return env

    dist.make_env = recorded
    with pytest.raises(NonFiniteError, match=r"^test: observation must be finite, got nan at step 1 of tasks\[0\]"):
        run(dist, steps=2)
    dist.fault = ("observation", 0, 0, np.inf)
    with pytest.raises(NonFiniteError, match=r"^test: observation must be finite, got inf at step 0 of tasks\[0\]"):
        run(dist, steps=2)
    assert len(closed) == 2
