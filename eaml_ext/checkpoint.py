"""Tensors and JSON on disk: written atomically, checked when read, never executed; Ctrl-C between two writes.

A checkpoint is one safetensors file. A reader sees the old file or the new one, whole: the bytes go to a temporary file
beside it, are flushed to the disk, and take its name in one step. A checksum over everything stands in the header.
"""

import contextlib
import json
import numbers
import os
import signal
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from eaml_ext import _check
from eaml_ext._files import atomic_write
from eaml_ext._renamed import FORMAT, rename_items, rename_keys

_KEY = "eaml_ext"
_Module = TypeVar("_Module", bound=torch.nn.Module)


def save(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Any = None, *, kind: str | None = None
) -> None:
    """Write ``tensors`` and ``metadata`` to the file ``path``, all of it or nothing.

    Args:
        path: the file; its directory must exist, an existing file is replaced.
        tensors: name to tensor, any shape, dtype (as far as safetensors knows it) and device.
        metadata: anything JSON can hold; a NumPy scalar is written as a number, true or false.
        kind: what the file holds; ``load(kind=...)`` refuses any other.

    Raises:
        TypeError: a value is not a tensor, its dtype cannot be stored, or the metadata are not JSON.
        FileNotFoundError: the directory does not exist.
        OSError: the disk is full, or another reason not to write; an existing file is as it was.

    >>> import tempfile, torch
    >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
    >>> save(path, {"weight": torch.ones(2, 3)}, {"epoch": 4})
    >>> tensors, metadata = load(path)
    >>> tensors["weight"].shape, metadata
    (torch.Size([2, 3]), {'epoch': 4})
    """
    from safetensors import SafetensorError
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
        text = json.dumps({"format": FORMAT, "kind": kind, "metadata": metadata}, default=_number)
    except (TypeError, ValueError) as error:
        raise TypeError(f"checkpoint.save: metadata must be JSON-able ({error})") from None
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"checkpoint.save: the directory {folder} does not exist")

    with atomic_write(path) as temporary:
        try:
            save_file(ready, temporary, {_KEY: text, "crc32": str(_checksum(ready, text))})
        except (KeyError, TypeError, ValueError) as error:
            raise TypeError(f"checkpoint.save: a tensor has a dtype that safetensors cannot store ({error})") from None
        except SafetensorError as error:
            raise OSError(f"checkpoint.save: {path} cannot be written ({error})") from None


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
    tensors, content = _read(path, kind)
    if "format" not in content:
        tensors = rename_keys(tensors)
    return {name: value.to(device) for name, value in tensors.items()}, content["metadata"]


def _read(path: str | os.PathLike[str], kind: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and its header: format, kind and metadata."""
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
    with content_errors("checkpoint.load", path):
        content = json.loads(header[_KEY])
        came, _ = content["kind"], content["metadata"]
    if kind is not None and came != kind:
        raise ValueError(f"checkpoint.load: {path} holds {came or 'tensors of no kind'}, wanted {kind}")
    return tensors, content


def save_state(path: str | os.PathLike[str], state: Any, *, kind: str | None = None) -> None:
    """:func:`save` of a nest such as ``state_dict`` methods return.

    Args:
        path, kind: as in :func:`save`.
        state: dicts (keys strings or integers), lists and tuples, of tensors, NumPy scalars and what JSON holds.

    Raises:
        TypeError, FileNotFoundError: as :func:`save`, or a key is neither string nor integer.

    >>> import tempfile, torch
    >>> path = os.path.join(tempfile.mkdtemp(), "run.safetensors")
    >>> save_state(path, {"step": 3, "moments": {0: (torch.zeros(2), 0.9)}})
    >>> load_state(path)
    {'step': 3, 'moments': {0: (tensor([0., 0.]), 0.9)}}
    """
    tensors: dict[str, Tensor] = {}
    metadata = _pack(state, "state", tensors)
    save(path, tensors, metadata, kind=kind)


def load_state(path: str | os.PathLike[str], device: torch.device | str = "cpu", *, kind: str | None = None) -> Any:
    """What :func:`save_state` wrote. Arguments and errors are those of :func:`load`."""
    tensors, content = _read(path, kind)
    with content_errors("checkpoint.load_state", path):
        # A list of names may hold some of a core's parameters; the names of the tensors end with all of them.
        old_keys = None if "format" in content else {name.rpartition("/")[2] for name in tensors}
        return _unpack(content["metadata"], tensors, device, old_keys)


@contextlib.contextmanager
def content_errors(where: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the errors of a block that reads a file's content into ValueErrors that name the file.

    >>> with content_errors("load", "model.safetensors"):
    ...     {"width": 3}["height"]
    Traceback (most recent call last):
    ValueError: load: model.safetensors is whole, but does not hold what it should (KeyError: 'height')
    """
    try:
        yield
    except json.JSONDecodeError as error:
        reason = str(error)
    except (
        *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError),
        *(RuntimeError, TypeError),  # RecursionError is a RuntimeError
    ) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    else:
        return
    raise ValueError(f"{where}: {os.fspath(path)} is whole, but does not hold what it should ({reason})") from None


sound = content_errors


def save_module(
    where: str, module: torch.nn.Module, options: dict[str, Any], path: str | os.PathLike[str], *, kind: str
) -> None:
    """The module's tensors, and the options that made it, for :func:`load_module`.

    Raises: as :func:`save`; ValueError for an option that is a callable, and for quantised layers.
    """
    for name, value in options.items():
        if callable(value):
            text = f"{name} is a custom callable, which a file cannot hold; save state_dict() instead"
            raise ValueError(f"{where}: {text}")
    tensors = module.state_dict()
    packed = next((name for name, value in tensors.items() if not isinstance(value, torch.Tensor)), None)
    if packed is not None:
        text = f"{packed} is no tensor, so its layer is quantised; save the model before it is quantised"
        raise ValueError(f"{where}: {text}")
    save(path, tensors, options, kind=kind)


def load_module(
    where: str, make: Callable[..., _Module], path: str | os.PathLike[str], device: torch.device | str, *, kind: str
) -> _Module:
    """The module that ``make(**metadata)`` builds, with the file's tensors; none is built that they do not fit.

    Raises: as :func:`load`; ValueError where tensors and metadata do not belong together.
    """
    tensors, options = load(path, kind=kind)
    with content_errors(where, path):
        if not isinstance(options, dict) or options.get("num_layers", 0) > len(tensors):
            raise ValueError(f"{where}: {os.fspath(path)} has options that its tensors do not fit: {options!r:.200}")
        with torch.device("meta"):  # however large, it takes no memory
            wanted = {name: tuple(t.shape) for name, t in make(**options, device="meta").state_dict().items()}
        for name in [*wanted, *tensors]:
            came = tuple(tensors[name].shape) if name in tensors else None
            if came != wanted.get(name):
                text = f"{name} of shape {came}, its options want {wanted.get(name)}"
                raise ValueError(f"{where}: {os.fspath(path)} has {text}")
        model = make(**options, device=device)
        model.load_state_dict(tensors)
        return model


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[list[int]]:
    """A list that the first Ctrl-C makes non-empty, so that a loop can end where its state is whole.

    The second Ctrl-C does what Ctrl-C did before. Only the main thread may set handlers, and Ctrl-C reaches no other:
    elsewhere the list stays empty.

    >>> with deferred_interrupt() as interrupted:
    ...     signal.raise_signal(signal.SIGINT)
    ...     print("the loop ends here" if interrupted else "the loop goes on")
    the loop ends here
    """
    seen: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    # None: Python did not set it. Ignored: as of a job in the background, which stays so.
    if threading.current_thread() is not threading.main_thread() or before in (None, signal.SIG_IGN):
        yield seen
        return

    def handler(number: int, frame: Any) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handler)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def _pack(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The tree as JSON, its tensors moved to ``tensors``; dicts as pairs, since JSON knows no integer keys."""
    if isinstance(tree, Tensor):
        name = f"{len(tensors)} {name}"  # the number, because keys may hold slashes too
        tensors[name] = tree
        return {"tensor": name}
    if isinstance(tree, Mapping):
        return {"dict": [[_key(key, name), _pack(value, f"{name}/{key}", tensors)] for key, value in tree.items()]}
    if isinstance(tree, (list, tuple)):
        items = [_pack(value, f"{name}/{i}", tensors) for i, value in enumerate(tree)]
        return {"tuple" if isinstance(tree, tuple) else "list": items}
    return tree


def _key(key: Any, name: str) -> str | int:
    """The key of a dict as JSON holds it in a pair."""
    if isinstance(key, str):
        return str(key)
    if isinstance(key, numbers.Integral) and not isinstance(key, bool):
        return int(key)
    raise TypeError(f"checkpoint.save_state: keys must be strings or integers, got {key!r} in {name}")


def _number(value: Any) -> Any:
    """A NumPy scalar as Python's, for ``json.dumps``."""
    if isinstance(value, np.floating):
        return float(value)  # item() of a longdouble is a longdouble again
    if isinstance(value, np.generic) and not isinstance(value, np.clongdouble):
        return value.item()
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _unpack(tree: Any, tensors: Mapping[str, Tensor], device: torch.device | str, old_keys: set[str] | None) -> Any:
    """The inverse of :func:`_pack`; ``old_keys``: the file's keys if version 0.1 wrote it."""
    if not isinstance(tree, dict):
        return tree
    (kind,) = tree if len(tree) == 1 else ("",)
    value = tree[kind]
    if kind == "tensor":
        return tensors[value].to(device)
    if kind == "dict":
        pairs = {key: _unpack(item, tensors, device, old_keys) for key, item in _pairs(value)}
        return pairs if old_keys is None else rename_keys(pairs, old_keys)
    items = [_unpack(item, tensors, device, old_keys) for item in value]
    return {"tuple": tuple, "list": list}[kind](items if old_keys is None else rename_items(items, old_keys))


def _pairs(value: Any) -> Any:
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise TypeError("a dict is not pairs")
    return value


def _checksum(tensors: Mapping[str, Tensor], text: str) -> int:
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return value
