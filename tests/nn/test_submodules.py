"""Submodules whose weights the ops read: adapters, pruning, norms, hooks and quantised layers take effect."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from eaml_ext.nn import SSM, Mamba
from eaml_ext.nn.cores import CORES, make_core
from eaml_ext.nn.submodule import is_plain, reference_weight

PROJECTIONS = ["in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"]
READ = ["conv1d", "dt_proj"]  # their weights go to the op without a call of the layer


def block(**options):
    return Mamba(6, d_state=3, **options).double()


def sequence(length=9):
    return torch.randn(2, length, 6, dtype=torch.float64)


class Scaled(nn.Module):
    """An adapter without a ``weight``: a base layer and a learned factor on its output."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.factor = nn.Parameter(torch.full((), 1.5, dtype=torch.float64))

    def forward(self, x):
        return self.factor * self.base(x)


def folded(m, name):
    """Return a block whose weights are multiplied by the adapter's factor."""
    other, layer = block(), getattr(m, name)
    other.load_state_dict({k.replace(".base", ""): v for k, v in m.state_dict().items() if "factor" not in k})
    with torch.no_grad():
        for p in getattr(other, name).parameters():
            p.mul_(layer.factor)
    return other


def assert_equal_in_every_call(m, want):
    """Compare ``m`` with the plain block ``want``: scan, steps, split scans, resets, lengths, zero steps."""
    x = sequence()
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[0, [0, 4, 5]] = reset[1, 8] = True
    before = want.scan(sequence(3))[1]
    torch.testing.assert_close(m(x), want(x))
    for options in (
        {},
        {"reset": reset},
        {"lengths": torch.tensor([3, 9])},
        {"reset": reset, "lengths": torch.tensor([0, 6])},
    ):
        for no_grad in (False, True):
            with torch.no_grad() if no_grad else contextlib.nullcontext():
                torch.testing.assert_close(m.scan(x, before, **options), want.scan(x, before, **options))
    torch.testing.assert_close(m.step(x[:, 0], *before), want.step(x[:, 0], *before))
    torch.testing.assert_close(m.scan(x[:, :0], before), want.scan(x[:, :0], before))


@pytest.mark.parametrize("name", PROJECTIONS)
def test_mamba_adapter_around_a_submodule_takes_effect(name):
    m = block()
    plain = m(x := sequence())
    setattr(m, name, Scaled(getattr(m, name)))
    assert not torch.allclose(m(x), plain)
    assert_equal_in_every_call(m, folded(m, name))
    (g,) = torch.autograd.grad(m(x).square().sum(), getattr(m, name).factor)
    assert g.abs() > 0


@pytest.mark.parametrize("name", READ)
def test_mamba_adapter_gradients_equal_those_of_the_folded_weight(name):
    m, x = block(), sequence()
    setattr(m, name, Scaled(getattr(m, name)))
    other = folded(m, name)
    factor, base = getattr(m, name).factor, getattr(m, name).base
    loss, same = m(x).square().sum(), other(x).square().sum()
    first, weight = torch.autograd.grad(loss, [factor, base.weight], create_graph=True)
    grads = torch.autograd.grad(same, list(getattr(other, name).parameters()))
    own = [(g * p).sum() / factor for g, p in zip(grads, getattr(other, name).parameters(), strict=True)]
    torch.testing.assert_close(first, sum(own))
    torch.testing.assert_close(weight, factor * grads[0])
    (second,) = torch.autograd.grad(first, factor)
    assert second.isfinite() and second != 0


@pytest.mark.parametrize(
    ("name", "tensor"), [*((name, "weight") for name in PROJECTIONS), *((name, "bias") for name in READ)]
)
def test_mamba_pruned_submodule_trains_with_its_mask(name, tensor):
    m = block()
    prune.random_unstructured(getattr(m, name), tensor, 0.5)
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    for _ in range(2):  # a second backward needs the mask to be applied again
        m(sequence()).square().mean().backward()
        optimizer.step()
    x = sequence()
    y = m(x)
    prune.remove(getattr(m, name), tensor)
    torch.testing.assert_close(y, m(x))
    assert (getattr(getattr(m, name), tensor) == 0).any()


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("norm", [weight_norm, parametrizations.weight_norm, parametrizations.spectral_norm])
def test_mamba_reparametrised_submodule_trains_twice(name, norm):
    m = block().eval()
    norm(getattr(m, name))
    for _ in range(2):
        with torch.no_grad():
            for p in getattr(m, name).parameters():
                p.mul_(1.5)  # the weight must be computed again
        m(sequence()).square().mean().backward()
    want = block()
    with torch.no_grad():
        m(sequence())
        own = {k: v for k, v in m.state_dict().items() if not k.startswith(f"{name}.")}
        want.load_state_dict(own | {f"{name}.{k}": getattr(getattr(m, name), k) for k in ("weight", "bias")})
    assert_equal_in_every_call(m, want)


@pytest.mark.parametrize("name", READ)
def test_mamba_hooks_of_a_submodule_run_and_change_the_output(name):
    m, x, runs = block(), sequence(), []
    plain = m(x)

    def zero(module, args, output):
        runs.append(output.shape)
        return 0 * output

    handle = getattr(m, name).register_forward_hook(zero)
    changed = m(x)
    m.step(x[:, 0], *m.allocate_inference_cache(2))
    assert len(runs) == 2 and not torch.allclose(changed, plain)
    handle.remove()
    torch.testing.assert_close(m(x), plain, rtol=0, atol=0)
    handle = getattr(m, name).register_forward_pre_hook(lambda module, args: runs.append(args[0].shape))
    m(x)
    assert len(runs) == 3
    handle.remove()
    getattr(m, name).register_full_backward_hook(lambda module, before, after: runs.append(after[0].shape))
    m(x).sum().backward()
    assert len(runs) == 4


def test_mamba_global_hooks_see_every_submodule():
    m, seen = block(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        m(sequence())
    finally:
        handle.remove()
    assert {id(m.conv1d), id(m.dt_proj)} < {id(module) for module in seen}


@pytest.mark.parametrize("name", READ)
def test_mamba_replaced_forward_is_called(name):
    """Offloading replaces the bound ``forward`` of a module."""
    m, x, calls = block(), sequence(), []
    want, forward = m(x), getattr(m, name).forward
    getattr(m, name).forward = lambda *args: calls.append(1) or forward(*args)
    torch.testing.assert_close(m(x), want)
    assert calls == [1]


@pytest.mark.parametrize(
    "replacement",
    [nn.Conv1d(12, 12, 4, padding=3, groups=6), nn.Conv1d(12, 12, 4, padding=3)],
    ids=["six groups", "dense"],
)
def test_mamba_denser_convolution_is_called(replacement):
    m, x = block(), sequence()
    m.conv1d = replacement.double()
    inputs = m.in_proj(x).chunk(2, dim=-1)[0].mT
    seen = []
    m.act.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    m(x)
    torch.testing.assert_close(seen[0].mT, replacement(inputs)[..., :9])
    state, ys = m.allocate_inference_cache(2), []
    for t in range(9):
        y, *state = m.step(x[:, t], *state)
        ys.append(y)
    torch.testing.assert_close(torch.stack(ys, dim=1), m(x))


@pytest.mark.parametrize("options", [{"dilation": 2}, {"stride": 2}, {"padding": 0}], ids=str)
def test_mamba_convolution_of_another_length_raises(options):
    m = block()
    m.conv1d = nn.Conv1d(12, 12, 4, **{"padding": 3, "groups": 12, **options}).double()
    if "padding" in options:
        m.conv1d.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"^conv1d must map \(2, 12, 12\) to \(2, 12, 15\), got \("):
        m(sequence())


def test_is_plain_with_hooks_or_another_type_is_false():
    layer = nn.Linear(2, 2)
    assert is_plain(layer, nn.Linear) and not is_plain(layer, nn.Conv1d)
    assert not is_plain(prune.identity(nn.Linear(2, 2), "weight"), nn.Linear)
    assert not is_plain(parametrizations.weight_norm(nn.Linear(2, 2)), nn.Linear)
    assert not is_plain(type("Adapter", (nn.Linear,), {})(2, 2), nn.Linear)


def test_reference_weight_skips_weights_that_are_not_floating_point():
    quantised, layer = nn.Module(), nn.Linear(2, 2, dtype=torch.float64)
    quantised.weight = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    assert reference_weight(quantised, layer) is layer.weight
    assert reference_weight(nn.Sequential(layer)) is layer.weight
    assert reference_weight(nn.Identity()).dtype == torch.get_default_dtype()


# --- cores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CORES))
def test_core_forward_is_scan_or_step(name):
    core, x = make_core(name, 8, 4), torch.randn(2, 5, 8)
    y, state = core.scan(x)
    torch.testing.assert_close(core(x), (y, state), rtol=0, atol=0)
    torch.testing.assert_close(core(x[:, 0], state), core.step(x[:, 0], state), rtol=0, atol=0)
    with pytest.raises(TypeError, match=r"state must be a torch\.Tensor, got NoneType"):
        core(x[:, 0])


@pytest.mark.parametrize("name", sorted(CORES))
def test_ssm_hooks_of_a_core_run_in_scan_and_step(name):
    net, x, shapes = SSM(3, 8, 2, state_size=2, num_layers=2, core=name), torch.randn(2, 5, 3), []
    want = net(x), net(x[:, 0])
    handle = net.cores[1].register_forward_hook(lambda module, args, output: shapes.append(output[0].shape))
    torch.testing.assert_close((net(x), net(x[:, 0])), want, rtol=0, atol=0)
    assert shapes == [(2, 5, 8), (2, 8)]
    handle.remove()
    net.cores[0].register_forward_hook(lambda module, args, output: (0 * output[0], output[1]))
    assert not torch.allclose(net(x), want[0])


@pytest.mark.parametrize("core", ["s6", "mamba"])
def test_ssm_pruned_core_parameter_trains_with_its_mask(core):
    net = SSM(3, 8, 2, core=core)
    owner = net.cores[0] if core == "s6" else net.cores[0].block
    prune.random_unstructured(owner, "D", 0.5)
    for _ in range(2):
        net(torch.randn(2, 5, 3)).square().mean().backward()
        net.step(torch.randn(2, 3))[0].square().mean().backward()
    assert ((owner.D_orig.grad == 0) == (owner.D_mask == 0)).all()


def test_mamba_core_hooks_of_the_block_run_in_scan_and_step():
    core, x, runs = make_core("mamba", 8, 4), torch.randn(2, 5, 8), []
    y, state = core.scan(x)
    want = y, state, *core.step(x[:, 0], state)
    core.block.register_forward_hook(lambda module, args, output: runs.append(output[0].shape))
    y, state = core.scan(x)
    torch.testing.assert_close((y, state, *core.step(x[:, 0], state)), want, rtol=0, atol=0)
    assert runs == [(2, 5, 8), (2, 8)]
    core.block.register_forward_pre_hook(lambda module, args: (0 * args[0],))
    torch.testing.assert_close(core.scan(x), core.scan(0 * x), rtol=0, atol=0)


# --- quantised layers ------------------------------------------------------------------------------------------------


def quantised(module):
    from torch.ao.quantization import quantize_dynamic

    return quantize_dynamic(module.eval(), {nn.Linear})


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("core", sorted(CORES))
def test_ssm_quantised_outputs_are_close_to_float(core):
    net, x = SSM(4, 32, 3, core=core), torch.randn(2, 20, 4)
    small = quantised(net)
    assert not isinstance(small.embed, nn.Linear)
    want = net(x)
    assert 0 < (small(x) - want).abs().max() < 0.1 * want.abs().max()
    y, state = small.step(x[:, 0], small.init_hidden(2))
    assert (y - want[:, 0]).abs().max() < 0.1 * want.abs().max() and state.shape == net.init_hidden(2).shape
    with pytest.raises(TypeError, match="x must be float32, got float64"):
        small(x.double())


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mamba_quantised_outputs_are_close_to_float():
    m, x = Mamba(16), torch.randn(2, 20, 16)
    small, want = quantised(m), m(x)
    assert not isinstance(small.dt_proj, nn.Linear)
    assert 0 < (small(x) - want).abs().max() < 0.1 * want.abs().max()
    reset = torch.zeros(2, 20, dtype=torch.bool)
    reset[:, 5] = True
    for options in ({"reset": reset}, {"lengths": torch.tensor([7, 20])}):
        y, want = small.scan(x, **options)[0], m.scan(x, **options)[0]
        assert (y - want).abs().max() < 0.1 * want.abs().max()
    y, *states = small.step(x[:, 0], *small.allocate_inference_cache(2))
    assert (y - m(x)[:, 0]).abs().max() < 0.1 * m(x).abs().max()
    assert [s.dtype for s in states] == [torch.float32] * 2
