"""StreamMAML against a loop in plain autograd and fp64, and against the Adapter that makes its updates at test time."""

import copy
import math
import re

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

from eaml_ext import SSM, SSMLayer
from eaml_ext.adaptation import AdaptationConfig, Adapter
from eaml_ext.experience import ExperienceBuffer
from eaml_ext.meta import MaskedLoss, StreamExperience, StreamMAML
from eaml_ext.ops import knn

OPEN = {"grad_clip_norm": None, "trust_region_eps": None, "ema_decay": None, "max_steps_per_call": 1}
CHUNK = 4


def make(seed=0, core="s6", **options):
    torch.manual_seed(seed)
    model = SSM(3, 8, 3, core=core, state_size=4).double()
    options = {"inner_lr": 0.3, "outer_lr": 1e-3, "chunk_size": CHUNK, "grad_clip_norm": None, **options}
    return StreamMAML(model, optimizer=torch.optim.SGD, **options)


def streams(count=3, time=14, seed=1):
    x = torch.randn(count, time + 1, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x[:, :-1].clone(), x[:, 1:].clone()


class Scan(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, state, reset):
        return self.model.scan(x, state, reset)


def plain_losses(maml, rates, x, y, reset=None, *, first_order=False, steps=1, delay=0, weight=None, truncation=None):
    """The losses of one stream by one call a chunk, and autograd through all of it."""
    model = maml.model
    params = {f"model.{n}": p for n, p in model.named_parameters()}
    fast, state, losses, seen = {f"model.{n}": params[f"model.{n}"] for n in maml.fast_names}, None, [], []
    keys, data = [], []

    def loss(fast, chunk, state):
        inputs = (x[None, chunk], state, None if reset is None else reset[None, chunk])
        prediction, after = functional_call(Scan(model), {**params, **fast}, inputs)
        return mse_loss(prediction, y[None, chunk]), after

    for k, start in enumerate(range(0, len(x), maml.chunk_size)):
        if truncation and k and k % truncation == 0:
            fast = {n: p.detach().requires_grad_() for n, p in fast.items()}
            state = state.detach()
        chunk = slice(start, start + maml.chunk_size)
        value, after = loss(fast, chunk, state)
        losses.append(value)
        seen.append((chunk, state))
        if k >= delay:
            past, start_state = seen[k - delay]
            found = None
            if maml.experience is not None:
                query = maml.experience.embedding(x[None, past])
                if keys:
                    count = min(maml.experience.k, len(keys))
                    distances, indices = knn(query, torch.cat(keys[-maml.experience.slots :]), count)
                    latest = data[-maml.experience.slots :]
                    found = (
                        torch.softmax(-distances[0] / maml.experience.temperature, -1),
                        [latest[i] for i in indices[0]],
                    )
                keys.append(query)
                data.append(past)
            for _ in range(steps):
                objective, _ = loss(fast, past, start_state)
                if found is not None:
                    w = maml.experience.weight
                    objective = (
                        objective + w * sum(a * loss(fast, c, None)[0] for a, c in zip(*found, strict=True))
                    ) / (1 + w)
                grads = torch.autograd.grad(objective, list(fast.values()), create_graph=True)
                grads = [g.detach() for g in grads] if first_order else grads
                fast = {
                    n: p - rates[n.removeprefix("model.")] * g for (n, p), g in zip(fast.items(), grads, strict=True)
                }
        state = after
    return losses


def plain_gradient(maml, x, y, reset=None, lengths=None, **options):
    logs = {n: v.log().requires_grad_() for n, v in maml.step_sizes.items()}
    rates = {n: v.exp() for n, v in logs.items()}
    total, steps, table = 0.0, 0, []
    for i in range(len(x)):
        end = x.shape[1] if lengths is None else int(lengths[i])
        losses = plain_losses(maml, rates, x[i, :end], y[i, :end], None if reset is None else reset[i, :end], **options)
        sizes = [min(maml.chunk_size, end - s) for s in range(0, end, maml.chunk_size)]
        total, steps = total + sum(n * v for n, v in zip(sizes, losses, strict=True)), steps + end
        table.append([v.item() for v in losses])
    experience = [] if maml.experience is None else list(maml.experience.parameters())
    leaves = [*maml.model.parameters(), *experience, *logs.values()]
    return table, torch.autograd.grad(total / steps, leaves, allow_unused=True)


def our_gradient(maml, *args, **options):
    """The gradient that the outer optimizer, plain descent, steps along."""
    experience = [] if maml.experience is None else list(maml.experience.parameters())
    leaves = [*maml.model.parameters(), *experience, *maml._log_step_sizes.values()]
    before = [p.detach().clone() for p in leaves]
    maml.meta_update(*args, **options)
    rates = [1e-3] * (len(leaves) - len(maml._log_step_sizes)) + [1e-2] * len(maml._log_step_sizes)
    return [(b - p.detach()) / r for b, p, r in zip(before, leaves, rates, strict=True)]


def check(maml, x, y, loss_fn=mse_loss, expected=None, **options):
    ours, plain = expected or {}, options
    table, wanted = plain_gradient(maml, x, y, **plain)
    found = our_gradient(maml, x, y, loss_fn, **ours)
    for row, values in zip(maml.last_losses, table, strict=True):
        torch.testing.assert_close(row[: len(values)], torch.tensor(values, dtype=torch.float64), rtol=1e-9, atol=1e-11)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("memory", ["reverse_over_reverse", "recompute"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"parameters": ["embed", "norms", "cores", "norm", "head"]},
        {"parameters": ["cores", "head"], "inner_steps": 2},
        {"label_delay": 1},
        {"label_delay": 2, "inner_steps": 2},
        {"truncation": 2},
        {"first_order": True},
    ],
    ids=str,
)
def test_meta_update_gradient_equals_autograd_through_a_plain_loop(options, memory):
    maml = make(memory=memory, **options)
    plain = {"delay": options.get("label_delay", 0), "steps": options.get("inner_steps", 1)}
    plain |= {name: options[name] for name in ("truncation", "first_order") if name in options}
    check(maml, *streams(), **plain)


@pytest.mark.parametrize("memory", ["reverse_over_reverse", "recompute"])
@pytest.mark.parametrize("options", [{}, {"label_delay": 1}, {"truncation": 2}], ids=str)
def test_meta_update_experience_gradient_equals_plain_loop(options, memory):
    torch.manual_seed(3)
    encoder = SSMLayer(3, 5, state_size=4).double()
    experience = StreamExperience(encoder, slots=3, k=2, weight=0.7, temperature=0.1)
    maml = make(memory=memory, experience=experience, **options)
    plain = {"delay": options.get("label_delay", 0)}
    if "truncation" in options:  # a plain loop keeps the graph of the keys, so the memory of a window is compared
        first = our_gradient(copy.deepcopy(maml), *streams(time=22), mse_loss)
        other = make(memory="reverse_over_reverse", experience=copy.deepcopy(experience), **options)
        for a, b in zip(first, our_gradient(other, *streams(time=22), mse_loss), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        return
    check(maml, *streams(time=22), **plain)
    assert maml.experience.log_weight.item() != pytest.approx(math.log(0.7), abs=1e-12)


@pytest.mark.parametrize("memory", ["reverse_over_reverse", "recompute"])
def test_meta_update_resets_zero_the_state_and_keep_the_fast_weights(memory):
    x, y = streams()
    reset = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(0)) < 0.2
    check(make(memory=memory), x, y, reset=reset, expected={"reset": reset})


def masked():
    return MaskedLoss(nn.MSELoss(reduction="none"))


@pytest.mark.parametrize("memory", ["reverse_over_reverse", "recompute"])
def test_meta_update_streams_of_several_lengths_equal_each_alone(memory):
    x, y = streams()
    lengths = torch.tensor([14, 3, 9])
    x[1, 3:], y[2, 9:] = math.nan, math.nan
    check(make(memory=memory), x, y, masked(), lengths=lengths, expected={"lengths": lengths})


def test_meta_update_packed_streams_equal_rows():
    x, y = streams()
    lengths = torch.tensor([14, 3, 9])
    rows = torch.arange(14) < lengths.unsqueeze(1)
    cu_seqlens = torch.tensor([0, 14, 17, 26], dtype=torch.int32)
    packed = our_gradient(make(), x[rows][None], y[rows][None], masked(), cu_seqlens=cu_seqlens)
    padded = our_gradient(make(), x, y, masked(), lengths=lengths)
    for a, b in zip(packed, padded, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_meta_update_initial_state_and_past_chunks_are_used():
    experience = StreamExperience(SSMLayer(3, 5, state_size=4).double(), slots=4, k=2)
    (x, y), (px, py) = streams(), streams(time=8, seed=5)
    past = tuple(t.unflatten(1, (2, 4)) for t in (px, py))
    maml = make(experience=experience)
    state = torch.randn(3, *maml.model.init_hidden(1).shape[1:], dtype=torch.float64)
    found = maml.predict(x, y, mse_loss, hidden_state=state)
    torch.testing.assert_close(found[:, :CHUNK], maml.model.scan(x[:, :CHUNK], state)[0].detach())
    other = maml.predict(x, y, mse_loss, hidden_state=state, past=past)
    assert torch.equal(found[:, :CHUNK], other[:, :CHUNK]) and not torch.allclose(found, other)


def test_meta_update_outer_loss_differs_from_inner_loss():
    """With targets of two parts the updates read one and the outer loss the other."""
    x, y = streams()

    def first(prediction, target):
        return mse_loss(prediction[..., :2], target[..., :2])

    def last(prediction, target):
        return mse_loss(prediction[..., 2:], target[..., 2:])

    maml = make(parameters="norm")
    maml.meta_update(x, y, first, outer_loss_fn=last)
    predictions = make(parameters="norm").predict(x, y, first)
    torch.testing.assert_close(maml.last_losses[:, 0], (predictions - y)[:, :4, 2].square().mean(1))


# -------------------------------------------------------------------------------------- the same update at test time


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("core", ["s6", "mamba", "s5"])
def test_adapt_stream_open_guards_equals_the_inner_loop(core, delay):
    torch.manual_seed(0)
    model = SSM(3, 8, 3, core=core, state_size=4)
    maml = StreamMAML(model, 0.3, 1e-2, chunk_size=CHUNK, label_delay=delay, parameters=["norm", "head", "cores"])
    x, y = (t.float() for t in streams(time=64))
    reset = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(0)) < 0.05
    for _ in range(3):
        maml.meta_update(x, y, mse_loss)
    assert len(set(maml.step_sizes.values())) > 1
    expected = maml.predict(x, y, mse_loss, reset=reset)
    for i in range(len(x)):
        adapter = Adapter(copy.deepcopy(model), AdaptationConfig(**OPEN), step_sizes=maml.step_sizes)
        chunks = [slice(s, s + CHUNK) for s in range(0, 64, CHUNK)]
        batches = [
            {"states": x[i : i + 1, c], "targets": y[i : i + 1, c], "reset": reset[i : i + 1, c]} for c in chunks
        ]
        found = [p for p, _ in adapter.adapt_stream(mse_loss, batches, label_delay=delay)]
        torch.testing.assert_close(torch.cat(found, 1)[0], expected[i], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("filled, own", [(False, True), (True, True), (True, False)])
def test_adapt_stream_with_a_buffer_finds_the_neighbours_of_the_inner_loop(soft, filled, own):
    torch.manual_seed(0)
    experience = StreamExperience(SSMLayer(3, 5, state_size=4), slots=5, k=3, weight=2.0, temperature=0.01, soft=soft)
    experience.own_chunks = own
    model = SSM(3, 8, 3, state_size=4)
    maml = StreamMAML(model, 0.3, 1e-2, chunk_size=CHUNK, experience=experience, inner_steps=2)
    x, y = (t.float() for t in streams(count=1, time=62))
    past = tuple(t.float().unflatten(1, (3, CHUNK)) for t in streams(count=1, time=12, seed=9)) if filled else None
    expected = maml.predict(x, y, mse_loss, past=past)
    buffer, found, in_loop = ExperienceBuffer(5), [], []
    if past is not None:
        experience.fill(buffer, past[0][0], past[1][0])
    chunks = [{"states": x[:, s : s + CHUNK], "targets": y[:, s : s + CHUNK]} for s in range(0, 62, CHUNK)]
    items = torch.cat([*([past[0][0]] if filled else []), x[0, :60].unflatten(0, (15, CHUNK))])

    def retrieve(buffer, batch):
        result = experience(buffer, batch)
        found.append(None if result is None else result["states"])
        return result

    read = experience.read
    experience.read = lambda *args: in_loop.append(read(*args)) or in_loop[-1]
    maml.predict(x, y, mse_loss, past=past)
    del experience.read
    adapter = Adapter(
        model,
        AdaptationConfig(**{**OPEN, "max_steps_per_call": 2}),
        buffer,
        experience.weight.item(),
        retriever=retrieve,
        step_sizes=maml.step_sizes,
    )
    predictions = torch.cat([p for p, _ in adapter.adapt_stream(mse_loss, chunks)], 1)
    for got, want in zip(found[:-1], in_loop, strict=True):  # the loop takes no step after the last chunk
        assert (got is None) == (want is None)
        assert got is None or torch.equal(got, items[want[0][0]])
    assert (found[0] is None) != filled and len(buffer) == (5 if own else 3)
    torch.testing.assert_close(predictions, expected, rtol=1e-6, atol=1e-6)


def test_adapt_stream_delayed_targets_may_be_added_to_the_batch_later():
    x, y = (t.float() for t in streams(count=1, time=16))
    adapter = Adapter(SSM(3, 8, 3), AdaptationConfig(**OPEN))
    batches = [{"states": x[:, s : s + 4]} for s in range(0, 16, 4)]

    def online():
        for i, batch in enumerate(batches):
            if i:
                batches[i - 1]["targets"] = y[:, 4 * i - 4 : 4 * i]
            yield batch

    losses = [loss for _, loss in adapter.adapt_stream(mse_loss, online(), label_delay=1)]
    assert math.isnan(losses[0]) and all(math.isfinite(v) for v in losses[1:])
    with pytest.raises(ValueError, match=r"^Adapter.adapt_stream: batch_dict has no targets"):
        list(adapter.adapt_stream(mse_loss, [{"states": x}, {"states": x}], label_delay=1))


# ------------------------------------------------------------------------------------------------------- the learner


def test_meta_update_learns_to_adapt():
    """A stream's own constant is unknown before; one step on the last chunk reveals it."""
    torch.manual_seed(0)
    maml = StreamMAML(nn.Linear(1, 1), 0.01, 0.05, chunk_size=2)
    before = None
    for _ in range(150):
        y = torch.randn(16, 1, 1).expand(16, 8, 1)
        loss = maml.meta_update(torch.ones(16, 8, 1), y, mse_loss)
        before = loss if before is None else before
    assert maml.last_losses[:, 1:].mean() < 0.05 < maml.last_losses[:, 0].mean()
    assert loss < before and maml.skipped_updates == 0


def test_meta_update_model_that_vmap_cannot_run_takes_a_loop():
    class Gru(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

        def scan(self, x, state=None, reset=None):
            y, state = self.gru(x, state)
            return self.head(y), state

        step = scan

    torch.manual_seed(0)
    model = Gru().double()
    maml = StreamMAML(model, 0.1, 1e-3, chunk_size=4, parameters="head")
    with pytest.warns(RuntimeWarning, match="StreamMAML: vmap cannot run the model, so streams run one at a time"):
        loss = maml.meta_update(*streams(), mse_loss)
    assert math.isfinite(loss)


def test_meta_update_non_finite_streams_are_skipped():
    maml, (x, y) = make(), streams()
    before = copy.deepcopy(maml.state_dict())
    maml.meta_update(x * math.nan, y, mse_loss)
    assert maml.skipped_updates == 1
    torch.testing.assert_close(maml.state_dict()["model"], before["model"], rtol=0, atol=0)


def test_state_dict_continues_exactly():
    x, y = streams()

    def learner():
        torch.manual_seed(4)
        experience = StreamExperience(SSMLayer(3, 5, state_size=4).double(), slots=3, k=2)
        return make(experience=experience)

    first = learner()
    first.meta_update(x, y, mse_loss)
    other = learner()
    other.load_state_dict(copy.deepcopy(first.state_dict()))
    losses = [m.meta_update(y, x, mse_loss) for m in (first, other)]
    assert losses[0] == losses[1]
    for a, b in zip(first.state_dict()["model"].values(), other.state_dict()["model"].values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"chunk_size": 0}, ValueError, "StreamMAML: chunk_size must be > 0, got 0"),
        (
            {"memory": "none"},
            ValueError,
            "StreamMAML: memory must be one of reverse_over_reverse, recompute, got 'none'",
        ),
        ({"parameters": "absent"}, ValueError, "StreamMAML: parameters selects nothing"),
        ({"experience": 3}, TypeError, "StreamMAML: experience must be a StreamExperience, got int"),
        ({"label_delay": -1}, ValueError, "StreamMAML: label_delay must be >= 0, got -1"),
        ({"optimizer": torch.optim.LBFGS}, ValueError, "StreamMAML: optimizer must step from gradients alone"),
    ],
)
def test_init_wrong_arguments_raise(options, error, text):
    with pytest.raises(error, match="^" + re.escape(text)):
        StreamMAML(SSM(3, 8, 3), 0.1, 1e-3, **{"chunk_size": 4, **options})


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"y": torch.zeros(2, 14, 3)}, ValueError, "y must begin with (3, 14), as x does, got (2, 14, 3)"),
        ({"x": torch.zeros(3, 0, 3)}, ValueError, "x must have shape (streams, time, ...), not empty"),
        ({"reset": torch.zeros(3, 14)}, TypeError, "reset must be bool, got float32"),
        ({"lengths": torch.tensor([3, 0, 14])}, ValueError, "lengths must be in [1, 14], got [3, 0, 14]"),
        ({"lengths": torch.tensor([3, 1, 14])}, TypeError, "streams of several lengths need a MaskedLoss as loss_fn"),
        ({"past": (torch.zeros(1), 1)}, ValueError, "past must be None without experience"),
        ({"cu_seqlens": torch.tensor([0, 14])}, ValueError, "cu_seqlens must rise from 0"),
        ({"loss_fn": lambda p, y: p - y}, ValueError, "loss_fn must return a scalar tensor, got (1, 4, 3)"),
        ({"loss_fn": lambda p, y: y.mean()}, ValueError, "loss_fn does not depend on the fast weights"),
    ],
)
def test_meta_update_wrong_arguments_raise(options, error, text):
    x, y = (t.float() for t in streams())
    maml = StreamMAML(SSM(3, 8, 3), 0.1, 1e-3, chunk_size=4)
    arguments = {"x": x, "y": y, "loss_fn": mse_loss, **options}
    with pytest.raises(error, match="^" + re.escape(f"StreamMAML.meta_update: {text}")):
        maml.meta_update(**arguments)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"step_sizes": 3}, TypeError, "Adapter: step_sizes must be a dict by name, got int"),
        (
            {"step_sizes": {"bias": 0.1}, "parameters": "weight"},
            ValueError,
            "Adapter: step_sizes must have names of parameters that adapt, weight, got 'bias'",
        ),
        *(
            (
                {"step_sizes": sizes},
                ValueError,
                f"Adapter: step_sizes must have names of parameters that adapt, weight, bias, got {got}",
            )
            for sizes, got in (({"foo": 0.1}, "'foo'"), ({"weight": 0.1, "foo": 0.1}, "'foo'"), ({}, "none"))
        ),
        ({"step_sizes": {"weight": -1.0}}, ValueError, "Adapter: step_sizes['weight'] must be >= 0, got -1.0"),
        (
            {"step_sizes": {"weight": torch.ones(5)}},
            ValueError,
            "Adapter: step_sizes['weight'] must broadcast to (2, 3)",
        ),
        (
            {"step_sizes": {"weight": torch.tensor(math.nan)}},
            ValueError,
            "Adapter: step_sizes['weight'] must be >= 0 and",
        ),
        (
            {"step_sizes": {"weight": 0.1}, "optimizer": torch.optim.Adam},
            ValueError,
            "Adapter: step_sizes must be None",
        ),
    ],
)
def test_adapter_wrong_step_sizes_raise(options, error, text):
    with pytest.raises(error, match="^" + re.escape(text)):
        Adapter(nn.Linear(3, 2), **options)


def test_adapter_step_sizes_without_parameters_adapt_those_that_they_name():
    model, batch = nn.Linear(3, 2), {"states": torch.randn(5, 3), "targets": torch.randn(5, 2)}
    before = copy.deepcopy(model)
    Adapter(model, AdaptationConfig(lr=0.2, **OPEN), step_sizes={"bias": 0.1}).adapt(mse_loss, batch)
    (grad,) = torch.autograd.grad(mse_loss(before(batch["states"]), batch["targets"]), [before.bias])
    torch.testing.assert_close(model.bias, before.bias - 0.1 * grad)
    assert torch.equal(model.weight, before.weight)


def test_adapter_step_sizes_scale_each_parameter():
    model, batch = nn.Linear(3, 2), {"states": torch.randn(5, 3), "targets": torch.randn(5, 2)}
    rows, before = torch.tensor([[0.1], [0.0]]), copy.deepcopy(model)
    Adapter(model, AdaptationConfig(lr=0.2, **OPEN), parameters=["weight", "bias"], step_sizes={"weight": rows}).adapt(
        mse_loss, batch
    )
    grads = torch.autograd.grad(mse_loss(before(batch["states"]), batch["targets"]), list(before.parameters()))
    torch.testing.assert_close(model.weight, before.weight - rows * grads[0])
    torch.testing.assert_close(model.bias, before.bias - 0.2 * grads[1])
