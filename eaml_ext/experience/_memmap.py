"""The columns of a buffer as memory-mapped files in a directory, for memories larger than RAM.

The directory holds three kinds of files:

- ``buffer.safetensors``: counters, options, schema, generator, and the names of the field files. Only
  :meth:`MemmapDirectory.commit` replaces it, atomically and after a flush of the columns. It therefore never describes
  data that are not on the disk.
- ``field-<series>-<i>.bin``: the raw elements of field i, slot by slot. Each allocation of columns has a new series.
- ``lock``: locked by the process that has the buffer open.
"""

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eaml_ext import checkpoint

try:
    import fcntl
except ImportError:  # not a POSIX system: the directory is not locked there
    fcntl = None  # type: ignore[assignment]

_KIND = "ExperienceBuffer.directory"
_FIELD = re.compile(r"field-\d+-\d+\.bin")

ColumnSpecs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # field to dtype and shape ``(num_slots, *item shape)``


class MemmapDirectory:
    """The files of one buffer, held by one process at a time.

    Args:
        where: names the caller in errors.
        path: the directory.
        create: make the directory if it does not exist, and require that it holds no buffer.

    Raises:
        TypeError: ``path`` is not a path.
        FileNotFoundError: the directory does not exist, and ``create`` is False.
        ValueError: the directory cannot be made, or holds a buffer.
        BlockingIOError: another buffer, here or in another process, holds the directory.
    """

    def __init__(self, where: str, path: str | os.PathLike[str], *, create: bool = False):
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"{where}: directory must be a path, got {type(path).__name__}")
        if create:
            try:
                os.makedirs(path, exist_ok=True)
            except OSError as error:
                raise ValueError(f"{where}: directory {os.fspath(path)!r} cannot be made: {error}") from None
        elif not os.path.isdir(path):
            raise FileNotFoundError(f"{where}: there is no directory {os.fspath(path)}")
        self.path = Path(path)
        self._maps: dict[str, np.memmap] = {}
        self._files: dict[str, str] = {}  # name of the field to name of the file
        self._process = os.getpid()
        self._lock = open(self.path / "lock", "a")  # noqa: SIM115 (held as long as the buffer lives)
        if fcntl is not None:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._lock.close()
                raise BlockingIOError(f"{where}: directory {self.path} is in use by another buffer") from None
        if create and self.exists:
            self.close()
            raise ValueError(f"{where}: directory {path} holds a buffer, ExperienceBuffer.open opens it")

    @property
    def closed(self) -> bool:
        return self._lock.closed

    @property
    def owned(self) -> bool:
        """Whether this process opened the directory. A forked process shares the files and must not write to them."""
        return self._process == os.getpid()

    @property
    def exists(self) -> bool:
        """Whether the directory holds a buffer."""
        return (self.path / "buffer.safetensors").is_file()

    def allocate(self, columns: ColumnSpecs) -> dict[str, Tensor]:
        """Make new files of zeros and map them. The space on the disk is taken at once.

        Raises:
            OSError: the disk has not enough space; the new files have been removed.
        """
        series = 1 + max((int(name.split("-")[1]) for name in self._field_files()), default=-1)
        files = {name: f"field-{series}-{i}.bin" for i, name in enumerate(columns)}
        try:
            for name, (dtype, shape) in columns.items():
                size = _bytes(dtype, shape)
                with open(self.path / files[name], "wb") as file:
                    if size and hasattr(os, "posix_fallocate"):
                        # Without disk space behind its page, a later write to the map would raise SIGBUS.
                        os.posix_fallocate(file.fileno(), 0, size)
                    file.truncate(size)
        except OSError as error:
            for file_name in files.values():
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path / file_name)
            total = sum(_bytes(*spec) for spec in columns.values())
            reason = f"ExperienceBuffer: the disk does not take the {total} bytes of directory {self.path} ({error})"
            raise OSError(error.errno, reason) from None
        self._files = files
        return self._map(columns)

    def commit(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Flush all columns to the disk, then replace ``tensors`` and ``metadata``, which :meth:`load` returns."""
        for column in self._maps.values():
            column.flush()
        checkpoint.save(self.path / "buffer.safetensors", tensors, {**metadata, "files": self._files}, kind=_KIND)
        for name in set(self._field_files()) - set(self._files.values()):  # files of columns that have been replaced
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path / name)

    def load(self, where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and metadata of the last commit.

        Raises:
            FileNotFoundError: the directory holds no buffer.
            ValueError: its metadata are damaged.
        """
        if not self.exists:
            raise FileNotFoundError(f"{where}: the directory {self.path} holds no buffer")
        with checkpoint.content_errors(where, self.path):
            tensors, metadata = checkpoint.load(self.path / "buffer.safetensors", kind=_KIND)
            self._files = metadata.pop("files")
        return tensors, metadata

    def attach(self, where: str, columns: ColumnSpecs) -> dict[str, Tensor]:
        """Map the files of the last :meth:`load`.

        Raises:
            ValueError: a file is missing, has another size, lies outside the directory, or is named for two fields.
        """
        if len(set(self._files.values())) != len(self._files):
            raise ValueError(f"{where}: {self.path} has one file for several fields")
        for name, spec in columns.items():
            path, size = self.path / self._files[name], _bytes(*spec)
            if not _FIELD.fullmatch(self._files[name]) or not path.is_file() or path.stat().st_size != size:
                raise ValueError(f"{where}: {path} of field {name} is missing or damaged, wanted {size} bytes")
        return self._map(columns)

    def _map(self, columns: ColumnSpecs) -> dict[str, Tensor]:
        self._maps, tensors = {}, {}
        with torch.inference_mode(False):
            for name, (dtype, shape) in columns.items():
                size = _bytes(dtype, shape)
                if size == 0:  # an empty file cannot be mapped
                    tensors[name] = torch.empty(shape, dtype=dtype)
                    continue
                self._maps[name] = np.memmap(self.path / self._files[name], np.uint8, mode="r+", shape=(size,))
                tensors[name] = torch.from_numpy(self._maps[name]).view(dtype).view(shape)
        return tensors

    def close(self) -> None:
        """Close the files. Another buffer may then hold the directory."""
        self._maps = {}
        if fcntl is not None and self.owned and not self.closed:
            # A forked process may have the file open, so that closing it here does not unlock it.
            fcntl.flock(self._lock, fcntl.LOCK_UN)
        self._lock.close()

    def _field_files(self) -> list[str]:
        return [name for name in os.listdir(self.path) if _FIELD.fullmatch(name)]


def _bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * int(np.prod(shape, dtype=np.int64))
