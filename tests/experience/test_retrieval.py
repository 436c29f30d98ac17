import re

import pytest
import torch

from eaml_ext.experience import ExperienceBuffer, retrieval


def memory():
    """Tasks 0..3, task t having target t * observation and the embedding (t, 0)."""
    buffer = ExperienceBuffer(100, seed=0)
    for task in range(4):
        x = torch.linspace(1, 2, 5).unsqueeze(1)
        buffer.add(x, task * x, context_embedding=torch.tensor([[float(task), 0.0]]).expand(5, 2), task=task)
    return buffer


def slopes(batch):
    return (batch["targets"] / batch["states"]).flatten()


def score(buffer, tasks, batch):
    losses = [(slopes(buffer.of_task(t).batch()).mean() * batch["states"] - batch["targets"]) for t in tasks.tolist()]
    return torch.stack([loss.square().mean() for loss in losses])


def test_uniform_draws_everything():
    assert set(slopes(retrieval.uniform(200)(memory(), {})).round().tolist()) == {0.0, 1.0, 2.0, 3.0}


def test_nearest_looks_at_the_embedding_and_leaves_out_the_own_task():
    retriever = retrieval.nearest(5)
    batch = {"context_embedding": torch.tensor([2.1, 0.0])}
    assert slopes(retriever(memory(), batch)).round().tolist() == [2.0] * 5
    assert slopes(retriever(memory(), {**batch, "task": 2})).round().tolist() == [3.0] * 5
    with pytest.raises(ValueError, match=r"^retrieval.nearest: the batch has no context_embedding"):
        retriever(memory(), {})


def test_best_fit_takes_the_tasks_that_explain_the_batch():
    batch = {"states": torch.ones(3, 1), "targets": torch.full((3, 1), 1.2)}
    assert set(slopes(retrieval.best_fit(score, 1)(memory(), batch)).round().tolist()) == {1.0}
    assert set(slopes(retrieval.best_fit(score, 2)(memory(), batch)).round().tolist()) == {1.0, 2.0}
    assert set(slopes(retrieval.best_fit(score, 1)(memory(), {**batch, "task": 1})).round().tolist()) == {2.0}


def test_best_fit_never_takes_a_task_whose_score_is_not_finite():
    def partly(buffer, tasks, batch):
        return torch.tensor([torch.nan, 5.0, torch.inf, torch.nan])

    assert set(slopes(retrieval.best_fit(partly, 3)(memory(), {})).round().tolist()) == {1.0}
    assert retrieval.best_fit(lambda *_: torch.full((4,), torch.nan), 3)(memory(), {}) is None


def test_nothing_to_offer_is_none():
    batch = {"context_embedding": torch.zeros(2), "task": 0}
    only_own = ExperienceBuffer(10)
    only_own.add(torch.zeros(2, 1), torch.zeros(2, 1), context_embedding=torch.zeros(2, 2), task=0)
    for retriever in (retrieval.nearest(3), retrieval.best_fit(score)):
        assert retriever(only_own, batch) is None
        assert retriever(ExperienceBuffer(10), batch) is None
    assert retrieval.uniform(3)(ExperienceBuffer(10), batch) is None


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: retrieval.uniform(0), ValueError, "retrieval.uniform: n must be > 0, got 0"),
        (lambda: retrieval.nearest(1.5), TypeError, "retrieval.nearest: k must be an integer, got 1.5"),
        (lambda: retrieval.best_fit(score, 0), ValueError, "retrieval.best_fit: num_tasks must be > 0, got 0"),
        (
            lambda: retrieval.best_fit(lambda *_: torch.zeros(3))(memory(), {}),
            ValueError,
            "retrieval.best_fit: what score_fn returns must have shape (4,), got (3,)",
        ),
        (
            lambda: retrieval.best_fit(lambda *_: 1.0)(memory(), {}),
            TypeError,
            "retrieval.best_fit: what score_fn returns must be a torch.Tensor, got float",
        ),
    ],
)
def test_refusals(call, error, text):
    with pytest.raises(error, match="^" + re.escape(text)):
        call()
