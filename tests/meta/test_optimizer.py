"""Optimizers that need a closure are refused when they are made."""

import threading

import pytest
import torch
from torch import nn

from eaml_ext.adaptation import Adapter
from eaml_ext.meta import MetaMAML, MetaMAMLTrainer


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimisation: two evaluations a step; ``step`` takes a closure by default None."""

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
    "MetaMAMLTrainer": lambda model, optimizer: MetaMAMLTrainer(model, optimizer=optimizer, shift_levels=[0, 0.5]),
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


def test_constructor_optimizer_that_cannot_be_copied_is_accepted():
    class Locked(torch.optim.SGD):
        def __init__(self, params, lr):
            super().__init__(params, lr)
            self.lock = threading.Lock()

    assert isinstance(MetaMAML(nn.Linear(3, 1), 0.1, 0.1, optimizer=Locked).optimizer, Locked)
