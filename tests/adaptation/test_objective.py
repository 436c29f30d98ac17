"""The loss of a batch, of masked rows, of experience, and the entropy; errors that name the entry."""

import copy
import math
import re

import pytest
import torch
from adapter_data import OFF, batch, mlp, users, vector
from torch import nn
from torch.nn import functional as F

from eaml_ext.adaptation import AdaptationConfig, Adapter
from eaml_ext.experience import ExperienceBuffer


def test_adapt_hidden_state_reaches_the_model_without_graph():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x, hidden=None):
            return self.layer(x) if hidden is None else self.layer(x) + hidden["h"]

    model = Recurrent()
    hidden = {"h": model.layer(torch.ones(16, 4))}
    data = batch()
    adapter = Adapter(model, AdaptationConfig(max_steps_per_call=3))
    with torch.no_grad():
        expected = [float(F.mse_loss(model(data["states"], h), data["targets"])) for h in (hidden, None)]
    one = Adapter(copy.deepcopy(model), AdaptationConfig(max_steps_per_call=1))
    assert one.adapt(F.mse_loss, {**data, "hidden_state": hidden}) == pytest.approx(expected[0])
    adapter.adapt(F.mse_loss, {**data, "hidden_state": hidden})
    assert adapter.last_steps == 3
    adapter.reset()
    one.reset()
    assert one.adapt(F.mse_loss, {**data, "hidden_state": None}) == pytest.approx(expected[1])


@pytest.mark.parametrize("steps", [False, True])
def test_adapt_mask_equals_the_batch_without_the_masked_rows(steps):
    lead = (6, 5) if steps else (6,)
    model, other = mlp(), mlp()
    other.load_state_dict(model.state_dict())
    data = {"states": torch.randn(*lead, 4), "targets": torch.randn(*lead, 1)}
    mask = torch.rand(lead) > 0.5
    spoiled = {**data, "targets": data["targets"].masked_fill(~mask.unsqueeze(-1), torch.nan), "mask": mask}
    kept = {name: value[mask] for name, value in data.items()}
    cfg = AdaptationConfig()
    assert Adapter(model, cfg).adapt(F.mse_loss, spoiled) == pytest.approx(Adapter(other, cfg).adapt(F.mse_loss, kept))
    torch.testing.assert_close(vector(model), vector(other))


def test_adapt_empty_buffer_equals_no_buffer():
    data, model, other = batch(), mlp(), mlp()
    other.load_state_dict(model.state_dict())
    with_empty = Adapter(model, AdaptationConfig(), ExperienceBuffer(10), 0.5)
    plain = Adapter(other, AdaptationConfig())
    assert with_empty.adapt(F.mse_loss, data) == plain.adapt(F.mse_loss, data)
    assert torch.equal(vector(model), vector(other))


def test_adapt_large_experience_weight_is_stable():
    data, memory, weight = batch(), batch(), 200.0
    model = nn.Linear(4, 1)
    adapter = Adapter(model, AdaptationConfig(**OFF, lr=0.1), experience_weight=weight, retriever=lambda *_: memory)
    losses = [adapter.adapt(F.mse_loss, data) for _ in range(20)]
    assert losses[-1] < losses[0] and adapter.rollbacks == 0
    plain = nn.Linear(4, 1)
    for _ in range(30):  # the same steps on the undivided total
        total = F.mse_loss(plain(data["states"]), data["targets"])
        total = total + weight * F.mse_loss(plain(memory["states"]), memory["targets"])
        grads = torch.autograd.grad(total, list(plain.parameters()))
        with torch.no_grad():
            for p, g in zip(plain.parameters(), grads, strict=True):
                p -= 0.1 * g
    assert not float(total.detach()) < 1e6


@pytest.mark.parametrize("loss_fn", [F.mse_loss, nn.L1Loss(), F.cross_entropy])
def test_adapt_experience_weights_equal_repeated_items(loss_fn):
    """Weights in the proportion 3 : 1 : 0 equal a batch with the items three times, once and not at all."""
    torch.manual_seed(1)
    targets = (lambda n: torch.randint(3, (n,))) if loss_fn is F.cross_entropy else (lambda n: torch.randn(n, 3))
    data = {"states": torch.randn(16, 4), "targets": targets(16)}
    memory = {"states": torch.randn(3, 4), "targets": targets(3)}
    chosen = torch.tensor([0, 0, 0, 1])
    repeated = {name: value[chosen] for name, value in memory.items()}
    model = mlp(outputs=3).double()
    other = copy.deepcopy(model)
    data, memory, repeated = (
        {n: v.double() if v.is_floating_point() else v for n, v in d.items()} for d in (data, memory, repeated)
    )
    weighted = {**memory, "weights": torch.tensor([6.0, 2.0, 0.0], dtype=torch.float64)}
    cfg = AdaptationConfig(lr=0.1, max_steps_per_call=3)
    ours = Adapter(model, cfg, None, 0.7, retriever=lambda *_: weighted)
    theirs = Adapter(other, cfg, None, 0.7, retriever=lambda *_: repeated)
    assert ours.adapt(loss_fn, data) == pytest.approx(theirs.adapt(loss_fn, data), rel=1e-12)
    torch.testing.assert_close(vector(model), vector(other), rtol=1e-12, atol=1e-14)
    users = {name: torch.stack([value, value]) for name, value in data.items()}
    many, losses = ours.adapt_many(loss_fn, users)
    same, expected = theirs.adapt_many(loss_fn, users)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    for name in many:
        torch.testing.assert_close(many[name], same[name], rtol=1e-12, atol=1e-14)


def entropy(logits):
    p = logits.softmax(-1)
    return float(-(p * p.log()).sum(-1).mean())


@pytest.mark.parametrize("layout", ["(n, classes)", "(n, time, classes)", "(n, classes, time)"])
def test_adapt_entropy_weight_on_logits_reduces_entropy(layout):
    x = torch.randn(32, 4) if layout == "(n, classes)" else torch.randn(32, 5, 4)
    targets = torch.randint(0, 3, x.shape[:-1])

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp(outputs=3)

        def forward(self, x):
            y = self.inner(x)
            return y.transpose(1, 2) if layout == "(n, classes, time)" else y

    def loss_fn(logits, targets):
        if layout == "(n, time, classes)":
            logits, targets = logits.flatten(0, 1), targets.flatten()
        return F.cross_entropy(logits, targets)

    results = {}
    for weight in (0.0, 3.0):
        torch.manual_seed(0)
        model = Turned()
        adapter = Adapter(model, AdaptationConfig(lr=0.5, entropy_weight=weight))
        first = adapter.adapt(loss_fn, {"states": x, "targets": targets})
        for _ in range(30):
            adapter.adapt(loss_fn, {"states": x, "targets": targets})
        results[weight] = first, entropy(model.inner(x).detach())
    assert results[3.0][1] < 0.5 * results[0.0][1]


def test_adapt_entropy_weight_step_equals_the_formula():
    x, targets = torch.randn(8, 4), torch.randint(0, 3, (8,))
    model = nn.Linear(4, 3).double()
    x = x.double()
    logits = model(x)
    p = logits.softmax(-1)
    goal = F.cross_entropy(logits, targets) - 0.3 * (p * p.log()).sum(-1).mean()
    expected = vector(model) - 0.1 * torch.cat([g.flatten() for g in torch.autograd.grad(goal, model.parameters())])
    reported = float(F.cross_entropy(logits, targets).detach())
    adapter = Adapter(model, AdaptationConfig(**OFF, lr=0.1, entropy_weight=0.3, max_steps_per_call=1))
    assert adapter.adapt(F.cross_entropy, {"states": x, "targets": targets}) == pytest.approx(reported)
    torch.testing.assert_close(vector(model), expected)


@pytest.mark.parametrize("targets", [torch.ones(8, 3), torch.arange(24).view(8, 3)])
def test_adapt_entropy_weight_on_a_regression_has_no_effect(targets):
    runs = []
    for weight in (0.0, 5.0):
        torch.manual_seed(0)
        model = mlp(outputs=3)
        data = {"states": torch.randn(8, 4), "targets": targets}
        Adapter(model, AdaptationConfig(entropy_weight=weight)).adapt(lambda p, t: F.mse_loss(p, t.float()), data)
        runs.append(vector(model))
    assert torch.equal(*runs)


def test_adapt_entropy_of_a_logit_of_minus_infinity_is_finite():
    class Ruled(nn.Linear):
        def forward(self, x):
            return torch.cat([super().forward(x), torch.full((len(x), 1), -math.inf)], 1)

    model = Ruled(4, 2)
    adapter = Adapter(model, AdaptationConfig(entropy_weight=0.5))
    assert math.isfinite(adapter.adapt(F.cross_entropy, {"states": torch.randn(8, 4), "targets": torch.arange(8) % 2}))
    assert adapter.last_steps == 5 and torch.isfinite(vector(model)).all()


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"states": None}, TypeError, "states must be a torch.Tensor, got NoneType"),
        ({"targets": [1.0]}, TypeError, "targets must be a torch.Tensor, got list"),
        ({"states": lambda x: x.double()}, TypeError, "states must be float32, got float64"),
        ({"targets": lambda x: x.double()}, TypeError, "targets must be float32, got float64"),
        ({"states": lambda x: x.to("meta")}, ValueError, "states is on meta, the model is on cpu"),
        ({"targets": lambda x: x.to("meta")}, ValueError, "targets is on meta, the model is on cpu"),
        ({"targets": lambda x: x[..., :-1, :]}, ValueError, "targets has shape"),
        ({"states": lambda x: x[..., :0, :], "targets": lambda x: x[..., :0, :]}, ValueError, "the batch is empty"),
        ({"states": torch.tensor(1.0)}, ValueError, "states must have shape ("),
        ({"mask": [True]}, TypeError, "mask must be a torch.Tensor, got list"),
        ({"mask": torch.ones(12)}, TypeError, "mask must be bool, got float32"),
        (
            {"mask": torch.ones(3, dtype=torch.bool)},
            ValueError,
            "mask has shape (3,), wanted the leading dimensions of",
        ),
        ({"mask": torch.ones(3, 12, dtype=torch.bool, device="meta")}, ValueError, "mask is on meta, the model is on"),
    ],
)
def test_calls_batch_with_a_wrong_entry_raise_its_name(many, change, error, text):
    model = mlp()
    adapter, before = Adapter(model), vector(model)
    data = users(3) if many else {name: value[0] for name, value in users(3).items()}
    where = "Adapter.adapt_many" if many else "Adapter.adapt"
    for name, value in change.items():
        data[name] = value(data[name]) if callable(value) else value
    with pytest.raises(error, match=f"^{where}: " + re.escape(text)):
        getattr(adapter, where.removeprefix("Adapter."))(F.mse_loss, data)
    assert torch.equal(vector(model), before)


@pytest.mark.parametrize("name", ["adapt", "adapt_many"])
def test_calls_wrong_loss_or_model_raise(name):
    model = mlp()
    adapter, before = Adapter(model), vector(model)
    call = getattr(adapter, name)
    data = users(3) if name == "adapt_many" else {name: value[0] for name, value in users(3).items()}
    cases = [
        ("mse", data, TypeError, "loss_fn must be callable, got str"),
        (F.mse_loss, [1], TypeError, "batch_dict must be a dict, got list"),
        (F.mse_loss, {"states": data["states"]}, ValueError, "batch_dict has no targets, only states"),
        (lambda p, t: (p - t) ** 2, data, ValueError, "loss_fn must return a scalar, got shape (12, 1)"),
        (lambda p, t: 1.0, data, TypeError, "loss_fn must return a floating scalar tensor, got float"),
        (
            lambda p, t: (p > t).sum(),
            data,
            TypeError,
            "loss_fn must return a floating scalar tensor, got a torch.int64",
        ),
        (lambda p, t: t.mean(), data, ValueError, "the loss does not depend on the adapted parameters"),
        (lambda p, t: p.detach().mean(), data, ValueError, "the loss does not depend on the adapted parameters"),
    ]
    for loss_fn, given, error, text in cases:
        with pytest.raises(error, match=f"^Adapter.{name}: " + re.escape(text)):
            call(loss_fn, given)
    assert torch.equal(vector(model), before)

    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    with pytest.raises(TypeError, match=rf"^Adapter.{name}: the model must return one tensor, got tuple"):
        getattr(Adapter(Pair(4, 1)), name)(F.mse_loss, data)


def test_calls_mask_without_true_or_of_another_shape_raise():
    adapter = Adapter(mlp())
    data = batch()
    with pytest.raises(ValueError, match=r"^Adapter.adapt: mask is nowhere True, the batch is empty$"):
        adapter.adapt(F.mse_loss, {**data, "mask": torch.zeros(16, dtype=torch.bool)})
    uneven = torch.ones(3, 12, dtype=torch.bool)
    uneven[0, 0] = False
    with pytest.raises(ValueError, match=r"^Adapter.adapt_many: mask must have equally many True for all users, got"):
        adapter.adapt_many(F.mse_loss, {**users(3), "mask": uneven})
    with pytest.raises(
        ValueError, match=r"^Adapter.adapt: the model returned shape \(6, 1\), the mask has shape \(6, 5\)"
    ):
        model = nn.Sequential(nn.Flatten(), nn.Linear(20, 1))
        states, targets = torch.randn(6, 5, 4), torch.randn(6, 5, 1)
        mask = torch.ones(6, 5, dtype=torch.bool)
        Adapter(model).adapt(F.mse_loss, {"states": states, "targets": targets, "mask": mask})
