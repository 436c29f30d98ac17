"""A buffer's fields as memory-mapped files in a directory, for memories larger than RAM.

The directory holds ``buffer.safetensors``, what the buffer knows about itself; a ``field-<series>-<i>.bin`` for each
field, raw numbers slot by slot; and ``lock``. Only :meth:`Directory.commit` replaces the first, atomically and after
the fields have reached the disk, so that whatever it says is there.
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
except ImportError:  # not a POSIX system: nothing keeps two processes apart there
    fcntl = None  # type: ignore[assignment]

_KIND = "ExperienceBuffer.directory"
_FIELD = re.compile(r"field-\d+-\d+\.bin")


class Directory:
    """The files of one buffer, held by one process at a time.

    Raises:
        BlockingIOError: another buffer, here or in another process, holds the directory.
    """

    def __init__(self, where: str, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._maps: dict[str, np.memmap] = {}
        self._files: dict[str, str] = {}  # field to file
        self._process = os.getpid()
        self._lock = open(self.path / "lock", "a")  # noqa: SIM115 (held as long as the buffer lives)
        if fcntl is not None:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._lock.close()
                raise BlockingIOError(f"{where}: directory {self.path} is in use by another buffer") from None

    @property
    def closed(self) -> bool:
        return self._lock.closed

    @property
    def owned(self) -> bool:
        """Whether this process opened the directory: a forked one shares the files but must not write to them."""
        return self._process == os.getpid()

    @property
    def exists(self) -> bool:
        """Whether a buffer has been kept here."""
        return (self.path / "buffer.safetensors").is_file()

    def allocate(self, fields: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Tensor]:
        """New files, all zeros, of the given dtypes and shapes; the space on the disk is taken at once."""
        series = 1 + max((int(name.split("-")[1]) for name in self._names()), default=-1)
        files = {name: f"field-{series}-{i}.bin" for i, name in enumerate(fields)}
        try:
            for name, (dtype, shape) in fields.items():
                size = _bytes(dtype, shape)
                with open(self.path / files[name], "wb") as file:
                    if size and hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, size)  # or a full disk would kill the process later
                    file.truncate(size)
        except OSError as error:
            for file_name in files.values():
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path / file_name)
            total = sum(_bytes(*spec) for spec in fields.values())
            reason = f"ExperienceBuffer: the disk does not take the {total} bytes of directory {self.path} ({error})"
            raise OSError(error.errno, reason) from None
        self._files = files
        return self._map(fields)

    def commit(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Bring all fields to the disk, then ``tensors`` and ``metadata``: what :meth:`load` finds from now on."""
        for written in self._maps.values():
            written.flush()
        checkpoint.save(self.path / "buffer.safetensors", tensors, {**metadata, "files": self._files}, kind=_KIND)
        for name in set(self._names()) - set(self._files.values()):  # of a state that has been replaced
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path / name)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What was committed last: ``(tensors, metadata)``."""
        tensors, metadata = checkpoint.load(self.path / "buffer.safetensors", kind=_KIND)
        self._files = metadata.pop("files")
        return tensors, metadata

    def attach(self, where: str, fields: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Tensor]:
        """The files that :meth:`load` found, as tensors."""
        if len(set(self._files.values())) != len(self._files):
            raise ValueError(f"{where}: {self.path} has one file for several fields")
        for name, spec in fields.items():
            path, size = self.path / self._files[name], _bytes(*spec)
            if not _FIELD.fullmatch(self._files[name]) or not path.is_file() or path.stat().st_size != size:
                raise ValueError(f"{where}: {path} of field {name} is missing or damaged, wanted {size} bytes")
        return self._map(fields)

    def _map(self, fields: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Tensor]:
        self._maps, tensors = {}, {}
        with torch.inference_mode(False):
            for name, (dtype, shape) in fields.items():
                size = _bytes(dtype, shape)
                if size == 0:  # nothing to map
                    tensors[name] = torch.empty(shape, dtype=dtype)
                    continue
                self._maps[name] = np.memmap(self.path / self._files[name], np.uint8, mode="r+", shape=(size,))
                tensors[name] = torch.from_numpy(self._maps[name]).view(dtype).view(shape)
        return tensors

    def close(self) -> None:
        """Let go of the files; another buffer may hold the directory then."""
        self._maps = {}
        if fcntl is not None and self.owned and not self.closed:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # forked processes keep the lock's file open
        self._lock.close()

    def _names(self) -> list[str]:
        return [name for name in os.listdir(self.path) if _FIELD.fullmatch(name)]


def _bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * int(np.prod(shape, dtype=np.int64))
