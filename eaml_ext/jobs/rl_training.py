"""Training of the meta-RL jobs with a checkpoint, from which a run goes on with the same bits."""

from functools import partial
from typing import Any

import torch

from eaml_ext import checkpoint
from eaml_ext._terminal import write_line
from eaml_ext.jobs.config import algo_of
from eaml_ext.jobs.rl_config import UPDATES, RLConfig
from eaml_ext.jobs.rl_report import epoch_line
from eaml_ext.jobs.run_folder import RunFolder
from eaml_ext.meta._run_checkpoint import check_settings
from eaml_ext.rl import MAMLRL, RL2


def load_run(settings: RLConfig, folder: RunFolder) -> dict[str, Any] | None:
    """Return the checkpoint of the run that goes on, or None where a run begins.

    Raises:
        ValueError: the file is damaged, or of a run with other settings or with more updates than this one.
    """
    path, where = folder.checkpoint, f"{type(settings).__name__}: resume"
    if not settings.resume or not path.exists():
        return None
    state: dict[str, Any] = checkpoint.load_state(path, kind=f"{algo_of(settings)}-run")
    with checkpoint.content_errors(where, path):
        check_settings(where, path, state["settings"], settings.decisive)
        done, total = len(state["curve"]), settings.num_epochs * UPDATES
        if done > total:
            text = f"holds {done} updates, num_epochs={settings.num_epochs} makes {total}"
            raise ValueError(f"{where}: checkpoint {path} {text}")
        if state["learner"]["updates"] != done or not state["reward_scale"] > 0:
            raise LookupError(f"{state['learner']['updates']} updates have {done} returns")
    return state


def restore(settings: RLConfig, folder: RunFolder, state: dict[str, Any], learner: RL2 | MAMLRL) -> list[float]:
    """Load the learner's state from a checkpoint and return the values of the updates made so far."""
    with checkpoint.content_errors(f"{type(settings).__name__}: resume", folder.checkpoint):
        learner.load_state_dict(state["learner"])
        curve: list[float] = state["curve"].tolist()
        return curve


def train(
    settings: RLConfig, folder: RunFolder, learner: RL2 | MAMLRL, curve: list[float], reward_scale: float
) -> None:
    """Make the updates that are missing; write the checkpoint every ``checkpoint_every`` epochs and at the end.

    Args:
        settings: of the run.
        folder: of the run.
        learner: after ``len(curve)`` updates.
        curve: values of the updates; each update appends one.
        reward_scale: the learner's, which the checkpoint stores.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the current update and the checkpoint.
    """
    total, every = settings.num_epochs * UPDATES, settings.checkpoint_every * UPDATES

    def after_update(_: int, value: float) -> None:
        curve.append(value)
        done = len(curve)
        if done % UPDATES == 0:
            write_line(epoch_line(settings, done // UPDATES - 1, curve[-UPDATES:]))
        if interrupted or done % every == 0 or done == total:
            state = {
                "settings": settings.decisive,
                "reward_scale": reward_scale,
                "curve": torch.tensor(curve, dtype=torch.float64),
                "learner": learner.state_dict(),
            }
            checkpoint.save_state(folder.checkpoint, state, kind=f"{algo_of(settings)}-run")
        if interrupted:
            raise KeyboardInterrupt

    with checkpoint.deferred_interrupt() as interrupted:
        # The total of all calls, so that the learning rate does not depend on where a run was interrupted.
        updates = partial(learner.train, total=total) if isinstance(learner, RL2) else learner.train
        if len(curve) < total:
            updates(total - len(curve), after_update)
    if interrupted:
        raise KeyboardInterrupt
