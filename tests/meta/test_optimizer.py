"""Optimizers that need a closure are refused when they are made; numbers that are not finite are found."""

import copy
import math
import threading

import pytest
import torch
from torch import nn

from eaml_ext.adaptation import Adapter
from eaml_ext.meta import MetaMAML, MetaMAMLTrainer
from eaml_ext.meta._optimizer import finite


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimisation: two evaluations a step; ``step`` takes a closure by default None."""

    first_step = second_step = torch.optim.SGD.step

    def __init__(self, params, lr, base=torch.optim.SGD):
        super().__init__(params, {"lr": lr})
        self.base = base(self.param_groups, lr=lr)

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is not None, "SAM requires a closure"
        moved = [(p, 0.05 * p.grad / (p.grad.norm() + 1e-12)) for p in self.param_groups[0]["params"]]
        for p, by in moved:
            p.add_(by)
        self.zero_grad()
        with torch.enable_grad():
            closure()
        for p, by in moved:
            p.sub_(by)
        self.base.step()


class Quasi(torch.optim.SGD):
    def step(self, closure):
        closure()
        super().step()


MAKERS = {
    "MetaMAML": lambda model, optimizer: MetaMAML(model, 0.1, 0.1, optimizer=optimizer),
    "MetaMAMLTrainer": lambda model, optimizer: MetaMAMLTrainer(model, optimizer=optimizer, kl_radii=[0, 0.5]),
    "Adapter": lambda model, optimizer: Adapter(model, optimizer=optimizer),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, Sam, Quasi])
def test_constructor_optimizer_that_needs_a_closure_is_refused(make, optimizer):
    model = nn.Linear(3, 1)
    before, grad = model.weight.detach().clone(), torch.ones(1, 3)
    model.weight.grad = grad
    with pytest.raises(ValueError, match=f"^(MetaMAML|Adapter): optimizer must step .*, got {optimizer.__name__}, "):
        make(model, optimizer)
    assert torch.equal(model.weight, before) and model.weight.grad is grad and torch.equal(grad, torch.ones(1, 3))


class Slow(torch.optim.Optimizer):
    """Fails on its first step, whatever it is given: no matter of closures."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        raise RuntimeError("call train() first")


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.SGD,
        torch.optim.AdamW,
        torch.optim.Adagrad,
        torch.optim.RMSprop,
        torch.optim.Adafactor,
        lambda params, lr: torch.optim.SGD([{"params": params[:1], "momentum": 0.9}, {"params": params[1:]}], lr=lr),
        Slow,
    ],
)
def test_constructor_other_optimizers_are_accepted_and_untouched(make, optimizer):
    model = nn.Linear(3, 1)
    before = model.weight.detach().clone()
    made = make(model, optimizer)
    inner = made._optimizer if isinstance(made, Adapter) else getattr(made, "maml", made).optimizer
    fresh = optimizer([*nn.Linear(3, 1).parameters()], lr=0.1).state_dict()["state"]
    for index, state in inner.state_dict()["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(fresh[index][k])) for k, v in state.items())
    assert torch.equal(model.weight, before) and model.weight.grad is None
    assert all(p.grad is None for group in inner.param_groups for p in group["params"])
    assert inner.param_groups[0]["params"][0] is model.weight


class Scheduled(torch.optim.SGD):
    """A scheduler in the constructor makes ``step`` an attribute of the instance, bound to this optimizer."""

    steps = 0

    def __init__(self, params, lr):
        super().__init__(params, lr, momentum=0.9, weight_decay=0.5)
        self.schedule = torch.optim.lr_scheduler.StepLR(self, 1)

    def step(self, closure=None):
        type(self).steps += 1
        return super().step(closure)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_constructor_optimizer_with_scheduler_takes_no_step(make):
    model = nn.Linear(3, 1)
    before = model.weight.detach().clone()
    Scheduled.steps = 0
    make(model, Scheduled)
    assert not Scheduled.steps and torch.equal(model.weight, before)


def _needs_closure_in_step(error):
    class Unmarked(torch.optim.SGD):
        def step(self, closure=None):
            raise error

    return Unmarked


@pytest.mark.parametrize("make", ["MetaMAML", "Adapter"])
@pytest.mark.parametrize(
    "error",
    [
        AssertionError("two evaluations"),
        NotImplementedError(),
        TypeError("closure is None"),
        TypeError("'NoneType' object is not callable"),
        RuntimeError("x"),
    ],
)
def test_step_without_required_closure_raises_one_sentence(make, error):
    model, x, y = nn.Linear(3, 1), torch.randn(5, 3), torch.randn(5, 1)
    made = MAKERS[make](model, _needs_closure_in_step(error))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Exception) as info:
        if make == "Adapter":
            made.adapt(nn.functional.mse_loss, {"states": x, "targets": y})
        else:
            made.meta_update([(x, y, x, y)], nn.functional.mse_loss)
    if isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError):
        assert info.value is error
    else:
        wanted = f"{make}.{'adapt' if make == 'Adapter' else 'meta_update'}: optimizer must step from gradients alone"
        assert str(info.value) == f"{wanted}, got Unmarked, whose step raised {error!r}"
        assert type(info.value) is ValueError
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("make", ["MetaMAML", "Adapter"])
def test_load_state_dict_twice_from_one_state_gives_the_same_steps(make, optimizer, mode):
    model, x, y = nn.Linear(3, 1), torch.randn(5, 3), torch.randn(5, 1)
    made = MAKERS[make](model, optimizer)

    def steps(count):
        if make == "Adapter":
            return [made.adapt(nn.functional.mse_loss, {"states": x, "targets": y}) for _ in range(count)]
        return [made.meta_update([(x, y, x, y)], nn.functional.mse_loss) for _ in range(count)]

    steps(2)
    with mode():
        weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(made.state_dict())
    results = []
    for _ in range(3):
        with mode():
            model.load_state_dict(weights)
            made.load_state_dict(state)
        results.append(steps(3))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("make", ["MetaMAML", "Adapter"])
@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda o: o.update(param_groups=3), "optimizer must have a dict of states and a list of param_groups, got"),
        (lambda o: o.update(param_groups=[{}]), r"optimizer has parameter groups of \[0\], wanted \[2\]"),
        (lambda o: o["param_groups"][0].pop("lr"), "optimizer has a parameter group without lr"),
        (lambda o: o["state"].update({9: {}}), "optimizer has a state of 9, which is no parameter"),
        (lambda o: o.clear(), "optimizer must be the state_dict of an optimizer, got dict"),
    ],
)
def test_load_state_dict_malformed_optimizer_raises_one_sentence(make, spoil, text):
    made = MAKERS[make](nn.Linear(3, 1), torch.optim.Adam)
    state = copy.deepcopy(made.state_dict())
    spoil(state["optimizer"])
    with pytest.raises((TypeError, ValueError), match=f"^{make}.load_state_dict: {text}"):
        made.load_state_dict(state)


def test_constructor_optimizer_that_cannot_be_copied_is_accepted():
    class Locked(torch.optim.SGD):
        def __init__(self, params, lr):
            super().__init__(params, lr)
            self.lock = threading.Lock()

    assert isinstance(MetaMAML(nn.Linear(3, 1), 0.1, 0.1, optimizer=Locked).optimizer, Locked)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_finite_one_bad_number_among_tensors_is_found(bad, dtype):
    largest = torch.tensor([torch.finfo(dtype).max, -torch.finfo(dtype).max], dtype=dtype)
    others = [None, torch.empty(0), torch.tensor(3), torch.tensor([1e300], dtype=torch.float64)]
    assert finite(largest, *others, torch.tensor(2.0))
    assert not finite(largest, *others, torch.tensor([1.0, bad, 2.0], dtype=dtype))
    assert finite() and finite(None, torch.tensor([1, 2]))


@pytest.mark.parametrize("view", [lambda t: t.conj(), lambda t: t.conj().imag], ids=["conjugate", "negative"])
@pytest.mark.parametrize("count", [3, 10_000])
def test_finite_lazy_conjugates_are_read(view, count):
    numbers = torch.complex(torch.randn(count), torch.randn(count))
    assert finite(view(numbers))
    numbers[1] = complex(0.0, math.inf)
    assert not finite(view(numbers))


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_finite_last_number_of_a_large_tensor_is_found(bad):
    numbers = torch.full((100_000,), torch.finfo(torch.float32).max)
    assert finite(numbers)
    numbers[-1] = bad
    assert not finite(numbers)


class Conjugated(nn.Module):
    """A model in which the gradient of the weight has the conjugate bit."""

    def __init__(self):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(3, 3, dtype=torch.complex64)), nn.Linear(3, 1)

    def forward(self, x):
        return self.head((x.to(torch.complex64) @ self.weight.conj()).real)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("count", [1, 2])
def test_meta_update_gradient_with_conjugate_bit_takes_the_step_of_backward(optimizer, count):
    model = Conjugated()
    other = copy.deepcopy(model)
    # The inner loop leaves the weight as it is, to a step that rounds to none.
    maml = MetaMAML(model, 1e-30, 0.01, inner_parameters="head", first_order=True, optimizer=optimizer)
    tasks = [tuple(torch.randn(5, n) for n in (3, 1, 3, 1)) for _ in range(count)]
    maml.meta_update(tasks, nn.functional.mse_loss)
    plain = optimizer(other.parameters(), lr=0.01)
    (sum(nn.functional.mse_loss(other(x), y) for _, _, x, y in tasks) / count).backward()
    for p in other.parameters():
        p.grad = p.grad.resolve_conj()
    plain.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
