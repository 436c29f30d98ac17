"""The device of a setting, on a machine with two GPUs and on one without."""

import pytest
import torch

from eaml_ext.jobs.device import torch_device


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def test_torch_device_cuda_gives_each_local_rank_its_gpu(two_gpus, monkeypatch):
    assert str(torch_device("here", "cuda")) == "cuda"
    for rank, name in enumerate(["cuda:0", "cuda:1", "cuda:0"]):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert str(torch_device("here", "cuda")) == name
        assert str(torch_device("here", "cuda:1")) == "cuda:1"
        assert str(torch_device("here", "cpu")) == "cpu"


def test_torch_device_missing_gpu_raises_one_sentence(two_gpus):
    with pytest.raises(ValueError, match="here: device is cuda:2, but torch sees 2 CUDA devices"):
        torch_device("here", "cuda:2")
