"""Adapter, AdaptedTaskModels and MetaLearner train on the steps of ragged experience, not on its padding."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from eaml_ext.adaptation import AdaptationConfig, Adapter
from eaml_ext.experience import ExperienceBuffer, retrieval
from eaml_ext.meta import AdaptedTaskModels, MaskedLoss, MetaLearner, MetaMAML
from eaml_ext.nn import SSM


def sequences():
    """A buffer of pairs for a model of one input and one output, and its episodes, two of each task."""
    buffer = ExperienceBuffer(20, seed=0, ragged=("observation", "target"))
    pairs = [(torch.randn(n, 1), torch.randn(n, 1), i // 2) for i, n in enumerate((3, 8, 5, 2))]
    for x, y, task in pairs:
        buffer.add(observation=x, target=y, task=task, context_embedding=torch.full((1,), float(task)))
    return buffer, pairs


def test_adapter_batch_of_ragged_items_leaves_padding_out():
    buffer, _ = sequences()
    model, found = SSM(1, 8, 1), buffer.get_batch(3)
    with torch.no_grad():
        wanted = (model(found.observation) - found.target)[found.mask].square().mean()
    adapter = Adapter(model, AdaptationConfig(lr=0.1, max_steps_per_call=1))
    assert adapter.adapt(mse_loss, found.batch()) == pytest.approx(float(wanted), rel=1e-5)


def test_read_ragged_values_raise():
    buffer, _ = sequences()
    found = buffer.retrieve(torch.zeros(1), 2)
    for values in ("target", lambda e: e.target):
        with pytest.raises(ValueError, match="values must not be ragged"):
            found.read(values)
    assert found.read("context_embedding").shape == (1,)


@pytest.mark.parametrize("temperature", [None, 2.0])
def test_adapter_loss_of_ragged_experience_leaves_padding_out(temperature):
    torch.manual_seed(0)
    buffer, pairs = sequences()
    model = SSM(1, 8, 1)
    retriever = retrieval.nearest(3) if temperature is None else retrieval.attention(3, temperature)
    cfg = AdaptationConfig(lr=0.1, max_steps_per_call=1)
    adapter = Adapter(model, cfg, buffer, 0.5, retriever=retriever)
    x, y = torch.randn(2, 4, 1), torch.randn(2, 4, 1)
    found = buffer.retrieve(torch.zeros(1), 3)
    near = [pairs[i] for i in found.indices.tolist()]
    with torch.no_grad():
        errors = [(model(x.unsqueeze(0))[0] - y).square() for x, y, _ in near]
        wanted = mse_loss(model(x), y)
        if temperature is None:
            wanted = wanted + 0.5 * torch.cat(errors).mean()
        else:
            wanted = wanted + 0.5 * (found.attention(temperature) @ torch.stack([e.mean() for e in errors]))
    batch = {"states": x, "targets": y, "context_embedding": torch.zeros(1)}
    assert adapter.adapt(mse_loss, batch) == pytest.approx(float(wanted), rel=1e-5)


def test_adapt_many_ragged_experience_of_equal_lengths_equals_one_user():
    buffer, _ = sequences()
    model, cfg = SSM(1, 8, 1), AdaptationConfig(lr=0.1, max_steps_per_call=2)
    adapter = Adapter(model, cfg, buffer, 0.5, retriever=retrieval.nearest(2))
    x, y = torch.randn(2, 2, 4, 1), torch.randn(2, 2, 4, 1)
    batch = {"states": x, "targets": y, "context_embedding": torch.zeros(2, 1)}
    _, losses = adapter.adapt_many(mse_loss, batch)
    for user in range(2):
        one = Adapter(copy.deepcopy(model), cfg, buffer, 0.5, retriever=retrieval.nearest(2))
        value = one.adapt(mse_loss, {name: part[user] for name, part in batch.items()})
        assert value == pytest.approx(float(losses[user]), rel=1e-5)
    batch["context_embedding"] = torch.tensor([[0.0], [1.0]])
    with pytest.raises(ValueError, match="equally many experiences for all users, of equal lengths"):
        adapter.adapt_many(mse_loss, batch)


@pytest.mark.parametrize(
    "mask, error, text",
    [
        (torch.ones(1, 3), TypeError, "the retriever's mask must be bool"),
        (torch.ones(3, dtype=torch.bool), ValueError, r"mask must have shape \(n, time\) = \(1, 3\), got \(3,\)"),
        (torch.zeros(1, 3, dtype=torch.bool), ValueError, "mask must be True at least once in each item"),
    ],
    ids=str,
)
def test_adapter_bad_mask_of_a_retriever_raises(mask, error, text):
    found = {"states": torch.zeros(1, 3, 1), "targets": torch.zeros(1, 3, 1), "mask": mask}
    adapter = Adapter(SSM(1, 8, 1), AdaptationConfig(), sequences()[0], retriever=lambda *_: found)
    with pytest.raises(error, match=text):
        adapter.adapt(mse_loss, {"states": torch.zeros(1, 3, 1), "targets": torch.zeros(1, 3, 1)})


def test_best_fit_returns_tasks_of_other_lengths_together():
    buffer, pairs = sequences()
    found = retrieval.best_fit(lambda buffer, tasks, batch: -tasks.float(), num_tasks=2)(buffer, {})
    assert found["states"].shape == (4, 8, 1) and found["mask"].sum(1).tolist() == [5, 2, 3, 8]
    assert torch.equal(found["targets"][3], pairs[1][1])


def test_adapted_task_models_ragged_items_equal_each_task_alone():
    buffer, pairs = sequences()
    loss_fn = MaskedLoss(nn.MSELoss(reduction="none"))
    maml = MetaMAML(SSM(1, 8, 1), 0.1, 1e-3)
    models = AdaptedTaskModels(maml, buffer, loss_fn, num_steps=2)
    x, y = torch.randn(1, 6, 1), torch.randn(1, 6, 1)
    mask = torch.arange(6) < 4
    scores = models.score(buffer, torch.tensor([1, 0]), {"states": x, "targets": y, "mask": mask.unsqueeze(0)})
    for task, score in zip((1, 0), scores.tolist(), strict=True):
        own = [pair for pair in pairs if pair[2] == task]
        adapted = maml.adapt([x for x, _, _ in own], [y for _, y, _ in own], loss_fn, 2)
        with torch.no_grad():
            assert score == pytest.approx(float(mse_loss(adapted(x)[:, :4], y[:, :4])), rel=1e-4)


def test_adapted_task_models_ragged_states_with_one_target_each_equal_each_task_alone():
    buffer = ExperienceBuffer(20, seed=0, ragged="observation")
    tasks = [([torch.randn(n, 1) for _ in range(2)], torch.randn(2, 1)) for n in (3, 5, 3)]
    for task, (x, y) in enumerate(tasks):
        buffer.add(observation=x, target=y, task=task)
    model = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(1, 1))
    maml = MetaMAML(model, 0.1, 1e-3)
    models = AdaptedTaskModels(maml, buffer, mse_loss)
    x, y = torch.randn(4, 6, 1), torch.randn(4, 1)
    scores = models.score(buffer, torch.arange(3), {"states": x, "targets": y})
    for (own_x, own_y), score in zip(tasks, scores.tolist(), strict=True):
        adapted = maml.adapt(torch.stack(own_x), own_y, mse_loss)
        with torch.no_grad():
            assert score == pytest.approx(float(mse_loss(adapted(x), y)), rel=1e-4)


def test_meta_learner_ragged_experience_leaves_padding_out():
    learner = MetaLearner(3, 2, 8, 1e-3)
    buffer = ExperienceBuffer(20, 3, 2, seed=0, ragged=("state", "action"))
    states, actions = ([torch.randn(n, dim) for n in (2, 5)] for dim in (3, 2))
    buffer.add(state=states, action=actions, context_embedding=torch.zeros(2, 3))
    found = buffer.retrieve(torch.zeros(3), 2)
    support = torch.randn(4, 3), torch.randn(4, 2)
    got = learner.adapt_with_experience(torch.zeros(3), support, found)
    inputs, targets = torch.cat([support[0], *states]), torch.cat([support[1], *actions])  # distances are 0
    wanted = learner.adapt(torch.zeros(3), (inputs, targets))
    for name, p in got.items():
        torch.testing.assert_close(p, wanted[name])
