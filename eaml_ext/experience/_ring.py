"""RingStorage: a ring stores item number s in slot ``s % num_slots`` with generation ``s // num_slots``."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from eaml_ext import _check
from eaml_ext.experience import _ragged
from eaml_ext.experience._memmap import MemmapDirectory
from eaml_ext.experience._schema import Schema, dtype_name, schema_of
from eaml_ext.experience.experiences import Experiences

MIN_SPARE_SLOTS = 1024  # least number of slots on disk beyond the capacity; an eighth of the capacity if that is more

# Returns tensors and metadata that each flush commits in addition to the columns.
FlushState = Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Any]]]


class RingStorage:
    """The last ``capacity`` items, in one column for each field, in memory or in memory-mapped files.

    It owns the columns, the numbering of items, and the lock. Methods do not acquire the lock: a caller holds it
    (``with storage.lock:``) across all calls that must see one state.

    Items are numbered in the order of their adds, from 0. An item is live until a clear, or until ``capacity`` later
    items have been added. In memory there are ``capacity`` slots, and the live items fill the first ``len(storage)``.
    On disk there are more slots, and the live items fill any interval of the ring.

    Args:
        capacity: largest number of live items.
        device: of the columns.
        files: files that the columns are mapped to; None: the columns are in memory.
        flush_state: returns tensors and metadata that each flush commits in addition to the columns.
        ragged: names of the ragged fields, whose columns have zeros after each item's last step.
        max_length: steps of their columns; None: at least those of the longest item, at most
            1.5 times that.

    Attributes:
        columns: field to tensor ``(num_slots, *item shape)``; empty until the first add. With ragged fields the column
            ``lengths`` has the steps of each item.
        schema: field to dtype and shape of an item.
        lock: reentrant; a fork waits until no other thread holds it.
        written: number of the next item. :meth:`clear` rounds it up to a multiple of the capacity, so that the next
            item in memory is in slot 0.
        cleared: value of ``written`` at the last clear.
        flushed: value of ``written`` at the last flush.
        stride, offset: item s of this shard is item ``s * stride + offset`` of a sharded buffer; else 1 and 0.
    """

    def __init__(
        self,
        capacity: int,
        device: torch.device,
        files: MemmapDirectory | None = None,
        flush_state: FlushState = lambda: ({}, {}),
        ragged: tuple[str, ...] = (),
        max_length: int | None = None,
    ):
        self.capacity, self.device, self.files = capacity, device, files
        self.ragged, self.max_length = ragged, max_length
        # Items added between two flushes are stored in spare slots, so that no item of the last flush is overwritten.
        self.num_slots = capacity if files is None else capacity + max(MIN_SPARE_SLOTS, capacity // 8)
        self.columns: dict[str, Tensor] = {}
        self.schema: Schema = {}
        self.written = self.cleared = self.flushed = 0
        self.stride, self.offset = 1, 0
        self.lock = threading.RLock()
        self._flush_state = flush_state
        _storages[id(self)] = self

    def __len__(self) -> int:
        return self.written - self.first

    @property
    def first(self) -> int:
        """Number of the oldest live item."""
        return max(self.cleared, self.written - self.capacity)

    # ------------------------------------------------------------------------------------------------- writing

    def check_open(self, where: str) -> None:
        """Raise ValueError if the files are closed."""
        if self.files is not None and self.files.closed:
            raise ValueError(f"{where}: the buffer is closed")

    def check_writable(self, where: str) -> None:
        """Raise ValueError if the files are closed, or belong to the process that this one was forked from."""
        self.check_open(where)
        if self.files is not None and not self.files.owned:
            raise ValueError(f"{where}: a forked process cannot write to the buffer on disk of its parent")

    def allocate(self, schema: Schema) -> dict[str, Tensor]:
        """Return new columns of zeros. On disk, the next flush deletes the files of the old columns."""
        shapes = {name: (dtype, (self.num_slots, *shape)) for name, (dtype, shape) in schema.items()}
        if self.files is not None:
            return self.files.allocate(shapes)
        with torch.inference_mode(False):  # an inference tensor could not be written to outside inference mode
            return {
                name: torch.zeros(shape, dtype=dtype, device=self.device) for name, (dtype, shape) in shapes.items()
            }

    def init_columns(self, schema: Schema) -> None:
        """Allocate the first columns."""
        if self.max_length is not None:
            schema = _ragged.with_length(schema, self.ragged, self.max_length)
        self.replace(self.allocate(schema), self.written, self.cleared)
        if self.files is not None:
            self.flush()  # the metadata must name the files before items are written to them

    def replace(self, columns: dict[str, Tensor], written: int, cleared: int) -> None:
        """Replace columns and counters. The live items are then the last ones numbered below ``written``."""
        self.columns, self.written, self.cleared = columns, written, cleared
        self.schema = schema_of(columns)

    def attach(
        self, files: MemmapDirectory, num_slots: int, columns: dict[str, Tensor], written: int, cleared: int
    ) -> None:
        """Use the mapped files of a flushed buffer instead of memory."""
        self.files, self.num_slots, self.flushed = files, num_slots, written
        self.replace(columns, written, cleared)

    def write(self, items: dict[str, Tensor]) -> None:
        """Write items ``(n, *item shape)``; on disk, flush whenever too few spare slots are free.

        The first call allocates the columns. Later ones must have the same fields, shapes and dtypes. Ragged fields may
        have other numbers of steps: longer ones enlarge the columns.
        """
        if not self.columns:
            self.init_columns(schema_of(items))
        if self.ragged:
            items = self._fit_steps(items)
        count = len(next(iter(items.values())))
        if self.files is None:
            skipped = max(0, count - self.capacity)
            self.written += skipped
            self._put(items, skipped, count)
            return
        spare, start = self.num_slots - self.capacity, 0
        while start < count:
            free = self.flushed + spare - self.written
            if free < min(count - start, spare):  # the rest of the batch does not fit, and a flush would free more
                self.flush()
                continue
            stop = min(count, start + free)
            self._put(items, start, stop)
            start = stop

    def _fit_steps(self, items: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the items with ragged fields padded to the steps of the columns, which are enlarged if needed."""
        steps, stored = items[self.ragged[0]].shape[1], _ragged.length_of(self.schema, self.ragged)
        if steps > stored:
            stored = max(steps, stored + stored // 2)  # so that slowly growing lengths cause few copies
            self._enlarge(stored)
        return {n: _ragged.padded(value, stored) if n in self.ragged else value for n, value in items.items()}

    def _enlarge(self, steps: int) -> None:
        """Replace the ragged columns by copies with more steps; on disk, all columns, and flush."""
        old, schema = self.columns, _ragged.with_length(self.schema, self.ragged, steps)
        if self.files is None:  # the other columns stay, so that an index of them remains valid
            schema = {name: spec for name, spec in schema.items() if name in self.ragged}
        new = self.allocate(schema)
        for name, column in new.items():
            (column[:, : old[name].shape[1]] if name in self.ragged else column).copy_(old[name])
        self.replace({name: new.get(name, column) for name, column in old.items()}, self.written, self.cleared)
        if self.files is not None:
            self.flush()

    def _put(self, items: dict[str, Tensor], start: int, stop: int) -> None:
        """Write items ``start`` to ``stop`` of a batch, at most ``num_slots`` of them."""
        count = stop - start
        slot = self.written % self.num_slots
        head = min(count, self.num_slots - slot)  # items before the end of the ring; the others start at slot 0
        for name, value in items.items():
            column = self.columns[name]
            if head == len(value):  # the usual case: one copy of the whole batch
                column.narrow(0, slot, head).copy_(value)
                continue
            column.narrow(0, slot, head).copy_(value.narrow(0, start, head))
            if head < count:
                column.narrow(0, 0, count - head).copy_(value.narrow(0, start + head, count - head))
        self.written += count

    def clear(self) -> None:
        """Drop all items, and flush if on disk. Generations increase, so that all earlier indices are stale."""
        self.written += -self.written % self.capacity
        self.cleared = self.written
        if self.files is not None:
            self.flush()

    def flush(self) -> None:
        """Commit columns, counters and the flush state to the files."""
        assert self.files is not None
        tensors, metadata = self._flush_state()
        fields = {name: [dtype_name(value.dtype), list(value.shape)] for name, value in self.columns.items()}
        counters = {"written": self.written, "cleared": self.cleared, "slots": self.num_slots}
        self.files.commit(tensors, {**metadata, "fields": fields, **counters})
        self.flushed = self.written

    def close(self) -> None:
        """Flush, unless in a forked process, and close the files. Afterwards the storage is empty."""
        if self.files is not None and not self.files.closed:
            if self.files.owned:
                self.flush()
            self.replace({}, 0, 0)
            self.files.close()

    # ------------------------------------------------------------------------------------------------- reading

    def column(self, where: str, name: str) -> Tensor:
        """Return the column of a field, up to the last slot that holds a live item.

        Raises:
            ValueError: there are no items, or the field is not stored.
        """
        self.check_not_empty(where)
        if name not in self.columns:
            raise ValueError(f"{where}: the buffer stores no {name}, only {', '.join(self.columns)}")
        start = self.first % self.num_slots
        return self.columns[name][: min(start + len(self), self.num_slots)]

    def check_not_empty(self, where: str) -> None:
        """Raise ValueError if there are no items."""
        if not len(self):
            self.check_open(where)
            raise ValueError(f"{where}: the buffer is empty")

    def live_mask(self) -> Tensor | None:
        """Return which slots of :meth:`column` are live, bool ``(slots,)``; None: all."""
        start, count = self.first % self.num_slots, len(self)
        if start == 0 or count == self.num_slots:
            return None
        stop = start + count
        slots = torch.arange(min(stop, self.num_slots), device=self.device)
        return (slots >= start) | (slots < stop - self.num_slots)

    def live(self, where: str, name: str) -> Tensor:
        """Return the live items of a field, ``(n, *item shape)``, in the order of their slots."""
        column, mask = self.column(where, name), self.live_mask()
        return column if mask is None else column[mask]

    def gather(self, slots: Tensor, distances: Tensor | None = None) -> Experiences:
        """Return copies of the items in ``slots``, int64 of any shape."""
        if self.ragged:
            fields = _ragged.gather(self.columns, self.ragged, slots)
        else:
            fields = {name: column[slots] for name, column in self.columns.items()}
        return Experiences(fields, slots, self.generations(slots), distances, self.ragged)

    def of_task(self, where: str, task: int) -> Experiences:
        """Return copies of the items of one task, oldest first. Raises ValueError if there are none."""
        column, live = self.column(where, "task"), self.live_mask()
        slots = (column == task if live is None else (column == task) & live).nonzero().squeeze(1)
        if not len(slots):
            raise ValueError(f"{where}: nothing is stored of task {task}")
        wrapped = slots < self.first % self.num_slots  # newer items, which are stored from slot 0 on
        return self.gather(torch.cat([slots[~wrapped], slots[wrapped]]))

    def task_means(self, where: str, name: str) -> Tensor:
        """Return the mean of a field ``(slots, dim)`` over the items of each task: ``(tasks, dim)``, ids ascending."""
        values = self.live(where, name)
        ids, rows, counts = torch.unique(self.live(where, "task"), return_inverse=True, return_counts=True)
        dtype = torch.promote_types(values.dtype, torch.float32)  # sums of float16 overflow
        sums = values.new_zeros((len(ids), values.shape[1]), dtype=dtype)
        means: Tensor = sums.index_add_(0, rows, values.to(dtype)) / counts.unsqueeze(1)
        return means.to(values.dtype)

    # ----------------------------------------------------------------------------------------------- numbering

    def generations(self, slots: Tensor) -> Tensor:
        """Return the generation of the newest item in each slot: ``(written - 1 - slot) // num_slots``."""
        generations = slots.neg().add_(self.written - 1)
        return generations.div_(self.num_slots, rounding_mode="floor")

    def item_numbers(self, slots: Tensor) -> Tensor:
        """Return the number of the newest item in each slot."""
        return self.generations(slots) * self.num_slots + slots

    def slots_since(self, number: int) -> Tensor:
        """Return the slots of the live items numbered from ``number`` on, oldest first."""
        return torch.arange(max(number, self.first), self.written, device=self.device) % self.num_slots

    def runs_since(self, number: int) -> list[tuple[slice, Tensor]]:
        """Return slots and numbers of the live items numbered from ``number`` on, as at most two runs of slots."""
        start = max(number, self.first)
        slot, count = start % self.num_slots, self.written - start
        head = min(count, self.num_slots - slot)
        runs = ((slot, start, head), (0, start + head, count - head))
        return [(slice(s, s + n), torch.arange(i, i + n, device=self.device)) for s, i, n in runs if n]

    def from_memory_slots(self, slots: Tensor) -> Tensor:
        """Map slots of a ring of ``capacity`` slots to the slots of the same items in this ring.

        One seed therefore draws the same items in memory, where both rings are equal, and on disk.
        """
        if self.num_slots == self.capacity:
            return slots
        return (self.first + (slots - self.first) % self.capacity) % self.num_slots

    def are_live(self, where: str, indices: Tensor, generations: Tensor | None, name: str = "indices") -> Tensor:
        """Return which slots hold a live item of that generation (None: of any): bool, of the shape of ``indices``.

        Raises:
            TypeError: an argument is not an int64 tensor.
            ValueError: shapes or devices differ.
        """
        for argument, value in ((name, indices), ("generations", generations)):
            if value is None:
                continue
            _check.tensor(where, argument, value)
            _check.dtype(where, argument, value, (torch.int64,))
            _check.device(where, argument, value, self.device, "the buffer")
            if value.shape != indices.shape:
                raise ValueError(f"{where}: {argument} has shape {tuple(value.shape)}, wanted {tuple(indices.shape)}")
        live = (indices >= 0) & (indices < self.num_slots) & (self.item_numbers(indices) >= self.first)
        return live if generations is None else live & (self.generations(indices) == generations)

    def check_live(self, where: str, live: Tensor) -> None:
        """Raise ValueError unless all elements of ``live``, which :meth:`are_live` returned, are True."""
        if not live.all():
            count = int((~live).sum())
            raise ValueError(f"{where}: {count} of {live.numel()} indices are stale or out of range")


# A lock that another thread holds during a fork is never released in the child. The forking thread therefore acquires
# all locks first.
_storages: weakref.WeakValueDictionary[int, RingStorage] = weakref.WeakValueDictionary()
_forking = threading.local()


def _before_fork() -> None:
    storages = [reference() for reference in _storages.valuerefs()]
    _forking.locks = [storage.lock for storage in storages if storage is not None]
    for lock in _forking.locks:
        lock.acquire()


def _after_fork() -> None:
    for lock in _forking.locks:
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
