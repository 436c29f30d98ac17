"""The meta-RL jobs in small: printed lines, files, settings, and policies that load again."""

import json
import re

import numpy as np
import pytest
import torch

from eaml_ext import checkpoint, cli
from eaml_ext.jobs import rl, rl_config
from eaml_ext.jobs.rl import make_policy, run
from eaml_ext.jobs.rl_config import MAMLConfig, RL2Config
from eaml_ext.nn.cores import CORES
from eaml_ext.tasks import make_tasks

SMALL = {"num_epochs": 1, "hidden_dim": 8, "state_size": 4, "test_tasks": 6, "tasks_per_update": 4, "steps": 20}


@pytest.mark.parametrize(
    ("algo", "columns", "line"),
    [
        ("rl2", ["episode 1", "episode 2", "episode 3"], "Epoch 0, Return of finished episodes: "),
        ("maml", ["after 0 steps", "after 1 steps"], "Epoch 0, Reward of a step after adaptation: 1.0"),
    ],
)
def test_main_rl_job_leaves_report_and_policy(algo, columns, line, tmp_path, capsys):
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    env = "CartPole-hidden-velocity-v1"
    assert cli.main(["--algo", algo, "--env_name", env, "--out", str(tmp_path), *flags]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(line) and out[1] == "Return on 6 held-out tasks:"
    assert [text[:24].strip() for text in out[3:-1]] == columns
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["returns"]) == columns and len(report["training"]) == 10
    assert 8 < report["returns"][columns[-1]]["mean"] < 500
    tensors, metadata = checkpoint.load(tmp_path / "policy.safetensors", kind="policy")
    settings = (RL2Config if algo == "rl2" else MAMLConfig)(**metadata["settings"])
    make_policy(settings, make_tasks(env), torch.device("cpu")).load_state_dict(tensors)


@pytest.mark.parametrize("kind", [RL2Config, MAMLConfig])
def test_run_written_settings_repeat_its_numbers(kind, tmp_path):
    small = {**SMALL, "steps": 8, "test_tasks": 2}
    a = run(kind(out=str(tmp_path / "a"), **small))
    assert cli.main(["--config", str(tmp_path / "a" / "settings.toml"), "--out", str(tmp_path / "b")]) == 0
    b = json.loads((tmp_path / "b" / "report.json").read_text())
    assert a["returns"] == b["returns"] and a["training"] == b["training"]


def test_run_settings_file_of_version_0_1_sets_rollouts_per_task(tmp_path):
    small = {**SMALL, "steps": 4, "test_tasks": 2, "out": str(tmp_path / "run")}
    lines = [f"{name} = {json.dumps(value)}" for name, value in {"algo": "maml", "rows": 2, **small}.items()]
    (tmp_path / "settings.toml").write_text("\n".join(lines))
    assert cli.main(["--config", str(tmp_path / "settings.toml")]) == 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["settings"]["rollouts_per_task"] == 2


def test_run_continuous_actions_give_finite_returns(tmp_path):
    settings = RL2Config(env_name="Pendulum-v1", out=str(tmp_path), **{**SMALL, "test_tasks": 2})
    assert run(settings)["returns"]["episode 3"]["mean"] < 0


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


def test_rl_config_numpy_scalars_become_pythons():
    given = MAMLConfig(steps=np.int64(20), gamma=np.float64(1), inner_lr=np.float32(0.5), seed=np.uint8(3))
    assert given == MAMLConfig(steps=20, gamma=1.0, inner_lr=0.5, seed=3)
    assert {type(value) for value in vars(given).values()} == {int, float, str}
    assert json.loads(json.dumps(vars(given))) == vars(given)
    with pytest.raises(ValueError, match=r"^RL2Config: gamma must be <= 1, got 1.5$"):
        RL2Config(gamma=np.float32(1.5))


def test_run_returns_of_any_size_stay_in_their_columns(tmp_path, monkeypatch, capsys):
    returns = torch.tensor([[-612345678.0, 1.0, float("nan")], [-1e38, 2.0, 3.0]])
    monkeypatch.setattr(rl, "rl2", lambda *_: (([0.0], 2), returns, ["episode 1", "a column with a long name", "nan"]))
    run(RL2Config(out=str(tmp_path), **SMALL))
    head, *rows, skipped = capsys.readouterr().out.splitlines()[1:-1]
    assert skipped.startswith("2 updates were skipped")
    assert json.loads((tmp_path / "report.json").read_text())["skipped_updates"] == 2
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
