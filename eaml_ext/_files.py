"""Atomic writing of files. Needs no torch."""

import contextlib
import os
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield the path of an empty temporary file, which replaces ``path`` where the block ends without an error.

    A reader sees the whole old file or the whole new one. The temporary file stands in the same directory, is flushed
    to the disk, and takes the name in one step. An error in the block or in those steps removes the temporary file and
    keeps the old one.

    Args:
        path: the file to write; its directory must exist.

    Raises:
        OSError: the directory does not exist or cannot be written, or the disk is full.

    >>> import tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "report.txt")
    >>> with atomic_write(path) as temporary, open(temporary, "w") as file:
    ...     _ = file.write("done")
    >>> open(path).read(), os.listdir(os.path.dirname(path))
    ('done', ['report.txt'])
    """
    path = os.path.abspath(os.fspath(path))
    temporary = f"{path}.{os.getpid()}-{threading.get_ident()}.tmp"  # processes and threads may write at once
    try:
        with open(temporary, "wb"):
            mode = os.stat(temporary).st_mode  # as the umask allows; the block may replace the file by its own
        yield temporary
        os.chmod(temporary, mode)
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    with contextlib.suppress(OSError):  # not every file system lets a directory be flushed
        _flush(os.path.dirname(path))


def _flush(path: str) -> None:
    """Flush a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)  # Windows flushes writable files
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
