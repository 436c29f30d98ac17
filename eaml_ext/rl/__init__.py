"""Acting in environments and learning from it: rollouts over Gymnasium vector environments, policies with memory."""

from eaml_ext.rl.policy import SSMMetaPolicy
from eaml_ext.rl.rollout import Policy, RandomPolicy, Trajectories, collect

__all__ = ["Policy", "RandomPolicy", "SSMMetaPolicy", "Trajectories", "collect"]
