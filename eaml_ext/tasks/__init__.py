"""Distributions of tasks with disjoint splits. Gymnasium is imported on first use only."""

from eaml_ext.tasks.base import SPLITS, Task, TaskDistribution, encode_action
from eaml_ext.tasks.cartpole import CartPoleTask, CartPoleTasks
from eaml_ext.tasks.lds import LDSTask, LDSTasks
from eaml_ext.tasks.registry import make_tasks, register
from eaml_ext.tasks.seeds import SeedTask, SeedTasks
from eaml_ext.tasks.sinusoid import SinusoidTask, SinusoidTasks

__all__ = [
    "SPLITS",
    "CartPoleTask",
    "CartPoleTasks",
    "LDSTask",
    "LDSTasks",
    "SeedTask",
    "SeedTasks",
    "SinusoidTask",
    "SinusoidTasks",
    "Task",
    "TaskDistribution",
    "encode_action",
    "make_tasks",
    "register",
]
