"""The dynamics model: its units, its steps with parameters of each task, and the embedding of tasks."""

import numpy as np
import pytest
import torch
from clock_cartpole import EXTRA_OBSERVATIONS, transitions

from eaml_ext.jobs.world_model import (
    COLUMNS,
    BatchedWorldModel,
    DynamicsModel,
    embedding_dim,
    features,
    task_embedding,
)
from eaml_ext.rl import Trajectories


def test_batched_world_model_steps_equal_forward_with_each_tasks_parameters():
    model = DynamicsModel(4, 2, hidden_dim=8, state_size=4)
    model.scale.copy_(torch.tensor([1.0, 0.5, 2.0, 3.0]))
    model.mean.fill_(0.1)
    params = {name: p.detach() + 0.1 * torch.randn(3, *p.shape) for name, p in model.named_parameters()}
    obs, action = torch.randn(3, 5, 6, 4), torch.randn(3, 5, 6, 2)
    start = torch.zeros(3, 5, 6, dtype=torch.bool)
    start[1, 2, 3] = True
    imagined = BatchedWorldModel(model, params)
    state, steps = imagined.init_hidden(3).expand(3, 5, -1, -1, -1), []
    for t in range(6):
        following, state = imagined.step(obs[:, :, t], action[:, :, t], start[:, :, t], state)
        steps.append(following - obs[:, :, t])
    for i in range(3):
        own = {name: p[i] for name, p in params.items()}
        want = torch.func.functional_call(model, own, (features(obs[i], action[i], start[i]),)) * model.scale
        torch.testing.assert_close(torch.stack([s[i] for s in steps], dim=1), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EXTRA_OBSERVATIONS)
def test_normalise_observation_that_hardly_moves_has_inputs_and_steps_of_order_one(name):
    noise = torch.randn(400).tolist()
    data = transitions([EXTRA_OBSERVATIONS[name](t, noise[t]) for t in range(400)])
    model = DynamicsModel(1, 1, hidden_dim=4)
    model.normalise(data)
    steps = (data.next_observations - data.observations) / model.scale
    inputs = model.in_units(features(data.observations, data.actions, data.resets))[..., 0]
    assert steps.abs().max() <= 1.001 and inputs.abs().max() < 2
    if "clock" in name:
        torch.testing.assert_close(steps, torch.ones_like(steps), rtol=1e-3, atol=0)
    if "rounding" in name:  # an error that no model can predict must not count
        assert steps.abs().max() < 1e-3 and inputs.abs().max() < 1e-3
    if "constant" in name or name == "zero":
        assert model.scale.item() >= 1 and model.std.item() >= 1  # also where it moves later


@pytest.mark.parametrize("start", [0, 9e5, 1.1e6, 4e6, 1e7, 1.6e7, -1e7])
def test_normalise_clock_with_exact_steps_has_scale_one(start):
    model = DynamicsModel(1, 1, hidden_dim=4)
    model.normalise(transitions(start + torch.arange(21.0)))
    assert model.scale.item() == 1 and model.std.item() == pytest.approx(5.916, rel=1e-3)


@pytest.mark.parametrize("unit", [1.0, 1e-5, 1e-7, 1e-9])
def test_normalise_small_units_scale_with_the_observation(unit):
    observations = torch.randn(100)
    model, other = DynamicsModel(1, 1, hidden_dim=4), DynamicsModel(1, 1, hidden_dim=4)
    model.normalise(transitions(unit * observations))
    other.normalise(transitions(observations))
    assert model.scale.item() == pytest.approx(unit * other.scale.item(), rel=1e-5)
    assert model.std.item() == pytest.approx(unit * other.std.item(), rel=1e-5)


def test_normalise_moving_observation_has_unit_variance_and_unit_mean_square_steps():
    observations = 3 + 2 * torch.randn(1000)
    data = transitions(observations)
    model = DynamicsModel(1, 1, hidden_dim=4)
    model.normalise(data)
    steps = (data.next_observations - data.observations) / model.scale
    assert steps.square().mean().item() == pytest.approx(1, rel=1e-5)
    assert model.mean.item() == pytest.approx(float(observations[:-1].mean()), rel=1e-5)
    assert model.std.item() == pytest.approx(float(observations[:-1].std()), rel=1e-5)


def test_task_embedding_of_flipped_actions_has_the_other_sign():
    x = torch.randn(2, 40, 7)
    x[1] = x[0]
    y = torch.stack([x[0, :, 4:5] - x[0, :, 5:6], x[0, :, 5:6] - x[0, :, 4:5]])
    a, b = task_embedding(x, y)
    assert torch.allclose(a, -b, atol=1e-5) and a.abs().max() > 0.5


def test_task_embedding_nearly_constant_inputs_leave_weights_of_the_others_unchanged():
    x = torch.randn(2, 40, 4)
    x[1] = x[0]
    x[1, :, 1] = 50 + 1e-3 * torch.arange(40.0)  # a clock long after the data of the units
    y = (x[..., :1] - 0.5 * x[..., 2:3]).clone()
    weights = task_embedding(x, y).view(2, 4, 1)[:, [0, 2]]
    torch.testing.assert_close(weights[1], torch.tensor([[1.0], [-0.5]]), rtol=0.01, atol=0.01)
    torch.testing.assert_close(weights[0], weights[1], rtol=0.01, atol=0.01)


def test_dynamics_model_numpy_sizes_become_ints():
    model = DynamicsModel(np.int64(4), np.int32(2), hidden_dim=8)
    assert model.sizes == (4, 2, 1) and {type(size) for size in model.sizes} == {int}
    with pytest.raises(ValueError, match=r"^DynamicsModel: action_dim must be > 0, got 0$"):
        DynamicsModel(4, 0)


def test_task_embedding_large_observations_have_a_fixed_size_and_tell_tasks_apart():
    torch.manual_seed(0)
    latent, screen = torch.randn(3, 40, 4), torch.randn(4, 3000)
    action = torch.randn(3, 40, 2)
    gains = torch.tensor([1.0, 1.0, -1.0]).view(3, 1, 1)
    steps = gains * torch.nn.functional.pad(action, (0, 2))
    x = torch.cat([latent @ screen, action, torch.zeros(3, 40, 1)], dim=-1)
    embeddings = task_embedding(x, steps @ screen)
    assert embeddings.shape == (3, embedding_dim(3000, 2)) == (3, (64 + 2 + 1) * 64)
    torch.testing.assert_close(embeddings, task_embedding(x, steps @ screen), rtol=0, atol=0)
    same, other = (embeddings[0] - embeddings[1:]).norm(dim=1) / embeddings[0].norm()
    assert same < 0.2 < 1.5 < other  # the sign of the effect of actions differs


def test_normalise_columns_of_large_observations_have_the_units_that_they_have_alone():
    observations = torch.randn(1, 30, 2 * COLUMNS + 3)
    flags = torch.zeros(1, 29, dtype=torch.bool)
    data = Trajectories(observations[:, :-1], torch.zeros(1, 29, 1), observations[:, 1:], flags.float(), flags, flags)
    model = DynamicsModel(2 * COLUMNS + 3, 1, hidden_dim=2)
    model.normalise(data)
    for entry in (0, COLUMNS - 1, COLUMNS, 2 * COLUMNS + 2):
        alone = DynamicsModel(1, 1, hidden_dim=2)
        alone.normalise(transitions(observations[0, :, entry]))
        for name in ("mean", "std", "scale"):
            got, want = getattr(model, name)[entry], getattr(alone, name)[0]
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
