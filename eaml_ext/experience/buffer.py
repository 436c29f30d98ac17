"""A ring buffer of past experience, with exact search by the similarity of context embeddings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eaml_ext import _check, checkpoint
from eaml_ext.experience import _schema, _serialization
from eaml_ext.experience._draws import Draws
from eaml_ext.experience._index import KeyIndex
from eaml_ext.experience._memmap import MemmapDirectory
from eaml_ext.experience._options import BufferOptions, checked_device, checked_seed
from eaml_ext.experience._ring import RingStorage
from eaml_ext.experience._weights import draw_by_weight, has_weights, set_priority
from eaml_ext.experience.experiences import Experiences


class ExperienceBuffer:
    """A memory of the last ``capacity`` experiences, of fixed size, on one device.

    The first add fixes the schema (names, shapes and dtypes of the fields) and allocates the memory. Each later add
    must have exactly these fields. When the ring is full, the oldest item is overwritten. In memory there are
    ``capacity`` slots. Item number s, counted from 0 in the order of adds, is stored in slot ``s % slots`` with
    generation ``s // slots``. Slot and generation together identify one item permanently. Therefore :meth:`get` can
    raise an error if a slot has been overwritten.

    *Weights.* A field ``priority`` p > 0, an ``age_half_life`` H, or both give each item the weight
    ``w = p · 2^(-age / H)``. The age is the number of items added since. The logarithm is a bias of every search:
    ``distance = ‖q − key‖² − log w``, or ``1 − cosine − log w``, in the dtype of the embeddings. A weight that is e
    times larger thus offsets one unit of distance. :meth:`get_batch` can draw in proportion to the weights.

    *On disk.* With ``directory`` the fields are memory-mapped files there, for memories larger than RAM. All items
    added before the last :meth:`flush` survive a crash bit for bit, and :meth:`open` continues from them. Items added
    since are stored in spare slots, so that no item of the last flush is overwritten before the next one. There are
    ``max(1024, capacity // 8)`` spare slots. The buffer flushes itself whenever too few of them are free.

    *Threads and processes.* Several threads may read and write; each call sees one state, and a fork waits until calls
    in other threads have returned. A DataLoader worker draws by its own generator, seeded by the worker's seed and the
    buffer's seed. So draws differ between workers and epochs, and the same ``generator`` of the DataLoader reproduces
    them. Any other copy of a buffer (pickle, deepcopy, fork) draws the same items as the original. A forked process can
    read a buffer on disk and cannot write to it. Both processes share the files, so the parent must not write while a
    forked process reads.

    Args:
        capacity: largest number of items.
        state_dim: size of the last dimension of a state or observation, checked; None: any.
        action_dim: size of the last dimension of an action, checked; None: any. An integer action may also be one
            index per step, without that dimension.
        device: device of the data; tensors that are added or searched with must be there too.
        seed: seed of the draws of :meth:`get_batch`; None: drawn from torch's global generator.
        metric: compares context embeddings: ``"sqeuclidean"`` (squared distance) or ``"cosine"`` (1 - cosine
            similarity).
        age_half_life: number of later items that halve the weight of an item; None: age does not count.
        directory: directory of the memory-mapped files, which must not hold a buffer yet. It is created if it does not
            exist, and disk space is allocated at the first add. None: the data are in memory.

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
        options = BufferOptions.checked(where, capacity, state_dim, action_dim, metric, age_half_life)
        self.capacity, self.state_dim, self.action_dim, self.metric, self.age_half_life = options
        seed = checked_seed(where, seed)
        self.device = checked_device(where, device)
        if directory is not None and self.device.type != "cpu":
            raise ValueError(f"{where}: a buffer on disk (directory) lives on the cpu, got device {self.device}")
        files = None if directory is None else MemmapDirectory(where, directory, create=True)
        self._draws = Draws(seed)
        self._rules = _schema.SchemaRules(self.state_dim, self.action_dim)
        flush_state = partial(_serialization.flush_state, self._draws, options)
        self.storage = RingStorage(self.capacity, self.device, files, flush_state)  # not public: for eaml_ext only
        self._index = KeyIndex(self.storage, metric, self.age_half_life)
        if files is not None:
            self.storage.flush()

    def add(self, observation: Any = None, target: Any = None, /, **fields: Any) -> None:
        """Add one item or many: ``add(observation, target)`` or ``add(state=, action=, reward=, ...)``.

        Fields may have any name and any shape. Six names have a meaning. ``state`` and ``observation`` end in
        ``state_dim``, and ``action`` ends in ``action_dim``. ``context_embedding`` is a finite floating vector that
        :meth:`retrieve` searches. ``task`` is an int64 scalar, ``priority`` a finite floating scalar > 0. A state may
        be a sequence ``(time, state_dim)`` with the action ``(time, action_dim)``, the reward ``(time,)`` and one
        context embedding.

        *One or many.* In many items every field has the same leading size, and a scalar (``task=3``) applies to all.
        After the first add the schema decides. At the first add the first of these rules that applies decides:

        1. A ``context_embedding`` vector means one item, a matrix means one item per row.
        2. If ``state_dim``, ``action_dim``, ``task`` or ``priority`` fit only one item, or only many, they decide.
        3. Scalars and vectors alone mean one item. A ``reward`` vector among vectors of one size is ambiguous.
        4. Arrays of one leading size mean many items, if no scalar except ``task`` and ``priority`` is beside them. A
           single image alone is therefore added as ``image[None]``.
        5. Arrays and a vector of integer actions, all of one leading size, mean many items, if no ``reward`` vector is
           beside them.
        6. Matrices of one leading size, with vectors of that size or without, mean many items, and a scalar
           (``reward=0.0``) applies to all of them. The exception is a scalar ``action``: one step has one action, so
           matrices of one shape beside it mean one item.
        7. Arrays of three dimensions and one shape beside a scalar mean one item, such as an image.
        8. Arrays of different leading sizes beside a scalar mean one item, unless two of them are matrices.

        Other shapes, for instance four dimensions beside a scalar, raise a ValueError. To avoid it, give every array a
        leading dimension, which is 1 for one item.

        Values are tensors of exactly the stored dtype, on the buffer's device, or numbers, lists and arrays, which are
        converted. At the first add, converted floating values, rewards and priorities become torch's default dtype, and
        converted integers of ``task`` become int64. Values are copied, without their autograd graph. If a batch is
        larger than the capacity, its last ``capacity`` items are stored.

        Args:
            observation, target: the values of these two fields, by position.
            fields: name to value, ``(*item shape)`` for one item, ``(n, *item shape)`` for many.

        Raises:
            TypeError: a value is no tensor, or of another dtype.
            ValueError: a field is missing or unknown, has another shape or device, or has a name that resembles one
                with a meaning (``tasks``). Or an embedding is not finite, a priority is not positive, the first add can
                be one item or many, or the buffer is closed.
            In both cases nothing has been modified.

        >>> import torch
        >>> buffer = ExperienceBuffer(100)
        >>> buffer.add(state=torch.zeros(84, 84, 3), action=2, reward=0.5)
        >>> buffer.add(state=torch.zeros(5, 84, 84, 3), action=torch.arange(5), reward=0.0)
        >>> len(buffer), buffer.get_batch(8).state.shape
        (6, torch.Size([8, 84, 84, 3]))
        """
        where, storage = "ExperienceBuffer.add", self.storage
        if observation is not None or target is not None:
            if observation is None or target is None:
                raise TypeError(f"{where}: an observation and its target are added together, got only one of them")
            if "observation" in fields or "target" in fields:
                raise TypeError(f"{where}: observation and target were given twice, by position and by name")
            fields = {"observation": observation, "target": target, **fields}
        if not fields:
            raise TypeError(f"{where}: there is nothing to add, give (observation, target) or fields by name")
        with storage.lock, torch.no_grad():
            storage.check_writable(where)
            schema = storage.schema
            values = {
                name: _schema.as_field(where, name, value, schema[name].dtype if name in schema else None, self.device)
                for name, value in fields.items()
            }
            storage.write(self._rules.items(where, values, schema))

    def clear(self) -> None:
        """Drop all items, and flush if on disk. Schema and memory remain, and all earlier indices are stale."""
        with self.storage.lock:
            self.storage.check_writable("ExperienceBuffer.clear")
            self.storage.clear()

    def set_priority(self, indices: Tensor, priority: Tensor | float, generations: Tensor | None = None) -> Tensor:
        """Change the priorities of stored items, for instance to their last losses.

        Args:
            indices: ``(*shape)``, int64: slots. If a slot occurs several times, one of its priorities is stored.
            priority: ``(*shape)``, in the stored dtype, or one number for all; finite and > 0.
            generations: ``(*shape)``, int64, returned with the indices: items that have been overwritten or cleared
                since are left out. None: all indices must be live.

        Returns:
            ``(*shape)``, bool: which items were still stored and have changed.

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
        with self.storage.lock, torch.no_grad():
            live = set_priority(where, self.storage, indices, priority, generations)
            self._index.update_priorities(indices[live])
            return live

    def retrieve(
        self,
        query_embedding: Tensor,
        k: int,
        exclude_task: int | Tensor | Sequence[int] | None = None,
        *,
        among: Tensor | None = None,
    ) -> Experiences:
        """Return the ``k`` experiences with the context embeddings most similar to the query, nearest first, exactly.

        Args:
            query_embedding: ``(dim,)``, or ``(queries, dim)`` for several at once, in the embeddings' dtype, finite.
            k: number of items; fewer are returned if fewer live items are left to search.
            exclude_task: id of a task, or several, whose experiences are left out.
            among: ``(n,)``, int64: the slots to search, each at most once. Slots that are not live are ignored.
                None: all.

        Returns:
            Experiences of ``min(k, candidates)`` items, perhaps none. Log-weights, if the buffer has weights, have been
            subtracted from ``distances``, which are differentiable with respect to the query.

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
        with self.storage.lock:
            return self._index.retrieve("ExperienceBuffer.retrieve", query_embedding, k, exclude_task, among)

    def get_batch(self, n: int, *, weighted: bool = False) -> Experiences:
        """Draw ``n`` experiences at random, with replacement, by the buffer's own random generator.

        Args:
            n: number of items.
            weighted: draw in proportion to the items' weights (priority and age) instead of uniformly. Each call then
                takes time in proportion to the number of stored items.

        Raises:
            ValueError: the buffer is empty or has no weights to draw by, or ``n`` is not positive.
            TypeError: ``n`` is not an integer, or ``weighted`` not a bool.
        """
        where, storage = "ExperienceBuffer.get_batch", self.storage
        with storage.lock:
            storage.check_not_empty(where)
            n = _check.positive(where, "n", n, integer=True)
            _check.flag(where, "weighted", weighted)
            if weighted and not has_weights(storage.columns, self.age_half_life):
                raise ValueError(f"{where}: weighted draws need a field priority or an age_half_life, there is neither")
            if weighted:
                slots = storage.from_memory_slots(torch.arange(len(storage), device=self.device))
                weights = self._index.log_weights(slots, storage.item_numbers(slots), storage.written)
                return storage.gather(slots[draw_by_weight(weights, n, self._draws.current())])
            slots = torch.randint(len(storage), (n,), generator=self._draws.current()).to(self.device)
            return storage.gather(storage.from_memory_slots(slots))

    def get(self, indices: Tensor, generations: Tensor | None = None) -> Experiences:
        """Return the experiences in the slots ``indices``.

        Args:
            indices: ``(*shape)``, int64.
            generations: ``(*shape)``, int64, returned with the indices: a slot that has been overwritten or cleared
                since raises an error. None: any generation.

        Raises:
            ValueError: an index is outside the live slots or stale, or shapes or devices differ.
            TypeError: an argument is not an int64 tensor.
        """
        where, storage = "ExperienceBuffer.get", self.storage
        with storage.lock:
            storage.check_live(where, storage.are_live(where, indices, generations))
            return storage.gather(indices)

    def is_current(self, indices: Tensor, generations: Tensor) -> Tensor:
        """Return which items named by indices and generations, ``(*shape)``, int64, are still stored: bool."""
        with self.storage.lock:
            return self.storage.are_live("ExperienceBuffer.is_current", indices, generations)

    def tasks(self) -> Tensor:
        """Return the ids of the stored tasks: int64 ``(tasks,)``, ascending."""
        with self.storage.lock:
            ids: Tensor = torch.unique(self.storage.live("ExperienceBuffer.tasks", "task"))
            return ids

    def of_task(self, task: int) -> Experiences:
        """Return all experiences of the task with the id ``task``, oldest first.

        Raises:
            ValueError: no item of this task is stored.
            TypeError: ``task`` is not an integer.
        """
        where = "ExperienceBuffer.of_task"
        with self.storage.lock:
            return self.storage.of_task(where, _schema.check_task(where, task))

    def task_embeddings(self) -> Tensor:
        """Return the mean context embedding of each task: ``(tasks, dim)``, in the order of :meth:`tasks`.

        >>> import torch
        >>> buffer = ExperienceBuffer(100)
        >>> buffer.add(context_embedding=torch.tensor([[0.0, 2.0], [4.0, 4.0], [2.0, 0.0]]), task=[7, 3, 7])
        >>> buffer.tasks().tolist(), buffer.task_embeddings().tolist()
        ([3, 7], [[4.0, 4.0], [1.0, 1.0]])
        """
        with self.storage.lock:
            return self.storage.task_means("ExperienceBuffer.task_embeddings", "context_embedding")

    def __len__(self) -> int:
        with self.storage.lock:
            return len(self.storage)

    def __repr__(self) -> str:
        with self.storage.lock:
            fields = "".join(
                f", {n} {spec.shape} {_schema.dtype_name(spec.dtype)}" for n, spec in self.storage.schema.items()
            )
            count, files = len(self.storage), self.storage.files
        age = "" if self.age_half_life is None else f", age_half_life={self.age_half_life}"
        options = f", metric={self.metric}, device={self.device}{age}"
        options += "" if files is None else f", directory={files.path}"
        return f"ExperienceBuffer({count} of {self.capacity}{fields}{options})"

    def flush(self) -> None:
        """Write unwritten items and the generator of a buffer on disk, so that both survive a crash.

        Raises:
            ValueError: the buffer lives in memory (``save`` writes it to a file), or is closed.
        """
        where = "ExperienceBuffer.flush"
        with self.storage.lock:
            if self.storage.files is None:
                raise ValueError(f"{where}: the buffer lives in memory, there is no directory to flush to")
            self.storage.check_writable(where)
            self.storage.flush()

    def close(self) -> None:
        """Flush a buffer on disk and close its files. Afterwards it is empty, and :meth:`add` raises a ValueError.

        In a forked process it closes the files of that process and flushes nothing.
        """
        with self.storage.lock:
            self.storage.close()
            self._index.reset()

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> ExperienceBuffer:
        """Return the buffer that was made with this ``directory``, as of its last flush. No code in files is executed.

        Raises:
            FileNotFoundError: there is no buffer.
            BlockingIOError: another buffer, here or in another process, has the directory open.
            ValueError: its files are damaged.
            TypeError: ``directory`` is not a path.
        """
        where = "ExperienceBuffer.open"
        files = MemmapDirectory(where, directory)
        try:
            tensors, metadata = files.load(where)
            with checkpoint.content_errors(where, files.path):
                buffer = cls(**BufferOptions.from_file(metadata["options"])._asdict(), seed=0)
                parts = buffer.storage, buffer._draws, buffer._rules
                _serialization.attach_directory(where, *parts, files, tensors, metadata)
        except BaseException:
            files.close()
            raise
        return buffer

    def state_dict(self) -> dict[str, Any]:
        """Return copies of items, counters and generator, which determine the results of all later calls."""
        return _serialization.state_dict("ExperienceBuffer.state_dict", self.storage, self._draws)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state that :meth:`state_dict` returned. Later calls return the same as on the saved buffer.

        Raises:
            ValueError: the capacity differs, an entry is missing, or the fields do not fit together or with
                ``state_dim`` and ``action_dim``, or hold values that are invalid in :meth:`add`.
            TypeError: a counter is no integer, or a field no tensor.
            In both cases nothing has been modified.
        """
        where = "ExperienceBuffer.load_state_dict"
        with self.storage.lock:
            _serialization.load_state_dict(where, self.storage, self._draws, self._rules, state)
            self._index.reset()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the buffer to a file (safetensors), atomically. A buffer on disk is copied to memory first."""
        _serialization.save(path, self.state_dict(), BufferOptions.of(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> ExperienceBuffer:
        """Return the buffer that :meth:`save` wrote, in memory, on ``device``. No code in the file is executed.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or holds something else.
        """
        tensors, metadata = checkpoint.load(path, kind=_serialization.KIND)
        with checkpoint.content_errors("ExperienceBuffer.load", path):
            state, options = _serialization.from_file(tensors, metadata)
            buffer = cls(**options._asdict(), device=device, seed=0)
            buffer.load_state_dict(state)
        return buffer

    def __getstate__(self) -> dict[str, Any]:  # a copy of a buffer on disk lives in memory
        options = {**BufferOptions.of(self)._asdict(), "device": str(self.device)}
        return _serialization.to_pickle(self.state_dict(), options)

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        self.__init__(**pickled["options"], seed=0)  # type: ignore[misc]
        self.load_state_dict(_serialization.from_pickle(pickled))
