"""Strategies that choose the experience to adapt on: each returns a ``retriever(buffer, batch) -> dict | None``.

A retriever receives the buffer and the Adapter's batch, and returns ``{"states", "targets"}``, or None if it finds no
items. An optional entry ``"weights"``, of shape ``(n,)``, weights the losses of the items. An entry ``"mask"``,
``(n, time)``, which ragged targets have, limits the losses to the steps where it is True. The arguments ``states`` and
``targets`` of the strategies are passed to ``Experiences.batch``. All strategies but ``uniform`` leave out experiences
of ``batch["task"]``, if it is given. The items come from one state of the buffer, even if other threads write to it at
the same time. A retriever can be pickled if its selectors can.

When each helps:

- ``uniform``: all experience is of one task. It is also the baseline of the other strategies.
- ``nearest``: the context embedding separates tasks.
- ``attention``: the embedding separates tasks, but the number of relevant items differs from query to query.
- ``ivf``: the embedding separates tasks, but the memory is so large that an exact search takes too long.
- ``best_fit``: the embedding does not separate tasks, but a model adapted to a past task fits the data.
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
    """Return a retriever of ``n`` random experiences.

    It helps when past and present data have one distribution: one task, and few data in each batch. If tasks differ, it
    tends to hurt, and is the baseline for the other strategies.

    Args:
        n: number of experiences.
        weighted: draw in proportion to priority and age.
        states, targets: arguments of ``Experiences.batch``.

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
    """Return a retriever of the ``k`` experiences with the embeddings nearest to ``batch["context_embedding"]``.

    It helps when the embedding separates tasks.

    Args:
        k: number of experiences.
        states, targets: arguments of ``Experiences.batch``.

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
    """Return a retriever of the ``k`` nearest experiences with weights: ``softmax(-distances / temperature)``.

    It helps when the number of relevant items differs from query to query: ``k`` may then be large, because far items
    have no weight.

    The retriever returns pairs and their weights, by which the Adapter weights the losses of the pairs. It
    does not average the pairs as :meth:`Experiences.read` does: unless tasks are linear, a mean state and a mean target
    are no sample of any task. The weights are differentiable with respect to ``batch["context_embedding"]``, so that an
    embedding can be trained through them.

    Args:
        k: number of experiences.
        temperature: in units of the metric, about the distance between embeddings of one task.
        states, targets: arguments of ``Experiences.batch``.

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
    """A retriever of the ``k`` nearest experiences that searches only the ``nprobe`` lists nearest to the query.

    k-means divides the embeddings into inverted lists, one around each centroid of the coarse quantizer. A search
    compares the query with the centroids, and then exactly with the items of the nearest lists. It helps when the
    memory is large: with the default ``nlist`` one search computes about ``2 · sqrt(nprobe · n)`` distances, not n. It
    misses neighbours in other lists; :meth:`recall` measures the fraction that it finds. All items are searched if the
    probed lists hold fewer than ``k`` candidates, or more than a quarter of the items.

    Each search includes all items added since the last assignment to lists. When these exceed a tenth of all items,
    the next search assigns them. When all items have been replaced, or their number has doubled, the next search runs
    k-means again, which takes longer.

    Each buffer has its own lists, which are freed with the buffer. They depend on ``seed`` and the stored items alone,
    and not on the DataLoader worker. A copied or pickled retriever makes new lists at its first search.

    Args:
        k: number of experiences.
        nprobe: number of lists searched for each query; None: all, which is exact and equals ``nearest``.
        nlist: number of lists; None: ``sqrt(nprobe · n)``, for equal numbers of centroids and items per search.
        seed: seed of the k-means sample and centroids.
        states, targets: arguments of ``Experiences.batch``.

    Source: inverted files, Jégou et al., "Product quantization for nearest neighbor search", 2011, section IV.

    >>> import torch
    >>> buffer = ExperienceBuffer(10_000)
    >>> centers = torch.randn(50, 8).repeat(200, 1)  # embeddings in clusters, one for each task
    >>> x = centers + 0.05 * torch.randn(10_000, 8)
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
        """Return the ``k`` nearest experiences in the probed lists, nearest first.

        Each of several queries is compared with the items of all lists that any of them probes. If these lists hold
        more than a quarter of all items, all items are searched, which is then faster.

        Args:
            query_embedding: ``(dim,)``, or ``(queries, dim)`` for several at once, in the embeddings' dtype, finite.
            exclude_task: id of a task, or several, whose experiences are left out.

        Returns, raises: as :meth:`ExperienceBuffer.retrieve`.
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
        """Return the fraction of the ``k`` nearest experiences that :meth:`search` finds, with one search per query.

        Args:
            queries: ``(n, dim)``, in the embeddings' dtype, with the distribution of later queries.

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
    """Return a retriever of all experiences of the ``num_tasks`` past tasks that fit the batch best.

    It helps when few noisy data suffice to recognise a past task, and no embedding separates tasks.

    Args:
        score_fn: ``(buffer, tasks, batch) -> (len(tasks),)``, floating: for each task, the loss on the batch of a model
            adapted to it. ``tasks`` is int64 ``(n,)``, ids. Tasks with the smallest finite losses are chosen.
            ``eaml_ext.meta.AdaptedTaskModels.score`` is such a function. Tasks that other threads overwrite while it
            runs are left out. If it raises a ValueError and tasks were overwritten, it is called again without them.
        num_tasks: number of tasks.
        states, targets: arguments of ``Experiences.batch``.

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
    while True:  # ends, because each iteration has fewer tasks
        if not len(tasks):
            return None
        try:  # the lock is not held, because score_fn may wait for threads that read the buffer, or for a fork
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
        found = buffer.get(torch.cat([part.indices for part in parts])) if parts else None
    return None if found is None else found.batch(states, targets)


def _stored_tasks(buffer: ExperienceBuffer) -> Tensor:
    """Return the ids of the stored tasks, int64 ``(tasks,)``, also of an empty buffer."""
    with buffer.storage.lock:
        return buffer.tasks() if len(buffer) else torch.empty(0, dtype=torch.int64, device=buffer.device)


def _query(where: str, batch: Mapping[str, Any]) -> Tensor:
    if "context_embedding" not in batch:
        raise ValueError(f"{where}: the batch has no context_embedding to search with")
    embedding: Tensor = batch["context_embedding"]
    return embedding
