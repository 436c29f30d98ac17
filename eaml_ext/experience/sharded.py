"""An ExperienceBuffer with one shard on each rank: a rank writes to its own shard, and a search covers all shards."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eaml_ext import _check, checkpoint
from eaml_ext.distributed import Group
from eaml_ext.experience import _ragged, _records
from eaml_ext.experience._index import check_query
from eaml_ext.experience._options import BufferOptions
from eaml_ext.experience._schema import FieldSpec, dtype_name, dtype_of_name, task_ids
from eaml_ext.experience._weights import age_cost, has_weights, log_weights
from eaml_ext.experience.buffer import ExperienceBuffer
from eaml_ext.experience.experiences import Experiences

_KIND = "ShardedExperienceBuffer"
_FAILED, _SCHEMA, _WRITTEN, _LIVE, _QUERIES, _K, _EXCLUDED = range(7)  # columns of ``states``


class _Request(NamedTuple):
    """The arguments of one rank's search."""

    queries: Tensor  # (queries, dim)
    k: int
    excluded: Tensor  # int64 (tasks,), ids


class ShardedExperienceBuffer:
    """A memory of ``capacity`` experiences over the ranks of a group, searched as one.

    :meth:`add` writes to this rank's shard, a ring of ``capacity / size`` items, and sends nothing. :meth:`retrieve`
    is collective: all ranks call it, each with its own queries. The queries are sent to all ranks, and each rank
    searches its shard exactly. The k candidates of each shard are sent back with their fields and merged.

    *Equal to one buffer.* Item s of rank r has the number ``s * size + r`` among the items of all ranks, whenever it is
    added. Its index is ``slot * size + r``. Number, index and generation are those of the item in one ExperienceBuffer
    of the whole capacity. While all ranks have added the same number of items, a search therefore returns the same
    items and distances, bit for bit, as that buffer. This includes ties, overwriting, priorities and age.

    If ranks have added different numbers of items, each shard drops its own oldest item when it is full. A search then
    equals a search of one buffer that holds all live items in the order of their indices. With ``age_half_life`` the
    age of an item is the difference between its number and the largest number. Log-weights may then differ in their
    last bits.

    *Tasks* have the same ids on all ranks: ``exclude_task=3`` leaves out the items of task 3 in all shards.

    The first add on any rank fixes the schema of all ranks. A rank that has added nothing receives it at the next
    search. Several threads may call other methods, but only one may call :meth:`retrieve`, which is collective.

    Args:
        capacity: largest number of items over all ranks, a multiple of their number.
        group: the ranks.
        directory: for shards on disk: the files of each rank are in ``directory/rank-<rank>-of-<size>``. A ring on disk
            has spare slots (see ExperienceBuffer), so that items at equal distances may have another order.
        state_dim, action_dim, device, seed, metric, age_half_life: as of :class:`ExperienceBuffer`; ``age_half_life``
            counts the items of all ranks. All but ``device`` and ``seed`` are equal on all ranks.
        ragged, max_length: as of :class:`ExperienceBuffer`; ragged fields need a ``max_length``.

    Attributes:
        local: this rank's shard, an ExperienceBuffer with methods such as ``get_batch``, ``set_priority``, ``flush``.

    Raises:
        TypeError, ValueError: an argument is out of its range.

    >>> import torch
    >>> from eaml_ext.distributed import torchrun_group
    >>> with torchrun_group(alone=True) as group:  # under torchrun: torchrun_group(), a group of all processes
    ...     buffer = ShardedExperienceBuffer(1000, state_dim=3, group=group)
    ...     buffer.add(state=torch.eye(3), context_embedding=torch.eye(3))
    ...     buffer.retrieve(torch.tensor([0.0, 0.9, 0.0]), k=1).state
    tensor([[0., 1., 0.]])
    """

    def __init__(
        self,
        capacity: int,
        state_dim: int | None = None,
        action_dim: int | None = None,
        *,
        group: Group,
        device: torch.device | str = "cpu",
        seed: int | None = None,
        metric: str = "sqeuclidean",
        age_half_life: float | None = None,
        directory: str | os.PathLike[str] | None = None,
        ragged: str | Sequence[str] = (),
        max_length: int | None = None,
    ):
        where = "ShardedExperienceBuffer"
        self._set_group(where, group)
        capacity = _check.positive(where, "capacity", capacity, integer=True)
        if capacity % group.size:
            raise ValueError(f"{where}: capacity must be a multiple of the {group.size} ranks, got {capacity}")
        if ragged and max_length is None:
            raise ValueError(f"{where}: ragged fields need a max_length, which makes items of all ranks equally large")
        options: dict[str, Any] = {"metric": metric, "age_half_life": age_half_life, "device": device, "seed": seed}
        options |= {"ragged": ragged, "max_length": max_length}
        if directory is not None:
            options["directory"] = self._shard_path(where, directory)
        self._set_local(ExperienceBuffer(capacity // group.size, state_dim, action_dim, **options))

    def _set_group(self, where: str, group: Any) -> None:
        if not isinstance(group, Group):
            raise TypeError(f"{where}: group must be an eaml_ext.distributed.Group, got {type(group).__name__}")
        self.group = group

    def _set_local(self, local: ExperienceBuffer) -> None:
        """Set this rank's shard, which must not have been searched: log-weights depend on the stride set here."""
        self.local = local
        local.storage.stride, local.storage.offset = self.group.size, self.group.rank

    def _shard_path(self, where: str, directory: Any) -> Path:
        if not isinstance(directory, (str, os.PathLike)):
            raise TypeError(f"{where}: directory must be a path, got {type(directory).__name__}")
        return Path(directory) / f"rank-{self.group.rank}-of-{self.group.size}"

    @property
    def capacity(self) -> int:
        """Largest number of items over all ranks."""
        return self.local.capacity * self.group.size

    def __repr__(self) -> str:
        return f"ShardedExperienceBuffer(rank {self.group.rank} of {self.group.size}: {self.local!r})"

    def add(self, observation: Any = None, target: Any = None, /, **fields: Any) -> None:
        """Add one item or many to this rank's shard: arguments and errors of :meth:`ExperienceBuffer.add`."""
        self.local.add(observation, target, **fields)

    # ------------------------------------------------------------------------------------------------- searching

    def retrieve(
        self, query_embedding: Tensor, k: int, exclude_task: int | Tensor | Sequence[int] | None = None
    ) -> Experiences:
        """Return the ``k`` experiences of all shards with the context embeddings most similar to the query.

        Collective. Ranks may differ in the number of queries (none: shape ``(0, dim)``), in k and in ``exclude_task``.
        Each rank receives the items for its own queries, nearest first.

        Args:
            query_embedding: ``(dim,)``, or ``(queries, dim)`` for several at once, in the embeddings' dtype, finite.
            k: number of items; fewer are returned if fewer live items are left to search.
            exclude_task: id of a task, or several, whose experiences are left out.

        Returns:
            Experiences of ``min(k, candidates)`` items. Their ``indices`` are ``slot * size + rank`` (see the class);
            ``distances`` is differentiable with respect to this rank's query.

        Raises:
            ValueError: all shards are empty or they store no context_embedding (no task, with ``exclude_task``), an
                argument has another shape or device, or the shards differ in their schema.
            TypeError: an argument has another type or dtype.
            RankError: another rank has died, does not answer, or received an invalid argument. Nothing has been
                modified.
        """
        where = "ShardedExperienceBuffer.retrieve"
        argument_error: Exception | None = None
        request = _Request(torch.empty(0, 0), 0, torch.empty(0, dtype=torch.int64))
        try:
            request = self._request(where, query_embedding, k, exclude_task)
        except (TypeError, ValueError) as error:
            argument_error = error
        numbers = [argument_error is not None, *self._state(), len(request.queries), request.k, len(request.excluded)]
        states = self.group.all_gather(torch.tensor([int(number) for number in numbers]))  # (size, 7)
        if argument_error is not None:
            raise argument_error
        self.group.raise_on_any_rank(where, states[:, _FAILED])
        if self._agree_on_schema(where, states[:, _SCHEMA]):  # the arguments are now checked against the schema
            return self.retrieve(query_embedding, k, exclude_task)
        if not states[:, _LIVE].any():
            raise ValueError(f"{where}: the buffer is empty")
        states[:, _K].clamp_(max=int(states[:, _LIVE].sum()))  # records are allocated for k items
        k = int(states[self.group.rank, _K])

        blocks = self._search(self._gather_requests(request, states))
        records = self._send_back(blocks, len(request.queries), k)
        found = self._merge(request.queries, k, records, states)
        return found if query_embedding.dim() == 2 else found[0]

    def _request(self, where: str, query: Any, k: Any, exclude: Any) -> _Request:
        """Check the arguments, as far as the schema is known."""
        storage = self.local.storage
        columns = storage.columns  # one schema for all checks, even if another thread adds the first item
        storage.check_open(where)
        _check.tensor(where, "query_embedding", query)
        if columns and "context_embedding" not in columns:
            raise ValueError(f"{where}: the buffer stores no context_embedding, only {', '.join(columns)}")
        any_keys = query.new_empty(1, *query.shape[-1:] or (0,))  # used if there is no schema: any query fits them
        k = check_query(where, query, k, columns.get("context_embedding", any_keys), storage.device)
        if exclude is not None and columns and "task" not in columns:
            raise ValueError(f"{where}: the buffer stores no task, only {', '.join(columns)}")
        none = torch.empty(0, dtype=torch.int64)
        ids = none if exclude is None else task_ids(where, exclude, storage.device).flatten().cpu()
        return _Request(query if query.dim() == 2 else query.unsqueeze(0), k, ids)

    def _state(self) -> tuple[int, int, int]:
        """Return the checksum of the schema (-1: there is none), and the numbers of written and of live items."""
        storage = self.local.storage
        with storage.lock:
            return zlib.crc32(self._schema().encode()) if storage.columns else -1, storage.written, len(storage)

    def _schema(self) -> str:
        schema = self.local.storage.schema
        return json.dumps({name: [dtype_name(dtype), list(shape)] for name, (dtype, shape) in sorted(schema.items())})

    def _agree_on_schema(self, where: str, checksums: Tensor) -> bool:
        """Send the schema to the ranks without a schema, and return whether there was such a rank."""
        known = (checksums >= 0).nonzero().flatten().tolist()
        if not known or (checksums == checksums[0]).all():
            return False
        text = self.group.broadcast_object(known[0], self._schema())
        for rank in known:
            if checksums[rank] != checksums[known[0]]:
                other = f"rank {rank} stores other fields, shapes or dtypes than rank {known[0]}"
                raise ValueError(f"{where}: {other}, which has {text}")
        specs = json.loads(text).items()
        schema = {name: FieldSpec(dtype_of_name(where, dtype), tuple(shape)) for name, (dtype, shape) in specs}
        storage = self.local.storage
        with storage.lock:
            if not storage.columns:
                storage.init_columns(schema)
        return True

    def _gather_requests(self, request: _Request, states: Tensor) -> list[_Request]:
        """Return the requests of all ranks, sent as bytes: excluded tasks, queries, zeros up to the longest request."""
        keys = self.local.storage.columns["context_embedding"]
        query_bytes = keys.shape[1] * keys.element_size()
        sizes = states[:, _QUERIES] * query_bytes + states[:, _EXCLUDED] * 8
        mine = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        queries = request.queries.detach().cpu()
        data = torch.cat(
            [_records.to_bytes(request.excluded.unsqueeze(0)).flatten(), _records.to_bytes(queries).flatten()]
        )
        mine[: len(data)] = data
        requests = []
        for part, (count, k, ids) in zip(
            self.group.all_gather(mine), states[:, [_QUERIES, _K, _EXCLUDED]].tolist(), strict=True
        ):
            tasks = _records.from_bytes(part[: ids * 8], torch.int64, (ids,))
            body = part[ids * 8 : ids * 8 + count * query_bytes]
            rank_queries = _records.from_bytes(body, keys.dtype, (count, keys.shape[1]))
            requests.append(_Request(rank_queries.to(keys.device), k, tasks.to(keys.device)))
        return requests

    def _search(self, requests: list[_Request]) -> list[Tensor]:
        """Return this shard's candidates for each rank, ``(queries, k, bytes of a record)``."""
        blocks: dict[int, Tensor] = {}
        same_search: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for rank, request in enumerate(requests):
            same_search.setdefault((request.k, tuple(request.excluded.tolist())), []).append(rank)
        for (k, _), ranks in same_search.items():  # one search; results do not depend on the other queries
            queries, tasks = torch.cat([requests[rank].queries for rank in ranks]), requests[ranks[0]].excluded
            block = self._candidates(queries, k, tasks)
            for rank, part in zip(ranks, block.split([len(requests[rank].queries) for rank in ranks]), strict=True):
                blocks[rank] = part
        return [blocks[rank] for rank in range(len(requests))]

    @torch.no_grad()
    def _candidates(self, queries: Tensor, k: int, tasks: Tensor) -> Tensor:
        """Return the k nearest items of this shard as records, followed by empty ones if there are fewer."""
        storage = self.local.storage
        records = _records.empty_records(len(queries), k, storage.schema)
        with storage.lock:
            if len(storage) and len(queries):
                found = self.local.retrieve(queries, k, tasks if len(tasks) else None)
                indices = found.indices * self.group.size + self.group.rank
                records[:, : indices.shape[1]] = _records.encode(found, indices, storage.schema)
        return records

    def _send_back(self, blocks: list[Tensor], count: int, k: int) -> Tensor:
        """Return all ranks' candidates for this rank's queries: ``(queries, size * k, bytes of a record)``."""
        size, width = self.group.size, blocks[0].shape[-1]
        flat = torch.cat([block.reshape(-1) for block in blocks])
        received = self.group.all_to_all(flat, [block.numel() for block in blocks], [count * k * width] * size)
        return received.view(size, count, k, width).transpose(0, 1).reshape(count, size * k, width)

    def _merge(self, queries: Tensor, k: int, records: Tensor, states: Tensor) -> Experiences:
        """Return the k best candidates by (distance, index): kNN orders ties by position, and records by index."""
        from eaml_ext.ops import knn  # here, because importing the ops takes seconds

        local, storage, size, count = self.local, self.local.storage, self.group.size, len(records)
        found = _records.decode(records, storage.schema, local.device)
        indices, generations, fields = found.indices, found.generations, found.fields
        valid = indices >= 0
        k = min(k, int(valid[0].sum()) if count else int(states[:, _LIVE].sum()))
        # For equal rounding, the origin is that of KeyIndex in one buffer of the whole capacity: the first item of the
        # current pass around the ring. It is the largest over ranks, because some may have added fewer items.
        written = states[:, _WRITTEN]
        origin = int((written - written % local.capacity).max()) * size
        newest = int(((written - 1) * size + torch.arange(size)).max())
        bias = None
        if has_weights(storage.columns, local.age_half_life):
            slots = indices.div(size, rounding_mode="floor")
            numbers = (generations * storage.num_slots + slots) * size + indices % size
            priority = fields["priority"].masked_fill(~valid, 1.0) if "priority" in fields else None
            bias = log_weights(priority, numbers - origin, local.age_half_life).to(queries.dtype)
        if k == 0:
            values, chosen = queries.new_zeros(count, 0), indices.new_zeros((count, 0))
        else:
            keys = fields["context_embedding"]
            best = knn(queries.unsqueeze(1), keys, k, metric=local.metric, valid=valid, bias=bias)
            values, chosen = (x.squeeze(1) for x in best)
            if local.metric == "cosine":
                values = 1 - values
            if local.age_half_life is not None:
                values = values + age_cost(newest - origin, local.age_half_life)
        row = torch.arange(count, device=local.device).unsqueeze(1)
        fields = {name: value[row, chosen] for name, value in fields.items()}
        if storage.ragged:
            fields = _ragged.trimmed(fields, storage.ragged)
        return Experiences(fields, indices[row, chosen], generations[row, chosen], values, storage.ragged)

    # ------------------------------------------------------------------------------------------------- storing

    def state_dict(self) -> dict[str, Any]:
        """Return :meth:`ExperienceBuffer.state_dict` of this rank's shard, with the entries ``rank`` and ``size``."""
        return {**self.local.state_dict(), "rank": self.group.rank, "size": self.group.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state that :meth:`state_dict` returned on the same rank of a group of the same size.

        Raises:
            ValueError: it is the state of another rank, or as of :meth:`ExperienceBuffer.load_state_dict`.
        """
        where = "ShardedExperienceBuffer.load_state_dict"
        if not isinstance(state, dict) or not {"rank", "size"} <= set(state):
            raise ValueError(f"{where}: state must be a dict as state_dict returns it, with the entries rank and size")
        state = dict(state)
        rank, size, group = state.pop("rank"), state.pop("size"), self.group
        if (rank, size) != (group.rank, group.size):
            raise ValueError(f"{where}: state is of rank {rank} of {size}, this is rank {group.rank} of {group.size}")
        self.local.load_state_dict(state)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write this rank's shard to a file (safetensors) in ``directory``, which is created if needed, atomically.

        Raises:
            TypeError: ``directory`` is not a path.
        """
        path = self._shard_path("ShardedExperienceBuffer.save", directory).with_suffix(".safetensors")
        os.makedirs(path.parent, exist_ok=True)
        checkpoint.save_state(
            path, {"options": BufferOptions.of(self.local)._asdict(), "state": self.state_dict()}, kind=_KIND
        )

    @classmethod
    def load(
        cls, directory: str | os.PathLike[str], group: Group, device: torch.device | str = "cpu"
    ) -> ShardedExperienceBuffer:
        """Return the buffer that :meth:`save` wrote on the same number of ranks, in memory.

        No code in the file is executed.

        Raises:
            TypeError: ``directory`` is not a path, or ``group`` no Group.
            FileNotFoundError: there is no file of this rank and number of ranks.
            ValueError: the file is damaged or holds something else.
        """
        buffer = cls.__new__(cls)
        buffer._set_group("ShardedExperienceBuffer.load", group)
        path = buffer._shard_path("ShardedExperienceBuffer.load", directory).with_suffix(".safetensors")
        content = checkpoint.load_state(path, kind=_KIND)
        with checkpoint.content_errors("ShardedExperienceBuffer.load", path):
            options = BufferOptions.from_file(content["options"])
            buffer._set_local(ExperienceBuffer(**options._asdict(), device=device, seed=0))
            buffer.load_state_dict(content["state"])
        return buffer

    @classmethod
    def open(cls, directory: str | os.PathLike[str], group: Group) -> ShardedExperienceBuffer:
        """Return the buffer made with this ``directory`` by the same number of ranks, each shard as of its last flush.

        Raises: as :meth:`ExperienceBuffer.open`, and TypeError for a ``group`` that is no Group.
        """
        buffer = cls.__new__(cls)
        buffer._set_group("ShardedExperienceBuffer.open", group)
        buffer._set_local(ExperienceBuffer.open(buffer._shard_path("ShardedExperienceBuffer.open", directory)))
        return buffer
