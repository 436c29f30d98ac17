"""MetaMAML: gradients against plain autograd, batching against a loop, the contract of its calls."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

from eaml_ext.meta import MetaMAML
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
    maml = MetaMAML(model, 0.1, 0.1)
    before = copy.deepcopy(model.state_dict())
    sx, sy, qx, qy = task()
    loss = maml.meta_update([(sx, sy * torch.nan, qx, qy)], mse_loss)
    assert loss != loss and maml.skipped_updates == 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


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
    yield lambda: maml.adapt(x, y, lambda p, t: 0.0, 1), ValueError, "loss_fn must return a scalar"


@pytest.mark.parametrize("call, error, text", list(bad_calls()), ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_gets_one_sentence(call, error, text):
    with pytest.raises(error) as info:
        call()
    assert text in str(info.value) and "\n" not in str(info.value)
