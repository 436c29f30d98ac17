"""Any sequence of calls leaves a buffer with the items that a plain Python list has."""

import math
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from eaml_ext.experience import ExperienceBuffer, _ring


class Buffers(RuleBasedStateMachine):
    """The model is a list of ``[number, value, task, priority]``, oldest first, and the number of items ever added."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.kept = []  # (indices, generations, numbers) of earlier reads
        self.items, self.written, self.flushed = [], 0, None

    @initialize(
        capacity=st.integers(1, 9),
        half_life=st.sampled_from([None, 3.0]),
        on_disk=st.booleans(),
        margin=st.integers(1, 6),
    )
    def start(self, capacity, half_life, on_disk, margin):
        kept, _ring.MIN_SPARE_SLOTS = _ring.MIN_SPARE_SLOTS, margin
        directory = self.folder / "b" if on_disk else None
        self.buffer = ExperienceBuffer(capacity, state_dim=2, age_half_life=half_life, seed=0, directory=directory)
        _ring.MIN_SPARE_SLOTS = kept
        self.capacity, self.half_life, self.on_disk = capacity, half_life, on_disk

    def teardown(self):
        if hasattr(self, "buffer"):
            self.buffer.close()
        shutil.rmtree(self.folder)

    # ---- rules

    @rule(
        values=st.lists(st.integers(-3, 3), max_size=24),
        task=st.integers(0, 2),
        priority=st.sampled_from([0.5, 1.0, 4.0]),
    )
    def add_many(self, values, task, priority):
        n = len(values)
        self.buffer.add(
            state=torch.tensor(values, dtype=torch.float32).unsqueeze(1).expand(n, 2),
            context_embedding=torch.tensor(values, dtype=torch.float32).unsqueeze(1),
            number=torch.arange(self.written, self.written + n),
            task=task,
            priority=torch.full((n,), priority),
        )
        self.items += [[self.written + i, value, task, priority] for i, value in enumerate(values)]
        self.written += n
        del self.items[: -self.capacity]

    @rule(value=st.integers(-3, 3), task=st.integers(0, 2))
    def add_one(self, value, task):
        state, embedding = torch.full((2,), float(value)), torch.tensor([float(value)])
        self.buffer.add(state=state, context_embedding=embedding, number=self.written, task=task, priority=2.0)
        self.items.append([self.written, value, task, 2.0])
        self.written += 1
        del self.items[: -self.capacity]

    @rule(bad=st.sampled_from(["missing", "shape", "dtype", "priority", "embedding"]))
    def add_refused(self, bad):
        fields = {
            "state": torch.zeros(2, 2),
            "context_embedding": torch.zeros(2, 1),
            "number": torch.zeros(2).long(),
            "task": 0,
            "priority": torch.ones(2),
        }
        if bad == "missing":
            del fields["number" if self.buffer.storage.columns else "state"]
            fields["context_embedding"] = torch.zeros(2, 1, 1)
        else:
            name, value = {
                "shape": ("state", torch.zeros(2, 3)),
                "dtype": ("task", 0.5),
                "priority": ("priority", torch.tensor([1.0, 0.0])),
                "embedding": ("context_embedding", torch.tensor([[0.0], [math.inf]])),
            }[bad]
            fields[name] = value
        with pytest.raises((ValueError, TypeError), match=r"^ExperienceBuffer.add: "):
            self.buffer.add(**fields)

    @rule()
    def clear(self):
        self.buffer.clear()
        self.written += -self.written % self.capacity
        self.items = []

    @precondition(lambda self: self.items)
    @rule(chosen=st.lists(st.integers(0, 8), min_size=1, max_size=4), priority=st.sampled_from([0.25, 1.0, 8.0]))
    def set_priority(self, chosen, priority):
        items = [self.items[i % len(self.items)] for i in chosen]
        slots = torch.tensor([item[0] % self.buffer.storage.num_slots for item in items])
        self.buffer.set_priority(slots, torch.full((len(items),), priority))
        for item in items:
            item[3] = priority

    @precondition(lambda self: self.kept)
    @rule()
    def set_priority_of_what_was_seen_before(self):
        indices, generations, numbers = self.kept[0]
        changed = (
            self.buffer.set_priority(indices, 3.0, generations) if self.items else torch.zeros(len(numbers)).bool()
        )
        by_number = {item[0]: item for item in self.items}
        assert changed.tolist() == [number in by_number for number in numbers]
        for number in set(numbers) & set(by_number):
            by_number[number][3] = 3.0

    @rule(way=st.sampled_from(["state_dict", "file"]))
    def save_and_load(self, way):
        if way == "file":
            self.buffer.save(self.folder / "saved")
            other = ExperienceBuffer.load(self.folder / "saved")
        else:
            other = ExperienceBuffer(self.capacity, state_dim=2, age_half_life=self.half_life, seed=5)
            other.load_state_dict(self.buffer.state_dict())
        if self.on_disk:
            self.buffer.load_state_dict(other.state_dict())
        else:
            self.buffer = other

    @precondition(lambda self: self.on_disk)
    @rule()
    def close_and_open(self):
        self.buffer.close()
        self.buffer = ExperienceBuffer.open(self.folder / "b")

    # ---- checks

    def check(self, found, items):
        assert found.number.tolist() == [item[0] for item in items]
        assert found.state.tolist() == [[item[1]] * 2 for item in items]
        assert found.task.tolist() == [item[2] for item in items]
        assert found.priority.tolist() == [item[3] for item in items]
        assert (found.generations * self.buffer.storage.num_slots + found.indices).tolist() == [
            item[0] for item in items
        ]

    def distance(self, item, query):
        age = self.written - 1 - item[0]
        log_weight = math.log(item[3]) - (math.log(2) * age / self.half_life if self.half_life else 0.0)
        return (item[1] - query) ** 2 - log_weight

    @precondition(lambda self: self.items)
    @rule(query=st.integers(-3, 3), k=st.integers(1, 12), exclude=st.none() | st.integers(0, 2))
    def retrieve(self, query, k, exclude):
        found = self.buffer.retrieve(torch.tensor([float(query)]), k, exclude)
        by_number = {item[0]: item for item in self.items if item[2] != exclude}
        self.check(found, [by_number[number] for number in found.number.tolist()])
        assert len(set(found.number.tolist())) == len(found) == min(k, len(by_number))
        wanted = sorted(self.distance(item, query) for item in by_number.values())[:k]
        assert found.distances.tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-4)
        assert [self.distance(by_number[n], query) for n in found.number.tolist()] == pytest.approx(wanted, abs=1e-4)
        self.kept.append((found.indices, found.generations, found.number.tolist()))

    @precondition(lambda self: self.items)
    @rule(n=st.integers(1, 20), weighted=st.booleans())
    def get_batch(self, n, weighted):
        found = self.buffer.get_batch(n, weighted=weighted)
        by_number = {item[0]: item for item in self.items}
        self.check(found, [by_number[number] for number in found.number.tolist()])
        self.kept.append((found.indices, found.generations, found.number.tolist()))

    @invariant()
    def holds_what_the_list_holds(self):
        if not hasattr(self, "buffer"):
            return
        assert len(self.buffer) == len(self.items)
        if not self.items:
            with pytest.raises(ValueError, match=r"^ExperienceBuffer.tasks: the buffer is empty$"):
                self.buffer.tasks()
            return
        slots = torch.tensor([item[0] % self.buffer.storage.num_slots for item in self.items])
        self.check(self.buffer.get(slots), self.items)
        ids = sorted({item[2] for item in self.items})
        assert self.buffer.tasks().tolist() == ids
        means = self.buffer.task_embeddings()
        for task, mean in zip(ids, means, strict=True):
            own = [item for item in self.items if item[2] == task]
            self.check(self.buffer.of_task(task), own)
            assert float(mean) == pytest.approx(sum(item[1] for item in own) / len(own), abs=1e-5)
        live = {item[0] for item in self.items}
        for indices, generations, numbers in self.kept[-3:]:
            assert self.buffer.is_current(indices, generations).tolist() == [number in live for number in numbers]


TestBuffers = Buffers.TestCase
TestBuffers.settings = settings(max_examples=60, stateful_step_count=25, deadline=None, derandomize=True)
