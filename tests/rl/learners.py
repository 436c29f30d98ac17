"""Small policies and learners for the tests of RL2, MAMLRL and their base class."""

import copy

import torch

from eaml_ext.rl import RL2, SSMMetaPolicy, feature_dim
from eaml_ext.tasks import CartPoleTasks

CARTPOLE = CartPoleTasks()
HIDDEN = CartPoleTasks(hide_velocity=True)


def make_policy(dist=CARTPOLE, hidden_dim=8, **options):
    return SSMMetaPolicy(feature_dim(dist), dist.action_dim, hidden_dim, state_size=4, **options)


def make_learner(kind, policy, dist, **options):
    small = {"num_minibatches": 2, "update_epochs": 2} if kind is RL2 else {"rollouts_per_task": 2}
    return kind(policy, dist, **{"steps": 12, "tasks_per_update": 4, **small, **options})


def copied_state(policy):
    return copy.deepcopy(dict(policy.state_dict()))


def equal_states(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)
