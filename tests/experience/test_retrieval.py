import copy
import pickle
import re
import weakref

import pytest
import torch

from eaml_ext.experience import ExperienceBuffer, retrieval
from eaml_ext.experience.ivf import InvertedFile


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


# ------------------------------------------------------------------------------------------------- when each helps


class World:
    """Linear tasks y = w · x + noise in 4 dimensions; past ones in a buffer, a few data of a present one at hand."""

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
        return (self.w[kind] if self.embedding == "tells" else torch.randn(4)) + 0.05 * torch.randn(n, 4)

    def error(self, kind, retriever):
        """Of ridge regression on six noisy pairs and what is retrieved for them, which makes up nine tenths."""
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
    """Loss on the batch of a regression on each past task."""
    losses = []
    for task in tasks.tolist():
        past = buffer.of_task(task).batch()
        w = torch.linalg.lstsq(past["states"], past["targets"]).solution
        losses.append((batch["states"] @ w - batch["targets"]).square().mean())
    return torch.stack(losses)


def test_uniform_helps_where_there_is_one_kind_of_task_and_hurts_where_there_are_many():
    one = World(1, [40] * 10, "tells").errors(plain=None, uniform=retrieval.uniform(200))
    assert one["uniform"] < 0.2 * one["plain"]
    many = World(20, [40] * 20, "tells").errors(plain=None, uniform=retrieval.uniform(200))
    assert many["uniform"] > 5 * many["plain"]


def test_uniform_draws_by_weight_where_asked():
    buffer = ExperienceBuffer(1000, age_half_life=50, seed=0)
    for w in (1.0, -1.0):  # the world has changed half way
        x = torch.randn(500, 1)
        buffer.add(x, w * x)
    recent = slopes(retrieval.uniform(400, weighted=True)(buffer, {})).mean()
    assert recent < -0.95 < -0.2 < slopes(retrieval.uniform(400)(buffer, {})).mean()


def test_nearest_helps_where_the_embedding_tells_tasks_apart():
    strategies = {"plain": None, "uniform": retrieval.uniform(80), "nearest": retrieval.nearest(80)}
    told = World(20, [40] * 40, "tells").errors(**strategies)
    assert told["nearest"] < 0.2 * min(told["plain"], told["uniform"])
    untold = World(20, [40] * 40, "says nothing").errors(**strategies)
    assert untold["nearest"] > untold["plain"]


def test_attention_helps_where_the_number_of_relevant_items_differs():
    sizes = [10, 200] * 10  # for half of the kinds only 10 items are relevant
    found = World(20, sizes, "tells").errors(
        nearest_few=retrieval.nearest(10), nearest_many=retrieval.nearest(150), attention=retrieval.attention(150, 0.5)
    )
    assert found["attention"] < 0.7 * min(found["nearest_few"], found["nearest_many"])


def test_best_fit_helps_where_the_embedding_says_nothing():
    found = World(20, [40] * 40, "says nothing").errors(
        plain=None, nearest=retrieval.nearest(80), best_fit=retrieval.best_fit(fit_score, 2)
    )
    assert found["best_fit"] < 0.2 * min(found["plain"], found["nearest"])


def test_hierarchical_looks_at_a_fraction_and_finds_what_nearest_finds():
    world = World(200, [50] * 400, "tells")
    retriever = retrieval.ivf(80, nprobe=8)
    queries = torch.cat([world.embeddings(kind, 1) for kind in range(100)])
    assert retriever.recall(world.buffer, queries) > 0.98
    looked_at = [len(retriever._inverted_file.candidates(world.buffer, query)) for query in queries]
    assert sum(looked_at) / 100 < 0.05 * len(world.buffer)  # and 400 centroids, 0.02 of it
    found = world.errors(nearest=retrieval.nearest(80), ivf=retriever)
    assert found["ivf"] < 1.5 * found["nearest"]
    few, many = (retrieval.ivf(10, nprobe=nprobe, nlist=400) for nprobe in (1, 8))
    assert few.recall(world.buffer, queries) < 0.95 < many.recall(world.buffer, queries)


# ------------------------------------------------------------------------------------------------- attention


def test_attention_is_the_softmax_of_distances_and_differentiable_in_the_query():
    world = memory()
    query = torch.tensor([2.1, 0.0], dtype=torch.float32, requires_grad=True)
    found = retrieval.attention(15, 0.7)(world, {"context_embedding": query, "task": 3})
    exact = world.retrieve(query, 15, exclude_task=3)
    torch.testing.assert_close(found["weights"], torch.softmax(-exact.distances / 0.7, 0))
    assert found["weights"].sum().item() == pytest.approx(1)
    (gradient,) = torch.autograd.grad((found["weights"] * found["targets"].squeeze(1)).sum(), query)
    d = (query.detach() - exact.context_embedding).square().sum(1)
    w = torch.softmax(-d / 0.7, 0)
    slope = -2 * (query.detach() - exact.context_embedding) / 0.7  # of the logits
    y = exact.target.squeeze(1)
    torch.testing.assert_close(gradient, ((w * (y - (w * y).sum())).unsqueeze(1) * slope).sum(0), rtol=1e-4, atol=1e-5)
    (read,) = torch.autograd.grad(exact.read("target", 0.7).sum(), query)
    torch.testing.assert_close(read, gradient)


def test_attention_reads_are_twice_differentiable():
    buffer = ExperienceBuffer(20)
    keys = torch.randn(12, 3, dtype=torch.float64)
    buffer.add(context_embedding=keys, value=torch.randn(12, 2, dtype=torch.float64))
    queries = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def read(q):
        return buffer.retrieve(q, 5).read("value", 0.8)

    assert read(queries).shape == (4, 2)
    assert torch.autograd.gradcheck(read, queries) and torch.autograd.gradgradcheck(read, queries)


def test_a_read_of_nothing_is_zero_and_of_something_else_is_refused():
    buffer = memory()
    nothing = buffer.retrieve(torch.zeros(2), 3, exclude_task=[0, 1, 2, 3])
    assert nothing.read("target").tolist() == [0.0]
    found = buffer.retrieve(torch.zeros(2), 3)
    assert torch.equal(found.read(lambda e: e.target * 2), 2 * found.read("target"))
    with pytest.raises(TypeError, match=r"^Experiences.read: values must be floating, got int64$"):
        found.read("task")
    with pytest.raises(ValueError, match=r"^Experiences.read: values names 'nothing', the stored fields are"):
        found.read("nothing")
    with pytest.raises(ValueError, match=r"^Experiences.attention: there are no distances, the items do not come from"):
        buffer.get_batch(3).attention()
    for temperature, error, text in (
        (0.0, ValueError, "> 0"),
        (float("inf"), ValueError, "finite"),
        ("1", TypeError, "a"),
    ):
        with pytest.raises(error, match=rf"^Experiences.attention: temperature must be {text}"):
            found.attention(temperature)


# ------------------------------------------------------------------------------------------------- ivf


def clustered(n, dim=8, clusters=40):
    return (4 * torch.randn(clusters, dim))[torch.randint(clusters, (n,))] + torch.randn(n, dim)


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_hierarchical_follows_a_ring_that_turns(metric, place, tmp_path):
    options = {"directory": tmp_path / "b"} if place == "disk" else {}
    buffer = ExperienceBuffer(1500, seed=0, metric=metric, **options)
    retriever = retrieval.ivf(5, nprobe=6)
    for step in range(40):
        x = clustered(97)
        buffer.add(state=x, context_embedding=x, task=torch.arange(97) % 3)
        if step == 25:
            buffer.clear()
            buffer.add(state=x, context_embedding=x, task=torch.arange(97) % 3)
        found = retriever.search(buffer, x[:3], exclude_task=1)
        exact = buffer.retrieve(x[:3], 5, exclude_task=1)
        assert found.indices.shape == exact.indices.shape
        assert torch.equal(found.state, found.context_embedding)
        assert buffer.is_current(found.indices, found.generations).all() and not (found.task == 1).any()
        assert all(len(row.unique()) == len(row) for row in found.indices), "an item was found twice"
        assert (found.distances >= exact.distances - 1e-5).all()
        assert retriever.recall(buffer, x[:20]) > 0.8
    other = ExperienceBuffer(1500, metric=metric)  # another buffer in between, and back
    other.add(state=torch.ones(9, 8), context_embedding=torch.ones(9, 8), task=0)
    assert len(retriever.search(other, torch.ones(8))) == 5
    assert retriever.recall(buffer, x[:20]) > 0.8


@pytest.mark.parametrize("change", ["the memory grows", "all of it is replaced"])
def test_cells_follow_what_is_stored(change):
    buffer = ExperienceBuffer(8000 if change == "the memory grows" else 4000)
    x = torch.randn(200 if change == "the memory grows" else 4000, 8)
    buffer.add(state=x, context_embedding=x)
    retriever = retrieval.ivf(5, nprobe=4)
    retriever.search(buffer, x[0])
    for part in (50 + clustered(8000, clusters=80)).split(500):
        buffer.add(state=part, context_embedding=part)
        retriever.search(buffer, part[0])
    looked_at = [len(retriever._inverted_file.candidates(buffer, query)) for query in part[:50]]
    assert sum(looked_at) / 50 < 0.15 * len(buffer)  # the old cells: all that is new is in one or two of them
    assert retriever.recall(buffer, part[:50]) > 0.8


def test_hierarchical_is_exact_when_asked_and_when_the_cells_run_dry():
    buffer, x = ExperienceBuffer(1000, age_half_life=300.0), clustered(900)
    buffer.add(state=x, context_embedding=x, priority=torch.rand(900) + 0.1)
    for retriever in (retrieval.ivf(7, nprobe=None), retrieval.ivf(900, nprobe=1)):
        found, exact = retriever.search(buffer, x[:4]), buffer.retrieve(x[:4], retriever.k)
        assert torch.equal(found.indices, exact.indices) and torch.equal(found.distances, exact.distances)
        assert retriever.recall(buffer, x[:4]) == 1.0
    everywhere = retrieval.ivf(7, nprobe=5, nlist=5)
    assert torch.equal(everywhere.search(buffer, x[:4]).indices, buffer.retrieve(x[:4], 7).indices)
    half = ExperienceBuffer(1000)
    half.add(state=x, context_embedding=x.bfloat16())
    assert retrieval.ivf(7).recall(half, x[:20].bfloat16()) > 0.8


@pytest.fixture
def trained(monkeypatch):
    """The storages for which centroids were made, in order."""
    storages, train = [], InvertedFile._train

    def counted(self, storage, metric):
        storages.append(weakref.ref(storage))
        return train(self, storage, metric)

    monkeypatch.setattr(InvertedFile, "_train", counted)
    return lambda: [reference() for reference in storages]


def blobs(seed, capacity=600):
    x = clustered(600, clusters=20) + 100 * seed
    buffer = ExperienceBuffer(capacity)
    buffer.add(state=x, context_embedding=x)
    return buffer, x


@pytest.mark.parametrize("way", ["itself", "deepcopy", "pickle", "pickled after a search"])
def test_hierarchical_on_several_buffers_trains_once_for_each(way, trained):
    retriever = retrieval.ivf(5, nprobe=3)
    (first, x), (second, y) = blobs(0), blobs(1)
    if way == "pickled after a search":
        retriever.search(first, x[0])
        retriever.search(second, y[0])
    if way != "itself":
        retriever = copy.deepcopy(retriever) if way == "deepcopy" else pickle.loads(pickle.dumps(retriever))
    before = len(trained())
    for i in range(6):
        for buffer, keys in ((first, x), (second, y)):
            found = retriever.search(buffer, keys[i])
            assert found.indices[0] == i and torch.equal(found.state, keys[found.indices])
    assert trained()[before:] == [first.storage, second.storage]
    other = copy.deepcopy(first)  # a buffer of its own
    other.add(state=x[:60] - 50, context_embedding=x[:60] - 50)
    assert retriever.search(other, x[0] - 50).indices[0] == 0 and retriever.search(first, x[0]).indices[0] == 0
    assert trained()[before:] == [first.storage, second.storage, other.storage]


def test_hierarchical_keeps_no_buffer_alive_and_finds_nothing_of_one_that_is_gone(trained):
    retriever, addresses, seen = retrieval.ivf(5, nprobe=3), set(), []
    for seed in range(8):
        buffer, x = blobs(seed)
        addresses.add(id(buffer))
        seen.append((weakref.ref(buffer), weakref.ref(buffer.storage.columns["context_embedding"])))
        found = retriever.search(buffer, x[7])
        assert found.indices[0] == 7 and torch.equal(found.state, x[found.indices])
        assert retriever.recall(buffer, x[:30]) > 0.8
        del buffer, found
        assert seen[-1][0]() is None and seen[-1][1]() is None
    assert len(trained()) == 8 and len(addresses) < 8, "an address must be reused"


@pytest.mark.parametrize("change", ["load_state_dict", "clear"])
def test_hierarchical_after_the_content_is_replaced_trains_again(change, trained):
    retriever = retrieval.ivf(5, nprobe=3)
    (buffer, x), (other, y) = blobs(0), blobs(1)
    retriever.search(buffer, x[0])
    if change == "load_state_dict":
        buffer.load_state_dict(other.state_dict())
    else:
        buffer.clear()
        buffer.add(state=y, context_embedding=y)
    found = retriever.search(buffer, y[3])
    assert found.indices[0] == 3 and torch.equal(found.state, y[found.indices])
    assert trained() == [buffer.storage] * 2


def test_a_search_among_slots():
    buffer = memory()
    query = torch.tensor([1.9, 0.0])
    among = torch.tensor([3, 17, 7, 99, -1, 12])  # of tasks 0, 3, 1, none, none, 2
    found = buffer.retrieve(query, 10, among=among)
    assert found.indices.tolist() == [12, 7, 17, 3] and found.task.tolist() == [2, 1, 3, 0]
    assert buffer.retrieve(query, 10, 2, among=among).indices.tolist() == [7, 17, 3]
    assert len(buffer.retrieve(query, 10, among=among[:0])) == 0
    for bad, error, text in (
        ([1], TypeError, "among must be a torch.Tensor, got list"),
        (torch.zeros(2), TypeError, "among must be int64, got float32"),
        (torch.zeros(2, 2).long(), ValueError, r"among must have shape \(n,\), got \(2, 2\)"),
        (torch.zeros(2, device="meta").long(), ValueError, "among is on meta, the buffer is on cpu"),
    ):
        with pytest.raises(error, match=f"^ExperienceBuffer.retrieve: {text}"):
            buffer.retrieve(query, 10, among=bad)


# ------------------------------------------------------------------------------------------------- and the rest


def test_nothing_to_offer_is_none():
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
def test_refusals(call, error, text):
    with pytest.raises(error, match="^" + re.escape(text)):
        call()
