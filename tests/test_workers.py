"""Both ops in the workers of a DataLoader, forked from a process that has used them with several threads, or spawned.

A plain fork is another matter: after a parallel region, GNU's OpenMP waits in the child for threads that are not there,
in torch's own products as in ours. DataLoader workers are safe because torch gives them one thread.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from eaml_ext.ops import PackedKeys, knn, selective_scan

ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


class Answers(Dataset):
    """What the ops answer: the same, wherever they are asked."""

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
        }


def main():
    torch.set_num_threads(4)
    answers = Answers()
    wanted = [answers[i] for i in range(len(answers))]
    for context, workers in (("fork", 2), ("spawn", 1)):  # to spawn one takes seconds
        loader = DataLoader(answers, batch_size=None, num_workers=workers, multiprocessing_context=context)
        for got, own in zip(loader, wanted, strict=True):
            assert all(torch.equal(got[name], own[name]) for name in own), context
        answers[0]  # and the parent goes on
    print("alike")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere fork is missing, or unsafe beside threads")
def test_workers_answer_as_their_parent():
    child = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=120, env=ENV)
    assert child.returncode == 0 and child.stdout == "alike\n", child.stderr


if __name__ == "__main__":
    main()
