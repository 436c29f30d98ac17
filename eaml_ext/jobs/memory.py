"""A lower bound of the memory of a run, compared with the memory of the machine before any data are collected."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from eaml_ext.jobs.config import DynamicsConfig
from eaml_ext.jobs.evaluation import SIMILAR_TASKS
from eaml_ext.jobs.rl_config import MAMLConfig, RL2Config, RLConfig
from eaml_ext.jobs.world_model import embedding_dim
from eaml_ext.tasks import TaskDistribution

FLOAT = 4  # bytes
# Limits of a container's memory, of version 2 and 1 of control groups.
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check(settings: DynamicsConfig | RLConfig, distribution: TaskDistribution[Any]) -> None:
    """Raise ValueError, which names bytes and the setting to change, if a run cannot fit into memory.

    Args:
        settings: of the run.
        distribution: of its tasks; the sizes of observations and actions count.
    """
    obs, act = int(distribution.obs_dim), int(distribution.action_dim)
    parts = dynamics(settings, obs, act) if isinstance(settings, DynamicsConfig) else rollouts(settings, obs, act)
    needed, free = sum(parts.values()), available(settings.device)
    if needed > free:
        name = max(parts, key=lambda name: parts[name])
        value = getattr(settings, name)
        most = int(value * (free - needed + parts[name]) / parts[name])
        wanted = f"<= {most}" if most > 0 else f"smaller than {value}"
        listed = ", ".join(f"{size(part)} for {name}={getattr(settings, name)}" for name, part in parts.items())
        text = f"a run on observations of {obs} numbers needs at least {listed}, and {size(free)} of memory are free"
        raise ValueError(f"{type(settings).__name__}: {name} must be {wanted}, got {value}: {text}")


def dynamics(settings: DynamicsConfig, obs: int, act: int) -> dict[str, int]:
    """Return bytes of the main job by the setting that they are proportional to.

    Args:
        settings: of the run.
        obs, act: sizes of an observation and an encoded action.

    >>> {name: size(part) for name, part in dynamics(DynamicsConfig(), 210 * 160 * 3, 4).items()}
    {'buffer_size': '82.4 GB', 'test_tasks': '28.4 GB'}
    """
    length = settings.shots + settings.query
    pair = obs + act + 1 + obs  # features and targets of the model
    item = 2 * obs + act + embedding_dim(obs, act)
    parameters = settings.hidden_dim * (2 * obs + act)  # of the first and the last layer
    transitions = settings.num_epochs * settings.updates_per_epoch * settings.tasks_per_update * length
    retrieved = min(SIMILAR_TASKS * length, settings.buffer_size)
    task = length * (2 * obs + act + pair) + parameters
    phases = {
        "tasks_per_update": settings.tasks_per_update * task,
        "test_tasks": settings.test_tasks * (task + retrieved * pair),
    }
    larger = max(phases, key=lambda name: phases[name])  # the phases follow one another
    # A checkpoint copies the items of the buffer.
    buffer = (settings.buffer_size + min(settings.buffer_size, transitions)) * item
    return {"buffer_size": FLOAT * buffer, larger: FLOAT * phases[larger]}


def rollouts(settings: RLConfig, obs: int, act: int) -> dict[str, int]:
    """Return bytes of a meta-RL job by the setting that they are proportional to.

    A rollout holds its steps twice, when it stacks them.

    >>> {name: size(part) for name, part in rollouts(RL2Config(), 210 * 160 * 3, 4).items()}
    {'tasks_per_update': '6.6 GB'}
    """
    assert isinstance(settings, (RL2Config, MAMLConfig))
    per_task = settings.rollouts_per_task if isinstance(settings, MAMLConfig) else 1
    steps = settings.tasks_per_update * per_task * settings.steps
    return {"tasks_per_update": FLOAT * 2 * steps * (obs + act + 2)}


def available(device: str) -> int:
    """Return the bytes that a process can still allocate on ``device``, at most.

    >>> available("cpu") > 0
    True
    """
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    limits = [int(text) for path in map(Path, LIMITS) if path.exists() and (text := path.read_text().strip()).isdigit()]
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(rows["MemAvailable"].split()[0])
    except (OSError, KeyError):  # no Linux
        sysconf = getattr(os, "sysconf", None)  # absent on Windows, where any size passes
        free = sysconf("SC_PHYS_PAGES") * sysconf("SC_PAGE_SIZE") if sysconf else sys.maxsize
    return min([free, *limits])


def size(count: float) -> str:
    """Return a number of bytes as text.

    >>> size(41_900_000_000), size(400_000)
    ('41.9 GB', '0.4 MB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
