"""Reads during writes: no item that a reader sees is half of one and half of another."""

import sys
import threading
import time

import pytest
import torch

from eaml_ext.experience import ExperienceBuffer

WIDTH = 512


def items(numbers):
    """All that an item holds says which it is."""
    wide = numbers.unsqueeze(1).expand(-1, WIDTH)
    return {
        "state": wide.float(),
        "context_embedding": numbers.unsqueeze(1).float().expand(-1, 4),
        "action": wide.clone(),
        "task": numbers % 5,
        "priority": 1.0 + numbers.double(),
    }


def torn(found):
    """Whether an item does not agree with itself."""
    numbers = found.task.new_tensor(found.action[:, 0].tolist())
    whole = items(numbers)
    fields = (torch.equal(found.fields[name], whole[name]) for name in ("state", "context_embedding", "action", "task"))
    return not all(fields)


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_no_reader_sees_a_torn_item(place, tmp_path):
    options = {} if place == "memory" else {"directory": tmp_path / "b"}
    buffer = ExperienceBuffer(64, age_half_life=30.0, seed=0, **options)
    slots = buffer._slots
    buffer.add(**items(torch.arange(64)))
    buffer.retrieve(torch.zeros(4), 1)  # imports the ops, which under such contention takes minutes
    stop, failures, reads = threading.Event(), [], []
    counter, lock = iter(range(64, 1 << 40)), threading.Lock()

    def write(sizes):
        try:
            while not stop.is_set():
                for size in sizes:
                    with lock:  # numbers rise in the order of the adds, so a number says its slot
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
        found.indices = found.action[:, 0] % slots  # a copy in memory has slots of its own
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


def test_a_torn_item_would_be_seen():
    buffer = ExperienceBuffer(64)
    buffer.add(**items(torch.arange(64)))
    assert not torn(buffer.get_batch(8))
    buffer._store["state"][5, WIDTH // 2 :] += 1
    assert torn(buffer.get(torch.tensor([5])))
