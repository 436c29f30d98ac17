"""Settings of the main job. Needs no torch: the command line reads its flags and defaults from these fields."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Any

from eaml_ext import _check

RETRIEVALS = ("best_fit", "nearest", "uniform")
STEPS_PER_CALL = 5  # gradient steps of a call of the Adapter
ENV_NAME = "Gymnasium id, module:id of a module that registers it, or a name of eaml_ext.tasks.register"
IMPORT = "modules to import first, separated by commas: they call gymnasium.register or eaml_ext.tasks.register"


def flag_name(field: Any) -> str:
    """Return the name of a field on the command line and in settings files; ``import_`` is a keyword of Python there.

    >>> flag_name(fields(DynamicsConfig)[1])
    'import'
    """
    return str(field.name).removesuffix("_")


def flag(default: Any, text: str, **options: Any) -> Any:
    """Return a dataclass field that is a flag of the command line, with its help text and argparse's options."""
    return field(default=default, metadata={"help": text, **options})


def auto_or_number(text: str) -> str | float:
    """Return "auto", or the text as a number: the argparse type of such a flag.

    >>> auto_or_number("auto"), auto_or_number("0.1")
    ('auto', 0.1)
    """
    return text if text == "auto" else float(text)


HOW_TO_START = ("resume", "overwrite")
"""Settings of one call; the files of a run hold the others."""


def algo_of(settings: Any) -> str:
    """Return the job of the settings, as ``--algo`` names it.

    >>> algo_of(DynamicsConfig())
    'dynamics'
    """
    return type(settings).__name__.removesuffix("Config").lower()


def stored(settings: Any) -> dict[str, Any]:
    """Return the settings that the files of a run hold, by name."""
    return {name: value for name, value in vars(settings).items() if name not in HOW_TO_START}


def default_folder(settings: Any) -> str:
    """Return the folder of a run without ``out``: job, environment and seed."""
    return f"runs/{algo_of(settings)}-{settings.env_name.replace('/', '-')}-seed{settings.seed}"


def check_fields(settings: Any, zero: Collection[str]) -> None:
    """Check the fields of frozen settings against their defaults and choices.

    Numbers must be finite and positive, or zero in the fields named by ``zero``. NumPy scalars become Python's,
    because settings are written as TOML and JSON.

    Raises:
        TypeError, ValueError: a field has another type than its default, or is out of range.
    """
    where = type(settings).__name__
    for f in fields(settings):
        value, choices = getattr(settings, f.name), f.metadata.get("choices")
        auto = f.metadata.get("type") is auto_or_number
        if isinstance(f.default, bool):
            _check.flag(where, f.name, value)
            value = bool(value)
        elif isinstance(f.default, str) and (isinstance(value, str) or not auto):
            if auto and value != "auto":
                raise ValueError(f"{where}: {f.name} must be 'auto' or a number > 0, got {value!r}")
            if not isinstance(value, str):
                raise TypeError(f"{where}: {f.name} must be a string, got {value!r}")
            if choices and value not in choices:
                raise ValueError(f"{where}: {f.name} must be one of {choices}, got {value!r}")
            value = str(value)
            if value.encode(errors="replace").decode() != value:
                raise ValueError(f"{where}: {f.name} must be Unicode text, got {value!r}")
        else:
            value = _check.positive(where, f.name, value, zero=f.name in zero, integer=isinstance(f.default, int))
            if math.isinf(value):
                raise ValueError(f"{where}: {f.name} must be finite, got {value!r}")
            if isinstance(f.default, int):
                value = _check.integer(where, f.name, value, 0, 2**64)  # the range of torch's seeds
        object.__setattr__(settings, f.name, value)  # the dataclass is frozen
    if settings.resume and settings.overwrite:
        raise ValueError(f"{where}: resume and overwrite exclude each other, got both")


@dataclass(frozen=True)
class DynamicsConfig:
    """Settings of the main job; each is a flag of ``eaml-ext``.

    Raises:
        TypeError, ValueError: a value has another type than its default, or is out of range.

    >>> DynamicsConfig(num_epochs=5).env_name
    'CartPole-v1'
    """

    env_name: str = flag("CartPole-v1", ENV_NAME)
    import_: str = flag("", IMPORT)
    num_epochs: int = flag(50, "epochs of meta-training; more than before extend a run with --resume")
    seed: int = flag(0, "seed of all random numbers")
    device: str = flag("cpu", "device of the model: cpu, cuda, cuda:1, ...")
    experience_weight: float = flag(0.3, "weight of the experience in the hybrid loss")
    inner_lr: float = flag(0.05, "step size of the inner loop, and of adaptation")
    outer_lr: float = flag(3e-3, "learning rate of the meta-update (Adam)")
    buffer_size: int = flag(50_000, "transitions the experience buffer holds")
    retrieval: str = flag("best_fit", "how the experience of the hybrid loss is retrieved", choices=RETRIEVALS)
    shots: int = flag(10, "transitions on which the model adapts to a task")
    query: int = flag(64, "transitions on which the adapted model is evaluated")
    tasks_per_update: int = flag(16, "tasks in a meta-batch")
    updates_per_epoch: int = flag(8, "meta-updates in an epoch")
    inner_steps: int = flag(3, "gradient steps of the inner loop")
    hidden_dim: int = flag(32, "width of the SSM")
    state_size: int = flag(16, "states per channel of the SSM")
    num_layers: int = flag(1, "layers of the SSM")
    test_tasks: int = flag(64, "held-out tasks")
    adaptation_calls: int = flag(21, f"calls of the Adapter per held-out task, {STEPS_PER_CALL} gradient steps each")
    plan_tasks: int = flag(16, "held-out tasks in which a planner acts with the model of each variant; 0: in none")
    plan_steps: int = flag(100, "most steps of such an episode")
    plan_horizon: int = flag(15, "steps that the planner looks ahead")
    plan_candidates: int = flag(32, "sequences of actions that it evaluates at every step, at least 2")
    threads: int = flag(1, "threads torch may use; the model is too small to gain from more")
    checkpoint_every: int = flag(5, "epochs between two checkpoints of meta-training")
    resume: bool = flag(False, "continue from the checkpoint in the folder, or start where there is none")
    overwrite: bool = flag(False, "replace the files of an earlier run in the folder")
    out: str = flag("", "folder of the results; runs/dynamics-<env_name>-seed<seed> if empty")

    def __post_init__(self) -> None:
        check_fields(self, ("seed", "plan_tasks", "experience_weight"))
        if self.plan_candidates < 2:
            raise ValueError(f"DynamicsConfig: plan_candidates must be >= 2, got {self.plan_candidates}")
        if self.buffer_size < self.shots + self.query:
            raise ValueError(
                f"DynamicsConfig: buffer_size must hold one task, {self.shots + self.query}, got {self.buffer_size}"
            )

    @property
    def decisive(self) -> dict[str, Any]:
        """The settings of a meta-update; they must be equal for a run to be resumed."""
        planning = ("plan_tasks", "plan_steps", "plan_horizon", "plan_candidates")
        kept = ("import_", "num_epochs", "checkpoint_every", "out", *planning)
        return {name: value for name, value in stored(self).items() if name not in kept}

    @property
    def folder(self) -> str:
        """Folder of the results."""
        return self.out or default_folder(self)
