"""Which device a setting names, on machines that this one may not be."""

import pytest
import torch

from eaml_ext.jobs.device import torch_device


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def test_each_process_of_a_machine_takes_a_gpu_of_its_own(two_gpus, monkeypatch):
    assert str(torch_device("here", "cuda")) == "cuda"
    for rank, name in enumerate(["cuda:0", "cuda:1", "cuda:0"]):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert str(torch_device("here", "cuda")) == name
        assert str(torch_device("here", "cuda:1")) == "cuda:1"
        assert str(torch_device("here", "cpu")) == "cpu"


def test_a_gpu_that_is_not_there(two_gpus):
    with pytest.raises(ValueError, match="here: device is cuda:2, but torch sees 2 CUDA devices"):
        torch_device("here", "cuda:2")
