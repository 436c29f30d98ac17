"""MetaMAML: gradients against plain autograd, batching against a loop, the contract of its calls."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, vmap
from torch.nn.functional import l1_loss, mse_loss
from user_models import Shared

from eaml_ext.meta import MetaMAML
from eaml_ext.meta.kl_dro import kl_dro_weights
from eaml_ext.nn import SSM


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


def meta_gradient_by_hand(model, tasks, inner_lr, steps, first_order=False):
    """The textbook: create_graph through every inner step, one task after another."""
    params = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}
    total = 0
    for sx, sy, qx, qy in tasks:
        fast = params
        for _ in range(steps):
            loss = mse_loss(functional_call(model, fast, (sx,)), sy)
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=not first_order)
            fast = {k: p - inner_lr * g for (k, p), g in zip(fast.items(), grads, strict=True)}
        total = total + mse_loss(functional_call(model, fast, (qx,)), qy)
    loss = total / len(tasks)
    return loss.item(), dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", ["mlp", "ssm", "ragged"])
def test_meta_gradient_equals_autograd_through_a_loop(kind, steps, first_order):
    if kind == "mlp":
        model, tasks = mlp(), [task() for _ in range(5)]
    elif kind == "ssm":
        model, tasks = SSM(4, 6, 2, state_size=3).double(), [sequences(1, 12) for _ in range(3)]
    else:
        model = SSM(4, 6, 2, state_size=3).double()
        tasks = [sequences(1, 12), sequences(2, 5), sequences(1, 12), sequences(1, 7)]
    loss, wanted = meta_gradient_by_hand(model, tasks, 0.1, steps, first_order)
    maml = MetaMAML(model, 0.1, 1e-3, first_order, inner_steps=steps, optimizer=torch.optim.SGD)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    assert maml.meta_update(tasks, mse_loss) == pytest.approx(loss, rel=1e-10)
    for k, p in model.named_parameters():
        got = (before[k] - p.detach()) / 1e-3  # plain SGD: the step is the gradient
        # the difference of nearly equal parameters costs digits
        assert torch.allclose(got, wanted[k], rtol=1e-6, atol=1e-9 * float(wanted[k].abs().max()) + 1e-11), k


def test_losses_fall_and_adaptation_pays():
    torch.manual_seed(0)
    model = mlp()
    maml = MetaMAML(model, inner_lr=0.1, outer_lr=1e-2, inner_steps=2)

    def linear():
        x, w = torch.randn(20, 4, dtype=torch.float64), torch.ones(4, 1, dtype=torch.float64) * torch.randn(1).double()
        return x[:10], x[:10] @ w, x[10:], x[10:] @ w

    losses = [maml.meta_update([linear() for _ in range(8)], mse_loss) for _ in range(200)]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    test = [linear() for _ in range(20)]
    before = sum(mse_loss(model(qx), qy).item() for _, _, qx, qy in test)
    after = sum(mse_loss(maml.adapt(sx, sy, mse_loss, 2)(qx), qy).item() for sx, sy, qx, qy in test)
    assert after < 0.6 * before


def test_adapt_returns_a_detached_copy_and_leaves_the_model():
    model = nn.Linear(4, 1)
    maml = MetaMAML(model, 0.1, 0.01)
    before = copy.deepcopy(model.state_dict())
    x, y = torch.randn(10, 4), torch.randn(10, 1)
    adapted = maml.adapt(x, y, nn.MSELoss(), 5)
    assert isinstance(adapted, nn.Linear) and adapted is not model
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert mse_loss(adapted(x), y) < mse_loss(model(x), y)
    assert adapted.weight.requires_grad and adapted.weight.grad_fn is None and model.weight.grad is None


def test_adapt_steps_are_gradient_descent():
    model = nn.Linear(2, 1, bias=False)
    x, y = torch.randn(5, 2), torch.randn(5, 1)
    w = model.weight.detach().clone().requires_grad_()
    for _ in range(3):
        (g,) = torch.autograd.grad(mse_loss(x @ w.T, y), w)
        w = (w - 0.2 * g).detach().requires_grad_()
    assert torch.allclose(MetaMAML(model, 0.2, 1.0).adapt(x, y, mse_loss, 3).weight, w, atol=1e-6)
    same = MetaMAML(model, 0.2, 1.0).adapt(x, y, mse_loss, 0)
    assert torch.equal(same.weight, model.weight)


def test_frozen_parameters_stay():
    model = mlp()
    model[0].requires_grad_(False)
    frozen = model[0].weight.clone()
    maml = MetaMAML(model, 0.1, 0.1)
    maml.meta_update([task(), task()], mse_loss)
    sx, sy, *_ = task()
    assert torch.equal(maml.adapt(sx, sy, mse_loss)[0].weight, frozen) and torch.equal(model[0].weight, frozen)


def test_a_step_that_is_not_finite_is_left_out():
    model = mlp()
    maml = MetaMAML(model, 0.1, 0.1, learn_inner_lr=True)
    maml.meta_update([task()], mse_loss)
    before = copy.deepcopy(maml.state_dict())
    sx, sy, qx, qy = task()
    loss = maml.meta_update([task(), (sx, sy * torch.nan, qx, qy)], mse_loss)
    assert loss != loss and maml.skipped_updates == 1
    assert bool(torch.isfinite(maml.last_losses[0])) and bool(torch.isnan(maml.last_losses[1]))
    after = maml.state_dict()
    for part in ("model", "inner_lrs"):
        assert all(torch.equal(v, before[part][k]) for k, v in after[part].items())
    for i, moments in after["optimizer"]["state"].items():
        assert all(torch.equal(v, before["optimizer"]["state"][i][k]) for k, v in moments.items())


def test_a_gradient_that_is_not_finite_is_left_out_though_the_loss_is():
    maml = MetaMAML(nn.Linear(1, 1, bias=False).double(), 0.1, 0.1)
    before = maml.model.weight.clone()
    zero = torch.zeros(1, 1, dtype=torch.float64)

    def root(prediction, target):  # infinite slope at 0
        return (prediction - target).abs().sum().sqrt()

    loss = maml.meta_update([(zero, zero + 1, zero, zero)], root)
    assert loss == 0 and maml.skipped_updates == 1 and torch.equal(maml.model.weight, before)


def gradients(maml, tasks, kl_radius=0.0):
    """Losses and meta-gradient by name, rates under a name of their own."""
    losses, grads = maml._meta_gradient().run(tasks, [mse_loss] * len(tasks), kl_radius)
    return losses, dict(zip([*maml.parameters(), *(f"rate of {k}" for k in maml.inner_lrs)], grads, strict=True))


def assert_same_gradient(one, other, tolerance=1e-10):
    torch.testing.assert_close(one[0], other[0], rtol=tolerance, atol=tolerance)
    for name, g in one[1].items():
        g = torch.zeros_like(other[1][name]) if g is None else g
        torch.testing.assert_close(other[1][name], g, rtol=tolerance, atol=tolerance * float(g.abs().max() + 1e-3))


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("prefix", [None, "2", ("0.bias", "2")])
def test_learned_rates_and_partial_inner_loops_equal_autograd_through_a_loop(prefix, first_order):
    model, tasks = mlp(), [task() for _ in range(3)]
    maml = MetaMAML(model, 0.1, 1.0, first_order, inner_steps=3, learn_inner_lr=True, inner_parameters=prefix)
    names = {None: ["0.weight", "0.bias", "2.weight", "2.bias"], "2": ["2.weight", "2.bias"]}
    assert list(maml.inner_lrs) == names.get(prefix, ["0.bias", "2.weight", "2.bias"])
    with torch.no_grad():
        for rate in maml.inner_lrs.values():
            rate.mul_(torch.rand_like(rate) + 0.5)
    params = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}
    rates = {k: r.detach().clone().requires_grad_() for k, r in maml.inner_lrs.items()}
    total = 0
    for sx, sy, qx, qy in tasks:
        fast = dict(params)
        for _ in range(3):
            loss = mse_loss(functional_call(model, fast, (sx,)), sy)
            grads = torch.autograd.grad(loss, [fast[k] for k in rates], create_graph=not first_order)
            fast.update({k: fast[k] - rates[k] * g for k, g in zip(rates, grads, strict=True)})
        total = total + mse_loss(functional_call(model, fast, (qx,)), qy) / 3
    leaves = {**params, **{f"rate of {k}": r for k, r in rates.items()}}
    wanted = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    losses, got = gradients(maml, tasks)
    assert float(losses.mean()) == pytest.approx(float(total), rel=1e-12)
    for name, g in wanted.items():
        torch.testing.assert_close(got[name], g, rtol=1e-9, atol=1e-12, msg=name)


def test_anil_leaves_the_body_and_adapts_the_head():
    maml = MetaMAML(mlp(), 0.1, 0.1, inner_parameters="2")
    sx, sy, *_ = task()
    adapted = maml.adapt(sx, sy, mse_loss, 3)
    assert torch.equal(adapted[0].weight, maml.model[0].weight)
    assert not torch.equal(adapted[2].weight, maml.model[2].weight)
    body = maml.model[0].weight.clone()
    maml.meta_update([task()], mse_loss)
    assert not torch.equal(maml.model[0].weight, body)  # the outer loop learns it


def test_learned_rates_are_learned_and_used():
    torch.manual_seed(0)
    maml = MetaMAML(nn.Linear(4, 1).double(), 0.01, 0.02, learn_inner_lr=True)
    x, y = torch.randn(20, 4).double(), torch.randn(20, 1).double()
    for _ in range(20):
        maml.meta_update([(x, y, x, y)], mse_loss)
    assert all(bool((rate != 0.01).all()) for rate in maml.inner_lrs.values())
    start = maml.model.weight.detach()
    (g,) = torch.autograd.grad(mse_loss(maml.model(x), y), maml.model.weight)
    torch.testing.assert_close(maml.adapt(x, y, mse_loss, 1).weight, start - maml.inner_lrs["weight"] * g)


def test_reptile_moves_towards_the_adapted_parameters():
    model, tasks = mlp(), [task() for _ in range(4)]
    maml = MetaMAML(model, 0.1, 0.5, inner_steps=3, reptile=True, optimizer=torch.optim.SGD)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    adapted = [dict(maml.adapt(sx, sy, mse_loss).named_parameters()) for sx, sy, _, _ in tasks]
    loss = maml.meta_update(tasks, mse_loss)
    for k, p in model.named_parameters():
        step = torch.stack([before[k] - a[k] for a in adapted]).mean(0) / 0.1
        torch.testing.assert_close(p, before[k] - 0.5 * step, rtol=1e-10, atol=1e-12)
    functional = [functional_call(model, a, (qx,)) for a, (_, _, qx, _) in zip(adapted, tasks, strict=True)]
    wanted = sum(float(mse_loss(p, t[3])) for p, t in zip(functional, tasks, strict=True)) / 4
    assert loss == pytest.approx(wanted, rel=1e-10)


def test_reptile_learns():
    torch.manual_seed(0)
    maml = MetaMAML(mlp(), 0.1, 0.01, inner_steps=3, reptile=True)
    w = torch.randn(4, 1).double()

    def near():
        x = torch.randn(20, 4).double()
        return x[:10], x[:10] @ w, x[10:], x[10:] @ w

    losses = [maml.meta_update([near() for _ in range(4)], mse_loss) for _ in range(150)]
    assert sum(losses[-20:]) < 0.2 * sum(losses[:20])


class Counting(nn.Module):
    """Notes how many tasks each call of the model computes at once."""

    def __init__(self, model):
        super().__init__()
        self.model, self.sizes = model, []

    def forward(self, x):
        whole = x
        while torch._C._functorch.is_functorch_wrapped_tensor(whole):
            whole = torch._C._functorch.get_unwrapped(whole)
        self.sizes.append(whole.numel() // x.numel())
        return self.model(x)


@pytest.mark.parametrize("kl_radius", [0.0, 0.3])
@pytest.mark.parametrize("options", [{}, {"reptile": True}, {"learn_inner_lr": True}, {"first_order": True}], ids=str)
def test_micro_batches_give_the_same_gradient_with_fewer_tasks_at_once(options, kl_radius):
    model = Counting(SSM(4, 6, 2, state_size=3).double())
    tasks = [sequences(1, 12 if i % 3 else 5) for i in range(10)]
    whole = gradients(MetaMAML(model, 0.1, 1e-3, inner_steps=2, **options), tasks, kl_radius)
    assert max(model.sizes) == 6
    model.sizes.clear()
    parts = gradients(MetaMAML(model, 0.1, 1e-3, inner_steps=2, micro_batch=2, **options), tasks, kl_radius)
    assert max(model.sizes) == 2
    assert_same_gradient(whole, parts)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("options", [{}, {"learn_inner_lr": True, "inner_parameters": "2"}], ids=str)
def test_the_function_that_is_compiled_gives_the_same_gradient(options, first_order, monkeypatch):
    monkeypatch.setattr("eaml_ext.meta._meta_gradient.try_compile", lambda function: function)
    model, tasks = mlp(), [task(m=6 if i % 2 else 3) for i in range(5)]
    plain = gradients(MetaMAML(model, 0.1, 1e-3, first_order, inner_steps=2, **options), tasks, 0.2)
    pure = gradients(MetaMAML(model, 0.1, 1e-3, first_order, inner_steps=2, compile=True, **options), tasks, 0.2)
    assert_same_gradient(plain, pure)


@pytest.mark.parametrize("kind", ["mlp", "ssm"])
def test_compiled_meta_updates_are_the_uncompiled_ones(kind):
    torch.manual_seed(0)
    model = mlp() if kind == "mlp" else SSM(4, 6, 2, state_size=3).double()
    tasks = [task() if kind == "mlp" else sequences(1, 12) for _ in range(3)]
    compiled = MetaMAML(copy.deepcopy(model), 0.1, 1e-3, compile=True)
    plain = MetaMAML(model, 0.1, 1e-3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="MetaMAML: compile failed")
        for _ in range(2):
            assert compiled.meta_update(tasks, mse_loss) == pytest.approx(plain.meta_update(tasks, mse_loss), rel=1e-9)
    for p, q in zip(compiled.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


def test_meta_update_compiled_has_no_graph_breaks():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    maml = MetaMAML(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)), 0.1, 0.1, compile=True)
    x = torch.randn(4, 5, 2)
    maml.meta_update([(a, a[:, :1], a, a[:, :1]) for a in x], mse_loss)
    assert not counters["graph_break"], counters["graph_break"]


def test_what_cannot_be_compiled_runs_uncompiled_and_says_so(monkeypatch):
    model, tasks = mlp(), [task() for _ in range(3)]
    wanted = MetaMAML(copy.deepcopy(model), 0.1, 1e-3).meta_update(tasks, mse_loss)

    def broken(function, **_):
        def fail(*args):
            raise torch._dynamo.exc.Unsupported("no such thing\nand more")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    maml = MetaMAML(model, 0.1, 1e-3, compile=True)
    with pytest.warns(RuntimeWarning, match="compile failed, the meta-update runs uncompiled: no such thing$"):
        assert maml.meta_update(tasks, mse_loss) == pytest.approx(wanted)
    maml.meta_update(tasks, mse_loss)


def test_errors_of_the_loss_are_not_taken_for_failures_to_compile(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with pytest.raises(ValueError, match="loss_fn must return a scalar"):
        MetaMAML(mlp(), 0.1, 0.1, compile=True).meta_update([task()], lambda p, t: p - t)


def losses_under_torch_func(maml, params, tasks, loss_fn):
    return vmap(lambda _: maml.task_losses(params, tasks, loss_fn))(torch.zeros(1))[0]


@pytest.mark.parametrize("detached", [(), ("0.weight",), None], ids=str)
@pytest.mark.parametrize("loss_fn", [mse_loss, lambda y, target: target.square().mean()], ids=["used", "unused"])
def test_task_losses_of_any_parameters_are_those_under_torch_func(detached, loss_fn):
    maml, tasks = MetaMAML(mlp(), 0.1, 0.01, inner_steps=2), [task() for _ in range(3)]
    params = {n: p.detach() if detached is None or n in detached else p for n, p in maml.parameters().items()}
    leaves = [p for p in params.values() if p.requires_grad and loss_fn is mse_loss]
    losses, wanted = maml.task_losses(params, tasks, loss_fn), losses_under_torch_func(maml, params, tasks, loss_fn)
    torch.testing.assert_close(losses, wanted)
    assert losses.requires_grad == bool(leaves)
    if leaves:
        grads, wanted_grads = (torch.autograd.grad(x.sum(), leaves) for x in (losses, wanted))
        torch.testing.assert_close(grads, wanted_grads)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(maml.task_losses(params, tasks, loss_fn), wanted)


@pytest.mark.parametrize("detached", [False, True])
def test_task_losses_depend_on_all_that_the_inner_loop_depends_on(detached):
    maml, tasks = MetaMAML(mlp(), 0.1, 0.01, inner_steps=2), [task() for _ in range(3)]
    params = {n: p.detach() if detached else p for n, p in maml.parameters().items()}
    weight = torch.tensor(1.5, requires_grad=True, dtype=tasks[0][0].dtype)

    def loss_fn(y, target):
        return weight * mse_loss(y, target)

    losses, wanted = maml.task_losses(params, tasks, loss_fn), losses_under_torch_func(maml, params, tasks, loss_fn)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), weight) for x in (losses, wanted)))


def test_task_losses_in_forward_mode():
    maml, tasks = MetaMAML(mlp(), 0.1, 0.01, inner_steps=2), [task() for _ in range(3)]
    params = {name: p.detach() for name, p in maml.parameters().items()}
    tangents = {name: torch.randn_like(p) for name, p in params.items()}
    wanted = jvp(lambda p: maml.task_losses(p, tasks, mse_loss), (params,), (tangents,))[1]
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p, tangents[name]) for name, p in params.items()}
        torch.testing.assert_close(forward_ad.unpack_dual(maml.task_losses(duals, tasks, mse_loss)).tangent, wanted)


def test_each_task_may_have_its_own_loss():
    model, tasks = mlp(), [task() for _ in range(4)]
    mine = [mse_loss, l1_loss, mse_loss, l1_loss]
    maml = MetaMAML(model, 0.1, 1e-3)
    alone = [maml.task_losses(maml.parameters(), [t], f) for t, f in zip(tasks, mine, strict=True)]
    loss = maml.meta_update(tasks, mine)
    torch.testing.assert_close(maml.last_losses, torch.cat(alone))
    assert loss == pytest.approx(float(torch.cat(alone).mean()))


def test_shifted_gradient_is_that_of_the_tilted_mean():
    model, tasks = mlp(), [task() for _ in range(5)]
    maml = MetaMAML(model, 0.1, 1e-3)
    params = maml.parameters()
    losses = maml.task_losses(params, tasks, mse_loss)
    weights = kl_dro_weights(losses, 0.3)
    assert float(weights.max()) > 0.3
    wanted = torch.autograd.grad(losses @ weights, list(params.values()))
    got = gradients(maml, tasks, 0.3)[1]
    for name, g in zip(params, wanted, strict=True):
        torch.testing.assert_close(got[name], g)


def test_state_dict_brings_back_the_same_bits():
    tasks = [[task() for _ in range(3)] for _ in range(4)]
    one = MetaMAML(mlp(), 0.1, 1e-2, learn_inner_lr=True)
    for batch in tasks[:2]:
        one.meta_update(batch, mse_loss)
    state = copy.deepcopy(one.state_dict())
    other = MetaMAML(mlp(), 0.1, 1e-2, learn_inner_lr=True)
    other.load_state_dict(state)
    for batch in tasks[2:]:
        assert one.meta_update(batch, mse_loss) == other.meta_update(batch, mse_loss)
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"model has weight of shape none, wanted \(1, 4\)$"):
        MetaMAML(nn.Linear(4, 1), 0.1, 1e-2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"inner_lrs has 0.weight of shape \(8, 4\), wanted none$"):
        MetaMAML(mlp(), 0.1, 1e-2).load_state_dict(state)
    half_frozen = mlp()
    half_frozen[0].requires_grad_(False)
    before = half_frozen[2].weight.clone()
    with pytest.raises(ValueError, match=r"optimizer has parameter groups of \[4\], wanted \[2\]$"):
        MetaMAML(half_frozen, 0.1, 1e-2).load_state_dict(MetaMAML(mlp(), 0.1, 1e-2).state_dict())
    assert torch.equal(half_frozen[2].weight, before)


def bad_calls():
    model = nn.Linear(4, 1)
    maml = MetaMAML(model, 0.1, 0.1)
    x, y = torch.randn(10, 4), torch.randn(10, 1)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    yield lambda: MetaMAML(lambda x: x, 0.1, 0.1), TypeError, "model must be a torch.nn.Module"
    yield lambda: MetaMAML(frozen, 0.1, 0.1), ValueError, "model has no parameters that require grad"
    yield lambda: MetaMAML(model, 0, 0.1), ValueError, "inner_lr must be > 0"
    yield lambda: MetaMAML(model, "a", 0.1), TypeError, "inner_lr must be a number"
    yield lambda: MetaMAML(model, 0.1, -1), ValueError, "outer_lr must be > 0"
    yield lambda: MetaMAML(model, 0.1, 0.1, inner_steps=0), ValueError, "inner_steps must be > 0"
    yield lambda: MetaMAML(model, float("inf"), 0.1), ValueError, "inner_lr must be finite"
    yield lambda: MetaMAML(model, 0.1, float("inf")), ValueError, "outer_lr must be finite"
    yield lambda: MetaMAML(model, 0.1, 0.1, 1), TypeError, "first_order must be True or False"
    yield lambda: MetaMAML(model, 0.1, 0.1, optimizer=3), TypeError, "optimizer must be callable"
    yield lambda: MetaMAML(model, 0.1, 0.1, learn_inner_lr=0.1), TypeError, "learn_inner_lr must be True or False"
    yield lambda: MetaMAML(model, 0.1, 0.1, reptile="yes"), TypeError, "reptile must be True or False"
    yield lambda: MetaMAML(model, 0.1, 0.1, compile=None), TypeError, "compile must be True or False"
    yield lambda: MetaMAML(model, 0.1, 0.1, micro_batch=0), ValueError, "micro_batch must be > 0"
    yield lambda: MetaMAML(model, 0.1, 0.1, micro_batch=2.0), TypeError, "micro_batch must be an integer"
    yield lambda: MetaMAML(model, 0.1, 0.1, inner_parameters=3), TypeError, "inner_parameters must be a prefix"
    yield lambda: MetaMAML(model, 0.1, 0.1, inner_parameters=[3]), TypeError, "inner_parameters must be a prefix"
    yield lambda: MetaMAML(model, 0.1, 0.1, inner_parameters="head"), ValueError, "inner_parameters 'head' begins no"
    yield lambda: MetaMAML(model, 0.1, 0.1, inner_parameters=["bias", "w"]), ValueError, "inner_parameters 'w' begins"
    yield lambda: MetaMAML(model, 0.1, 0.1, inner_parameters=[]), ValueError, "inner_parameters '' begins no"
    yield lambda: MetaMAML(model, 0.1, 0.1, reptile=True, learn_inner_lr=True), ValueError, "learn_inner_lr needs MAML"
    yield (
        lambda: MetaMAML(model, 0.1, 0.1, reptile=True, inner_parameters="bias"),
        ValueError,
        "inner_parameters needs MAML",
    )
    yield lambda: maml.meta_update([(x, y, x, y)], 3), TypeError, "loss_fn must be callable"
    yield lambda: maml.meta_update([(x, y, x, y)], [mse_loss] * 2), ValueError, "one or as many as the 1 tasks, got 2"
    yield lambda: maml.meta_update([(x, y, x, y)], [3]), TypeError, "loss_fn must be callable"
    yield lambda: maml.meta_update([(x, y, x, y)], mse_loss, kl_radius=-1), ValueError, "kl_radius must be >= 0"
    yield lambda: maml.meta_update([(x, y, x, y)], mse_loss, kl_radius="a"), TypeError, "kl_radius must be a number"
    yield lambda: maml.adapt(x, y, "mse"), TypeError, "loss_fn must be callable"
    yield lambda: maml.adapt_params(maml.parameters(), x, y, None), TypeError, "loss_fn must be callable"
    yield lambda: maml.adapt_params(maml.parameters(), x, y, mse_loss, -1), ValueError, "num_steps must be >= 0"
    yield lambda: maml.meta_update([], mse_loss), ValueError, "tasks is empty"
    yield lambda: maml.meta_update([(x, y)], mse_loss), ValueError, "tasks[0] must be"
    yield lambda: maml.meta_update([(x, y, x, y[:3])], mse_loss), ValueError, "query_y has shape (3, 1)"
    yield lambda: maml.meta_update([(x[:0], y[:0], x, y)], mse_loss), ValueError, "support_x is empty"
    yield lambda: maml.meta_update([(x, y, x, [1])], mse_loss), TypeError, "query_y must be a torch.Tensor"
    yield lambda: maml.meta_update([(x, y.to("meta"), x, y)], mse_loss), ValueError, "support_y is on meta"
    yield lambda: maml.meta_update([(x, y, x, y)], lambda p, t: p - t), ValueError, "loss_fn must return a scalar"
    yield lambda: maml.adapt(x, y[:2], mse_loss), ValueError, "support_y has shape (2, 1)"
    yield lambda: maml.adapt(1, y, mse_loss), TypeError, "support_x must be a torch.Tensor"
    yield lambda: maml.adapt(x, y, mse_loss, -1), ValueError, "num_steps must be >= 0"
    yield lambda: maml.adapt(x, y, mse_loss, 1.5), TypeError, "num_steps must be an integer"
    yield lambda: maml.load_state_dict({"model": {}}), ValueError, "a dict with the entries model, inner_lrs, optimizer"
    yield lambda: maml.load_state_dict(3), ValueError, "a dict with the entries model, inner_lrs, optimizer"
    yield lambda: maml.adapt(x, y, lambda p, t: 0.0, 1), ValueError, "loss_fn must return a scalar"


@pytest.mark.parametrize("call, error, text", list(bad_calls()), ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_gets_one_sentence(call, error, text):
    with pytest.raises(error) as info:
        call()
    assert text in str(info.value) and "\n" not in str(info.value)


def test_a_loss_may_be_of_another_dtype_than_the_parameters():
    def loss(y, target):
        return mse_loss(y.double(), target.double())

    x, y = torch.randn(5, 2), torch.randn(5, 1)
    maml = MetaMAML(nn.Linear(2, 1), 0.1, 0.01)
    assert maml.meta_update([(x, y, x, y)] * 3, loss, kl_radius=0.1) > 0


# ------------------------------------------------------------------------- parameters that change after construction


def assert_moved(model, before, moved):
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != (name in moved), name


@pytest.mark.parametrize("options", [{}, {"learn_inner_lr": True}, {"reptile": True}, {"first_order": True}], ids=str)
def test_meta_update_parameter_frozen_later_stays_and_unfrozen_again_is_learned(options):
    model, tasks = mlp(), [task(), task()]
    maml = MetaMAML(model, 0.1, 0.1, **options)
    maml.meta_update(tasks, mse_loss)  # the optimizer has momentum of all parameters
    model[0].requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    rates = {n: r.detach().clone() for n, r in maml.inner_lrs.items()}
    for _ in range(2):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        maml.meta_update(tasks, mse_loss)
        assert_moved(model, before, {"2.weight", "2.bias"})
    for name, rate in maml.inner_lrs.items():
        assert torch.equal(rate, rates[name]) == name.startswith("0")
    adapted = maml.adapt(*tasks[0][:2], mse_loss)
    assert_moved(adapted, dict(model.named_parameters()), {"2.weight", "2.bias"})
    params = maml.adapt_params(dict(model.named_parameters()), *tasks[0][:2], mse_loss)
    assert params["0.weight"] is model[0].weight and params["2.weight"] is not model[2].weight
    model[0].requires_grad_(True)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    maml.meta_update(tasks, mse_loss)
    assert_moved(model, before, set(before))


def test_meta_update_compiled_parameter_frozen_later_stays(monkeypatch):
    monkeypatch.setattr("eaml_ext.meta._meta_gradient.try_compile", lambda function: function)
    model, tasks = mlp(), [task(), task()]
    maml = MetaMAML(model, 0.1, 0.1, compile=True)
    maml.meta_update(tasks, mse_loss)
    model[2].requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    maml.meta_update(tasks, mse_loss)
    assert_moved(model, before, {"0.weight", "0.bias"})


def test_meta_update_inner_parameters_frozen_later_are_not_adapted():
    model, (sx, sy, qx, qy) = mlp(), task()
    maml = MetaMAML(model, 0.1, 0.1, inner_parameters=["0", "2"])
    model[0].requires_grad_(False)
    assert maml.inner_names == ["2.weight", "2.bias"]
    maml.meta_update([(sx, sy, qx, qy)], mse_loss)
    model[0].requires_grad_(True)
    assert maml.inner_names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    maml = MetaMAML(model, 0.1, 0.1, inner_parameters="2")
    model[2].requires_grad_(False)
    with pytest.raises(ValueError, match=r"^MetaMAML.meta_update: params must hold an inner parameter that"):
        maml.meta_update([(sx, sy, qx, qy)], mse_loss)


@pytest.mark.parametrize("change", ["unfreeze", "replace", "assign"])
def test_meta_update_parameter_the_optimizer_does_not_hold_is_refused(change):
    model, tasks = mlp(), [task(), task()]
    model[0].requires_grad_(change != "unfreeze")
    maml = MetaMAML(model, 0.1, 0.1)
    if change == "unfreeze":
        model[0].requires_grad_(True)
    elif change == "replace":
        model[0] = nn.Linear(4, 8).double()
    else:
        model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)
    before = copy.deepcopy(maml.state_dict())
    text = "0.weight was unfrozen or replaced after this MetaMAML was made: make a new MetaMAML"
    with pytest.raises(ValueError, match=f"^MetaMAML.meta_update: {text}$"):
        maml.meta_update(tasks, mse_loss)
    assert all(torch.equal(t, before["model"][n]) for n, t in model.state_dict().items())
    assert not maml.optimizer.state_dict()["state"]
    adapted = maml.adapt(*tasks[0][:2], mse_loss)  # needs no optimizer: what requires grad now is adapted
    assert_moved(adapted, dict(model.named_parameters()), set(maml.parameters()))


def test_adapt_learned_rates_of_a_replaced_parameter_are_refused():
    model, (sx, sy, *_) = mlp(), task()
    maml = MetaMAML(model, 0.1, 0.1, learn_inner_lr=True)
    model[0], model[2] = nn.Linear(4, 5).double(), nn.Linear(5, 1).double()
    with pytest.raises(ValueError, match=r"^MetaMAML.adapt_params: .*0.weight was unfrozen or replaced .* make a new"):
        maml.adapt(sx, sy, mse_loss)


def test_calls_of_a_model_all_frozen_are_refused():
    model, tasks = mlp(), [task()]
    maml = MetaMAML(model, 0.1, 0.1)
    model.requires_grad_(False)
    for call in (
        lambda: maml.meta_update(tasks, mse_loss),
        lambda: maml.adapt(*tasks[0][:2], mse_loss),
        lambda: maml.task_losses(maml.parameters(), tasks, mse_loss),
    ):
        with pytest.raises(ValueError, match="params must hold an inner parameter that requires grad, got none"):
            call()


# --------------------------------------------------------------------------------------------------- inference mode


@pytest.mark.parametrize("inside", [False, True])
def test_calls_with_inference_tensors_and_in_inference_mode_are_those_outside(inside):
    mode = torch.inference_mode if inside else torch.enable_grad
    model, tasks = mlp(), [task() for _ in range(2)]
    one, other = (MetaMAML(m, 0.1, 0.1, learn_inner_lr=True) for m in (model, copy.deepcopy(model)))
    with torch.inference_mode():
        inference = [tuple(t.clone() for t in data) for data in tasks]
    assert inference[0][0].is_inference()
    with mode():
        adapted = one.adapt(*inference[0][:2], mse_loss, 3)
        params = one.adapt_params(one.parameters(), *inference[0][:2], mse_loss, 3)
        losses = one.task_losses(one.parameters(), inference, mse_loss)
        updates = [one.meta_update(inference, mse_loss) for _ in range(2)]
    for name, p in other.adapt(*tasks[0][:2], mse_loss, 3).named_parameters():
        assert torch.equal(dict(adapted.named_parameters())[name], p) and torch.equal(params[name], p)
        assert not torch.equal(p, dict(other.model.named_parameters())[name]) and params[name].requires_grad != inside
    assert torch.equal(losses, other.task_losses(other.parameters(), tasks, mse_loss))
    assert updates == [other.meta_update(tasks, mse_loss) for _ in range(2)]


def test_meta_update_without_grad_mode_is_that_with_it():
    model, tasks = mlp(), [task() for _ in range(2)]
    one, other = MetaMAML(model, 0.1, 0.1), MetaMAML(copy.deepcopy(model), 0.1, 0.1)
    with torch.no_grad():
        got = [one.meta_update(tasks, mse_loss, kl_radius=0.1) for _ in range(2)]
    assert got == [other.meta_update(tasks, mse_loss, kl_radius=0.1) for _ in range(2)]


def test_constructor_in_inference_mode_trains_outside_and_refuses_a_model_made_there():
    model, tasks = mlp(), [task()]
    with torch.inference_mode():
        maml, made = MetaMAML(model, 0.1, 0.1, learn_inner_lr=True), nn.Linear(4, 1)
        with pytest.raises(ValueError, match=r"^MetaMAML: model must be made outside torch.inference_mode, got weight"):
            MetaMAML(made, 0.1, 0.1)
    other = MetaMAML(copy.deepcopy(model), 0.1, 0.1, learn_inner_lr=True)
    for _ in range(2):
        assert maml.meta_update(tasks, mse_loss) == other.meta_update(tasks, mse_loss)


# ------------------------------------------------------------------------------------- numbers, buffers, shared names


def test_numpy_numbers_are_those_of_python():
    model, tasks = mlp(), [task() for _ in range(3)]
    given = {"inner_steps": np.int64(2), "micro_batch": np.int32(2), "first_order": False}
    one = MetaMAML(model, np.float64(0.1), np.float64(0.01), **given)
    other = MetaMAML(copy.deepcopy(model), 0.1, 0.01, inner_steps=2, micro_batch=2)
    for name in ("inner_lr", "outer_lr", "inner_steps", "micro_batch"):
        assert type(getattr(one, name)) is type(getattr(other, name)), name
    assert one.meta_update(tasks, mse_loss, kl_radius=np.float32(0.25)) == other.meta_update(
        tasks, mse_loss, kl_radius=0.25
    )
    sx, sy, *_ = tasks[0]
    for p, q in zip(
        one.adapt(sx, sy, mse_loss, np.uint8(3)).parameters(),
        other.adapt(sx, sy, mse_loss, 3).parameters(),
        strict=True,
    ):
        assert torch.equal(p, q)
    for bad in (np.float64(2), np.bool_(True), np.array([1, 2])):
        with pytest.raises(TypeError, match="inner_steps must be an integer"):
            MetaMAML(model, 0.1, 0.1, inner_steps=bad)


class Rescaled(nn.Module):
    """Counts its calls in a buffer, in place, and scales by the buffer."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()
        self.register_buffer("scale", torch.ones(1, dtype=torch.float64))

    def forward(self, x):
        self.scale.mul_(2)
        return self.inner(x) * self.scale


def test_calls_of_a_model_that_changes_a_buffer_leave_it():
    maml, (sx, sy, qx, qy) = MetaMAML(Rescaled(), 0.01, 0.1), task()
    adapted = maml.adapt(sx, sy, mse_loss, 3)
    for count in (1, 3):
        maml.meta_update([(sx, sy, qx, qy)] * count, mse_loss)
    maml.call(maml.parameters(), sx)
    assert float(maml.model.scale) == 1 and float(adapted.scale) == 1


@pytest.mark.parametrize("call", ["adapt", "adapt_params", "task_losses", "meta_update"])
def test_calls_of_batch_norm_in_training_mode_are_refused_and_run_in_eval_mode(call):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)).double()
    maml, data = MetaMAML(model, 0.1, 0.1), task()
    arguments = {
        "adapt": (*data[:2], mse_loss),
        "adapt_params": (maml.parameters(), *data[:2], mse_loss),
        "task_losses": (maml.parameters(), [data, data], mse_loss),
        "meta_update": ([data, data], mse_loss),
    }[call]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"1 \(BatchNorm1d\) must be in eval mode, got training mode"):
        getattr(maml, call)(*arguments)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    model.eval()
    getattr(maml, call)(*arguments)


def test_inner_parameters_any_name_of_a_shared_submodule_selects_it():
    model = Shared().double()
    for name in ("a", "b", "layers.0", "b.weight"):
        maml = MetaMAML(model, 0.1, 0.1, inner_parameters=name)
        assert maml.inner_names == (["a.weight"] if name == "b.weight" else ["a.weight", "a.bias"])


# ------------------------------------------------------------------------------------------------- inference tensors


def test_pure_functions_inference_tensors_outside_are_as_others():
    model, tasks = mlp(), [task(), task()]
    maml = MetaMAML(model, 0.1, 0.1)
    with torch.inference_mode():
        params = {name: p.clone() for name, p in maml.parameters().items()}
        x = tasks[0][0].clone()
    torch.testing.assert_close(maml.call(maml.parameters(), x), model(tasks[0][0]))
    assert maml.call(maml.parameters(), x).requires_grad
    wanted, got = (maml.adapt_params(p, *tasks[0][:2], mse_loss) for p in (maml.parameters(), params))
    for name, p in wanted.items():
        torch.testing.assert_close(got[name], p)
    torch.testing.assert_close(
        maml.task_losses(params, tasks, mse_loss), maml.task_losses(maml.parameters(), tasks, mse_loss)
    )
    with torch.inference_mode():
        torch.testing.assert_close(maml.adapt_params(params, *tasks[0][:2], mse_loss), {**wanted})
