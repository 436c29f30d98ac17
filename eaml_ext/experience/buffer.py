"""A ring buffer of past experience, with exact search by the similarity of context embeddings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eaml_ext import _check
from eaml_ext.experience import _ragged, _schema, _serialization
from eaml_ext.experience._draws import Draws
from eaml_ext.experience._index import KeyIndex
from eaml_ext.experience._memmap import MemmapDirectory
from eaml_ext.experience._options import BufferOptions, checked_device, checked_seed
from eaml_ext.experience._persistent import PersistentBuffer
from eaml_ext.experience._ring import RingStorage
from eaml_ext.experience._weights import draw_by_weight, has_weights, set_priority
from eaml_ext.experience.experiences import Experiences


class ExperienceBuffer(PersistentBuffer):
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

    *Ragged fields.* The fields in ``ragged`` are sequences ``(time, ...)`` whose length differs from item to item. All
    ragged fields of one item have the same length. Many items are added as lists of sequences, one list per field.
    Results are padded with zeros to their longest item, and have two more fields: ``lengths`` and ``mask``, which marks
    the steps. ``batch`` passes the mask to the Adapter, whose loss leaves the padding out.

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
        ragged: names of ragged fields, one or several.
        max_length: longest sequence of the ragged fields, for which memory is allocated at the first add. None: any
            length; a longer sequence than all before copies the ragged fields (on disk, all fields) to larger memory.

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

    Episodes of any length, added as one item and as a list of two:

    >>> episodes = ExperienceBuffer(1000, state_dim=4, seed=0, ragged=("state", "next_state"))
    >>> episodes.add(state=torch.randn(9, 4), next_state=torch.randn(9, 4), task=0)
    >>> states, nexts = ([torch.randn(steps, 4) for steps in (5, 7)] for _ in range(2))
    >>> episodes.add(state=states, next_state=nexts, task=1)
    >>> found = episodes.of_task(1)
    >>> found.lengths.tolist(), {name: tuple(value.shape) for name, value in found.batch().items()}
    ([5, 7], {'states': (2, 7, 4), 'targets': (2, 7, 4), 'mask': (2, 7)})

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
        ragged: str | Sequence[str] = (),
        max_length: int | None = None,
    ):
        where = "ExperienceBuffer"
        sizes, search = (capacity, state_dim, action_dim), (metric, age_half_life)
        options = BufferOptions.checked(where, *sizes, *search, ragged, max_length)
        self.capacity, self.state_dim, self.action_dim = capacity, state_dim, action_dim = options[:3]
        self.metric, self.age_half_life, self.ragged, self.max_length = options[3:]
        seed = checked_seed(where, seed)
        self.device = checked_device(where, device)
        if directory is not None and self.device.type != "cpu":
            raise ValueError(f"{where}: a buffer on disk (directory) lives on the cpu, got device {self.device}")
        files = None if directory is None else MemmapDirectory(where, directory, create=True)
        self._draws = Draws(seed)
        self._rules = _schema.SchemaRules(self.state_dim, self.action_dim, self.ragged)
        flush_state = partial(_serialization.flush_state, self._draws, options)
        parts = self.capacity, self.device, files, flush_state
        self.storage = RingStorage(*parts, self.ragged, self.max_length)  # not public: for eaml_ext only
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

        With ragged fields, other rules follow the first. A list of sequences means many items, and so does a vector of
        ``task`` or ``priority``. With ``state_dim``, a ragged state of three dimensions does. All else is one item.

        Other shapes, for instance four dimensions beside a scalar, raise a ValueError. To avoid it, give every array a
        leading dimension, which is 1 for one item.

        Values are tensors of exactly the stored dtype, on the buffer's device, or numbers, lists and arrays, which are
        converted. At the first add, converted floating values, rewards and priorities become torch's default dtype, and
        converted integers of ``task`` become int64. Values are copied, without their autograd graph. If a batch is
        larger than the capacity, its last ``capacity`` items are stored.

        Args:
            observation, target: the values of these two fields, by position.
            fields: name to value, ``(*item shape)`` for one item, ``(n, *item shape)`` for many. A ragged field is
                ``(time, ...)`` for one item; for many it is a list of n arrays ``(time_i, ...)``, or ``(n, time, ...)``
                where all have one length.

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
            values, lengths = _ragged.convert(where, fields, self.ragged, storage.schema, self.device)
            schema = _ragged.call_schema(storage.schema, self.ragged, values)
            items = self._rules.items(where, values, schema, many=lengths is not None)
            if self.ragged:
                items = _ragged.with_lengths(where, items, lengths, self.ragged, self.max_length)
            storage.write(items)

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
