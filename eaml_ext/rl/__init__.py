"""Acting in environments: rollouts over Gymnasium vector environments, one environment per task."""

from eaml_ext.rl.rollout import Policy, RandomPolicy, Trajectories, collect

__all__ = ["Policy", "RandomPolicy", "Trajectories", "collect"]
