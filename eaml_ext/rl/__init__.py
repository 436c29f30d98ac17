"""Reinforcement learning: rollouts in vector environments, policies with memory, losses, RL², MAML and planning."""

from eaml_ext.rl.losses import a2c_loss, advantages, normalised, ppo_loss, reinforce_loss
from eaml_ext.rl.maml_rl import MAMLRL
from eaml_ext.rl.planning import Planner, WorldModel, planned_returns
from eaml_ext.rl.policy import SSMMetaPolicy
from eaml_ext.rl.rl2 import RL2
from eaml_ext.rl.trajectories import Policy, RandomPolicy, Trajectories, collect
from eaml_ext.rl.trials import Trials, feature_dim, rollout

__all__ = [
    "MAMLRL",
    "RL2",
    "Planner",
    "Policy",
    "RandomPolicy",
    "SSMMetaPolicy",
    "Trajectories",
    "Trials",
    "WorldModel",
    "a2c_loss",
    "advantages",
    "collect",
    "feature_dim",
    "normalised",
    "planned_returns",
    "ppo_loss",
    "reinforce_loss",
    "rollout",
]
