"""Distributions of tasks with disjoint splits. Gymnasium is imported on first use only."""

from eaml_ext.tasks.base import SPLITS, Task, TaskDistribution, encode_action
from eaml_ext.tasks.cartpole import CartPoleTask, CartPoleTasks
from eaml_ext.tasks.lds import LDSTask, LDSTasks
from eaml_ext.tasks.metaworld import MetaWorldTask, MetaWorldTasks
from eaml_ext.tasks.mujoco import (
    AntDirectionTasks,
    DirectionTask,
    HalfCheetahDirectionTasks,
    HalfCheetahVelocityTasks,
    VelocityTask,
)
from eaml_ext.tasks.registry import make_tasks, register
from eaml_ext.tasks.seeds import SeedTask, SeedTasks
from eaml_ext.tasks.sinusoid import SinusoidTask, SinusoidTasks

__all__ = [
    "SPLITS",
    "AntDirectionTasks",
    "CartPoleTask",
    "CartPoleTasks",
    "DirectionTask",
    "HalfCheetahDirectionTasks",
    "HalfCheetahVelocityTasks",
    "LDSTask",
    "LDSTasks",
    "MetaWorldTask",
    "MetaWorldTasks",
    "SeedTask",
    "SeedTasks",
    "SinusoidTask",
    "SinusoidTasks",
    "Task",
    "TaskDistribution",
    "VelocityTask",
    "encode_action",
    "make_tasks",
    "register",
]
