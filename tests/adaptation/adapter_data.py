"""Models, batches and a stream for the tests of the Adapter."""

import torch
from torch import nn
from torch.nn import functional as F

OFF = {"grad_clip_norm": None, "trust_region_eps": None, "ema_decay": None}


def mlp(inputs=4, outputs=1):
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs))


def batch(n=16):
    return {"states": torch.randn(n, 4), "targets": torch.randn(n, 1)}


def users(count=5, n=12):
    return {"states": torch.randn(count, n, 4), "targets": torch.randn(count, n, 1)}


def of_user(batch, user):
    """Return the part of one user."""
    return {name: value[user] for name, value in batch.items()}


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Stream:
    """Batches of one linear task; a clean set to measure on."""

    def __init__(self, noise=0.1):
        self.weight, self.noise = torch.randn(4, 1), noise
        self.clean = torch.randn(256, 4)

    def batch(self, scale=1.0, n=16):
        x = torch.randn(n, 4)
        return {"states": x, "targets": scale * (x @ self.weight + self.noise * torch.randn(n, 1))}

    def error(self, model):
        with torch.no_grad():
            return float(F.mse_loss(model(self.clean), self.clean @ self.weight))
