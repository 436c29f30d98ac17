"""Fixtures of the tests of experience."""

from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def worker(monkeypatch):
    """Return a function that makes this process a DataLoader worker with a seed, or the main process (None)."""

    def become(seed):
        info = None if seed is None else SimpleNamespace(id=seed % 2, num_workers=2, seed=seed, dataset=None)
        monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: info)

    return become
