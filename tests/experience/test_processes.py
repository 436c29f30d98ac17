"""A buffer in DataLoader workers, forked and spawned processes. tests/test_workers.py starts real workers."""

import copy
import os
import pickle
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from eaml_ext.distributed import torchrun_group
from eaml_ext.experience import ExperienceBuffer, ShardedExperienceBuffer, retrieval

ROWS = torch.arange(10_000.0).unsqueeze(1)


def filled(seed=0, **options):
    buffer = ExperienceBuffer(len(ROWS), seed=seed, **options)
    buffer.add(state=ROWS, target=ROWS, priority=1.0)
    return buffer


@pytest.fixture
def worker(monkeypatch):
    """Makes this process a DataLoader worker with a seed, or the main process (None)."""

    def become(seed):
        info = None if seed is None else SimpleNamespace(id=seed % 2, num_workers=2, seed=seed, dataset=None)
        monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: info)

    return become


DRAWS = {
    "get_batch": lambda buffer: buffer.get_batch(20).indices,
    "weighted": lambda buffer: buffer.get_batch(20, weighted=True).indices,
    "uniform": lambda buffer: retrieval.uniform(20)(buffer, {})["states"],
}
COPIES = {"fork": copy.deepcopy, "spawn": lambda buffer: pickle.loads(pickle.dumps(buffer))}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("draw", DRAWS)
def test_draws_in_workers_differ_by_worker_and_epoch_and_repeat_with_the_seed(draw, way, worker):
    buffer, draws = filled(), {}
    for attempt in range(2):
        for seed in (7, 8, 2**63 + 5):  # two workers of an epoch, one of another
            worker(None)
            inside = COPIES[way](buffer)
            worker(seed)
            one, two = DRAWS[draw](inside), DRAWS[draw](inside)
            assert not torch.equal(one, two)
            draws[seed, attempt] = one
        worker(None)
        buffer.get_batch(3)  # the parent's own draws do not matter to the workers
    first = [draws[seed, 0] for seed in (7, 8, 2**63 + 5)]
    assert not any(torch.equal(first[i], first[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert all(torch.equal(draws[seed, 0], draws[seed, 1]) for seed in (7, 8, 2**63 + 5))


def test_draws_in_a_worker_depend_on_the_seed_of_the_buffer(worker):
    worker(7)
    one, same, other = (filled(seed).get_batch(20).indices for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_draws_of_buffers_loaded_inside_workers_differ(worker, tmp_path):
    filled().save(tmp_path / "b")
    draws = []
    for seed in (7, 8):
        worker(seed)
        draws.append(ExperienceBuffer.load(tmp_path / "b").get_batch(20).indices)
    assert not torch.equal(*draws)


def test_draws_of_a_shard_in_workers_differ(worker):
    with torchrun_group(alone=True) as group:
        shard = ShardedExperienceBuffer(len(ROWS), group=group, seed=0)
        shard.add(state=ROWS)
    draws = []
    for seed in (7, 8):
        local = copy.deepcopy(shard.local)
        worker(seed)
        draws.append(local.get_batch(20).indices)
        worker(None)
    assert not torch.equal(*draws)


def test_copy_inside_a_worker_draws_what_the_original_draws(worker):
    buffer = filled()
    worker(7)
    buffer.get_batch(3)
    for other in (copy.deepcopy(buffer), COPIES["spawn"](buffer)):
        assert torch.equal(other.get_batch(20).indices, copy.deepcopy(buffer).get_batch(20).indices)
    worker(None)  # as one that a worker has sent to the main process
    assert torch.equal(copy.deepcopy(buffer).get_batch(20).indices, buffer.get_batch(20).indices)


def test_draws_outside_of_workers_do_not_change_with_workers(worker):
    buffer, twin = filled(), filled()
    worker(7)
    copy.deepcopy(buffer).get_batch(5)
    worker(None)
    assert torch.equal(buffer.get_batch(20).indices, twin.get_batch(20).indices)


def test_hierarchical_in_workers_makes_the_cells_of_the_parent(worker):
    keys = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0))
    buffer, found = ExperienceBuffer(3000), []
    buffer.add(state=keys, context_embedding=keys)
    for seed in (None, 7, 8):
        worker(seed)
        found.append(retrieval.ivf(10, nprobe=2)._inverted_file.candidates(buffer, keys[0]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_pickle_holds_no_tensor_and_keeps_every_dtype():
    """A tensor in a pickle for a spawned process shares memory by a file that must stay open until the start."""
    buffer = ExperienceBuffer(4, seed=0)
    dtypes = (torch.bool, torch.uint8, torch.bfloat16, torch.float64, torch.complex128)
    fields = {str(dtype).split(".")[1]: torch.arange(6).view(3, 2).to(dtype) for dtype in dtypes}
    buffer.add(**fields, generator=torch.arange(3), nothing=torch.zeros(3, 0), number=torch.arange(3))

    def leaves(value):
        if isinstance(value, dict):
            value = list(value.values())
        return [leaf for item in value for leaf in leaves(item)] if isinstance(value, (list, tuple)) else [value]

    assert not [leaf for leaf in leaves(buffer.__getstate__()) if isinstance(leaf, torch.Tensor)]
    other = pickle.loads(pickle.dumps(buffer))
    wanted, got = (b.get(torch.arange(3)).fields for b in (buffer, other))
    assert got.keys() == wanted.keys()
    assert all(got[n].dtype == value.dtype and torch.equal(got[n], value) for n, value in wanted.items())
    other.add(**{name: value[0] for name, value in wanted.items()})
    assert len(other) == 4


@pytest.mark.parametrize("retriever", [retrieval.uniform(3), retrieval.nearest(3), retrieval.attention(3, 0.5)])
def test_retriever_pickled_answers_as_the_original(retriever):
    buffer = ExperienceBuffer(10, seed=0)
    buffer.add(torch.randn(10, 2), torch.randn(10, 1), context_embedding=torch.randn(10, 2))
    twin, batch = copy.deepcopy(buffer), {"context_embedding": torch.zeros(2)}
    wanted, got = retriever(buffer, batch), pickle.loads(pickle.dumps(retriever))(twin, batch)
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork does not exist on this system")
def test_fork_during_a_write_waits_and_leaves_the_child_a_free_lock():
    buffer = ExperienceBuffer(8, seed=0)
    buffer.add(state=torch.zeros(3, 2))
    entered, leave, write = threading.Event(), threading.Event(), buffer.storage.write

    def paused(items):
        entered.set()
        leave.wait(10)
        write(items)

    buffer.storage.write = paused
    thread = threading.Thread(target=buffer.add, kwargs={"state": torch.ones(4, 2)})
    thread.start()
    assert entered.wait(10)
    threading.Timer(0.1, leave.set).start()
    child = os.fork()
    if child == 0:
        count = 0
        try:
            count = len(buffer.get_batch(2)) * len(buffer)
        finally:
            os._exit(count)
    deadline, (done, status) = time.monotonic() + 10, os.waitpid(child, os.WNOHANG)
    while not done and time.monotonic() < deadline:
        time.sleep(0.01)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    thread.join()
    assert done, "the child waits for a lock that nobody holds"
    assert os.waitstatus_to_exitcode(status) == 2 * 7
    assert len(buffer) == 7  # and the parent's lock is free


def test_forked_process_cannot_write_to_the_directory_of_its_parent(tmp_path, monkeypatch):
    buffer = ExperienceBuffer(8, seed=0, directory=tmp_path / "b")
    buffer.add(state=torch.zeros(3, 2), priority=1.0)
    buffer.flush()
    state, process = buffer.state_dict(), os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: process + 1)
    for name, call in {
        "add": lambda: buffer.add(state=torch.ones(2), priority=1.0),
        "clear": buffer.clear,
        "set_priority": lambda: buffer.set_priority(torch.tensor([0]), 2.0),
        "flush": buffer.flush,
        "load_state_dict": lambda: buffer.load_state_dict(state),
    }.items():
        with pytest.raises(ValueError, match=rf"^ExperienceBuffer.{name}: a forked process cannot write to the buffer"):
            call()
    assert len(buffer) == 3 and len(buffer.get_batch(2)) == 2
    written = (tmp_path / "b" / "buffer.safetensors").stat().st_mtime_ns
    buffer.close()  # what a worker does at its end
    assert (tmp_path / "b" / "buffer.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))], ids=["deepcopy", "pickle"])
def test_copy_of_cleared_buffer_or_field_without_numbers_keeps_the_schema(copied):
    for item, clear in (
        ({"state": torch.ones(3, 4)}, True),
        ({"state": torch.ones(3, 4), "none": torch.ones(3, 0)}, False),
    ):
        buffer = ExperienceBuffer(10)
        buffer.add(**item)
        if clear:
            buffer.clear()
        other = copied(buffer)
        assert len(other) == len(buffer)
        with pytest.raises(ValueError, match="state"):
            other.add(state=torch.ones(3, 5), **{name: item[name] for name in item if name != "state"})
        other.add(**item)
        assert len(other) == len(buffer) + 3 and torch.equal(other.get_batch(2).state, torch.ones(2, 4))


class Restored(torch.utils.data.Dataset):
    """Draws after ``state_dict`` and again after ``load_state_dict``, into the same buffer or into another."""

    def __init__(self):
        self.buffer = ExperienceBuffer(1000, seed=0)
        self.buffer.add(state=torch.arange(1000.0)[:, None])

    def __len__(self):
        return 2

    def __getitem__(self, i):
        self.buffer.get_batch(3)
        state, other = self.buffer.state_dict(), ExperienceBuffer(1000)
        wanted = self.buffer.get_batch(5).state
        target = (self.buffer, other)[i]
        target.load_state_dict(state)
        return wanted, target.get_batch(5).state


@pytest.mark.parametrize("workers", [0, 1])
def test_load_state_dict_in_a_worker_continues_the_stream(workers):
    for wanted, got in torch.utils.data.DataLoader(Restored(), batch_size=None, num_workers=workers):
        assert torch.equal(wanted, got)
