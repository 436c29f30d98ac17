"""Destinations of a run's numbers: an object with ``add_scalar``, or a directory for TensorBoard."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class ScalarLog(Protocol):
    """The part of TensorBoard's ``SummaryWriter`` that the trainer uses."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> Any:
        """Write one number of step ``global_step``."""


Log = ScalarLog | str | os.PathLike[str] | None


def check_log(where: str, log: Any) -> None:
    """Raise TypeError unless ``log`` is a destination or None, ImportError where it needs TensorBoard."""
    if isinstance(log, (str, os.PathLike)):
        _summary_writer()
    elif not (log is None or isinstance(log, ScalarLog)):
        kind = type(log).__name__
        raise TypeError(f"{where}: log must be a directory or have add_scalar, as a SummaryWriter, got {kind}")


@contextmanager
def open_log(log: Log, step: int) -> Iterator[ScalarLog | None]:
    """Yield the destination; a directory's writer is closed afterwards.

    A directory may hold numbers that an interrupted run wrote after its last checkpoint. Those from ``step`` on are
    hidden, because their steps are made again.
    """
    if not isinstance(log, (str, os.PathLike)):
        yield log
        return
    with _summary_writer()(os.fspath(log), purge_step=step) as writer:
        yield writer


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError(
            "MetaMAMLTrainer: log is a directory, which needs TensorBoard: pip install tensorboard"
        ) from None
    return SummaryWriter
