import copy
import io
import math
import pickle
import re

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from eaml_ext.adaptation import AdaptationConfig, Adapter
from eaml_ext.adaptation.guards import UserHistory
from eaml_ext.experience import ExperienceBuffer, retrieval

OFF = {"grad_clip_norm": None, "trust_region_eps": None, "ema_decay": None}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def mlp(inputs=4, outputs=1):
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs))


def batch(n=16):
    return {"states": torch.randn(n, 4), "targets": torch.randn(n, 1)}


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


# -------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("guarded", [False, True])
def test_adapt_makes_exactly_the_steps_of_its_formulas(guarded):
    lr, clip, eps, weight = 0.05, 0.2, 0.004, 0.7
    guards = {"grad_clip_norm": clip, "trust_region_eps": eps} if guarded else OFF
    model, data, memory = mlp().double(), batch(), batch(8)
    data, memory = ({k: v.double() for k, v in d.items()} for d in (data, memory))
    expected = copy.deepcopy(model)
    adapter = Adapter(
        model,
        AdaptationConfig(**{**OFF, "lr": lr, "max_steps_per_call": 3, **guards}),
        experience_weight=weight,
        retriever=lambda *_: memory,
    )
    anchor = vector(expected)
    clipped = projected = 0
    for _ in range(3):
        current = F.mse_loss(expected(data["states"]), data["targets"])
        remembered = F.mse_loss(expected(memory["states"]), memory["targets"])
        total = current + weight * remembered
        grads = torch.autograd.grad(total / (1 + weight), list(expected.parameters()))
        g = torch.cat([grad.flatten() for grad in grads])
        if guarded and g.norm() > clip:
            g, clipped = g * clip / g.norm(), clipped + 1
        theta = vector(expected) - lr * g
        if guarded and (theta - anchor).norm() > eps * anchor.norm():
            theta = anchor + (theta - anchor) * (eps * anchor.norm() / (theta - anchor).norm())
            projected += 1
        nn.utils.vector_to_parameters(theta, expected.parameters())
    assert adapter.adapt(F.mse_loss, data) == pytest.approx(float(total.detach()), rel=1e-12)
    assert adapter.last_steps == 3
    torch.testing.assert_close(vector(model), vector(expected), rtol=1e-12, atol=1e-14)
    assert not guarded or (clipped and projected), "both guards must have acted"


def test_adapt_learns_and_keeps_its_hands_off_the_rest():
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.0), nn.Linear(16, 1))
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.clone()
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    for training in (True, False):
        model.train(training)
        adapter, data = Adapter(model, AdaptationConfig(lr=0.1)), batch()
        with torch.no_grad():  # adapting at test time is usually called from inside one
            losses = [adapter.adapt(nn.MSELoss(), data) for _ in range(20)]
        assert losses[-1] < losses[0]
        assert model.training is training and model[1].training is training
    assert torch.equal(model[0].weight, frozen)
    assert all((p.grad == 1).all() for p in model.parameters() if p.requires_grad)


def test_the_hidden_state_reaches_the_model_and_carries_no_graph():
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
def test_only_where_the_mask_is_true_counts(steps):
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


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        ("2", {"2.weight", "2.bias"}),
        (["0.bias", "2."], {"0.bias", "2.weight", "2.bias"}),
        (re.compile("weight$"), {"0.weight", "2.weight"}),
        (lambda name, p: p.dim() == 1, {"0.bias", "2.bias"}),
    ],
)
def test_a_named_subset_adapts(choice, wanted):
    model = mlp()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Adapter(model, AdaptationConfig(), parameters=choice).adapt(F.mse_loss, batch())
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == wanted


def test_a_prefix_ends_at_a_module():
    with pytest.raises(ValueError, match=r"^Adapter: parameters selects nothing from the model, which has head.weight"):
        Adapter(nn.ModuleDict({"head": nn.Linear(1, 1)}), parameters="hea")


@pytest.mark.parametrize("make", [torch.optim.Adam, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)])
def test_another_optimizer(make):
    model, reference, data = mlp(), mlp(), batch()
    reference.load_state_dict(model.state_dict())
    adapter = Adapter(model, AdaptationConfig(**OFF, lr=0.01, max_steps_per_call=2), optimizer=make)
    optimizer = make(list(reference.parameters()), lr=0.01)
    for _ in range(3):
        adapter.adapt(F.mse_loss, data)
    for _ in range(6):
        optimizer.zero_grad()
        F.mse_loss(reference(data["states"]), data["targets"]).backward()
        optimizer.step()
    torch.testing.assert_close(vector(model), vector(reference))
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------------------------------------- guards
# Each of these runs the same failure twice, without the guard and with it.


@pytest.mark.parametrize("guarded", [False, True])
def test_the_gradient_clip_prevents_divergence(guarded):
    model = nn.Linear(4, 1)
    data = {"states": 30 * torch.randn(16, 4), "targets": torch.randn(16, 1)}
    cfg = AdaptationConfig(**{**OFF, "lr": 0.01, "grad_clip_norm": 1.0 if guarded else None})
    adapter = Adapter(model, cfg)
    losses = [adapter.adapt(F.mse_loss, data) for _ in range(20)]
    if guarded:
        assert adapter.rollbacks == 0 and losses[-1] < losses[0]
    else:
        assert adapter.rollbacks > 0 or losses[-1] > 1e6 * losses[0]


@pytest.mark.parametrize("guarded", [False, True])
def test_the_trust_region_bounds_what_one_call_can_destroy(guarded):
    stream, model = Stream(), nn.Linear(4, 1)
    eps = 0.05
    adapter = Adapter(model, AdaptationConfig(**{**OFF, "lr": 0.1, "trust_region_eps": eps if guarded else None}))
    for _ in range(100):
        adapter.adapt(F.mse_loss, stream.batch())
    before, error = vector(model), stream.error(model)
    assert error < 0.01
    adapter.adapt(F.mse_loss, stream.batch(scale=-1e3))
    moved = (vector(model) - before).norm()
    if guarded:
        assert moved <= eps * before.norm() * (1 + 1e-5)
        assert stream.error(model) < 0.05
    else:
        assert stream.error(model) > 1e3


def test_the_trust_region_starts_anew_with_each_call():
    stream, model = Stream(), nn.Linear(4, 1)
    start = vector(model)
    adapter = Adapter(model, AdaptationConfig(lr=0.1, trust_region_eps=0.02))
    for _ in range(300):
        anchor = vector(model)
        adapter.adapt(F.mse_loss, stream.batch())
        assert (vector(model) - anchor).norm() <= 0.02 * anchor.norm() * (1 + 1e-5)
    assert stream.error(model) < 0.01 and (vector(model) - start).norm() > 0.2 * start.norm()


def test_parameters_that_begin_at_zero_are_not_frozen():
    model = nn.Linear(4, 1)
    nn.init.zeros_(model.weight)
    adapter = Adapter(model, AdaptationConfig(lr=10.0, trust_region_eps=0.1), parameters="weight")
    adapter.adapt(F.mse_loss, batch())
    assert float(model.weight.detach().norm()) == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("guarded", [False, True])
def test_a_spiking_loss_rolls_back(guarded):
    stream, model = Stream(), nn.Linear(4, 1)
    adapter = Adapter(model, AdaptationConfig(**{**OFF, "lr": 0.05, "ema_decay": 0.9 if guarded else None}))
    for _ in range(60):
        adapter.adapt(F.mse_loss, stream.batch())
    assert adapter.rollbacks == 0 and stream.error(model) < 0.01
    value = adapter.adapt(F.mse_loss, stream.batch(scale=-1e3))
    assert value > 1e4, "the offending loss is what is reported"
    if guarded:
        assert adapter.rollbacks == 1 and adapter.last_steps == 0
        assert stream.error(model) < 0.01
        assert torch.equal(vector(model), vector(adapter.ema_model()))
    else:
        assert stream.error(model) > 1e3


def test_a_spike_that_stays_is_a_new_regime():
    stream, model = Stream(), nn.Linear(4, 1)
    adapter = Adapter(model, AdaptationConfig(lr=0.05, trust_region_eps=None, grad_clip_norm=None))
    for _ in range(60):
        adapter.adapt(F.mse_loss, stream.batch())
    stream.weight = -20 * stream.weight
    steps = []
    for _ in range(40):
        adapter.adapt(F.mse_loss, stream.batch())
        steps.append(adapter.last_steps)
    assert steps == [0, 0] + [5] * 38
    assert stream.error(model) < 1.0


def test_a_loss_that_explodes_inside_a_call_is_stopped():
    stream, model = Stream(), nn.Linear(4, 1)
    adapter = Adapter(model, AdaptationConfig(lr=0.05, trust_region_eps=None, grad_clip_norm=None))
    for _ in range(60):
        adapter.adapt(F.mse_loss, stream.batch())
    before = vector(adapter.ema_model())
    data = stream.batch()
    # The first loss is an ordinary one, but its gradient throws the model away.
    value = adapter.adapt(lambda p, t: F.mse_loss(p, t) + 1e5 * (p - p.detach()).sum(), data)
    assert value > 1e3 and adapter.rollbacks == 1 and adapter.last_steps == 1
    assert (vector(model) - before).norm() < 0.01 and stream.error(model) < 0.05


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_a_loss_or_gradient_that_is_not_finite_rolls_back(poison):
    stream = Stream()
    plain, guarded = nn.Linear(4, 1), nn.Linear(4, 1)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    adapter = Adapter(guarded, AdaptationConfig(**OFF, lr=0.05))
    for i in range(60):
        data = stream.batch()
        if i % 20 == 10:
            data["targets"][0] = poison
        optimizer.zero_grad()
        F.mse_loss(plain(data["states"]), data["targets"]).backward()
        optimizer.step()
        value = adapter.adapt(F.mse_loss, data)
        assert math.isfinite(value) == (i % 20 != 10)
    assert not vector(plain).norm() < 1e6
    assert adapter.rollbacks == 3 and stream.error(guarded) < 0.01


def test_a_rollback_also_mends_buffers_and_the_optimizer():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    adapter = Adapter(model, AdaptationConfig(), optimizer=torch.optim.Adam)
    adapter.adapt(F.mse_loss, batch())
    before = {name: b.clone() for name, b in model.named_buffers()}
    bad = batch()
    bad["states"][0] = math.nan
    assert math.isnan(adapter.adapt(F.mse_loss, bad))
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert math.isfinite(adapter.adapt(F.mse_loss, batch())) and torch.isfinite(vector(model)).all()


def test_an_optimizer_that_breaks_the_parameters_is_undone():
    class Broken(torch.optim.SGD):
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    p.fill_(math.nan)

    model = mlp()
    before = vector(model)
    adapter = Adapter(model, AdaptationConfig(), optimizer=Broken)
    assert math.isfinite(adapter.adapt(F.mse_loss, batch()))
    assert torch.equal(vector(model), before) and adapter.last_steps == 0


def test_the_averaged_model_is_steadier_on_a_noisy_stream():
    stream, model = Stream(noise=2.0), nn.Linear(4, 1)
    adapter = Adapter(model, AdaptationConfig(lr=0.05, ema_decay=0.98))
    own, averaged = [], []
    for i in range(300):
        adapter.adapt(F.mse_loss, stream.batch(n=4))
        if i >= 150:
            own.append(stream.error(model))
            averaged.append(stream.error(adapter.ema_model()))
    assert sum(averaged) < 0.5 * sum(own)


@pytest.mark.parametrize("guarded", [False, True])
def test_a_corrupted_stream(guarded):
    stream, model = Stream(), mlp()
    unadapted = stream.error(model)
    adapter = Adapter(model, AdaptationConfig(lr=0.05) if guarded else AdaptationConfig(**OFF, lr=0.05))
    errors = []
    for i in range(200):
        adapter.adapt(F.mse_loss, stream.batch(scale=-1e4 if i % 50 == 37 else 1.0))
        errors.append(stream.error(model))
    assert all(math.isfinite(e) for e in errors)
    if guarded:
        assert max(errors) < 1.1 * unadapted and errors[-1] < 0.1 * unadapted
    else:
        assert max(errors) > 10 * unadapted


def test_loss_statistics_are_the_weighted_mean_and_variance():
    history, decay, values = UserHistory(2, 0.9), 0.9, torch.randn(25, dtype=torch.float64) - 3
    for value in values.tolist():
        history.add_loss(1, value)
    weights = decay ** torch.arange(24, -1, -1, dtype=torch.float64)
    weights /= weights.sum()
    mean = (weights * values).sum()
    variance = (weights * (values - mean) ** 2).sum()
    assert history.mean == [0.0, pytest.approx(float(mean))]
    threshold = float(mean + max(6 * variance.sqrt(), abs(mean)))
    assert not history.is_spike(1, threshold - 1e-6)
    assert history.is_spike(1, threshold + 1e-6)


# --------------------------------------------------------------------------------------------------- experience


def test_dividing_by_the_weight_keeps_a_large_weight_stable():
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


def memory_of_two_tasks():
    """Task 0 is y = sum(x) around the embedding 0, task 1 is y = -sum(x) around 1."""
    buffer = ExperienceBuffer(1000, seed=0)
    for task, sign in enumerate((1.0, -1.0)):
        x = torch.randn(100, 4)
        buffer.add(x, sign * x.sum(1, keepdim=True), context_embedding=torch.full((100, 2), float(task)), task=task)
    return buffer


def test_retrieved_experience_decides_where_the_batch_is_silent():
    errors = {}
    x = torch.randn(100, 4)
    for name, extra in {
        "none": {},
        "right": {"context_embedding": torch.full((2,), 0.1)},
        "left out": {"context_embedding": torch.full((2,), 0.1), "task": 0},
    }.items():
        torch.manual_seed(1)
        model = nn.Linear(4, 1)
        weight = 0.0 if name == "none" else 1.0
        retriever = retrieval.nearest(50)
        adapter = Adapter(model, AdaptationConfig(lr=0.1), memory_of_two_tasks(), weight, retriever=retriever)
        states = torch.randn(2, 4)
        for _ in range(60):
            adapter.adapt(F.mse_loss, {"states": states, "targets": states.sum(1, keepdim=True), **extra})
        errors[name] = float(F.mse_loss(model(x), x.sum(1, keepdim=True)).detach())
    assert errors["right"] < 0.2 * errors["none"] < errors["left out"]


@pytest.mark.parametrize("loss_fn", [F.mse_loss, nn.L1Loss(), F.cross_entropy])
def test_experience_with_weights_is_their_mean_of_losses(loss_fn):
    """Weights in the proportion 3 : 1 : 0 are the items three times, once and not at all."""
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


def test_what_the_default_retriever_does():
    asked = []

    class Spy(ExperienceBuffer):
        def retrieve(self, query_embedding, k, exclude_task=None):
            asked.append(("retrieve", k, exclude_task))
            return super().retrieve(query_embedding, k, exclude_task)

        def get_batch(self, n, **options):
            asked.append(("get_batch", n))
            return super().get_batch(n, **options)

    buffer = Spy(100)
    model = nn.Linear(4, 1)
    adapter = Adapter(model, AdaptationConfig(), buffer)
    data = batch()
    adapter.adapt(F.mse_loss, data)
    assert asked == [], "an empty buffer is not asked"
    buffer.add(torch.randn(20, 4), torch.randn(20, 1), context_embedding=torch.randn(20, 2), task=3)
    adapter.adapt(F.mse_loss, data)
    adapter.adapt(F.mse_loss, {**data, "context_embedding": torch.zeros(2)})
    adapter.adapt(F.mse_loss, {**data, "context_embedding": torch.zeros(2), "task": 3})
    assert asked == [("get_batch", 16), ("retrieve", 16, None), ("retrieve", 16, 3)]
    Adapter(model, AdaptationConfig(), buffer, 0.0).adapt(F.mse_loss, data)
    assert len(asked) == 3, "with weight 0 it is not asked either"


def test_without_experience_the_total_is_the_current_loss():
    data, model, other = batch(), mlp(), mlp()
    other.load_state_dict(model.state_dict())
    with_empty = Adapter(model, AdaptationConfig(), ExperienceBuffer(10), 0.5)
    plain = Adapter(other, AdaptationConfig())
    assert with_empty.adapt(F.mse_loss, data) == plain.adapt(F.mse_loss, data)
    assert torch.equal(vector(model), vector(other))


FOUND = {"states": torch.zeros(2, 4), "targets": torch.zeros(2, 1)}


@pytest.mark.parametrize(
    ("found", "error", "text"),
    [
        ([1], TypeError, "the retriever must return a dict with states and targets, or None, got list"),
        ({"states": torch.zeros(2, 4)}, TypeError, "the retriever must return a dict with states and targets"),
        ({"states": 1, "targets": 1}, TypeError, "the retriever's states must be a torch.Tensor, got int"),
        ({"states": torch.zeros(2, 4), "targets": torch.zeros(3, 1)}, ValueError, "the retriever's targets have shape"),
        ({**FOUND, "weights": [1.0, 1.0]}, TypeError, "the retriever's weights must be a torch.Tensor, got list"),
        (
            {**FOUND, "weights": torch.ones(2).double()},
            TypeError,
            "the retriever's weights must be float32, got float64",
        ),
        ({**FOUND, "weights": torch.ones(3)}, ValueError, "the retriever's weights must have shape (2,), got (3,)"),
        (
            {**FOUND, "weights": torch.ones(2, device="meta")},
            ValueError,
            "the retriever's weights is on meta, the model",
        ),
        (
            {**FOUND, "weights": torch.zeros(2)},
            ValueError,
            "the retriever's weights must be finite, >= 0 and not all 0",
        ),
        (
            {**FOUND, "weights": torch.tensor([2.0, -1.0])},
            ValueError,
            "the retriever's weights must be finite, >= 0 and",
        ),
        (
            {**FOUND, "weights": torch.tensor([torch.nan, 1.0])},
            ValueError,
            "the retriever's weights must be finite, >=",
        ),
        (
            {**FOUND, "weights": torch.tensor([torch.inf, 1.0])},
            ValueError,
            "the retriever's weights must be finite, >=",
        ),
        (
            {"states": torch.zeros(2, 4).double(), "targets": torch.zeros(2, 1)},
            TypeError,
            "the retriever's states must be float32, got float64",
        ),
        (
            {"states": torch.zeros(2, 4), "targets": torch.zeros(2, 1, device="meta")},
            ValueError,
            "the retriever's targets is on meta, the model is on cpu",
        ),
    ],
)
def test_a_retriever_that_returns_something_else_is_told(found, error, text):
    adapter = Adapter(mlp(), AdaptationConfig(), retriever=lambda *_: found)
    with pytest.raises(error, match="^Adapter.adapt: " + re.escape(text)):
        adapter.adapt(F.mse_loss, batch())


# ------------------------------------------------------------------------------------------------------ entropy


def entropy(logits):
    p = logits.softmax(-1)
    return float(-(p * p.log()).sum(-1).mean())


@pytest.mark.parametrize("layout", ["(n, classes)", "(n, time, classes)", "(n, classes, time)"])
def test_entropy_is_minimised_on_logits_with_integer_targets(layout):
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


def test_the_entropy_step_is_its_formula():
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
def test_entropy_never_touches_a_regression(targets):
    runs = []
    for weight in (0.0, 5.0):
        torch.manual_seed(0)
        model = mlp(outputs=3)
        data = {"states": torch.randn(8, 4), "targets": targets}
        Adapter(model, AdaptationConfig(entropy_weight=weight)).adapt(lambda p, t: F.mse_loss(p, t.float()), data)
        runs.append(vector(model))
    assert torch.equal(*runs)


def test_a_class_that_is_ruled_out_does_not_poison_the_entropy():
    class Ruled(nn.Linear):
        def forward(self, x):
            return torch.cat([super().forward(x), torch.full((len(x), 1), -math.inf)], 1)

    model = Ruled(4, 2)
    adapter = Adapter(model, AdaptationConfig(entropy_weight=0.5))
    assert math.isfinite(adapter.adapt(F.cross_entropy, {"states": torch.randn(8, 4), "targets": torch.arange(8) % 2}))
    assert adapter.last_steps == 5 and torch.isfinite(vector(model)).all()


# ------------------------------------------------------------------------------------------------------ keeping


def test_reset_returns_to_the_snapshot():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    adapter = Adapter(model, AdaptationConfig(), optimizer=torch.optim.Adam)
    start = copy.deepcopy(model.state_dict())
    data = [batch() for _ in range(5)]
    first = [adapter.adapt(F.mse_loss, d) for d in data]
    adapter.reset()
    assert all(torch.equal(v, start[k]) for k, v in model.state_dict().items())
    assert [adapter.adapt(F.mse_loss, d) for d in data] == first
    adapter.snapshot()
    here = vector(model)
    adapter.adapt(F.mse_loss, batch())
    adapter.reset()
    assert torch.equal(vector(model), here) and torch.equal(vector(adapter.ema_model()), here)
    assert (adapter.last_steps, adapter.rollbacks) == (0, 0)


@pytest.mark.parametrize("optimizer", [None, torch.optim.Adam])
def test_a_kept_adapter_goes_on_exactly(optimizer):
    stream = Stream()
    model = mlp()
    adapter = Adapter(model, AdaptationConfig(), optimizer=optimizer)
    for _ in range(15):
        adapter.adapt(F.mse_loss, stream.batch())
    other_model = mlp()
    other = Adapter(other_model, AdaptationConfig(), optimizer=optimizer)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(adapter.state_dict()))
    for scale in (1.0, 1.0, -1e4, 1.0):
        data = stream.batch(scale)
        assert adapter.adapt(F.mse_loss, data) == other.adapt(F.mse_loss, data)
    assert adapter.rollbacks == other.rollbacks == 1
    assert torch.equal(vector(model), vector(other_model))
    for a in (adapter, other):
        a.reset()
    assert torch.equal(vector(model), vector(other_model))


def test_load_state_dict_refuses():
    adapter = Adapter(mlp())
    state = adapter.state_dict()
    cases = [
        ({}, "state must be a dict with the entries average"),
        ({**state, "average": {}}, "average has , wanted 0.weight"),
        (
            {**state, "snapshot": Adapter(mlp(5)).state_dict()["snapshot"]},
            "snapshot of 0.weight must have shape (16, 4)",
        ),
        (Adapter(mlp(), optimizer=torch.optim.Adam).state_dict(), "one of the state and the adapter has an optimizer"),
        (
            {**state, "snapshot_buffers": [torch.ones(2)]},
            "snapshot_buffers has the shapes [(2,)], the model's buffers []",
        ),
        (
            {**state, "statistics": {"mean": 1.0}},
            "statistics must be a dict with the entries consecutive_spikes, count, ema_sq_dev",
        ),
    ]
    for bad, text in cases:
        with pytest.raises(ValueError, match="^Adapter.load_state_dict: " + re.escape(text)):
            adapter.load_state_dict(bad)


def test_a_copied_adapter_is_independent():
    model = mlp()
    adapter = Adapter(model, AdaptationConfig(), ExperienceBuffer(10), optimizer=torch.optim.Adam)
    other = copy.deepcopy(adapter)
    before = vector(model)
    other.adapt(F.mse_loss, batch())
    assert torch.equal(vector(model), before) and not torch.equal(vector(other.model), before)


# --------------------------------------------------------------------------------------------------- many users


def users(count=5, n=12):
    return {"states": torch.randn(count, n, 4), "targets": torch.randn(count, n, 1)}


@pytest.mark.parametrize("extras", ["", "mask", "experience", "hidden"])
def test_adapt_many_equals_one_by_one(extras):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()
            self.register_buffer("shift", torch.ones(1))

        def forward(self, x, hidden=None):
            return self.inner(x) + self.shift + (0 if hidden is None else hidden[0])

    model = Recurrent().double()
    data = {name: value.double() for name, value in users().items()}
    data["targets"][1] *= 100  # this one is clipped and projected
    buffer, retriever = None, None
    if extras == "mask":
        data["mask"] = torch.stack([torch.randperm(12) < 7 for _ in range(5)])
    elif extras == "hidden":
        data["hidden_state"] = (torch.randn(5, 12, 1).double(),)
    elif extras == "experience":
        buffer = ExperienceBuffer(100)
        buffer.add(torch.randn(50, 4).double(), torch.randn(50, 1).double(), context_embedding=torch.randn(50, 2))
        data["context_embedding"] = torch.randn(5, 2)
        retriever = retrieval.nearest(6)
    cfg = AdaptationConfig(lr=0.05, grad_clip_norm=0.5, trust_region_eps=0.005, ema_decay=None)
    adapter = Adapter(model, cfg, buffer, 0.5, retriever=retriever)
    before = vector(model)
    params, losses = adapter.adapt_many(F.mse_loss, data)
    again, _ = adapter.adapt_many(F.mse_loss, data, params)
    assert torch.equal(vector(model), before), "the model itself does not change"
    for i in range(5):
        own = copy.deepcopy(model)
        mine = {n: (v[0][i],) if isinstance(v, tuple) else v[i] for n, v in data.items()}
        alone = Adapter(own, cfg, buffer, 0.5, retriever=retriever)
        assert alone.adapt(F.mse_loss, mine) == pytest.approx(float(losses[i]))
        for name, p in own.named_parameters():
            torch.testing.assert_close(params[name][i], p.detach())
        alone.adapt(F.mse_loss, mine)
        for name, p in own.named_parameters():
            torch.testing.assert_close(again[name][i], p.detach())
    one = {name: value[2] for name, value in params.items()}
    assert functional_call(model, one, data["states"][2]).shape == (12, 1)


@pytest.mark.parametrize("how", ["data", "divergence"])
def test_a_user_whose_loss_is_not_finite_is_frozen_alone(how):
    model, data = nn.Linear(4, 1), users()
    if how == "data":
        data["targets"][3, 0] = math.nan
    else:
        data["states"][3] *= 1e9
    adapter = Adapter(model, AdaptationConfig(**OFF, lr=0.1, max_steps_per_call=20))
    params, losses = adapter.adapt_many(F.mse_loss, data)
    assert torch.isfinite(losses).tolist() == [True, True, True, False, True]
    assert torch.equal(params["weight"][3], model.weight) and torch.equal(params["bias"][3], model.bias)
    assert torch.isfinite(params["weight"]).all()
    assert all(not torch.equal(params["weight"][i], model.weight) for i in (0, 1, 2, 4))


@pytest.mark.parametrize("guard", ["grad_clip_norm", "trust_region_eps"])
def test_each_guard_prevents_the_divergence_of_one_user(guard):
    model, data = nn.Linear(4, 1), users()
    data["states"][3] *= 30
    results = {}
    for guarded in (False, True):
        cfg = AdaptationConfig(**{**OFF, "lr": 0.01, "max_steps_per_call": 8, guard: 0.1 if guarded else None})
        params, losses = Adapter(model, cfg).adapt_many(F.mse_loss, data)
        distance = torch.cat([(params[n] - p.detach()).flatten(1) for n, p in model.named_parameters()], 1).norm(dim=1)
        results[guarded] = float(losses[3]), distance
    assert results[False][0] > 1e6
    assert results[True][0] < 1e4
    radius = 8 * 0.01 * 0.1 if guard == "grad_clip_norm" else 0.1 * float(vector(model).norm())
    assert float(results[True][1].max()) <= radius * (1 + 1e-5)


def test_dropout_differs_between_users():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1))
    data = {name: value[:1].expand(6, *value.shape[1:]) for name, value in users().items()}
    _, losses = Adapter(model, AdaptationConfig()).adapt_many(F.mse_loss, data)
    assert len(set(losses.tolist())) == 6


# ----------------------------------------------------------------------------------------------------- refusals


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
def test_a_wrong_batch_is_refused_by_name(many, change, error, text):
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
def test_a_wrong_loss_or_model_is_told(name):
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


def test_masks_that_are_nowhere_true_or_do_not_fit():
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


def test_wrong_stacked_params_and_uneven_experience():
    adapter, data = Adapter(mlp()), users(3)
    params, _ = adapter.adapt_many(F.mse_loss, data)
    cases = [
        ({}, ValueError, "params has , wanted 0.weight"),
        ({**params, "2.bias": params["2.bias"][:2]}, ValueError, "params['2.bias'] must have shape (3, 1), got (2, 1)"),
        ({**params, "2.bias": 1}, TypeError, "params['2.bias'] must be a torch.Tensor, got int"),
        ({**params, "2.bias": params["2.bias"].double()}, TypeError, "params['2.bias'] must be float32, got float64"),
        ({**params, "2.bias": params["2.bias"].to("meta")}, ValueError, "params['2.bias'] is on meta"),
    ]
    for bad, error, text in cases:
        with pytest.raises(error, match=r"^Adapter.adapt_many: " + re.escape(text)):
            adapter.adapt_many(F.mse_loss, data, bad)
    sizes = iter((1, 2, 2))

    def uneven(*_):
        n = next(sizes)
        return {"states": torch.zeros(n, 4), "targets": torch.zeros(n, 1)}

    with pytest.raises(ValueError, match="the retriever must find equally many experiences for all users"):
        Adapter(mlp(), retriever=uneven).adapt_many(F.mse_loss, data)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"model": F.relu}, TypeError, "model must be a torch.nn.Module, got"),
        ({"cfg": {"lr": 1}}, TypeError, "cfg must be an AdaptationConfig, got dict"),
        ({"experience_buffer": []}, TypeError, "experience_buffer must be an ExperienceBuffer, got list"),
        ({"experience_weight": -0.1}, ValueError, "experience_weight must be >= 0, got -0.1"),
        ({"experience_weight": math.inf}, ValueError, "experience_weight must be finite, got inf"),
        ({"experience_weight": "1"}, TypeError, "experience_weight must be a number, got '1'"),
        ({"retriever": 1}, TypeError, "retriever must be callable, got int"),
        ({"optimizer": "adam"}, TypeError, "optimizer must be callable, got str"),
        ({"parameters": [1]}, TypeError, "parameters must be prefixes, a pattern or a function, got [1]"),
        ({"parameters": "nowhere"}, ValueError, "parameters selects nothing from the model, which has 0.weight"),
        ({"model": nn.Tanh()}, ValueError, "parameters selects nothing from the model, which has none that require"),
    ],
)
def test_the_constructor_refuses(arguments, error, text):
    with pytest.raises(error, match="^Adapter: " + re.escape(text)):
        Adapter(**{"model": mlp(), **arguments})


def test_a_model_that_is_already_broken_is_refused():
    model = mlp()
    nn.init.constant_(model[2].bias, math.nan)
    with pytest.raises(ValueError, match=r"^Adapter: the parameter 2.bias is not finite$"):
        Adapter(model)


def test_a_loss_that_fails_at_a_later_step_leaves_the_model_as_it_was():
    model, calls = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), 0

    def loss(y, target):
        nonlocal calls
        calls += 1
        error = (y - target).square()
        return error if calls == 3 else error.mean()

    before = copy.deepcopy(model.state_dict())
    adapter = Adapter(model, AdaptationConfig(lr=0.1, max_steps_per_call=5))
    with pytest.raises(ValueError, match="scalar"):
        adapter.adapt(loss, {"states": torch.randn(8, 4), "targets": torch.randn(8, 4)})
    assert calls == 3 and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ------------------------------------------------------------------------------------------ copies, replaced tensors


def _saved(adapter):
    file = io.BytesIO()
    torch.save(adapter, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [lambda a: pickle.loads(pickle.dumps(a)), copy.deepcopy, _saved])
@pytest.mark.parametrize("optimizer", [None, torch.optim.Adam])
def test_adapt_copied_adapter_takes_the_same_steps(copied, optimizer):
    adapter, data = Adapter(mlp(), AdaptationConfig(lr=0.1), optimizer=optimizer), batch()
    adapter.adapt(F.mse_loss, data)
    twin = copied(adapter)
    values = [adapter.adapt(F.mse_loss, data) for _ in range(3)]
    assert [twin.adapt(F.mse_loss, data) for _ in range(3)] == values and len(set(values)) == 3
    assert torch.equal(vector(twin.model), vector(adapter.model)) and twin.model is not adapter.model


@pytest.mark.parametrize("use", ["ema_model", "reset", "snapshot"])
@pytest.mark.parametrize("width", [1, 3])
def test_adapter_replaced_layer_is_refused(use, width):
    model = mlp()
    adapter = Adapter(model)
    model[2] = nn.Linear(16, width)
    before = vector(model)
    text = "2.weight was unfrozen or replaced after this Adapter was made: make a new Adapter"
    with pytest.raises(ValueError, match=f"^Adapter.{use}: {text}$"):
        getattr(adapter, use)()
    assert torch.equal(vector(model), before)


@pytest.mark.parametrize("use", ["ema_model", "reset", "snapshot"])
def test_adapter_frozen_parameters_are_accepted(use):
    model = mlp()
    adapter = Adapter(model)
    model.requires_grad_(False)
    getattr(adapter, use)()


class Following(nn.Module):
    """A buffer whose shape follows the batch, in the manner of stateful recurrent layers."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 1)
        self.register_buffer("h", torch.zeros(1, 4))

    def forward(self, x):
        self.h = self.inner(x).tanh() + self.h.detach().mean(0, keepdim=True)
        return self.out(self.h)


def test_adapter_buffer_that_follows_the_batch_is_restored():
    adapter = Adapter(Following(), AdaptationConfig(lr=0.1))
    adapter.adapt(F.mse_loss, batch(6))
    kept = adapter.model.h.detach().clone()
    assert kept.shape == (6, 4)
    bad = batch(3)
    assert math.isnan(adapter.adapt(F.mse_loss, {**bad, "targets": bad["targets"] * math.nan}))
    assert adapter.rollbacks == 1 and torch.equal(adapter.model.h, kept)
    with pytest.raises(KeyError):
        adapter.adapt(lambda y, t: {}["no"], batch(2))
    assert torch.equal(adapter.model.h, kept)
    with torch.inference_mode():
        adapter.model(bad["states"])
    adapter.reset()
    assert torch.equal(adapter.model.h, torch.zeros(1, 4))
