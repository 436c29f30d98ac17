"""Run checkpoints of version 0.1: rewritten in place as checkpoints of ``MetaMAMLTrainer``, so that the run goes on.

The run keeps the units of steps and observations that are stored with its model, because its parameters were learned in
them. The context embeddings of its experience are recomputed, because new ones would not be comparable with the old.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eaml_ext import checkpoint
from eaml_ext.jobs.config import DynamicsConfig
from eaml_ext.jobs.world_model import DynamicsModel, features, task_embedding
from eaml_ext.meta import MetaMAMLTrainer, TaskSource

KIND = "dynamics-run"


def upgrade(path: Path, trainer: MetaMAMLTrainer, source: TaskSource, settings: DynamicsConfig) -> None:
    """Rewrite the checkpoint ``path`` where version 0.1 wrote it; leave any other file as it is.

    Args:
        path: the checkpoint.
        trainer: the trainer that continues the run.
        source: its meta-batches.
        settings: of the run that continues it.

    Raises:
        ValueError: the run has other settings or more meta-updates, or the file does not hold a run.
        OSError: the file cannot be written.
    """
    try:
        state = checkpoint.load_state(path, kind=KIND)
    except ValueError:  # of another kind, or damaged: the trainer reads it and raises where it must
        return
    with checkpoint.content_errors("DynamicsConfig: resume", path):
        for name, mine in source.describe().items():
            if (came := state["settings"].get(name)) != mine:
                text = f"{path} is of a run with {name}={came!r}, this one has {mine!r}"
                raise ValueError(f"DynamicsConfig: resume: {text}")
        done, total = len(state["losses"]), settings.num_epochs * settings.updates_per_epoch
        if done > total:
            text = f"holds {done} meta-updates, num_epochs={settings.num_epochs} makes {total}"
            raise ValueError(f"DynamicsConfig: resume: checkpoint {path} {text}")
        model: Any = copy.deepcopy(trainer.maml.model).cpu()
        model.load_state_dict(state["maml"]["model"])
        fields = state["buffer"]["fields"]
        fields["context_embedding"] = embeddings(model, fields)
        upgraded = {
            "settings": trainer.describe(source),
            "began": 0,
            "losses": torch.tensor(state["losses"], dtype=torch.float64),
            "mamls": [state["maml"]],
            "lr_schedulers": [state["schedule"]],
            "task_batch": source.state_dict(),
            "extra_state": state["buffer"],
        }
    checkpoint.save_state(path, upgraded, kind="MetaMAMLTrainer")


@torch.no_grad()
def embeddings(model: DynamicsModel, fields: dict[str, Tensor]) -> Tensor:
    """Recompute the context embeddings of a buffer's items from the items of each task.

    Args:
        model: the run's model, whose units count.
        fields: of the buffer, ``(items, ...)`` each: ``state``, ``action``, ``start``, ``next_state`` and ``task``.

    Returns:
        ``(items, embedding_dim)``, equal rows for the items of a task.
    """
    x = model.in_units(features(fields["state"], fields["action"], fields["start"]))
    y = model.targets(fields["state"], fields["next_state"])
    _, number = fields["task"].unique(return_inverse=True)
    of_task = [task_embedding(x[None, number == i], y[None, number == i]) for i in range(int(number.max()) + 1)]
    return torch.cat(of_task)[number]
