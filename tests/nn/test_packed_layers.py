"""Packed sequences in layers and cores: each equals itself alone, to second order; seq_idx; derived cores; errors."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from core_cases import DIM, NAMES, STATES, make, net_of, sequence
from torch import nn
from torch.func import functional_call, grad, vmap

from eaml_ext.nn import SSM, Mamba, Mamba2, SSMLayer
from eaml_ext.nn._causal_conv import causal_conv
from eaml_ext.nn._slots import slotted_row
from eaml_ext.nn.cores import Core, diagonal, make_core

LENGTHS = [3, 0, 1, 40, 0, 2, 7]


def boundaries(lengths=LENGTHS):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def rows_of(lengths=LENGTHS):
    """Return the number and the steps of each sequence, as slices."""
    ends = list(itertools.accumulate(lengths))
    return [(slice(i, i + 1), slice(end - n, end)) for i, (n, end) in enumerate(zip(lengths, ends, strict=True))]


def random_resets(steps):
    """Return resets inside sequences, and before the first and after the last step of some."""
    reset = torch.rand(1, steps) < 0.2
    for _, part in rows_of():
        reset[0, part.start : part.start + 1] = part.start % 2 == 0
    return reset


def states_like(states):
    """Return random states with one row per sequence."""
    return [torch.randn(len(LENGTHS), *s.shape[1:], dtype=s.dtype) for s in states]


def check_packed_equals_alone(scan, x, states, reset, check=torch.testing.assert_close):
    """Compare ``scan(x, states, reset, cu_seqlens) -> (y, *states)`` and its gradients with each sequence alone."""
    leaves = [v.requires_grad_() for v in (x, *states)]
    y, *last = scan(x, states, reset, boundaries())
    weights = [torch.randn_like(v) for v in (y, *last)]
    grads = torch.autograd.grad([y, *last], leaves, weights)
    for row, part in rows_of():
        alone = [x.detach()[:, part].requires_grad_(), *(s.detach()[row].requires_grad_() for s in states)]
        want, *ends = scan(alone[0], alone[1:], None if reset is None else reset[:, part], None)
        check([y[:, part], *(s[row] for s in last)], [want, *ends])
        cotangents = [weights[0][:, part], *(w[row] for w in weights[1:])]
        want_grads = torch.autograd.grad([want, *ends], alone, cotangents, materialize_grads=True)
        check([grads[0][:, part], *(g[row] for g in grads[1:])], list(want_grads))


def assert_equal_bits(got, want):
    assert all(map(torch.equal, got, want))


class RowLinear(nn.Linear):
    """A linear layer whose rows have the same bits in any batch, as those of a matrix product have not."""

    def forward(self, x):
        y = (x.unsqueeze(-2) * self.weight).sum(-1)
        return y if self.bias is None else y + self.bias


def with_row_linear(module):
    """Replace the linear layers of ``module``; their type makes the Mamba block call them."""
    for child in module.modules():
        if type(child) is nn.Linear:
            child.__class__ = RowLinear
    return module


@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_ssm_scan_packed_sequences_equal_each_alone(name, with_reset):
    """Up to rounding, because a matrix product rounds a row differently in another batch."""
    net = SSM(3, 16, 2, state_size=4, num_layers=2, core=name).double()
    x = torch.randn(1, sum(LENGTHS), 3, dtype=torch.float64)

    def scan(x, states, reset, cu_seqlens):
        return net.scan(x, *states, reset, cu_seqlens=cu_seqlens)

    states = states_like([net.init_hidden(1)])
    check_packed_equals_alone(scan, x, states, random_resets(x.shape[1]) if with_reset else None)


@pytest.mark.kernels  # the references call torch's silu, whose bits depend on the layout
@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_core_scan_packed_sequences_have_the_bits_of_each_alone(name, with_reset, monkeypatch):
    core, x = with_row_linear(make_core(name, DIM, STATES)), torch.randn(1, sum(LENGTHS), DIM)
    if name in ("lru", "s5"):

        def row_linear(x, weight):
            return (x.unsqueeze(-2) * weight).sum(-1)

        monkeypatch.setattr(diagonal, "project", row_linear)

    def scan(x, states, reset, cu_seqlens):
        return core.scan(x, *states, reset, cu_seqlens=cu_seqlens)

    states = states_like([x.new_zeros(1, *core.state_shape)])
    reset = random_resets(x.shape[1]) if with_reset else None
    check_packed_equals_alone(scan, x, states, reset, assert_equal_bits)


@pytest.mark.parametrize("name", NAMES)
def test_core_scan_packed_has_first_and_second_derivatives(name):
    core, cu_seqlens = make_core(name, 4, 2).double(), boundaries([2, 0, 3])
    x = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    state = torch.randn(3, *core.state_shape, dtype=torch.float64, requires_grad=True)

    def scan(x, state):
        return core.scan(x, state, cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(scan, (x, state), fast_mode=True)
    assert torch.autograd.gradgradcheck(scan, (x, state), fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_core_meta_gradient_of_packed_tasks_equals_that_of_tasks_alone(name):
    """Second order in the parameters: the gradient of the squared gradient norm of a sum over sequences."""
    net, cu_seqlens = net_of(name), boundaries([4, 1, 6])
    x = torch.randn(1, 11, 3, dtype=torch.float64)
    params = {k: p.detach() for k, p in net.named_parameters()}

    def meta_gradient(loss):
        return grad(lambda p: sum(g.square().sum() for g in grad(loss)(p).values()))(params)

    def packed(p):
        return functional_call(net, p, (x,), {"cu_seqlens": cu_seqlens}).square().sum()

    def alone(p):
        return sum(functional_call(net, p, (part,)).square().sum() for part in x.split([4, 1, 6], dim=1))

    torch.testing.assert_close(meta_gradient(packed), meta_gradient(alone))


@pytest.mark.parametrize("name", NAMES)
def test_ssm_packed_weights_per_task_under_vmap_equal_a_loop(name):
    net, cu_seqlens = net_of(name), boundaries([2, 0, 4])
    x = torch.randn(3, 1, 6, 3, dtype=torch.float64)
    params = {k: p.detach() + 0.1 * torch.randn(3, *p.shape, dtype=p.dtype) for k, p in net.named_parameters()}

    def loss(p, x):
        return functional_call(net, p, (x,), {"cu_seqlens": cu_seqlens}).square().sum()

    together = vmap(grad(loss))(params, x)
    for i in range(3):
        alone = grad(loss)({k: p[i] for k, p in params.items()}, x[i])
        torch.testing.assert_close({k: g[i] for k, g in together.items()}, alone)


@pytest.mark.parametrize("name", NAMES)
def test_core_seq_idx_equals_resets_where_it_changes(name):
    core, x = make(name), sequence(length=6)
    seq_idx = torch.tensor([[4, 4, 5, 5, 5, 0], [1, 2, 2, 2, 2, 2]], dtype=torch.int32)
    reset = torch.tensor([[0, 0, 1, 0, 0, 1], [0, 1, 0, 0, 0, 0]]).bool()
    before = core.scan(sequence())[1].detach()
    for idx in (seq_idx, seq_idx.long()):
        assert_equal_bits(core.scan(x, before, seq_idx=idx), core.scan(x, before, reset))
    assert_equal_bits(core(x, before, seq_idx=seq_idx), core.scan(x, before, reset))


@pytest.mark.parametrize("name", NAMES)
def test_core_packed_nan_stays_in_its_sequence(name):
    net, x, steps = SSM(3, 32, 2, core=name), torch.randn(1, sum(LENGTHS), 3), rows_of()
    x[0, steps[3][1]] = torch.nan
    y, state = net.scan(x, cu_seqlens=boundaries())
    for row, part in steps:
        finite = row.start != 3
        assert y[:, part].isfinite().all() == finite and state[row].isfinite().all() == finite


def test_core_packed_row_without_sequences_or_steps_is_empty():
    for name in NAMES:
        core, state = make(name), make(name).scan(sequence(2))[1]
        y, last = core.scan(sequence(1, 0), cu_seqlens=boundaries([]))
        assert y.shape == (1, 0, DIM) and last.shape == (0, *core.state_shape)
        y, last = core.scan(sequence(1, 0), state, cu_seqlens=boundaries([0, 0]))
        assert y.shape == (1, 0, DIM) and torch.equal(last, state)


def sums_of_taps(conv1d):
    """Return a convolution of another type, which the layer must call."""

    class Called(nn.Module):
        weight = conv1d.weight

        def forward(self, x):
            return F.conv1d(x, conv1d.weight, conv1d.bias, padding=conv1d.padding, groups=conv1d.groups)

    return Called()


LAYERS = {
    "mamba": lambda: Mamba(6, d_state=3),
    "mamba_one_tap": lambda: Mamba(6, d_state=3, d_conv=1),
    "mamba2": lambda: Mamba2(6, d_state=3, headdim=4, ngroups=1, d_ssm=8),
    "mamba2_norm_before_gate": lambda: Mamba2(6, d_state=3, headdim=4, norm_before_gate=True),
}


@pytest.mark.parametrize("called", [False, True], ids=["op", "called_conv1d"])
@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_mamba_layer_packed_sequences_equal_each_alone(name, with_reset, called):
    m = LAYERS[name]().double()
    if called:
        m.conv1d = sums_of_taps(m.conv1d)
    x = torch.randn(1, sum(LENGTHS), 6, dtype=torch.float64)

    def scan(x, states, reset, cu_seqlens):
        y, last = m.scan(x, tuple(states), reset, cu_seqlens=cu_seqlens)
        return (y, *last)

    states = states_like(m.allocate_inference_cache(1))
    check_packed_equals_alone(scan, x, states, random_resets(x.shape[1]) if with_reset else None)


@pytest.mark.parametrize("name", LAYERS)
def test_mamba_layer_steps_continue_packed_sequences(name):
    m, x = LAYERS[name]().double(), torch.randn(1, sum(LENGTHS), 6, dtype=torch.float64)
    later = torch.randn(len(LENGTHS), 6, dtype=torch.float64)
    _, states = m.scan(x, cu_seqlens=boundaries())
    y = m.step(later, *states)[0]
    for row, part in rows_of():
        whole = torch.cat([x[:, part], later[row].unsqueeze(1)], dim=1)
        torch.testing.assert_close(y[row], m(whole)[:, -1])


def test_mamba_layer_call_passes_packing_and_keeps_a_state_per_sequence():
    m, x, cu_seqlens = Mamba(6, d_state=3, layer_idx=0), torch.randn(1, 5, 6), boundaries([2, 3])
    inference = type("", (), {"key_value_memory_dict": {}, "seqlen_offset": 0})
    want, states = m.scan(x, cu_seqlens=cu_seqlens)
    assert torch.equal(m(x, cu_seqlens=cu_seqlens), want) and torch.equal(m(x, inference, cu_seqlens=cu_seqlens), want)
    assert_equal_bits(inference.key_value_memory_dict[0], states)
    assert torch.equal(m(x, seq_idx=torch.tensor([[0, 0, 1, 1, 1]])), want)


def test_mamba2_every_packed_sequence_starts_from_the_learned_state():
    m = Mamba2(6, d_state=3, headdim=4, learnable_init_states=True).double()
    nn.init.normal_(m.init_states)
    x = torch.randn(1, sum(LENGTHS), 6, dtype=torch.float64)
    y, (_, ssm_state) = m.scan(x, cu_seqlens=boundaries())
    for row, part in rows_of():
        want, (_, end) = m.scan(x[:, part])
        torch.testing.assert_close([y[:, part], ssm_state[row]], [want, end])


@pytest.mark.kernels
@pytest.mark.parametrize("with_reset", [False, True])
def test_causal_conv_packed_sequences_have_the_bits_of_each_alone(with_reset):
    weight, bias, x = torch.randn(5, 1, 4), torch.randn(5), torch.randn(1, sum(LENGTHS), 5)

    def scan(x, states, reset, cu_seqlens):
        return causal_conv(x, *states, weight, bias, reset, silu=True, cu_seqlens=cu_seqlens)

    states = states_like([torch.randn(1, 5, 4)])
    check_packed_equals_alone(scan, x, states, random_resets(x.shape[1]) if with_reset else None, assert_equal_bits)


def test_ssm_call_with_packing_equals_scan():
    net, x, cu_seqlens = SSM(3, 8, 2), torch.randn(1, 5, 3), boundaries([2, 3])
    state, seq_idx = torch.randn(2, *net.init_hidden(1).shape[1:]), torch.tensor([[0, 0, 1, 1, 1]])
    assert torch.equal(net(x, state, cu_seqlens=cu_seqlens), net.scan(x, state, cu_seqlens=cu_seqlens)[0])
    assert torch.equal(net(x, seq_idx=seq_idx), net.scan(x, cu_seqlens=cu_seqlens)[0])


def test_ssm_seq_idx_beside_lengths_ignores_padding():
    net, x, lengths = SSM(3, 8, 2), torch.randn(2, 5, 3), torch.tensor([3, 5])
    seq_idx = torch.tensor([[0, 1, 1, 7, 8], [0, 0, 0, 1, 1]])
    reset = torch.tensor([[0, 1, 0, 0, 0], [0, 0, 0, 1, 0]]).bool()
    assert_equal_bits(net.scan(x, lengths=lengths, seq_idx=seq_idx), net.scan(x, None, reset, lengths))


def test_ssm_layer_encodes_packed_sequences():
    encoder, x = SSMLayer(3, 8), torch.randn(5, 3)
    want = torch.cat([encoder(x[:2]), encoder(x[2:])])
    torch.testing.assert_close(encoder(x, cu_seqlens=boundaries([2, 3])), want)
    torch.testing.assert_close(encoder(x.unsqueeze(0), cu_seqlens=boundaries([2, 3]))[0], want)


@pytest.mark.parametrize("core", ["rwkv", "mamba"])
def test_ssm_packed_compiles_in_one_graph(core):
    """The cores that insert slots, or have two ops."""
    net, x, cu_seqlens = SSM(3, 16, 2, state_size=2, core=core), torch.randn(1, 5, 3), boundaries([2, 0, 3])
    compiled = torch.compile(lambda x: net.scan(x, cu_seqlens=cu_seqlens), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net.scan(x, cu_seqlens=cu_seqlens))


class Leaky(nn.Module):
    """A core whose scan does not take the arguments of packing."""

    def __init__(self, dim, state_size):
        super().__init__()
        self.state_shape = (dim,)

    def scan(self, x, state=None, reset=None, lengths=None):
        total = torch.zeros(len(x), x.shape[2]) if state is None else state
        ys = []
        for t in range(x.shape[1]):
            total = x[:, t] + (total if reset is None else total.masked_fill(reset[:, t, None], 0)) / 2
            ys.append(total)
        return torch.stack(ys, dim=1), total


class LeakyCore(Core):
    state_shape = (8,)
    scan = Leaky.scan


@pytest.mark.parametrize("core", [Leaky, LeakyCore])
@pytest.mark.parametrize("hooked", [False, True])
def test_ssm_core_without_cu_seqlens_keeps_working_and_names_itself(core, hooked):
    net, x = SSM(3, 8, 2, core=core), torch.randn(1, 5, 3)
    if hooked:
        net.cores[0].register_forward_hook(lambda *args: None)
    parts = torch.cat([net(x[:, :2]), net(x[:, 2:])], dim=1)
    torch.testing.assert_close(net(x, seq_idx=torch.tensor([[0, 0, 1, 1, 1]])), parts)
    with pytest.raises(ValueError) as info:
        net.scan(x, cu_seqlens=boundaries([2, 3]))
    assert str(info.value) == f"SSM.scan: cu_seqlens must be None for the core {core.__name__}, whose scan lacks it"


def test_ssm_hooked_core_receives_packing():
    net, x, calls = SSM(3, 8, 2), torch.randn(1, 5, 3), []
    want = net.scan(x, cu_seqlens=boundaries([2, 3]))
    net.cores[0].register_forward_hook(lambda *args: calls.append(1))
    assert_equal_bits(net.scan(x, cu_seqlens=boundaries([2, 3])), want)
    assert calls == [1]


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"cu_seqlens": boundaries([1, 2]).long()}, TypeError, "cu_seqlens must be int32, got int64"),
        ({"cu_seqlens": boundaries([1, 1])}, ValueError, "cu_seqlens must go from 0 to 3, got 0 to 2"),
        ({"cu_seqlens": boundaries([4, -1])}, ValueError, "cu_seqlens must not decrease, got [0, 4, 3]"),
        ({"cu_seqlens": boundaries([3]).unsqueeze(0)}, ValueError, "cu_seqlens must have shape (sequences + 1,)"),
        ({"seq_idx": torch.zeros(1, 3)}, TypeError, "seq_idx must be int32 or int64, got float32"),
        ({"seq_idx": torch.zeros(1, 2).int()}, ValueError, "seq_idx must have shape (batch, length) = (1, 3)"),
        ({"seq_idx": [0, 0, 1]}, TypeError, "seq_idx must be a torch.Tensor, got list"),
        (
            {"seq_idx": torch.zeros(1, 3).int(), "reset": torch.zeros(1, 3).bool()},
            ValueError,
            "seq_idx must be None beside reset, got Tensor",
        ),
        (
            {"seq_idx": torch.zeros(1, 3).int(), "cu_seqlens": boundaries([3])},
            ValueError,
            "seq_idx must be None beside cu_seqlens, got Tensor",
        ),
        (
            {"cu_seqlens": boundaries([3]), "lengths": torch.tensor([3])},
            ValueError,
            "cu_seqlens must be None beside lengths, got Tensor",
        ),
        (
            {"cu_seqlens": torch.empty(2, device="meta", dtype=torch.int32)},
            ValueError,
            "cu_seqlens is on meta, x is on",
        ),
        ({"seq_idx": torch.empty(1, 3, device="meta").int()}, ValueError, "seq_idx is on meta, x is on cpu"),
    ],
    ids=str,
)
@pytest.mark.parametrize("build", [lambda: SSM(4, 8, 2), lambda: Mamba(4), lambda: Mamba2(4, headdim=4)])
def test_scan_bad_packing_raises_one_sentence(build, options, error, text):
    model = build()
    with pytest.raises(error) as info:
        model.scan(torch.randn(1, 3, 4), **options)
    assert str(info.value).startswith(f"{type(model).__name__}.scan: {text}") and "\n" not in str(info.value)


@pytest.mark.parametrize("build", [lambda: SSM(4, 8, 2), lambda: Mamba(4), lambda: make_core("s6", 4, 2)])
def test_scan_packed_batch_or_rows_of_states_of_another_number_raise(build):
    model, cu_seqlens = build(), boundaries([1, 2])
    with pytest.raises(ValueError, match="with cu_seqlens the batch must be 1, got 2"):
        model.scan(torch.randn(2, 3, 4), cu_seqlens=cu_seqlens)
    _, state = model.scan(torch.randn(1, 3, 4))
    with pytest.raises(ValueError, match=r"state must have shape .*\(2, "):
        model.scan(torch.randn(1, 3, 4), state, cu_seqlens=cu_seqlens)


def test_slotted_row_wrong_boundaries_stay_inside_the_row():
    """Boundaries on a GPU are not checked."""
    for values in ([0, 9, 3], [-4, 2, 9], [5, 1, 0], [0, 1, 2]):
        row = slotted_row(torch.tensor(values), 4, 3)
        for positions in (row.source, row.steps):
            assert positions.min() >= 0 and positions.max() < 10
        assert row.cu_seqlens.min() >= 0 and row.cu_seqlens.max() <= 10
