"""A ring of tensors that remembers experience, searched exactly by the similarity of context embeddings."""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
import torch.utils.data
from torch import Tensor

from eaml_ext import _check, checkpoint
from eaml_ext._random import Purpose, derive_seed
from eaml_ext.experience.directory import Directory
from eaml_ext.experience.experiences import Experiences
from eaml_ext.experience.index import Index

_METRICS = ("sqeuclidean", "cosine")
MARGIN = 1024  # slots of a memory on disk that no live item occupies: at least so many, and an eighth of the capacity
_OPTIONS = ("capacity", "state_dim", "action_dim", "metric", "age_half_life")  # what a file keeps of a buffer
_RESERVED = ("fields", "indices", "generations", "distances", "batch")
_INT64 = (-(2**63), 2**63)


class ExperienceBuffer:
    """A memory of the last ``capacity`` experiences, of fixed size, on one device.

    The first add fixes the schema (names, shapes and dtypes of the fields) and allocates the memory; from then on
    each add must bring exactly these fields. When the ring is full the oldest item is overwritten. Item number s
    (counted from the beginning) stands in slot ``s % capacity`` with generation ``s // capacity``, so that an index
    kept from an earlier search is recognised when its slot has been overwritten since (:meth:`get`).

    *Weights.* Items may count for more or less: a field ``priority`` p > 0 (given at each add, changed by
    :meth:`set_priority`), an ``age_half_life`` H, or both make the weight ``w = p · 2^(-age / H)``, where the age is
    the number of items added since. Its logarithm is a bias of every search, ``distance = ‖q − key‖² − log w`` (or
    ``1 − cosine − log w``): a weight e times as large makes up for one unit of distance. Searches take it in the
    embeddings' dtype. Random draws follow the weights where asked (:meth:`get_batch`).

    *On disk.* With ``directory`` the fields are memory-mapped files there, for memories larger than RAM; what was
    added before the last :meth:`flush` is there after a crash, bit by bit, and :meth:`open` goes on from it. So that
    no item of a flushed state is overwritten before the next flush, there are more slots than capacity (an eighth
    more, 1024 at least; s and slots relate as above with their number), and the buffer flushes by itself whenever
    that margin is used up.

    *Threads and processes.* Reads and writes may come from several threads; each call sees a state between two others,
    and a process is forked between two calls. A DataLoader worker has its own stream of draws. Its seed and the
    buffer's seed decide the stream, so workers and epochs differ and the DataLoader's ``generator`` repeats them.
    Any other copy of a buffer (pickle, deepcopy, fork) draws what the original draws. A forked process reads a
    buffer on disk and cannot write to it; it shares the files, so the parent must not write meanwhile.

    Args:
        capacity: how many items fit.
        state_dim: the size of a state's (or observation's) last dimension, checked; None: any.
        action_dim: the size of an action's last dimension, checked; None: any. An integer action may also be one
            index per step, without that dimension.
        device: where the data live; tensors added or asked with must live there too.
        seed: of the draws of :meth:`get_batch`; None: drawn from torch's global generator.
        metric: how context embeddings are compared, ``"sqeuclidean"`` (squared distance) or ``"cosine"``
            (1 - cosine similarity).
        age_half_life: how many items must be added for the weight of an item to halve; None: age does not count.
        directory: where the memory-mapped files go, a directory that holds no buffer yet (created if need be; the
            space is taken at the first add); None: the data live in memory.

    Raises:
        TypeError, ValueError: an argument is out of its range.
        BlockingIOError: another buffer has the directory open.

    >>> import torch
    >>> buffer = ExperienceBuffer(capacity=1000, state_dim=4, action_dim=2, seed=0)
    >>> for task in range(3):
    ...     embedding = torch.full((8,), float(task))
    ...     buffer.add(state=torch.randn(4), action=torch.randn(2), reward=1.0, context_embedding=embedding, task=task)
    >>> buffer.retrieve(torch.full((8,), 1.8), k=2).task.tolist()
    [2, 1]
    >>> buffer.retrieve(torch.full((8,), 1.8), k=2, exclude_task=2).task.tolist()
    [1, 0]

    As a plain store of pairs, added in batches and drawn at random:

    >>> pairs = ExperienceBuffer(1000)
    >>> pairs.add(torch.randn(64, 4), torch.randn(64, 1))
    >>> batch = pairs.get_batch(16).batch()
    >>> batch["states"].shape, batch["targets"].shape
    (torch.Size([16, 4]), torch.Size([16, 1]))

    With priorities, on disk:

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> kept = ExperienceBuffer(1000, directory=folder, seed=0)
    >>> kept.add(state=torch.randn(3, 4), priority=[1.0, 1.0, 98.0])
    >>> torch.bincount(kept.get_batch(1000, weighted=True).indices).argmax()
    tensor(2)
    >>> kept.close()  # flushes
    >>> len(ExperienceBuffer.open(folder))
    3
    """

    def __init__(
        self,
        capacity: int,
        state_dim: int | None = None,
        action_dim: int | None = None,
        *,
        device: torch.device | str = "cpu",
        seed: int | None = None,
        metric: str = "sqeuclidean",
        age_half_life: float | None = None,
        directory: str | os.PathLike[str] | None = None,
    ):
        where = "ExperienceBuffer"
        capacity = _check.positive(where, "capacity", capacity, integer=True)
        if state_dim is not None:
            state_dim = _check.positive(where, "state_dim", state_dim, integer=True)
        if action_dim is not None:
            action_dim = _check.positive(where, "action_dim", action_dim, integer=True)
        if seed is not None:
            seed = _check.positive(where, "seed", seed, integer=True, zero=True)
            seed = _check.integer(where, "seed", seed, 0, 2**128)
        if metric not in _METRICS:
            raise ValueError(f"{where}: metric must be {' or '.join(_METRICS)}, got {metric!r}")
        if age_half_life is not None:
            age_half_life = _check.positive(where, "age_half_life", age_half_life)
            if math.isinf(age_half_life):
                raise ValueError(f"{where}: age_half_life must be finite, or None for no ageing, got {age_half_life!r}")
        try:
            self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", as tensors have it
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{where}: device {device!r} cannot be used: {reason}") from None
        self.capacity = capacity
        self.state_dim = state_dim
        self.action_dim = action_dim
        self.metric = metric
        self.age_half_life = age_half_life
        self._directory = None if directory is None else self._enter(where, directory, new=True)
        # Slots beyond the capacity take what is added between two flushes.
        self._slots = capacity if directory is None else capacity + max(MARGIN, capacity // 8)
        # Draws are made on the CPU: the same seed gives the same batches on every device.
        seed = int(torch.randint(2**62, ())) if seed is None else derive_seed(seed, Purpose.BUFFER_DRAWS)
        self._generator = torch.Generator().manual_seed(seed)
        self._store: dict[str, Tensor] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}  # of an item
        self._index: Index | None = None
        self._stride, self._offset = 1, 0  # as one shard of several: item s is number s * _stride + _offset of all
        self._origin = 0  # the item number from which the log-weights of the index count age
        self._written = 0  # items ever written, rounded up to whole rings by clear()
        self._cleared = 0  # the value of _written at the last clear()
        self._flushed = 0  # and at the last flush
        self._stream: int | None = None  # the seed of the DataLoader worker that the generator belongs to
        self._lock = threading.RLock()
        _buffers[id(self)] = self
        if self._directory is not None:
            self.flush()

    def _enter(self, where: str, directory: Any, *, new: bool) -> Directory:
        if not isinstance(directory, (str, os.PathLike)):
            raise TypeError(f"{where}: directory must be a path, got {type(directory).__name__}")
        if self.device.type != "cpu":
            raise ValueError(f"{where}: a buffer on disk (directory) lives on the cpu, got device {self.device}")
        if new:
            try:
                os.makedirs(directory, exist_ok=True)
            except OSError as error:
                raise ValueError(f"{where}: directory {os.fspath(directory)!r} cannot be made: {error}") from None
        entered = Directory(where, directory)
        if new and entered.exists:
            entered.close()
            raise ValueError(
                f"{where}: directory {os.fspath(directory)} holds a buffer, ExperienceBuffer.open opens it"
            )
        return entered

    # ------------------------------------------------------------------------------------------------- writing

    def add(self, observation: Any = None, target: Any = None, /, **fields: Any) -> None:
        """Add one item or many: ``add(observation, target)`` or ``add(state=, action=, reward=, ...)``.

        Fields may have any name and any shape. These have a meaning: ``state`` and ``observation`` end in
        ``state_dim``, ``action`` ends in ``action_dim``; ``context_embedding`` is a finite floating vector, what
        :meth:`retrieve` searches; ``task`` is an int64 scalar; ``priority`` a finite floating scalar > 0. A state may
        be a sequence ``(time, state_dim)`` with the action ``(time, action_dim)``, the reward ``(time,)`` and one
        context embedding.

        *One or many.* Of many items every field has the same leading size; a scalar (``task=3``) holds for all of
        them. After the first add the schema decides. At the first add the first of these rules that applies decides:

        1. A ``context_embedding`` vector means one item, a matrix means one item per row.
        2. If ``state_dim``, ``action_dim``, ``task`` or ``priority`` excludes one reading, the other one holds.
        3. Scalars and vectors alone mean one item.
        4. Arrays of one leading size mean many items, if no scalar except ``task`` and ``priority`` is beside them. A
           single image alone is therefore added as ``image[None]``.
        5. Matrices of one leading size, with vectors of that size or without, mean many items, and a scalar
           (``reward=0.0``) holds for all of them. The exception is a scalar ``action``: one step has one action, so
           matrices of one shape beside it mean one item.
        6. Arrays of three dimensions and one shape beside a scalar mean one item, such as an image; so do arrays of
           different leading sizes, unless two of them are matrices. A vector of integer actions as long as all arrays
           means many items.

        Other shapes, for instance four dimensions beside a scalar, are ambiguous and refused. A leading dimension in
        every array, 1 for one item, avoids that.

        Values are tensors of exactly the stored dtype, on the buffer's device; or numbers, lists and arrays, which are
        converted (floating ones to torch's default dtype at the first add, rewards and priorities always; integers of
        ``task`` to int64). They are copied, without their graph. A batch larger than the capacity leaves its last
        ``capacity`` items.

        Raises:
            TypeError: a value is no tensor, or of another dtype.
            ValueError: a field is missing or unknown, has another shape or device, has a name that is nearly that of a
                field with a meaning (``tasks``), an embedding is not finite, a priority not positive, the first add
                can be one item or many, or the buffer is closed.
            In both cases nothing has been modified.

        >>> import torch
        >>> buffer = ExperienceBuffer(100)
        >>> buffer.add(state=torch.zeros(84, 84, 3), action=2, reward=0.5)
        >>> buffer.add(state=torch.zeros(5, 84, 84, 3), action=torch.arange(5), reward=0.0)
        >>> len(buffer), buffer.get_batch(8).state.shape
        (6, torch.Size([8, 84, 84, 3]))
        """
        where = "ExperienceBuffer.add"
        if observation is not None or target is not None:
            if observation is None or target is None:
                raise TypeError(f"{where}: an observation and its target are added together, got only one of them")
            if "observation" in fields or "target" in fields:
                raise TypeError(f"{where}: observation and target were given twice, by position and by name")
            fields = {"observation": observation, "target": target, **fields}
        if not fields:
            raise TypeError(f"{where}: there is nothing to add, give (observation, target) or fields by name")
        with self._lock, torch.no_grad():
            self._check_writable(where)
            items = self._items(where, {name: self._tensor(where, name, value) for name, value in fields.items()})
            if not self._store:
                self._begin({name: (value.dtype, tuple(value.shape[1:])) for name, value in items.items()})
            self._write(items)

    def clear(self) -> None:
        """Forget all items, on disk at once; the schema and the memory stay. Indices from before are stale for good."""
        with self._lock:
            self._check_writable("ExperienceBuffer.clear")
            self._written += -self._written % self.capacity
            self._cleared = self._written
            if self._directory is not None:
                self.flush()

    def set_priority(self, indices: Tensor, priority: Tensor | float, generations: Tensor | None = None) -> Tensor:
        """Change the priorities of stored items, for instance to how much they have just taught.

        Args:
            indices: int64, any shape, the slots. Where one comes several times, one of its priorities is taken.
            priority: of the same shape, in the dtype stored, or one number for all; finite and > 0.
            generations: int64, the same shape, as they came with the indices: items that have been overwritten or
                cleared since are left out. None: all indices must be live.

        Returns:
            Which items were still stored and have changed: bool, of the indices' shape.

        Raises:
            ValueError: the buffer is empty or stores no priority; without generations, an index is outside the live
                slots; a priority is not positive; shapes or devices differ. Nothing has been modified then.
            TypeError: an argument has another type or dtype.

        Source: Schaul et al., "Prioritized experience replay", 2016.

        >>> import torch
        >>> buffer = ExperienceBuffer(4)
        >>> buffer.add(state=torch.zeros(4, 2), priority=1.0)
        >>> seen = buffer.get_batch(3)
        >>> buffer.set_priority(seen.indices, torch.tensor([2.0, 3.0, 4.0]), seen.generations)
        tensor([True, True, True])
        >>> buffer.add(state=torch.zeros(4, 2), priority=1.0)  # overwrites all
        >>> buffer.set_priority(seen.indices, torch.tensor([2.0, 3.0, 4.0]), seen.generations)
        tensor([False, False, False])
        """
        where = "ExperienceBuffer.set_priority"
        with self._lock, torch.no_grad():
            stored = self._column(where, "priority")
            self._check_writable(where)
            current = self._current(where, indices, generations)
            if generations is None and not current.all():
                count = int((~current).sum())
                raise ValueError(f"{where}: {count} of {current.numel()} indices are stale or out of range")
            values = self._tensor(where, "priority", priority)
            if values.dim() and values.shape != indices.shape:
                got, wanted = tuple(values.shape), tuple(indices.shape)
                raise ValueError(f"{where}: priority has shape {got}, wanted {wanted} or one number")
            _check_values(where, "priority", values)
            slots = indices[current]
            stored[slots] = values.expand(indices.shape)[current]
            self._weigh(slots, self._numbers(slots))
            return current

    def _write(self, items: dict[str, Tensor]) -> None:
        count = len(next(iter(items.values())))
        if self._directory is None:
            skip = max(0, count - self.capacity)
            self._written += skip
            self._put(items, skip, count)
            return
        start = 0
        while start < count:
            room = self._flushed + self._slots - self.capacity - self._written
            if room < min(count - start, self._slots - self.capacity):
                self.flush()
                continue
            stop = min(count, start + room)
            self._put(items, start, stop)
            start = stop

    def _put(self, items: dict[str, Tensor], start: int, stop: int) -> None:
        """Write items ``start`` to ``stop`` of a batch, at most as many as there are slots."""
        count = stop - start
        slot = self._written % self._slots
        head = min(count, self._slots - slot)
        for name, value in items.items():
            store = self._store[name]
            if head == len(value):  # the usual case: nothing to cut
                store.narrow(0, slot, head).copy_(value)
                continue
            store.narrow(0, slot, head).copy_(value.narrow(0, start, head))
            if head < count:
                store.narrow(0, 0, count - head).copy_(value.narrow(0, start + head, count - head))
        first = self._written
        self._written += count
        if self._index is not None and self._weighted:
            if self.age_half_life is not None and self._origin != self._age_origin:
                self._reweigh()
                return
            for begin, size, number in ((slot, head, first), (0, count - head, first + head)):
                if size:
                    self._weigh(slice(begin, begin + size), torch.arange(number, number + size, device=self.device))

    def _allocate(self, schema: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Tensor]:
        if self._directory is not None:
            return self._directory.allocate({name: (dtype, (self._slots, *s)) for name, (dtype, s) in schema.items()})
        # A normal tensor even under inference_mode, or no later add outside of it could write to it.
        with torch.inference_mode(False):
            return {
                name: torch.zeros((self._slots, *shape), dtype=dtype, device=self.device)
                for name, (dtype, shape) in schema.items()
            }

    def _begin(self, schema: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Allocate the memory, for items of this schema."""
        self._take(self._allocate(schema), self._written, self._cleared)
        if self._directory is not None:
            self.flush()  # so that the directory knows its files

    def _take(self, store: dict[str, Tensor], written: int, cleared: int) -> None:
        """Make ``store`` the memory, and its items those numbered up to ``written``."""
        self._store, self._written, self._cleared = store, written, cleared
        self._shapes = {name: tuple(value.shape[1:]) for name, value in store.items()}
        self._index = None
        if "context_embedding" in store:
            on_disk, keys = self._directory is not None, store["context_embedding"]
            self._index = Index(keys, self.metric, weighted=self._weighted, on_disk=on_disk)
            if self._weighted:
                self._reweigh()

    # ------------------------------------------------------------------------------------------------- weights

    @property
    def _weighted(self) -> bool:
        return self.age_half_life is not None or "priority" in self._store

    def _log_weights(self, slots: Tensor | slice, numbers: Tensor, origin: int) -> Tensor:
        """float64 log-weights of items, age counted from item ``origin``: a constant for all of them."""
        priority = self._store["priority"][slots] if "priority" in self._store else None
        return self._log_weights_of(priority, (numbers - origin) * self._stride + self._offset)

    def _log_weights_of(self, priority: Tensor | None, later: Tensor) -> Tensor:
        """float64, of items with these priorities that are ``later`` items younger than where age is counted from."""
        weights = None if priority is None else priority.double().log()  # not in place: it may be the memory itself
        if self.age_half_life is not None:
            aged = later.double() * (math.log(2) / self.age_half_life)
            weights = aged if weights is None else weights.add_(aged)
        assert weights is not None  # nobody asks where there are none
        return weights

    def _weigh(self, slots: Tensor | slice, numbers: Tensor) -> None:
        """Tell the index the weights of items that have just been written."""
        if self._index is not None:
            self._index.write(slots, self._log_weights(slots, numbers, self._origin))

    @property
    def _age_origin(self) -> int:
        """Where to count age from: it moves once in a turn of the ring, so that no log-weight grows large."""
        return self._written - self._written % self.capacity

    def _reweigh(self) -> None:
        """Write all weights to the index."""
        self._origin = self._age_origin
        slots = torch.arange(self._first, self._written, device=self.device) % self._slots
        self._weigh(slots, self._numbers(slots))

    # ------------------------------------------------------------------------------------------------- checks

    def _check_open(self, where: str) -> None:
        if self._directory is not None and self._directory.closed:
            raise ValueError(f"{where}: the buffer is closed")

    def _check_writable(self, where: str) -> None:
        self._check_open(where)
        if self._directory is not None and not self._directory.owned:
            raise ValueError(f"{where}: a forked process cannot write to the buffer on disk of its parent")

    def _tensor(self, where: str, name: str, value: Any) -> Tensor:
        """``value`` as a tensor of the field's dtype on the buffer's device, or one sentence."""
        stored = self._store[name].dtype if name in self._store else None
        if isinstance(value, Tensor):
            if value.dtype == stored and value.device == self.device and value.layout == torch.strided:
                return value  # the usual case
            _check.device(where, name, value, self.device, "the buffer")
            if value.layout != torch.strided:
                raise TypeError(f"{where}: {name} must be a dense tensor, got layout {value.layout}")
        else:
            try:
                value = torch.as_tensor(value, device=self.device)
            except (TypeError, ValueError, RuntimeError):
                kind = type(value).__name__
                raise TypeError(f"{where}: {name} must be a tensor, an array or a number, got {kind}") from None
            wanted = stored
            if stored is None and (value.is_floating_point() or name in ("reward", "priority")):
                wanted = torch.get_default_dtype()
            elif stored is None and name == "task" and value.dtype != torch.bool:
                wanted = torch.int64
            boolean_task = name == "task" and value.dtype == torch.bool
            if wanted is not None and torch.can_cast(value.dtype, wanted) and not boolean_task:
                value = value.to(wanted)
        if stored is not None and value.dtype != stored:
            raise TypeError(f"{where}: {name} has dtype {_short(value.dtype)}, wanted {_short(stored)}")
        made: Tensor = value
        return made

    def _items(self, where: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The values with a leading dimension of items, each checked against the schema; the first add makes it."""
        if self._store:
            shapes = self._shapes
            if values.keys() != shapes.keys():
                for name in shapes:
                    if name not in values:
                        raise ValueError(f"{where}: {name} is missing, the buffer stores {', '.join(shapes)}")
                for name in values:
                    if name not in shapes:
                        raise ValueError(f"{where}: {name} is not a field, the buffer stores {', '.join(shapes)}")
            anchor = _anchor(shapes, values)
            extra = values[anchor].dim() - len(shapes[anchor])
            if extra not in (0, 1):
                got, one = tuple(values[anchor].shape), shapes[anchor]
                many_text = ", ".join(map(str, ("n", *one)))
                raise ValueError(f"{where}: {anchor} has shape {got}, wanted {one} or ({many_text})")
            many = extra == 1
        else:
            self._check_names(where, values)
            many = self._first_is_many(where, values)
            shapes = _item_shapes(values, many)
            self._check_schema(where, values, shapes)
            anchor = _anchor({name: tuple(value.shape) for name, value in values.items()}, values)
        lead = tuple(values[anchor].shape[:1]) if many else ()
        items = {}
        for name, value in values.items():
            wanted = lead + shapes[name]
            if value.shape != wanted:
                if value.dim() or shapes[name]:
                    known = self._store or "context_embedding" in values
                    hint = "" if known else " (one item needs a leading dimension of 1 in every field)"
                    raise ValueError(f"{where}: {name} has shape {tuple(value.shape)}, wanted {wanted}{hint}")
                value = value.expand(wanted)
            items[name] = value if many else value.unsqueeze(0)
        for name in ("context_embedding", "priority"):
            if name in items:
                _check_values(where, name, items[name])
        return items

    def _first_is_many(self, where: str, values: dict[str, Tensor]) -> bool:
        """Whether the values of a first add are many items, by the rules of :meth:`add`."""
        if "context_embedding" in values:
            return values["context_embedding"].dim() > 1
        arrays = {name: value for name, value in values.items() if value.dim()}
        vectors = {name: value for name, value in arrays.items() if value.dim() == 1}
        scalars = values.keys() - arrays.keys() - {"task", "priority"}
        flat, equal = len(vectors) == len(arrays), len({len(value) for value in arrays.values()}) == 1
        one, many = self._fits(where, values, False), equal and self._fits(where, values, True)
        if not (one and many):
            matrices = sum(value.dim() == 2 for value in arrays.values())
            return many or not (flat or (one and (equal or (scalars and matrices < 2))))
        if flat and "reward" not in vectors:
            return False
        if not flat:
            indices = "action" in vectors and not vectors["action"].is_floating_point()
            dims = max(value.dim() for value in arrays.values())
            if not scalars or (indices and "reward" not in vectors) or (dims == 2 and "action" not in scalars):
                return True
            if len({value.shape for value in arrays.values()}) == 1 and self.state_dim is None and dims <= 3:
                return False
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in arrays.items())
        text = f"{shapes} can be one item or {len(next(iter(arrays.values())))}"
        raise ValueError(f"{where}: {text}, add one item first or give every field a leading dimension")

    def _fits(self, where: str, values: dict[str, Tensor], many: bool) -> bool:
        """Whether the values of a first add, read as one item or many, have the shapes that their names require."""
        try:
            self._check_schema(where, values, _item_shapes(values, many))
        except (TypeError, ValueError):
            return False
        return True

    def _check_names(self, where: str, names: Collection[str]) -> None:
        """Refuse a name that is nearly that of a field with a meaning: the meaning would be lost in silence."""
        wanted = ["context_embedding", "task", "priority"]
        wanted += ["state", "observation"] if self.state_dim is not None else []
        wanted += ["action"] if self.action_dim is not None else []
        for name in names:
            if hasattr(Experiences, name):  # the attribute would hide the field
                raise ValueError(f"{where}: a field cannot be called {name!r}")
            for meant in wanted:
                if name != meant and meant not in names and _resembles(name, meant):
                    raise ValueError(f"{where}: a field cannot be called {name!r}, which is nearly {meant!r}")

    def _check_schema(self, where: str, values: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
        """What the fields with a meaning must look like, item by item."""

        def refuse(name: str, wanted: str) -> None:
            raise ValueError(f"{where}: {name} has shape {shapes[name]} per item, wanted {wanted}")

        for name in shapes:
            if name in _RESERVED or name.startswith("__"):
                raise ValueError(f"{where}: a field cannot be called {name!r}")
        for name in ("state", "observation"):
            if name in shapes and self.state_dim is not None and shapes[name][-1:] != (self.state_dim,):
                refuse(name, f"({self.state_dim},) or (time, {self.state_dim})")
        steps = self._steps(values, shapes) if "state" in shapes else ()
        for name in ("action", "reward"):
            if name in shapes and shapes[name][: len(steps)] != steps:
                refuse(name, f"one per step of state, which has shape {shapes['state']}")
        if "action" in shapes and self.action_dim is not None:
            index = not values["action"].is_floating_point() and shapes["action"] == steps
            if not index and shapes["action"] != (*steps, self.action_dim):
                refuse("action", str((*steps, self.action_dim)))
        if "task" in shapes:
            _check.dtype(where, "task", values["task"], (torch.int64,))
        for name in ("task", "priority"):
            if shapes.get(name):
                refuse(name, "() (one number)")
        if len(shapes.get("context_embedding", (0,))) != 1:
            refuse("context_embedding", "(dim,)")
        for name in ("context_embedding", "priority"):
            if name in shapes and not values[name].is_floating_point():
                raise TypeError(f"{where}: {name} has dtype {_short(values[name].dtype)}, wanted a floating one")

    def _steps(self, values: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The leading dimensions of a state that is a sequence: ``state_dim`` gives them, or the actions do."""
        if self.state_dim is not None:
            return shapes["state"][:-1]
        action = shapes.get("action", ())
        if self.action_dim is None or not action:
            return ()
        steps = action[:-1] if action[-1] == self.action_dim or values["action"].is_floating_point() else action
        return steps if shapes["state"][: len(steps)] == steps else ()

    # ------------------------------------------------------------------------------------------------- reading

    def retrieve(
        self,
        query_embedding: Tensor,
        k: int,
        exclude_task: int | Tensor | Sequence[int] | None = None,
        *,
        among: Tensor | None = None,
    ) -> Experiences:
        """The ``k`` experiences whose context embeddings are most similar to the query, nearest first, exactly.

        Args:
            query_embedding: ``(dim,)``, or ``(queries, dim)`` for several at once, in the embeddings' dtype, finite.
            k: how many; fewer come back when fewer are stored or left.
            exclude_task: the id of a task, or several, whose experiences are left out (one's own, for instance).
            among: int64 ``(n,)``, the slots to search, each at most once; those that are not live are passed over.
                None: all.

        Returns:
            Experiences of ``min(k, candidates)`` items, perhaps none; ``distances`` (less the log-weights, where the
            buffer has weights) is differentiable with respect to the query.

        Raises:
            ValueError: the buffer is empty or stores no context_embedding (no task, with ``exclude_task``), or an
                argument has another shape or device.
            TypeError: an argument has another type or dtype.

        >>> import torch
        >>> buffer = ExperienceBuffer(100)
        >>> buffer.add(state=torch.eye(3), context_embedding=torch.eye(3))
        >>> buffer.retrieve(torch.tensor([0.0, 0.9, 0.0]), k=1).state
        tensor([[0., 1., 0.]])
        """
        where = "ExperienceBuffer.retrieve"
        with self._lock:
            keys = self._column(where, "context_embedding")
            k = self._check_query(where, query_embedding, k, keys)
            slots: Tensor | slice = slice(len(keys))
            if among is None:
                size, valid = len(keys), self._live_mask()
            else:
                valid = self._current(where, among, None, name="among")
                _check.shape(where, "among", among, (None,), "(n,)")
                slots, size = among.clamp(0, self._slots - 1), len(among)
            if exclude_task is not None:
                others = self._others(where, exclude_task, slots)
                valid = others if valid is None else valid & others
            k = min(k, size if valid is None else int(valid.sum()))
            queries = query_embedding if query_embedding.dim() == 2 else query_embedding.unsqueeze(0)
            if k == 0:
                distances = queries.new_zeros((len(queries), 0))
                indices = torch.zeros_like(distances, dtype=torch.int64)
            else:
                assert self._index is not None  # there is a context_embedding
                distances, indices = self._index.search(queries, k, valid, slots, self._written)
                if self.age_half_life is not None:  # the index counts age from another item
                    distances = distances + (self._written - 1 - self._origin) * (math.log(2) / self.age_half_life)
            if query_embedding.dim() == 1:
                distances, indices = distances[0], indices[0]
            return self._gather(indices, distances)

    def _check_query(self, where: str, query_embedding: Any, k: Any, keys: Tensor) -> int:
        _check.tensor(where, "query_embedding", query_embedding)
        if query_embedding.dim() not in (1, 2) or query_embedding.shape[-1] != keys.shape[1]:
            wanted = f"({keys.shape[1]},) or (queries, {keys.shape[1]})"
            raise ValueError(f"{where}: query_embedding has shape {tuple(query_embedding.shape)}, wanted {wanted}")
        _check.dtype(where, "query_embedding", query_embedding, (keys.dtype,))
        _check.device(where, "query_embedding", query_embedding, self.device, "the buffer")
        if not _all_finite(query_embedding.detach()):
            raise ValueError(f"{where}: query_embedding must be finite")
        return _check.positive(where, "k", k, integer=True)

    def get_batch(self, n: int, *, weighted: bool = False) -> Experiences:
        """``n`` experiences drawn at random, with replacement, by the buffer's own generator.

        In a DataLoader worker the generator is the worker's: its draws differ from those of other workers and epochs.

        Args:
            n: how many.
            weighted: draw in proportion to the items' weights (priority and age; a pass over all of them) instead of
                uniformly.

        Raises:
            ValueError: the buffer is empty or has no weights to draw by, or ``n`` is not positive.
            TypeError: ``n`` is not an integer, or ``weighted`` not a bool.
        """
        where = "ExperienceBuffer.get_batch"
        with self._lock:
            self._column(where)
            n = _check.positive(where, "n", n, integer=True)
            _check.flag(where, "weighted", weighted)
            if weighted and not self._weighted:
                raise ValueError(f"{where}: weighted draws need a field priority or an age_half_life, there is neither")
            if not weighted:
                ranks = torch.randint(len(self), (n,), generator=self._draws()).to(self.device)
                return self._gather(self._slots_of(ranks))
            slots = self._slots_of(torch.arange(len(self), device=self.device))
            weights = self._log_weights(slots, self._numbers(slots), self._written)
            total = (weights - weights.max()).exp().cumsum(0)
            point = torch.rand(n, dtype=torch.float64, generator=self._draws()).to(self.device) * total[-1]
            below = total[-1].nextafter(torch.zeros_like(total[-1]))  # a product that is rounded up to the total
            return self._gather(slots[torch.searchsorted(total, torch.minimum(point, below), right=True)])

    def _draws(self) -> torch.Generator:
        """The generator of all draws. In a DataLoader worker, the first draw replaces the copy of the parent's."""
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.seed != self._stream:
            words = divmod(worker.seed, 2**32)
            seed = derive_seed(self._generator.initial_seed(), Purpose.WORKER_DRAWS, *words)
            self._generator, self._stream = torch.Generator().manual_seed(seed), worker.seed
        return self._generator

    def get(self, indices: Tensor, generations: Tensor | None = None) -> Experiences:
        """The experiences in the slots ``indices``.

        Args:
            indices: int64, any shape.
            generations: int64, the same shape, as they came with the indices: slots that have been overwritten or
                cleared since are refused rather than served in silence.

        Raises:
            ValueError: an index is outside the live slots or stale, or shapes or devices differ.
            TypeError: an argument is not an int64 tensor.
        """
        where = "ExperienceBuffer.get"
        with self._lock:
            current = self._current(where, indices, generations)
            if not current.all():
                count = int((~current).sum())
                raise ValueError(f"{where}: {count} of {current.numel()} indices are stale or out of range")
            return self._gather(indices)

    def is_current(self, indices: Tensor, generations: Tensor) -> Tensor:
        """Whether the items that ``(indices, generations)`` name are still stored: bool, of the indices' shape."""
        with self._lock:
            return self._current("ExperienceBuffer.is_current", indices, generations)

    def tasks(self) -> Tensor:
        """The ids of the tasks stored: int64 ``(tasks,)``, ascending."""
        with self._lock:
            ids: Tensor = torch.unique(self._live("ExperienceBuffer.tasks", "task"))
            return ids

    def of_task(self, task: int) -> Experiences:
        """All experiences of one task, oldest first.

        Args:
            task: its id.

        Raises:
            ValueError: nothing of this task is stored.
            TypeError: ``task`` is not an integer.
        """
        where = "ExperienceBuffer.of_task"
        with self._lock:
            found = self._column(where, "task")
            task = _check.integer(where, "task", task, *_INT64)
            live = self._live_mask()
            indices = (found == task if live is None else (found == task) & live).nonzero().squeeze(1)
            if not len(indices):
                raise ValueError(f"{where}: nothing is stored of task {task}")
            turn = indices < self._first % self._slots  # these were written after the end of the ring was reached
            return self._gather(torch.cat([indices[~turn], indices[turn]]))

    def task_embeddings(self) -> Tensor:
        """The mean context embedding of each task: ``(tasks, dim)``, row by row as in :meth:`tasks`.

        >>> import torch
        >>> buffer = ExperienceBuffer(100)
        >>> buffer.add(context_embedding=torch.tensor([[0.0, 2.0], [4.0, 4.0], [2.0, 0.0]]), task=[7, 3, 7])
        >>> buffer.tasks().tolist(), buffer.task_embeddings().tolist()
        ([3, 7], [[4.0, 4.0], [1.0, 1.0]])
        """
        where = "ExperienceBuffer.task_embeddings"
        with self._lock:
            embeddings = self._live(where, "context_embedding")
            ids, rows, counts = torch.unique(self._live(where, "task"), return_inverse=True, return_counts=True)
            wide = torch.promote_types(embeddings.dtype, torch.float32)  # sums of float16 overflow
            sums = embeddings.new_zeros((len(ids), embeddings.shape[1]), dtype=wide)
            means: Tensor = sums.index_add_(0, rows, embeddings.to(wide)) / counts.unsqueeze(1)
            return means.to(embeddings.dtype)

    def __len__(self) -> int:
        with self._lock:
            return self._written - self._first

    def __repr__(self) -> str:
        with self._lock:
            fields = "".join(f", {n} {tuple(s.shape[1:])} {_short(s.dtype)}" for n, s in self._store.items())
            count = len(self)
        options = f", metric={self.metric}, device={self.device}"
        if self.age_half_life is not None:
            options += f", age_half_life={self.age_half_life}"
        if self._directory is not None:
            options += f", directory={self._directory.path}"
        return f"ExperienceBuffer({count} of {self.capacity}{fields}{options})"

    # Items are numbered from the first ever added; number s stands in slot s % _slots. In memory there are as many
    # slots as capacity, so the live ones are always the first len(self); on disk any stretch of the ring.

    @property
    def _first(self) -> int:
        """The number of the oldest item."""
        return max(self._cleared, self._written - self.capacity)

    def _column(self, where: str, name: str | None = None) -> Tensor:
        """The first slots of a field (of any, without a name) up to the last live one."""
        if not len(self):
            self._check_open(where)
            raise ValueError(f"{where}: the buffer is empty")
        if name is None:
            name = next(iter(self._store))
        if name not in self._store:
            raise ValueError(f"{where}: the buffer stores no {name}, only {', '.join(self._store)}")
        start = self._first % self._slots
        return self._store[name][: min(start + len(self), self._slots)]

    def _live_mask(self) -> Tensor | None:
        """Which slots of :meth:`_column` are live; None: all."""
        start, count = self._first % self._slots, len(self)
        if start == 0 or count == self._slots:
            return None
        stop = start + count
        slots = torch.arange(min(stop, self._slots), device=self.device)
        return (slots >= start) | (slots < stop - self._slots)

    def _live(self, where: str, name: str) -> Tensor:
        column, mask = self._column(where, name), self._live_mask()
        return column if mask is None else column[mask]

    def _slots_of(self, ranks: Tensor) -> Tensor:
        """Where the items stand that a buffer in memory would have in the slots ``ranks``: draws are alike on disk."""
        if self._slots == self.capacity:
            return ranks
        return (self._first + (ranks - self._first) % self.capacity) % self._slots

    def _others(self, where: str, exclude: int | Tensor | Sequence[int], slots: Tensor | slice) -> Tensor:
        self._column(where, "task")
        tasks, ids = self._store["task"][slots], self._task_ids(where, exclude)
        return ~torch.isin(tasks, ids) if ids.dim() else tasks != ids

    def _task_ids(self, where: str, exclude: Any, name: str = "exclude_task") -> Tensor:
        """Ids of tasks as an int64 tensor, of no dimension where one number was given."""
        if isinstance(exclude, Tensor):
            _check.device(where, name, exclude, self.device, "the buffer")
        elif hasattr(exclude, "__index__") and not isinstance(exclude, np.ndarray):
            exclude = _check.integer(where, name, exclude, *_INT64)
        try:
            ids = torch.as_tensor(exclude, device=self.device)
        except (TypeError, ValueError, RuntimeError):
            ids = torch.zeros(1, dtype=torch.bool, device=self.device)
        if ids.numel() and (ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex()):
            raise TypeError(f"{where}: {name} must be an integer or a list or tensor of them, got {exclude!r}")
        return ids.to(torch.int64)

    def _current(self, where: str, indices: Tensor, generations: Tensor | None, name: str = "indices") -> Tensor:
        for argument, value in ((name, indices), ("generations", generations)):
            if value is None:
                continue
            _check.tensor(where, argument, value)
            _check.dtype(where, argument, value, (torch.int64,))
            _check.device(where, argument, value, self.device, "the buffer")
            if value.shape != indices.shape:
                raise ValueError(f"{where}: {argument} has shape {tuple(value.shape)}, wanted {tuple(indices.shape)}")
        current = (indices >= 0) & (indices < self._slots) & (self._numbers(indices) >= self._first)
        return current if generations is None else current & (self._generations(indices) == generations)

    def _generations(self, indices: Tensor) -> Tensor:
        """Of the newest item in each slot: it is the last s below _written with s % _slots == slot."""
        behind = indices.neg().add_(self._written - 1)
        return behind.div_(self._slots, rounding_mode="floor")

    def _numbers(self, indices: Tensor) -> Tensor:
        return self._generations(indices) * self._slots + indices

    def _slots_since(self, number: int) -> Tensor:
        """Where the live items stand that are numbered from ``number`` on, oldest first."""
        return torch.arange(max(number, self._first), self._written, device=self.device) % self._slots

    def _gather(self, indices: Tensor, distances: Tensor | None = None) -> Experiences:
        fields = {name: store[indices] for name, store in self._store.items()}
        return Experiences(fields, indices, self._generations(indices), distances)

    # ------------------------------------------------------------------------------------------------- keeping

    def flush(self) -> None:
        """Bring a buffer on disk to the disk: what has been added is there after a crash from now on.

        The draws' generator is kept with it, so that the reopened buffer answers as this one would.

        Raises:
            ValueError: the buffer lives in memory (``save`` writes it to a file), or is closed.
        """
        where = "ExperienceBuffer.flush"
        with self._lock:
            if self._directory is None:
                raise ValueError(f"{where}: the buffer lives in memory, there is no directory to flush to")
            self._check_writable(where)
            fields = {name: [_short(value.dtype), list(value.shape)] for name, value in self._store.items()}
            counters = {"written": self._written, "cleared": self._cleared, "slots": self._slots}
            metadata = {"options": self._options(), "fields": fields, **counters}
            self._directory.commit({"generator": self._generator.get_state()}, metadata)
            self._flushed = self._written

    def close(self) -> None:
        """Flush a buffer on disk and let go of its files. The buffer is empty then, and takes nothing more.

        In a forked process it closes the files of that process and flushes nothing.
        """
        with self._lock:
            if self._directory is not None and not self._directory.closed:
                if self._directory.owned:
                    self.flush()
                self._take({}, 0, 0)
                self._directory.close()

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> ExperienceBuffer:
        """The buffer that was made with this ``directory``, as it was at its last flush. Opening never runs code.

        Raises:
            FileNotFoundError: there is no buffer.
            BlockingIOError: another buffer, here or in another process, has the directory open.
            ValueError: its files are damaged.
            TypeError: ``directory`` is not a path.
        """
        where = "ExperienceBuffer.open"
        buffer = cls.__new__(cls)
        if isinstance(directory, (str, os.PathLike)) and not os.path.isdir(directory):
            raise FileNotFoundError(f"{where}: there is no directory {os.fspath(directory)}")
        buffer.device = torch.device("cpu")
        entered = buffer._enter(where, directory, new=False)
        try:
            if not entered.exists:
                raise FileNotFoundError(f"{where}: the directory {entered.path} holds no buffer")
            with checkpoint.sound(where, entered.path):
                tensors, state = entered.load()
                buffer.__init__(**_known(state["options"]), seed=0)  # type: ignore[misc]
                buffer._generator.set_state(tensors["generator"])
                slots, written, cleared = (
                    _check.integer(where, name, state[name], 0, 2**62) for name in ("slots", "written", "cleared")
                )
                fields = {
                    name: (_dtype(where, dtype), tuple(shape)) for name, (dtype, shape) in state["fields"].items()
                }
                rows = {shape[0] for _, shape in fields.values()}
                if slots <= buffer.capacity or cleared > written or cleared % buffer.capacity or rows - {slots}:
                    text = f"{slots} slots, {sorted(rows)} in the fields, {written} written, {cleared} cleared"
                    raise ValueError(f"{where}: {entered.path} has numbers that do not go together: {text}")
                store = entered.attach(where, fields)
                buffer._check_schema(where, store, {name: shape[1:] for name, (_, shape) in fields.items()})
                buffer._directory, buffer._slots = entered, slots
                buffer._take(store, written, cleared)
                buffer._flushed = buffer._written
        except BaseException:
            entered.close()
            raise
        return buffer

    def state_dict(self) -> dict[str, Any]:
        """All that decides what the buffer will answer, as copies: its items, its counters and its generator."""
        with self._lock:
            self._check_open("ExperienceBuffer.state_dict")
            slots: Any = slice(len(self))
            if self._slots != self.capacity:
                slots = self._slots_of(torch.arange(len(self)))
            return {
                "capacity": self.capacity,
                "written": self._written,
                "cleared": self._cleared,
                "generator": self._generator.get_state(),
                "stream": self._stream,
                "fields": {name: store[slots].clone() for name, store in self._store.items()},
            }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned; the buffer then answers as that one did.

        Raises:
            ValueError: the capacity differs, an entry is missing, the fields do not fit together or with
                ``state_dim`` and ``action_dim``, or hold what :meth:`add` refuses; nothing has been modified then.
            TypeError: a counter is no integer, or a field no tensor; nothing has been modified then.
        """
        where = "ExperienceBuffer.load_state_dict"
        wanted = {"capacity", "written", "cleared", "generator", "fields"}
        if not isinstance(state, dict) or set(state) - {"stream"} != wanted:  # files of 0.1 have no stream
            raise ValueError(f"{where}: state must be a dict with the entries {', '.join(sorted(wanted))}")
        if state["capacity"] != self.capacity:
            raise ValueError(f"{where}: the state is of capacity {state['capacity']}, the buffer of {self.capacity}")
        written, cleared = (_check.integer(where, name, state[name], 0, 2**62) for name in ("written", "cleared"))
        if cleared > written or cleared % self.capacity:
            raise ValueError(f"{where}: cleared must be a multiple of {self.capacity} up to {written}, got {cleared}")
        count = min(written - cleared, self.capacity)
        stream = state.get("stream")
        if stream is not None:
            stream = _check.integer(where, "stream", stream)
        fields: dict[str, Tensor] = state["fields"]
        for name, value in fields.items():
            _check.tensor(where, name, value)
            if value.dim() == 0 or len(value) != count:
                raise ValueError(f"{where}: {name} has shape {tuple(value.shape)}, wanted {count} items")
        if count and not fields:
            raise ValueError(f"{where}: fields is empty, wanted {count} items")
        self._check_schema(where, fields, {name: tuple(value.shape[1:]) for name, value in fields.items()})
        for name in ("context_embedding", "priority"):
            if name in fields:
                _check_values(where, name, fields[name])
        generator = torch.Generator()
        try:
            generator.set_state(state["generator"].cpu())
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}: generator is not the state of a CPU generator ({error})") from None
        with self._lock:
            self._check_writable(where)
            store = self._allocate({name: (value.dtype, tuple(value.shape[1:])) for name, value in fields.items()})
            self._store, self._written, self._cleared = store, written, cleared
            slots = self._slots_of(torch.arange(count, device=self.device))
            for name, value in fields.items():
                store[name][slots] = value.detach().to(self.device)
            self._take(store, written, cleared)
            self._generator, self._stream = generator, stream
            if self._directory is not None:
                self.flush()  # only now the new files take the place of the old ones

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the buffer to a file (safetensors), atomically. One on disk passes through memory."""
        state = self.state_dict()
        fields = state.pop("fields")
        tensors = {"generator": state.pop("generator"), **{f"field.{name}": value for name, value in fields.items()}}
        metadata = {**state, "options": self._options(), "fields": list(fields)}
        checkpoint.save(path, tensors, metadata, kind="ExperienceBuffer")

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> ExperienceBuffer:
        """The buffer that :meth:`save` wrote, in memory, on ``device``. Loading never runs code.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or holds something else.
        """
        tensors, state = checkpoint.load(path, kind="ExperienceBuffer")
        with checkpoint.sound("ExperienceBuffer.load", path):
            fields = {name: tensors[f"field.{name}"] for name in state.pop("fields")}
            buffer = cls(**_known(state.pop("options")), device=device, seed=0)
            buffer.load_state_dict({**state, "fields": fields, "generator": tensors["generator"]})
        return buffer

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _OPTIONS}

    def __getstate__(self) -> dict[str, Any]:  # a copy of a buffer on disk lives in memory
        with self._lock:
            state = self.state_dict()
        fields = {name: (value.dtype, value.shape, _to_array(value)) for name, value in state.pop("fields").items()}
        state["generator"] = state["generator"].numpy()
        options = {**self._options(), "device": str(self.device)}
        return {"options": options, "state": state, "fields": fields}

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        self.__init__(**pickled["options"], seed=0)  # type: ignore[misc]
        specs = pickled["fields"].items()
        fields = {name: _from_array(*spec) for name, spec in specs}
        generator = torch.from_numpy(pickled["state"]["generator"])
        self.load_state_dict({**pickled["state"], "generator": generator, "fields": fields})


# A fork copies a lock that another thread holds as held for ever: the forking thread takes all locks first.
_buffers: weakref.WeakValueDictionary[int, ExperienceBuffer] = weakref.WeakValueDictionary()
_forking = threading.local()


def _before_fork() -> None:
    buffers = [reference() for reference in _buffers.valuerefs()]
    _forking.locks = [buffer._lock for buffer in buffers if buffer is not None]
    for lock in _forking.locks:
        lock.acquire()


def _after_fork() -> None:
    for lock in _forking.locks:
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


def _to_array(value: Tensor) -> Any:
    """The bytes of a tensor. Pickled for a spawned process, a temporary tensor would be freed before its start."""
    return value.cpu().reshape(-1).view(torch.uint8).numpy()


def _from_array(dtype: torch.dtype, shape: torch.Size, data: Any) -> Tensor:
    if not data.size:  # torch cannot view an empty array as another dtype
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(data).view(dtype).view(shape)


def _item_shapes(values: dict[str, Tensor], many: bool) -> dict[str, tuple[int, ...]]:
    """Shapes per item; a scalar that holds for all items has no leading dimension."""
    return {name: tuple(value.shape[1:] if many and value.dim() else value.shape) for name, value in values.items()}


def _anchor(shapes: dict[str, tuple[int, ...]], values: dict[str, Tensor]) -> str:
    """The field whose number of dimensions decides between one item and many: never one that holds for all items."""
    named = [name for name in ("context_embedding", "state", "observation") if shapes.get(name)]
    return named[0] if named else max(shapes, key=lambda name: (len(shapes[name]), values[name].dim()))


def _resembles(name: str, meant: str) -> bool:
    """Whether a name differs from another by case, underscores, a plural or, in a long word, by one letter."""
    name, meant = name.lower().replace("_", ""), meant.replace("_", "")
    if name in (meant, f"{meant}s", f"{meant[:-1]}ies"):
        return True
    return len(meant) >= 8 and meant not in name and bool(get_close_matches(name, [meant], cutoff=0.875))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(where: str, name: Any) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{where}: the directory names a dtype {name!r} that torch does not know")
    return dtype


def _known(options: Any) -> dict[str, Any]:
    """The options of a file, which may not name a directory to write to."""
    if set(options) != set(_OPTIONS):
        raise LookupError(f"options are {', '.join(map(str, options))}, not {', '.join(_OPTIONS)}")
    return dict(options)


def _all_finite(values: Tensor) -> bool:
    """One sum tells nearly always: it is finite only if all values are."""
    return math.isfinite(values.sum()) or bool(torch.isfinite(values).all())


def _check_values(where: str, name: str, values: Tensor) -> None:
    """Embeddings must be finite, priorities positive too."""
    if not _all_finite(values):
        why = "it is what retrieve searches" if name == "context_embedding" else "a weight"
        raise ValueError(f"{where}: {name} must be finite, {why}")
    if name == "priority" and values.numel() and not values.min() > 0:
        raise ValueError(f"{where}: priority must be > 0, got {values.min().item()}")
