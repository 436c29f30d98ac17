"""Checks of what Mamba and Mamba2 share: states, resets, derivatives, reduced precision, ``inference_params``."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.func import functional_call, grad, vmap


def sequence(batch=2, length=9, width=6):
    return torch.randn(batch, length, width, dtype=torch.float64)


def check_steps_and_splits(m, no_grad):
    """Assert that steps and split scans of a layer of width 6 equal its scan."""
    x = sequence()
    with torch.set_grad_enabled(not no_grad):
        whole, (conv, ssm) = m.scan(x)
        assert conv.shape == (2, *m.conv_state_shape) and ssm.shape == (2, *m.ssm_state_shape)
        for split in (1, 2, 7):  # shorter and longer than the convolution
            a, state = m.scan(x[:, :split])
            b, last = m.scan(x[:, split:], state)
            torch.testing.assert_close(torch.cat([a, b], dim=1), whole)
            torch.testing.assert_close(last, (conv, ssm))
        state, ys = m.allocate_inference_cache(2, max_seqlen=9), []
        for t in range(9):
            y, *state = m.step(x[:, t : t + 1] if t % 2 else x[:, t], *state)
            ys.append(y.reshape(2, 6))
        torch.testing.assert_close(torch.stack(ys, dim=1), whole)
        torch.testing.assert_close(tuple(state), (conv, ssm))
        empty, unchanged = m.scan(x[:, :0], (conv, ssm))
        assert empty.shape == (2, 0, 6) and torch.equal(unchanged[0], conv) and torch.equal(unchanged[1], ssm)


def check_resets(m):
    """Assert that episodes between resets equal the episodes alone, and that no gradient passes a reset."""
    x = sequence(length=12)
    reset = torch.zeros(2, 12, dtype=torch.bool)
    reset[0, [0, 5, 6]] = True
    reset[1, 10] = True
    before = m.scan(sequence())[1]
    y, last = m.scan(x, before, reset)
    for row, episodes in ((0, [(0, 5), (5, 6), (6, 12)]), (1, [(10, 12)])):
        for start, stop in episodes:
            alone, end = m.scan(x[row : row + 1, start:stop])
            torch.testing.assert_close(y[row : row + 1, start:stop], alone)
        torch.testing.assert_close((last[0][row : row + 1], last[1][row : row + 1]), end)
    alone = m.scan(x[1:, :10], tuple(s[1:] for s in before))[0]
    torch.testing.assert_close(y[1:, :10], alone)
    x.requires_grad_()
    (g,) = torch.autograd.grad(m.scan(x, None, reset)[0][0, 6:].square().sum(), x)
    assert g[0, :6].abs().max() == 0 and g[0, 6:].abs().max() > 0  # exactly


def check_per_task_weights(m):
    """Assert that gradients of per-task weights under vmap equal those of a loop over tasks."""
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    params = {k: p.detach() + 0.1 * torch.randn(3, *p.shape, dtype=p.dtype) for k, p in m.named_parameters()}

    def loss(p, x):
        return functional_call(m, p, (x,)).square().sum()

    together = vmap(grad(loss))(params, x)
    for i in range(3):
        alone = grad(loss)({k: p[i] for k, p in params.items()}, x[i])
        torch.testing.assert_close({k: g[i] for k, g in together.items()}, alone)


def check_maml_outer_gradient(m, formula):
    """Assert that MAML's outer gradient equals that of ``formula(m, x)``."""
    x, target = sequence(), sequence()
    params = {k: p.detach() for k, p in m.named_parameters()}

    def outer(forward):
        def inner(p):
            return (forward(p) - target).square().mean()

        return grad(lambda p: inner({k: p[k] - 0.1 * g for k, g in grad(inner)(p).items()}))(params)

    class ByFormula(nn.Module):
        def __init__(self):
            super().__init__()
            self.m = m

        def forward(self, x):
            return formula(self.m, x)

    ours = outer(lambda p: functional_call(m, p, (x,)))
    by_formula = outer(lambda p: functional_call(ByFormula(), {f"m.{k}": v for k, v in p.items()}, (x,)))
    torch.testing.assert_close(ours, by_formula)


def check_bfloat16(make):
    """Assert that ``make(dtype=)``, a layer of width 16, is close to float32 in bfloat16 and under autocast."""
    m, x = make(), torch.randn(2, 9, 16)
    want = m(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(m(x).float(), want, rtol=0.05, atol=0.05)
    half = make(dtype=torch.bfloat16)
    half.load_state_dict(m.state_dict())
    y, state = half.scan(x.bfloat16())
    assert y.dtype == state[0].dtype == torch.bfloat16 and state[1].dtype == torch.float32
    torch.testing.assert_close(y.float(), want, rtol=0.05, atol=0.05)
    y, *_ = half.step(x[:, :1].bfloat16(), *half.allocate_inference_cache(2))
    torch.testing.assert_close(y.float(), want[:, :1], rtol=0.05, atol=0.05)


def check_inference_params(m):
    """Assert that a layer with ``layer_idx`` 4 keeps its states in ``inference_params`` and starts again at 0."""
    x, memory, ys = sequence(), SimpleNamespace(seqlen_offset=0, key_value_memory_dict={}), []
    for start, stop in ((0, 5), (5, 6), (6, 9)):
        memory.seqlen_offset = start
        ys.append(m(x[:, start:stop], inference_params=memory))
    torch.testing.assert_close(torch.cat(ys, dim=1), m(x))
    assert list(memory.key_value_memory_dict) == [4]
    memory.seqlen_offset = 0
    torch.testing.assert_close(m(x[:, :3], inference_params=memory), m(x[:, :3]))
