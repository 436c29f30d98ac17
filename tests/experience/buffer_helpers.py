"""Buffers for the tests of this folder."""

import copy

import torch

from eaml_ext.experience import ExperienceBuffer


def items(n, time=None, dim=3):
    lead = (n,) if time is None else (n, time)
    return {
        "state": torch.randn(*lead, 4),
        "action": torch.randn(*lead, 2),
        "reward": torch.randn(*lead),
        "context_embedding": torch.randn(n, dim),
        "next_state": torch.randn(*lead, 4),
        "task": torch.randint(0, 5, (n,)),
    }


def filled(n=20, capacity=100, **options):
    buffer = ExperienceBuffer(capacity, state_dim=4, action_dim=2, seed=0, **options)
    data = items(n)
    buffer.add(**data)
    return buffer, data


def snapshot(buffer):
    return copy.deepcopy(buffer.state_dict())


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


def memory():
    """Return a buffer of tasks 0 to 3. Task t has the targets t * observation and the embedding (t, 0)."""
    buffer = ExperienceBuffer(100, seed=0)
    for task in range(4):
        x = torch.linspace(1, 2, 5).unsqueeze(1)
        buffer.add(x, task * x, context_embedding=torch.tensor([[float(task), 0.0]]).expand(5, 2), task=task)
    return buffer
