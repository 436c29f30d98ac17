"""Inverted lists: recall, lists that follow the stored items, and one set of lists for each buffer."""

import copy
import pickle
import weakref

import pytest
import torch

from eaml_ext.experience import ExperienceBuffer, retrieval
from eaml_ext.experience.ivf import InvertedFile


def clustered(n, dim=8, clusters=40):
    return (4 * torch.randn(clusters, dim))[torch.randint(clusters, (n,))] + torch.randn(n, dim)


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_ivf_ring_overwritten_and_cleared_finds_live_items(metric, place, tmp_path):
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
    other = ExperienceBuffer(1500, metric=metric)  # searched between two searches of the first
    other.add(state=torch.ones(9, 8), context_embedding=torch.ones(9, 8), task=0)
    assert len(retriever.search(other, torch.ones(8))) == 5
    assert retriever.recall(buffer, x[:20]) > 0.8


@pytest.mark.parametrize("change", ["the memory grows", "all of it is replaced"])
def test_ivf_memory_grown_or_replaced_trains_new_lists(change):
    buffer = ExperienceBuffer(8000 if change == "the memory grows" else 4000)
    x = torch.randn(200 if change == "the memory grows" else 4000, 8)
    buffer.add(state=x, context_embedding=x)
    retriever = retrieval.ivf(5, nprobe=4)
    retriever.search(buffer, x[0])
    for part in (50 + clustered(8000, clusters=80)).split(500):
        buffer.add(state=part, context_embedding=part)
        retriever.search(buffer, part[0])
    looked_at = [len(retriever._inverted_file.candidates(buffer, query)) for query in part[:50]]
    assert sum(looked_at) / 50 < 0.15 * len(buffer)  # in the old lists, all new items would be in one or two
    assert retriever.recall(buffer, part[:50]) > 0.8


def test_ivf_all_lists_or_too_few_candidates_is_exact():
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
def test_ivf_several_buffers_train_once_each(way, trained):
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
    other = copy.deepcopy(first)  # a copy has its own lists
    other.add(state=x[:60] - 50, context_embedding=x[:60] - 50)
    assert retriever.search(other, x[0] - 50).indices[0] == 0 and retriever.search(first, x[0]).indices[0] == 0
    assert trained()[before:] == [first.storage, second.storage, other.storage]


def test_ivf_deleted_buffers_are_freed_and_not_found(trained):
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
def test_ivf_replaced_content_trains_again(change, trained):
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


def test_ivf_in_workers_makes_the_lists_of_the_parent(worker):
    keys = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0))
    buffer, found = ExperienceBuffer(3000), []
    buffer.add(state=keys, context_embedding=keys)
    for seed in (None, 7, 8):
        worker(seed)
        found.append(retrieval.ivf(10, nprobe=2)._inverted_file.candidates(buffer, keys[0]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
