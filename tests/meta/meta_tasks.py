"""Models, tasks and comparisons that the tests of MetaMAML share."""

import torch
from torch import nn
from torch.nn.functional import mse_loss


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def task(n=10, m=6, dim=4):
    x = torch.randn(n + m, dim, dtype=torch.float64)
    y = (x @ torch.randn(dim, 1, dtype=torch.float64)).sin()
    return x[:n], y[:n], x[n:], y[n:]


def sequences(n, time):
    x = torch.randn(2 * n, time, 4, dtype=torch.float64)
    y = x.cumsum(1)[..., :2]
    return x[:n], y[:n], x[n:], y[n:]


def gradients(maml, tasks, kl_radius=0.0):
    """Losses and meta-gradient by name, rates under a name of their own."""
    losses, grads = maml._meta_gradient().run(tasks, [mse_loss] * len(tasks), kl_radius)
    return losses, dict(zip([*maml.parameters(), *(f"rate of {k}" for k in maml.inner_lrs)], grads, strict=True))


def assert_same_gradient(one, other, tolerance=1e-10):
    torch.testing.assert_close(one[0], other[0], rtol=tolerance, atol=tolerance)
    for name, g in one[1].items():
        g = torch.zeros_like(other[1][name]) if g is None else g
        torch.testing.assert_close(other[1][name], g, rtol=tolerance, atol=tolerance * float(g.abs().max() + 1e-3))


def assert_moved(model, before, moved):
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != (name in moved), name
