"""The tasks of a run: the user's modules, the distribution, and lines on the limits of tasks that are seeds."""

from __future__ import annotations

from typing import Any

from eaml_ext.distributed import Group, run_on_rank_zero
from eaml_ext.jobs import memory
from eaml_ext.jobs.config import DynamicsConfig
from eaml_ext.jobs.rl_config import RLConfig
from eaml_ext.tasks import SeedTasks, TaskDistribution, make_tasks
from eaml_ext.tasks._modules import import_user_module
from eaml_ext.tasks.seeds import EPISODE_STEPS, PROBE_STEPS

PAGE = "docs/bring-your-own.md"


def prepare(settings: DynamicsConfig | RLConfig, group: Group | None = None) -> TaskDistribution[Any]:
    """Return the distribution of a run that fits into memory; print the limits of tasks that are seeds.

    Args:
        settings: of the run; modules in ``import_`` are imported first.
        group: the ranks of torchrun; rank 0 prints and compares memory.

    Raises:
        ValueError: Python does not find a module, Gymnasium cannot make the environment, or the run does not fit into
            memory. Exceptions of the user's modules and environments pass through.

    >>> prepare(DynamicsConfig(env_name="MountainCar-v0")).obs_dim
    MountainCar-v0: tasks differ by the seed of reset() only, see docs/bring-your-own.md for tasks of your own.
    2
    """
    for name in filter(None, (name.strip() for name in settings.import_.split(","))):
        import_user_module(type(settings).__name__, "import", name)
    distribution = make_tasks(settings.env_name)

    def check() -> None:
        memory.check(settings, distribution)
        for line in notices(distribution):
            print(line, flush=True)

    run_on_rank_zero(group, check)
    return distribution


def notices(distribution: TaskDistribution[Any]) -> list[str]:
    """Return lines on the limits of tasks that are seeds; none for a distribution with tasks of its own."""
    if not isinstance(distribution, SeedTasks):
        return []
    name = distribution.env_name
    lines = [f"{name}: tasks differ by the seed of reset() only, see {PAGE} for tasks of your own."]
    if drawn := distribution.drawn_in_reset():
        text = f"reset() seems to draw {', '.join(drawn)}, so episodes of one task differ in it"
        how = f"a heuristic: constant over {PROBE_STEPS} steps, and another number for another seed"
        lines.append(f"{name}: {text} ({how}).")
    if distribution.truncates:
        lines.append(f"{name}: the environment has no time limit, so episodes end after {EPISODE_STEPS} steps.")
    return lines
