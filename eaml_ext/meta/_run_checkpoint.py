"""The file of a meta-training run: written and read on rank 0, checked against the run that continues it."""

import os
from collections.abc import Callable
from typing import Any

from eaml_ext.checkpoint import load_state, save_state
from eaml_ext.distributed import Group, run_on_rank_zero
from eaml_ext.meta._types import Stateful

_KIND = "MetaMAMLTrainer"
Path = str | os.PathLike[str]


def save_run(
    path: Path, state: Callable[[], dict[str, Any]], group: Group | None, extra_state: Stateful | None
) -> None:
    """Write ``state()``, and the state of ``extra_state`` if there is one, as a whole file or not at all."""

    def save() -> None:
        extra = {} if extra_state is None else {"extra_state": extra_state.state_dict()}
        save_state(path, {**state(), **extra}, kind=_KIND)

    run_on_rank_zero(group, save)


def read_run(
    where: str, path: Path, group: Group | None, extra_state: Stateful | None
) -> tuple[dict[str, Any] | None, Any]:
    """Return the run's state on all ranks and the extra state on rank 0; ``(None, None)`` where there is no file.

    Raises:
        ValueError: the file is damaged, of another kind, or one of file and call has an extra state alone.
        FileNotFoundError: the directory does not exist.
    """
    extra: Any = None

    def read() -> dict[str, Any] | None:
        nonlocal extra
        if not os.path.isdir(folder := os.path.dirname(os.path.abspath(path))):
            raise FileNotFoundError(f"{where}: checkpoint needs a directory that exists, {folder} does not exist")
        if not os.path.exists(path):
            return None
        state = load_state(path, kind=_KIND)
        if not isinstance(state, dict):
            raise ValueError(f"{where}: checkpoint {os.fspath(path)} holds {type(state).__name__}, wanted a dict")
        if ("extra_state" in state) != (extra_state is not None):
            holds = "an" if "extra_state" in state else "no"
            raise ValueError(f"{where}: checkpoint {os.fspath(path)} holds {holds} extra_state")
        extra = state.pop("extra_state", None)  # not broadcast: a buffer may be large
        return state

    return run_on_rank_zero(group, read), extra


def check_settings(where: str, path: Path, stored: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise ValueError, which names the first one that differs, unless the stored settings are ``settings``."""
    for name, value in settings.items():
        if stored.get(name) != value:
            text = f"{name}={stored.get(name)!r}, this one has {value!r}"
            raise ValueError(f"{where}: checkpoint {os.fspath(path)} is of a run with {text}")


def check_run(
    where: str, path: Path, state: dict[str, Any], settings: dict[str, Any], wanted: int
) -> tuple[list[float], int]:
    """Return the losses of a run and the iteration at which it began.

    Raises:
        ValueError: the run has other settings or made more than ``wanted`` meta-updates.
        LookupError: the file does not hold a run.
    """
    losses, began = state["losses"].tolist(), state["began"]
    done = len(losses) - began
    if not 0 <= began <= len(losses):
        raise LookupError(f"a run began at {began} of {len(losses)} losses")
    # A run without a scheduler does not store lr_scheduler.
    check_settings(where, path, state["settings"], {**settings, "lr_scheduler": settings.get("lr_scheduler")})
    if done > wanted:
        text = f"checkpoint {os.fspath(path)} holds {done} meta-updates, num_meta_iterations is {wanted}"
        raise ValueError(f"{where}: {text}")
    return losses, began
