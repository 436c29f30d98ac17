"""The meta-training loop: meta-batches in, losses out; what is interrupted goes on with the same bits."""

import copy
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import LRScheduler

from eaml_ext import _check
from eaml_ext._random import Purpose, derive_seed
from eaml_ext._terminal import progress_bar
from eaml_ext.checkpoint import content_errors, deferred_interrupt, load_state, save_state
from eaml_ext.distributed import Group, any_rank, run_on_rank_zero
from eaml_ext.meta._types import LossFn, Stateful
from eaml_ext.meta._validation import check_loss_fn, check_pair, check_parameters, check_rate
from eaml_ext.meta.functional import detached_copy, outside_inference_mode, recordable
from eaml_ext.meta.maml import MetaMAML
from eaml_ext.meta.task_batch import MetaBatch, TaskSource

_KIND = "MetaMAMLTrainer"
_FOLDS = 5

OnIteration = Callable[[int, MetaBatch, float], None]
"""``(number of the meta-update, its meta-batch, its loss)``."""


class MetaMAMLTrainer:
    """Meta-trains a policy (any ``nn.Module`` called as ``policy(x)``) by :class:`MetaMAML`, in place.

    With several ``kl_radii`` it trains one policy for each (the first one in place, the others copies), all on the
    same meta-batches: the one of level e steps on the worst weighting of the batch's tasks within KL divergence e of
    the plain mean. A parameter that is frozen in the first one is frozen in the copies at the next call. At test time,
    where how far the new task lies from the training tasks is not known, :meth:`adapt_to_new_task` picks: each adapts
    on four fifths of the support set and is judged on the rest, five times (leave-one-out below five rows; on the
    support set itself, before adaptation, where there is one row); the lowest mean loss wins, the first level at a tie;
    the winner then adapts on all of the support set. Source: Ajay et al., "Distributionally Adaptive Meta Reinforcement
    Learning", 2022, which picks by a bandit over episodes.

    Args:
        policy: the model.
        meta_lr: learning rate of the meta-update.
        inner_lr: step size of the inner loop.
        loss_fn: ``(prediction, target) -> scalar``, of the tasks that bring no loss of their own.
        kl_radii: nats, each at least 0; see above. (0.0,) is plain MAML.
        log: where losses and skipped updates are written: a ``SummaryWriter`` (anything with ``add_scalar``), or a
            directory for TensorBoard, which then must be installed; None: nowhere.
        progress: show a progress bar, where the output is a terminal.
        lr_scheduler: ``optimizer -> scheduler`` of the outer learning rate, such as ``lambda optimizer:
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)``, stepped after every meta-update; None: the
            rate is constant.
        group: ranks that share each meta-batch, given the same arguments and calls: every one draws it, and adapts a
            part of its tasks (see :class:`MetaMAML`). Rank 0 alone logs, shows progress, and writes and reads the
            checkpoint; a run may be continued by another number of ranks.
        options: further arguments of :class:`MetaMAML`, by name: ``inner_steps``, ``first_order``, ``compile``, ...

    Attributes:
        maml: the MetaMAML of the first level; ``mamls`` those of all.
        iteration: meta-updates made so far.
        losses: of all of them, the first level's.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or size, or one that :class:`MetaMAML` refuses.
        ImportError: ``log`` is a directory and TensorBoard is not installed.

    >>> from eaml_ext.meta import TaskBatch
    >>> x, y = torch.randn(10, 4), torch.randn(10, 1)
    >>> policy = nn.Linear(4, 1)
    >>> trainer = MetaMAMLTrainer(policy, meta_lr=1e-3, inner_lr=1e-2)
    >>> losses = trainer.meta_train(TaskBatch([(x, y, x, y)] * 20), num_meta_iterations=3)
    >>> len(losses), trainer.iteration
    (3, 3)
    >>> adapted = trainer.adapt_to_new_task((x, y))
    """

    def __init__(
        self,
        policy: nn.Module,
        meta_lr: float = 1e-3,
        inner_lr: float = 1e-2,
        *,
        loss_fn: LossFn = mse_loss,
        kl_radii: Sequence[float] = (0.0,),
        log: Any = None,
        progress: bool = True,
        lr_scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
        group: Group | None = None,
        **options: Any,
    ):
        where = "MetaMAMLTrainer"
        if not isinstance(policy, nn.Module):
            raise TypeError(f"{where}: policy must be a torch.nn.Module, got {type(policy).__name__}")
        meta_lr, inner_lr = check_rate(where, "meta_lr", meta_lr), check_rate(where, "inner_lr", inner_lr)
        check_loss_fn(where, loss_fn)
        _check.flag(where, "progress", progress)
        if not (lr_scheduler is None or callable(lr_scheduler)):
            raise TypeError(f"{where}: lr_scheduler must be callable, got {type(lr_scheduler).__name__}")
        if isinstance(kl_radii, str) or not isinstance(kl_radii, Sequence) or not kl_radii:
            raise TypeError(f"{where}: kl_radii must be a list of at least one number, got {kl_radii!r}")
        levels = [float(_check.positive(where, "kl_radii", level, zero=True)) for level in kl_radii]
        if not (log is None or isinstance(log, (str, os.PathLike)) or callable(getattr(log, "add_scalar", None))):
            kind = type(log).__name__
            raise TypeError(f"{where}: log must be a directory or have add_scalar, as a SummaryWriter, got {kind}")
        if isinstance(log, (str, os.PathLike)):
            _summary_writer()
        with outside_inference_mode():
            policies = [policy, *(detached_copy(policy) for _ in levels[1:])]
        self.mamls = [MetaMAML(p, inner_lr, meta_lr, group=group, **options) for p in policies]
        self._schedulers = [] if lr_scheduler is None else [lr_scheduler(maml.optimizer) for maml in self.mamls]
        self.group = group
        self.maml, self.kl_radii = self.mamls[0], levels
        self.loss_fn, self.log, self.progress = loss_fn, log, bool(progress)
        self.losses: list[float] = []

    @property
    def iteration(self) -> int:
        """Meta-updates made so far."""
        return len(self.losses)

    @property
    def skipped_updates(self) -> int:
        """Meta-updates left out because they were not finite, of all levels."""
        return sum(maml.skipped_updates for maml in self.mamls)

    def meta_train(
        self,
        task_batch: TaskSource,
        num_meta_iterations: int = 1000,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 100,
        on_iteration: OnIteration | None = None,
        extra_state: Stateful | None = None,
    ) -> list[float]:
        """``num_meta_iterations`` meta-updates; returns their losses (mean query loss after adaptation, before each).

        Meta-update number i sees ``task_batch.batch(i)``, and torch's global generator seeded from (seed, i) (dropout
        draws from it), so a run is a function of its seed; the generator is given back as it was.

        **With a checkpoint** the state is written there every ``checkpoint_every`` meta-updates and at the end, each
        time the whole file or nothing. Where the file exists, the call is the continuation of the one that wrote it:
        it takes over the state, makes the meta-updates that are missing, and returns the losses of all. So the same
        script, started again after an end of any kind, ends with the bits of an uninterrupted run.

        **Ctrl-C** ends the call after the meta-update under way (a second one at once), writes the checkpoint, and
        raises KeyboardInterrupt, on all ranks where one got it; without a checkpoint the next call goes on from there.

        A meta-update that is not finite is left out, its loss is in the list, and a RuntimeWarning at the end says how
        many there were.

        Args:
            task_batch: a :class:`TaskBatch`, or any object with its methods (:class:`TaskSource`), which may prepare
                the data of each meta-batch itself.
            num_meta_iterations: meta-updates to make, at least 0.
            checkpoint: file of the state; None: no file.
            checkpoint_every: meta-updates between two writes of the file.
            on_iteration: called as ``on_iteration(number, meta_batch, loss)`` after every meta-update and before the
                checkpoint is written, with a group on every rank.
            extra_state: object whose ``state_dict()`` is written into the checkpoint and given back to its
                ``load_state_dict`` when the run continues, after everything else was loaded; with a group on rank 0
                alone. ``load_state_dict`` must leave the object unchanged where it raises.

        Returns:
            The losses of the run's meta-updates, ``num_meta_iterations`` numbers.

        Raises:
            TypeError, ValueError: an argument of the wrong kind or size, or a checkpoint of other settings.
            FileNotFoundError: the checkpoint's directory does not exist.
            KeyboardInterrupt: Ctrl-C, after the checkpoint was written.
            RankError: another rank has died or failed.

        Print the mean loss of every two meta-updates:

        >>> from eaml_ext.meta import TaskBatch
        >>> x, y = torch.randn(10, 4), torch.randn(10, 1)
        >>> trainer = MetaMAMLTrainer(nn.Linear(4, 1), progress=False)
        >>> def report(number, meta_batch, loss):
        ...     if number % 2:
        ...         print(f"epoch {number // 2}: {len(meta_batch.tasks)} tasks", sum(trainer.losses[-2:]) / 2 > 0)
        >>> losses = trainer.meta_train(TaskBatch([(x, y, x, y)] * 20), num_meta_iterations=4, on_iteration=report)
        epoch 0: 16 tasks True
        epoch 1: 16 tasks True
        """
        where = "MetaMAMLTrainer.meta_train"
        if not isinstance(task_batch, TaskSource):
            raise TypeError(f"{where}: task_batch must be a TaskBatch or a TaskSource, got {type(task_batch).__name__}")
        if not (on_iteration is None or callable(on_iteration)):
            raise TypeError(f"{where}: on_iteration must be callable, got {type(on_iteration).__name__}")
        if not (extra_state is None or isinstance(extra_state, Stateful)):
            kind = type(extra_state).__name__
            raise TypeError(f"{where}: extra_state must have state_dict and load_state_dict, got {kind}")
        num_meta_iterations = _check.positive(
            where, "num_meta_iterations", num_meta_iterations, zero=True, integer=True
        )
        checkpoint_every = _check.positive(where, "checkpoint_every", checkpoint_every, integer=True)
        self._freeze_alike(where)
        if checkpoint is not None and not isinstance(checkpoint, (str, os.PathLike)):
            raise TypeError(f"{where}: checkpoint must be a path, got {type(checkpoint).__name__}")
        began = self.iteration
        if checkpoint is not None:
            began = self._resume(where, checkpoint, task_batch, num_meta_iterations, extra_state)
        end = began + num_meta_iterations
        skipped, saved = self.skipped_updates, None
        with (
            self._writer() as writer,
            progress_bar(
                desc="meta-training",
                unit="update",
                total=num_meta_iterations,
                initial=min(self.iteration - began, num_meta_iterations),
                hidden=not (self.progress and self._first),
            ) as bar,
            deferred_interrupt() as interrupted,
        ):
            while self.iteration < end and not any_rank(self.group, bool(interrupted)):
                batch = self._update(task_batch, writer)
                if on_iteration is not None:
                    on_iteration(self.iteration - 1, batch, self.losses[-1])
                bar.set_postfix(loss=f"{self.losses[-1]:.4f}", skipped=self.skipped_updates, refresh=False)
                bar.update()
                if checkpoint is not None and (self.iteration - began) % checkpoint_every == 0:
                    self._save(checkpoint, task_batch, began, extra_state)
                    saved = self.iteration
            if checkpoint is not None and saved != self.iteration:
                self._save(checkpoint, task_batch, began, extra_state)
        skipped = self.skipped_updates - skipped
        if skipped:
            text = f"{where}: {skipped} meta-updates were not finite and left out"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        if any_rank(self.group, bool(interrupted)):
            raise KeyboardInterrupt
        return self.losses[began:end]

    @property
    def _first(self) -> bool:
        return self.group is None or self.group.rank == 0

    def adapt_to_new_task(self, new_task_data: tuple[Tensor, Tensor], num_steps: int | None = None) -> nn.Module:
        """A copy of the policy that has adapted to ``(support_x, support_y)``; the policy itself is left as it is.

        Of several shift levels the one that predicts held-out rows of the support set best. ``num_steps``: as many as
        in meta-training if absent.
        """
        where = "MetaMAMLTrainer.adapt_to_new_task"
        x, y = _support(where, new_task_data)
        self._freeze_alike(where)
        maml = self.mamls[self.select_kl_radius((x, y), num_steps)] if len(self.mamls) > 1 else self.maml
        return maml.adapt(x, y, self.loss_fn, num_steps)

    @outside_inference_mode()
    def select_kl_radius(self, new_task_data: tuple[Tensor, Tensor], num_steps: int | None = None) -> int:
        """The index in ``kl_radii`` that :meth:`adapt_to_new_task` picks, by the rule in the class's docstring."""
        where = "MetaMAMLTrainer.select_kl_radius"
        x, y = recordable(_support(where, new_task_data))
        self._freeze_alike(where)
        rows = torch.arange(len(x), device=x.device)
        folds = [rows % min(_FOLDS, len(x)) == f for f in range(min(_FOLDS, len(x)))]

        def score(maml: MetaMAML) -> float:
            start = {name: p.detach() for name, p in maml.parameters().items()}
            with torch.no_grad():
                if len(x) == 1:
                    return float(self.loss_fn(maml.call(start, x), y))
                losses = []
                for held in folds:
                    adapted = maml.adapt_params(start, x[~held], y[~held], self.loss_fn, num_steps)
                    losses.append(float(self.loss_fn(maml.call(adapted, x[held]), y[held])))
            return sum(losses) / len(losses)

        scores = [score(maml) for maml in self.mamls]
        # NaN never wins, not even in first place.
        return min(range(len(scores)), key=lambda i: (scores[i] != scores[i], scores[i]))

    def _freeze_alike(self, where: str) -> None:
        """The policies of other levels are copies: freeze in them what is frozen in the first one now."""
        trained = self.maml.parameters()
        for maml in self.mamls[1:]:
            check_parameters(where, "MetaMAMLTrainer", self.maml.model, self.maml._known.values())
            for name, p in maml.model.named_parameters():
                p.requires_grad_(name in trained)

    # ------------------------------------------------------------------------------------------------ one update

    def _update(self, task_batch: TaskSource, writer: Any) -> MetaBatch:
        number = self.iteration
        batch = task_batch.batch(number)
        loss_fns = [self.loss_fn if loss_fn is None else loss_fn for loss_fn in batch.loss_fns]
        device = next(self.maml.model.parameters()).device
        share, rank = range(len(batch.tasks)), 0
        if self.group is not None:
            share, rank = self.group.shard(len(batch.tasks)), self.group.rank
            loss_fns = [loss_fns[i] for i in share]
        tasks: list[Any] = [tuple(data.to(device) for data in batch.tasks[i]) for i in share]
        values = []
        for maml, level in zip(self.mamls, self.kl_radii, strict=True):
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                seed = derive_seed(task_batch.seed, Purpose.META_UPDATE, number, rank)
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU
                if device.type == "cuda":
                    with torch.cuda.device(device):
                        torch.cuda.manual_seed(seed)
                values.append(maml.meta_update(tasks, loss_fns, kl_radius=level))
        assert self.maml.last_losses is not None
        task_batch.update(batch.indices, self.maml.last_losses)
        for scheduler in self._schedulers:
            scheduler.step()
        self.losses.append(values[0])
        if writer is not None:
            writer.add_scalar("meta/loss", values[0], number)
            writer.add_scalar("meta/skipped_updates", self.skipped_updates, number)
            for level, value in list(zip(self.kl_radii, values, strict=True))[1:]:
                writer.add_scalar(f"meta/loss_shift_{level:g}", value, number)
        return batch

    @contextmanager
    def _writer(self) -> Iterator[Any]:
        """The writer; one made for a directory is closed afterwards."""
        if not self._first:
            yield None
            return
        if not isinstance(self.log, (str, os.PathLike)):
            yield self.log
            return
        # What an interrupted run wrote beyond its checkpoint is hidden: the same steps come again.
        with _summary_writer()(os.fspath(self.log), purge_step=self.iteration) as writer:
            yield writer

    # ------------------------------------------------------------------------------------------------ checkpoints

    def describe(self, task_batch: TaskSource) -> dict[str, Any]:
        """Return the settings, by name, that must be equal for a run on ``task_batch`` to be continued."""
        maml = self.maml
        schedulers = {"lr_scheduler": type(self._schedulers[0]).__name__} if self._schedulers else {}
        return {
            **task_batch.describe(),
            "inner_lr": maml.inner_lr,
            "meta_lr": maml.outer_lr,
            "inner_steps": maml.inner_steps,
            "first_order": maml.first_order,
            "reptile": maml.reptile,
            "learn_inner_lr": bool(maml.inner_lrs),
            "inner_parameters": maml.inner_names,
            "kl_radii": self.kl_radii,
            "optimizer": type(maml.optimizer).__name__,
            "loss_fn": getattr(self.loss_fn, "__name__", type(self.loss_fn).__name__),
            **schedulers,
        }

    def _save(
        self, path: str | os.PathLike[str], task_batch: TaskSource, began: int, extra_state: Stateful | None
    ) -> None:
        def save() -> None:
            state = {
                "settings": self.describe(task_batch),
                "began": began,
                "losses": torch.tensor(self.losses, dtype=torch.float64),
                **self._learned(),
                "task_batch": task_batch.state_dict(),
            }
            if extra_state is not None:
                state["extra_state"] = extra_state.state_dict()
            save_state(path, state, kind=_KIND)

        run_on_rank_zero(self.group, save)

    def _learned(self) -> dict[str, Any]:
        """The part of the state that meta-updates change."""
        state = {"mamls": [maml.state_dict() for maml in self.mamls]}
        if self._schedulers:
            state["lr_schedulers"] = [scheduler.state_dict() for scheduler in self._schedulers]
        return state

    def _load_learned(self, state: dict[str, Any]) -> None:
        for maml, part in zip(self.mamls, state["mamls"], strict=True):
            maml.load_state_dict(part)
        for scheduler, part in zip(self._schedulers, state.get("lr_schedulers", []), strict=True):
            scheduler.load_state_dict(part)

    def _resume(
        self,
        where: str,
        path: str | os.PathLike[str],
        task_batch: TaskSource,
        wanted: int,
        extra_state: Stateful | None,
    ) -> int:
        """Load the checkpoint where there is one; return the iteration at which the run began."""
        extra: Any = None

        def read() -> dict[str, Any] | None:
            nonlocal extra
            state = _read(where, path)
            if state is not None:
                if ("extra_state" in state) != (extra_state is not None):
                    holds = "an" if "extra_state" in state else "no"
                    raise ValueError(f"{where}: checkpoint {os.fspath(path)} holds {holds} extra_state")
                extra = state.pop("extra_state", None)  # on rank 0 alone: a buffer may be large
            return state

        state = run_on_rank_zero(self.group, read)
        if state is None:
            return self.iteration
        before = copy.deepcopy((self._learned(), task_batch.state_dict(), self.losses))
        try:
            with content_errors(where, path):
                began = self._take_over(where, path, state, task_batch, wanted)
                if extra_state is not None:
                    run_on_rank_zero(self.group, lambda: extra_state.load_state_dict(extra))
                return began
        except BaseException:  # the checkpoint may have been loaded in part
            self._load_learned(before[0])
            task_batch.load_state_dict(before[1])
            self.losses = before[2]
            raise

    def _take_over(
        self, where: str, path: str | os.PathLike[str], state: dict[str, Any], task_batch: TaskSource, wanted: int
    ) -> int:
        losses, began = state["losses"].tolist(), state["began"]
        done = len(losses) - began
        if not 0 <= began <= len(losses):
            raise LookupError(f"a run began at {began} of {len(losses)} losses")
        mine, came = self.describe(task_batch), state["settings"]
        for name in mine:
            if came.get(name) != mine[name]:
                text = f"{name}={came.get(name)!r}, this one has {mine[name]!r}"
                raise ValueError(f"{where}: checkpoint {os.fspath(path)} is of a run with {text}")
        if done > wanted:
            text = f"checkpoint {os.fspath(path)} holds {done} meta-updates, num_meta_iterations is {wanted}"
            raise ValueError(f"{where}: {text}")
        if len(state["mamls"]) != len(self.mamls):
            raise LookupError(f"there are {len(state['mamls'])} policies, not {len(self.mamls)}")
        self._load_learned(state)
        task_batch.load_state_dict(state["task_batch"])
        self.losses = losses
        return int(began)


def _read(where: str, path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The checkpoint's state; None where there is none yet, in a directory that must exist."""
    if not os.path.isdir(folder := os.path.dirname(os.path.abspath(path))):
        raise FileNotFoundError(f"{where}: checkpoint needs a directory that exists, {folder} does not exist")
    if not os.path.exists(path):
        return None
    state = load_state(path, kind=_KIND)
    if not isinstance(state, dict):
        raise ValueError(f"{where}: checkpoint {os.fspath(path)} holds {type(state).__name__}, wanted a dict")
    return state


def _support(where: str, new_task_data: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(new_task_data, (tuple, list)) or len(new_task_data) != 2:
        raise TypeError(f"{where}: new_task_data must be (support_x, support_y)")
    x, y = new_task_data
    check_pair(where, "support", x, y)
    return x, y


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError(
            "MetaMAMLTrainer: log is a directory, which needs TensorBoard: pip install tensorboard"
        ) from None
    return SummaryWriter
