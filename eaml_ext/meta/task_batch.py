"""Meta-batches: the tasks of a meta-update, a pure function of (seed, iteration, losses of tasks so far)."""

from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from eaml_ext import _check
from eaml_ext._random import Purpose, derive_seed
from eaml_ext.meta._types import LossFn, Task
from eaml_ext.meta._validation import check_tasks
from eaml_ext.meta.functional import outside_inference_mode

SAMPLINGS = ("uniform", "adaptive")
_DECAY = 0.7  # a task's running loss is _DECAY * running loss + (1 - _DECAY) * new loss
_UNIFORM = 0.2  # share of uniform draws in adaptive sampling, so that every task is drawn again


@runtime_checkable
class MetaTask(Protocol):
    """A task that draws its own data. Random numbers come from torch's global generator, which is seeded for it."""

    def sample(self) -> Task:
        """Draw ``(support_x, support_y, query_x, query_y)``, as :meth:`eaml_ext.meta.MetaMAML.meta_update` takes it."""

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return a scalar.

        Tasks run as one batch if they share the loss as a ``staticmethod``; a task with a method runs alone.
        """


class MetaBatch(NamedTuple):
    """One meta-batch: the data of each task, its loss (None: the trainer's), its index in the list (-1: none)."""

    tasks: Sequence[Task]
    loss_fns: list[LossFn | None]
    indices: list[int]


@runtime_checkable
class TaskSource(Protocol):
    """A source of meta-batches for :class:`MetaMAMLTrainer`; :class:`TaskBatch` is one."""

    @property
    def seed(self) -> int:
        """The seed from which the trainer derives the random numbers of each meta-update."""

    def batch(self, iteration: int) -> MetaBatch:
        """Return meta-batch number ``iteration``: a function of ``iteration`` and :meth:`state_dict`."""

    def update(self, indices: Sequence[int], losses: Tensor) -> None:
        """Receive the losses after adaptation, ``(len(indices),)``, of the meta-batch with these ``indices``."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that later meta-batches depend on."""

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Restore what :meth:`state_dict` returned."""

    def describe(self) -> dict[str, Any]:
        """Return the settings, JSON values by name, that must be equal for a run to be continued."""


class TaskBatch:
    """Meta-batches of ``batch_size`` tasks of a list or of a distribution.

    Iterating yields lists of ``(support_x, support_y, query_x, query_y)``, as ``MetaMAML.meta_update`` takes them. For
    a list it is one pass, in a random order of its own, without the tasks that fill no whole batch; for a distribution
    it is endless. :meth:`batch` returns a meta-batch by number, whatever was drawn before.

    Args:
        tasks: a non-empty list of such tuples, of objects with ``sample()`` and ``loss()`` (:class:`MetaTask`), or of
            both. Otherwise a distribution with ``sample(n, split, seed, epoch) -> list of such objects``, which is
            called with split "train" and the number of the meta-batch as epoch.
        batch_size: tasks in a meta-batch; the whole list where it is shorter.
        sampling: "uniform", or "adaptive", which needs a list: tasks are drawn with probabilities of 0.2 uniform and
            0.8 in proportion to their running loss after adaptation. Tasks without a loss count as the worst. The
            trainer passes the losses to :meth:`update`.
        seed: seed of everything drawn, in [0, 2**32).

    Raises:
        TypeError, ValueError: an argument of the wrong kind or size, or a task that is neither.

    >>> x, y = torch.randn(10, 4), torch.randn(10, 1)
    >>> task_batch = TaskBatch([(x, y, x, y)] * 40, batch_size=16)
    >>> [len(tasks) for tasks in task_batch]
    [16, 16]
    >>> task_batch.batch(5).indices == task_batch.batch(5).indices
    True
    """

    @outside_inference_mode()
    def __init__(self, tasks: Any, batch_size: int = 16, *, sampling: str = "uniform", seed: int = 0):
        batch_size = _check.positive("TaskBatch", "batch_size", batch_size, integer=True)
        seed = _check.positive("TaskBatch", "seed", seed, zero=True, integer=True)
        if seed >= 2**32:
            raise ValueError(f"TaskBatch: seed must be in [0, 2**32), got {seed}")
        if sampling not in SAMPLINGS:
            raise ValueError(f"TaskBatch: sampling must be {' or '.join(SAMPLINGS)}, got {sampling!r}")
        self.tasks, self.seed, self.sampling = tasks, seed, sampling
        self.endless = not isinstance(tasks, Sequence)
        if self.endless:
            if not callable(getattr(tasks, "sample", None)) or hasattr(tasks, "loss"):
                kind = type(tasks).__name__
                raise TypeError(f"TaskBatch: tasks must be a list of tasks or a distribution of them, got {kind}")
            if sampling == "adaptive":
                raise ValueError("TaskBatch: sampling must be uniform for a distribution, whose tasks never come again")
            self.batch_size, self.scores = batch_size, torch.empty(0, dtype=torch.float64)
        else:
            _check_list("TaskBatch", tasks)
            self.batch_size = min(batch_size, len(tasks))
            # Not seen yet: NaN.
            self.scores = torch.full((len(tasks),), torch.nan, dtype=torch.float64)
        self._passes = 0

    def __len__(self) -> int:
        """Meta-batches in one pass over the list."""
        if self.endless:
            raise TypeError("TaskBatch: a distribution has no length")
        return len(self.tasks) // self.batch_size

    def __iter__(self) -> Iterator[list[Task]]:
        if self.endless:
            while True:
                self._passes += 1
                yield list(self.batch(self._passes - 1).tasks)
        self._passes += 1
        for i in range(len(self)):
            yield list(self.batch((self._passes - 1) * len(self) + i).tasks)

    def batch(self, iteration: int) -> MetaBatch:
        """Return meta-batch number ``iteration``, the same at each call (under adaptive sampling: for the same losses).

        Torch's global generator is left as it was.
        """
        iteration = _check.positive("TaskBatch.batch", "iteration", iteration, zero=True, integer=True)
        indices = [-1] * self.batch_size if self.endless else self._choose(iteration)
        chosen: Any
        if self.endless:
            chosen = self.tasks.sample(self.batch_size, "train", self.seed, iteration)
            _check_list("TaskBatch.batch", chosen)
        else:
            chosen = [self.tasks[i] for i in indices]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.seed, Purpose.TASK_DATA, iteration))
            data: list[Any] = [task if isinstance(task, (tuple, list)) else task.sample() for task in chosen]
        loss_fns: list[Any] = [None if isinstance(task, (tuple, list)) else task.loss for task in chosen]
        return MetaBatch(check_tasks("TaskBatch.batch", data), loss_fns, indices)

    def update(self, indices: Sequence[int], losses: Tensor) -> None:
        """Add to the running losses of the tasks at ``indices``.

        Args:
            indices: positions in the list of tasks; -1: a task without one, whose loss is ignored.
            losses: ``(len(indices),)``, floating, after adaptation. A loss that is not finite is ignored.
        """
        _check.tensor("TaskBatch.update", "losses", losses)
        if losses.shape != (len(indices),):
            wanted = (len(indices),)
            raise ValueError(f"TaskBatch.update: losses must have shape {wanted}, got {tuple(losses.shape)}")
        for i in indices:
            if isinstance(i, bool) or not isinstance(i, Integral) or not -1 <= i < max(1, len(self.scores)):
                raise ValueError(f"TaskBatch.update: indices must be in [0, {len(self.scores)}), got {i!r}")
        for i, loss in zip(indices, losses.tolist(), strict=True):
            if i >= 0 and np.isfinite(loss) and len(self.scores):
                old = float(self.scores[i])
                self.scores[i] = loss if old != old else _DECAY * old + (1 - _DECAY) * loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state that later meta-batches depend on: the tasks' running losses, and the passes made."""
        return {"scores": self.scores.clone(), "passes": self._passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; ValueError if it is of another number of tasks."""
        if state["scores"].shape != self.scores.shape:
            got = len(state["scores"])
            raise ValueError(f"TaskBatch.load_state_dict: state is of {got} tasks, wanted {len(self.scores)}")
        self.scores = state["scores"].clone()
        self._passes = state["passes"]

    def describe(self) -> dict[str, Any]:
        """Return the settings that must be equal for a run to be continued."""
        tasks: Any
        if not self.endless:
            tasks = len(self.tasks)
        else:
            tasks = getattr(self.tasks, "name", type(self.tasks).__name__)
            if type(self.tasks).__repr__ is not object.__repr__:  # type: ignore[comparison-overlap]  # an address
                tasks = f"{tasks}: {self.tasks!r}"
        return {"tasks": tasks, "batch_size": self.batch_size, "sampling": self.sampling, "seed": self.seed}

    def _choose(self, iteration: int) -> list[int]:
        count = len(self.tasks)
        generator = torch.Generator()
        if self.sampling == "uniform":
            turn, place = divmod(iteration, len(self))
            generator.manual_seed(derive_seed(self.seed, Purpose.TASK_ORDER, turn))
            order = torch.randperm(count, generator=generator)
            return order[place * self.batch_size : (place + 1) * self.batch_size].tolist()
        generator.manual_seed(derive_seed(self.seed, Purpose.TASK_CHOICE, iteration))
        seen = torch.isfinite(self.scores)
        worst = self.scores[seen].max() if bool(seen.any()) else self.scores.new_ones(())
        share = torch.where(seen, self.scores, worst)
        share = share - share.min().clamp(max=0)  # losses below 0 count from the least one
        share = share / share.sum() if float(share.sum()) > 0 else torch.full_like(share, 1 / count)
        chances = _UNIFORM / count + (1 - _UNIFORM) * share
        return torch.multinomial(chances, self.batch_size, generator=generator).tolist()


def _check_list(where: str, tasks: Any) -> None:
    """Raise unless these are tasks, at least one."""
    if not isinstance(tasks, Sequence) or isinstance(tasks, str):
        raise TypeError(f"{where}: tasks must be a list, got {type(tasks).__name__}")
    if not tasks:
        raise ValueError(f"{where}: tasks is empty")
    for i, task in enumerate(tasks):
        if isinstance(task, (tuple, list)):
            if len(task) != 4:
                raise ValueError(f"{where}: tasks[{i}] must be (support_x, support_y, query_x, query_y)")
        elif not all(callable(getattr(task, name, None)) for name in ("sample", "loss")):
            kind = type(task).__name__
            raise TypeError(f"{where}: tasks[{i}] must be a tuple or have sample() and loss(), got {kind}")
