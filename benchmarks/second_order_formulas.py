"""Recurrences in plain PyTorch: the formulas of benchmarks.second_order_cases, and random arguments for them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


def decay(*shape: int) -> Tensor:
    """Numbers between 0 and 1."""
    return torch.sigmoid(torch.randn(*shape)).requires_grad_()


def log_decay(*shape: int) -> Tensor:
    return F.logsigmoid(torch.randn(*shape)).requires_grad_()


def linear_scan(a: Tensor, x: Tensor, dim: int = 1) -> Tensor:
    """h_t = a_t h_{t-1} + x_t."""
    h, states = torch.zeros_like(x.select(dim, 0)), []
    for a_t, x_t in zip(a.unbind(dim), x.unbind(dim), strict=True):
        h = a_t * h + x_t
        states.append(h)
    return torch.stack(states, dim)


def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two steps of a linear scan as one, the operator of an associative scan."""
    return left[0] * right[0], right[0] * left[1] + right[1]


def linear_attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor, bonus: Tensor | None = None) -> Tensor:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T, y_t = S_t^T q_t / sqrt(dim); with a bonus y_t reads S_{t-1} + u k_t v_t^T."""
    write = k.unsqueeze(-1) * v.unsqueeze(-2)  # (batch, length, heads, dim, dim)
    states = linear_scan(g.exp().unsqueeze(-1).expand_as(write), write)
    if bonus is not None:
        before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], dim=1)
        states = before + bonus.unsqueeze(-1) * write
    return (q.unsqueeze(-1) * states).sum(-2) / math.sqrt(q.shape[-1])


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T, y_t = S_t^T q_t / sqrt(dim)."""
    state, outputs = torch.zeros_like(k[:, 0].unsqueeze(-1) * v[:, 0].unsqueeze(-2)), []
    for q_t, k_t, v_t, beta_t in zip(*(x.unbind(1) for x in (q, k, v, beta)), strict=True):
        error = v_t - (k_t.unsqueeze(-1) * state).sum(-2)
        state = state + beta_t[..., None, None] * k_t.unsqueeze(-1) * error.unsqueeze(-2)
        outputs.append((q_t.unsqueeze(-1) * state).sum(-2) / math.sqrt(q.shape[-1]))
    return torch.stack(outputs, 1)


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Mamba-2: h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t, one A per head."""
    write = (dt.unsqueeze(-1) * x).unsqueeze(-1) * B.unsqueeze(-2)  # (batch, length, heads, dim, state)
    states = linear_scan((dt * A).exp()[..., None, None].expand_as(write), write)
    return (states * C.unsqueeze(-2)).sum(-1)


def lstm(Wx: Tensor, R: Tensor, b: Tensor) -> Tensor:
    """The hidden and cell states of an LSTM per head: Wx (batch, length, 4, heads, dim), gates i, f, z, o."""
    h = c = torch.zeros_like(Wx[:, 0, 0])
    states = []
    for x in Wx.unbind(1):
        i, f, z, o = (x + torch.einsum("ghdp,bhp->bghd", R, h) + b).unbind(1)
        c = f.sigmoid() * c + i.sigmoid() * z.tanh()
        h = o.sigmoid() * c.tanh()
        states.append(torch.stack([h, c]))
    return torch.stack(states, 2)  # (2, batch, length, heads, dim)


def lpc(x: Tensor, a: Tensor) -> Tensor:
    """y_t = x_t - sum_i a_ti y_{t-i}."""
    outputs: list[Tensor] = []
    for t, x_t in enumerate(x.unbind(1)):
        past = [a[:, t, i] * outputs[t - 1 - i] for i in range(min(t, a.shape[-1]))]
        outputs.append(x_t - sum(past))
    return torch.stack(outputs, 1)


def gru(x: Tensor, *weights: Tensor) -> Tensor:
    h, outputs = x.new_zeros(x.shape[1], weights[1].shape[1]), []
    for x_t in x:
        h = torch.gru_cell(x_t, h, *weights)
        outputs.append(h)
    return torch.stack(outputs)


def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU of a causal depthwise convolution."""
    return F.silu(F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight.unsqueeze(1), bias, groups=len(weight)))
