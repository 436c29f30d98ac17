"""Retrieval strategies: the items that each returns, and the tasks on which each helps."""

import copy
import pickle
import re

import pytest
import torch
from buffer_helpers import memory

from eaml_ext.experience import ExperienceBuffer, retrieval


def slopes(batch):
    return (batch["targets"] / batch["states"]).flatten()


def score(buffer, tasks, batch):
    losses = [(slopes(buffer.of_task(t).batch()).mean() * batch["states"] - batch["targets"]) for t in tasks.tolist()]
    return torch.stack([loss.square().mean() for loss in losses])


def test_uniform_many_draws_reach_all_tasks():
    assert set(slopes(retrieval.uniform(200)(memory(), {})).round().tolist()) == {0.0, 1.0, 2.0, 3.0}


def test_nearest_own_task_is_left_out():
    retriever = retrieval.nearest(5)
    batch = {"context_embedding": torch.tensor([2.1, 0.0])}
    assert slopes(retriever(memory(), batch)).round().tolist() == [2.0] * 5
    assert slopes(retriever(memory(), {**batch, "task": 2})).round().tolist() == [3.0] * 5
    with pytest.raises(ValueError, match=r"^retrieval.nearest: the batch has no context_embedding"):
        retriever(memory(), {})


def test_best_fit_returns_the_tasks_that_fit_the_batch():
    batch = {"states": torch.ones(3, 1), "targets": torch.full((3, 1), 1.2)}
    assert set(slopes(retrieval.best_fit(score, 1)(memory(), batch)).round().tolist()) == {1.0}
    assert set(slopes(retrieval.best_fit(score, 2)(memory(), batch)).round().tolist()) == {1.0, 2.0}
    assert set(slopes(retrieval.best_fit(score, 1)(memory(), {**batch, "task": 1})).round().tolist()) == {2.0}


def test_best_fit_non_finite_scores_are_left_out():
    def partly(buffer, tasks, batch):
        return torch.tensor([torch.nan, 5.0, torch.inf, torch.nan])

    assert set(slopes(retrieval.best_fit(partly, 3)(memory(), {})).round().tolist()) == {1.0}
    assert retrieval.best_fit(lambda *_: torch.full((4,), torch.nan), 3)(memory(), {}) is None


class World:
    """Linear tasks y = w · x + noise in 4 dimensions: past tasks in a buffer, and few data of a present one."""

    def __init__(self, kinds, sizes, embedding, noise=0.5):
        self.w, self.noise = 2 * torch.randn(kinds, 4), noise
        self.buffer = ExperienceBuffer(20_000, seed=0)
        self.embedding = embedding
        for task in range(len(sizes)):
            x, y = self.data(task % kinds, sizes[task])
            self.buffer.add(x, y, context_embedding=self.embeddings(task % kinds, sizes[task]), task=task)

    def data(self, kind, n):
        x = torch.randn(n, 4)
        return x, x @ self.w[kind].unsqueeze(1) + self.noise * torch.randn(n, 1)

    def embeddings(self, kind, n):
        return (self.w[kind] if self.embedding == "informative" else torch.randn(4)) + 0.05 * torch.randn(n, 4)

    def error(self, kind, retriever):
        """Return the error of ridge regression on six noisy pairs and retrieved ones, which have 0.9 of the weight."""
        x, y = self.data(kind, 6)
        batch = {"states": x, "targets": y, "context_embedding": self.embeddings(kind, 1)[0]}
        weight = torch.full((6, 1), 0.1 / 6)
        if retriever is not None:
            found = retriever(self.buffer, batch)
            share = found.get("weights", torch.ones(len(found["states"])))
            weight = torch.cat([weight, 0.9 * (share / share.sum()).unsqueeze(1)])
            x, y = torch.cat([x, found["states"]]), torch.cat([y, found["targets"]])
        w = torch.linalg.solve(x.mT @ (weight * x) + 1e-4 * torch.eye(4), x.mT @ (weight * y))
        return float((w.squeeze(1) - self.w[kind]).square().sum())

    def errors(self, **retrievers):
        kinds = [i % len(self.w) for i in range(60)]
        return {name: sum(self.error(kind, r) for kind in kinds) / 60 for name, r in retrievers.items()}


def fit_score(buffer, tasks, batch):
    """Return the loss on the batch of a regression on each past task."""
    losses = []
    for task in tasks.tolist():
        past = buffer.of_task(task).batch()
        w = torch.linalg.lstsq(past["states"], past["targets"]).solution
        losses.append((batch["states"] @ w - batch["targets"]).square().mean())
    return torch.stack(losses)


def test_uniform_one_kind_of_task_helps_and_many_hurt():
    one = World(1, [40] * 10, "informative").errors(plain=None, uniform=retrieval.uniform(200))
    assert one["uniform"] < 0.2 * one["plain"]
    many = World(20, [40] * 20, "informative").errors(plain=None, uniform=retrieval.uniform(200))
    assert many["uniform"] > 5 * many["plain"]


def test_uniform_weighted_prefers_recent_items():
    buffer = ExperienceBuffer(1000, age_half_life=50, seed=0)
    for w in (1.0, -1.0):  # recent items have another slope
        x = torch.randn(500, 1)
        buffer.add(x, w * x)
    recent = slopes(retrieval.uniform(400, weighted=True)(buffer, {})).mean()
    assert recent < -0.95 < -0.2 < slopes(retrieval.uniform(400)(buffer, {})).mean()


def test_nearest_informative_embedding_helps_and_random_one_hurts():
    strategies = {"plain": None, "uniform": retrieval.uniform(80), "nearest": retrieval.nearest(80)}
    informative = World(20, [40] * 40, "informative").errors(**strategies)
    assert informative["nearest"] < 0.2 * min(informative["plain"], informative["uniform"])
    random_one = World(20, [40] * 40, "random").errors(**strategies)
    assert random_one["nearest"] > random_one["plain"]


def test_attention_unequal_task_sizes_beats_nearest():
    sizes = [10, 200] * 10  # half of the kinds have 10 relevant items
    found = World(20, sizes, "informative").errors(
        nearest_few=retrieval.nearest(10), nearest_many=retrieval.nearest(150), attention=retrieval.attention(150, 0.5)
    )
    assert found["attention"] < 0.7 * min(found["nearest_few"], found["nearest_many"])


def test_best_fit_random_embedding_beats_nearest():
    found = World(20, [40] * 40, "random").errors(
        plain=None, nearest=retrieval.nearest(80), best_fit=retrieval.best_fit(fit_score, 2)
    )
    assert found["best_fit"] < 0.2 * min(found["plain"], found["nearest"])


def test_ivf_clustered_memory_compares_a_fraction_with_high_recall():
    world = World(200, [50] * 400, "informative")
    retriever = retrieval.ivf(80, nprobe=8)
    queries = torch.cat([world.embeddings(kind, 1) for kind in range(100)])
    assert retriever.recall(world.buffer, queries) > 0.98
    looked_at = [len(retriever._inverted_file.candidates(world.buffer, query)) for query in queries]
    assert sum(looked_at) / 100 < 0.05 * len(world.buffer)  # besides, 400 centroids are compared
    found = world.errors(nearest=retrieval.nearest(80), ivf=retriever)
    assert found["ivf"] < 1.5 * found["nearest"]
    few, many = (retrieval.ivf(10, nprobe=nprobe, nlist=400) for nprobe in (1, 8))
    assert few.recall(world.buffer, queries) < 0.95 < many.recall(world.buffer, queries)


def test_attention_weights_are_the_softmax_and_differentiable():
    world = memory()
    query = torch.tensor([2.1, 0.0], dtype=torch.float32, requires_grad=True)
    found = retrieval.attention(15, 0.7)(world, {"context_embedding": query, "task": 3})
    exact = world.retrieve(query, 15, exclude_task=3)
    torch.testing.assert_close(found["weights"], torch.softmax(-exact.distances / 0.7, 0))
    assert found["weights"].sum().item() == pytest.approx(1)
    (gradient,) = torch.autograd.grad((found["weights"] * found["targets"].squeeze(1)).sum(), query)
    d = (query.detach() - exact.context_embedding).square().sum(1)
    w = torch.softmax(-d / 0.7, 0)
    slope = -2 * (query.detach() - exact.context_embedding) / 0.7  # gradient of the logits
    y = exact.target.squeeze(1)
    torch.testing.assert_close(gradient, ((w * (y - (w * y).sum())).unsqueeze(1) * slope).sum(0), rtol=1e-4, atol=1e-5)
    (read,) = torch.autograd.grad(exact.read("target", 0.7).sum(), query)
    torch.testing.assert_close(read, gradient)


def test_retrievers_without_candidates_return_none():
    batch = {"context_embedding": torch.zeros(2), "task": 0}
    only_own = ExperienceBuffer(10)
    only_own.add(torch.zeros(2, 1), torch.zeros(2, 1), context_embedding=torch.zeros(2, 2), task=0)
    by_embedding = (retrieval.nearest(3), retrieval.attention(3), retrieval.ivf(3))
    for retriever in (*by_embedding, retrieval.best_fit(score)):
        assert retriever(only_own, batch) is None
        assert retriever(ExperienceBuffer(10), batch) is None
    assert retrieval.uniform(3)(ExperienceBuffer(10), batch) is None
    for retriever, name in zip(by_embedding, ("nearest", "attention", "ivf"), strict=True):
        with pytest.raises(ValueError, match=rf"^retrieval.{name}: the batch has no context_embedding to search with$"):
            retriever(memory(), {})


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: retrieval.uniform(0), ValueError, "retrieval.uniform: n must be > 0, got 0"),
        (
            lambda: retrieval.uniform(1, weighted=1),
            TypeError,
            "retrieval.uniform: weighted must be True or False, got int",
        ),
        (lambda: retrieval.attention(0), ValueError, "retrieval.attention: k must be > 0, got 0"),
        (lambda: retrieval.attention(1, 0.0), ValueError, "retrieval.attention: temperature must be > 0, got 0.0"),
        (lambda: retrieval.ivf(0), ValueError, "retrieval.ivf: k must be > 0, got 0"),
        (lambda: retrieval.ivf(1, 0), ValueError, "retrieval.ivf: nprobe must be > 0, got 0"),
        (lambda: retrieval.ivf(1, nlist=1.0), TypeError, "retrieval.ivf: nlist must be an integer"),
        (lambda: retrieval.ivf(1, seed=-1), ValueError, "retrieval.ivf: seed must be >= 0, got -1"),
        (
            lambda: retrieval.ivf(1).recall(memory(), torch.zeros(2)),
            ValueError,
            "retrieval.ivf.recall: queries must have shape (n, dim) with n > 0, got (2,)",
        ),
        (
            lambda: retrieval.ivf(1).recall(memory(), [0.0]),
            TypeError,
            "retrieval.ivf.recall: queries must be a torch.Tensor, got list",
        ),
        (lambda: retrieval.best_fit(None), TypeError, "retrieval.best_fit: score_fn must be callable, got NoneType"),
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
def test_retrieval_wrong_argument_raises(call, error, text):
    with pytest.raises(error, match="^" + re.escape(text)):
        call()


@pytest.mark.parametrize("retriever", [retrieval.uniform(3), retrieval.nearest(3), retrieval.attention(3, 0.5)])
def test_retriever_pickled_answers_as_the_original(retriever):
    buffer = ExperienceBuffer(10, seed=0)
    buffer.add(torch.randn(10, 2), torch.randn(10, 1), context_embedding=torch.randn(10, 2))
    twin, batch = copy.deepcopy(buffer), {"context_embedding": torch.zeros(2)}
    wanted, got = retriever(buffer, batch), pickle.loads(pickle.dumps(retriever))(twin, batch)
    assert all(torch.equal(got[name], value) for name, value in wanted.items())
