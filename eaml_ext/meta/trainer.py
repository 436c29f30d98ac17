"""The meta-training loop: meta-batches in, losses out; an interrupted run continues with the same bits."""

import copy
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import LRScheduler

from eaml_ext import _check
from eaml_ext._random import Purpose, derive_seed
from eaml_ext._terminal import progress_bar
from eaml_ext._torch_compat import tree_map
from eaml_ext.checkpoint import content_errors, deferred_interrupt
from eaml_ext.distributed import Group, any_rank, run_on_rank_zero
from eaml_ext.meta._cross_validation import held_out_loss
from eaml_ext.meta._run_checkpoint import check_run, read_run, save_run
from eaml_ext.meta._scalar_log import Log, ScalarLog, check_log, open_log
from eaml_ext.meta._types import DataSet, LossFn, Stateful
from eaml_ext.meta._validation import (
    check_loss_fn,
    check_parameters,
    check_rate,
    check_sequence_support,
    check_support,
)
from eaml_ext.meta.functional import detached_copy, outside_inference_mode, recordable
from eaml_ext.meta.maml import MetaMAML
from eaml_ext.meta.task_batch import MetaBatch, TaskSource

OnIteration = Callable[[int, MetaBatch, float], None]
"""``(number of the meta-update, its meta-batch, its loss)``."""


class MetaMAMLTrainer:
    """Meta-train a policy (any ``nn.Module`` called as ``policy(x)``) by :class:`MetaMAML`, in place.

    With several ``kl_radii`` it trains one policy for each, all on the same meta-batches; the first one is trained in
    place, the others are copies. The policy of radius e steps on the worst weighting of the batch's tasks within KL
    divergence e of the plain mean. A parameter that is frozen in the first policy is frozen in the copies at the next
    call. The distance of a new task from the training tasks is unknown at test time, so :meth:`adapt_to_new_task`
    selects the policy by cross-validation:

    - Each policy adapts on four fifths of the support set and is judged on the rest, five times.
    - Below five rows one row is held out at a time; a single row judges the policies before adaptation.
    - The lowest mean loss wins, at a tie the first radius; the selected policy adapts on all of the support set.

    Source: Ajay et al., "Distributionally Adaptive Meta Reinforcement Learning", 2022, which selects by a bandit over
    episodes.

    Args:
        policy: the model.
        meta_lr: learning rate of the meta-update.
        inner_lr: step size of the inner loop.
        loss_fn: ``(prediction, target) -> scalar``, for the tasks without a loss of their own. With a
            :class:`MaskedLoss` tasks of different sizes run as one batch.
        kl_radii: nats, each at least 0; (0.0,) is plain MAML.
        log: destination of losses and skipped updates: a ``SummaryWriter`` (any object with ``add_scalar``), or a
            directory for TensorBoard, which then must be installed; None: nowhere.
        progress: show a progress bar, where the output is a terminal.
        lr_scheduler: ``optimizer -> scheduler`` of the outer learning rate, such as ``lambda optimizer:
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)``, stepped after every meta-update; None: the
            rate is constant.
        group: ranks that share each meta-batch, given the same arguments and calls. Every rank draws the meta-batch and
            adapts a part of its tasks (see :class:`MetaMAML`). Rank 0 alone logs, shows progress, and writes and reads
            the checkpoint; another number of ranks may continue a run.
        options: further arguments of :class:`MetaMAML`, by name: ``inner_steps``, ``first_order``, ``compile``, ...

    Attributes:
        maml: the MetaMAML of the first radius; ``mamls`` has one for each.
        iteration: meta-updates made so far.
        losses: one for each meta-update, of the first radius.

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
        log: Log = None,
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
        self.kl_radii = [float(_check.positive(where, "kl_radii", radius, zero=True)) for radius in kl_radii]
        check_log(where, log)
        with outside_inference_mode():
            policies = [policy, *(detached_copy(policy) for _ in self.kl_radii[1:])]
        self.mamls = [MetaMAML(p, inner_lr, meta_lr, group=group, **options) for p in policies]
        self._schedulers = [] if lr_scheduler is None else [lr_scheduler(maml.optimizer) for maml in self.mamls]
        self.maml, self.group = self.mamls[0], group
        self._first = group is None or group.rank == 0
        self.loss_fn, self.log, self.progress = loss_fn, log, bool(progress)
        self.losses: list[float] = []

    @property
    def iteration(self) -> int:
        """Meta-updates made so far."""
        return len(self.losses)

    @property
    def skipped_updates(self) -> int:
        """Meta-updates skipped because they were not finite, of all radii."""
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
        """Make ``num_meta_iterations`` meta-updates.

        Meta-update number i uses ``task_batch.batch(i)`` and torch's global generator seeded from (seed, i), from which
        dropout draws. A run is therefore a function of its seed. The generator is restored afterwards.

        **With a checkpoint** the state is written there every ``checkpoint_every`` meta-updates and at the end, each
        time the whole file or nothing. Where the file exists, the call continues the run that wrote it: it loads the
        state, makes the meta-updates that are missing, and returns the losses of all. The same script, started again
        after an end of any kind, thus ends with the bits of an uninterrupted run.

        **Ctrl-C** or SIGTERM ends the call after the current meta-update; a second one ends it at once. The checkpoint
        is written and KeyboardInterrupt raised, on all ranks if one received it. Without a checkpoint the next call
        continues.

        A meta-update that is not finite is skipped. Its loss is in the list, and a RuntimeWarning at the end counts the
        skipped ones.

        Args:
            task_batch: a :class:`TaskBatch`, or any object with its methods (:class:`TaskSource`), which may prepare
                the data of each meta-batch itself.
            num_meta_iterations: meta-updates to make, at least 0.
            checkpoint: path of the state's file; None: no file.
            checkpoint_every: meta-updates between two writes of the file.
            on_iteration: called as ``on_iteration(number, meta_batch, loss)`` after every meta-update and before the
                checkpoint is written, with a group on every rank.
            extra_state: its ``state_dict()`` is part of the checkpoint. A continued run passes that to
                ``load_state_dict`` after everything else is loaded; with a group on rank 0 alone. ``load_state_dict``
                must leave the object unchanged where it raises.

        Returns:
            The mean query losses after adaptation, one before each meta-update of the run.

        Raises:
            TypeError, ValueError: an argument of the wrong kind or size, or a checkpoint of other settings.
            FileNotFoundError: the checkpoint's directory does not exist.
            KeyboardInterrupt: Ctrl-C or SIGTERM, after the checkpoint was written.
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
        self._freeze_copies(where)
        if checkpoint is not None and not isinstance(checkpoint, (str, os.PathLike)):
            raise TypeError(f"{where}: checkpoint must be a path, got {type(checkpoint).__name__}")
        began = self.iteration
        if checkpoint is not None:
            began = self._resume(where, checkpoint, task_batch, num_meta_iterations, extra_state)
        end = began + num_meta_iterations
        skipped, saved = self.skipped_updates, None
        with (
            open_log(self.log if self._first else None, self.iteration) as writer,
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
                    save_run(checkpoint, lambda: self._state(task_batch, began), self.group, extra_state)
                    saved = self.iteration
            if checkpoint is not None and saved != self.iteration:
                save_run(checkpoint, lambda: self._state(task_batch, began), self.group, extra_state)
        skipped = self.skipped_updates - skipped
        if skipped:
            text = f"{where}: {skipped} meta-updates were not finite and left out"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        if any_rank(self.group, bool(interrupted)):
            raise KeyboardInterrupt
        return self.losses[began:end]

    def adapt_to_new_task(self, new_task_data: tuple[DataSet, DataSet], num_steps: int | None = None) -> nn.Module:
        """Return a copy of the policy adapted to a task; the policy itself is left as it is.

        Among several radii, :meth:`select_kl_radius` selects the policy.

        Args:
            new_task_data: ``(support_x, support_y)``, ``(n, ...)`` each or n sequences each, n at least 1.
            num_steps: inner steps, at least 0; None: ``inner_steps``.
        """
        where = "MetaMAMLTrainer.adapt_to_new_task"
        x, y = check_support(where, new_task_data)
        self._freeze_copies(where)
        maml = self.mamls[self.select_kl_radius((x, y), num_steps)] if len(self.mamls) > 1 else self.maml
        return maml.adapt(x, y, self.loss_fn, num_steps)

    @outside_inference_mode()
    def select_kl_radius(self, new_task_data: tuple[DataSet, DataSet], num_steps: int | None = None) -> int:
        """Return the index in ``kl_radii`` with the lowest held-out loss, by the rule in the class's docstring.

        Arguments as of :meth:`adapt_to_new_task`.
        """
        where = "MetaMAMLTrainer.select_kl_radius"
        x, y = recordable(check_support(where, new_task_data))
        self._freeze_copies(where)
        check_sequence_support(where, [(x, y)], self.maml.model, [self.loss_fn])
        scores = [held_out_loss(maml, x, y, self.loss_fn, num_steps) for maml in self.mamls]
        # NaN never wins, not even in first place.
        return min(range(len(scores)), key=lambda i: (scores[i] != scores[i], scores[i]))

    def _freeze_copies(self, where: str) -> None:
        """Freeze in the policies of other radii the parameters that are frozen in the first policy now."""
        trained = self.maml.parameters()
        for maml in self.mamls[1:]:
            check_parameters(where, "MetaMAMLTrainer", trained, self.maml._known.values())
            for name, p in maml.model.named_parameters():
                p.requires_grad_(name in trained)

    # ------------------------------------------------------------------------------------------------ one update

    def _update(self, task_batch: TaskSource, writer: ScalarLog | None) -> MetaBatch:
        number = self.iteration
        batch = task_batch.batch(number)
        loss_fns = [self.loss_fn if loss_fn is None else loss_fn for loss_fn in batch.loss_fns]
        device = next(self.maml.model.parameters()).device
        share, rank = range(len(batch.tasks)), 0
        if self.group is not None:
            share, rank = self.group.shard(len(batch.tasks)), self.group.rank
            loss_fns = [loss_fns[i] for i in share]
        tasks: list[Any] = [tree_map(lambda data: data.to(device), batch.tasks[i]) for i in share]
        values, seed = [], derive_seed(task_batch.seed, Purpose.META_UPDATE, number, rank)
        for maml, radius in zip(self.mamls, self.kl_radii, strict=True):
            with _seeded(seed, device):
                values.append(maml.meta_update(tasks, loss_fns, kl_radius=radius))
        assert self.maml.last_losses is not None
        task_batch.update(batch.indices, self.maml.last_losses)
        for scheduler in self._schedulers:
            scheduler.step()
        self.losses.append(values[0])
        if writer is not None:
            writer.add_scalar("meta/loss", values[0], number)
            writer.add_scalar("meta/skipped_updates", self.skipped_updates, number)
            for radius, value in list(zip(self.kl_radii, values, strict=True))[1:]:
                writer.add_scalar(f"meta/loss_kl_radius_{radius:g}", value, number)
        return batch

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

    def _state(self, task_batch: TaskSource, began: int) -> dict[str, Any]:
        return {
            "settings": self.describe(task_batch),
            "began": began,
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            **self._learned(),
            "task_batch": task_batch.state_dict(),
        }

    def _learned(self) -> dict[str, Any]:
        """The part of the state that meta-updates change."""
        state = {"mamls": [maml.state_dict() for maml in self.mamls]}
        if self._schedulers:
            state["lr_schedulers"] = [scheduler.state_dict() for scheduler in self._schedulers]
        return state

    def _load_learned(self, state: dict[str, Any]) -> None:
        if len(state["mamls"]) != len(self.mamls):
            raise LookupError(f"there are {len(state['mamls'])} policies, not {len(self.mamls)}")
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
        state, extra = read_run(where, path, self.group, extra_state)
        if state is None:
            return self.iteration
        before = copy.deepcopy((self._learned(), task_batch.state_dict(), self.losses))
        try:
            with content_errors(where, path):
                losses, began = check_run(where, path, state, self.describe(task_batch), wanted)
                self._load_learned(state)
                task_batch.load_state_dict(state["task_batch"])
                self.losses = losses
                if extra_state is not None:
                    run_on_rank_zero(self.group, lambda: extra_state.load_state_dict(extra))
                return began
        except BaseException:  # the checkpoint may have been loaded in part
            self._load_learned(before[0])
            task_batch.load_state_dict(before[1])
            self.losses = before[2]
            raise


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators of the CPU and of ``device``, and restore them afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
