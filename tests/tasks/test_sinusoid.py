"""Sinusoids: the distribution of the paper, disjoint streams, baselines against theory and least squares."""

import math

import pytest
import torch

from eaml_ext.tasks import SPLITS, SinusoidTasks


def test_draw_is_prefix_of_longer_draws():
    tasks = SinusoidTasks()
    for whole, part in zip(tasks.draw(9, "test", 3, 4), tasks.draw(5, "test", 3, 4), strict=True):
        assert torch.equal(whole[:5], part)


def test_sample_and_draw_streams_share_no_task_and_no_input():
    tasks = SinusoidTasks()
    streams = [(split, seed, epoch) for split in SPLITS for seed in range(4) for epoch in range(4)]
    drawn = [(t.amplitude, t.phase) for stream in streams for t in tasks.sample(100, *stream)]
    assert len(set(drawn)) == len(drawn)
    assert len({t.id for stream in streams for t in tasks.sample(100, *stream)}) == len(drawn)
    inputs = torch.cat([torch.cat(tasks.draw(100, *stream)[::2]).flatten() for stream in streams])
    assert len(inputs.unique()) > 0.99 * len(inputs)  # some of 48,000 float32 numbers are equal by chance


def test_sample_and_draw_are_uniform_in_the_ranges_of_the_paper():
    drawn = SinusoidTasks().sample(4000, "valid")
    amplitude, phase = (torch.tensor([getattr(t, name) for t in drawn]) for name in ("amplitude", "phase"))
    x = SinusoidTasks(10).draw(4000, "valid")[0].flatten()
    for values, low, high in ((amplitude, 0.1, 5.0), (phase, 0.0, math.pi), (x, -5.0, 5.0)):
        assert low <= float(values.min()) < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < float(values.max()) <= high
        # Four standard errors of a uniform variable's mean.
        assert abs(float(values.mean()) - (low + high) / 2) < 4 * (high - low) / math.sqrt(12 * len(values))


def test_init_other_amplitudes_have_another_name_and_other_tasks():
    beyond = SinusoidTasks(amplitudes=(5.0, 10.0))
    drawn = beyond.sample(500)
    assert all(5 <= t.amplitude <= 10 for t in drawn) and max(t.amplitude for t in drawn) > 9.9
    assert beyond.name == "sinusoid-v1-amplitude-5-10" != SinusoidTasks.name
    assert {t.id for t in drawn}.isdisjoint(t.id for t in SinusoidTasks().sample(500))
    assert beyond.baselines(500)["zero"] == pytest.approx((10**3 - 5**3) / 15 * 0.53, rel=0.1)  # E[a^2] E[sin^2]


def test_task_data_are_its_sinusoid_plus_noise():
    for noise in (0.0, 0.3):
        tasks = SinusoidTasks(shots=5, queries=2000, noise=noise)
        one = tasks.sample(3, "test")[2]
        support_x, support_y, query_x, query_y = one.sample()
        assert support_x.shape == support_y.shape == (5, 1) and query_x.shape == query_y.shape == (2000, 1)
        stacked = [t[2] for t in tasks.draw(3, "test")]
        for x, y in ((query_x, query_y), (stacked[2], stacked[3])):
            left = y - one.amplitude * torch.sin(x - one.phase)
            assert float(left.std()) == pytest.approx(noise, rel=0.1, abs=1e-6)
        assert not torch.equal(one.sample()[0], support_x)  # a new draw
        assert one.loss(query_y, query_y + 1) == pytest.approx(1)


def test_baselines_equal_those_of_theory():
    exact = SinusoidTasks(5).baselines()
    assert exact["bayes"] == 0
    # E[a^2] E[sin^2] over the ranges: (0.1^2 + 0.5 + 25) / 3, times about a half.
    assert exact["zero"] == pytest.approx(25.51 / 3 * 0.53, rel=0.1)
    noisy = [SinusoidTasks(shots, queries=20, noise=0.5).baselines(80) for shots in (1, 5, 50)]
    errors = [b["bayes"] for b in noisy]
    assert noisy[0]["mean"] > errors[0] > errors[1] > errors[2] > 0.25 * 0.95  # decreases towards the noise variance
    assert errors[2] == pytest.approx(0.25 * (1 + 2 / 50), rel=0.1)  # two parameters, fifty points


def test_baselines_bayes_is_below_least_squares():
    tasks = SinusoidTasks(5, queries=50, noise=0.5)
    support_x, support_y, query_x, query_y = (t.double() for t in tasks.draw(300, "test"))
    basis = torch.cat([support_x.sin(), support_x.cos()], -1)
    fit = torch.linalg.lstsq(basis, support_y).solution
    error = float((torch.cat([query_x.sin(), query_x.cos()], -1) @ fit - query_y).square().mean())
    assert tasks.baselines(300)["bayes"] < error


def test_baselines_mean_is_that_of_the_best_function_for_all_tasks():
    tasks = SinusoidTasks(queries=200)
    *_, x, y = tasks.draw(4000, "test")
    basis = torch.cat([x.sin(), x.cos()], -1).flatten(0, 1)
    fit = torch.linalg.lstsq(basis, y.flatten(0, 1)).solution  # the best function of this form for all tasks
    error = float((basis @ fit - y.flatten(0, 1)).square().mean())
    assert tasks.baselines(4000)["mean"] == pytest.approx(error, rel=2e-3)


def bad_calls():
    tasks = SinusoidTasks()
    yield lambda: SinusoidTasks(0), ValueError, "SinusoidTasks: shots must be > 0"
    yield lambda: SinusoidTasks(1.5), TypeError, "SinusoidTasks: shots must be an integer"
    yield lambda: SinusoidTasks(5, 0), ValueError, "SinusoidTasks: queries must be > 0"
    yield lambda: SinusoidTasks(noise=-1.0), ValueError, "SinusoidTasks: noise must be >= 0"
    yield lambda: SinusoidTasks(noise=math.inf), ValueError, "SinusoidTasks: noise must be finite"
    yield lambda: SinusoidTasks(noise="a"), TypeError, "SinusoidTasks: noise must be a number"
    yield lambda: SinusoidTasks(amplitudes=3.0), TypeError, "SinusoidTasks: amplitudes must be a pair"
    yield lambda: SinusoidTasks(amplitudes=("a", 1)), TypeError, "SinusoidTasks: amplitudes must be a number"
    yield lambda: SinusoidTasks(amplitudes=(2.0, 1.0)), ValueError, "SinusoidTasks: amplitudes must be finite and rise"
    yield lambda: SinusoidTasks(amplitudes=(-1.0, 1.0)), ValueError, "SinusoidTasks: amplitudes must be >= 0"
    for name in ("sample", "draw"):
        call = getattr(tasks, name)
        where = f"SinusoidTasks.{name}: "
        yield lambda call=call: call(-1), ValueError, where + "n must be in"
        yield lambda call=call: call("3"), TypeError, where + "n must be an integer"
        yield lambda call=call: call(1, "dev"), ValueError, where + "split must be one of"
        yield lambda call=call: call(1, seed=-1), ValueError, where + "seed must be in"
        yield lambda call=call: call(1, epoch=2**32), ValueError, where + "epoch must be in"
    yield lambda: tasks.baselines(0), ValueError, "SinusoidTasks.baselines: n must be > 0"
    yield lambda: tasks.baselines(seed=-1), ValueError, "SinusoidTasks.baselines: seed must be in"
    yield lambda: SinusoidTasks(1).baselines(), ValueError, "shots must be at least 2 where noise is 0"


@pytest.mark.parametrize(("call", "error", "text"), list(bad_calls()), ids=lambda v: v if isinstance(v, str) else "")
def test_sinusoid_tasks_bad_argument_raises_one_sentence(call, error, text):
    with pytest.raises(error) as info:
        call()
    assert text in str(info.value) and "\n" not in str(info.value)
