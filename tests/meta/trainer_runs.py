"""Trainers and comparisons that the tests of MetaMAMLTrainer share."""

import torch
from torch import nn

from eaml_ext.meta import MetaMAMLTrainer
from eaml_ext.tasks import SinusoidTasks


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))


def fixed_tasks(n=12):
    columns = SinusoidTasks(5).draw(n)
    return list(zip(*(c.unbind() for c in columns), strict=True))


def trainer(**options):
    return MetaMAMLTrainer(network(), 1e-2, 1e-2, progress=False, **options)


def state(trainer):
    return {k: v.clone() for maml in trainer.mamls for k, v in maml.model.state_dict().items()}


def assert_same_bits(one, other):
    assert one.losses == other.losses
    for a, b in zip(one.mamls, other.mamls, strict=True):
        for (name, p), q in zip(a.model.state_dict().items(), b.model.state_dict().values(), strict=True):
            assert torch.equal(p, q), name
        for p, q in zip(a.inner_lrs.values(), b.inner_lrs.values(), strict=True):
            assert torch.equal(p, q)
