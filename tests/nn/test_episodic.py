"""EpisodicRead and KNNAttention: formula, learning, second order, memories per task, errors."""

import copy
import math
import pickle
import re

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from eaml_ext.nn import EpisodicRead, KNNAttention


def small(kind, slots=9, k=3):
    """Return a float64 layer from 4 to 4 features, with random parameters."""
    layer = EpisodicRead(slots, 4, 4, k, delta=0.1) if kind == "read" else KNNAttention(4, slots, 2, k)
    layer = layer.double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p))
    return layer


def dense(layer, params, x):
    """Compute the layer over all slots with torch's operations, and mask those beyond the k nearest."""
    if isinstance(layer, EpisodicRead):
        d = (x[:, None] - params["keys"]).square().sum(-1)
        live = torch.zeros_like(d).scatter(1, d.detach().topk(layer.k, largest=False).indices, 1.0)
        w = live / (d + layer.delta)
        return (w / w.sum(1, keepdim=True)) @ params["values"]
    heads, _, size = params["keys"].shape
    q = F.linear(x, params["query.weight"], params["query.bias"]).unflatten(1, (heads, size))
    logits = torch.einsum("qhd,hsd->qhs", q, params["keys"]) / math.sqrt(size)
    dead = torch.ones_like(logits).scatter(2, logits.detach().topk(layer.k).indices, 0.0).bool()
    w = logits.masked_fill(dead, -torch.inf).softmax(-1)
    read = torch.einsum("qhs,hsd->qhd", w, params["values"]).flatten(1)
    return F.linear(read, params["out.weight"], params["out.bias"])


def train(layer, x, y, steps, lr):
    optimizer = torch.optim.Adam(layer.parameters(), lr=lr)
    for _ in range(steps):
        loss = F.mse_loss(layer(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


each_layer = pytest.mark.parametrize("kind", ["read", "attention"])


@each_layer
@pytest.mark.parametrize("k", [1, 3, 9])
def test_layer_output_equals_the_formula(kind, k):
    layer, x = small(kind, k=k), torch.randn(7, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(layer, dict(layer.named_parameters()), x))


def test_knn_attention_of_all_slots_is_full_attention():
    layer, x = KNNAttention(6, 11, 3, 11).double(), torch.randn(5, 6, dtype=torch.float64)
    q = layer.query(x).unflatten(1, (3, 2)).transpose(0, 1)
    read = F.scaled_dot_product_attention(q, layer.keys, layer.values)
    torch.testing.assert_close(layer(x), layer.out(read.transpose(0, 1).flatten(1)))


def test_episodic_read_at_a_key_is_its_value():
    layer = EpisodicRead(50, 3, 2, 8, delta=1e-12).double()
    torch.nn.init.normal_(layer.values)
    torch.testing.assert_close(layer(layer.keys.detach()), layer.values, rtol=0, atol=1e-6)


def test_episodic_read_learns_a_function_to_a_hundredth_of_its_variance():
    """A linear map explains nothing of the target."""
    torch.manual_seed(0)
    x, fresh = torch.randn(2000, 2), torch.randn(1000, 2)

    def target(x):
        return torch.stack([torch.sin(3 * x[:, 0]) * x[:, 1], (x[:, 0] * x[:, 1]).cos()], 1)

    layer = EpisodicRead(400, 2, 2, k=8)
    variance = target(fresh).var(0).mean()
    assert F.mse_loss(layer(fresh), target(fresh)) > 0.5 * variance
    train(layer, x, target(x), 300, 0.03)
    assert F.mse_loss(layer(x), target(x)) < 0.01 * variance
    assert F.mse_loss(layer(fresh), target(fresh)) < 0.1 * variance


def test_knn_attention_learns_associations_to_a_hundredth_of_their_variance():
    """A linear map of 16 features cannot represent 128 random answers to 128 noisy questions."""
    torch.manual_seed(0)
    questions, answers = torch.randn(128, 16), torch.randn(128, 16)
    x = questions.repeat(8, 1) + 0.05 * torch.randn(1024, 16)
    linear = x @ torch.linalg.lstsq(x, answers.repeat(8, 1)).solution
    assert F.mse_loss(linear, answers.repeat(8, 1)) > 0.5
    layer = KNNAttention(16, 512, num_heads=2, k=16)
    train(layer, x, answers.repeat(8, 1), 400, 0.01)
    assert F.mse_loss(layer(questions), answers) < 0.01 * answers.var()


@each_layer
def test_layer_has_first_and_second_derivatives(kind):
    layer, x = small(kind), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *params):
        return functional_call(layer, dict(zip(names, params, strict=True)), (x,))

    inputs = (x, *(p.detach().requires_grad_() for p in layer.parameters()))
    assert gradcheck(call, inputs) and gradgradcheck(call, inputs)


def outer_loss(call, params, x, y):
    """Return the outer loss of MAML with one inner step."""

    def inner(p):
        return F.mse_loss(call(p, x[:6]), y[:6])

    g = grad(inner)(params)
    return F.mse_loss(call({name: p - 0.1 * g[name] for name, p in params.items()}, x[6:]), y[6:])


@each_layer
def test_layer_meta_gradients_under_vmap_equal_a_loop_and_dense_operations(kind):
    """Each task has its own parameters."""
    layer, tasks = small(kind), 3
    x, y = torch.randn(tasks, 12, 4, dtype=torch.float64), torch.randn(tasks, 12, 4, dtype=torch.float64)
    params = {name: torch.randn(tasks, *p.shape, dtype=p.dtype) for name, p in layer.named_parameters()}

    def ours(p, x, y):
        return outer_loss(lambda q, z: functional_call(layer, q, (z,)), p, x, y)

    def plain(p, x, y):
        return outer_loss(lambda q, z: dense(layer, q, z), p, x, y)

    together = vmap(grad(ours))(params, x, y)
    shared = vmap(grad(ours), in_dims=(None, 0, 0))({name: p[0] for name, p in params.items()}, x, y)
    for i in range(tasks):
        own = {name: p[i] for name, p in params.items()}
        alone, expected = grad(ours)(own, x[i], y[i]), grad(plain)(own, x[i], y[i])
        first = grad(plain)({name: p[0] for name, p in params.items()}, x[i], y[i])
        for name in params:
            torch.testing.assert_close(together[name][i], alone[name])
            torch.testing.assert_close(alone[name], expected[name], rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(shared[name][i], first[name], rtol=1e-7, atol=1e-9)


@each_layer
@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 3), (2, 0, 3)])
def test_layer_any_leading_shape_equals_flat_input(kind, lead):
    layer, x = small(kind), torch.randn(*lead, 4, dtype=torch.float64)
    y = layer(x)
    assert y.shape == x.shape
    flat = x.reshape(-1, 4) if x.numel() else x.reshape(0, 4)
    torch.testing.assert_close(y.reshape(-1, 4) if y.numel() else y.reshape(0, 4), layer(flat))
    y.sum().backward()  # also for an empty input
    assert all(p.grad is not None for p in layer.parameters())


@each_layer
def test_layer_copies_repr_and_autocast(kind):
    layer, x = small(kind).float(), torch.randn(5, 4)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(layer(x), other(x))
    assert repr(layer).startswith(("EpisodicRead(9, 4, 4, k=3, delta=0.1)", "KNNAttention(\n  4, 9, num_heads=2, k=3"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(x.bfloat16())  # as the output of a layer under autocast
    torch.testing.assert_close(half.float(), layer(x.bfloat16().float()), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: EpisodicRead(0, 2, 2), ValueError, "EpisodicRead: slots must be > 0, got 0"),
        (lambda: EpisodicRead(5, 0, 2, 2), ValueError, "EpisodicRead: key_dim must be > 0, got 0"),
        (lambda: EpisodicRead(5, 2, "2", 2), TypeError, "EpisodicRead: value_dim must be an integer, got '2'"),
        (lambda: EpisodicRead(5, 2, 2, 6), ValueError, "EpisodicRead: k must be at most slots, 5, got 6"),
        (lambda: EpisodicRead(5, 2, 2, 0), ValueError, "EpisodicRead: k must be > 0, got 0"),
        (lambda: EpisodicRead(5, 2, 2, 2, delta=0.0), ValueError, "EpisodicRead: delta must be > 0, got 0.0"),
        (lambda: EpisodicRead(5, 2, 2, 2, delta=math.inf), ValueError, "EpisodicRead: delta must be finite, got inf"),
        (lambda: KNNAttention(0, 5, 1, 2), ValueError, "KNNAttention: embed_dim must be > 0, got 0"),
        (lambda: KNNAttention(4, 0, 1, 2), ValueError, "KNNAttention: slots must be > 0, got 0"),
        (lambda: KNNAttention(4, 5, 3, 2), ValueError, "KNNAttention: num_heads must divide embed_dim 4, got 3"),
        (lambda: KNNAttention(4, 5, 0, 2), ValueError, "KNNAttention: num_heads must be > 0, got 0"),
        (lambda: KNNAttention(4, 5, 1, 6), ValueError, "KNNAttention: k must be at most slots, 5, got 6"),
        (lambda: EpisodicRead(5, 2, 2, 2)([0.0]), TypeError, "EpisodicRead: queries must be a torch.Tensor, got list"),
        (
            lambda: EpisodicRead(5, 2, 2, 2)(torch.zeros(3, 4)),
            ValueError,
            "EpisodicRead: queries must have shape (*, 2), got (3, 4)",
        ),
        (
            lambda: EpisodicRead(5, 2, 2, 2)(torch.zeros(3, 2).double()),
            TypeError,
            "EpisodicRead: queries must be float32, got float64",
        ),
        (
            lambda: EpisodicRead(5, 2, 2, 2)(torch.zeros(3, 2, device="meta")),
            ValueError,
            "EpisodicRead: queries is on meta, the layer is on cpu",
        ),
        (
            lambda: KNNAttention(4, 5, 1, 2)(torch.zeros(())),
            ValueError,
            "KNNAttention: x must have shape (*, 4), got ()",
        ),
        (
            lambda: KNNAttention(4, 5, 1, 2)(torch.zeros(4).long()),
            TypeError,
            "KNNAttention: x must be float32, got int64",
        ),
    ],
)
def test_layer_bad_input_raises(call, error, text):
    with pytest.raises(error, match="^" + re.escape(text) + "$"):
        call()
