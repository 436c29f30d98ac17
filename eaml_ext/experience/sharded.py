"""An ExperienceBuffer in shards, one on each rank: written where one is, searched everywhere at once."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eaml_ext import _check, checkpoint
from eaml_ext.distributed import Group
from eaml_ext.experience.buffer import ExperienceBuffer, _dtype, _known, _short
from eaml_ext.experience.experiences import Experiences

_KIND = "ShardedExperienceBuffer"
_FAILED, _SCHEMA, _WRITTEN, _LIVE, _QUERIES, _K, _EXCLUDED = range(7)  # what ranks tell each other before a search


class ShardedExperienceBuffer:
    """A memory of ``capacity`` experiences over the ranks of a group, searched as one.

    :meth:`add` writes to this rank's shard, a ring of ``capacity / size`` items, and sends nothing. :meth:`retrieve`
    is collective: all ranks call it, each with queries of its own; the queries go to all ranks, each searches its
    shard exactly, the k candidates of each come back with their fields, and are merged.

    *One big buffer.* Item s of rank r is item ``s * size + r`` of all: what ranks add is interleaved, whenever they add
    it. Its place, by which ties are ordered and which ``indices`` tell, is that of one ExperienceBuffer of the whole
    capacity, ``slot * size + r`` (of slot ``indices // size`` on rank ``indices % size``), its generation too. So while
    all ranks have added alike many items, a search finds the same items with the same bits as in that buffer, ties,
    ring, priorities and age included. With different numbers of items a rank's ring drops that rank's oldest; a search
    then finds what one buffer with all live items in the order of their places finds, and with ``age_half_life`` the
    age of an item is the number of places between it and the newest item of all ranks, weights being rounded by the
    turn of their own ring.

    *Tasks* are known by their ids across ranks: ``exclude_task=3`` leaves out task 3 of all shards.

    The first add on any rank fixes the schema of all; a rank that has added nothing learns it at the next search.
    Calls that are not collective may come from several threads, collective ones from one.

    Args:
        capacity: how many items fit, over all ranks: a multiple of their number.
        group: the ranks.
        directory: a memory on disk: each rank's files go to ``directory/rank-<rank>-of-<size>``. A ring on disk has
            spare slots (see ExperienceBuffer), so that items at equal distances may come in another order.
        state_dim, action_dim, device, seed, metric, age_half_life: as of :class:`ExperienceBuffer`; ``age_half_life``
            counts the items of all ranks. All but ``device`` and ``seed`` alike on all ranks.

    Attributes:
        local: this rank's shard, an ExperienceBuffer: ``get_batch``, ``set_priority``, ``flush`` and so on are its own.

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
    ):
        where = "ShardedExperienceBuffer"
        self._join(where, group)
        capacity = _check.positive(where, "capacity", capacity, integer=True)
        if capacity % group.size:
            raise ValueError(f"{where}: capacity must be a multiple of the {group.size} ranks, got {capacity}")
        options: dict[str, Any] = {"metric": metric, "age_half_life": age_half_life, "device": device, "seed": seed}
        if directory is not None:
            options["directory"] = self._folder(where, directory)
        self._own(ExperienceBuffer(capacity // group.size, state_dim, action_dim, **options))

    def _join(self, where: str, group: Any) -> None:
        if not isinstance(group, Group):
            raise TypeError(f"{where}: group must be an eaml_ext.distributed.Group, got {type(group).__name__}")
        self.group = group

    def _own(self, local: ExperienceBuffer) -> None:
        self.local = local
        local._stride, local._offset = self.group.size, self.group.rank
        if local._index is not None and local._weighted:
            local._reweigh()

    def _name(self) -> str:
        return f"{self.group.rank}-of-{self.group.size}"

    def _folder(self, where: str, directory: Any) -> Path:
        if not isinstance(directory, (str, os.PathLike)):
            raise TypeError(f"{where}: directory must be a path, got {type(directory).__name__}")
        return Path(directory) / f"rank-{self._name()}"

    @property
    def capacity(self) -> int:
        """Of all ranks together."""
        return self.local.capacity * self.group.size

    def __repr__(self) -> str:
        return f"ShardedExperienceBuffer(rank {self.group.rank} of {self.group.size}: {self.local!r})"

    # ------------------------------------------------------------------------------------------------- writing

    def add(self, observation: Any = None, target: Any = None, /, **fields: Any) -> None:
        """Add one item or many to this rank's shard: arguments and errors of :meth:`ExperienceBuffer.add`."""
        self.local.add(observation, target, **fields)

    # ------------------------------------------------------------------------------------------------- searching

    def retrieve(
        self, query_embedding: Tensor, k: int, exclude_task: int | Tensor | Sequence[int] | None = None
    ) -> Experiences:
        """The ``k`` experiences of all shards whose context embeddings are most similar to the query, nearest first.

        Collective. Each rank may bring another number of queries (also none, shape ``(0, dim)``), another k, and other
        tasks to leave out, and gets what belongs to its own queries.

        Args:
            query_embedding, k, exclude_task: as of :meth:`ExperienceBuffer.retrieve`.

        Returns:
            Experiences of ``min(k, candidates)`` items; ``indices`` are places among all ranks (see the class);
            ``distances`` is differentiable with respect to this rank's query.

        Raises:
            ValueError: all shards are empty or they store no context_embedding (no task, with ``exclude_task``), an
                argument has another shape or device, or the shards differ in their schema.
            TypeError: an argument has another type or dtype.
            RankError: another rank has died, does not answer, or was given a bad argument. Nothing has been modified.
        """
        where = "ShardedExperienceBuffer.retrieve"
        refused: Exception | None = None
        queries, excluded = torch.empty(0, 0), torch.empty(0, dtype=torch.int64)
        try:
            queries, k, excluded = self._request(where, query_embedding, k, exclude_task)
        except (TypeError, ValueError) as error:
            refused, k = error, 0
        told = self._tell([refused is not None, *self._state(), len(queries), k, len(excluded)])
        if refused is not None:
            raise refused
        self.group.raise_on_any_rank(where, told[:, _FAILED])
        if self._agree_on_schema(where, told[:, _SCHEMA]):
            return self.retrieve(query_embedding, k, exclude_task)
        if not told[:, _LIVE].any():
            raise ValueError(f"{where}: the buffer is empty")
        told[:, _K].clamp_(max=int(told[:, _LIVE].sum()))  # more there are not: records must not be allocated for them
        k = int(told[self.group.rank, _K])

        requests = self._exchange(queries.detach(), excluded, told)
        blocks = self._search(requests)
        records = self._send_back(blocks, len(queries), k)
        found = self._merge(queries, k, records, told)
        return found if query_embedding.dim() == 2 else found[0]

    def _request(self, where: str, query: Any, k: Any, exclude: Any) -> tuple[Tensor, int, Tensor]:
        """The queries, ``(queries, dim)``, k, and the tasks to leave out, checked as far as the schema is known."""
        local, store = self.local, self.local._store  # one schema for all checks, whatever other threads add meanwhile
        local._check_open(where)
        _check.tensor(where, "query_embedding", query)
        if store and "context_embedding" not in store:
            raise ValueError(f"{where}: the buffer stores no context_embedding, only {', '.join(store)}")
        any_query = query.new_empty(1, *query.shape[-1:] or (0,))  # as long as there is no schema
        k = local._check_query(where, query, k, store.get("context_embedding", any_query))
        if exclude is not None and store and "task" not in store:
            raise ValueError(f"{where}: the buffer stores no task, only {', '.join(store)}")
        none = torch.empty(0, dtype=torch.int64)
        ids = none if exclude is None else local._task_ids(where, exclude).flatten().cpu()
        return query if query.dim() == 2 else query.unsqueeze(0), k, ids

    def _state(self) -> tuple[int, int, int]:
        local = self.local
        with local._lock:
            return zlib.crc32(self._schema().encode()) if local._store else -1, local._written, len(local)

    def _schema(self) -> str:
        return json.dumps({n: [_short(v.dtype), list(v.shape[1:])] for n, v in sorted(self.local._store.items())})

    def _tell(self, numbers: Sequence[int]) -> Tensor:
        """``(size, len(numbers))``, those of each rank."""
        return self.group.all_gather(torch.tensor([int(n) for n in numbers]))

    def _agree_on_schema(self, where: str, sums: Tensor) -> bool:
        """Teach the schema to ranks that have none; whether there were any."""
        known = (sums >= 0).nonzero().flatten().tolist()
        if not known or (sums == sums[0]).all():
            return False
        text = self.group.broadcast_object(known[0], self._schema())
        for rank in known:
            if sums[rank] != sums[known[0]]:
                other = f"rank {rank} stores other fields, shapes or dtypes than rank {known[0]}"
                raise ValueError(f"{where}: {other}, which has {text}")
        schema = {n: (_dtype(where, dtype), tuple(shape)) for n, (dtype, shape) in json.loads(text).items()}
        with self.local._lock:
            if not self.local._store:
                self.local._begin(schema)
        return True

    def _exchange(self, queries: Tensor, excluded: Tensor, told: Tensor) -> list[tuple[Tensor, int, Tensor]]:
        """Queries, k, and tasks to leave out, of every rank."""
        keys = self.local._store["context_embedding"]
        row = keys.shape[1] * keys.element_size()
        sizes = told[:, _QUERIES] * row + told[:, _EXCLUDED] * 8
        mine = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        both = torch.cat([_bytes(excluded.unsqueeze(0)).flatten(), _bytes(queries.cpu()).flatten()])
        mine[: len(both)] = both
        requests = []
        for part, (count, k, ids) in zip(
            self.group.all_gather(mine), told[:, [_QUERIES, _K, _EXCLUDED]].tolist(), strict=True
        ):
            tasks = _numbers(part[: ids * 8], torch.int64, (ids,))
            body = _numbers(part[ids * 8 : ids * 8 + count * row], keys.dtype, (count, keys.shape[1]))
            requests.append((body.to(keys.device), k, tasks.to(keys.device)))
        return requests

    def _search(self, requests: list[tuple[Tensor, int, Tensor]]) -> list[Tensor]:
        """This shard's candidates for each rank, ``(queries, k, bytes of a record)``; index -1: there are fewer."""
        blocks: list[Any] = [None] * len(requests)
        alike: dict[Any, list[int]] = {}
        for rank, (_, k, tasks) in enumerate(requests):
            alike.setdefault((k, tuple(tasks.tolist())), []).append(rank)
        for (k, _), ranks in alike.items():  # what can be searched at once: the bits do not depend on it
            queries, tasks = torch.cat([requests[rank][0] for rank in ranks]), requests[ranks[0]][2]
            block = self._encode(queries, k, tasks)
            for rank, part in zip(ranks, block.split([len(requests[rank][0]) for rank in ranks]), strict=True):
                blocks[rank] = part
        return blocks

    @torch.no_grad()
    def _encode(self, queries: Tensor, k: int, tasks: Tensor) -> Tensor:
        local, size = self.local, self.group.size
        width = sum(_width(v) for v in local._store.values()) + 16
        block = torch.zeros(len(queries), k, width, dtype=torch.uint8)
        block[..., :16] = _bytes(torch.tensor([-1, 0]))
        with local._lock:
            if not len(local) or not len(queries):
                return block
            found = local.retrieve(queries, k, tasks if len(tasks) else None)
        place = torch.stack([found.indices * size + self.group.rank, found.generations], dim=-1)
        columns = [place, *(found.fields[name] for name in sorted(local._store))]
        flat = [column.reshape(*column.shape[:2], math.prod(column.shape[2:])) for column in columns]
        block[:, : place.shape[1]] = torch.cat([_bytes(column) for column in flat], dim=-1).cpu()
        return block

    def _send_back(self, blocks: list[Tensor], count: int, k: int) -> Tensor:
        """All ranks' candidates for this rank's queries: ``(queries, size * k, bytes of a record)``."""
        size, width = self.group.size, blocks[0].shape[-1]
        flat = torch.cat([block.reshape(-1) for block in blocks])
        came = self.group.all_to_all(flat, [block.numel() for block in blocks], [count * k * width] * size)
        return came.view(size, count, k, width).transpose(0, 1).reshape(count, size * k, width)

    def _merge(self, queries: Tensor, k: int, records: Tensor, told: Tensor) -> Experiences:
        """The k best by (value, place): the op itself over the candidates in the order of their places."""
        from eaml_ext.ops import knn  # here, because the ops bring the compiler along, seconds of import

        local, size, (count, wide) = self.local, self.group.size, records.shape[:2]
        places = _numbers(records[..., :8], torch.int64, (count, wide))
        last = torch.iinfo(torch.int64).max
        order = torch.where(places < 0, last, places).argsort(dim=1)  # places differ, but those of -1
        records = records.gather(1, order.unsqueeze(-1).expand_as(records)).to(local.device)
        place = _numbers(records[..., :16], torch.int64, (count, wide, 2))
        indices, generations = place[..., 0], place[..., 1]
        fields, start = {}, 16
        for name, store in sorted(local._store.items()):
            stop = start + _width(store)
            fields[name] = _numbers(records[..., start:stop], store.dtype, (count, wide, *store.shape[1:]))
            start = stop
        valid = indices >= 0
        k = min(k, int(valid[0].sum()) if count else int(told[:, _LIVE].sum()))
        fields = {name: fields[name] for name in local._store}
        # Age is counted from a turn of the ring, as one big buffer counts it; a shard's own ring may be one behind.
        turn = local.capacity
        origin = int((told[:, _WRITTEN] - told[:, _WRITTEN] % turn).max()) * size
        newest = int(((told[:, _WRITTEN] - 1) * size + torch.arange(size)).max())
        bias = None
        if local._weighted:
            slots = indices.div(size, rounding_mode="floor")
            numbers = (generations * local._slots + slots) * size + indices % size
            priority = fields["priority"].masked_fill(~valid, 1.0) if "priority" in fields else None
            bias = local._log_weights_of(priority, numbers - origin).to(queries.dtype)
        if k == 0:
            values, chosen = queries.new_zeros(count, 0), places.new_zeros((count, 0)).to(local.device)
        else:
            keys = fields["context_embedding"]
            options: dict[str, Any] = {"metric": local.metric, "valid": valid, "bias": bias}
            values, chosen = (x.squeeze(1) for x in knn(queries.unsqueeze(1), keys, k, **options))
            if local.metric == "cosine":
                values = 1 - values
            if local.age_half_life is not None:
                values = values + (newest - origin) * (math.log(2) / local.age_half_life)
        row = torch.arange(count, device=local.device).unsqueeze(1)
        fields = {name: value[row, chosen] for name, value in fields.items()}
        return Experiences(fields, indices[row, chosen], generations[row, chosen], values)

    # ------------------------------------------------------------------------------------------------- keeping

    def state_dict(self) -> dict[str, Any]:
        """Of this rank's shard, as :meth:`ExperienceBuffer.state_dict`, and which one it is."""
        return {**self.local.state_dict(), "rank": self.group.rank, "size": self.group.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned on the same rank of as many.

        Raises:
            ValueError: it is another rank's, or as of :meth:`ExperienceBuffer.load_state_dict`.
        """
        where = "ShardedExperienceBuffer.load_state_dict"
        if not isinstance(state, dict) or not {"rank", "size"} <= set(state):
            raise ValueError(f"{where}: state must be a dict as state_dict returns it, with the entries rank and size")
        state = dict(state)
        came, mine = (state.pop("rank"), state.pop("size")), (self.group.rank, self.group.size)
        if came != mine:
            raise ValueError(f"{where}: state is of rank {came[0]} of {came[1]}, this is rank {mine[0]} of {mine[1]}")
        self.local.load_state_dict(state)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write this rank's shard to a file (safetensors) in ``directory``, atomically; it is made if need be.

        Raises:
            TypeError: ``directory`` is not a path.
        """
        path = self._folder("ShardedExperienceBuffer.save", directory).with_suffix(".safetensors")
        os.makedirs(path.parent, exist_ok=True)
        checkpoint.save_state(path, {"options": self.local._options(), "state": self.state_dict()}, kind=_KIND)

    @classmethod
    def load(
        cls, directory: str | os.PathLike[str], group: Group, device: torch.device | str = "cpu"
    ) -> ShardedExperienceBuffer:
        """The buffer whose shards :meth:`save` wrote, on as many ranks, in memory. Loading never runs code.

        Raises:
            TypeError: ``directory`` is not a path, or ``group`` no Group.
            FileNotFoundError: there is no file of this rank of as many.
            ValueError: the file is damaged or holds something else.
        """
        buffer = cls.__new__(cls)
        buffer._join("ShardedExperienceBuffer.load", group)
        path = buffer._folder("ShardedExperienceBuffer.load", directory).with_suffix(".safetensors")
        content = checkpoint.load_state(path, kind=_KIND)
        with checkpoint.sound("ShardedExperienceBuffer.load", path):
            buffer._own(ExperienceBuffer(**_known(content["options"]), device=device, seed=0))
            buffer.load_state_dict(content["state"])
        return buffer

    @classmethod
    def open(cls, directory: str | os.PathLike[str], group: Group) -> ShardedExperienceBuffer:
        """The buffer that was made with this ``directory`` by as many ranks, each shard as at its last flush.

        Raises: as :meth:`ExperienceBuffer.open`, and TypeError for a ``group`` that is no Group.
        """
        buffer = cls.__new__(cls)
        buffer._join("ShardedExperienceBuffer.open", group)
        buffer._own(ExperienceBuffer.open(buffer._folder("ShardedExperienceBuffer.open", directory)))
        return buffer


def _width(store: Tensor) -> int:
    """Bytes of an item of a field."""
    return store.element_size() * math.prod(store.shape[1:])


def _bytes(numbers: Tensor) -> Tensor:
    """Numbers, with a last dimension, as bytes."""
    if numbers.numel():
        return numbers.contiguous().view(torch.uint8)
    return numbers.new_empty((*numbers.shape[:-1], numbers.shape[-1] * numbers.element_size()), dtype=torch.uint8)


def _numbers(bytes_: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Bytes as numbers of their own memory."""
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype, device=bytes_.device)
    return bytes_.clone(memory_format=torch.contiguous_format).view(dtype).view(shape)
