"""Which experience to adapt on: the strategies, each a maker of ``retriever(buffer, batch) -> dict | None``.

A retriever looks at the buffer and at the batch that the Adapter was given and returns ``{"states", "targets"}``, or
None when it has nothing to offer; with ``"weights"`` ``(n,)`` too, the items count in that proportion. ``states`` and
``targets`` of the makers go to ``Experiences.batch``. Experiences of ``batch["task"]``, where it is given, are left out
by all but ``uniform``. A retriever returns one state of the buffer, whatever other threads write meanwhile. It can be
pickled if its selectors can.

=================  ==================================================================================================
``uniform``        all experience is of one kind, or as the control variant
``nearest``        the context embedding tells tasks apart
``attention``      it does, but how many stored items are relevant differs from query to query
``ivf``   it does, and the memory is so large that comparing with all of it takes too long
``best_fit``       it does not, but a model adapted to a past task recognises the data
=================  ==================================================================================================
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from eaml_ext import _check
from eaml_ext.experience._schema import task_ids
from eaml_ext.experience.buffer import ExperienceBuffer
from eaml_ext.experience.experiences import Experiences, Selector, check_temperature
from eaml_ext.experience.ivf import InvertedFile

Retriever = Callable[[ExperienceBuffer, Mapping[str, Any]], "dict[str, Tensor] | None"]


def uniform(
    n: int, *, weighted: bool = False, states: Selector | None = None, targets: Selector | None = None
) -> Retriever:
    """``n`` experiences at random, ``weighted`` by priority and age where asked.

    Helps when what was met before is what is met now: one task, few data at a time. Where tasks differ it tends to
    hurt, which makes it the control variant.

    >>> import torch
    >>> buffer = ExperienceBuffer(100)
    >>> buffer.add(torch.randn(10, 4), torch.randn(10, 1))
    >>> uniform(3)(buffer, {})["states"].shape
    torch.Size([3, 4])
    """
    n = _check.positive("retrieval.uniform", "n", n, integer=True)
    _check.flag("retrieval.uniform", "weighted", weighted)
    return partial(_uniform, n=n, weighted=weighted, states=states, targets=targets)


def _uniform(
    buffer: ExperienceBuffer,
    batch: Mapping[str, Any],
    *,
    n: int,
    weighted: bool,
    states: Selector | None,
    targets: Selector | None,
) -> dict[str, Tensor] | None:
    with buffer.storage.lock:
        found = buffer.get_batch(n, weighted=weighted) if len(buffer) else None
    return None if found is None else found.batch(states, targets)


def nearest(k: int, *, states: Selector | None = None, targets: Selector | None = None) -> Retriever:
    """The ``k`` experiences with the context embeddings nearest to ``batch["context_embedding"]``.

    Helps when the embedding tells tasks apart.

    >>> import torch
    >>> buffer = ExperienceBuffer(100)
    >>> buffer.add(torch.eye(3), torch.arange(3.0).unsqueeze(1), context_embedding=torch.eye(3))
    >>> nearest(1)(buffer, {"context_embedding": torch.tensor([0.0, 0.1, 0.9])})["targets"]
    tensor([[2.]])
    """
    k = _check.positive("retrieval.nearest", "k", k, integer=True)
    return partial(_nearest, where="retrieval.nearest", k=k, temperature=None, states=states, targets=targets)


def _nearest(
    buffer: ExperienceBuffer,
    batch: Mapping[str, Any],
    *,
    where: str,
    k: int,
    temperature: float | None,
    states: Selector | None,
    targets: Selector | None,
) -> dict[str, Tensor] | None:
    query = _query(where, batch)
    with buffer.storage.lock:
        found = buffer.retrieve(query, k, exclude_task=batch.get("task")) if len(buffer) else None
    if not found:
        return None
    pairs = found.batch(states, targets)
    return pairs if temperature is None else {**pairs, "weights": found.attention(temperature)}


def attention(
    k: int, temperature: float = 1.0, *, states: Selector | None = None, targets: Selector | None = None
) -> Retriever:
    """The ``k`` nearest experiences, each with a weight: ``softmax(-distances / temperature)``.

    Helps when how many stored items are relevant differs from query to query: ``k`` may then be generous, what is far
    counts for nothing. ``temperature`` is in units of the metric, about the distance between the embeddings of what
    belongs together.

    Returned are the pairs with their weights and not one averaged pair: a mean of states with the mean of their targets
    is no sample of any task, unless the tasks are linear. The Adapter weighs the loss of each pair. The weights are
    differentiable with respect to ``batch["context_embedding"]``, for those who train the embedding through them;
    :meth:`Experiences.read` is the weighted mean itself.

    >>> import torch
    >>> buffer = ExperienceBuffer(100)
    >>> buffer.add(torch.eye(3), torch.eye(3), context_embedding=torch.tensor([[0.0], [1.0], [9.0]]))
    >>> found = attention(3)(buffer, {"context_embedding": torch.tensor([0.0])})
    >>> [round(w, 2) for w in found["weights"].tolist()]
    [0.73, 0.27, 0.0]
    """
    where = "retrieval.attention"
    k = _check.positive(where, "k", k, integer=True)
    temperature = check_temperature(where, temperature)
    return partial(_nearest, where=where, k=k, temperature=temperature, states=states, targets=targets)


class ivf:
    """The ``k`` nearest experiences, sought in the ``nprobe`` lists nearest to the query only.

    The embeddings are parted into lists around centroids found by k-means; a search compares the query with the
    centroids, then exactly with what stands in the nearest lists. Helps when the memory is large: with the default
    number of lists one search looks at about ``2 · sqrt(nprobe · n)`` of n embeddings. What it misses is what stands
    beyond a border of lists; :meth:`recall` says how much that is. Where the probed lists hold fewer than ``k``
    candidates, or most of the memory, all of it is searched.

    Items added since the lists were made are searched one and all, until they are a tenth of the memory and are put
    into lists too; when all have been replaced, the lists are made anew. That search then takes long (k-means).

    Each buffer that is searched has its own lists, which live as long as the buffer. They depend on ``seed`` and the
    stored items alone, also in a DataLoader worker. A copied or pickled retriever makes new lists at its first search.

    Args:
        k: how many experiences.
        nprobe: how many lists are searched; None: all, which is exact (and plain ``nearest``).
        nlist: how many there are; None: ``sqrt(nprobe · n)``, which balances the two comparisons.
        seed: of k-means' first centroids.
        states, targets: go to ``Experiences.batch``.

    Source: inverted files, Jégou et al., "Product quantization for nearest neighbor search", 2011, section IV.

    >>> import torch
    >>> buffer = ExperienceBuffer(10_000)
    >>> places = torch.randn(50, 8).repeat(200, 1)  # embeddings come in clusters, as those of tasks do
    >>> x = places + 0.05 * torch.randn(10_000, 8)
    >>> buffer.add(x, x, context_embedding=x)
    >>> retriever = ivf(10, nprobe=4)
    >>> retriever(buffer, {"context_embedding": x[0]})["states"].shape
    torch.Size([10, 8])
    >>> retriever.recall(buffer, x[:100]) > 0.9
    True
    """

    def __init__(
        self,
        k: int,
        nprobe: int | None = 8,
        *,
        nlist: int | None = None,
        seed: int = 0,
        states: Selector | None = None,
        targets: Selector | None = None,
    ):
        where = "retrieval.ivf"
        self.k = _check.positive(where, "k", k, integer=True)
        self.states, self.targets = states, targets
        if nprobe is not None:
            nprobe = _check.positive(where, "nprobe", nprobe, integer=True)
        if nlist is not None:
            nlist = _check.positive(where, "nlist", nlist, integer=True)
        seed = _check.positive(where, "seed", seed, integer=True, zero=True)
        seed = _check.integer(where, "seed", seed, 0, 2**128)
        self._inverted_file = None if nprobe is None else InvertedFile(nprobe, nlist, seed)

    def __call__(self, buffer: ExperienceBuffer, batch: Mapping[str, Any]) -> dict[str, Tensor] | None:
        query = _query("retrieval.ivf", batch)
        with buffer.storage.lock:
            found = self.search(buffer, query, batch.get("task")) if len(buffer) else None
        return found.batch(self.states, self.targets) if found else None

    def search(self, buffer: ExperienceBuffer, query_embedding: Tensor, exclude_task: Any = None) -> Experiences:
        """As :meth:`ExperienceBuffer.retrieve`; several queries share the lists that any of them probes.

        Where these make up more than a quarter of the memory all of it is searched, which is faster then.
        """
        if self._inverted_file is None:
            return buffer.retrieve(query_embedding, self.k, exclude_task)
        with buffer.storage.lock:
            among = self._inverted_file.candidates(buffer, query_embedding)
            if 4 * len(among) <= len(buffer):
                found = buffer.retrieve(query_embedding, self.k, exclude_task, among=among)
                if found.indices.shape[-1] == self.k:
                    return found
            return buffer.retrieve(query_embedding, self.k, exclude_task)

    def recall(self, buffer: ExperienceBuffer, queries: Tensor) -> float:
        """The share of the ``k`` nearest experiences that :meth:`search` finds, each query by itself.

        ``queries`` is ``(n, dim)``: embeddings such as will be asked for.

        Raises:
            ValueError, TypeError: as :meth:`ExperienceBuffer.retrieve`, or there are no queries.
        """
        _check.tensor("retrieval.ivf.recall", "queries", queries)
        if queries.dim() != 2 or not len(queries):
            got = tuple(queries.shape)
            raise ValueError(f"retrieval.ivf.recall: queries must have shape (n, dim) with n > 0, got {got}")
        with buffer.storage.lock:
            exact = buffer.retrieve(queries, self.k).indices
            found = [self.search(buffer, query).indices for query in queries]
        hits = sum(int(torch.isin(wanted, got).sum()) for wanted, got in zip(exact, found, strict=True))
        return hits / exact.numel()


def best_fit(
    score_fn: Callable[[ExperienceBuffer, Tensor, Mapping[str, Any]], Tensor],
    num_tasks: int = 5,
    *,
    states: Selector | None = None,
    targets: Selector | None = None,
) -> Retriever:
    """All experiences of the ``num_tasks`` past tasks that explain the batch best.

    Args:
        score_fn: ``(buffer, tasks, batch) -> (len(tasks),)``, the loss on the batch of a model adapted to each of
            the tasks (int64 ids); the smallest finite ones win. One is ``eaml_ext.meta.AdaptedTaskModels``.
            Other threads may overwrite tasks while it runs: those are left out, and a ValueError that it raises
            because of them is followed by a call with the remaining tasks.
        num_tasks: how many tasks to take.

    Helps when few noisy data say little by themselves but enough to recognise a task met before, and no embedding
    is at hand that does.

    >>> import torch
    >>> buffer = ExperienceBuffer(100)
    >>> for task, slope in enumerate((1.0, -2.0, 3.0)):
    ...     x = torch.linspace(-1, 1, 4).unsqueeze(1)
    ...     buffer.add(x, slope * x, task=task)
    >>> def score(buffer, tasks, batch):
    ...     slopes = [(e.target / e.observation).mean() for e in map(buffer.of_task, tasks.tolist())]
    ...     return torch.stack([((slope * batch["states"] - batch["targets"]) ** 2).mean() for slope in slopes])
    >>> now = {"states": torch.ones(2, 1), "targets": torch.full((2, 1), 2.8)}
    >>> batch = best_fit(score, num_tasks=1)(buffer, now)
    >>> (batch["targets"] / batch["states"]).mean()
    tensor(3.)
    """
    if not callable(score_fn):
        raise TypeError(f"retrieval.best_fit: score_fn must be callable, got {type(score_fn).__name__}")
    num_tasks = _check.positive("retrieval.best_fit", "num_tasks", num_tasks, integer=True)
    return partial(_best_fit, score_fn=score_fn, num_tasks=num_tasks, states=states, targets=targets)


def _best_fit(
    buffer: ExperienceBuffer,
    batch: Mapping[str, Any],
    *,
    score_fn: Callable[[ExperienceBuffer, Tensor, Mapping[str, Any]], Tensor],
    num_tasks: int,
    states: Selector | None,
    targets: Selector | None,
) -> dict[str, Tensor] | None:
    where = "retrieval.best_fit"
    with buffer.storage.lock:
        tasks, own = _stored_tasks(buffer), batch.get("task")
        if own is not None and len(tasks):
            own = own.to(tasks.device) if isinstance(own, Tensor) else own
            tasks = tasks[~torch.isin(tasks, task_ids(where, own, tasks.device, "the task of the batch"))]
    while True:  # each round has fewer tasks
        if not len(tasks):
            return None
        try:  # without the lock, because score_fn may start threads that read buffers, or wait for a fork
            scores = score_fn(buffer, tasks, batch)
            break
        except ValueError:
            kept = tasks[torch.isin(tasks, _stored_tasks(buffer))]
            if len(kept) == len(tasks):
                raise
            tasks = kept
    _check.tensor(where, "what score_fn returns", scores)
    _check.shape(where, "what score_fn returns", scores, tasks.shape, f"({len(tasks)},)")
    scores = scores.detach()
    order = scores.argsort(stable=True)
    ranked = tasks[order[torch.isfinite(scores[order])]].tolist()
    with buffer.storage.lock:
        stored = set(_stored_tasks(buffer).tolist())
        parts = [buffer.of_task(task) for task in islice((task for task in ranked if task in stored), num_tasks)]
    batches = [part.batch(states, targets) for part in parts]
    return {name: torch.cat([part[name] for part in batches]) for name in ("states", "targets")} if batches else None


def _stored_tasks(buffer: ExperienceBuffer) -> Tensor:
    """As :meth:`ExperienceBuffer.tasks`, and none where the buffer is empty."""
    with buffer.storage.lock:
        return buffer.tasks() if len(buffer) else torch.empty(0, dtype=torch.int64, device=buffer.device)


def _query(where: str, batch: Mapping[str, Any]) -> Tensor:
    if "context_embedding" not in batch:
        raise ValueError(f"{where}: the batch has no context_embedding to search with")
    embedding: Tensor = batch["context_embedding"]
    return embedding
