"""Reads during writes: no read returns an item that is half of one and half of another."""

import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eaml_ext.distributed import torchrun_group
from eaml_ext.experience import ExperienceBuffer, Experiences, ShardedExperienceBuffer, retrieval
from eaml_ext.experience._ring import RingStorage

WIDTH = 512


def items(numbers):
    """Return items whose every value follows from their number."""
    wide = numbers.unsqueeze(1).expand(-1, WIDTH)
    return {
        "state": wide.float(),
        "context_embedding": numbers.unsqueeze(1).float().expand(-1, 4),
        "action": wide.clone(),
        "task": numbers % 5,
        "priority": 1.0 + numbers.double(),
    }


def torn(found):
    """Return whether the values of an item belong to different numbers."""
    numbers = found.task.new_tensor(found.action[:, 0].tolist())
    whole = items(numbers)
    fields = (torch.equal(found.fields[name], whole[name]) for name in ("state", "context_embedding", "action", "task"))
    return not all(fields)


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_reads_during_writes_return_no_torn_item(place, tmp_path):
    options = {} if place == "memory" else {"directory": tmp_path / "b"}
    buffer = ExperienceBuffer(64, age_half_life=30.0, seed=0, **options)
    slots = buffer.storage.num_slots
    buffer.add(**items(torch.arange(64)))
    buffer.retrieve(torch.zeros(4), 1)  # imports the ops, which takes minutes beside busy threads
    stop, failures, reads = threading.Event(), [], []
    counter, lock = iter(range(64, 1 << 40)), threading.Lock()

    def write(sizes):
        try:
            while not stop.is_set():
                for size in sizes:
                    with lock:  # numbers rise in the order of the adds, so that a number gives its slot
                        numbers = torch.tensor([next(counter) for _ in range(size)])
                        buffer.add(**items(numbers))
        except BaseException as error:
            failures.append(error)

    def read(look):
        try:
            count = 0
            while not stop.is_set():
                found = look()
                count += 1
                if torn(found):
                    failures.append(f"torn: {found.action[:, 0].tolist()}")
                # Item s stands in slot s % slots with generation s // slots.
                if not torch.equal(found.generations * slots + found.indices, found.action[:, 0]):
                    failures.append("an item stands in another's place")
            reads.append(count)
        except BaseException as error:
            failures.append(error)

    def change():
        found = buffer.get_batch(8, weighted=True)
        buffer.set_priority(found.indices, found.priority, found.generations)
        return found

    def kept():
        other = ExperienceBuffer(64, seed=0)
        other.load_state_dict(buffer.state_dict())
        found = other.get(torch.arange(64))
        found.indices = found.action[:, 0] % slots  # a copy in memory has other slots
        found.generations = found.action[:, 0] // slots
        return found

    looks = [
        lambda: buffer.get_batch(32),
        lambda: buffer.retrieve(torch.zeros(4), 16, exclude_task=2),
        lambda: buffer.of_task(3),
        change,
        kept,
    ]
    threads = [threading.Thread(target=write, args=(sizes,)) for sizes in ((1, 3), (64, 17))]
    threads += [threading.Thread(target=read, args=(look,)) for look in looks]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline and not failures:
            time.sleep(0.01)
        stop.set()
        for thread in threads:
            thread.join(30)
    finally:
        sys.setswitchinterval(interval)
    assert not failures, failures[:3]
    assert len(reads) == len(looks) and min(reads) > 3 and next(counter) > 1000


def test_torn_half_written_item_is_detected():
    buffer = ExperienceBuffer(64)
    buffer.add(**items(torch.arange(64)))
    assert not torn(buffer.get_batch(8))
    buffer.storage.columns["state"][5, WIDTH // 2 :] += 1
    assert torn(buffer.get(torch.tensor([5])))


class RacedStorage(RingStorage):
    """A storage that starts another thread's write in the middle of a read, if ``race`` is set."""

    race = None

    @property
    def first(self):
        race, self.race = self.race, None
        if race is not None:
            race()
        return super().first


@pytest.mark.parametrize("first", ["read", "write"])
def test_read_and_write_in_two_threads_do_not_overlap(first):
    buffer = ExperienceBuffer(64)
    buffer.add(state=torch.zeros(64, 1))
    inner = "gather" if first == "read" else "write"
    original = getattr(buffer.storage, inner)
    done = threading.Event()

    def other():
        buffer.add(state=torch.ones(64, 1)) if first == "read" else buffer.get_batch(8)
        done.set()

    thread = threading.Thread(target=other)

    def interrupted(*arguments):
        setattr(buffer.storage, inner, original)
        thread.start()
        assert not done.wait(0.1), "the other operation ran in the middle of this one"
        return original(*arguments)

    setattr(buffer.storage, inner, interrupted)
    buffer.get_batch(8) if first == "read" else buffer.add(state=torch.ones(64, 1))
    assert done.wait(10)
    thread.join()


READS = {
    "len": len,
    "repr": repr,
    "get_batch": lambda b: b.get_batch(5),
    "get_batch weighted": lambda b: b.get_batch(5, weighted=True),
    "get": lambda b: b.get(torch.arange(8)),
    "is_current": lambda b: b.is_current(torch.arange(8), torch.zeros(8, dtype=torch.int64)),
    "retrieve": lambda b: b.retrieve(torch.zeros(4), 5),
    "tasks": lambda b: b.tasks(),
    "of_task": lambda b: b.of_task(3),
    "task_embeddings": lambda b: b.task_embeddings(),
    "state_dict": lambda b: b.state_dict(),
    "pickle": lambda b: b.__getstate__(),
    "uniform": lambda b: retrieval.uniform(5, targets="action")(b, {}),
    "ivf": lambda b: retrieval.ivf(2, 1, nlist=4).search(b, torch.zeros(4)),
}


def plain(value):
    """Return tensors and experiences as nested lists."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.tolist()
    if isinstance(value, Experiences):
        return plain([value.fields, value.indices, value.generations])
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_read_during_a_write_returns_one_state(read, place, tmp_path):
    found = []
    for raced in (False, True):
        options = {} if place == "memory" else {"directory": tmp_path / "buffer"}
        buffer = ExperienceBuffer(8, seed=0, **options)
        buffer.storage.__class__ = RacedStorage
        buffer.add(**items(torch.arange(8)))
        thread = threading.Thread(target=buffer.add, kwargs=items(torch.arange(8, 13)))

        def race(thread=thread):
            thread.start()
            thread.join(0.05)

        if raced:
            buffer.storage.race = race
        found.append(plain(READS[read](buffer)))
        if raced:
            thread.join()  # raises if the read has not started it
            assert buffer.storage.written == 13
        buffer.close()
        shutil.rmtree(tmp_path / "buffer", ignore_errors=True)
    assert found[0] == found[1]


class Interleaved:
    """A lock that calls ``write`` before acquisition number ``turn``."""

    def __init__(self, lock, turn, write):
        self.lock, self.turn, self.write = lock, turn, write
        self.depth = self.count = 0

    def __enter__(self):
        if not self.depth:
            self.count += 1
            if self.count == self.turn:
                self.write()
        self.lock.acquire()
        self.depth += 1

    def __exit__(self, *_):
        self.depth -= 1
        self.lock.release()


def score(buffer, tasks, batch):
    return torch.stack([buffer.of_task(task).state.mean() for task in tasks.tolist()])


@pytest.mark.parametrize("turn", [1, 2, 3])
@pytest.mark.parametrize(
    "retriever",
    [
        retrieval.uniform(4, targets="action"),
        retrieval.nearest(4, targets="action"),
        retrieval.attention(4, targets="action"),
        retrieval.ivf(4, targets="action"),
    ],
    ids=["uniform", "nearest", "attention", "ivf"],
)
def test_retriever_during_clear_finds_all_or_nothing(retriever, turn):
    batch = {"context_embedding": torch.zeros(4)}
    buffer = ExperienceBuffer(8, seed=0)
    buffer.add(**items(torch.arange(8)))
    wanted = retriever(buffer, batch)
    buffer = ExperienceBuffer(8, seed=0)
    buffer.add(**items(torch.arange(8)))
    lock = buffer.storage.lock

    def write():
        buffer.storage.lock = lock
        buffer.clear()
        buffer.storage.lock = interleaved

    buffer.storage.lock = interleaved = Interleaved(lock, turn, write)
    found = retriever(buffer, batch)
    assert interleaved.count == 1, "a retriever that locks twice sees two states"
    if turn == 1:
        assert found is None
    else:
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("gone", [{0}, {1}, {0, 1, 2, 3}])
@pytest.mark.parametrize("when", ["before reading", "after reading"])
def test_best_fit_task_overwritten_while_scored_is_left_out(gone, when):
    buffer = ExperienceBuffer(8, seed=0)
    buffer.add(state=torch.arange(8.0)[:, None], action=torch.zeros(8, 1), task=torch.arange(8) % 4)
    calls = []

    def overwrite():
        if not calls:
            kept = [task for task in range(4) if task not in gone]
            buffer.clear()
            for task in kept:
                buffer.add(state=torch.full((2, 1), float(task)), action=torch.zeros(2, 1), task=task)
        calls.append(1)

    def score_now(buffer, tasks, batch):
        if when == "before reading":
            overwrite()
        scores = score(buffer, tasks, batch)
        if when == "after reading":
            overwrite()
        return scores

    found = retrieval.best_fit(score_now, 2, targets="action")(buffer, {})
    kept = [task for task in range(4) if task not in gone][:2]
    if kept:
        assert found["states"].flatten().tolist() == [float(task) for task in kept for _ in range(2)]
    else:
        assert found is None


def test_best_fit_error_of_score_fn_is_raised_once():
    buffer = ExperienceBuffer(8)
    buffer.add(**items(torch.arange(8)))
    calls = []

    def broken(*_):
        calls.append(1)
        raise ValueError("bad score")

    with pytest.raises(ValueError, match=r"^bad score$"):
        retrieval.best_fit(broken, 2)(buffer, {})
    assert len(calls) == 1


def test_best_fit_score_fn_reading_in_other_threads_finishes():
    buffer = ExperienceBuffer(8)
    buffer.add(**items(torch.arange(8)))

    def in_threads(buffer, tasks, batch):
        with ThreadPoolExecutor(2) as pool:
            read = [pool.submit(lambda task: buffer.of_task(task).state.mean(), task) for task in tasks.tolist()]
            return torch.stack([result.result(timeout=5) for result in read])

    assert retrieval.best_fit(in_threads, 1, targets="action")(buffer, {}) is not None


@pytest.mark.parametrize("turn", [1, 2])
def test_sharded_retrieve_during_clear_finds_nothing_or_raises(turn):
    with torchrun_group(alone=True) as group:
        sharded = ShardedExperienceBuffer(8, group=group)
        sharded.add(**items(torch.arange(8)))
        lock = sharded.local.storage.lock

        def write():
            sharded.local.storage.lock = lock
            sharded.local.clear()

        sharded.local.storage.lock = Interleaved(lock, turn, write)
        if turn == 1:
            with pytest.raises(ValueError, match=r"^ShardedExperienceBuffer.retrieve: the buffer is empty$"):
                sharded.retrieve(torch.zeros(4), 3)
        else:
            assert len(sharded.retrieve(torch.zeros(4), 3)) == 0


def test_sharded_schema_received_during_an_add_keeps_the_items():
    with torchrun_group(alone=True) as group:
        sharded = ShardedExperienceBuffer(8, group=group)
        sharded.add(**items(torch.arange(3)))
        schema = sharded._schema()
        sharded = ShardedExperienceBuffer(8, group=group)
        lock = sharded.local.storage.lock

        def write():
            sharded.local.storage.lock = lock
            sharded.add(**items(torch.arange(3)))

        sharded.local.storage.lock = Interleaved(lock, 1, write)
        sharded.group = SimpleNamespace(broadcast_object=lambda rank, text: schema)
        assert sharded._agree_on_schema("where", torch.tensor([-1, 5]))
        assert sharded.local.get(torch.arange(3)).action[:, 0].tolist() == [0, 1, 2]
