"""A disk that is full during a save: an OSError of one sentence, and the old file stays."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from eaml_ext import checkpoint
from eaml_ext.jobs import config_file, report
from eaml_ext.jobs.config import DynamicsConfig

CODE = """
import os, resource, sys, torch
from torch.nn.functional import mse_loss
from eaml_ext import ExperienceBuffer, MetaMAMLTrainer, SSM, TaskBatch, checkpoint

folder = sys.argv[1]

def limit_files(size):
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

limit_files(2000)
refused(lambda: large.save(path))
refused(lambda: memory.save(os.path.join(folder, "buffer")))
refused(lambda: trainer.meta_train(tasks, 4, checkpoint=run))
refused(lambda: disk.add(state=torch.randn(3, 8)))
assert sorted(os.listdir(folder)) == files and open(run, "rb").read() == before
assert sorted(os.listdir(os.path.join(folder, "disk"))) == ["buffer.safetensors", "lock"] and len(disk) == 0
assert all(torch.equal(p, q) for p, q in zip(SSM.load(path).parameters(), model.parameters()))

limit_files(resource.RLIM_INFINITY)
disk.add(state=torch.ones(3, 8))
disk.flush()
limit_files(100)
disk.add(state=torch.zeros(3, 8))
refused(disk.flush)  # the flush before stays
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="files of the buffer are allocated by posix_fallocate")
def test_save_on_full_disk_raises_and_keeps_saved_files(tmp_path):
    child = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    from eaml_ext import ExperienceBuffer

    buffer = ExperienceBuffer.open(tmp_path / "disk")
    assert len(buffer) == 3 and bool((buffer.get(torch.arange(3)).state == 1).all())


def write_plot(path, value):
    results = {
        "meta_loss": [1.0, value],
        "meta_loss_intervals": [None, 0.5],
        "curves": {"plain": [1.0, value]},
        "curve_intervals": {"plain": [None, 0.5]},
        "settings": {"env_name": "CartPole-v1", "seed": 0},
    }
    report.plot(path, results)


WRITERS = {
    "file.safetensors": lambda path, value: checkpoint.save(path, {"a": torch.full((3,), value)}),
    "report.json": lambda path, value: report.write_json(path, {"a": value}),
    "report.png": write_plot,
    "settings.toml": lambda path, value: config_file.write(path.parent, DynamicsConfig(inner_lr=value)),
}


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("file.safetensors", "safetensors.torch.save_file"),
        *itertools.product(WRITERS, ["os.fsync", "os.replace", "os.chmod"]),
    ],
)
def test_write_failed_step_keeps_old_file_and_no_other(name, function, tmp_path, monkeypatch):
    if name == "report.png":
        pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    path, write = tmp_path / name, WRITERS[name]
    write(path, 1.0)
    old = path.read_bytes()

    def fails(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(function, fails)
        write(path, 2.0)
    assert path.read_bytes() == old and os.listdir(tmp_path) == [name]
    write(path, 2.0)
    assert path.read_bytes() != old
