"""The meta-RL jobs in small: printed lines, files, settings, and policies that load again."""

import json
import math
import re
import sys

import numpy as np
import pytest
import torch

from eaml_ext import cli
from eaml_ext.jobs import report, rl_config, rl_evaluation, rl_report
from eaml_ext.jobs.rl import make_policy, run
from eaml_ext.jobs.rl_config import MAMLConfig, RL2Config
from eaml_ext.jobs.rl_report import epoch_line, length_warning
from eaml_ext.nn.cores import CORES
from eaml_ext.rl import MAMLRL, RL2, SSMMetaPolicy, feature_dim
from eaml_ext.tasks import make_tasks

SMALL = {"num_epochs": 1, "hidden_dim": 8, "state_size": 4, "test_tasks": 6, "tasks_per_update": 4, "steps": 20}


@pytest.mark.parametrize(
    ("algo", "columns", "line"),
    [
        ("rl2", ["episode 1", "episode 2", "episode 3"], "Epoch 0, Return per episode in trials of 20 steps: "),
        ("maml", ["after 1 step"], "Epoch 0, Return per episode after adaptation in rollouts of 20 steps: "),
    ],
)
def test_main_rl_job_leaves_report_and_policy(algo, columns, line, tmp_path, capsys):
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    env = "CartPole-hidden-velocity-v1"
    assert cli.main(["--algo", algo, "--env_name", env, "--out", str(tmp_path), *flags]) == 0
    out = capsys.readouterr().out.splitlines()
    written = json.loads((tmp_path / "report.json").read_text())
    scale = written["reward_scale"]
    assert out[0].startswith(f"Reward scale: {scale} (auto: ") and 0.05 < scale < 0.15
    length = "trial up to 3 x 500 = 1500" if algo == "rl2" else "episode up to 500"
    assert out[1].startswith("Warning: a training ") and f" has 20 steps, an evaluated {length}; --steps " in out[1]
    assert out[2].startswith(line) and out[3] == "Return on 6 held-out tasks:"
    assert [text[:24].strip() for text in out[5:-1]] == ["random actions", "unadapted policy", *columns]
    assert list(written["returns"]) == columns and len(written["curve"]) == 10 and written["skipped_updates"] == 0
    assert list(written["baselines"]) == ["random actions", "unadapted policy"]
    assert written["settings"]["reward_scale"] == "auto" and (tmp_path / "report.png").stat().st_size > 10_000
    assert float(out[2].removeprefix(line)) == pytest.approx(sum(written["curve"]) / 10, rel=1e-3)
    assert all(8 < row["mean"] < 500 for row in (*written["baselines"].values(), *written["returns"].values()))
    assert all(5 < value <= 20 for value in written["curve"])  # the rewards of a step are 1, those of an episode more
    policy = SSMMetaPolicy.load(tmp_path / "policy.safetensors")
    assert policy.has_normalisation and policy.state_dim == feature_dim(make_tasks(env))


@pytest.mark.parametrize("kind", [RL2Config, MAMLConfig])
def test_run_written_settings_repeat_its_numbers(kind, tmp_path):
    small = {**SMALL, "steps": 8, "test_tasks": 2}
    a = run(kind(out=str(tmp_path / "a"), **small))
    assert cli.main(["--config", str(tmp_path / "a" / "settings.toml"), "--out", str(tmp_path / "b")]) == 0
    b = json.loads((tmp_path / "b" / "report.json").read_text())
    assert all(a[part] == b[part] for part in ("returns", "baselines", "curve", "reward_scale"))


def test_run_settings_file_of_version_0_1_sets_rollouts_per_task(tmp_path):
    small = {**SMALL, "steps": 4, "test_tasks": 2, "out": str(tmp_path / "run")}
    lines = [f"{name} = {json.dumps(value)}" for name, value in {"algo": "maml", "rows": 2, **small}.items()]
    (tmp_path / "settings.toml").write_text("\n".join(lines))
    assert cli.main(["--config", str(tmp_path / "settings.toml")]) == 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["settings"]["rollouts_per_task"] == 2


def test_run_continuous_actions_give_finite_returns(tmp_path):
    settings = RL2Config(env_name="Pendulum-v1", out=str(tmp_path), **{**SMALL, "test_tasks": 2})
    results = run(settings)
    assert results["returns"]["episode 3"]["mean"] < 0 and results["baselines"]["random actions"]["mean"] < -500
    assert all(math.isfinite(value) for value in results["curve"])  # no episode ends within 20 steps


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--algo", "magic"], "invalid choice: 'magic'"),
        (["--algo", "rl2", "--inner_lr", "1"], "unrecognized arguments: --inner_lr"),
        (["--algo", "maml", "--episodes", "2"], "unrecognized arguments: --episodes"),
        (["--algo", "rl2", "--lr", "0"], "lr must be > 0"),
        (["--algo", "rl2", "--core", "gru"], "invalid choice: 'gru'"),
        (["--algo", "maml", "--rollouts_per_task", "0"], "rollouts_per_task must be > 0"),
        (["--algo", "maml", "--gamma", "1.5"], "gamma must be <= 1"),
        (["--algo", "rl2", "--reward_scale", "inf"], "reward_scale must be finite"),
        (["--algo", "rl2", "--reward_scale", "0"], "reward_scale must be > 0"),
        (["--algo", "maml", "--reward_scale", "many"], "invalid auto_or_number value: 'many'"),
        (["--algo", "maml", "--checkpoint_every", "0"], "checkpoint_every must be > 0"),
        (["--episodes", "2"], "unrecognized arguments: --episodes"),
    ],
)
def test_main_rl_bad_flag_exits_with_its_name(flags, text, capsys):
    with pytest.raises(SystemExit) as info:
        cli.main(flags)
    assert info.value.code == 2 and text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "text"),
    [(["--env_name", "NoSuch-v0"], "NoSuch"), (["--device", "x"], "device must be"), (["--device", "meta"], "meta")],
)
def test_main_rl_bad_environment_or_device_is_one_sentence(flags, text, tmp_path, capsys):
    assert cli.main(["--algo", "rl2", *flags, "--out", str(tmp_path / "r")]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1 and not (tmp_path / "r").exists()


def test_rl_config_wrong_types_raise():
    with pytest.raises(TypeError, match=r"^RL2Config: steps must be an integer, got 1.5$"):
        RL2Config(steps=1.5)
    with pytest.raises(TypeError, match=r"^MAMLConfig: env_name must be a string, got 3$"):
        MAMLConfig(env_name=3)
    with pytest.raises(ValueError, match=r"^RL2Config: core must be one of .*, got 'gru'$"):
        RL2Config(core="gru")
    with pytest.raises(ValueError, match=r"^RL2Config: reward_scale must be 'auto' or a number > 0, got '0.1'$"):
        RL2Config(reward_scale="0.1")
    with pytest.raises(TypeError, match=r"^MAMLConfig: reward_scale must be a number, got None$"):
        MAMLConfig(reward_scale=None)


def test_rl_config_numpy_scalars_become_pythons():
    given = MAMLConfig(steps=np.int64(20), gamma=np.float64(1), inner_lr=np.float32(0.5), seed=np.uint8(3))
    assert given == MAMLConfig(steps=20, gamma=1.0, inner_lr=0.5, seed=3)
    assert {type(value) for value in vars(given).values()} == {int, float, str, bool}
    assert type(RL2Config(reward_scale=np.float32(0.5)).reward_scale) is float
    assert json.loads(json.dumps(vars(given))) == vars(given)
    with pytest.raises(ValueError, match=r"^RL2Config: gamma must be <= 1, got 1.5$"):
        RL2Config(gamma=np.float32(1.5))


def test_table_returns_of_any_size_stay_in_their_columns():
    columns = {"episode 1": [-612345678.0, -1e38], "a column with a long name": [1.0, 2.0], "nan": [float("nan"), 3.0]}
    returns = {name: report.summary(torch.tensor(column)) for name, column in columns.items()}
    results = {"settings": {"test_tasks": 2}, "baselines": {}, "returns": returns, "skipped_updates": 2}
    head, *rows, skipped = rl_report.table(results).splitlines()[1:]
    assert skipped.startswith("2 updates were skipped")
    assert head.replace("95 % +-", "interval").split() == ["mean", "interval", "median"]
    assert [re.split("  +", row)[0] for row in rows] == ["episode 1", "a column with a long name", "nan"]
    assert [len(re.split("  +", row)) for row in rows] == [4] * 3 and len({len(line) for line in [head, *rows]}) == 1
    assert float(re.split("  +", rows[0])[1]) == pytest.approx(-5e37, rel=0.01)


def test_rl_config_core_flag_lists_all_cores():
    assert set(rl_config.CORES) == set(CORES) and RL2Config().core == "mamba"
    policy = make_policy(RL2Config(core="lru", hidden_dim=8), make_tasks("CartPole-v1"), torch.device("cpu"))
    assert policy.options["core"] == "lru"


def test_main_help_lists_the_settings_of_each_algorithm(capsys):
    for algo, flag in (("dynamics", "--retrieval"), ("rl2", "--episodes"), ("maml", "--inner_steps")):
        with pytest.raises(SystemExit):
            cli.main(["--algo", algo, "--help"])
        assert flag in capsys.readouterr().out


def test_main_rl_job_under_torchrun_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["--algo", "rl2", "--out", str(tmp_path / "r")]) == 2
    assert "this job is one process, torchrun has started 2" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("kind", [RL2Config, MAMLConfig])
def test_length_warning_follows_steps_and_time_limit(kind):
    episodes = 3 if kind is RL2Config else 1
    assert length_warning(kind(steps=500 * episodes), 500) == ""
    text = length_warning(kind(steps=499 * episodes), 500)
    assert text.startswith("Warning: ") and f"has {499 * episodes} steps" in text and str(500 * episodes) in text
    assert bool(length_warning(kind(steps=501 * episodes), 500)) == (kind is RL2Config)


def test_epoch_line_without_a_value_says_so_in_words():
    assert epoch_line(RL2Config(), 3, [float("nan")]).endswith(": all updates were skipped")
    assert epoch_line(MAMLConfig(), 3, [float("nan"), 2.0, 4.0]).endswith(" in rollouts of 100 steps: 3")


def test_plot_without_matplotlib_prints_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    run(RL2Config(out=str(tmp_path), **{**SMALL, "steps": 4, "test_tasks": 1}))  # one task has no interval
    assert "pip install 'eaml_ext[plot]'" in capsys.readouterr().out and not (tmp_path / "report.png").exists()
    assert json.loads((tmp_path / "report.json").read_text())["returns"]["episode 1"]["interval"] is None


@pytest.mark.parametrize(("kind", "learner"), [(RL2Config, RL2), (MAMLConfig, MAMLRL)])
def test_run_evaluates_episodes_up_to_a_time_limit_above_the_default(kind, learner, tmp_path, monkeypatch):
    monkeypatch.setattr(rl_evaluation, "MAX_EPISODE_STEPS", 199)  # all episodes of Pendulum-v1 have 200 steps
    limits, evaluate = [], learner.evaluate

    def recorded(self, *args, max_episode_steps, **options):
        limits.append(max_episode_steps)
        return evaluate(self, *args, max_episode_steps=max_episode_steps, **options)

    monkeypatch.setattr(learner, "evaluate", recorded)
    results = run(kind(env_name="Pendulum-v1", out=str(tmp_path), **{**SMALL, "test_tasks": 2}))
    assert limits == [200] * len(limits) and limits
    assert -2000 < results["baselines"]["random actions"]["mean"] < -500  # a step costs up to 16.3, 6 on average
