"""Names in files of version 0.1, and the names that replaced them.

Files of later versions carry ``FORMAT``; :mod:`eaml_ext.checkpoint` applies the maps to files that carry none.
"""

import re
from collections.abc import Iterable, Mapping, Set
from typing import Any

FORMAT = 2
"""The format of the files that this version writes; files of version 0.1 carry none."""

SETTINGS = {"shift_levels": "kl_radii"}
"""Settings in the checkpoints of a ``MetaMAMLTrainer``."""

FLAGS = {"rows": "rollouts_per_task"}
"""Flags in the settings.toml of a job."""

_PARAMETER = re.compile(
    r"(?P<core>(?:.*\.)?)(?:(?P<layer>mix|project|expand|blend)(?P<rest>(?:\.(?:weight|bias))?)|(?P<lru>nu|theta|gamma))"
)
_IN_CORE = re.compile(r"(?:.*\.)?cores\.\d+\.")
# Each core of this package has one of these parameters; cores of users keep their names.
_MARKS = ("A_log", "nu", "log_gamma", "receptance.weight")


def core_parameters(
    keys: Iterable[str], prefix: str | None = None, file_keys: Set[str] = frozenset()
) -> dict[str, str]:
    """Map the names of cores' parameters in version 0.1 to those of mamba_ssm and of the LRU paper.

    Args:
        keys: the keys of a state dict.
        prefix: the prefix of one core's keys, which ends with a dot; None: every ``cores.<number>.`` in the keys.
        file_keys: all keys of the file, where ``keys`` may be some of a core's: they identify the core.

    Returns:
        Old name to new name, without the names that stay.

    >>> core_parameters(["cores.0.project.weight", "cores.0.expand.weight", "cores.0.A_log"])
    {'cores.0.project.weight': 'cores.0.x_proj.weight', 'cores.0.expand.weight': 'cores.0.dt_proj.weight'}
    >>> core_parameters(["cores.0.project.weight", "cores.0.log_gamma", "mix.weight"])
    {'cores.0.project.weight': 'cores.0.in_proj.weight'}
    >>> core_parameters(["cores.0.project.weight"], file_keys={"cores.0.expand.weight", "cores.0.A_log"})
    {'cores.0.project.weight': 'cores.0.x_proj.weight'}
    >>> core_parameters(["cores.0.nu", "cores.0.theta", "cores.1.theta"])
    {'cores.0.nu': 'cores.0.nu_log', 'cores.0.theta': 'cores.0.theta_log'}
    """
    keys = dict.fromkeys(keys)
    known = file_keys | keys.keys()
    renamed = {}
    for key in keys:
        found = _PARAMETER.fullmatch(key)
        if found is None or not (_IN_CORE.fullmatch(found["core"]) if prefix is None else found["core"] == prefix):
            continue
        core = found["core"]
        if found["lru"]:
            if core + "nu" in known:  # Retention has a theta too, which keeps its name
                renamed[key] = f"{key}_log"
            continue
        if not any(core + mark in known for mark in _MARKS):
            continue
        # Only S6 has ``expand``; its ``project`` computes dt, B and C, which mamba_ssm calls x_proj.
        project = "x_proj" if core + "expand.weight" in known else "in_proj"
        names = {"mix": "out_proj", "project": project, "expand": "dt_proj", "blend": "token_shift_mix"}
        renamed[key] = core + names[found["layer"]] + found["rest"]
    return renamed


def rename_keys(items: dict[Any, Any], file_keys: Set[str] = frozenset()) -> dict[Any, Any]:
    """Replace the keys of version 0.1 in a dict: names of settings and of cores' parameters.

    >>> rename_keys({"shift_levels": [0.0], "cores.0.mix.weight": 1, "cores.0.A_log": 0, 3: 2})
    {'kl_radii': [0.0], 'cores.0.out_proj.weight': 1, 'cores.0.A_log': 0, 3: 2}
    """
    names = {**SETTINGS, **core_parameters((key for key in items if isinstance(key, str)), file_keys=file_keys)}
    return {names.get(key, key): value for key, value in items.items()}


def rename_items(items: list[Any], file_keys: Set[str] = frozenset()) -> list[Any]:
    """Replace the names of cores' parameters of version 0.1 in a list.

    >>> rename_items(["cores.0.mix.weight", 3], file_keys={"cores.0.A_log"})
    ['cores.0.out_proj.weight', 3]
    """
    names = core_parameters((item for item in items if isinstance(item, str)), file_keys=file_keys)
    return [names.get(item, item) if isinstance(item, str) else item for item in items]


def adapter_entries(entries: Mapping[str, Any], model_keys: Iterable[str]) -> dict[str, Any]:
    """Replace the names of cores' parameters of version 0.1 in an entry of an Adapter's state.

    Args:
        entries: some parameters of the model, by names of either version.
        model_keys: the names of all parameters and buffers of the model, which identify its cores.

    >>> adapter_entries({"cores.0.mix.weight": 1}, ["cores.0.nu_log", "cores.0.out_proj.weight"])
    {'cores.0.out_proj.weight': 1}
    """
    keys = set(model_keys)
    keys |= {key.replace("dt_proj.", "expand.").removesuffix("_log") for key in keys}
    names = core_parameters(entries, file_keys=keys)
    return {names.get(name, name): value for name, value in entries.items()}


def adapter_statistics(statistics: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the names of version 0.1 in the loss statistics of an Adapter's state.

    >>> adapter_statistics({"count": 3, "early": (1.0, 2.0, 1.5), "scatter": 0.2, "strange": 0})
    {'count': 3, 'warmup_losses': (1.0, 2.0, 1.5), 'ema_sq_dev': 0.2, 'consecutive_spikes': 0}
    """
    names = {"early": "warmup_losses", "scatter": "ema_sq_dev", "strange": "consecutive_spikes"}
    return {names.get(name, name): value for name, value in statistics.items()}
