"""StreamMAML, its memory and adapt_stream on what users pass besides float sequences: each case was wrong once."""

import copy
import math
import re

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from eaml_ext import SSM, SSMLayer
from eaml_ext.adaptation import AdaptationConfig, Adapter
from eaml_ext.experience import ExperienceBuffer
from eaml_ext.meta import MaskedLoss, MetaMAML, StreamExperience, StreamMAML
from eaml_ext.rl import SSMMetaPolicy

OPEN = {"grad_clip_norm": None, "trust_region_eps": None, "ema_decay": None, "max_steps_per_call": 1}
MEMORIES = ("reverse_over_reverse", "recompute")


def streams(count=2, time=14, features=3):
    x = torch.randn(count, time + 1, features, generator=torch.Generator().manual_seed(1))
    return x[:, :-1].clone(), x[:, 1:].clone()


def make(model=None, **options):
    torch.manual_seed(0)
    model = SSM(3, 8, 3, state_size=4) if model is None else model
    return StreamMAML(model, 0.1, 1e-2, **{"chunk_size": 4, **options})


def experience(*further, slots=3):
    torch.manual_seed(0)
    return StreamExperience(nn.Sequential(SSMLayer(3, 5, state_size=4), *further), slots=slots, k=2)


def batches(x, y, size=4):
    return [{"states": x[:, s : s + size], "targets": y[:, s : s + size]} for s in range(0, x.shape[1], size)]


def learned(maml):
    some = [] if maml.experience is None else maml.experience.parameters()
    return [p.detach().clone() for p in [*maml.model.parameters(), *some, *maml._log_step_sizes.values()]]


# ----------------------------------------------------------------------------------------- frozen, unfrozen, unused


def test_meta_update_frozen_fast_weight_stays():
    maml = make()
    bias = maml.model.head.bias.requires_grad_(False)
    before, step = bias.clone(), maml.step_sizes["head.bias"]
    maml.meta_update(*streams(), mse_loss)
    assert torch.equal(bias, before) and maml.step_sizes["head.bias"] == step
    assert maml.step_sizes["head.weight"] != step


def test_meta_update_unfrozen_encoder_raises_and_stores_no_gradient():
    memory = experience()
    memory.encoder.requires_grad_(False)
    maml = make(experience=memory)
    memory.encoder.requires_grad_(True)
    with pytest.raises(ValueError, match=r"embed.weight was unfrozen or replaced after this StreamMAML was made"):
        maml.meta_update(*streams(), mse_loss)
    assert all(p.grad is None for p in memory.parameters())


@pytest.mark.parametrize("memory", MEMORIES)
def test_meta_update_constant_outer_loss_raises(memory):
    maml = make(memory=memory)
    with pytest.raises(ValueError, match=r"^StreamMAML.meta_update: the outer loss does not depend on the learned"):
        maml.meta_update(*streams(), mse_loss, outer_loss_fn=lambda p, y: y.mean())
    assert maml.last_losses is None


def test_predict_encoder_with_batch_norm_in_training_raises_and_keeps_its_statistics():
    norm = nn.BatchNorm1d(5)
    memory = StreamExperience(nn.Sequential(nn.Flatten(), nn.Linear(12, 5), norm), slots=3, k=2)
    with pytest.raises(ValueError, match=r"BatchNorm1d\) must be in eval mode"):
        make(experience=memory).predict(*streams(), mse_loss)
    assert not norm.running_mean.any()


# ------------------------------------------------------------------------------------------------ dtypes and shapes


class Casting(nn.Module):
    """A linear layer of its input in float32."""

    def __init__(self, out=3):
        super().__init__()
        self.linear = nn.Linear(3, out)

    def forward(self, x):
        return self.linear(x.float())


@pytest.mark.parametrize(("dtype", "size"), [(torch.bool, 4), (torch.bfloat16, 257), (torch.uint8, 300)])
def test_meta_update_weights_of_losses_are_exact_in_every_dtype_of_x(dtype, size):
    maml = make(Casting(), chunk_size=size)
    x = (torch.rand(2, size + 2, 3) > 0.5).to(dtype)
    y = torch.zeros(2, size + 2, 3)
    loss = maml.meta_update(x, y, mse_loss)
    weights = torch.tensor([size, 2.0]) / (size + 2)
    assert loss == pytest.approx(float((maml.last_losses * weights).sum(1).mean()), rel=1e-6)


def test_meta_update_lengths_keep_the_dtype_of_targets():
    seen = set()

    def distance(prediction, target):
        seen.add(target.dtype)
        return (prediction - target.float()).square()

    x, y = streams()
    make().meta_update(x, y > 0, MaskedLoss(distance), lengths=torch.tensor([14, 5]))
    assert seen == {torch.bool}


def test_meta_update_float32_encoder_beside_a_bfloat16_model():
    memory = StreamExperience(Casting(5), slots=3, k=2)
    model = SSM(3, 8, 3, state_size=4).bfloat16()
    x, y = (t.bfloat16()[:1] for t in streams())
    maml = make(model, experience=memory)
    assert math.isfinite(maml.meta_update(x, y, mse_loss)) and maml.skipped_updates == 0
    adapter = Adapter(model, AdaptationConfig(), ExperienceBuffer(3), retriever=memory)
    assert all(math.isfinite(v) for _, v in adapter.adapt_stream(mse_loss, batches(x, y)))


def test_meta_update_stream_shorter_than_a_chunk_takes_past_chunks():
    x, y = streams(time=15)
    past = tuple(t[:, :12].unflatten(1, (3, 4)) for t in (x, y))
    maml = make(experience=experience())
    maml.meta_update(x[:, 12:], y[:, 12:], mse_loss, past=past)
    assert maml.last_losses.shape == (2, 1)


def test_meta_update_hidden_state_with_a_history_is_a_constant():
    x, y = streams()
    losses = []
    for memory in MEMORIES:
        maml = make(memory=memory)
        _, state = maml.model.scan(x)
        losses.append([maml.meta_update(x, y, mse_loss, hidden_state=state) for _ in range(2)])
        other = make(memory=memory)
        assert losses[-1] == [other.meta_update(x, y, mse_loss, hidden_state=state.detach()) for _ in range(2)]
    assert losses[0] == pytest.approx(losses[1])


@pytest.mark.parametrize(
    ("model", "options", "error", "text"),
    [
        (None, {"hidden_state": 3}, TypeError, "hidden_state must be a torch.Tensor, got int"),
        (
            None,
            {"hidden_state": torch.zeros(3, 1, 8, 4)},
            ValueError,
            "hidden_state must have shape (streams, ...), streams = 2, got (3, 1, 8, 4)",
        ),
        (
            nn.Linear(3, 3),
            {"hidden_state": torch.zeros(2, 3)},
            ValueError,
            "hidden_state needs a model with scan and step, got Linear",
        ),
        (
            nn.Linear(3, 3),
            {"lengths": torch.tensor([14, 5])},
            TypeError,
            "lengths needs a model that takes lengths, got Linear",
        ),
        (None, {"cu_seqlens": torch.tensor(3)}, ValueError, "cu_seqlens must rise from 0"),
    ],
)
def test_meta_update_arguments_that_do_not_fit_the_model_raise(model, options, error, text):
    with pytest.raises(error, match="^" + re.escape(f"StreamMAML.meta_update: {text}")):
        make(model).meta_update(*streams(), MaskedLoss(nn.MSELoss(reduction="none")), **options)


def test_meta_update_past_of_another_dtype_raises():
    past = (torch.zeros(2, 1, 4, 3, dtype=torch.float64), torch.zeros(2, 1, 4, 3))
    with pytest.raises(TypeError, match=r"^StreamMAML.meta_update: past x must be float32, got float64"):
        make(experience=experience()).meta_update(*streams(), mse_loss, past=past)


class Counting(nn.Module):
    """A model whose state is None, or a counter that is no tensor."""

    def __init__(self, state):
        super().__init__()
        self.linear, self.state = nn.Linear(3, 3), state

    def scan(self, x, state=None):
        return self.linear(x), self.state

    step = scan


class Pooled(nn.Module):
    """One prediction for a chunk."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return self.linear(x).mean(1)


def test_predict_one_prediction_per_chunk_raises():
    x, y = streams()
    maml = make(Pooled())
    loss = maml.meta_update(x, y, lambda prediction, target: mse_loss(prediction, target.mean(1)))
    assert math.isfinite(loss)
    with pytest.raises(ValueError, match=r"^StreamMAML.predict: the model must predict a tensor \(1, 4, ...\), got"):
        maml.predict(x, y, lambda prediction, target: mse_loss(prediction, target.mean(1)))


def test_meta_update_policy_raises():
    text = "StreamMAML.meta_update: scan and step of SSMMetaPolicy must return (prediction, state), got 3 values"
    with pytest.raises(TypeError, match="^" + re.escape(text)):
        make(SSMMetaPolicy(3, 3)).meta_update(*streams(), mse_loss)


@pytest.mark.parametrize("memory", MEMORIES)
def test_model_without_a_state_runs_and_one_with_a_number_raises(memory):
    x, y = streams()
    assert math.isfinite(make(Counting(None), memory=memory).meta_update(x, y, mse_loss))
    assert len(list(Adapter(Counting(None)).adapt_stream(mse_loss, batches(x, y)))) == 4
    assert len(list(Adapter(Counting((3, torch.ones(2)))).adapt_stream(mse_loss, batches(x, y)))) == 4
    with pytest.raises(TypeError, match=r"^StreamMAML.meta_update: the model's state must consist of tensors, got int"):
        make(Counting(3), memory=memory).meta_update(x, y, mse_loss)


# ----------------------------------------------------------------------------------- recomputation equals the graph


class Rotation(nn.Module):
    """h_t = c h_{t-1} + u_t with complex h."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 3)

    def scan(self, x, state=None):
        u = torch.view_as_complex(self.embed(x).unflatten(-1, (4, 2)))
        h, outputs = torch.zeros_like(u[:, 0]) if state is None else state, []
        for t in range(x.shape[1]):
            h = (0.5 + 0.5j) * h + u[:, t]
            outputs.append(torch.view_as_real(h).flatten(1))
        return self.head(torch.stack(outputs, 1)), h

    step = scan


def test_recompute_gradient_passes_through_a_complex_state():
    found = []
    for memory in MEMORIES:
        torch.manual_seed(0)
        maml = make(Rotation().double(), memory=memory, optimizer=torch.optim.SGD, grad_clip_norm=None)
        maml.meta_update(*(t.double() for t in streams()), mse_loss)
        found.append(learned(maml))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_recompute_draws_the_dropout_of_the_encoder_again_for_past_chunks():
    found, past = [], tuple(t.unflatten(1, (2, 4)) for t in streams(time=8))
    for memory in MEMORIES:
        maml = make(memory=memory, experience=experience(nn.Dropout()), optimizer=torch.optim.SGD)
        torch.manual_seed(3)
        maml.meta_update(*streams(), mse_loss, past=past)
        found.append([*learned(maml), torch.rand(2)])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


# ----------------------------------------------------------------------------------------------- memory of the stream


@pytest.mark.parametrize("name", ["states", "targets"])
def test_adapt_stream_chunk_that_is_not_finite_does_not_enter_the_memory(name):
    chunks = batches(*(t[:1] for t in streams(time=24)))
    chunks[2][name] = chunks[2][name] * math.nan
    adapter = Adapter(make().model, AdaptationConfig(), ExperienceBuffer(3), 1.0, retriever=experience())
    losses = [v for _, v in adapter.adapt_stream(mse_loss, chunks)]
    assert [math.isfinite(v) for v in losses] == [True, True, False, True, True, True] and adapter.rollbacks == 1


def test_adapt_stream_chunk_with_a_masked_step_does_not_enter_the_memory():
    chunks = batches(*(t[:1] for t in streams(time=16)))
    for i, row in ((0, [True, True, False, True]), (1, [True] * 4)):
        chunks[i]["mask"] = torch.tensor([row])
    buffer = ExperienceBuffer(3)
    adapter = Adapter(make().model, AdaptationConfig(), buffer, 1.0, retriever=experience())
    lengths = [len(buffer) for _ in adapter.adapt_stream(mse_loss, chunks)]
    assert lengths == [0, 1, 2, 3]


def test_init_encoder_with_a_fast_weight_raises():
    class Encoder(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.features = nn.Sequential(nn.Linear(3, 8), head)

        def forward(self, x):
            return self.features(x)

    model = SSM(3, 8, 3, state_size=4)
    memory = StreamExperience(Encoder(model.head), slots=3, k=2)
    with pytest.raises(
        ValueError, match=r"^StreamMAML: experience must not share a fast weight of the model, got head"
    ):
        make(model, experience=memory)
    assert math.isfinite(make(model, parameters="norm", experience=memory).meta_update(*streams(), mse_loss))


def test_adapt_stream_retriever_without_a_buffer_raises():
    adapter = Adapter(make().model, retriever=experience())
    with pytest.raises(TypeError, match=r"^StreamExperience: buffer must be an ExperienceBuffer, got NoneType"):
        next(adapter.adapt_stream(mse_loss, batches(*(t[:1] for t in streams()))))
    with pytest.raises(TypeError, match=r"^StreamExperience: buffer must be an ExperienceBuffer, got list"):
        experience().fill([], *streams())


# -------------------------------------------------------------------------------------------------------- at test time


class Tokens(nn.Module):
    """A language model: integers ``(n, time)``, or ``(n,)`` in a step."""

    def __init__(self):
        super().__init__()
        self.embed, self.ssm = nn.Embedding(7, 3), SSM(3, 8, 7, state_size=4)

    def scan(self, x, state=None, reset=None):
        return self.ssm.scan(self.embed(x), state, reset)

    def step(self, x, state=None):
        return self.ssm.step(self.embed(x), state)


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 5)

    def forward(self, x):
        return self.embed(x)


def token_loss(logits, targets):
    return cross_entropy(logits.flatten(0, -2), targets.flatten())


@pytest.mark.parametrize("with_experience", [False, True])
def test_adapt_stream_tokens_equal_the_inner_loop(with_experience):
    torch.manual_seed(0)
    tokens = torch.randint(7, (1, 25))
    x, y, reset = tokens[:, :-1], tokens[:, 1:], torch.rand(1, 24) < 0.1
    memory = StreamExperience(Mean(), slots=3, k=2) if with_experience else None
    maml = make(Tokens(), parameters="ssm.head", experience=memory)
    expected = maml.predict(x, y, token_loss, reset=reset)
    chunks = [{**b, "reset": reset[:, 4 * i : 4 * i + 4]} for i, b in enumerate(batches(x, y))]
    options = {} if memory is None else {"experience_buffer": ExperienceBuffer(3), "retriever": memory}
    adapter = Adapter(
        maml.model, AdaptationConfig(**OPEN), experience_weight=1.0, step_sizes=maml.step_sizes, **options
    )
    found = torch.cat([p for p, _ in adapter.adapt_stream(token_loss, chunks)], 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    steps = [{"states": x[:, t], "targets": y[:, t]} for t in range(3)]
    assert all(p.shape == (1, 7) for p, _ in Adapter(Tokens()).adapt_stream(token_loss, steps))


def test_adapt_stream_inference_tensors_with_label_delay_keep_state_and_reset():
    x, y = streams()
    with torch.inference_mode():
        chunks = [{**b, "reset": torch.rand(2, b["states"].shape[1]) < 0.2} for b in batches(x.clone(), y.clone())]
    found = []
    for given in (chunks, [{name: v.clone() for name, v in b.items()} for b in chunks]):
        adapter = Adapter(make().model, AdaptationConfig(**OPEN))
        found.append(torch.cat([p for p, _ in adapter.adapt_stream(mse_loss, given, label_delay=1)], 1))
    assert torch.equal(*found)


def test_adapt_stream_reused_dict_with_label_delay_raises():
    def reused(batch):
        for each in batches(*streams()):
            batch.update(each)
            yield batch

    adapter = Adapter(make().model)
    with pytest.raises(ValueError, match=r"^Adapter.adapt_stream: the states of a batch must stay in its dict"):
        list(adapter.adapt_stream(mse_loss, reused({}), label_delay=1))
    assert len(list(adapter.adapt_stream(mse_loss, reused({})))) == 4


def test_adapter_step_sizes_of_float64_parameters_are_not_rounded_to_float32():
    x, y = (t.double() for t in streams())
    models = [make().model.double() for _ in range(2)]
    names = [name for name, _ in models[1].named_parameters()]
    options = [{}, {"step_sizes": dict.fromkeys(names[:2], 0.1), "parameters": names}]
    for model, given in zip(models, options, strict=True):
        Adapter(model, AdaptationConfig(**OPEN, lr=0.1), **given).adapt(mse_loss, {"states": x, "targets": y})
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(
    ("step_sizes", "error", "text"),
    [
        ({"weight": 1e6}, ValueError, "Adapter: step_sizes['weight'] must be >= 0 and finite in the parameter's dtype"),
        ({3: 0.1}, TypeError, "Adapter: step_sizes must be a dict by name, got [3]"),
    ],
)
def test_adapter_step_sizes_that_half_precision_or_names_exclude_raise(step_sizes, error, text):
    with pytest.raises(error, match="^" + re.escape(text)):
        Adapter(nn.Linear(3, 2).half(), step_sizes=step_sizes)


class Noted(nn.Linear):
    """A layer with an extra state."""

    def get_extra_state(self):
        return {"note": 1}

    def set_extra_state(self, state):
        self.note = state["note"]


@pytest.mark.parametrize("kind", [StreamMAML, MetaMAML])
def test_load_state_dict_takes_an_extra_state_and_checks_the_count(kind):
    options = {"chunk_size": 4} if kind is StreamMAML else {}
    maml = kind(Noted(3, 3), 0.1, 1e-2, **options)
    state = copy.deepcopy(maml.state_dict())
    with torch.no_grad():
        maml.model.weight.zero_()
    with pytest.raises(TypeError, match=rf"^{kind.__name__}.load_state_dict: skipped_updates must be an integer"):
        maml.load_state_dict({**state, "skipped_updates": "none"})
    assert not maml.model.weight.any()
    maml.load_state_dict(state)
    assert maml.model.note == 1 and torch.equal(maml.model.weight, state["model"]["weight"])


def test_step_sizes_of_complex_parameters_are_real():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.complex64))

        def forward(self, x):
            return (x.to(torch.complex64) @ self.weight).real

    (x, y), maml = streams(count=1), make(Complex())
    maml.meta_update(x, y, mse_loss)
    assert maml.step_sizes["weight"].is_floating_point() and maml.step_sizes["weight"] != pytest.approx(0.1)
    expected = maml.predict(x, y, mse_loss)
    gradient = torch.autograd.grad(mse_loss(maml.model(x[:, :4]), y[:, :4]), maml.model.weight)[0]
    with torch.no_grad():
        maml.model.weight -= maml.step_sizes["weight"] * gradient
    torch.testing.assert_close(expected[:, 4:8], maml.model(x[:, 4:8]).detach())


def test_adapter_replaced_config_changes_the_step_size():
    x, y = streams()
    models = [make().model for _ in range(2)]
    for model, first in zip(models, (0.1, 1e-9), strict=True):
        adapter = Adapter(model, AdaptationConfig(**OPEN, lr=first))
        adapter.cfg = AdaptationConfig(**OPEN, lr=0.1)
        adapter.adapt(mse_loss, {"states": x, "targets": y})
    assert torch.equal(models[0].head.weight, models[1].head.weight)
