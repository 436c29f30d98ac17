"""Checkpoints: saved and loaded values, damaged files, and deferred signals."""

import os
import pickle
import signal
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from eaml_ext import checkpoint


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.safetensors"


def test_save_then_load_keeps_values_shapes_dtypes_and_metadata(path):
    base = torch.randn(6, 4)
    tensors = {
        "view": base[::2, 1:],
        "transposed": base.t(),
        "tied": base,
        "tied_again": base,
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 5, dtype=torch.int64),
        "half": base.bfloat16(),
        "mask": base > 0,
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    metadata = {"epoch": 3, "name": "x", "nested": [1, {"a": None}]}
    checkpoint.save(path, tensors, metadata, kind="test")
    loaded, back = checkpoint.load(path, kind="test")
    assert back == metadata
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype and not loaded[name].requires_grad
        assert torch.equal(loaded[name], value.detach())


def test_save_interrupted_write_keeps_old_file_and_no_other(path, monkeypatch):
    checkpoint.save(path, {"a": torch.ones(3)})

    def broken(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(path, {"a": torch.zeros(3)})
    monkeypatch.undo()
    assert torch.equal(checkpoint.load(path)[0]["a"], torch.ones(3))
    assert os.listdir(path.parent) == [path.name]


def test_save_file_has_permissions_of_the_umask(path):
    old = os.umask(0o027)
    try:
        checkpoint.save(path, {"a": torch.ones(1)})
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("length", [0, 4, 60, -1, -40])
def test_load_truncated_file_raises_one_sentence(path, length):
    checkpoint.save(path, {"a": torch.randn(50)}, {"x": 1})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"^checkpoint.load: .* is damaged or not a checkpoint \("):
        checkpoint.load(path)


def test_load_flipped_byte_raises(path):
    checkpoint.save(path, {"a": torch.randn(20), "b": torch.arange(3)}, {"x": 1})
    good = path.read_bytes()
    silent = []
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        try:
            checkpoint.load(path)
            silent.append(position)
        except ValueError as error:
            assert "checkpoint.load: " in str(error)
    # The header is JSON: a flip may only pass where it does not change what is read (padding).
    assert all(good[position : position + 1].isspace() for position in silent)


def test_load_pickle_does_not_run_code(path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(path.parent / "ran"),))

    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        checkpoint.load(path)
    assert not (path.parent / "ran").exists()


def test_save_and_load_bad_arguments_raise_one_sentence(path):
    with pytest.raises(TypeError, match=r"^checkpoint.save: a must be a torch.Tensor, got int$"):
        checkpoint.save(path, {"a": 1})
    with pytest.raises(TypeError, match=r"^checkpoint.save: the names of tensors must be strings, got 1$"):
        checkpoint.save(path, {1: torch.ones(1)})
    with pytest.raises(TypeError, match=r"^checkpoint.save: a must be a dense tensor with data, got one on meta$"):
        checkpoint.save(path, {"a": torch.ones(1, device="meta")})
    with pytest.raises(TypeError, match=r"^checkpoint.save: a tensor has a dtype that safetensors cannot store"):
        checkpoint.save(path, {"a": torch.ones(1, dtype=torch.complex128)})
    with pytest.raises(TypeError, match=r"^checkpoint.save: metadata must be JSON-able"):
        checkpoint.save(path, {}, {"a": object()})
    with pytest.raises(FileNotFoundError, match=r"^checkpoint.save: the directory .* does not exist$"):
        checkpoint.save(path.parent / "no" / "where", {})
    assert os.listdir(path.parent) == []
    with pytest.raises(FileNotFoundError, match=r"^checkpoint.load: there is no file"):
        checkpoint.load(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"was not written by eaml_ext$"):
        checkpoint.load(path)
    checkpoint.save(path, {}, kind="SSM")
    with pytest.raises(ValueError, match=r"holds SSM, wanted ExperienceBuffer$"):
        checkpoint.load(path, kind="ExperienceBuffer")


def test_load_state_nest_equals_saved_one(path):
    state = {
        "empty": {},
        "numbers": {3: 0.1, "3": float("inf"), -1: None},
        "a/b": torch.ones(2),
        "a": {"b": torch.zeros(2), "list": [torch.arange(3), (True, "text", [])]},
    }
    checkpoint.save_state(path, state, kind="nest")
    back = checkpoint.load_state(path, kind="nest")
    assert torch.equal(back["a/b"], torch.ones(2)) and torch.equal(back["a"]["b"], torch.zeros(2))
    assert torch.equal(back["a"]["list"][0], torch.arange(3)) and back["a"]["list"][1] == (True, "text", [])
    assert back["numbers"] == state["numbers"] and back["empty"] == {} and list(back) == list(state)
    with pytest.raises(ValueError, match="holds nest, wanted other"):
        checkpoint.load_state(path, kind="other")


def test_load_state_optimizer_continues_with_equal_bits(path):
    def train(model, optimizer, steps):
        for _ in range(steps):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()

    models = [torch.nn.Linear(2, 2) for _ in range(2)]
    one, other = (torch.optim.Adam(m.parameters(), lr=0.1) for m in models)
    train(models[0], one, 3)
    checkpoint.save_state(path, [models[0].state_dict(), one.state_dict()])
    weights, moments = checkpoint.load_state(path)
    models[1].load_state_dict(weights)
    other.load_state_dict(moments)
    models[0].zero_grad()
    train(models[0], one, 3)
    train(models[1], other, 3)
    assert all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in models), strict=True))


@pytest.mark.parametrize("key", [1.5, (1, 2), None, True])
def test_save_state_keys_that_json_would_change_raise_type_error(key, path):
    with pytest.raises(TypeError, match=r"keys must be strings or integers, got .* in state/inner"):
        checkpoint.save_state(path, {"inner": {key: 1}})
    with pytest.raises(TypeError, match="metadata must be JSON-able"):
        checkpoint.save_state(path, {"inner": object()})
    assert not path.exists()


def test_deferred_interrupt_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with checkpoint.deferred_interrupt() as interrupted:
            signal.raise_signal(signal.SIGINT)
        assert not interrupted and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_deferred_interrupt_first_signal_is_recorded_second_raises(first):
    with pytest.raises(KeyboardInterrupt), checkpoint.deferred_interrupt() as interrupted:
        signal.raise_signal(first)
        assert interrupted == [first]
        signal.raise_signal(signal.SIGINT)
    assert interrupted == [first] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_deferred_interrupt_sigterm_is_recorded_where_ctrl_c_is_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with checkpoint.deferred_interrupt() as interrupted:
            signal.raise_signal(signal.SIGTERM)
        assert interrupted == [signal.SIGTERM] and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_conftest_suite_started_with_sigint_ignored_receives_signals():
    code = "import signal, sys, pytest; signal.signal(2, signal.SIG_IGN); sys.exit(pytest.main(sys.argv[1:]))"
    test = test_deferred_interrupt_first_signal_is_recorded_second_raises.__name__
    command = [sys.executable, "-c", code, "-p", "no:cacheprovider", f"{__file__}::{test}"]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 0 and "2 passed" in child.stdout, child.stdout


@pytest.mark.parametrize("integer", [np.int64, np.int8, np.uint32])
def test_save_state_numpy_keys_and_values_come_back_as_pythons(integer, path):
    state = {integer(3): np.float32(0.5), "flag": np.bool_(True), "list": [integer(7), (np.float64(0.1),)]}
    checkpoint.save_state(path, {np.str_("inner"): state})
    (back,) = checkpoint.load_state(path).values()
    assert back == {3: 0.5, "flag": True, "list": [7, (0.1,)]} and [type(key) for key in back] == [int, str, str]
    assert type(back[3]) is float and back["flag"] is True and type(back["list"][0]) is int


def test_save_numpy_metadata_come_back_as_pythons(path):
    checkpoint.save(
        path, {}, {"epoch": np.int64(4), "loss": np.longdouble(0.25), "lr": np.float32(0.5), "best": [np.bool_(False)]}
    )
    assert checkpoint.load(path)[1] == {"epoch": 4, "loss": 0.25, "lr": 0.5, "best": [False]}
    for value in (np.complex64(1j), np.clongdouble(1j), np.datetime64("2020-01-01"), np.zeros(3)):
        with pytest.raises(TypeError, match=r"^checkpoint.save: metadata must be JSON-able"):
            checkpoint.save(path, {}, {"a": value})
    for key in (np.float32(1), np.bool_(True)):
        with pytest.raises(TypeError, match=r"^checkpoint.save_state: keys must be strings or integers, got (np\.)?"):
            checkpoint.save_state(path, {key: 1})
