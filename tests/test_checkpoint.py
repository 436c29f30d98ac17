import os
import pickle
import stat

import pytest
import torch
from safetensors.torch import save_file

from eaml_ext import checkpoint


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.safetensors"


def test_round_trip_keeps_values_shapes_dtypes_and_metadata(path):
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


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    checkpoint.save(path, {"a": torch.ones(3)})

    def broken(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(path, {"a": torch.zeros(3)})
    monkeypatch.undo()
    assert torch.equal(checkpoint.load(path)[0]["a"], torch.ones(3))
    assert os.listdir(path.parent) == [path.name]


def test_the_file_has_the_permissions_the_umask_allows(path):
    old = os.umask(0o027)
    try:
        checkpoint.save(path, {"a": torch.ones(1)})
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("length", [0, 4, 60, -1, -40])
def test_a_truncated_file_is_one_sentence(path, length):
    checkpoint.save(path, {"a": torch.randn(50)}, {"x": 1})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"^checkpoint.load: .* is damaged or not a checkpoint \("):
        checkpoint.load(path)


def test_any_flipped_byte_is_noticed(path):
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


def test_pickled_code_is_never_run(path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(path.parent / "ran"),))

    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        checkpoint.load(path)
    assert not (path.parent / "ran").exists()


def test_refusals(path):
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
