"""The main job: an SSM learns the dynamics of many tasks by MAML, then adapts to unseen ones with retrieved experience.

The model predicts the next observation from the observations and actions of an episode so far. Every transition of
meta-training goes into an ExperienceBuffer. At test time each held-out task gives ``shots`` transitions. The model
adapts on them alone (plain), with experience of other tasks (uniform, nearest, best fit), or not at all. It is judged
on the transitions that follow, beside the predictor that copies its input.

Under ``torchrun`` the ranks share the tasks of every meta-batch; rank 0 alone prints, keeps the experience and adapts.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from eaml_ext._terminal import write_line
from eaml_ext.distributed import Group, run_on_rank_zero, torchrun_group
from eaml_ext.experience import ExperienceBuffer
from eaml_ext.jobs import format_1, report
from eaml_ext.jobs.config import DynamicsConfig
from eaml_ext.jobs.device import torch_device
from eaml_ext.jobs.evaluation import act, adapt
from eaml_ext.jobs.run_folder import RunFolder
from eaml_ext.jobs.tasks import prepare
from eaml_ext.jobs.world_model import DynamicsModel, model_data, task_embedding
from eaml_ext.meta import MetaBatch, MetaMAMLTrainer
from eaml_ext.rl import Trajectories, collect
from eaml_ext.tasks import Task, TaskDistribution

NORMALISATION_ENTRIES = 2**25  # of the observations of 64 tasks; fewer tasks give the units of larger observations


def run(settings: DynamicsConfig) -> dict[str, Any]:
    """Run the job, print its progress and write ``settings.folder``.

    The folder gets ``settings.toml``, ``report.json``, ``report.png`` (with the extra ``plot``), ``model.safetensors``,
    ``buffer.safetensors`` and, during meta-training, ``checkpoint.safetensors``. One process at a time runs in a
    folder. Files of an earlier run are refused, unless ``settings.overwrite`` replaces or ``settings.resume`` continues
    them. A run that was killed at any moment and is resumed ends with the bits of an uninterrupted one. A run of
    version 0.1 goes on in its own units. Another ``num_epochs`` goes on, too, on the schedule of the new total. Ctrl-C
    or SIGTERM during meta-training ends it after the checkpoint is written.

    Under ``torchrun`` all ranks make the same call. Each draws every task, which is cheap, and adapts its part; after
    meta-training only rank 0 goes on. The result is that of one process to rounding, and a run may be resumed by
    another number of ranks.

    Returns:
        The report; empty on other ranks than 0.

    Raises:
        ValueError: a bad device or environment, a damaged checkpoint or one of other settings, a run that exceeds the
            memory, a reward or an observation that is not finite. The folder cannot be written, is in use, or holds an
            earlier run.
        OSError: a file cannot be written, for example because the disk is full.
        RankError: another rank has died; an OSError.
        KeyboardInterrupt: Ctrl-C or SIGTERM, with a text that states how the run goes on.
    """
    started = time.monotonic()
    with torchrun_group() as group:
        device = torch_device("DynamicsConfig", settings.device)
        distribution = prepare(settings, group)
        with RunFolder(settings, partial(run_on_rank_zero, group)) as folder:
            return _run(settings, group, device, distribution, folder, started)


def _run(
    settings: DynamicsConfig,
    group: Group | None,
    device: torch.device,
    distribution: TaskDistribution[Task],
    folder: RunFolder,
    started: float,
) -> dict[str, Any]:
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    model = DynamicsModel(
        distribution.obs_dim, distribution.action_dim, settings.hidden_dim, settings.state_size, settings.num_layers
    )
    count = max(1, min(64, NORMALISATION_ENTRIES // (64 * distribution.obs_dim)))
    model.normalise(collect(distribution, distribution.sample(count, "valid", settings.seed), 64, settings.seed))
    model.to(device)
    buffer = ExperienceBuffer(settings.buffer_size, distribution.obs_dim, distribution.action_dim, device=device)
    total = settings.num_epochs * settings.updates_per_epoch
    trainer = MetaMAMLTrainer(
        model,
        settings.outer_lr,
        settings.inner_lr,
        loss_fn=F.mse_loss,
        inner_steps=settings.inner_steps,
        lr_scheduler=lambda optimizer: CosineSchedule(optimizer, total),
        group=group,
    )

    losses = meta_train(settings, distribution, model, trainer, buffer, folder)
    folder.trained = True
    if not _is_first(group):
        return {}
    print("MetaMAML training completed.")
    print(f"Experience Buffer populated with {len(buffer)} experiences.")
    path = folder.path
    model.save(path / "model.safetensors")
    buffer.save(path / "buffer.safetensors")
    variants, adapted = adapt(settings, distribution, trainer.maml, buffer)
    returns = act(settings, distribution, model, adapted)

    updates = settings.updates_per_epoch
    epochs = [losses[i : i + updates] for i in range(0, len(losses), updates)]
    results: dict[str, Any] = {
        **report.header(settings, started),
        "meta_loss": [sum(epoch) / updates for epoch in epochs],
        "meta_loss_intervals": [report.summary(torch.tensor(epoch))["interval"] for epoch in epochs],
        "variants": {name: report.summary(errors[-1]) for name, errors in variants.items()},
        "returns": {name: report.summary(column) for name, column in returns.items()},
        "curves": {name: errors.mean(dim=1).tolist() for name, errors in variants.items()},
        "curve_intervals": {name: [report.summary(e)["interval"] for e in rows] for name, rows in variants.items()},
    }
    report.write_json(path / "report.json", results)
    report.plot(path / "report.png", results)
    print("=== Hybrid Execution completed successfully ===")
    print(report.table(results["variants"], results["returns"], settings.plan_steps))
    print(f"Results: {path}")
    return results


def meta_train(
    settings: DynamicsConfig,
    distribution: TaskDistribution[Task],
    model: DynamicsModel,
    trainer: MetaMAMLTrainer,
    buffer: ExperienceBuffer,
    folder: RunFolder,
) -> list[float]:
    """Train on freshly drawn tasks, whose transitions go into the buffer of rank 0.

    Update number i is a function of the settings, i and the checkpoint's content.

    Returns:
        The loss of each meta-update.
    """
    group, updates = trainer.group, settings.updates_per_epoch
    total = settings.num_epochs * updates
    path = folder.checkpoint
    source = Transitions(settings, distribution, model)

    def start() -> None:
        if settings.resume:
            print(f"Resumed after {trainer.iteration} of {total} meta-updates.")
        folder.begin()  # only now, because a run that is refused changes no file

    def prepare() -> None:
        if settings.resume and path.exists():
            format_1.upgrade(path, trainer, source, settings)
        else:
            start()

    def after_update(number: int, batch: MetaBatch, loss: float) -> None:
        if not _is_first(group):
            return
        source.remember(number, buffer)
        epoch, rest = divmod(number + 1, updates)
        if rest == 0 and (epoch % 10 == 1 or epoch == settings.num_epochs):
            write_line(f"Epoch {epoch - 1}, Meta Loss: {sum(trainer.losses[-updates:]) / updates:.4f}")

    run_on_rank_zero(group, prepare)
    try:
        return trainer.meta_train(
            source,
            total,
            checkpoint=path,
            checkpoint_every=settings.checkpoint_every * updates,
            on_iteration=after_update,
            extra_state=BufferState(buffer, start),
        )
    except ValueError as error:
        where = "MetaMAMLTrainer.meta_train: "
        if not str(error).startswith(where):
            raise
        text = str(error).removeprefix(where)
        text = text.replace(f"num_meta_iterations is {total}", f"num_epochs={settings.num_epochs} makes {total}")
        raise ValueError(f"DynamicsConfig: resume: {text}") from None


class CosineSchedule(CosineAnnealingLR):
    """``lr (1 + cos(pi i / T_max)) / 2`` before update i. The state of another ``T_max`` goes on with this one's."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the update that was reached, whose learning rate becomes that of this schedule."""
        super().load_state_dict({**state, "T_max": self.T_max})
        if state["T_max"] != self.T_max:
            factor = (1 + math.cos(math.pi * self.last_epoch / self.T_max)) / 2
            for group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
                group["lr"] = lr * factor


class Transitions:
    """Meta-batches of freshly drawn tasks: the model adapts on ``shots`` transitions of each, ``query`` follow them.

    A :class:`eaml_ext.meta.TaskSource`.

    Args:
        settings: of the run.
        distribution: of the tasks.
        model: the :class:`DynamicsModel`, whose units the targets have.
    """

    def __init__(self, settings: DynamicsConfig, distribution: TaskDistribution[Task], model: DynamicsModel) -> None:
        self.seed = settings.seed
        self._settings, self._distribution, self._model = settings, distribution, model
        self._last: tuple[Trajectories, Tensor]  # of the last meta-batch: transitions and context embeddings

    def batch(self, iteration: int) -> MetaBatch:
        """Return meta-batch number ``iteration``."""
        settings, k = self._settings, self._settings.shots
        tasks = self._distribution.sample(settings.tasks_per_update, "train", settings.seed, epoch=iteration)
        data = collect(self._distribution, tasks, k + settings.query, settings.seed)
        x, y = model_data(data, self._model)
        self._last = data, task_embedding(self._model.in_units(x), y)
        count = len(tasks)
        pairs = [(x[i, :k], y[i, :k], x[i, k:], y[i, k:]) for i in range(count)]
        return MetaBatch(pairs, [None] * count, [-1] * count)

    def remember(self, iteration: int, buffer: ExperienceBuffer) -> None:
        """Add the transitions of the last meta-batch, whose number is ``iteration``, task by task in order of time."""
        data, embeddings = self._last
        tasks, time = data.rewards.shape
        numbers = iteration * tasks + torch.arange(tasks, device=buffer.device)
        buffer.add(
            state=data.observations.flatten(0, 1).to(buffer.device),
            action=data.actions.flatten(0, 1).to(buffer.device),
            reward=data.rewards.flatten().to(buffer.device),
            next_state=data.next_observations.flatten(0, 1).to(buffer.device),
            start=data.resets.flatten().to(buffer.device),
            context_embedding=embeddings.repeat_interleave(time, dim=0),
            task=numbers.repeat_interleave(time),
        )

    def describe(self) -> dict[str, Any]:
        """Return the settings that must be equal for a run to be continued."""
        return self._settings.decisive

    def update(self, indices: Sequence[int], losses: Tensor) -> None:
        """Do nothing: tasks never come again."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: a meta-batch depends on its number alone."""
        return {}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Do nothing."""


@dataclass
class BufferState:
    """The buffer as a part of the checkpoint; ``loaded`` is called after the checkpoint was loaded."""

    buffer: ExperienceBuffer
    loaded: Callable[[], None]

    def state_dict(self) -> dict[str, Any]:
        """Return the buffer's state."""
        return self.buffer.state_dict()

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Restore the buffer's state."""
        self.buffer.load_state_dict(state)
        self.loaded()


def _is_first(group: Group | None) -> bool:
    return group is None or group.rank == 0
