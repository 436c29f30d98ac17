"""Names in files of version 0.1, and the names that replaced them.

Files of later versions carry ``FORMAT``; :mod:`eaml_ext.checkpoint` applies the maps to files that carry none.
"""

import re
from collections.abc import Iterable
from typing import Any

FORMAT = 2
"""The format of the files that this version writes; files of version 0.1 carry none."""

SETTINGS = {"shift_levels": "kl_radii"}
"""Settings in the checkpoints of a ``MetaMAMLTrainer``."""

_PARAMETER = re.compile(r"(?P<core>(?:.*\.)?)(?P<name>mix|project|expand|blend)(?P<rest>(?:\.(?:weight|bias))?)")
_IN_CORE = re.compile(r"(?:.*\.)?cores\.\d+\.")


def core_parameters(keys: Iterable[str], prefix: str | None = None) -> dict[str, str]:
    """Map the names of cores' parameters in version 0.1 to the names that mamba_ssm uses.

    Args:
        keys: the keys of a state dict.
        prefix: the prefix of one core's keys, which ends with a dot; None: every ``cores.<number>.`` in the keys.

    >>> core_parameters(["cores.0.project.weight", "cores.0.expand.weight", "cores.0.D"])
    {'cores.0.project.weight': 'cores.0.x_proj.weight', 'cores.0.expand.weight': 'cores.0.dt_proj.weight'}
    >>> core_parameters(["cores.0.project.weight", "mix.weight"])
    {'cores.0.project.weight': 'cores.0.in_proj.weight'}
    """
    keys = list(keys)
    renamed = {}
    for key in keys:
        found = _PARAMETER.fullmatch(key)
        if found is None or not (_IN_CORE.fullmatch(found["core"]) if prefix is None else found["core"] == prefix):
            continue
        # Only S6 has ``expand``; its ``project`` computes delta, B and C, which mamba_ssm calls x_proj.
        project = "x_proj" if found["core"] + "expand.weight" in keys else "in_proj"
        names = {"mix": "out_proj", "project": project, "expand": "dt_proj", "blend": "token_shift_mix"}
        renamed[key] = found["core"] + names[found["name"]] + found["rest"]
    return renamed


def rename_keys(items: dict[Any, Any]) -> dict[Any, Any]:
    """Replace the keys of version 0.1 in a dict: names of settings and of cores' parameters.

    >>> rename_keys({"shift_levels": [0.0], "cores.0.mix.weight": 1, 3: 2})
    {'kl_radii': [0.0], 'cores.0.out_proj.weight': 1, 3: 2}
    """
    names = {**SETTINGS, **core_parameters(key for key in items if isinstance(key, str))}
    return {names.get(key, key): value for key, value in items.items()}


def rename_items(items: list[Any]) -> list[Any]:
    """Replace the names of cores' parameters of version 0.1 in a list.

    >>> rename_items(["cores.0.mix.weight", 3])
    ['cores.0.out_proj.weight', 3]
    """
    names = core_parameters(item for item in items if isinstance(item, str))
    return [names.get(item, item) if isinstance(item, str) else item for item in items]
