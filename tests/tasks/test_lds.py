import dataclasses
import math
import re

import numpy as np
import pytest
import torch

from eaml_ext.tasks import SPLITS, LDSTask, LDSTasks, SeedTask
from eaml_ext.tasks.baselines import fit_linear, fit_mlp
from eaml_ext.tasks.lds import ANGLES

DIST = LDSTasks()
SWITCHING = LDSTasks(modes=3, stay=0.9)
FIRST_STEPS = [-1.3735764265275403, 0.3284619407031082, -0.9201525671778681, -0.8465169919714413]


def test_sample_splits_seeds_and_epochs_share_no_task():
    drawn = [
        t for split in SPLITS for seed in range(3) for epoch in range(3) for t in DIST.sample(20, split, seed, epoch)
    ]
    assert len({t.id for t in drawn}) == len(drawn)
    angles = [angle for t in drawn for row in t.angles for angle in row]
    assert len(set(angles)) == len(angles) == 2 * len(drawn)
    assert len({t.observation for t in drawn}) == len(drawn)


def test_init_options_have_different_names():
    kinds = [DIST, SWITCHING, LDSTasks(modes=3), LDSTasks(1), LDSTasks(2, 3), LDSTasks(decay=0.9), LDSTasks(noise=0.2)]
    assert len({d.name for d in kinds}) == len(kinds)
    assert all(d.name.endswith("-v1") and d.sample(1)[0].id.startswith(d.name) for d in kinds)


def test_sample_and_simulate_of_this_version_have_fixed_values():
    (task,) = DIST.sample(1)
    assert task.id == "LDS-2of4-decay0.99-noise0.1-v1/train/0/0/0"
    assert task.angles[0] == pytest.approx((0.5115675881481647, 0.47672478684648517), rel=1e-12)
    assert task.observation[0][0] == pytest.approx(-0.7502915854409988, rel=1e-12)
    x = DIST.simulate([task], 1, 2, dtype=torch.float64)[0]
    assert x.flatten().tolist() == pytest.approx(FIRST_STEPS, rel=1e-9)


def test_sample_angles_are_log_uniform_in_their_range():
    low, high = ANGLES
    angles = torch.tensor([t.angles for t in DIST.sample(2000)]).flatten()
    place = (angles / low).log() / math.log(high / low)
    # Standard error of a uniform mean over 4000 draws: 0.0046.
    assert 0 <= place.min() < 0.01 and 0.99 < place.max() <= 1 and abs(float(place.mean()) - 0.5) < 0.025


@pytest.mark.parametrize("distribution", [DIST, SWITCHING, LDSTasks(3, 4, noise=0.5), LDSTasks(1, 1, noise=0.0)])
def test_system_is_stationary_with_observations_of_variance_one(distribution):
    system = distribution.system(distribution.sample(5))
    eye = torch.eye(2 * distribution.planes, dtype=torch.float64)
    after = system.A @ system.A.mT + system.Q.unsqueeze(1)
    torch.testing.assert_close(after, eye.expand_as(after))
    seen = system.C @ system.C.mT + system.R
    torch.testing.assert_close(seen, torch.eye(distribution.obs_dim, dtype=torch.float64).expand_as(seen))


@pytest.mark.parametrize("distribution", [DIST, SWITCHING])
def test_simulate_moments_are_those_of_the_system(distribution):
    tasks = distribution.sample(2)
    system = distribution.system(tasks)
    x, modes = distribution.simulate(tasks, 20_000, 3, dtype=torch.float64)
    variance = x.square().mean((1, 2))
    # 20,000 independent runs: standard error 0.01 at most.
    assert (variance - 1).abs().max() < 0.05
    for task in range(2):
        for mode in range(distribution.modes):
            rows = modes[task, :, 1] == mode
            lagged = x[task, rows, 1].mT @ x[task, rows, 0] / rows.sum()
            wanted = system.C[task] @ system.A[task, mode] @ system.C[task].T
            assert (lagged - wanted).abs().max() < 5 / math.sqrt(int(rows.sum()))


def test_simulate_modes_stay_with_their_probability_and_all_occur():
    modes = SWITCHING.simulate(SWITCHING.sample(4), 50, 200)[1]
    stays = (modes[:, :, 1:] == modes[:, :, :-1]).double().mean()
    assert abs(float(stays) - 0.9) < 0.01  # standard error 0.0015
    assert torch.bincount(modes.flatten(), minlength=3).min() > 0.25 * modes.numel()
    assert not DIST.simulate(DIST.sample(1), 2, 9)[1].any()


def test_simulate_is_a_function_of_tasks_and_seed():
    tasks = DIST.sample(2)
    x = DIST.simulate(tasks, 3, 7, seed=1)[0]
    assert x.shape == (2, 3, 7, 2) and x.dtype == torch.float32
    assert torch.equal(x, DIST.simulate(tasks, 3, 7, seed=1)[0])
    assert not torch.equal(x, DIST.simulate(tasks, 3, 7, seed=2)[0])
    assert DIST.simulate(tasks, 1, 1)[0].shape == (2, 1, 1, 2)


@pytest.mark.parametrize("distribution", [DIST, LDSTasks(1, 2, noise=0.3), SWITCHING])
def test_baselines_kalman_error_is_the_lowest_and_that_of_theory(distribution):
    tasks = distribution.sample(6, "test")
    errors = distribution.baselines(tasks, sequences=32)
    for name in ("linear", "mlp", "persistence", "zero"):
        assert (errors["kalman"] < errors[name]).all(), name
    assert errors["linear"].mean() < 0.7 * errors["persistence"].mean()
    x, modes = distribution.simulate(tasks, 64, 128, dtype=torch.float64)
    predictions, covariances = distribution.kalman(tasks, x, modes)
    expected = covariances.diagonal(dim1=-2, dim2=-1).mean((1, 2, 3))
    found = (predictions - x[:, :, 1:]).square().mean((1, 2, 3))
    count = predictions[0].numel()
    assert ((found / expected - 1).abs() < 5 * math.sqrt(2 / count)).all()


def test_kalman_without_noise_predicts_a_rotation_exactly():
    distribution = LDSTasks(1, 1, decay=1 - 1e-12, noise=0.0)
    x, modes = distribution.simulate(distribution.sample(3), 4, 20, dtype=torch.float64)
    predictions, _ = distribution.kalman(distribution.sample(3), x, modes)
    assert (predictions - x[:, :, 1:])[:, :, 2:].abs().max() < 1e-3 < (predictions - x[:, :, 1:])[:, :, 0].abs().max()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"obs_dim": 0}, ValueError, "obs_dim must be > 0, got 0"),
        ({"obs_dim": 4}, ValueError, "obs_dim must be < 2 * planes = 4, got 4"),
        ({"planes": 1.0}, TypeError, "planes must be an integer, got 1.0"),
        ({"modes": True}, TypeError, "modes must be an integer, got True"),
        ({"stay": 1.5}, ValueError, "stay must be in [0, 1], got 1.5"),
        ({"stay": "0.5"}, TypeError, "stay must be a number, got '0.5'"),
        ({"decay": 1.0}, ValueError, "decay must be in (0, 1), got 1.0"),
        ({"decay": 0}, ValueError, "decay must be > 0, got 0"),
        ({"noise": 1}, ValueError, "noise must be in [0, 1), got 1"),
        ({"noise": -0.1}, ValueError, "noise must be >= 0, got -0.1"),
        ({"noise": math.nan}, ValueError, "noise must be >= 0, got nan"),
    ],
)
def test_init_bad_option_raises(options, error, text):
    with pytest.raises(error, match="^LDSTasks: " + re.escape(text)):
        LDSTasks(**options)


def test_methods_tasks_of_another_kind_or_size_raise():
    calls = {
        "system": lambda tasks: DIST.system(tasks),
        "simulate": lambda tasks: DIST.simulate(tasks, 1, 2),
        "kalman": lambda tasks: DIST.kalman(tasks, torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2).long()),
        "baselines": lambda tasks: DIST.baselines(tasks),
    }
    for name, call in calls.items():
        where = f"^LDSTasks.{name}: "
        with pytest.raises(TypeError, match=where + "tasks must be a list of LDSTask, got int"):
            call(3)
        with pytest.raises(ValueError, match=where + "tasks must hold at least one LDSTask, got none"):
            call([])
        with pytest.raises(TypeError, match=where + r"tasks\[0\] must be a LDSTask, got SeedTask"):
            call([SeedTask("t", "train", 1)])
        with pytest.raises(ValueError, match=where + r"tasks\[0\] has \(modes, planes, obs_dim\) \(3, 2, 2\), wanted"):
            call(SWITCHING.sample(1))
        bad = dataclasses.replace(DIST.sample(1)[0], observation=((1.0, 0.0, 0.0, 0.0),))
        with pytest.raises(ValueError, match=where + r"tasks\[0\] has \(modes, planes, obs_dim\) \(1, 2, 1\), wanted"):
            call([bad])


@pytest.mark.parametrize(
    ("method", "arguments", "error", "text"),
    [
        ("simulate", {"sequences": 0}, ValueError, "sequences must be > 0, got 0"),
        ("simulate", {"length": 0}, ValueError, "length must be > 0, got 0"),
        ("simulate", {"seed": -1}, ValueError, "seed must be in [0, 2**32), got -1"),
        ("simulate", {"dtype": torch.int64}, TypeError, "dtype must be a floating torch.dtype, got torch.int64"),
        ("baselines", {"sequences": 1.5}, TypeError, "sequences must be an integer, got 1.5"),
        ("baselines", {"length": 4}, ValueError, "length must exceed frames = 4, got 4"),
        ("baselines", {"frames": 0}, ValueError, "frames must be > 0, got 0"),
        ("baselines", {"seed": 2**40}, ValueError, "seed must be in [0, 2**32), got 1099511627776"),
        ("kalman", {"observations": 1}, TypeError, "observations must be a torch.Tensor, got int"),
        ("kalman", {"observations": torch.zeros(2, 1, 5, 2)}, ValueError, "observations must have shape (1, sequences"),
        ("kalman", {"modes": None}, TypeError, "modes must be a torch.Tensor, got NoneType"),
        ("kalman", {"modes": torch.zeros(1, 1, 5)}, TypeError, "modes must be int64, got float32"),
        (
            "kalman",
            {"modes": torch.zeros(1, 1, 4).long()},
            ValueError,
            "modes must have shape (1, 1, 5), got (1, 1, 4)",
        ),
        ("kalman", {"modes": torch.ones(1, 1, 5).long()}, ValueError, "modes must be in [0, 1), got 1 to 1"),
    ],
)
def test_methods_bad_argument_raises(method, arguments, error, text):
    good = {
        "simulate": {"sequences": 1, "length": 5},
        "baselines": {},
        "kalman": {"observations": torch.zeros(1, 1, 5, 2), "modes": torch.zeros(1, 1, 5).long()},
    }[method]
    with pytest.raises(error, match=f"^LDSTasks.{method}: " + re.escape(text)):
        getattr(DIST, method)(DIST.sample(1), **{**good, **arguments})


def test_lds_task_is_hashable_plain_data():
    (task,) = SWITCHING.sample(1)
    assert isinstance(task, LDSTask) and hash(task) == hash(SWITCHING.sample(1)[0])
    assert len(task.angles) == 3 and len(task.observation) == 2 and task.stay == 0.9


def test_simulate_and_baselines_numpy_integers_equal_ints():
    dist = LDSTasks()
    tasks = dist.sample(2)
    x, modes = dist.simulate(tasks, np.int64(3), np.int64(12), seed=np.int64(5))
    wanted = dist.simulate(tasks, 3, 12, seed=5)
    assert torch.equal(x, wanted[0]) and torch.equal(modes, wanted[1])
    given = dist.baselines(tasks, sequences=np.int64(2), length=np.int64(12), frames=np.int64(2), seed=np.int64(1))
    for name, error in dist.baselines(tasks, sequences=2, length=12, frames=2, seed=1).items():
        assert torch.equal(given[name], error), name
    assert torch.equal(fit_linear(x, np.int64(2))(x), fit_linear(x, 2)(x))
    network = {"hidden": np.int64(8), "steps": np.int64(3), "seed": np.int64(4)}
    assert torch.equal(fit_mlp(x, np.int64(2), **network)(x), fit_mlp(x, 2, hidden=8, steps=3, seed=4)(x))
