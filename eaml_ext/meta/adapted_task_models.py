"""theta_i = theta adapted to past task i: which model of a past task predicts new data best."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eaml_ext import _check
from eaml_ext.experience import ExperienceBuffer
from eaml_ext.experience.experiences import Experiences, Selector
from eaml_ext.meta._batching import Batching, Map, buckets, stack
from eaml_ext.meta._types import LossFn, Params
from eaml_ext.meta._validation import check_loss_fn, check_scalar
from eaml_ext.meta.functional import outside_inference_mode, recordable
from eaml_ext.meta.maml import MetaMAML
from eaml_ext.meta.masked_loss import MaskedLoss, apply_loss


class AdaptedTaskModels:
    """The model of a MetaMAML adapted to each past task of a buffer; ``retrieval.best_fit`` takes :meth:`score`.

    Tasks with equally many items are adapted as one vmapped batch, and all models are scored in one call. The
    constructor makes the models of the tasks in the buffer, and :meth:`score` those of tasks that were added later. A
    model is kept while the ring overwrites the task's items. :meth:`update` recomputes all models, for example after a
    meta-update or when tasks have more items.

    Args:
        maml: its model and inner loop are used, as they are at that time.
        buffer: holds the past tasks, with a field ``task``.
        loss_fn: ``(prediction, target) -> scalar``, for the adaptation and the score; a :class:`MaskedLoss` where the
            targets are a ragged field of the buffer. The model then takes ``lengths``, as of :class:`MetaMAML`.
        num_steps: steps of the inner loop; None: ``maml.inner_steps``.
        states, targets: arguments of ``Experiences.batch``.
        length: skip tasks with another number of items, because the ring has overwritten some; None: take all.
        chunk_size: tasks that are adapted at once, which bounds the memory; None: all.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or size.

    >>> from eaml_ext.experience import retrieval
    >>> maml = MetaMAML(torch.nn.Linear(1, 1), inner_lr=0.3, outer_lr=1e-3)
    >>> buffer = ExperienceBuffer(100)
    >>> for task, slope in enumerate((1.0, -2.0, 3.0)):
    ...     x = torch.linspace(-1, 1, 10).unsqueeze(1)
    ...     buffer.add(x, slope * x, task=task)
    >>> models = AdaptedTaskModels(maml, buffer, torch.nn.functional.mse_loss, num_steps=50)
    >>> now = {"states": torch.ones(2, 1), "targets": torch.full((2, 1), 2.8)}
    >>> found = retrieval.best_fit(models.score, num_tasks=1)(buffer, now)
    >>> (found["targets"] / found["states"]).mean()
    tensor(3.)
    """

    def __init__(
        self,
        maml: MetaMAML,
        buffer: ExperienceBuffer,
        loss_fn: LossFn,
        num_steps: int | None = None,
        *,
        states: Selector | None = None,
        targets: Selector | None = None,
        length: int | None = None,
        chunk_size: int | None = 64,
    ):
        where = "AdaptedTaskModels"
        for name, value, wanted in (("maml", maml, MetaMAML), ("buffer", buffer, ExperienceBuffer)):
            if not isinstance(value, wanted):
                raise TypeError(f"{where}: {name} must be of type {wanted.__name__}, got {type(value).__name__}")
        check_loss_fn(where, loss_fn)
        if num_steps is not None:
            num_steps = _check.positive(where, "num_steps", num_steps, integer=True, zero=True)
        if length is not None:
            length = _check.positive(where, "length", length, integer=True)
        if chunk_size is not None:
            chunk_size = _check.positive(where, "chunk_size", chunk_size, integer=True)
        self._maml, self._buffer, self._loss_fn, self._num_steps = maml, buffer, loss_fn, num_steps
        self._select: dict[str, Any] = {"states": states, "targets": targets}
        self._length, self._chunk_size = length, chunk_size
        self._batching = Batching(where, "task")
        self.update()

    @property
    def tasks(self) -> list[int]:
        """The ids of the tasks that have a model."""
        return list(self._models[0])

    @outside_inference_mode()
    def update(self) -> None:
        """Recompute the models of all tasks in the buffer."""
        tasks = self._buffer.tasks().tolist() if len(self._buffer) else []
        models: tuple[dict[int, int], Params] = ({}, {})
        size = self._chunk_size or max(1, len(tasks))
        for i in range(0, len(tasks), size):  # the items of one chunk are copied at a time
            models = self._extended(models, self._parts(tasks[i : i + size]))
        self._models = models  # replaced whole, never modified

    @outside_inference_mode()
    def score(self, buffer: ExperienceBuffer, tasks: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Return the loss of each task's model on the batch, ``(len(tasks),)``; inf for a task without a model.

        Args:
            buffer: the one that the models were made from.
            tasks: ``(n,)``, integer, ids of tasks.
            batch: has "states", ``(batch, ...)``, and "targets", ``(batch, ...)``; a MaskedLoss also gets its
                "mask".
        """
        if buffer is not self._buffer:
            raise ValueError("AdaptedTaskModels.score: buffer is another than the one these models were made from")
        x, y = recordable((batch["states"], batch["targets"]))
        mask = batch.get("mask") if isinstance(self._loss_fn, MaskedLoss) else None
        numbers = tasks.tolist()
        before = self._models
        models = self._extended(before, self._parts([task for task in numbers if task not in before[0]]))
        if self._models is before:  # else another thread has updated or extended them
            self._models = models
        row, past = models
        if not past:
            return torch.full((len(numbers),), torch.inf, device=tasks.device)

        def loss(params: Params) -> Tensor:
            loss = apply_loss(self._loss_fn, self._maml.call(params, x), y, mask)
            return check_scalar("AdaptedTaskModels.score", loss)

        with torch.no_grad():
            losses = self._batching.run(partial(self._map, loss, [past]), x.device)
        rows = torch.tensor([row.get(task, -1) for task in numbers], device=losses.device)
        return torch.where(rows < 0, torch.inf, losses[rows])

    def params(self, tasks: Tensor) -> Params:
        """Return the adapted parameters of the tasks, name to ``(len(tasks), *shape)``, for ``torch.func.vmap``.

        Args:
            tasks: ``(n,)``, integer, ids of tasks.

        Raises:
            ValueError: a task has no model.
        """
        numbers, (row, params) = tasks.tolist(), self._models
        missing = [task for task in numbers if task not in row]
        if missing:
            raise ValueError(f"AdaptedTaskModels.params: tasks has {missing[0]}, of which there is no model")
        rows = [row[task] for task in numbers]
        return {name: value[rows] for name, value in params.items()}

    def _map(self, function: Callable[..., Any], args: Sequence[Any], batch: Map) -> Any:
        return batch(function, chunk_size=self._chunk_size)(*args)

    def _parts(self, tasks: list[int]) -> dict[int, Experiences]:
        """Return the items of each task, without tasks that ``length`` skips or the buffer no longer stores."""
        with self._buffer.storage.lock:
            stored = set(self._buffer.tasks().tolist()) if tasks and len(self._buffer) else set()
            parts = {task: self._buffer.of_task(task) for task in tasks if task in stored}
        return {task: part for task, part in parts.items() if self._length in (None, len(part))}

    def _extended(
        self, models: tuple[dict[int, int], Params], parts: dict[int, Experiences]
    ) -> tuple[dict[int, int], Params]:
        """Return the given models and those adapted to ``parts``, in new dicts: ``(row of each task, parameters)``."""
        row, params = dict(models[0]), dict(models[1])
        tasks, batches = list(parts), [part.batch(**self._select) for part in parts.values()]
        start = {name: p.detach() for name, p in self._maml.parameters().items()}

        def adapt(x: Tensor, y: Tensor, mask: Tensor | None = None) -> Params:
            return self._maml.adapt_params(start, x, y, self._loss_fn, self._num_steps, mask=mask)

        if params and parts and set(params) != set(start):
            raise ValueError(
                "AdaptedTaskModels: parameters were frozen or unfrozen after the last update: call update again"
            )
        for bucket in buckets((batch["states"].shape, batch["targets"].shape) for batch in batches):
            names = [name for name in ("states", "targets", "mask") if name in batches[bucket[0]]]
            data = stack([[batches[i][name] for name in names] for i in bucket])
            with torch.no_grad():
                adapted = self._batching.run(partial(self._map, adapt, data), data[0].device)
            for name, new in adapted.items():
                params[name] = torch.cat([params[name], new]) if name in params else new
            row.update({tasks[i]: len(row) + n for n, i in enumerate(bucket)})
        return row, params
