"""Which experience to adapt on: the strategies, each a maker of ``retriever(buffer, batch) -> dict | None``.

A retriever looks at the buffer and at the batch that the Adapter was given and returns ``{"states", "targets"}``, or
None when it has nothing to offer. ``states`` and ``targets`` of the makers go to ``Experiences.batch``.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from eaml_ext import _check
from eaml_ext.experience.buffer import ExperienceBuffer
from eaml_ext.experience.experiences import Experiences, Selector

Retriever = Callable[[ExperienceBuffer, Mapping[str, Any]], "dict[str, Tensor] | None"]


def uniform(n: int, *, states: Selector | None = None, targets: Selector | None = None) -> Retriever:
    """``n`` experiences at random. The control arm: where tasks differ it tends to hurt.

    >>> import torch
    >>> buffer = ExperienceBuffer(100)
    >>> buffer.add(torch.randn(10, 4), torch.randn(10, 1))
    >>> uniform(3)(buffer, {})["states"].shape
    torch.Size([3, 4])
    """
    _check.positive("retrieval.uniform", "n", n, integer=True)

    def retrieve(buffer: ExperienceBuffer, batch: Mapping[str, Any]) -> dict[str, Tensor] | None:
        return buffer.get_batch(n).batch(states, targets) if len(buffer) else None

    return retrieve


def nearest(k: int, *, states: Selector | None = None, targets: Selector | None = None) -> Retriever:
    """The ``k`` experiences with the context embeddings nearest to ``batch["context_embedding"]``.

    Experiences of ``batch["task"]``, where it is given, are left out. Helps when the embedding tells tasks apart.
    """
    _check.positive("retrieval.nearest", "k", k, integer=True)

    def retrieve(buffer: ExperienceBuffer, batch: Mapping[str, Any]) -> dict[str, Tensor] | None:
        if "context_embedding" not in batch:
            raise ValueError("retrieval.nearest: the batch has no context_embedding to search with")
        if not len(buffer):
            return None
        found = buffer.retrieve(batch["context_embedding"], k, exclude_task=batch.get("task"))
        return found.batch(states, targets) if len(found) else None

    return retrieve


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
            the tasks (int64 ids); the smallest win, non-finite ones never do.
        num_tasks: how many tasks to take.

    Experiences of ``batch["task"]``, where it is given, are left out. Helps when few noisy data say little by
    themselves but enough to recognise a task met before.

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
    _check.positive("retrieval.best_fit", "num_tasks", num_tasks, integer=True)

    def retrieve(buffer: ExperienceBuffer, batch: Mapping[str, Any]) -> dict[str, Tensor] | None:
        if not len(buffer):
            return None
        tasks = buffer.tasks()
        if batch.get("task") is not None:
            tasks = tasks[~torch.isin(tasks, torch.as_tensor(batch["task"], device=tasks.device))]
        if not len(tasks):
            return None
        scores = score_fn(buffer, tasks, batch)
        _check.tensor("retrieval.best_fit", "what score_fn returns", scores)
        _check.shape("retrieval.best_fit", "what score_fn returns", scores, tasks.shape, f"({len(tasks)},)")
        scores = scores.detach()
        order = scores.argsort(stable=True)
        best = tasks[order[torch.isfinite(scores[order])]][:num_tasks]
        if not len(best):
            return None
        parts: list[Experiences] = [buffer.of_task(task) for task in best.tolist()]
        batches = [part.batch(states, targets) for part in parts]
        return {name: torch.cat([part[name] for part in batches]) for name in ("states", "targets")}

    return retrieve
