"""A ring of tensors that remembers experience, searched exactly by the similarity of context embeddings."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eaml_ext import _check, checkpoint
from eaml_ext.experience.experiences import Experiences

_METRICS = ("sqeuclidean", "cosine")
_RESERVED = ("fields", "indices", "generations", "distances", "batch")


class ExperienceBuffer:
    """A memory of the last ``capacity`` experiences, of fixed size, on one device.

    The first add fixes the schema (names, shapes and dtypes of the fields) and allocates the memory; from then on
    each add must bring exactly these fields. When the ring is full the oldest item is overwritten. Item number s
    (counted from the beginning) stands in slot ``s % capacity`` with generation ``s // capacity``, so that an index
    kept from an earlier search is recognised when its slot has been overwritten since (:meth:`get`).

    Reads and writes may come from several threads.

    Args:
        capacity: how many items fit.
        state_dim: the size of a state's (or observation's) last dimension, checked; None: any.
        action_dim: the size of an action's last dimension, checked; None: any. An integer action may also be one
            index per step, without that dimension.
        device: where the data live; tensors added or asked with must live there too.
        seed: of the draws of :meth:`get_batch`; None: drawn from torch's global generator.
        metric: how context embeddings are compared, ``"sqeuclidean"`` (squared distance) or ``"cosine"``
            (1 - cosine similarity).

    Raises:
        TypeError, ValueError: an argument is out of its range.

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
    ):
        _check.positive("ExperienceBuffer", "capacity", capacity, integer=True)
        for name, value in (("state_dim", state_dim), ("action_dim", action_dim)):
            if value is not None:
                _check.positive("ExperienceBuffer", name, value, integer=True)
        if seed is not None:
            _check.positive("ExperienceBuffer", "seed", seed, integer=True, zero=True)
        if metric not in _METRICS:
            raise ValueError(f"ExperienceBuffer: metric must be {' or '.join(_METRICS)}, got {metric!r}")
        self.capacity = capacity
        self.state_dim = state_dim
        self.action_dim = action_dim
        self.metric = metric
        try:
            self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", as tensors have it
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"ExperienceBuffer: device {device!r} cannot be used: {reason}") from None
        # Draws are made on the CPU: the same seed gives the same batches on every device.
        self._generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
        self._store: dict[str, Tensor] = {}
        self._written = 0  # items ever written, rounded up to whole rings by clear()
        self._cleared = 0  # the value of _written at the last clear()
        self._lock = threading.RLock()

    # ------------------------------------------------------------------------------------------------- writing

    def add(self, observation: Any = None, target: Any = None, /, **fields: Any) -> None:
        """Add one item or many: ``add(observation, target)`` or ``add(state=, action=, reward=, ...)``.

        Fields may have any name. These have a meaning: ``state`` and ``observation`` end in ``state_dim``, ``action``
        ends in ``action_dim``; ``context_embedding`` is a finite floating vector, what :meth:`retrieve` searches;
        ``task`` is an int64 scalar. A state may be a sequence ``(time, state_dim)`` with the action
        ``(time, action_dim)``, the reward ``(time,)`` and one context embedding.

        One or many is decided by one field: ``context_embedding`` where there is one (a vector: one item; a matrix:
        one row per item), otherwise ``state``, ``observation``, or the first field. At the first add, two dimensions
        or more mean many; afterwards the schema decides. Of many items every field has the same leading size; a
        scalar (``task=3``) holds for all of them.

        Values are tensors of exactly the stored dtype, on the buffer's device; or numbers, lists and arrays, which are
        converted (floating ones to torch's default dtype at the first add, rewards always). They are copied, without
        their graph. A batch larger than the capacity leaves its last ``capacity`` items.

        Raises:
            TypeError: a value is no tensor, or of another dtype.
            ValueError: a field is missing or unknown, has another shape or device, or an embedding is not finite.
            In both cases nothing has been modified.
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
            values = {name: self._tensor(where, name, value) for name, value in fields.items()}
            items = self._items(where, values)
            if not self._store:
                # A normal tensor even under inference_mode, or no later add outside of it could write to it.
                with torch.inference_mode(False):
                    self._store = {
                        name: torch.zeros((self.capacity, *value.shape[1:]), dtype=value.dtype, device=self.device)
                        for name, value in items.items()
                    }
            self._write(items)

    def clear(self) -> None:
        """Forget all items; the schema and the memory stay. Indices from before are stale for good."""
        with self._lock:
            self._written += -self._written % self.capacity
            self._cleared = self._written

    def _write(self, items: dict[str, Tensor]) -> None:
        count = len(next(iter(items.values())))
        skip = max(0, count - self.capacity)
        start = (self._written + skip) % self.capacity
        head = min(count - skip, self.capacity - start)
        for name, value in items.items():
            store = self._store[name]
            store[start : start + head] = value[skip : skip + head]
            if skip + head < count:
                store[: count - skip - head] = value[skip + head :]
        self._written += count

    def _tensor(self, where: str, name: str, value: Any) -> Tensor:
        """``value`` as a tensor of the field's dtype on the buffer's device, or one sentence."""
        stored = self._store[name].dtype if name in self._store else None
        if isinstance(value, Tensor):
            _check.device(where, name, value, self.device, "the buffer")
            if value.layout != torch.strided:
                raise TypeError(f"{where}: {name} must be a dense tensor, got layout {value.layout}")
        else:
            try:
                value = torch.as_tensor(value, device=self.device)
            except (TypeError, ValueError, RuntimeError):
                kind = type(value).__name__
                raise TypeError(f"{where}: {name} must be a tensor, an array or a number, got {kind}") from None
            wanted = stored or (torch.get_default_dtype() if name == "reward" or value.is_floating_point() else None)
            if wanted is not None and torch.can_cast(value.dtype, wanted):
                value = value.to(wanted)
        if stored is not None and value.dtype != stored:
            raise TypeError(f"{where}: {name} has dtype {_short(value.dtype)}, wanted {_short(stored)}")
        return value

    def _items(self, where: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The values with a leading dimension of items, each checked against the schema; the first add makes it."""
        anchor = next((n for n in ("context_embedding", "state", "observation") if n in values), next(iter(values)))
        if self._store:
            shapes = {name: tuple(store.shape[1:]) for name, store in self._store.items()}
            for name in shapes:
                if name not in values:
                    raise ValueError(f"{where}: {name} is missing, the buffer stores {', '.join(shapes)}")
            for name in values:
                if name not in shapes:
                    raise ValueError(f"{where}: {name} is not a field, the buffer stores {', '.join(shapes)}")
            extra = values[anchor].dim() - len(shapes[anchor])
            if extra not in (0, 1):
                got, one = tuple(values[anchor].shape), shapes[anchor]
                many_text = ", ".join(map(str, ("n", *one)))
                raise ValueError(f"{where}: {anchor} has shape {got}, wanted {one} or ({many_text})")
            many = extra == 1
        else:
            many = values[anchor].dim() > 1
            # What stands for all items has no dimension of its own.
            shapes = {n: tuple(v.shape[1:]) if many and v.dim() else tuple(v.shape) for n, v in values.items()}
            self._check_schema(where, values, shapes)
        lead = tuple(values[anchor].shape[:1]) if many else ()
        items = {}
        for name, value in values.items():
            wanted = lead + shapes[name]
            if value.shape != wanted:
                if value.dim() or shapes[name]:
                    raise ValueError(f"{where}: {name} has shape {tuple(value.shape)}, wanted {wanted}")
                value = value.expand(wanted)
            items[name] = value if many else value.unsqueeze(0)
        if "context_embedding" in items and not torch.isfinite(items["context_embedding"]).all():
            raise ValueError(f"{where}: context_embedding must be finite, it is what retrieve searches")
        return items

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
        steps = shapes["state"][:-1] if "state" in shapes and self.state_dim is not None else ()
        for name in ("action", "reward"):
            if name in shapes and shapes[name][: len(steps)] != steps:
                refuse(name, f"one per step of state, which has shape {shapes['state']}")
        if "action" in shapes and self.action_dim is not None:
            index = not values["action"].is_floating_point() and shapes["action"] == steps
            if not index and shapes["action"] != (*steps, self.action_dim):
                refuse("action", str((*steps, self.action_dim)))
        if "task" in shapes:
            _check.dtype(where, "task", values["task"], (torch.int64,))
            if shapes["task"]:
                refuse("task", "() (one number)")
        if "context_embedding" in shapes:
            if len(shapes["context_embedding"]) != 1:
                refuse("context_embedding", "(dim,)")
            if not values["context_embedding"].is_floating_point():
                got = _short(values["context_embedding"].dtype)
                raise TypeError(f"{where}: context_embedding has dtype {got}, wanted a floating one")

    # ------------------------------------------------------------------------------------------------- reading

    def retrieve(
        self, query_embedding: Tensor, k: int, exclude_task: int | Tensor | Sequence[int] | None = None
    ) -> Experiences:
        """The ``k`` experiences whose context embeddings are most similar to the query, nearest first, exactly.

        Args:
            query_embedding: ``(dim,)``, or ``(queries, dim)`` for several at once, in the embeddings' dtype, finite.
            k: how many; fewer come back when fewer are stored or left.
            exclude_task: the id of a task, or several, whose experiences are left out (one's own, for instance).

        Returns:
            Experiences of ``min(k, candidates)`` items, perhaps none; ``distances`` is differentiable with respect to
            the query.

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
        from eaml_ext.ops import knn

        where = "ExperienceBuffer.retrieve"
        with self._lock:
            keys = self._live(where, "context_embedding")
            _check.tensor(where, "query_embedding", query_embedding)
            if query_embedding.dim() not in (1, 2) or query_embedding.shape[-1] != keys.shape[1]:
                wanted = f"({keys.shape[1]},) or (queries, {keys.shape[1]})"
                raise ValueError(f"{where}: query_embedding has shape {tuple(query_embedding.shape)}, wanted {wanted}")
            _check.dtype(where, "query_embedding", query_embedding, (keys.dtype,))
            _check.device(where, "query_embedding", query_embedding, self.device, "the buffer")
            if not torch.isfinite(query_embedding).all():
                raise ValueError(f"{where}: query_embedding must be finite")
            _check.positive(where, "k", k, integer=True)
            valid = None if exclude_task is None else self._others(where, exclude_task)
            k = min(k, len(keys) if valid is None else int(valid.sum()))
            queries = query_embedding if query_embedding.dim() == 2 else query_embedding.unsqueeze(0)
            if k == 0:
                distances = queries.new_zeros((len(queries), 0))
                indices = torch.zeros_like(distances, dtype=torch.int64)
            else:
                distances, indices = knn(queries, keys, k, metric=self.metric, valid=valid)
                if self.metric == "cosine":
                    distances = 1 - distances
            if query_embedding.dim() == 1:
                distances, indices = distances[0], indices[0]
            return self._gather(indices, distances)

    def get_batch(self, n: int) -> Experiences:
        """``n`` experiences drawn uniformly at random, with replacement, by the buffer's own generator.

        Raises:
            ValueError: the buffer is empty, or ``n`` is not positive.
            TypeError: ``n`` is not an integer.
        """
        where = "ExperienceBuffer.get_batch"
        with self._lock:
            self._live(where)
            _check.positive(where, "n", n, integer=True)
            return self._gather(torch.randint(len(self), (n,), generator=self._generator).to(self.device))

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
            return torch.unique(self._live("ExperienceBuffer.tasks", "task"))

    def of_task(self, task: int) -> Experiences:
        """All experiences of one task, by slot.

        Raises:
            ValueError: nothing of this task is stored.
            TypeError: ``task`` is not an integer.
        """
        where = "ExperienceBuffer.of_task"
        with self._lock:
            tasks = self._live(where, "task")
            if isinstance(task, bool) or not isinstance(task, int):
                raise TypeError(f"{where}: task must be an integer, got {task!r}")
            indices = (tasks == task).nonzero().squeeze(1)
            if not len(indices):
                raise ValueError(f"{where}: nothing is stored of task {task}")
            return self._gather(indices)

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
            sums = embeddings.new_zeros((len(ids), embeddings.shape[1])).index_add_(0, rows, embeddings)
            return sums / counts.unsqueeze(1)

    def __len__(self) -> int:
        return min(self._written - self._cleared, self.capacity)

    def __repr__(self) -> str:
        fields = "".join(f", {n} {tuple(s.shape[1:])} {_short(s.dtype)}" for n, s in self._store.items())
        return f"ExperienceBuffer({len(self)} of {self.capacity}{fields}, metric={self.metric}, device={self.device})"

    def _live(self, where: str, name: str | None = None) -> Tensor:
        """The live slots of a field (of any, without a name); live slots are always the first len(self)."""
        if not len(self):
            raise ValueError(f"{where}: the buffer is empty")
        if name is None:
            name = next(iter(self._store))
        if name not in self._store:
            raise ValueError(f"{where}: the buffer stores no {name}, only {', '.join(self._store)}")
        return self._store[name][: len(self)]

    def _others(self, where: str, exclude: int | Tensor | Sequence[int]) -> Tensor:
        tasks = self._live(where, "task")
        if isinstance(exclude, int) and not isinstance(exclude, bool):
            return tasks != exclude
        if isinstance(exclude, Tensor):
            _check.device(where, "exclude_task", exclude, self.device, "the buffer")
        try:
            ids = torch.as_tensor(exclude, device=self.device)
        except (TypeError, ValueError, RuntimeError):
            ids = tasks.new_zeros(1, dtype=torch.bool)
        if ids.numel() and (ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex()):
            raise TypeError(f"{where}: exclude_task must be an integer or a list or tensor of them, got {exclude!r}")
        return ~torch.isin(tasks, ids)

    def _current(self, where: str, indices: Tensor, generations: Tensor | None) -> Tensor:
        for name, value in (("indices", indices), ("generations", generations)):
            if value is None:
                continue
            _check.tensor(where, name, value)
            _check.dtype(where, name, value, (torch.int64,))
            _check.device(where, name, value, self.device, "the buffer")
            if value.shape != indices.shape:
                raise ValueError(f"{where}: {name} has shape {tuple(value.shape)}, wanted {tuple(indices.shape)}")
        current = (indices >= 0) & (indices < len(self))
        return current if generations is None else current & (self._generations(indices) == generations)

    def _generations(self, indices: Tensor) -> Tensor:
        """Of the newest item in each slot: it is the last s below _written with s % capacity == slot."""
        return torch.div(self._written - 1 - indices, self.capacity, rounding_mode="floor")

    def _gather(self, indices: Tensor, distances: Tensor | None = None) -> Experiences:
        fields = {name: store[indices] for name, store in self._store.items()}
        return Experiences(fields, indices, self._generations(indices), distances)

    # ------------------------------------------------------------------------------------------------- keeping

    def state_dict(self) -> dict[str, Any]:
        """All that decides what the buffer will answer, as copies: its items, its counters and its generator."""
        with self._lock:
            return {
                "capacity": self.capacity,
                "written": self._written,
                "cleared": self._cleared,
                "generator": self._generator.get_state(),
                "fields": {name: store[: len(self)].clone() for name, store in self._store.items()},
            }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned; the buffer then answers as that one did.

        Raises:
            ValueError: the capacity differs, an entry is missing, or the fields do not fit together or with
                ``state_dim`` and ``action_dim``; nothing has been modified then.
        """
        where = "ExperienceBuffer.load_state_dict"
        wanted = {"capacity", "written", "cleared", "generator", "fields"}
        if not isinstance(state, dict) or set(state) != wanted:
            raise ValueError(f"{where}: state must be a dict with the entries {', '.join(sorted(wanted))}")
        if state["capacity"] != self.capacity:
            raise ValueError(f"{where}: the state is of capacity {state['capacity']}, the buffer of {self.capacity}")
        count = min(state["written"] - state["cleared"], self.capacity)
        fields: dict[str, Tensor] = state["fields"]
        for name, value in fields.items():
            _check.tensor(where, name, value)
            if value.dim() == 0 or len(value) != count:
                raise ValueError(f"{where}: {name} has shape {tuple(value.shape)}, wanted {count} items")
        self._check_schema(where, fields, {name: tuple(value.shape[1:]) for name, value in fields.items()})
        generator = torch.Generator()
        try:
            generator.set_state(state["generator"].cpu())
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}: generator is not the state of a CPU generator ({error})") from None
        store = {}
        for name, value in fields.items():
            store[name] = torch.zeros((self.capacity, *value.shape[1:]), dtype=value.dtype, device=self.device)
            store[name][:count] = value.detach()
        with self._lock:
            self._store, self._generator = store, generator
            self._written, self._cleared = state["written"], state["cleared"]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the buffer to a file (safetensors), atomically."""
        state = self.state_dict()
        fields = state.pop("fields")
        tensors = {"generator": state.pop("generator"), **{f"field.{name}": value for name, value in fields.items()}}
        metadata = {**state, "options": self._options(), "fields": list(fields)}
        checkpoint.save(path, tensors, metadata, kind="ExperienceBuffer")

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> ExperienceBuffer:
        """The buffer that :meth:`save` wrote, on ``device``. Loading never runs code.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or holds something else.
        """
        tensors, state = checkpoint.load(path, kind="ExperienceBuffer")
        fields = {name: tensors[f"field.{name}"] for name in state.pop("fields")}
        buffer = cls(**state.pop("options"), device=device, seed=0)
        buffer.load_state_dict({**state, "fields": fields, "generator": tensors["generator"]})
        return buffer

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("capacity", "state_dim", "action_dim", "metric")}

    def __getstate__(self) -> dict[str, Any]:
        return {"options": {**self._options(), "device": str(self.device)}, "state": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["options"], seed=0)  # type: ignore[misc]
        self.load_state_dict(state["state"])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
