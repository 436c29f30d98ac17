"""Settings as a TOML file: read for ``--config``, and written into the folder of a run. Needs no torch."""

import difflib
import json
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from eaml_ext import __version__
from eaml_ext._files import atomic_write
from eaml_ext._renamed import FLAGS
from eaml_ext.jobs.config import HOW_TO_START, algo_of, auto_or_number, flag_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NAME = "settings.toml"
# By the type of a default: the types that TOML may give, of which bool is a subclass of int, and their name.
_TYPES: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "an integer"),
    float: ((int, float), "a number"),
    str: ((str,), "a string"),
}


def closest(name: str, known: Collection[str]) -> str:
    """Return ``"; the closest is 'x'"``, or an empty string where no known name is close.

    >>> closest("num_epoch", ["num_epochs", "seed"])
    "; the closest is 'num_epochs'"
    """
    found = difflib.get_close_matches(name, known, n=1)
    return f"; the closest is {found[0]!r}" if found else ""


def owners(name: str, kinds: Mapping[str, Any]) -> str:
    """Return ``"; it is a setting of --algo x"``, or an empty string where no algorithm has the setting ``name``.

    Args:
        name: of a setting.
        kinds: the dataclass of the settings of each algorithm.

    >>> from eaml_ext.jobs.config import DynamicsConfig
    >>> owners("shots", {"dynamics": DynamicsConfig}), owners("shot", {"dynamics": DynamicsConfig})
    ('; it is a setting of --algo dynamics', '')
    """
    found = [algo for algo, kind in kinds.items() if name in map(flag_name, fields(kind))]
    return f"; it is a setting of --algo {' and '.join(found)}" if found else ""


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the keys and values of a settings file; keys of version 0.1 become those of this version.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: the file is not TOML.
    """
    try:
        settings = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"config: there is no file {os.fspath(path)}") from None
    except IsADirectoryError:
        wanted = Path(path) / NAME
        raise IsADirectoryError(f"config: {os.fspath(path)} is a folder, a run's settings are in {wanted}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"config: {os.fspath(path)} is not a TOML file ({error})") from None
    return {FLAGS.get(key, key): value for key, value in settings.items()}


def check(
    path: str | os.PathLike[str], settings: dict[str, Any], algo: str, kinds: Mapping[str, Any]
) -> dict[str, Any]:
    """Check keys and types of the settings in a file: argparse would convert a string, as if it were a flag.

    Args:
        path: of the file.
        settings: what :func:`read` returned.
        algo: of the run.
        kinds: the dataclass of the settings of each algorithm.

    Returns:
        The settings by the names of the fields.

    Raises:
        ValueError: a key is no setting of the algorithm, or its value has another type than the default.
    """
    known = {flag_name(f): f for f in fields(kinds[algo])}
    for key, value in settings.items():
        if key not in known:
            text = f"{os.fspath(path)} has the key {key!r}, which is no setting of --algo {algo}"
            raise ValueError(f"config: {text}{owners(key, kinds) or closest(key, known)}")
        default = known[key].default
        types, wanted = _TYPES[type(default)]
        if known[key].metadata.get("type") is auto_or_number and value != default:
            types, wanted = (int, float), f"{default!r} or a number"
        if type(value) not in types:
            raise ValueError(f"config: {os.fspath(path)}: {key} must be {wanted}, got {value!r}")
    return {known[key].name: value for key, value in settings.items()}


def text(settings: Any) -> str:
    """Return the settings of a run as the text of a TOML file.

    Args:
        settings: a dataclass of strings, numbers and booleans, named ``<Algo>Config``. ``resume`` and ``overwrite`` are
            left out: the file repeats a run, and says nothing on earlier files.
    """
    how = f"`eaml-ext --config {NAME}` repeats this run; flags given beside it win, such as --out FOLDER"
    lines = [f"# eaml_ext {__version__}: {how}.\n"]
    lines.append(f"algo = {_toml(algo_of(settings))}\n")
    for f in fields(settings):
        if f.name not in HOW_TO_START:
            lines.append(f"{flag_name(f)} = {_toml(getattr(settings, f.name))}\n")
    return "".join(lines)


def write(folder: str | os.PathLike[str], settings: Any) -> Path:
    """Write the settings of a run to ``settings.toml`` in its folder, whole or not at all.

    Args:
        folder: of the run.
        settings: as of :func:`text`.

    Returns:
        The path.

    Raises:
        OSError: the folder cannot be written.

    >>> import tempfile
    >>> from eaml_ext.jobs.config import DynamicsConfig
    >>> read(write(tempfile.mkdtemp(), DynamicsConfig(seed=3)))["seed"]
    3
    """
    path = Path(folder) / NAME
    with atomic_write(path) as temporary:
        Path(temporary).write_text(text(settings), encoding="utf-8")
    return path


def _toml(value: str | int | float | bool) -> str:
    """Return a scalar in TOML's notation: that of JSON, except that DEL is escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
