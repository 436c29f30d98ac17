"""What the jobs of meta-RL can be told. No torch here: the command line reads its flags from these fields."""

import math
from dataclasses import dataclass, fields

from eaml_ext import _check
from eaml_ext.jobs.settings import _flag

CORES = ("s6", "mamba", "s4d", "s5", "lru", "ssd", "retention", "rwkv")


@dataclass(frozen=True)
class RLSettings:
    """What both jobs can be told; each is a flag of ``eaml-ext``.

    Raises TypeError or ValueError, one sentence, for a value out of its range.
    """

    env_name: str = _flag("CartPole-v1", "Gymnasium id, or a name registered in eaml_ext.tasks")
    num_epochs: int = _flag(12, "epochs of meta-training, 10 updates each")
    seed: int = _flag(0, "seed of everything random")
    device: str = _flag("cpu", "where the policy lives: cpu, cuda, cuda:1, ...")
    hidden_dim: int = _flag(64, "width of the policy's SSM")
    state_size: int = _flag(8, "states per channel of the SSM")
    num_layers: int = _flag(1, "layers of the SSM")
    core: str = _flag("s6", "recurrence of the SSM", choices=CORES)
    reward_scale: float = _flag(0.1, "rewards are multiplied by it for learning; values should be of the order of 1")
    gamma: float = _flag(0.99, "discount of a step, at most 1")
    test_tasks: int = _flag(64, "held-out tasks")
    threads: int = _flag(1, "threads torch may use; the policy is too small to gain from more")
    out: str = _flag("", "folder of the results; runs/<algo>-<env_name>-seed<seed> if empty")

    def __post_init__(self) -> None:
        name = type(self).__name__
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(f.default, str):
                if not isinstance(value, str):
                    raise TypeError(f"{name}: {f.name} must be a string, got {value!r}")
                continue
            _check.positive(name, f.name, value, zero=f.name == "seed", integer=isinstance(f.default, int))
            if math.isinf(value):
                raise ValueError(f"{name}: {f.name} must be finite, got {value!r}")
        if self.core not in CORES:
            raise ValueError(f"{name}: core must be one of {CORES}, got {self.core!r}")
        if self.gamma > 1:
            raise ValueError(f"{name}: gamma must be <= 1, got {self.gamma!r}")

    @property
    def folder(self) -> str:
        """Where the results go."""
        algo = type(self).__name__.removesuffix("Settings").lower()
        return self.out or f"runs/{algo}-{self.env_name.replace('/', '-')}-seed{self.seed}"


@dataclass(frozen=True)
class RL2Settings(RLSettings):
    """``--algo rl2``: a policy that adapts in context.

    >>> RL2Settings(env_name="CartPole-hidden-velocity-v1").folder
    'runs/rl2-CartPole-hidden-velocity-v1-seed0'
    """

    # Its convolution shows what an action changes from step to step; s6 alone loses a hidden velocity.
    core: str = _flag("mamba", "recurrence of the SSM", choices=CORES)
    lr: float = _flag(3e-3, "learning rate (Adam), falling to 0")
    tasks_per_update: int = _flag(64, "trials played side by side, each of a new task")
    steps: int = _flag(128, "steps of a training trial")
    episodes: int = _flag(3, "episodes of a trial on held-out tasks")


@dataclass(frozen=True)
class MAMLSettings(RLSettings):
    """``--algo maml``: a policy that adapts by policy gradient.

    >>> MAMLSettings().folder
    'runs/maml-CartPole-v1-seed0'
    """

    inner_lr: float = _flag(0.3, "step size of the inner loop, and of adaptation")
    outer_lr: float = _flag(3e-3, "learning rate of the meta-update (Adam)")
    inner_steps: int = _flag(1, "gradient steps of the inner loop, each on new trajectories")
    tasks_per_update: int = _flag(16, "tasks in a meta-batch")
    rows: int = _flag(8, "environments a task is played in")
    steps: int = _flag(100, "steps in each of them, for every inner step")
