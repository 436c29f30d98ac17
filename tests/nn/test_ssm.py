"""SSM, SSMLayer and Stateful: calls, states, saving, errors; the tests of their cores are in test_cores.py."""

import copy
import pickle

import pytest
import torch

from eaml_ext.nn import SSM, SSMLayer, Stateful
from eaml_ext.nn.cores import S6, make_core


def model(**options):
    return SSM(5, 8, 3, state_size=4, **options).double()


def test_ssm_call_returns_one_tensor_for_steps_and_sequences():
    net = SSM(state_dim=10)
    assert net(torch.randn(32, 10)).shape == (32, 32)
    assert net.forward(torch.randn(4, 7, 10)).shape == (4, 7, 32)
    assert net.forward(torch.randn(32, 10), hidden_state=net.init_hidden(32)).shape == (32, 32)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_ssm_scan_equals_steps_and_split_scans(num_layers):
    net, x = model(num_layers=num_layers), torch.randn(2, 9, 5, dtype=torch.float64)
    whole, last = net.scan(x)
    a, state = net.scan(x[:, :4])
    b, split_last = net.scan(x[:, 4:], state)
    assert torch.allclose(torch.cat([a, b], dim=1), whole) and torch.allclose(split_last, last)
    state, ys = net.init_hidden(2), []
    for t in range(9):
        y, state = net.step(x[:, t], state)
        ys.append(y)
    assert torch.allclose(torch.stack(ys, dim=1), whole) and torch.allclose(state, last)
    assert torch.allclose(net(x[:, 4:], a_state := net.scan(x[:, :4])[1]), b) and a_state.shape == last.shape


def test_ssm_scan_reset_zeroes_the_state():
    net, x = model(num_layers=2), torch.randn(2, 9, 5, dtype=torch.float64)
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[:, 6] = True
    y, _ = net.scan(x, net.scan(x)[1], reset)
    assert torch.allclose(y[:, 6:], net(x[:, 6:]))
    assert not torch.allclose(y[:, :6], net(x[:, :6]))


def test_ssm_every_parameter_has_a_gradient_and_memory_is_learned():
    net = model()
    x = torch.randn(8, 20, 5, dtype=torch.float64)
    target = x.cumsum(dim=1)[..., :3] / 5  # needs memory
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        loss = (net(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_s6_parameters_can_be_read_and_set():
    core = model().cores[0]
    assert isinstance(core, S6)
    assert torch.allclose(core.A_log.exp()[0], torch.arange(1.0, 5.0, dtype=torch.float64))
    with torch.no_grad():
        core.D.fill_(7.0)
    assert core.D.unique().tolist() == [7.0]
    step = torch.nn.functional.softplus(core.delta_bias)
    assert step.min() >= 0.99e-3 and step.max() <= 1.01e-1


def test_ssm_save_and_load_keep_weights_and_options(tmp_path):
    net = SSM(5, 8, 3, state_size=4, num_layers=2, dt_min=0.2, dt_max=0.5)
    net.save(tmp_path / "m.safetensors")
    back = SSM.load(tmp_path / "m.safetensors")
    x = torch.randn(2, 6, 5)
    assert torch.equal(back(x), net(x)) and back.options == net.options
    (tmp_path / "junk").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="junk"):
        SSM.load(tmp_path / "junk")
    with pytest.raises(ValueError, match="custom callable"):
        SSM(5, 8, 3, core=lambda dim, n: S6(dim, n)).save(tmp_path / "c")


def test_ssm_save_of_quantised_layers_raises(tmp_path):
    model = torch.ao.quantization.quantize_dynamic(SSM(3, 8, 2), {torch.nn.Linear})
    with pytest.raises(ValueError, match="its layer is quantised"):
        model.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_stateful_copy_is_equal_and_independent(copied):
    net, x = Stateful(model(num_layers=2)), torch.randn(2, 4, 5, dtype=torch.float64)
    net(x)
    other = copied(net)
    want = net(x)
    assert torch.equal(other(x), want)
    with torch.no_grad():
        other.model.cores[0].D.add_(1)
    net.reset()
    net(x)
    assert torch.equal(net(x), want)


def test_s6_under_autocast_accepts_float32_input():
    core, x = S6(6, 4), torch.randn(2, 5, 6)
    want, want_state = core.scan(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = core.scan(x)  # u is float32 and the projections are bfloat16, as after CUDA's RMSNorm
        stepped, _ = core.step(x[:, 0], core.scan(x[:, :0])[1])
    assert y.dtype == stepped.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(y.float(), want, rtol=0.05, atol=0.05)
    torch.testing.assert_close(state, want_state, rtol=0.05, atol=0.05)
    torch.testing.assert_close(stepped.float(), want[:, 0], rtol=0.05, atol=0.05)


def test_ssm_exported_with_dynamic_sizes_equals_the_model():
    net = model()
    shapes = ({0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("time", min=2, max=4096)},)
    program = torch.export.export(net, (torch.randn(2, 5, 5, dtype=torch.float64),), dynamic_shapes=shapes)
    x = torch.randn(4, 77, 5, dtype=torch.float64)
    torch.testing.assert_close(program.module()(x), net(x))


def test_ssm_custom_core_is_used():
    class Leaky(torch.nn.Module):
        def __init__(self, dim, state_size):
            super().__init__()
            self.state_shape = (dim,)

        def scan(self, x, state=None, reset=None):
            ys = []
            state = x.new_zeros(x.shape[0], x.shape[2]) if state is None else state
            for t in range(x.shape[1]):
                y, state = self.step(x[:, t], state)
                ys.append(y)
            return torch.stack(ys, dim=1), state

        def step(self, x, state):
            state = 0.5 * state + x
            return state, state

    net = SSM(5, 8, 3, core=Leaky)
    assert net(torch.randn(2, 4, 5)).shape == (2, 4, 3) and net.init_hidden(2).shape == (2, 1, 8)


def test_ssm_layer_two_dimensions_are_one_sequence():
    encoder = SSMLayer(4, 16)
    x = torch.randn(50, 4)
    assert encoder(x).shape == (50, 16)
    assert torch.allclose(encoder(x.unsqueeze(0))[0], encoder(x), atol=1e-6)
    assert not torch.allclose(encoder(x)[-1], encoder(x[-1:])[-1])  # earlier steps have an effect


def test_stateful_keeps_its_state_until_reset():
    net = model()
    wrapped, x = Stateful(net), torch.randn(2, 9, 5, dtype=torch.float64)
    whole = net(x)
    assert torch.allclose(wrapped(x[:, :5]), whole[:, :5])
    assert torch.allclose(wrapped(x[:, 5]), whole[:, 5])
    assert not wrapped.state.requires_grad
    wrapped.reset(torch.tensor([True, False]))
    after = wrapped(x[:, 6])
    assert torch.allclose(after[0], net(x[:1, 6])[0]) and torch.allclose(after[1], whole[1, 6])
    wrapped.reset()
    assert torch.allclose(wrapped(x[:, :5]), whole[:, :5])
    assert wrapped(x[:1]).shape == (1, 9, 3)  # another batch size starts from zero


def bad_calls():
    net, x, state = SSM(5, 8, 3), torch.randn(2, 4, 5), SSM(5, 8, 3).init_hidden(2)
    yield lambda: SSM(0), ValueError, "state_dim must be > 0"
    yield lambda: SSM(5, 8.0), TypeError, "hidden_dim must be an integer"
    yield lambda: SSM(5, 8, -1), ValueError, "output_dim must be > 0"
    yield lambda: SSM(5, state_size=0), ValueError, "state_size must be > 0"
    yield lambda: SSM(5, num_layers=0), ValueError, "num_layers must be > 0"
    yield lambda: SSM(5, core="rwkv9"), ValueError, "core must be one of"
    yield lambda: net([1.0]), TypeError, "x must be a torch.Tensor"
    yield lambda: net(torch.randn(2, 4)), ValueError, "x must have shape"
    yield lambda: net(x.double()), TypeError, "x must be float32"
    yield lambda: net(x.to("meta")), ValueError, "x is on meta"
    yield lambda: net(x, state[:1]), ValueError, "state must have shape"
    yield lambda: net(x, "state"), TypeError, "state must be a torch.Tensor"
    yield lambda: net(x, state.to("meta")), ValueError, "is on meta"
    yield lambda: net(x, state.double()), TypeError, "must be float32"
    yield lambda: net.scan(x[0]), ValueError, "x must have shape"
    yield lambda: net.scan(x, None, torch.zeros(2, 4)), TypeError, "reset must be bool"
    yield lambda: net.scan(x, None, torch.zeros(2, 3, dtype=torch.bool)), ValueError, "reset must have shape"
    yield lambda: net.step(x, state), ValueError, "x must have shape"
    yield lambda: net.step(x[:, 0], state[..., :2]), ValueError, "state must have shape"
    yield lambda: net.init_hidden(-1), ValueError, "batch must be >= 0"
    yield lambda: SSMLayer(0, 3), ValueError, "input_dim must be > 0"
    yield lambda: SSMLayer(4, 3)(torch.randn(4)), ValueError, "x must have shape"
    yield lambda: S6(0), ValueError, "dim must be > 0"
    yield lambda: make_core(3, 4, 4), ValueError, "core must be one of"
    yield lambda: Stateful(net)("x"), TypeError, "x must be a torch.Tensor"


@pytest.mark.parametrize("call, error, text", list(bad_calls()), ids=lambda v: v if isinstance(v, str) else "")
def test_ssm_bad_input_raises_one_sentence(call, error, text):
    with pytest.raises(error) as info:
        call()
    assert text in str(info.value) and "\n" not in str(info.value)


def test_stateful_reset_bad_rows_raise():
    wrapped = Stateful(SSM(5, 8, 3))
    wrapped(torch.randn(2, 5))
    with pytest.raises(TypeError, match="rows must be bool"):
        wrapped.reset(torch.zeros(2))
    with pytest.raises(ValueError, match="rows must have shape"):
        wrapped.reset(torch.zeros(3, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_stateful_keeps_its_state_in_every_dtype(dtype):
    """The state is float32 when the input is bfloat16."""
    layer, x = Stateful(SSM(3, 32, 2).to(dtype)), torch.randn(2, 3, dtype=dtype)
    assert not torch.equal(layer(x), layer(x))
