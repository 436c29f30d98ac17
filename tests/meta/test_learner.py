"""MetaLearner: adaptation by hand, experience as weighted pairs, gradients to every meta-parameter."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import l1_loss, mse_loss, one_hot

from eaml_ext import ExperienceBuffer, SSMLayer
from eaml_ext.experience import Experiences
from eaml_ext.meta import MetaLearner


def learner(**options):
    torch.manual_seed(0)
    return MetaLearner(4, 2, 6, 1e-2, inner_lr=0.1, inner_steps=3, **options).double()


def data(n=5):
    return torch.randn(n, 4).double(), torch.randn(n, 2).double()


def experiences(k=3, distances=None, **fields):
    fields = {"state": torch.randn(k, 4).double(), "action": torch.randn(k, 2).double(), **fields}
    indices = torch.arange(k)
    return Experiences(fields, indices, indices, distances)


def by_hand(model, initial, x, y, weights):
    """Gradient descent on the weighted mean of the pairs' squared errors."""
    params = dict(initial)
    for _ in range(model.inner_steps):
        losses = (functional_call(model.network, params, (x,)) - y).square().mean(dim=1)
        loss = (weights * losses).sum() / weights.sum()
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params = {k: p - model.inner_lr * g for (k, p), g in zip(params.items(), grads, strict=True)}
    return params


def assert_same(params, wanted):
    assert list(params) == list(wanted)
    for name, p in wanted.items():
        torch.testing.assert_close(params[name], p, rtol=1e-10, atol=1e-12)


def test_meta_learner_example_of_readme_runs():
    encoder = SSMLayer(3, 16)
    model = MetaLearner(input_dim=16, output_dim=2, hidden_dim=32, meta_lr=1e-3)
    context = encoder(torch.randn(50, 3))
    buffer = ExperienceBuffer(capacity=100, state_dim=16, action_dim=2)
    for _ in range(8):
        buffer.add(state=torch.randn(16), action=torch.randn(2), reward=0.0, context_embedding=torch.randn(16))
    found = buffer.retrieve(query_embedding=context.mean(dim=0), k=5)
    support = torch.randn(10, 16), torch.randn(10, 2)
    params = model.adapt_with_experience(context=context, support_set=support, experiences=found)
    assert model.forward(torch.randn(7, 16), params=params).shape == (7, 2)
    # Through the similarity as well: the distances were computed from the context.
    model(torch.randn(7, 16), params).square().mean().backward()
    assert model.log_temperature.grad.abs() > 0


def test_adapt_zero_shift_is_gradient_descent_from_initial_parameters():
    model, (x, y) = learner(), data()
    initial = dict(model.network.named_parameters())
    params = model.adapt(torch.randn(7, 4).double(), (x, y))
    assert_same(params, by_hand(model, initial, x, y, torch.ones(5).double()))  # the shift starts at zero
    assert mse_loss(model(x, params), y) < mse_loss(model(x), y)
    assert all(p.requires_grad for p in params.values())


def test_adapt_mean_of_context_shifts_initial_parameters():
    model, (x, y) = learner(), data()
    with torch.no_grad():
        model.shift.weight.normal_(std=0.1)
    context = torch.randn(7, 4).double()
    moved = model.shift.weight @ context.mean(0)
    initial, start = {}, 0
    for name, p in model.network.named_parameters():
        initial[name] = p + moved[start : start + p.numel()].view_as(p)
        start += p.numel()
    assert_same(model.adapt(context, (x, y)), by_hand(model, initial, x, y, torch.ones(5).double()))
    assert_same(model.adapt(context.mean(0), (x, y)), model.adapt(context, (x, y)))


@pytest.mark.parametrize("kind", ["searched", "drawn", "sequences", "indices"])
def test_adapt_with_experience_pairs_are_weighted_by_similarity(kind):
    model, (x, y), context = learner(temperature=2.0), data(), torch.randn(4).double()
    distances = torch.tensor([0.0, 1.0, 30.0]).double()
    found = experiences(distances=distances)
    weights = torch.exp(-distances / model.log_temperature.detach().exp())  # 2, as the learner rounds it
    if kind == "drawn":
        found, weights = experiences(), torch.ones(3).double()
    if kind == "sequences":
        state, action = torch.randn(3, 6, 4).double(), torch.randn(3, 6, 2).double()
        found = experiences(distances=distances, state=state, action=action)
        weights = weights.repeat_interleave(6)
    states, actions = found.state.reshape(-1, 4), found.action.reshape(-1, found.action.shape[-1])
    if kind == "indices":
        found = experiences(distances=distances, action=torch.tensor([1, 0, 1]))
        states, actions = found.state, one_hot(found.action, 2).double()
    wanted = by_hand(
        model,
        dict(model.network.named_parameters()),
        torch.cat([x, states]),
        torch.cat([y, actions]),
        torch.cat([torch.ones(5).double(), weights]),
    )
    assert_same(model.adapt_with_experience(context, (x, y), found), wanted)


def test_adapt_with_experience_none_or_far_equals_adapt():
    model, pairs, context = learner(), data(), torch.randn(4).double()
    plain = model.adapt(context, pairs)
    assert_same(model.adapt_with_experience(context, pairs, experiences(0, torch.zeros(0).double())), plain)
    far = experiences(distances=torch.full((3,), 1e4).double())
    assert_same(model.adapt_with_experience(context, pairs, far), plain)
    assert_same(model.adapt_with_experience(context, pairs, experiences(distances=torch.full((3,), math.inf))), plain)


def test_adapt_with_experience_of_same_task_lowers_loss():
    torch.manual_seed(0)
    model = MetaLearner(4, 1, 16, 1e-2, inner_lr=0.05, inner_steps=20)
    w = torch.randn(4, 1)
    x = torch.randn(62, 4)
    stored = Experiences({"state": x[2:42], "action": x[2:42] @ w}, torch.arange(40), torch.arange(40), torch.zeros(40))
    support, context = (x[:2], x[:2] @ w), torch.zeros(4)
    alone = model(x[42:], model.adapt(context, support))
    helped = model(x[42:], model.adapt_with_experience(context, support, stored))
    assert mse_loss(helped, x[42:] @ w) < 0.5 * mse_loss(alone, x[42:] @ w)


def test_adapt_gradients_of_every_meta_parameter_are_exact():
    model, (x, y) = learner(), data()
    with torch.no_grad():
        model.shift.weight.normal_(std=0.1)
    found = experiences(distances=torch.tensor([0.1, 0.5, 2.0]).double())
    context, query = torch.randn(7, 4).double(), data()
    names = [name for name, _ in model.named_parameters()]
    leaves = tuple(p.detach().requires_grad_() for p in model.parameters())

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            params = model.adapt_with_experience(context, (x, y), found)
            return mse_loss(model(query[0], params), query[1])

    whole = Whole()

    def loss(*values):
        return functional_call(whole, {f"model.{n}": v for n, v in zip(names, values, strict=True)}, ())

    assert torch.autograd.gradcheck(loss, leaves, eps=1e-6, atol=1e-7)
    grads = torch.autograd.grad(loss(*leaves), leaves)
    assert all(float(g.abs().max()) > 0 for g in grads)


def test_meta_update_context_holds_the_task_learns_to_use_it():
    torch.manual_seed(0)
    model = MetaLearner(3, 1, 16, 1e-2, inner_lr=0.01, inner_steps=1)

    def make():
        context = torch.randn(3)  # the context is the task's slope
        x = torch.randn(12, 3)
        y = x @ context[:, None]
        return context, (x[:2], y[:2]), (x[2:], y[2:])

    losses = [model.meta_update([make() for _ in range(4)]) for _ in range(150)]
    assert sum(losses[-20:]) < 0.4 * sum(losses[:20])
    assert float(model.shift.weight.detach().abs().max()) > 0
    before = [p.clone() for p in model.parameters()]
    context, (x, y), query = make()
    assert math.isnan(model.meta_update([(context, (x, y * torch.nan), query)])) and model.skipped_updates == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_meta_update_task_with_experience_returns_its_loss():
    model, context = learner(), torch.randn(4).double()
    found = experiences(distances=torch.zeros(3).double())
    support, query = data(), data()
    with torch.no_grad():
        params = model.adapt_with_experience(context, support, found)
        wanted = float(mse_loss(model(query[0], params), query[1]))
    assert model.meta_update([(context, support, query, found)]) == pytest.approx(wanted)


def test_meta_learner_other_loss_is_used():
    model, (x, y), context = learner(loss_fn=l1_loss), data(), torch.zeros(4).double()
    params = dict(model.network.named_parameters())
    for _ in range(3):
        loss = l1_loss(functional_call(model.network, params, (x,)), y)
        grads = torch.autograd.grad(loss, list(params.values()))
        params = {k: p - 0.1 * g for (k, p), g in zip(params.items(), grads, strict=True)}
    assert_same(model.adapt(context, (x, y)), params)


def bad_calls():
    model, (x, y), c = learner(), data(), torch.randn(7, 4).double()
    params = model.adapt(c, (x, y))
    many = Experiences({}, torch.zeros(2, 3).long(), torch.zeros(2, 3).long())
    many.fields = {"state": torch.zeros(2, 3, 4).double(), "action": torch.zeros(2, 3, 2).double()}

    def adapt(found):
        return model.adapt_with_experience(c, (x, y), found)

    for i, name in enumerate(("input_dim", "output_dim", "hidden_dim")):
        sizes = [4, 2, 6]
        yield lambda s=[*sizes[:i], 0, *sizes[i + 1 :]]: MetaLearner(*s, 1e-3), ValueError, f"{name} must be > 0"
        yield (
            lambda s=[*sizes[:i], 1.5, *sizes[i + 1 :]]: MetaLearner(*s, 1e-3),
            TypeError,
            f"{name} must be an integer",
        )
    yield lambda: MetaLearner(4, 2, 6, 0), ValueError, "meta_lr must be > 0"
    yield lambda: MetaLearner(4, 2, 6, math.inf), ValueError, "meta_lr must be finite"
    yield lambda: MetaLearner(4, 2, 6, 1e-3, inner_lr="a"), TypeError, "inner_lr must be a number"
    yield lambda: MetaLearner(4, 2, 6, 1e-3, inner_steps=0), ValueError, "inner_steps must be > 0"
    yield lambda: MetaLearner(4, 2, 6, 1e-3, temperature=0), ValueError, "temperature must be > 0"
    yield lambda: MetaLearner(4, 2, 6, 1e-3, loss_fn=1), TypeError, "loss_fn must be callable"
    yield lambda: model.adapt(3, (x, y)), TypeError, "MetaLearner.adapt: context must be a torch.Tensor"
    yield lambda: model.adapt(c[:, :3], (x, y)), ValueError, "context must have shape (time, 4) or (4,), got (7, 3)"
    yield lambda: model.adapt(c[:0], (x, y)), ValueError, "context must have shape (time, 4) or (4,), got (0, 4)"
    yield lambda: model.adapt(c.float(), (x, y)), TypeError, "context must be float64, got float32"
    yield lambda: model.adapt(c, x), TypeError, "support_set must be (inputs, targets), got Tensor"
    yield lambda: model.adapt(c, (x[:, :3], y)), ValueError, "support_set[0] must have shape (n, 4), got (5, 3)"
    yield lambda: model.adapt(c, (x, y[:4])), ValueError, "support_set[1] must have shape (5, 2), got (4, 2)"
    yield lambda: model.adapt(c, (x, y.float())), TypeError, "support_set[1] must be float64, got float32"
    yield lambda: model.adapt(c, (x, y.to("meta"))), ValueError, "support_set[1] is on meta"
    yield lambda: model.adapt(c, (x[:0], y[:0])), ValueError, "support_set is empty"
    yield lambda: model.adapt(c, (x, 3)), TypeError, "support_set[1] must be a torch.Tensor"
    yield lambda: adapt(None), TypeError, "experiences must be what ExperienceBuffer.retrieve returned, got NoneType"
    yield lambda: adapt(many), ValueError, "experiences must be those of one query, take experiences[i]"
    found = experiences()
    del found.fields["action"]
    yield lambda: adapt(found), ValueError, "experiences have no field 'action', the stored fields are state"
    yield lambda: adapt(experiences(state=torch.zeros(3, 5))), ValueError, "experiences.state must have shape (k, 4)"
    yield lambda: adapt(experiences(state=torch.zeros(3, 4))), TypeError, "experiences.state must be float64"
    yield lambda: adapt(experiences(action=torch.zeros(3, 1))), ValueError, "action must have shape (3, 2), got (3, 1)"
    yield lambda: adapt(experiences(action=torch.tensor([0, 1, 2]))), ValueError, "action must lie in [0, 2)"
    yield lambda: adapt(experiences(action=torch.zeros(3, 2))), TypeError, "experiences.action must be float64"
    yield lambda: model(3), TypeError, "MetaLearner.forward: query_set must be a torch.Tensor"
    yield lambda: model(x[0]), ValueError, "query_set must have shape (n, 4), got (4,)"
    yield lambda: model(x, [1]), ValueError, "params must be what adapt returned"
    yield lambda: model(x, dict(list(params.items())[:2])), ValueError, "params must be what adapt returned"
    yield lambda: model.meta_update([]), ValueError, "tasks is empty"
    yield lambda: model.meta_update([(c, (x, y))]), ValueError, "tasks[0] must be (context, support_set, query_set"
    yield lambda: model.meta_update([(c, (x, y), x)]), TypeError, "query_set must be (inputs, targets), got Tensor"
    bad = learner(loss_fn=lambda p, t: p - t)
    yield lambda: bad.adapt(c, (x, y)), ValueError, "loss_fn must return a scalar"


@pytest.mark.parametrize(("call", "error", "text"), list(bad_calls()), ids=lambda v: v if isinstance(v, str) else "")
def test_meta_learner_bad_argument_raises_one_sentence(call, error, text):
    with pytest.raises(error) as info:
        call()
    assert text in str(info.value) and "\n" not in str(info.value)


# --------------------------------------------------------------------------------- frozen, inference mode, numbers


def test_meta_learner_frozen_parameters_stay_and_others_learn():
    torch.manual_seed(0)
    model = MetaLearner(4, 2, 6, 0.1).double()
    nn.init.normal_(model.shift.weight, std=0.1)
    context = torch.randn(5, 4).double()
    model.meta_update([(context, data(), data())])
    model.network[2].requires_grad_(False)
    model.network[2].weight.grad = torch.ones_like(model.network[2].weight)
    before = copy.deepcopy(model.network)
    params = model.adapt(context, data())
    assert list(params) == [name for name, _ in model.network.named_parameters()]
    for name, p in model.network.named_parameters():
        assert torch.equal(params[name], p) == name.startswith("2.")
    model.meta_update([(context, data(), data())] * 2)
    for (name, p), old in zip(model.network.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(p, old) == name.startswith("2.")
    model.network[2].requires_grad_(True)
    model.meta_update([(context, data(), data())])
    assert not torch.equal(model.network[2].weight, before[2].weight)


def test_meta_learner_replaced_or_all_frozen_parameters_are_refused():
    model = MetaLearner(4, 2, 6, 0.1).double()
    task = torch.randn(5, 4).double(), data(), data()
    model.network.requires_grad_(False)
    for call in (lambda: model.meta_update([task]), lambda: model.adapt(*task[:2])):
        with pytest.raises(ValueError, match=r"^MetaLearner.adapt: the network has no parameters that require grad$"):
            call()
    model.network[0] = nn.Linear(4, 6).double()
    text = "network.0.weight was unfrozen or replaced after this MetaLearner was made: make a new MetaLearner"
    with pytest.raises(ValueError, match=f"^MetaLearner.meta_update: {text}$"):
        model.meta_update([task])


def test_meta_learner_inference_mode_and_tensors_give_the_steps_outside():
    torch.manual_seed(0)
    one = MetaLearner(4, 2, 6, 0.1).double()
    nn.init.normal_(one.shift.weight, std=0.1)
    other = copy.deepcopy(one)
    context, support, query = torch.randn(5, 4).double(), data(), data()
    found = experiences(distances=torch.rand(3).double())
    with torch.inference_mode():
        inside = context.clone(), tuple(t.clone() for t in support), tuple(t.clone() for t in query)
        fields = {n: t.clone() for n, t in found.fields.items()}
        same = Experiences(fields, found.indices.clone(), found.indices.clone(), found.distances.clone())
        params = one.adapt(*inside[:2]), one.adapt_with_experience(*inside[:2], same)
    for got, wanted in zip(
        params, (other.adapt(context, support), other.adapt_with_experience(context, support, found)), strict=True
    ):
        assert_same(got, {n: p.detach() for n, p in wanted.items()})
        assert not torch.equal(got["0.weight"], one.network[0].weight)
    task, wanted = (*inside, same), [other.meta_update([(context, support, query, found)]) for _ in range(2)]
    got = [one.meta_update([task])]
    with torch.inference_mode():
        got.append(one.meta_update([task]))
        made = MetaLearner(4, 2, 6, 0.1).double()
    assert got == wanted
    made.meta_update([(context, support, query)])


def test_meta_learner_numpy_numbers_equal_those_of_python():
    torch.manual_seed(0)
    one = MetaLearner(
        np.int64(4), np.int32(2), np.int64(6), np.float32(0.5), inner_lr=np.float32(0.25), inner_steps=np.int8(3)
    )
    torch.manual_seed(0)
    other = MetaLearner(4, 2, 6, 0.5, inner_lr=0.25, inner_steps=3)
    for name in ("input_dim", "output_dim", "inner_lr", "inner_steps"):
        assert type(getattr(one, name)) is type(getattr(other, name))
    context, support = torch.randn(5, 4), (torch.randn(3, 4), torch.randn(3, 2))
    assert one.meta_update([(context, support, support)]) == other.meta_update([(context, support, support)])
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("frozen", [False, True])
def test_adapt_resized_layer_is_refused(frozen):
    made = learner()
    made.network[4] = nn.Linear(6, 3).double().requires_grad_(not frozen)
    name = "network" if frozen else "network.4.weight was unfrozen or"
    text = f"{name}{' was' if frozen else ''} replaced after this MetaLearner was made: make a new MetaLearner"
    with pytest.raises(ValueError, match=f"^MetaLearner.adapt: {text}$"):
        made.adapt(torch.randn(4).double(), data())


def test_forward_inference_tensors_outside_give_gradients():
    made = learner()
    with torch.inference_mode():
        x = torch.randn(5, 4).double()
        params = {name: p.clone() for name, p in made.network.named_parameters()}
    made(x).sum().backward()
    assert made.network[0].weight.grad.any()
    torch.testing.assert_close(made(x, params=params), made(x))
