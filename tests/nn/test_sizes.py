"""Sizes of every module: NumPy scalars become Python numbers, and sizes that no tensor can have raise one sentence."""

import fractions
import json

import numpy as np
import pytest
import torch

from eaml_ext.nn import SSM, EpisodicRead, KNNAttention, Mamba, Mamba2, SSMLayer
from eaml_ext.nn.cores import LRU, RWKV, S4D, S5, S6, SSD, MambaCore, Retention, make_core

N = np.int64

CASES = {
    "SSM": lambda i, f: SSM(i(4), i(8), i(3), state_size=i(4), num_layers=i(2), dt_min=f(0.01), dt_max=f(0.5)),
    "SSM mamba": lambda i, f: SSM(i(4), i(8), i(3), state_size=i(4), core="mamba", dt_max=f(0.5)),
    "SSMLayer": lambda i, f: SSMLayer(i(4), i(8), state_size=i(4), num_layers=i(2), dt_max=f(0.5)),
    "Mamba": lambda i, f: Mamba(
        i(6), i(3), i(4), f(2.0), i(2), f(0.01), f(0.5), dt_scale=f(0.5), dt_init_floor=f(1e-3)
    ),
    "Mamba2": lambda i, f: Mamba2(
        i(6), i(3), i(4), f(0.5), f(2.0), i(2), i(8), i(2), (f(1.0), f(4.0)), dt_min=f(0.01), dt_limit=(f(0.0), f(0.5))
    ),
    "EpisodicRead": lambda i, f: EpisodicRead(i(9), i(4), i(4), i(3), delta=f(0.5)),
    "KNNAttention": lambda i, f: KNNAttention(i(4), i(9), i(2), i(3)),
    "S4D": lambda i, f: S4D(i(8), i(4), dt_min=f(0.01), dt_max=f(0.5)),
    "S5": lambda i, f: S5(i(8), i(4), dt_min=f(0.01), dt_max=f(0.5)),
    "S6": lambda i, f: S6(i(8), i(4), dt_min=f(0.01), dt_max=f(0.5)),
    "LRU": lambda i, f: LRU(i(8), i(4), r_min=f(0.25), r_max=f(0.5), max_phase=f(1.0)),
    "SSD": lambda i, f: SSD(i(8), i(4), num_heads=i(2)),
    "Retention": lambda i, f: Retention(i(8), i(4), num_heads=i(2)),
    "RWKV": lambda i, f: RWKV(i(8), i(4), num_heads=i(2)),
    "MambaCore": lambda i, f: MambaCore(i(8), i(4), d_conv=i(3), expand=f(2.0)),
}


def plain(value):
    """Return whether ``value`` consists of Python's numbers and strings, which JSON and torch.save can write."""
    if isinstance(value, (list, tuple)):
        return all(map(plain, value))
    return (
        plain(list(value.values())) if isinstance(value, dict) else type(value) in (int, float, str, bool, type(None))
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("integer", "real"), [(np.int64, np.float64), (np.uint8, np.float32), (torch.tensor, fractions.Fraction)]
)
def test_module_numpy_sizes_equal_python_sizes(name, integer, real):
    torch.manual_seed(0)
    want = CASES[name](int, float)
    torch.manual_seed(0)
    got = CASES[name](integer, real)
    state = got.state_dict()
    for key, value in want.state_dict().items():
        torch.testing.assert_close(state[key], value, msg=key)
    for module in got.modules():
        own = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, np.generic, tuple, dict))}
        options = {k: v for k, v in own.items() if not k.startswith("_") or k == "_state_shape"}
        assert plain(options), options


def test_ssm_numpy_sizes_are_saved_and_loaded(tmp_path):
    net = SSM(N(4), N(8), N(3), state_size=N(4), num_layers=N(2), dt_min=np.float32(0.01))
    json.dumps(net.options)
    net.save(tmp_path / "m")
    assert torch.equal(SSM.load(tmp_path / "m")(torch.ones(2, 5, 4)), net(torch.ones(2, 5, 4)))
    assert net.init_hidden(N(2)).shape == (2, 2, 8, 4)
    assert Mamba(4).allocate_inference_cache(N(2))[0].shape == (2, 8, 4)


def bad_sizes():
    for value, error, text in (
        (2**31, ValueError, "must be < 2147483648, got 2147483648"),
        (2**63, ValueError, f"must be < 2147483648, got {2**63}"),
        (2**70, ValueError, f"must be < 2147483648, got {2**70}"),
        (N(-(2**40)), ValueError, f"must be > 0, got {-(2**40)}"),
        (True, TypeError, "must be an integer, got True"),
        (np.bool_(True), TypeError, "must be an integer, got"),
        (4.0, TypeError, "must be an integer, got 4.0"),
        (np.float64(4), TypeError, "must be an integer, got"),
        (None, TypeError, "must be an integer, got None"),
    ):
        for where, name, call in (
            ("SSM", "state_dim", lambda v: SSM(v)),
            ("SSM", "hidden_dim", lambda v: SSM(3, v)),
            ("SSM", "output_dim", lambda v: SSM(3, 4, v)),
            ("SSM", "state_size", lambda v: SSM(3, state_size=v)),
            ("SSM", "num_layers", lambda v: SSM(3, num_layers=v)),
            ("SSMLayer", "hidden_dim", lambda v: SSMLayer(3, v)),
            ("Mamba", "d_model", lambda v: Mamba(v)),
            ("Mamba", "d_state", lambda v: Mamba(4, v)),
            ("Mamba", "d_conv", lambda v: Mamba(4, d_conv=v)),
            ("Mamba", "dt_rank", lambda v: Mamba(4, dt_rank=v)),
            ("Mamba2", "headdim", lambda v: Mamba2(4, headdim=v)),
            ("Mamba2", "ngroups", lambda v: Mamba2(4, headdim=4, ngroups=v)),
            ("EpisodicRead", "slots", lambda v: EpisodicRead(v, 3, 3, 1)),
            ("EpisodicRead", "k", lambda v: EpisodicRead(9, 3, 3, v)),
            ("KNNAttention", "num_heads", lambda v: KNNAttention(4, 9, v, 3)),
            ("S4D", "dim", lambda v: make_core("s4d", v, 4)),
            ("MambaCore", "state_size", lambda v: make_core("mamba", 4, v)),
        ):
            yield pytest.param(call, value, error, f"{where}: {name} {text}", id=f"{where}-{name}-{value!r}")


@pytest.mark.parametrize(("call", "value", "error", "text"), list(bad_sizes()))
def test_module_size_out_of_range_raises_one_sentence(call, value, error, text):
    with pytest.raises(error) as caught:
        call(value)
    assert str(caught.value).startswith(text) and "\n" not in str(caught.value)


@pytest.mark.parametrize("batch", [2**31, 2**70, -1, True, 2.0])
def test_initial_state_batch_out_of_range_raises_one_sentence(batch):
    for where, call in (
        ("SSM.init_hidden: batch", SSM(3, 4).init_hidden),
        ("Mamba.allocate_inference_cache: batch_size", Mamba(4).allocate_inference_cache),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{where} must be (>= 0|< 2147483648|an integer), got"):
            call(batch)


@pytest.mark.parametrize("expand", [1e300, float("inf"), 0.01])
def test_mamba_expand_out_of_range_raises_one_sentence(expand):
    with pytest.raises(ValueError, match=r"^Mamba: expand must make d_model 8 at least 1 channel and less than"):
        Mamba(8, expand=expand)
