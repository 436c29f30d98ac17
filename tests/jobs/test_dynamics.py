"""The main job in small: printed lines, files, resumed runs, and the errors of adapted models."""

import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone

import gymnasium
import numpy as np
import pytest
import torch
from clock_cartpole import EXTRA_OBSERVATIONS, FaultyCartPole, clock_tasks
from gymnasium.wrappers.vector import TransformReward

import eaml_ext
from eaml_ext import checkpoint, cli
from eaml_ext.experience import ExperienceBuffer
from eaml_ext.jobs import dynamics
from eaml_ext.jobs.config import DynamicsConfig
from eaml_ext.jobs.dynamics import run
from eaml_ext.jobs.report import table
from eaml_ext.jobs.world_model import DynamicsModel
from eaml_ext.tasks import SPLITS, CartPoleTasks, registry

SMALL = {
    "num_epochs": 12,
    "hidden_dim": 16,
    "state_size": 8,
    "test_tasks": 24,
    "adaptation_calls": 11,
    "plan_tasks": 0,
}


PLANNING = {"plan_tasks": 16, "plan_steps": 60, "plan_horizon": 12, "plan_candidates": 16}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, run(DynamicsConfig(out=str(folder), buffer_size=8000, **{**SMALL, **PLANNING}))


def test_run_adapted_models_predict_unseen_tasks_better(finished):
    _, results = finished
    errors = {name: variant["mean"] for name, variant in results["variants"].items()}
    assert errors["plain"] < 0.5 * errors["no adaptation"] < errors["copy input"]
    assert errors["best_fit"] < 0.5 * errors["no adaptation"]
    assert errors["best_fit"] < errors["uniform"]
    assert results["meta_loss"][-1] < 0.3 * results["meta_loss"][0]


def test_run_adapted_models_raise_the_return_of_the_planner(finished):
    folder, results = finished
    returns = {name: row["mean"] for name, row in results["returns"].items()}
    assert list(returns) == ["random actions", *list(results["variants"])[1:]]  # no model copies its input
    assert returns["plain"] > returns["no adaptation"] + 5 and returns["best_fit"] > returns["no adaptation"] + 5
    assert returns["plain"] > returns["random actions"] + 15 and max(returns.values()) <= PLANNING["plan_steps"]
    assert json.loads((folder / "report.json").read_text())["returns"] == results["returns"]
    text = table(results["variants"], results["returns"], 60).splitlines()
    assert "in 60 steps" in text[0] and "return" in text[1] and text[1].count("+-") == 2
    rows = {line[:16].strip(): line[16:].split() for line in text[2:]}
    assert rows["random actions"][:3] == ["-"] * 3 and rows["copy input"][3:] == ["-"] * 2
    assert rows["plain"][3] == f"{returns['plain']:.1f}" and {len(row) for row in rows.values()} == {5}
    short = table(results["variants"], {}, 60).splitlines()
    assert "return" not in short[0] and {len(line[16:].split()) for line in short[2:]} == {3}


def test_run_folder_holds_report_plot_model_and_buffer(finished):
    folder, results = finished
    report = json.loads((folder / "report.json").read_text())
    assert report["variants"].keys() == results["variants"].keys() == report["curve_intervals"].keys()
    assert report["version"] == eaml_ext.__version__ and report["algo"] == "dynamics" and report["duration"] > 0
    assert DynamicsConfig(**report["settings"]).folder == str(folder) and "resume" not in report["settings"]
    written = datetime.fromisoformat(report["date"])
    assert written.tzinfo == timezone.utc and abs(written - datetime.now(timezone.utc)) < timedelta(hours=1)
    for name, row in report["variants"].items():
        assert report["curves"][name][-1] == pytest.approx(row["mean"])
        assert report["curve_intervals"][name][-1] == row["interval"] > 0
        assert len(report["curves"][name]) == len(report["curve_intervals"][name])
    assert len(report["meta_loss_intervals"]) == len(report["meta_loss"]) == SMALL["num_epochs"]
    assert (folder / "report.png").stat().st_size > 10_000
    model = DynamicsModel.load(folder / "model.safetensors")
    assert model.ssm.hidden_dim == SMALL["hidden_dim"] and (model.scale != 1).all()
    buffer = ExperienceBuffer.load(folder / "buffer.safetensors")
    assert len(buffer) == 8000 and buffer.get_batch(3).context_embedding.shape == (3, 28)


def test_main_prints_documented_lines_in_order(tmp_path, capsys):
    arguments = [
        "--num_epochs",
        "2",
        "--updates_per_epoch",
        "1",
        "--tasks_per_update",
        "4",
        "--hidden_dim",
        "8",
        "--test_tasks",
        "3",
        "--plan_steps",
        "5",
    ]
    assert cli.main([*arguments, "--adaptation_calls", "11", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    patterns = [
        "Epoch 0, Meta Loss: ",
        "MetaMAML training completed.",
        "Experience Buffer populated with 592 experiences.",
        "Starting test-time adaptation with Experience Buffer...",
        "Adaptation step 0, Hybrid Loss: ",  # steps are gradient steps, 5 in each call of the Adapter
        "Adaptation step 50, Hybrid Loss: ",
        "Adaptation completed.",
        "=== Hybrid Execution completed successfully ===",
        "Prediction error on held-out tasks",
    ]
    found = [next(i for i, line in enumerate(lines) if line.startswith(p)) for p in patterns]
    assert found == sorted(found)
    steps = [line for line in lines if line.startswith("Adaptation step")]
    assert len(steps) == 6 and all(line.endswith(", Steps taken: 5") for line in steps)


def test_run_same_seed_or_written_settings_repeat_its_numbers(tmp_path):
    small = {**SMALL, "num_epochs": 2, "updates_per_epoch": 2, "test_tasks": 4, "adaptation_calls": 2}
    a = run(DynamicsConfig(out=str(tmp_path / "a"), **small))
    assert cli.main(["--config", str(tmp_path / "a" / "settings.toml"), "--out", str(tmp_path / "b")]) == 0
    b = json.loads((tmp_path / "b" / "report.json").read_text())
    other = run(DynamicsConfig(out=str(tmp_path / "c"), seed=1, **small))
    assert a["variants"] == b["variants"] and a["meta_loss"] == b["meta_loss"] != other["meta_loss"]


RESUMED = {**SMALL, "num_epochs": 6, "updates_per_epoch": 2, "test_tasks": 4, "adaptation_calls": 2}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(DynamicsConfig(out=str(folder), buffer_size=8000, **RESUMED))


def report_of(folder):
    """The report without date and duration of the run and the name of its folder."""
    report = json.loads((folder / "report.json").read_text())
    assert report.pop("duration") > 0 and report.pop("date") and report["settings"].pop("out") == str(folder)
    return report


def assert_same_run(folder, uninterrupted):
    wanted_folder, _ = uninterrupted
    assert report_of(folder) == report_of(wanted_folder)
    for name in ("model", "buffer"):
        got, kept = (checkpoint.load(f / f"{name}.safetensors")[0] for f in (folder, wanted_folder))
        assert got.keys() == kept.keys() and all(torch.equal(value, kept[key]) for key, value in got.items()), name


def interrupt_at(monkeypatch, update, number=signal.SIGINT):
    """Send a signal while the main job makes meta-update ``update``."""
    batch = dynamics.Transitions.batch

    def interrupted(self, iteration):
        if iteration == update:
            signal.raise_signal(number)
        return batch(self, iteration)

    monkeypatch.setattr(dynamics.Transitions, "batch", interrupted)


def test_resume_after_kill_ends_with_equal_bits(uninterrupted, tmp_path):
    flags = [f"--{name}={value}" for name, value in {**RESUMED, "buffer_size": 8000, "checkpoint_every": 1}.items()]
    command = [sys.executable, "-m", "eaml_ext", *flags, "--threads=1", f"--out={tmp_path}", "--resume"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    path = tmp_path / "checkpoint.safetensors"
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.001)
    time.sleep(0.1 * random.SystemRandom().random())  # the time of a dozen updates and six writes
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "report.json").exists()
    run(DynamicsConfig(out=str(tmp_path), buffer_size=8000, resume=True, **RESUMED))
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_resume_after_ctrl_c_or_sigterm_ends_with_equal_bits(number, uninterrupted, tmp_path, monkeypatch, capsys):
    flags = [f"--{name}={value}" for name, value in {**RESUMED, "buffer_size": 8000}.items()]
    interrupt_at(monkeypatch, 4, number)
    assert cli.main([*flags, f"--out={tmp_path}"]) == 130
    assert "the same command with --resume goes on" in capsys.readouterr().err
    monkeypatch.undo()
    assert cli.main([*flags, f"--out={tmp_path}", "--resume"]) == 0
    assert "Resumed after 5 of 12 meta-updates." in capsys.readouterr().out
    assert_same_run(tmp_path, uninterrupted)


def test_resume_of_finished_run_repeats_report_and_refuses_other_settings(uninterrupted, capsys):
    folder, _ = uninterrupted
    before = report_of(folder)
    for changed, text in (
        ({"outer_lr": 0.1}, "is of a run with outer_lr=0.003, this one has 0.1"),
        ({"num_epochs": 5}, "holds 12 meta-updates, num_epochs=5 makes 10"),
    ):
        flags = [f"--{n}={v}" for n, v in {**RESUMED, "buffer_size": 8000, "out": folder, **changed}.items()]
        assert cli.main([*flags, "--resume"]) == 2
        error = capsys.readouterr().err
        assert text in error and error.startswith("eaml-ext: resume: ") and error.count("\n") == 1
        assert report_of(folder) == before
    run(DynamicsConfig(out=str(folder), buffer_size=8000, resume=True, **RESUMED))
    assert capsys.readouterr().out.startswith("Resumed after 12 of 12 meta-updates.")
    assert report_of(folder) == before


def test_resume_with_more_epochs_goes_on_by_the_schedule_of_the_new_total(uninterrupted, tmp_path, monkeypatch, capsys):
    rates, update = [], dynamics.MetaMAMLTrainer._update

    def recorded(self, *args):
        rates.append(self.maml.optimizer.param_groups[0]["lr"])
        return update(self, *args)

    monkeypatch.setattr(dynamics.MetaMAMLTrainer, "_update", recorded)
    results = {}
    for folder in ("a", "b"):  # b is interrupted within the epochs that are added
        shutil.copytree(uninterrupted[0], tmp_path / folder)
        flags = [f"--{n}={v}" for n, v in {**RESUMED, "buffer_size": 8000, "num_epochs": 8}.items()]
        flags += [f"--out={tmp_path / folder}", "--resume"]
        if folder == "b":
            with monkeypatch.context() as patch:
                interrupt_at(patch, 13)
                assert cli.main(flags) == 130
        assert cli.main(flags) == 0
        results[folder] = json.loads((tmp_path / folder / "report.json").read_text())
    want = [DynamicsConfig().outer_lr * (1 + math.cos(math.pi * i / 16)) / 2 for i in (*range(12, 16), *range(12, 16))]
    assert rates == pytest.approx(want, rel=1e-9)
    assert "Resumed after 12 of 16 meta-updates." in capsys.readouterr().out
    assert results["a"]["meta_loss"][:6] == uninterrupted[1]["meta_loss"] and len(results["a"]["meta_loss"]) == 8
    assert_same_run(tmp_path / "b", (tmp_path / "a", results["a"]))


def test_resume_damaged_checkpoint_is_refused(tmp_path, capsys):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"x" * 100)
    assert cli.main(["--out", str(tmp_path), "--resume"]) == 2
    assert "damaged" in capsys.readouterr().err


def test_run_environment_without_outcomes_has_no_returns(tmp_path):
    small = {**SMALL, "num_epochs": 1, "updates_per_epoch": 2, "test_tasks": 4, "adaptation_calls": 1}
    results = run(DynamicsConfig(env_name="Pendulum-v1", out=str(tmp_path), **{**small, "plan_tasks": 2}))
    assert results["returns"] == {}  # no rewards of imagined steps
    assert all(torch.isfinite(torch.tensor(variant["mean"])) for variant in results["variants"].values())


def test_run_observations_that_hardly_move_leave_errors_of_the_same_order(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamics.report, "plot", lambda *_: None)
    small = {**SMALL, "num_epochs": 1, "test_tasks": 8, "adaptation_calls": 1, "query": 20, "tasks_per_update": 4}
    plain, extra = (
        run(DynamicsConfig(env_name=clock_tasks(*names), out=str(tmp_path / str(len(names))), **small))["variants"]
        for names in ((), tuple(EXTRA_OBSERVATIONS))
    )
    for name, variant in plain.items():
        assert 0.1 * variant["mean"] < extra[name]["mean"] < 2 * variant["mean"], name


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    ("reward", "observation", "text"),
    [
        (float("nan"), 0.0, "reward must be finite, got nan"),
        (0.0, float("nan"), "observation must be finite, got nan"),
        (0.0, float("-inf"), "observation must be finite, got -inf"),
    ],
)
def test_run_value_that_is_not_finite_is_named_with_task_and_step(split, reward, observation, text, tmp_path, capsys):
    name = f"EamlFaulty-{split}-{text.split()[0]}{observation}".replace(".", "") + "-v0"
    gymnasium.register(name, lambda: FaultyCartPole(split, reward, observation), max_episode_steps=500)
    small = {**SMALL, "num_epochs": 1, "updates_per_epoch": 1, "test_tasks": 3, "adaptation_calls": 1}
    flags = [f"--{key}={value}" for key, value in small.items()]
    assert cli.main(["--env_name", name, *flags, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    where = rf"step 3 of tasks\[0\] of {name}-seeds-v1, {name}-seeds-v1/{split}/0/0/0"
    assert re.fullmatch(f"eaml-ext: collect: {text} at {where}", error.splitlines()[-1]), error
    assert not (tmp_path / "report.json").exists()


def test_run_reward_of_a_planned_episode_that_is_not_finite_is_named(tmp_path, monkeypatch):
    class Faulty(CartPoleTasks):
        """CartPole without rewards where a planner acts: it plays the tasks of all variants at once."""

        def make_env(self, tasks):
            env = super().make_env(tasks)
            return env if len(tasks) != 2 * 5 else TransformReward(env, lambda rewards: rewards * np.nan)

    monkeypatch.setattr(registry, "_FACTORIES", {"EamlFaultyPlans-v0": Faulty})
    small = {**SMALL, "num_epochs": 1, "updates_per_epoch": 1, "test_tasks": 3, "adaptation_calls": 1}
    planning = {"plan_tasks": 2, "plan_steps": 3, "plan_candidates": 2, "plan_horizon": 2}
    with pytest.raises(ValueError, match=r"^collect: reward must be finite, got nan at step 1 of tasks\[0\] of "):
        run(DynamicsConfig(env_name="EamlFaultyPlans-v0", out=str(tmp_path), **{**small, **planning}))


WITHOUT_EXTRAS = """
import pkgutil, sys
sys.modules["matplotlib"] = sys.modules["tqdm"] = None  # `import` then raises ImportError
import eaml_ext
for module in pkgutil.walk_packages(eaml_ext.__path__, "eaml_ext."):
    if module.name not in ("eaml_ext._C", "eaml_ext.__main__") and "integrations" not in module.name:
        __import__(module.name)
sys.exit(eaml_ext.cli.main(sys.argv[1:]))
"""


def test_run_without_matplotlib_and_tqdm_leaves_out_plot_and_bars_only(tmp_path):
    small = {**SMALL, "num_epochs": 1, "updates_per_epoch": 1, "test_tasks": 3, "adaptation_calls": 1}
    flags = [f"--{key}={value}" for key, value in small.items()]
    command = [sys.executable, "-c", WITHOUT_EXTRAS, *flags, "--out", str(tmp_path)]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    lines = [line.split(":")[0] for line in child.stdout.splitlines()]
    assert {"Epoch 0, Meta Loss", "Adaptation step 0, Hybrid Loss", "Plot left out"} <= set(lines)
    assert child.stdout.count("pip install 'eaml_ext[plot]'") == 1
    assert (tmp_path / "report.json").exists() and not (tmp_path / "report.png").exists()


@pytest.mark.parametrize(
    "flags, text",
    [
        (["--env_name", "NoSuch-v0"], "NoSuch"),
        (["--device", "cuda:77"], "device"),
        (["--device", "x"], "x"),
        (["--device", "meta"], "device must be"),
    ],
)
def test_main_bad_environment_or_device_is_one_sentence(flags, text, tmp_path, capsys):
    assert cli.main([*flags, "--out", str(tmp_path / "r")]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1 and not (tmp_path / "r").exists()
