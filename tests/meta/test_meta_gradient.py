"""Meta-gradients against plain autograd and torch.func; micro-batches, Reptile and compilation."""

import copy
import warnings

import pytest
import torch
from meta_tasks import assert_same_gradient, gradients, mlp, sequences, task
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, vmap
from torch.nn.functional import l1_loss, mse_loss

from eaml_ext.meta import MetaMAML
from eaml_ext.meta.kl_dro import kl_dro_weights
from eaml_ext.nn import SSM


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
def test_meta_gradient_any_model_and_shapes_equals_autograd_through_a_loop(kind, steps, first_order):
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


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("prefix", [None, "2", ("0.bias", "2")])
def test_meta_gradient_learned_rates_and_prefixes_equals_autograd_through_a_loop(prefix, first_order):
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


def test_meta_update_reptile_moves_towards_adapted_parameters():
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


class Counting(nn.Module):
    """Records how many tasks each call of the model computes at once."""

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
def test_meta_gradient_micro_batch_is_equal_with_fewer_tasks_at_once(options, kl_radius):
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
def test_meta_gradient_pure_function_equals_tape(options, first_order, monkeypatch):
    monkeypatch.setattr("eaml_ext.meta._meta_gradient.try_compile", lambda function: function)
    model, tasks = mlp(), [task(m=6 if i % 2 else 3) for i in range(5)]
    plain = gradients(MetaMAML(model, 0.1, 1e-3, first_order, inner_steps=2, **options), tasks, 0.2)
    pure = gradients(MetaMAML(model, 0.1, 1e-3, first_order, inner_steps=2, compile=True, **options), tasks, 0.2)
    assert_same_gradient(plain, pure)


@pytest.mark.parametrize("kind", ["mlp", "ssm"])
def test_meta_update_compiled_equals_uncompiled(kind):
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


def test_meta_update_compilation_fails_warns_and_runs_uncompiled(monkeypatch):
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


def test_meta_update_compiled_loss_not_scalar_raises_its_error(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with pytest.raises(ValueError, match="loss_fn must return a scalar"):
        MetaMAML(mlp(), 0.1, 0.1, compile=True).meta_update([task()], lambda p, t: p - t)


def losses_under_torch_func(maml, params, tasks, loss_fn):
    return vmap(lambda _: maml.task_losses(params, tasks, loss_fn))(torch.zeros(1))[0]


@pytest.mark.parametrize("detached", [(), ("0.weight",), None], ids=str)
@pytest.mark.parametrize("loss_fn", [mse_loss, lambda y, target: target.square().mean()], ids=["used", "unused"])
def test_task_losses_any_parameters_equal_those_under_torch_func(detached, loss_fn):
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
def test_task_losses_weight_in_the_loss_has_gradient_through_inner_loop(detached):
    maml, tasks = MetaMAML(mlp(), 0.1, 0.01, inner_steps=2), [task() for _ in range(3)]
    params = {n: p.detach() if detached else p for n, p in maml.parameters().items()}
    weight = torch.tensor(1.5, requires_grad=True, dtype=tasks[0][0].dtype)

    def loss_fn(y, target):
        return weight * mse_loss(y, target)

    losses, wanted = maml.task_losses(params, tasks, loss_fn), losses_under_torch_func(maml, params, tasks, loss_fn)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), weight) for x in (losses, wanted)))


def test_task_losses_forward_mode_has_tangent_of_jvp():
    maml, tasks = MetaMAML(mlp(), 0.1, 0.01, inner_steps=2), [task() for _ in range(3)]
    params = {name: p.detach() for name, p in maml.parameters().items()}
    tangents = {name: torch.randn_like(p) for name, p in params.items()}
    wanted = jvp(lambda p: maml.task_losses(p, tasks, mse_loss), (params,), (tangents,))[1]
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p, tangents[name]) for name, p in params.items()}
        torch.testing.assert_close(forward_ad.unpack_dual(maml.task_losses(duals, tasks, mse_loss)).tangent, wanted)


def test_meta_update_one_loss_per_task_uses_each():
    model, tasks = mlp(), [task() for _ in range(4)]
    mine = [mse_loss, l1_loss, mse_loss, l1_loss]
    maml = MetaMAML(model, 0.1, 1e-3)
    alone = [maml.task_losses(maml.parameters(), [t], f) for t, f in zip(tasks, mine, strict=True)]
    loss = maml.meta_update(tasks, mine)
    torch.testing.assert_close(maml.last_losses, torch.cat(alone))
    assert loss == pytest.approx(float(torch.cat(alone).mean()))


def test_meta_gradient_kl_radius_is_gradient_of_weighted_mean():
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
