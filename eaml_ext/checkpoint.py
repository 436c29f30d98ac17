"""Checkpoints: one safetensors file each, written atomically, read without running code; and deferred signals.

The header holds the format, the kind, the metadata as JSON, and a CRC-32 of all of it and of the tensors. A reader sees
the whole old file or the whole new one (:func:`eaml_ext._files.atomic_write`).
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
    """Write tensors and metadata to one file, whole or not at all.

    Args:
        path: the file; its directory must exist, an existing file is replaced.
        tensors: name to tensor; any shape and device, any dtype that safetensors can store.
        metadata: JSON values; NumPy scalars are written as numbers and booleans.
        kind: name of the content's type; :func:`load` raises where another one is required.

    Raises:
        TypeError: a value is not a tensor, its dtype cannot be stored, or the metadata are not JSON.
        FileNotFoundError: the directory does not exist.
        OSError: the file cannot be written, for example because the disk is full; an existing file stays.

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
        # safetensors cannot store two tensors that share memory (tied weights): the second one is copied.
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
    """Read a file that :func:`save` wrote. Code in the file is never run.

    Args:
        path: the file.
        device: device of the tensors.
        kind: the required kind, as given to :func:`save`; None accepts any.

    Returns:
        Tensors by name, and the metadata. Files of version 0.1 get the names of today.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is not a checkpoint, or is of another kind.
    """
    tensors, content = _read(path, kind)
    if "format" not in content:
        tensors = rename_keys(tensors)
    return {name: value.to(device) for name, value in tensors.items()}, content["metadata"]


def _read(path: str | os.PathLike[str], kind: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a file, and its header: format, kind and metadata."""
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
        newer = content.get("format", 1) > FORMAT
    if newer:
        raise ValueError(f"checkpoint.load: {path} was written by a newer version of eaml_ext")
    if kind is not None and came != kind:
        raise ValueError(f"checkpoint.load: {path} holds {came or 'tensors of no kind'}, wanted {kind}")
    return tensors, content


def save_state(path: str | os.PathLike[str], state: Any, *, kind: str | None = None) -> None:
    """Write a nest, as ``state_dict`` methods return it, to one file.

    Args:
        path, kind: as of :func:`save`.
        state: dicts with strings and integers as keys, lists and tuples, of tensors, NumPy scalars and JSON values.

    Raises:
        TypeError, FileNotFoundError, OSError: as :func:`save`; TypeError also for another key.

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
    """Read the nest that :func:`save_state` wrote.

    Args:
        path, device, kind: as of :func:`load`.

    Returns:
        The nest. Files of version 0.1 get the names of today.

    Raises:
        FileNotFoundError, ValueError: as :func:`load`.
    """
    tensors, content = _read(path, kind)
    with content_errors("checkpoint.load_state", path):
        # A list of names may hold some of a core's parameters; the names of the tensors end with all of them.
        old_keys = None if "format" in content else {name.rpartition("/")[2] for name in tensors}
        return _unpack(content["metadata"], tensors, device, old_keys)


@contextlib.contextmanager
def content_errors(where: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the errors of a block that uses a file's content into a ValueError that names the file.

    Args:
        where: the function that reads the file.
        path: the file.

    Raises:
        ValueError: the block raised an error that wrong content can cause.

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


def save_module(
    where: str, module: torch.nn.Module, options: dict[str, Any], path: str | os.PathLike[str], *, kind: str
) -> None:
    """Write a module's tensors and the options that made it.

    Args:
        where: the public function, which errors name.
        module: the module.
        options: keyword arguments of its class.
        path, kind: as of :func:`save`.

    Raises:
        ValueError: an option is a callable, or a layer is quantised.
        FileNotFoundError, OSError: as :func:`save`.
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
    """Read the module that :func:`save_module` wrote.

    Args:
        where: the public function, which errors name.
        make: builds a module from the options and ``device``.
        path, device, kind: as of :func:`load`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as :func:`load`, or the tensors do not fit the options. No module is built then.
    """
    tensors, options = load(path, kind=kind)
    with content_errors(where, path):
        if not isinstance(options, dict) or options.get("num_layers", 0) > len(tensors):
            raise ValueError(f"{where}: {os.fspath(path)} has options that its tensors do not fit: {options!r:.200}")
        with torch.device("meta"):  # takes no memory, whatever the size
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
    """Yield a list that the first SIGINT (Ctrl-C) or SIGTERM makes non-empty: a loop can end where its state is whole.

    The second signal has its former effect, and so has a signal that is ignored. Only the main thread may set handlers
    and receives signals, so the list stays empty in others.

    >>> with deferred_interrupt() as interrupted:
    ...     signal.raise_signal(signal.SIGINT)
    ...     print("the loop ends here" if interrupted else "the loop goes on")
    the loop ends here
    """
    seen: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # None: a handler that Python did not set. SIG_IGN: a job in the background, which ignores Ctrl-C.
    before = {number: handler for number, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    if threading.current_thread() is not threading.main_thread():
        before = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def defer(number: int, frame: Any) -> None:
        seen.append(number)
        restore()

    for number in before:
        signal.signal(number, defer)
    try:
        yield seen
    finally:
        restore()


def _pack(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return the tree as JSON with its tensors moved to ``tensors``; dicts as pairs: JSON has no integer keys."""
    if isinstance(tree, Tensor):
        name = f"{len(tensors)} {name}"  # the number keeps names apart, because keys may hold slashes
        tensors[name] = tree
        return {"tensor": name}
    if isinstance(tree, Mapping):
        return {"dict": [[_key(key, name), _pack(value, f"{name}/{key}", tensors)] for key, value in tree.items()]}
    if isinstance(tree, (list, tuple)):
        items = [_pack(value, f"{name}/{i}", tensors) for i, value in enumerate(tree)]
        return {"tuple" if isinstance(tree, tuple) else "list": items}
    return tree


def _key(key: Any, name: str) -> str | int:
    """Return the key of a dict as a JSON value."""
    if isinstance(key, str):
        return str(key)
    if isinstance(key, numbers.Integral) and not isinstance(key, bool):
        return int(key)
    raise TypeError(f"checkpoint.save_state: keys must be strings or integers, got {key!r} in {name}")


def _number(value: Any) -> Any:
    """Return a NumPy scalar as Python's, for ``json.dumps``."""
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
