"""Tensors and JSON on disk: written atomically, checked when read, never executed.

A checkpoint is one safetensors file. A reader sees the old file or the new one, whole: the bytes go to a temporary file
beside it, are flushed to the disk, and take its name in one step. A checksum over everything stands in the header.
"""

import contextlib
import json
import os
import threading
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eaml_ext import _check

_KEY = "eaml_ext"


def save(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Any = None, *, kind: str | None = None
) -> None:
    """Write ``tensors`` and ``metadata`` to the file ``path``, all of it or nothing.

    Args:
        path: the file; its directory must exist, an existing file is replaced.
        tensors: name to tensor, any shape, dtype (as far as safetensors knows it) and device.
        metadata: anything JSON can hold.
        kind: what the file holds; ``load(kind=...)`` refuses any other.

    Raises:
        TypeError: a value is not a tensor, its dtype cannot be stored, or the metadata are not JSON.
        FileNotFoundError: the directory does not exist.

    >>> import tempfile, torch
    >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
    >>> save(path, {"weight": torch.ones(2, 3)}, {"epoch": 4})
    >>> tensors, metadata = load(path)
    >>> tensors["weight"].shape, metadata
    (torch.Size([2, 3]), {'epoch': 4})
    """
    from safetensors.torch import save_file

    path = os.path.abspath(os.fspath(path))
    ready: dict[str, Tensor] = {}
    storages = set()
    for name, value in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"checkpoint.save: the names of tensors must be strings, got {name!r}")
        _check.tensor("checkpoint.save", name, value)
        if value.layout != torch.strided or value.device.type == "meta":
            raise TypeError(f"checkpoint.save: {name} must be a dense tensor with data, got one on {value.device}")
        value = value.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory (tied weights): the second one is written as a copy.
        if value.numel() and value.untyped_storage().data_ptr() in storages:
            value = value.clone()
        storages.add(value.untyped_storage().data_ptr())
        ready[name] = value
    try:
        text = json.dumps({"kind": kind, "metadata": metadata})
    except (TypeError, ValueError) as error:
        raise TypeError(f"checkpoint.save: metadata must be JSON-able ({error})") from None
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"checkpoint.save: the directory {folder} does not exist")

    temporary = f"{path}.{os.getpid()}-{threading.get_ident()}.tmp"
    try:
        with open(temporary, "wb"):
            mode = os.stat(temporary).st_mode  # what the umask allows; safetensors may write a file of its own
        try:
            save_file(ready, temporary, {_KEY: text, "crc32": str(_checksum(ready, text))})
        except (KeyError, TypeError, ValueError) as error:
            raise TypeError(f"checkpoint.save: a tensor has a dtype that safetensors cannot store ({error})") from None
        os.chmod(temporary, mode)
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    with contextlib.suppress(OSError):  # not every file system lets a directory be flushed
        _flush(folder)


def load(
    path: str | os.PathLike[str], device: torch.device | str = "cpu", *, kind: str | None = None
) -> tuple[dict[str, Tensor], Any]:
    """Read a file that :func:`save` wrote: ``(tensors, metadata)``. No code in the file is ever run.

    Args:
        path: the file.
        device: where the tensors go.
        kind: what the file must hold, as given to :func:`save`; None accepts anything.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is not a checkpoint, or holds something of another kind.
    """
    from safetensors import SafetensorError, safe_open

    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"checkpoint.load: there is no file {path}")
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            for name in file.keys():  # noqa: SIM118  (not a dict: it cannot be iterated)
                tensors[name] = file.get_tensor(name)
    except (SafetensorError, ValueError, OSError, RuntimeError) as error:
        raise ValueError(f"checkpoint.load: {path} is damaged or not a checkpoint ({error})") from None
    if _KEY not in header:
        raise ValueError(f"checkpoint.load: {path} was not written by eaml_ext")
    if header.get("crc32") != str(_checksum(tensors, header[_KEY])):
        raise ValueError(f"checkpoint.load: {path} is damaged (its checksum does not match)")
    content = json.loads(header[_KEY])
    if kind is not None and content["kind"] != kind:
        raise ValueError(f"checkpoint.load: {path} holds {content['kind'] or 'tensors of no kind'}, wanted {kind}")
    return {name: value.to(device) for name, value in tensors.items()}, content["metadata"]


def _checksum(tensors: Mapping[str, Tensor], text: str) -> int:
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return value


def _flush(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
