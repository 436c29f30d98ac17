"""The main job under torchrun: lines printed once, and the results of one process to rounding, also when resumed."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from eaml_ext import checkpoint
from eaml_ext.experience import ExperienceBuffer
from eaml_ext.jobs import dynamics
from eaml_ext.jobs.config import DynamicsConfig
from eaml_ext.jobs.dynamics import run

SMALL = {
    "num_epochs": 3,
    "updates_per_epoch": 2,
    "tasks_per_update": 5,  # three and two
    "hidden_dim": 8,
    "state_size": 4,
    "test_tasks": 2,
    "adaptation_calls": 1,
    "checkpoint_every": 1,
    "buffer_size": 4000,
}


def torchrun(folder, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "eaml_ext"]
    flags = [*(f"--{name}={value}" for name, value in SMALL.items()), f"--out={folder}", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run([*command, *flags], capture_output=True, text=True, env=environment, timeout=120)


def test_run_two_ranks_continue_the_checkpoint_of_one_process(tmp_path, monkeypatch):
    wanted = run(DynamicsConfig(out=str(tmp_path / "one"), **SMALL))
    batch = dynamics.Transitions.batch

    def interrupted(self, iteration):
        if iteration == 1:
            signal.raise_signal(signal.SIGINT)
        return batch(self, iteration)

    monkeypatch.setattr(dynamics.Transitions, "batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(DynamicsConfig(out=str(tmp_path / "two"), **SMALL))
    monkeypatch.undo()
    child = torchrun(tmp_path / "two", "--resume")
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith("Resumed after 2 of 6 meta-updates.\n")
    once = ("Resumed", "MetaMAML training completed.", "Prediction error on held-out tasks", "best_fit  ", "Results: ")
    assert [child.stdout.count(line) for line in once] == [1] * len(once), child.stdout
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert report["meta_loss"] == pytest.approx(wanted["meta_loss"], rel=1e-4)
    one, two = (checkpoint.load(tmp_path / name / "model.safetensors")[0] for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert any(not torch.equal(two[name], value) for name, value in one.items())  # summed in another order
    for name, variant in wanted["variants"].items():
        assert report["variants"][name]["mean"] == pytest.approx(variant["mean"], rel=1e-2), name
    buffers = [ExperienceBuffer.load(tmp_path / name / "buffer.safetensors").state_dict() for name in ("one", "two")]
    assert buffers[0]["written"] == buffers[1]["written"] == 6 * 5 * 74
    assert all(torch.equal(value, buffers[1]["fields"][name]) for name, value in buffers[0]["fields"].items())
