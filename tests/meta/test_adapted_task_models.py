import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eaml_ext.experience import ExperienceBuffer, retrieval
from eaml_ext.meta import AdaptedTaskModels, MetaMAML

SIZES = (8, 5, 8, 5, 6)  # items of each task


def world(num_steps=7, **options):
    torch.manual_seed(0)
    maml = MetaMAML(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)), inner_lr=0.1, outer_lr=1e-3)
    buffer = ExperienceBuffer(32, seed=0)
    for task, n in enumerate(SIZES):
        x = torch.randn(n, 3)
        buffer.add(x, (task - 2) * x.sum(1, keepdim=True), task=10 + task)
    return maml, buffer, AdaptedTaskModels(maml, buffer, F.mse_loss, num_steps, **options)


def now(slope, n=4):
    x = torch.randn(n, 3)
    return {"states": x, "targets": slope * x.sum(1, keepdim=True)}


@pytest.mark.parametrize("chunk_size", [None, 1, 64])
def test_score_any_chunk_size_equals_loop_over_tasks(chunk_size):
    maml, buffer, models = world(chunk_size=chunk_size)
    assert sorted(models.tasks) == [10, 11, 12, 13, 14]
    batch, tasks = now(1.0), torch.tensor([13, 10, 14])
    scores = models.score(buffer, tasks, batch)
    for task, score in zip(tasks.tolist(), scores, strict=True):
        past = buffer.of_task(task).batch()
        adapted = maml.adapt(past["states"], past["targets"], F.mse_loss, 7)
        torch.testing.assert_close(score, F.mse_loss(adapted(batch["states"]), batch["targets"]).detach())
    assert not scores.requires_grad


def test_params_tasks_given_are_those_of_adapted_models():
    maml, buffer, models = world()
    params = models.params(torch.tensor([13, 10, 13]))
    for row, task in enumerate((13, 10, 13)):
        past = buffer.of_task(task).batch()
        adapted = maml.adapt(past["states"], past["targets"], F.mse_loss, 7)
        for name, p in adapted.named_parameters():
            torch.testing.assert_close(params[name][row], p.detach())
    with pytest.raises(ValueError, match=r"^AdaptedTaskModels.params: tasks has 7, of which there is no model$"):
        models.params(torch.tensor([13, 7]))


def test_best_fit_score_finds_task_that_predicts_the_batch():
    _, buffer, models = world(num_steps=200)
    for task, slope in ((10, -2.0), (14, 2.0)):
        found = retrieval.best_fit(models.score, 1)(buffer, now(slope, 8))
        assert torch.equal(found["states"], buffer.of_task(task).observation)


def test_score_new_task_gets_model_and_old_ones_stay_until_update():
    maml, buffer, models = world()
    batch = now(0.5)
    before = models.score(buffer, torch.tensor([13]), batch)
    with torch.no_grad():
        maml.model[0].weight.add_(0.3)
    buffer.add(torch.randn(7, 3), torch.randn(7, 1), task=99)  # overwrites tasks 10 (all but one item)
    scores = models.score(buffer, torch.tensor([99, 13, 10]), batch)
    assert torch.isfinite(scores).all() and torch.equal(scores[1:2], before)
    models.update()
    assert 99 in models.tasks and not torch.equal(models.score(buffer, torch.tensor([13]), batch), before)


def test_score_task_of_other_length_is_infinite():
    _, buffer, models = world(length=5)
    assert sorted(models.tasks) == [11, 13]
    scores = models.score(buffer, buffer.tasks(), now(1.0))
    assert torch.isfinite(scores).tolist() == [False, True, False, True, False]
    _, buffer, models = world(length=77)
    assert models.score(buffer, buffer.tasks(), now(1.0)).tolist() == [torch.inf] * 5
    assert retrieval.best_fit(models.score)(buffer, now(1.0)) is None


def test_adapted_task_models_empty_buffer_has_no_models():
    maml, _, _ = world()
    empty = ExperienceBuffer(10)
    models = AdaptedTaskModels(maml, empty, F.mse_loss)
    assert models.tasks == []
    empty.add(torch.randn(4, 3), torch.randn(4, 1), task=1)
    assert torch.isfinite(models.score(empty, torch.tensor([1]), now(1.0))).all() and models.tasks == [1]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"maml": 1}, TypeError, "maml must be of type MetaMAML, got int"),
        ({"buffer": {}}, TypeError, "buffer must be of type ExperienceBuffer, got dict"),
        ({"loss_fn": 1}, TypeError, "loss_fn must be callable, got int"),
        ({"num_steps": -1}, ValueError, "num_steps must be >= 0, got -1"),
        ({"length": 0}, ValueError, "length must be > 0, got 0"),
        ({"chunk_size": 1.5}, TypeError, "chunk_size must be an integer, got 1.5"),
    ],
)
def test_adapted_task_models_bad_argument_raises_one_sentence(change, error, text):
    maml, buffer, _ = world()
    with pytest.raises(error, match="^AdaptedTaskModels: " + re.escape(text)):
        AdaptedTaskModels(**{"maml": maml, "buffer": buffer, "loss_fn": F.mse_loss, **change})
    with pytest.raises(ValueError, match=r"batch: states names 'nothing', the stored fields are observation"):
        AdaptedTaskModels(maml, buffer, F.mse_loss, states="nothing")
    with pytest.raises(ValueError, match=r"batch: targets names 'nothing', the stored fields are observation"):
        AdaptedTaskModels(maml, buffer, F.mse_loss, targets="nothing")


def test_score_bad_argument_raises_one_sentence():
    _, buffer, models = world()
    with pytest.raises(
        ValueError, match=r"^AdaptedTaskModels.score: buffer is another than the one these models were made"
    ):
        models.score(ExperienceBuffer(3), torch.tensor([10]), now(1.0))
    models._loss_fn = lambda p, t: (p - t).square().mean(1)
    with pytest.raises(ValueError, match=r"^AdaptedTaskModels.score: loss_fn must return a scalar tensor, got \(4,\)$"):
        models.score(buffer, torch.tensor([10]), now(1.0))


def test_score_layer_frozen_later_needs_an_update():
    maml, buffer, models = world()
    maml.model[0].requires_grad_(False)
    known = torch.tensor([10, 11])
    models.score(buffer, known, now(1))
    buffer.add(torch.randn(4, 3), torch.randn(4, 1), task=30)
    with pytest.raises(ValueError, match="parameters were frozen or unfrozen after the last update: call update again"):
        models.score(buffer, torch.tensor([30]), now(1))
    models.update()
    assert list(models.params(known)) == ["2.weight", "2.bias"]
    batch = now(1)
    part = buffer.of_task(30)
    wanted = maml.adapt(part.observation, part.target, F.mse_loss, 7)
    assert torch.equal(wanted[0].weight, maml.model[0].weight)
    score = models.score(buffer, torch.tensor([30]), batch)
    torch.testing.assert_close(score[0], F.mse_loss(wanted(batch["states"]), batch["targets"]).detach())


def test_score_inference_mode_equals_that_outside():
    maml, buffer, models = world()
    batch, tasks = now(1), torch.arange(10, 15)
    with torch.inference_mode():
        inside = AdaptedTaskModels(maml, buffer, F.mse_loss, np.int64(7), chunk_size=np.int64(2))
        scores = inside.score(buffer, tasks, {n: t.clone() for n, t in batch.items()})
    torch.testing.assert_close(scores, models.score(buffer, tasks, batch))
    inside.update()
    torch.testing.assert_close(inside.score(buffer, tasks, batch), scores)


def test_update_concurrent_readers_get_old_or_new_models_only():
    torch.manual_seed(0)
    _, buffer, models = world()
    batch, tasks = now(1.0), buffer.tasks()
    wanted, adapt, seen = models.score(buffer, tasks, batch), models._maml.adapt_params, []

    def reading(*args, **options):  # as another thread would read, between two steps of the update
        if not seen:
            seen.append((sorted(models.tasks), models.params(tasks), models.score(buffer, tasks, batch)))
        return adapt(*args, **options)

    before = models.params(tasks)
    models._maml.adapt_params = reading
    models.update()
    numbers, params, scores = seen[0]
    assert numbers == tasks.tolist() and torch.equal(scores, wanted)
    assert all(torch.equal(params[name], before[name]) for name in before)


def test_score_task_no_longer_stored_is_infinite():
    _, buffer, models = world()
    before = models.score(buffer, torch.tensor([10]), now(1.0))
    scores = models.score(buffer, torch.tensor([10, 99]), now(1.0))
    assert torch.isfinite(before).all() and scores.isinf().tolist() == [False, True]
