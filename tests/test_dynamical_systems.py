"""The experiment on dynamical systems: its data are the published ones; new coordinates change no prediction."""

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # last, so as not to hide an installed eaml_ext

from benchmarks.experiments.dynamical_data import SYSTEMS, solve
from benchmarks.experiments.dynamical_model import (
    Config,
    Stacked,
    VectorField,
    curvatures,
    loss_fn,
    precondition,
    segments,
    support_set,
)
from benchmarks.experiments.dynamical_systems import CONFIGS, tables
from benchmarks.experiments.runs import Runs

# scipy.integrate.solve_ivp with its defaults: the last state of trajectory 0 in a test environment
SCIPY = {
    "lotka_volterra": ((0.625, 1.125), [0.14144397178878754, 0.102254210157797]),
    "glycolytic_oscillator": (
        (85, 0.625),
        [
            1.4900091348402433,
            1.143750377832176,
            0.13102890865396397,
            0.18750669211534243,
            0.17135429957122547,
            1.4362854699964904,
            0.06178828347653297,
        ],
    ),
}


@pytest.fixture
def trained():
    """A field, contexts of three environments and their trajectories in float64."""
    system = SYSTEMS["lotka_volterra"]
    data = system.simulate(system.train[::4], [0, 1])
    torch.manual_seed(0)
    return VectorField(data, Config(hidden=8)).double(), torch.randn(3, 2, dtype=torch.float64), data


@pytest.mark.parametrize("name", SYSTEMS)
def test_solve_default_tolerances_returns_scipys_states(name):
    environment, expected = SCIPY[name]
    found = SYSTEMS[name].simulate([environment], [0])[0, 0]
    assert found.shape == (20, len(expected))
    torch.testing.assert_close(found[-1], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


def test_solve_small_tolerance_is_nearer_to_the_solution_than_the_published_one():
    system, environment = SYSTEMS["lotka_volterra"], (0.625, 1.125)

    def field(x):
        return system.field(x, *environment)

    start = torch.tensor([1.5, 1.7], dtype=torch.float64).numpy()
    exact, fine, coarse = (solve(field, start, system.times, tol, tol / 1e3) for tol in (1e-10, 1e-6, 1e-3))
    assert abs(fine - exact).max() < 1e-4 < abs(coarse - exact).max()


@pytest.mark.parametrize("name", SYSTEMS)
def test_environments_of_training_validation_and_test_are_disjoint(name):
    system = SYSTEMS[name]
    assert len({*system.train, *system.valid, *system.test}) == 9 + 4 + 4


def test_precondition_trained_contexts_keeps_predictions(trained):
    model, contexts, data = trained
    before = Stacked(model, {"context": contexts})(data)
    changed, moved = copy.deepcopy(model), contexts.clone()
    precondition(changed, moved, data)
    torch.testing.assert_close(Stacked(changed, {"context": moved})(data), before)
    assert moved.mean(0).abs().max() < 1e-12 < (moved - contexts).abs().max()


def test_support_set_weight_makes_the_mean_curvature_one(trained):
    model, _, data = trained
    x, target = support_set(data[0], curvatures(model, data)[0])
    assert torch.equal(target[:, :-1], segments(data[0], 1))
    gauss_newton = curvatures(model, data)[0].mean(0) * target[0, -1, 0]
    assert float(gauss_newton.diagonal().mean()) == pytest.approx(1)
    error = ((model(x) - x) / model.std).square().mean()
    assert loss_fn(model)(model(x), target).item() == pytest.approx((error * target[0, -1, 0]).item())


def test_tables_lines_of_other_settings_are_left_out():
    system, config = "lotka_volterra", vars(CONFIGS["lotka_volterra"])
    store = Runs("dynamical_systems", quick=True)

    def add(seed, config, errors):
        settings = {"system": system, "group": "context", "seed": seed, "config": config}
        variants = {name: {"in_domain": error, "out": error} for name, error in errors.items()}
        store.lines.append({"settings": settings, "variants": variants})

    add(0, {**config, "hidden": 5}, {"first order": 1.0, "second order": 1.0})
    assert tables(store) == []
    add(0, config, {"first order": 3e-5, "second order": 1e-5})
    add(1, config, {"first order": 5e-5, "second order": 3e-5})
    [(_, _, rows)] = tables(store)
    assert [row[0] for row in rows[:2]] == ["first order", "second order"]
    assert [row[2].split()[0] for row in rows[:2]] == ["4.00", "2.00"]
    assert rows[0][3] == "-2.00 ± 0.00"
    assert len({len(row) for row in rows}) == 1
