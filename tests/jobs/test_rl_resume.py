"""The meta-RL jobs with a checkpoint: the same bits after a kill or a signal, more epochs, files of other runs."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from eaml_ext import checkpoint, cli
from eaml_ext.jobs.rl import run
from eaml_ext.jobs.rl_config import UPDATES, MAMLConfig, RL2Config
from eaml_ext.rl import MAMLRL, RL2
from eaml_ext.rl._learner import Learner

SMALL = {"num_epochs": 3, "hidden_dim": 8, "state_size": 4, "test_tasks": 3, "tasks_per_update": 4, "steps": 12}
TOTAL = SMALL["num_epochs"] * UPDATES
ALGOS = {"rl2": RL2Config, "maml": MAMLConfig}
BOTH = pytest.mark.parametrize("algo", ALGOS)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folders = {algo: tmp_path_factory.mktemp(algo) for algo in ALGOS}
    for algo, kind in ALGOS.items():
        run(kind(out=str(folders[algo]), **SMALL))
    return folders


def flags(algo, folder, **changed):
    return [f"--algo={algo}", f"--out={folder}", *(f"--{name}={value}" for name, value in {**SMALL, **changed}.items())]


def assert_same_run(folder, wanted):
    got, want = (json.loads((f / "report.json").read_text()) for f in (folder, wanted))
    for report, path in ((got, folder), (want, wanted)):
        assert report.pop("duration") > 0 and report.pop("date") and report["settings"].pop("out") == str(path)
        report["settings"].pop("checkpoint_every")  # a test resumes with another one
    assert got == want
    got, want = (checkpoint.load(f / "policy.safetensors")[0] for f in (folder, wanted))
    assert got.keys() == want.keys() and all(torch.equal(value, want[name]) for name, value in got.items())


def signal_in(monkeypatch, update, number):
    """Send a signal to this process while it makes an update."""
    make = Learner.update

    def interrupted(self):
        if self.updates == update:
            signal.raise_signal(number)
        return make(self)

    monkeypatch.setattr(Learner, "update", interrupted)


@BOTH
@pytest.mark.parametrize("file", ["checkpoint.safetensors", "settings.toml"])
def test_resume_after_kill_ends_with_equal_bits(algo, file, uninterrupted, tmp_path):
    command = [sys.executable, "-m", "eaml_ext", *flags(algo, tmp_path), "--resume"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (tmp_path / file).exists():  # settings.toml comes before the first checkpoint
        assert process.poll() is None
        time.sleep(0.001)
    if file == "checkpoint.safetensors":
        time.sleep(0.3 * random.SystemRandom().random())
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "report.json").exists()
    assert cli.main([*flags(algo, tmp_path), "--resume"]) == 0
    assert_same_run(tmp_path, uninterrupted[algo])


@BOTH
@pytest.mark.parametrize(("number", "update"), [(signal.SIGINT, 0), (signal.SIGTERM, 13), (signal.SIGINT, TOTAL - 1)])
def test_resume_after_signal_ends_with_equal_bits(algo, number, update, uninterrupted, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        signal_in(patch, update, number)
        assert cli.main([*flags(algo, tmp_path, checkpoint_every=100)]) == 130
    assert "interrupted; the same command with --resume goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and not (tmp_path / "report.json").exists()
    assert cli.main([*flags(algo, tmp_path), "--resume"]) == 0
    assert f"Resumed after {update + 1} of {TOTAL} updates." in capsys.readouterr().out
    assert_same_run(tmp_path, uninterrupted[algo])


@BOTH
def test_main_sigterm_after_training_is_one_line_and_run_goes_on(algo, uninterrupted, tmp_path, monkeypatch, capsys):
    kind = RL2 if algo == "rl2" else MAMLRL
    with monkeypatch.context() as patch:
        patch.setattr(kind, "evaluate", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
        assert cli.main(flags(algo, tmp_path)) == 130
    text = "interrupted after training; the same command with --resume evaluates again"
    assert capsys.readouterr().err == f"eaml-ext: {text}\n"
    assert cli.main([*flags(algo, tmp_path), "--resume"]) == 0
    assert_same_run(tmp_path, uninterrupted[algo])


@BOTH
def test_resume_with_more_epochs_goes_on(algo, tmp_path, monkeypatch, capsys):
    rates, make = [], Learner.update

    def recorded(self):
        rates.append(self.optimizer.param_groups[0]["lr"])
        return make(self)

    assert cli.main(flags(algo, tmp_path, num_epochs=1)) == 0
    before = json.loads((tmp_path / "report.json").read_text())
    monkeypatch.setattr(Learner, "update", recorded)
    assert cli.main([*flags(algo, tmp_path, num_epochs=2, test_tasks=2), "--resume"]) == 0
    assert "Resumed after 10 of 20 updates." in capsys.readouterr().out
    after = json.loads((tmp_path / "report.json").read_text())
    assert after["curve"][:10] == before["curve"] and len(after["curve"]) == 20
    falling = [3e-3 * (1 - i / 20) for i in range(10, 20)]
    assert rates == pytest.approx(falling if algo == "rl2" else [3e-3] * 10)
    assert cli.main([*flags(algo, tmp_path, num_epochs=1), "--resume"]) == 2
    path = tmp_path / "checkpoint.safetensors"
    error = f"eaml-ext: resume: checkpoint {path} holds 20 updates, num_epochs=1 makes 10\n"
    assert capsys.readouterr().err.endswith(error)


@BOTH
def test_resume_of_other_settings_is_refused_by_name_and_changes_nothing(algo, uninterrupted, capsys):
    folder = uninterrupted[algo]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    rate, value = ("lr", 0.003) if algo == "rl2" else ("outer_lr", 0.003)
    for name, stored, given in (("gamma", 0.99, 0.5), (rate, value, 0.1), ("reward_scale", "auto", 0.5)):
        assert cli.main([*flags(algo, folder, **{name: given}), "--resume"]) == 2
        text = f"checkpoint {folder}/checkpoint.safetensors is of a run with {name}={stored!r}, this one has {given!r}"
        assert capsys.readouterr().err == f"eaml-ext: resume: {text}\n"
    other = "maml" if algo == "rl2" else "rl2"
    assert cli.main([*flags(other, folder), "--resume"]) == 2
    assert f", not of --algo {other}; " in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@BOTH
@pytest.mark.parametrize("part", ["settings", "curve", "reward_scale", "learner", "optimizer", "updates"])
def test_resume_checkpoint_without_a_part_is_refused(algo, part, uninterrupted, tmp_path, capsys):
    state = checkpoint.load_state(uninterrupted[algo] / "checkpoint.safetensors")
    del (state["learner"] if part in ("optimizer", "updates") else state)[part]
    checkpoint.save_state(tmp_path / "checkpoint.safetensors", state, kind=f"{algo}-run")
    assert cli.main([*flags(algo, tmp_path), "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("eaml-ext: ") and not (tmp_path / "settings.toml").exists()


@BOTH
def test_resume_damaged_checkpoint_is_refused_and_a_new_run_replaces_it(algo, tmp_path, capsys):
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(b"x" * 100)
    assert cli.main([*flags(algo, tmp_path), "--resume"]) == 2
    assert "damaged" in capsys.readouterr().err and path.read_bytes() == b"x" * 100
    assert cli.main([*flags(algo, tmp_path, num_epochs=1, steps=4), "--overwrite"]) == 0
    assert len(checkpoint.load_state(path, kind=f"{algo}-run")["curve"]) == 10
