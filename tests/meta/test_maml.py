"""The contract of MetaMAML: its calls, parameters that change, states, inference mode, refused arguments."""

import copy

import numpy as np
import pytest
import torch
from meta_tasks import assert_moved, mlp, task
from torch import nn
from torch.nn.functional import mse_loss
from user_models import Shared

from eaml_ext.meta import MetaMAML


def test_meta_update_repeated_lowers_losses_and_adaptation_lowers_them_more():
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


def test_adapt_support_set_returns_detached_copy_and_leaves_model():
    model = nn.Linear(4, 1)
    maml = MetaMAML(model, 0.1, 0.01)
    before = copy.deepcopy(model.state_dict())
    x, y = torch.randn(10, 4), torch.randn(10, 1)
    adapted = maml.adapt(x, y, nn.MSELoss(), 5)
    assert isinstance(adapted, nn.Linear) and adapted is not model
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert mse_loss(adapted(x), y) < mse_loss(model(x), y)
    assert adapted.weight.requires_grad and adapted.weight.grad_fn is None and model.weight.grad is None


def test_adapt_three_steps_equal_gradient_descent():
    model = nn.Linear(2, 1, bias=False)
    x, y = torch.randn(5, 2), torch.randn(5, 1)
    w = model.weight.detach().clone().requires_grad_()
    for _ in range(3):
        (g,) = torch.autograd.grad(mse_loss(x @ w.T, y), w)
        w = (w - 0.2 * g).detach().requires_grad_()
    assert torch.allclose(MetaMAML(model, 0.2, 1.0).adapt(x, y, mse_loss, 3).weight, w, atol=1e-6)
    same = MetaMAML(model, 0.2, 1.0).adapt(x, y, mse_loss, 0)
    assert torch.equal(same.weight, model.weight)


def test_meta_update_frozen_parameters_stay():
    model = mlp()
    model[0].requires_grad_(False)
    frozen = model[0].weight.clone()
    maml = MetaMAML(model, 0.1, 0.1)
    maml.meta_update([task(), task()], mse_loss)
    sx, sy, *_ = task()
    assert torch.equal(maml.adapt(sx, sy, mse_loss)[0].weight, frozen) and torch.equal(model[0].weight, frozen)


def test_meta_update_non_finite_loss_is_skipped():
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


def test_meta_update_non_finite_gradient_of_finite_loss_is_skipped():
    maml = MetaMAML(nn.Linear(1, 1, bias=False).double(), 0.1, 0.1)
    before = maml.model.weight.clone()
    zero = torch.zeros(1, 1, dtype=torch.float64)

    def root(prediction, target):  # infinite slope at 0
        return (prediction - target).abs().sum().sqrt()

    loss = maml.meta_update([(zero, zero + 1, zero, zero)], root)
    assert loss == 0 and maml.skipped_updates == 1 and torch.equal(maml.model.weight, before)


def test_adapt_last_layer_only_leaves_body_which_meta_update_learns():
    maml = MetaMAML(mlp(), 0.1, 0.1, inner_parameters="2")
    sx, sy, *_ = task()
    adapted = maml.adapt(sx, sy, mse_loss, 3)
    assert torch.equal(adapted[0].weight, maml.model[0].weight)
    assert not torch.equal(adapted[2].weight, maml.model[2].weight)
    body = maml.model[0].weight.clone()
    maml.meta_update([task()], mse_loss)
    assert not torch.equal(maml.model[0].weight, body)  # the outer loop learns it


def test_inner_lrs_after_meta_updates_have_moved_and_scale_adaptation():
    torch.manual_seed(0)
    maml = MetaMAML(nn.Linear(4, 1).double(), 0.01, 0.02, learn_inner_lr=True)
    x, y = torch.randn(20, 4).double(), torch.randn(20, 1).double()
    for _ in range(20):
        maml.meta_update([(x, y, x, y)], mse_loss)
    assert all(bool((rate != 0.01).all()) for rate in maml.inner_lrs.values())
    start = maml.model.weight.detach()
    (g,) = torch.autograd.grad(mse_loss(maml.model(x), y), maml.model.weight)
    torch.testing.assert_close(maml.adapt(x, y, mse_loss, 1).weight, start - maml.inner_lrs["weight"] * g)


def test_meta_update_reptile_repeated_lowers_losses():
    torch.manual_seed(0)
    maml = MetaMAML(mlp(), 0.1, 0.01, inner_steps=3, reptile=True)
    w = torch.randn(4, 1).double()

    def near():
        x = torch.randn(20, 4).double()
        return x[:10], x[:10] @ w, x[10:], x[10:] @ w

    losses = [maml.meta_update([near() for _ in range(4)], mse_loss) for _ in range(150)]
    assert sum(losses[-20:]) < 0.2 * sum(losses[:20])


def test_load_state_dict_other_maml_continues_with_same_bits():
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
def test_maml_bad_argument_raises_one_sentence(call, error, text):
    with pytest.raises(error) as info:
        call()
    assert text in str(info.value) and "\n" not in str(info.value)


def test_meta_update_loss_of_other_dtype_is_accepted():
    def loss(y, target):
        return mse_loss(y.double(), target.double())

    x, y = torch.randn(5, 2), torch.randn(5, 1)
    maml = MetaMAML(nn.Linear(2, 1), 0.1, 0.01)
    assert maml.meta_update([(x, y, x, y)] * 3, loss, kl_radius=0.1) > 0


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
def test_meta_update_parameter_missing_in_optimizer_is_refused(change):
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


def test_adapt_learned_rate_of_replaced_parameter_is_refused():
    model, (sx, sy, *_) = mlp(), task()
    maml = MetaMAML(model, 0.1, 0.1, learn_inner_lr=True)
    model[0], model[2] = nn.Linear(4, 5).double(), nn.Linear(5, 1).double()
    with pytest.raises(ValueError, match=r"^MetaMAML.adapt_params: .*0.weight was unfrozen or replaced .* make a new"):
        maml.adapt(sx, sy, mse_loss)


def test_calls_all_parameters_frozen_are_refused():
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


@pytest.mark.parametrize("inside", [False, True])
def test_calls_inference_tensors_and_mode_equal_those_outside(inside):
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


def test_meta_update_no_grad_mode_equals_that_with_grad():
    model, tasks = mlp(), [task() for _ in range(2)]
    one, other = MetaMAML(model, 0.1, 0.1), MetaMAML(copy.deepcopy(model), 0.1, 0.1)
    with torch.no_grad():
        got = [one.meta_update(tasks, mse_loss, kl_radius=0.1) for _ in range(2)]
    assert got == [other.meta_update(tasks, mse_loss, kl_radius=0.1) for _ in range(2)]


def test_maml_made_in_inference_mode_trains_outside_and_refuses_a_model_made_there():
    model, tasks = mlp(), [task()]
    with torch.inference_mode():
        maml, made = MetaMAML(model, 0.1, 0.1, learn_inner_lr=True), nn.Linear(4, 1)
        with pytest.raises(ValueError, match=r"^MetaMAML: model must be made outside torch.inference_mode, got weight"):
            MetaMAML(made, 0.1, 0.1)
    other = MetaMAML(copy.deepcopy(model), 0.1, 0.1, learn_inner_lr=True)
    for _ in range(2):
        assert maml.meta_update(tasks, mse_loss) == other.meta_update(tasks, mse_loss)


def test_maml_numpy_numbers_equal_those_of_python():
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


def test_calls_forward_changes_buffer_leave_it():
    maml, (sx, sy, qx, qy) = MetaMAML(Rescaled(), 0.01, 0.1), task()
    adapted = maml.adapt(sx, sy, mse_loss, 3)
    for count in (1, 3):
        maml.meta_update([(sx, sy, qx, qy)] * count, mse_loss)
    maml.call(maml.parameters(), sx)
    assert float(maml.model.scale) == 1 and float(adapted.scale) == 1


@pytest.mark.parametrize("call", ["adapt", "adapt_params", "task_losses", "meta_update"])
def test_calls_batch_norm_in_training_mode_are_refused_and_run_in_eval_mode(call):
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


def test_inner_parameters_any_name_of_shared_submodule_selects_it():
    model = Shared().double()
    for name in ("a", "b", "layers.0", "b.weight"):
        maml = MetaMAML(model, 0.1, 0.1, inner_parameters=name)
        assert maml.inner_names == (["a.weight"] if name == "b.weight" else ["a.weight", "a.bias"])


def test_pure_functions_inference_tensors_outside_equal_those_of_others():
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
