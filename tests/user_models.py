"""Models that test functional calls, vmap and deepcopy; inputs are ``(rows, 3)`` or ``(rows, 6, 3)``."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Shared(nn.Module):
    """One layer and one buffer under several names."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = self.a
        self.layers = nn.ModuleList([self.a])
        self.head = nn.Linear(3, 1)
        self.register_buffer("scale", torch.full((1,), 1.5))
        self.layers.register_buffer("same_scale", self.scale)

    def forward(self, x):
        return self.head(self.b(self.a(x).tanh()).tanh() + self.layers[0](x)) * self.scale * self.layers.same_scale


class Once(Shared):
    """The function of ``Shared``, every tensor under one name."""

    def __init__(self):
        super().__init__()
        del self.b, self.layers

    def forward(self, x):
        return self.head(self.a(self.a(x).tanh()).tanh() + self.a(x)) * self.scale * self.scale


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(self.b(self.a(x).tanh()))


class TiedParametrized(nn.Module):
    """Weight-normalised layers that share a direction, one of them under two names."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)) for _ in range(2))
        self.b.parametrizations.weight.original1 = self.a.parametrizations.weight.original1
        self.c, self.head = self.a, nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.c(self.b(self.a(x).tanh())))


class Attention(nn.Module):
    """Keeps attention maps on itself: as an attribute, in a list, in a nested dict."""

    def __init__(self):
        super().__init__()
        self.query, self.head = nn.Linear(3, 3), nn.Linear(3, 1)
        self.maps, self.kept, self.calls = [], {}, 0

    def forward(self, x):
        self.map = torch.softmax(self.query(x) @ x.mT, -1)
        self.maps.append(self.map)
        self.kept["last"] = (self.map, {"also": self.map})
        self.calls += 1
        return self.head(self.map @ x)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.core, self.head = kind(3, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.core(x)[0])


class Branching(nn.Module):
    """Control flow that depends on data."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 1)

    def forward(self, x):
        y = self.head(x)
        return 2 * y if y.sum() > 0 else 3 * y


class Item(Branching):
    def forward(self, x):
        return self.head(x) * float(x.detach().numpy().max())


class BooleanMask(Branching):
    def forward(self, x):
        y = self.head(x).tanh()
        return y[y.detach() > 0].sum() + y


class Checkpointed(nn.Module):
    def __init__(self, enabled=True):
        super().__init__()
        self.enabled, self.body, self.head = enabled, nn.Linear(3, 3), nn.Linear(3, 1)

    def block(self, x):
        return self.body(self.body(x).tanh()).tanh()

    def forward(self, x):
        return self.head(checkpoint(self.block, x, use_reentrant=False) if self.enabled else self.block(x))


class Transformer(nn.Module):
    def __init__(self, training=True):
        super().__init__()
        self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 1)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.train(training)

    def forward(self, x):
        return self.head(self.layer(self.embed(x)))


UNBATCHABLE = {
    "gru": lambda: Recurrent(nn.GRU),
    "lstm": lambda: Recurrent(nn.LSTM),
    "rnn": lambda: Recurrent(nn.RNN),
    "branch": Branching,
    "item": Item,
    "boolean_mask": BooleanMask,
    "checkpoint": Checkpointed,
}


def sequences(rows=2, dtype=torch.float64):
    """``(support_x, support_y, query_x, query_y)`` of sequences."""
    x = torch.randn(2 * rows, 6, 3, dtype=dtype)
    y = x.sum(-1, keepdim=True).sin()
    return x[:rows], y[:rows], x[rows:], y[rows:]
