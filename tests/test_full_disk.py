"""A disk that is full while something is saved: an OSError of one sentence, and nothing is lost."""

import json
import os
import subprocess
import sys

import pytest
import torch

from eaml_ext import checkpoint
from eaml_ext.jobs.report import write_json

CODE = """
import os, resource, sys, torch
from torch.nn.functional import mse_loss
from eaml_ext import ExperienceBuffer, MetaMAMLTrainer, SSM, TaskBatch, checkpoint

folder = sys.argv[1]

def room(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def refused(call):
    try:
        call()
    except OSError as error:
        assert "\\n" not in str(error) and folder in str(error) and "too large" in str(error), error
        return
    raise AssertionError("nothing was refused")

model, path = SSM(3, 8, 2), os.path.join(folder, "model")
model.save(path)
large = SSM(3, 200, 2)
x, y = torch.randn(4, 3), torch.randn(4, 1)
trainer = MetaMAMLTrainer(torch.nn.Linear(3, 1), progress=False)
tasks, run = TaskBatch([(x, y, x, y)] * 4, batch_size=2), os.path.join(folder, "run")
trainer.meta_train(tasks, 2, checkpoint=run)
before = open(run, "rb").read()
memory = ExperienceBuffer(5000, seed=0)
memory.add(state=torch.randn(5000, 8))
disk = ExperienceBuffer(5000, seed=0, directory=os.path.join(folder, "disk"))
files = sorted(os.listdir(folder))

room(2000)
refused(lambda: large.save(path))
refused(lambda: memory.save(os.path.join(folder, "buffer")))
refused(lambda: trainer.meta_train(tasks, 4, checkpoint=run))
refused(lambda: disk.add(state=torch.randn(3, 8)))
assert sorted(os.listdir(folder)) == files and open(run, "rb").read() == before
assert sorted(os.listdir(os.path.join(folder, "disk"))) == ["buffer.safetensors", "lock"] and len(disk) == 0
assert all(torch.equal(p, q) for p, q in zip(SSM.load(path).parameters(), model.parameters()))

room(resource.RLIM_INFINITY)
disk.add(state=torch.ones(3, 8))
disk.flush()
room(100)
disk.add(state=torch.zeros(3, 8))
refused(disk.flush)  # the flush before stays
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="files of the buffer are allocated by posix_fallocate")
def test_what_was_saved_stays(tmp_path):
    child = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    from eaml_ext import ExperienceBuffer

    buffer = ExperienceBuffer.open(tmp_path / "disk")
    assert len(buffer) == 3 and bool((buffer.get(torch.arange(3)).state == 1).all())


@pytest.mark.parametrize("function", ["os.fsync", "os.replace", "safetensors.torch.save_file"])
def test_each_step_may_fail(tmp_path, monkeypatch, function):
    path = tmp_path / "file"
    checkpoint.save(path, {"a": torch.ones(3)})

    def fails(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(function, fails)
        checkpoint.save(path, {"a": torch.zeros(3)})
    assert torch.equal(checkpoint.load(path)[0]["a"], torch.ones(3)) and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("function", ["os.fsync", "os.replace"])
def test_a_report_too(tmp_path, monkeypatch, function):
    write_json(tmp_path / "report.json", {"a": 1})

    def fails(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(function, fails)
        write_json(tmp_path / "report.json", {"a": 2})
    assert json.loads((tmp_path / "report.json").read_text())["a"] == 1 and os.listdir(tmp_path) == ["report.json"]
