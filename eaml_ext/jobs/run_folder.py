"""The folder of a run: locked for one process, and without files of another run. Needs no torch."""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from eaml_ext.jobs import config_file
from eaml_ext.jobs.config import algo_of

fcntl: Any
msvcrt: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

CHECKPOINT = "checkpoint.safetensors"
LOCK = ".lock"
RESULTS = {
    "dynamics": ("report.json", "report.png", "model.safetensors", "buffer.safetensors"),
    "rl2": ("report.json", "report.png", "policy.safetensors"),
    "maml": ("report.json", "report.png", "policy.safetensors"),
}
"""The files with which a run of each job ends."""
OUTPUTS = tuple(dict.fromkeys([config_file.NAME, CHECKPOINT, *(name for names in RESULTS.values() for name in names)]))
"""All names that runs write. No other file of a folder is removed."""


class RunFolder:
    """The folder of a run; inside the ``with`` block no other process runs in it.

    Entering makes the folder and its lock. Files of an earlier run are refused, unless the settings have ``overwrite``
    or ``resume``. They change in :meth:`begin` only, once the run is accepted.

    Args:
        settings: ``DynamicsConfig`` or ``RLConfig``.
        on_rank_zero: calls a function on rank 0 alone; default: in this process.

    Attributes:
        path: the folder.
        checkpoint: path of the checkpoint, which need not exist.
        trained: set by the job at the end of training; the text of KeyboardInterrupt depends on it.

    Raises:
        ValueError: the folder cannot be made or written, is in use, or its files forbid the run.
        KeyboardInterrupt: from the block, with a text that states how the run goes on.

    >>> import tempfile
    >>> from eaml_ext.jobs.config import DynamicsConfig
    >>> with RunFolder(DynamicsConfig(out=tempfile.mkdtemp())) as folder:
    ...     folder.begin()
    ...     sorted(os.listdir(folder.path))
    ['.lock', 'settings.toml']
    >>> os.listdir(folder.path)
    ['settings.toml']
    """

    def __init__(self, settings: Any, on_rank_zero: Callable[[Callable[[], None]], None] | None = None) -> None:
        self.path = Path(settings.folder)
        self.checkpoint = self.path / CHECKPOINT
        self.trained = False
        self._settings, self._algo, self._where = settings, algo_of(settings), type(settings).__name__
        self._on_rank_zero = on_rank_zero or (lambda function: function())
        self._lock, self._is_owner, self._begun = contextlib.ExitStack(), False, False

    def __enter__(self) -> "RunFolder":
        self._on_rank_zero(self._acquire)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()
        if kind is KeyboardInterrupt and self._is_owner:
            raise KeyboardInterrupt(self._what_remains()) from None

    def begin(self) -> None:
        """Remove files of earlier runs, and write the settings of this one.

        With ``overwrite`` all outputs go. A resumed run keeps its checkpoint, and its results if they are those of the
        same settings.
        """
        removed = {name for name in os.listdir(self.path) if _TEMPORARY.fullmatch(name)}
        if self._settings.overwrite:
            removed.update(OUTPUTS)
        elif self._stored_text() != config_file.text(self._settings):
            removed.update(RESULTS[self._algo])
        for name in sorted(removed):
            (self.path / name).unlink(missing_ok=True)
        config_file.write(self.path, self._settings)
        self._begun = True

    def _acquire(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            locked = self._lock.enter_context(lock(self.path / LOCK))
        except (OSError, ValueError) as error:  # ValueError: a null character in the path
            reason = f"got {str(self.path)!r} ({error.strerror if isinstance(error, OSError) else error})"
            for path in (self.path, *self.path.parents):
                if os.path.exists(path) and not os.path.isdir(path):
                    reason = f"got {str(self.path)!r}, and {str(path)!r} is a file"
            raise ValueError(f"{self._where}: out must be a folder that can be written, {reason}") from None
        self._is_owner = True
        try:
            if not locked:
                self._refuse("out", "is in use by another run")
            self._check_files()
        except BaseException:
            self._lock.close()
            raise

    def _check_files(self) -> None:
        found = [name for name in OUTPUTS if os.path.lexists(self.path / name)]
        for name in found:
            if os.path.isdir(self.path / name):
                self._refuse("out", f"has a folder {name}, the name of a file that runs write")
        if not found or self._settings.overwrite:
            return
        names = ", ".join(found)
        if not self._settings.resume:
            text = f"has {names} of an earlier run; --resume continues that run, --overwrite replaces its files"
            self._refuse("out", text)
        foreign = set(found) - {config_file.NAME, CHECKPOINT, *RESULTS[self._algo]}
        stored = self._stored_algo()
        if stored != self._algo or foreign:
            job = "another job" if stored == self._algo else f"--algo {stored}"
            self._refuse("resume", f"has {names} of {job}, not of --algo {self._algo}")
        if CHECKPOINT not in found and found != [config_file.NAME]:
            self._refuse("resume", f"has {names}, but no checkpoint; --overwrite starts again")

    def _refuse(self, argument: str, text: str) -> NoReturn:
        raise ValueError(f"{self._where}: {argument}: {self.path} {text}; --out names another folder")

    def _stored_algo(self) -> str:
        """The job of the stored settings; this job if they cannot be read, because the checkpoint is checked, too."""
        try:
            return str(config_file.read(self.path / config_file.NAME).get("algo", "dynamics"))
        except (OSError, ValueError):
            return self._algo

    def _stored_text(self) -> str | None:
        with contextlib.suppress(OSError, ValueError):
            return (self.path / config_file.NAME).read_text(encoding="utf-8")
        return None

    def _what_remains(self) -> str:
        """How an interrupted run goes on."""
        if not self._begun:
            return "interrupted before training; the same command starts again"
        command = "the same command with --resume" + " in place of --overwrite" * self._settings.overwrite
        if not self.checkpoint.exists():
            return f"interrupted before the first checkpoint; {command} starts again"
        if self.trained:
            return f"interrupted after training; {command} evaluates again"
        return f"interrupted; {command} goes on from the checkpoint"


# A file that atomic_write left when its process was killed.
_TEMPORARY = re.compile(f"({'|'.join(map(re.escape, OUTPUTS))})\\.\\d+-\\d+\\.tmp")


@contextlib.contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Yield whether this process holds the lock, which ends with the block or with the process.

    The system's lock on an open file serves, because it ends with a process that is killed. The file is removed while
    it is locked; a process that opened it before then locks a file without a name, and opens it again.

    Args:
        path: of the file to lock; its folder must exist.

    Raises:
        OSError: the file cannot be made.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = _lock_descriptor(descriptor)
            if locked and os.name != "nt" and not _is_named(descriptor, path):
                continue
            try:
                yield locked
            finally:
                if locked:
                    with contextlib.suppress(OSError):  # Windows removes no open file
                        path.unlink()
            return
        finally:
            os.close(descriptor)


def _is_named(descriptor: int, path: Path) -> bool:
    """Return whether ``path`` is still the name of the open file."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def _lock_descriptor(descriptor: int) -> bool:
    """Lock an open file; return False if another process holds the lock."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            return False
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        print("The file system of the folder has no locks: two runs in it are not refused.")
    return True
