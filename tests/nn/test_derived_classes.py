"""higher derives classes from modules and TorchOpt swaps parameters: both differentiate every model."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

from eaml_ext.nn import SSM, EpisodicRead, KNNAttention, Mamba, Mamba2, SSMLayer, Stateful
from eaml_ext.nn.cores import CORES, Core
from eaml_ext.rl import SSMMetaPolicy

RATE = 0.1


def task(core):
    """Return a model, its data, its loss of the parameters, and the meta-gradient of one inner step by torch.func."""
    net = SSM(3, 8, 2, state_size=2, core=core).double()
    x, y = torch.randn(2, 6, 3, dtype=torch.float64), torch.randn(2, 6, 2, dtype=torch.float64)
    params = {name: p.detach().clone() for name, p in net.named_parameters()}

    def loss(p):
        return (functional_call(net, p, (x,)) - y).square().mean()

    want = grad(lambda p: loss({name: p[name] - RATE * g for name, g in grad(loss)(p).items()}))(params)
    return net, x, y, loss, want


@pytest.mark.parametrize("core", sorted(CORES))
def test_higher_meta_gradient_equals_torch_func(core):
    higher = pytest.importorskip("higher", reason="higher is not installed: pip install 'eaml_ext[bench]'")
    net, x, y, _, want = task(core)
    inner = torch.optim.SGD(net.parameters(), lr=RATE)
    with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fast, optimizer):
        optimizer.step((fast(x) - y).square().mean())
        got = torch.autograd.grad((fast(x) - y).square().mean(), list(net.parameters()))
    torch.testing.assert_close(list(got), list(want.values()))


@pytest.mark.parametrize("core", sorted(CORES))
def test_torchopt_meta_gradient_equals_torch_func(core):
    torchopt = pytest.importorskip("torchopt", reason="TorchOpt is not installed: pip install 'eaml_ext[bench]'")
    net, x, y, loss, want = task(core)
    params = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    stepped = torchopt.FuncOptimizer(torchopt.sgd(lr=RATE)).step(loss(params), params)
    got = torch.autograd.grad(loss(stepped), list(params.values()))
    torch.testing.assert_close(list(got), list(want.values()))
    meta = tuple(net.parameters())
    torchopt.MetaSGD(net, lr=RATE).step((net(x) - y).square().mean())
    got = torch.autograd.grad((net(x) - y).square().mean(), meta)
    torch.testing.assert_close(list(got), list(want.values()))


MODELS = {
    **{core: lambda core=core: SSM(3, 8, 2, core=core) for core in CORES},
    "SSMLayer": lambda: SSMLayer(3, 8),
    "Stateful": lambda: Stateful(SSM(3, 8, 2)),
    "Mamba": lambda: Mamba(4),
    "Mamba2": lambda: Mamba2(4, 4, headdim=4),
    "EpisodicRead": lambda: EpisodicRead(4, 2, 2, 2),
    "KNNAttention": lambda: KNNAttention(4, 4, 1, 2),
    "SSMMetaPolicy": lambda: SSMMetaPolicy(3, 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_module_has_the_metaclass_type_and_classes_derive_from_it(name):
    """higher derives a class from its own base and the type of each submodule."""
    base = type("Patched", (nn.Module,), {})
    for module in MODELS[name]().modules():
        assert type(type(module)) is type
        assert issubclass(type("Derived", (base, type(module)), {}), type(module))


def test_core_without_scan_raises_not_implemented():
    with pytest.raises(NotImplementedError, match=r"^Core: scan is not defined$"):
        Core(2, 2).scan(torch.zeros(1, 1, 2))


@pytest.mark.parametrize("base, sizes", [(SSM, (3, 8, 2)), (Mamba, (8,))])
def test_class_whose_scan_takes_no_boundaries_is_called_as_before(base, sizes):
    class Derived(base):
        def scan(self, x, state=None, reset=None):
            return super().scan(x, state, reset)

    torch.manual_seed(0)
    model, x = Derived(*sizes), torch.randn(2, 5, sizes[0])
    assert torch.equal(model(x), base.scan(model, x)[0])
