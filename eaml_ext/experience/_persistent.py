"""The part of ExperienceBuffer that keeps its content: on disk, in a file, in a state dict, in a copy."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from eaml_ext import checkpoint
from eaml_ext.experience import _serialization
from eaml_ext.experience._draws import Draws
from eaml_ext.experience._index import KeyIndex
from eaml_ext.experience._memmap import MemmapDirectory
from eaml_ext.experience._options import BufferOptions
from eaml_ext.experience._ring import RingStorage
from eaml_ext.experience._schema import SchemaRules

B = TypeVar("B", bound="PersistentBuffer")


class PersistentBuffer:
    """Base of :class:`ExperienceBuffer`; its constructor takes the fields of BufferOptions and sets the attributes."""

    device: torch.device
    storage: RingStorage
    _draws: Draws
    _index: KeyIndex
    _rules: SchemaRules

    if TYPE_CHECKING:

        def __init__(self, *, device: torch.device | str = "cpu", seed: int | None = None, **options: Any): ...

    def flush(self) -> None:
        """Write unwritten items and the generator of a buffer on disk, so that both survive a crash.

        Raises:
            ValueError: the buffer lives in memory (``save`` writes it to a file), or is closed.
        """
        where = "ExperienceBuffer.flush"
        with self.storage.lock:
            if self.storage.files is None:
                raise ValueError(f"{where}: the buffer lives in memory, there is no directory to flush to")
            self.storage.check_writable(where)
            self.storage.flush()

    def close(self) -> None:
        """Flush a buffer on disk and close its files. Afterwards it is empty, and :meth:`add` raises a ValueError.

        In a forked process it closes the files of that process and flushes nothing.
        """
        with self.storage.lock:
            self.storage.close()
            self._index.reset()

    @classmethod
    def open(cls: type[B], directory: str | os.PathLike[str]) -> B:
        """Return the buffer that was made with this ``directory``, as of its last flush. No code in files is executed.

        Raises:
            FileNotFoundError: there is no buffer.
            BlockingIOError: another buffer, here or in another process, has the directory open.
            ValueError: its files are damaged.
            TypeError: ``directory`` is not a path.
        """
        where = "ExperienceBuffer.open"
        files = MemmapDirectory(where, directory)
        try:
            tensors, metadata = files.load(where)
            with checkpoint.content_errors(where, files.path):
                buffer = cls(**BufferOptions.from_file(metadata["options"])._asdict(), seed=0)
                parts = buffer.storage, buffer._draws, buffer._rules
                _serialization.attach_directory(where, *parts, files, tensors, metadata)
        except BaseException:
            files.close()
            raise
        return buffer

    def state_dict(self) -> dict[str, Any]:
        """Return copies of items, counters and generator, which determine the results of all later calls."""
        return _serialization.state_dict("ExperienceBuffer.state_dict", self.storage, self._draws)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state that :meth:`state_dict` returned. Later calls return the same as on the saved buffer.

        Raises:
            ValueError: the capacity differs, an entry is missing, or the fields do not fit together or with
                ``state_dim`` and ``action_dim``, or hold values that are invalid in :meth:`add`.
            TypeError: a counter is no integer, or a field no tensor.
            In both cases nothing has been modified.
        """
        where = "ExperienceBuffer.load_state_dict"
        with self.storage.lock:
            _serialization.load_state_dict(where, self.storage, self._draws, self._rules, state)
            self._index.reset()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the buffer to a file (safetensors), atomically. A buffer on disk is copied to memory first."""
        _serialization.save(path, self.state_dict(), BufferOptions.of(self))

    @classmethod
    def load(cls: type[B], path: str | os.PathLike[str], device: torch.device | str = "cpu") -> B:
        """Return the buffer that :meth:`save` wrote, in memory, on ``device``. No code in the file is executed.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or holds something else.
        """
        tensors, metadata = checkpoint.load(path, kind=_serialization.KIND)
        with checkpoint.content_errors("ExperienceBuffer.load", path):
            state, options = _serialization.from_file(tensors, metadata)
            buffer = cls(**options._asdict(), device=device, seed=0)
            buffer.load_state_dict(state)
        return buffer

    def __getstate__(self) -> dict[str, Any]:  # a copy of a buffer on disk lives in memory
        options = {**BufferOptions.of(self)._asdict(), "device": str(self.device)}
        return _serialization.to_pickle(self.state_dict(), options)

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        self.__init__(**pickled["options"], seed=0)  # type: ignore[misc]
        self.load_state_dict(_serialization.from_pickle(pickled))
