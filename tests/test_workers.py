"""Ops and draws in the workers of a DataLoader, forked from a process that has used several threads, or spawned.

DataLoader workers are safe because torch gives them one thread. After a plain fork from a process with a parallel
region, GNU's OpenMP waits in the child for threads that do not exist, in torch's products and in this package's.
"""

import os
import subprocess
import sys
import tempfile
from itertools import combinations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from eaml_ext.experience import ExperienceBuffer, retrieval
from eaml_ext.ops import PackedKeys, knn, selective_scan

ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


class OpResults(Dataset):
    """Results of the ops, which must be the same in every process."""

    def __init__(self, folder):
        self.keys = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).repeat_interleave(50, 0)
        self.memory = ExperienceBuffer(2000, seed=0, age_half_life=1000)
        self.disk = ExperienceBuffer(2000, seed=0, directory=folder)
        self.uniform, self.ivf = retrieval.uniform(8, targets="state"), retrieval.ivf(10, nprobe=2)
        for buffer in (self.memory, self.disk):
            buffer.add(state=torch.arange(2000.0).unsqueeze(1), context_embedding=self.keys)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        keys = torch.randn(5000, 32, generator=generator)
        memory = PackedKeys(5000, 32)
        memory.write(torch.arange(5000), keys)
        u = torch.randn(4, 64, 100, generator=generator)
        A, B = -torch.rand(64, 16, generator=generator), torch.randn(4, 16, 100, generator=generator)
        return {
            "knn": knn(keys[:40], keys, 8).values,
            "packed": memory.search(keys[:40], 8).values,
            "scan": selective_scan(u, u.abs(), A, B, B),
            "grad": torch.autograd.grad(selective_scan(u, u.abs(), A.requires_grad_(), B, B).square().sum(), A)[0],
            "ivf": self.ivf.search(self.memory, self.keys[index]).indices,
        }


class Draws(OpResults):
    """Random draws of the buffers, which differ from call to call."""

    def __getitem__(self, index):
        draws = {
            "uniform": self.uniform(self.memory, {})["states"],
            "get_batch": self.memory.get_batch(8).indices,
            "weighted": self.memory.get_batch(8, weighted=True).indices,
            "disk": self.disk.get_batch(8).state,
        }
        return {"results": super().__getitem__(index), "draws": draws, "worker": get_worker_info().id}


def draws_of(loader, results):
    """Return the draws of one epoch, item by item; the results must equal those of the parent process."""
    draws = []
    for index, item in enumerate(loader):
        assert item["worker"] == index % 2
        assert all(torch.equal(item["results"][name], own) for name, own in results[index].items())
        draws.append(item["draws"])
    return draws


def same(a, b):
    return all(torch.equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in x)


def main():
    torch.set_num_threads(4)
    draws = Draws(tempfile.mkdtemp())
    results = [OpResults.__getitem__(draws, i) for i in range(len(draws))]

    def epochs(context, count, **options):
        generator = torch.Generator().manual_seed(5)
        options |= {"batch_size": None, "num_workers": 2, "multiprocessing_context": context}
        loader = DataLoader(draws, generator=generator, **options)
        return [draws_of(loader, results) for _ in range(count)]

    forked = epochs("fork", 2)
    for one, other in combinations([item for epoch in forked for item in epoch], 2):  # two workers, two epochs
        for name in one:
            assert not torch.equal(one[name], other[name]), name
    draws.memory.get_batch(3)  # draws of the parent do not change those of workers
    assert all(same(a, b) for a, b in zip(forked, epochs("fork", 2), strict=True)), "the seed does not repeat the draws"
    first, second = epochs("fork", 2, persistent_workers=True)
    assert same(first, forked[0]) and not same(second, first)
    assert same(*epochs("spawn", 1), forked[0]), "spawned workers draw other items than forked ones"
    print("passed")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere fork is missing, or unsafe beside threads")
def test_workers_ops_equal_those_of_the_parent_and_draws_follow_the_seed():
    child = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=120, env=ENV)
    assert child.returncode == 0 and child.stdout == "passed\n", child.stderr


if __name__ == "__main__":
    main()
