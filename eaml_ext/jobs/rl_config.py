"""Settings of the meta-RL jobs. Needs no torch: the command line reads its flags from these fields."""

from dataclasses import dataclass
from typing import Any

from eaml_ext.jobs.config import ENV_NAME, IMPORT, auto_or_number, check_fields, default_folder, flag, stored

UPDATES = 10  # per epoch
CORES = ("s6", "mamba", "s4d", "s5", "lru", "ssd", "retention", "rwkv")


@dataclass(frozen=True)
class RLConfig:
    """Settings of both jobs; each is a flag of ``eaml-ext``.

    Raises:
        TypeError, ValueError: a value has another type than its default, or is out of range.
    """

    env_name: str = flag("CartPole-v1", ENV_NAME)
    import_: str = flag("", IMPORT)
    num_epochs: int = flag(12, "epochs of meta-training, 10 updates each; more than before extend a run with --resume")
    seed: int = flag(0, "seed of all random numbers")
    device: str = flag("cpu", "device of the policy: cpu, cuda, cuda:1, ...")
    hidden_dim: int = flag(64, "width of the policy's SSM")
    state_size: int = flag(8, "states per channel of the SSM")
    num_layers: int = flag(1, "layers of the SSM")
    core: str = flag("s6", "recurrence of the SSM", choices=CORES)
    reward_scale: str | float = flag(
        "auto", "factor of the rewards for learning; auto: returns of random actions get size 1", type=auto_or_number
    )
    gamma: float = flag(0.99, "discount of a step, at most 1")
    test_tasks: int = flag(64, "held-out tasks")
    threads: int = flag(1, "threads torch may use; the policy is too small to gain from more")
    checkpoint_every: int = flag(1, "epochs between two checkpoints of meta-training")
    resume: bool = flag(False, "continue from the checkpoint in the folder, or start where there is none")
    overwrite: bool = flag(False, "replace the files of an earlier run in the folder")
    out: str = flag("", "folder of the results; runs/<algo>-<env_name>-seed<seed> if empty")

    def __post_init__(self) -> None:
        check_fields(self, ("seed",))
        if self.gamma > 1:
            raise ValueError(f"{type(self).__name__}: gamma must be <= 1, got {self.gamma!r}")

    @property
    def decisive(self) -> dict[str, Any]:
        """The settings of an update; they must be equal for a run to be resumed."""
        kept = ("import_", "num_epochs", "checkpoint_every", "out", "test_tasks", "episodes")
        return {name: value for name, value in stored(self).items() if name not in kept}

    @property
    def folder(self) -> str:
        """Folder of the results."""
        return self.out or default_folder(self)


@dataclass(frozen=True)
class RL2Config(RLConfig):
    """``--algo rl2``: a policy that adapts in context.

    >>> RL2Config(env_name="CartPole-hidden-velocity-v1").folder
    'runs/rl2-CartPole-hidden-velocity-v1-seed0'
    """

    # A hidden velocity needs the convolution, which sees the change between steps; s6 alone does not find it.
    core: str = flag("mamba", "recurrence of the SSM", choices=CORES)
    lr: float = flag(3e-3, "learning rate (Adam), falling to 0")
    tasks_per_update: int = flag(64, "trials in parallel, each of a new task")
    steps: int = flag(128, "steps of a training trial")
    episodes: int = flag(3, "episodes of a trial on held-out tasks")


@dataclass(frozen=True)
class MAMLConfig(RLConfig):
    """``--algo maml``: a policy that adapts by policy gradient.

    >>> MAMLConfig().folder
    'runs/maml-CartPole-v1-seed0'
    """

    inner_lr: float = flag(0.3, "step size of the inner loop, and of adaptation")
    outer_lr: float = flag(3e-3, "learning rate of the meta-update (Adam)")
    inner_steps: int = flag(1, "gradient steps of the inner loop, each on new trajectories")
    tasks_per_update: int = flag(16, "tasks in a meta-batch")
    rollouts_per_task: int = flag(8, "environments of each task, for every inner step")
    steps: int = flag(100, "steps of each rollout")
