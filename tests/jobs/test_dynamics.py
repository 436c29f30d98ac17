"""The main job in small: what it prints, what it leaves, and that adaptation with experience helps."""

import json
import random
import re
import signal
import subprocess
import sys
import time

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.wrappers.vector import TransformReward

from eaml_ext import checkpoint, cli
from eaml_ext.experience import ExperienceBuffer
from eaml_ext.jobs import dynamics
from eaml_ext.jobs.config import DynamicsConfig
from eaml_ext.jobs.dynamics import DynamicsModel, features, run, task_embedding
from eaml_ext.jobs.report import table
from eaml_ext.rl import Trajectories
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


def test_adapted_models_beat_copying_and_no_adaptation_on_unseen_tasks(finished):
    _, results = finished
    errors = {name: variant["mean"] for name, variant in results["variants"].items()}
    assert errors["plain"] < 0.5 * errors["no adaptation"] < errors["copy input"]
    assert errors["best_fit"] < 0.5 * errors["no adaptation"]
    assert errors["best_fit"] < errors["uniform"]
    assert results["meta_loss"][-1] < 0.3 * results["meta_loss"][0]


def test_a_planner_acts_better_with_adapted_models(finished):
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


def test_imagined_steps_are_those_of_the_model_with_each_tasks_parameters():
    model = DynamicsModel(4, 2, hidden_dim=8, state_size=4)
    model.scale.copy_(torch.tensor([1.0, 0.5, 2.0, 3.0]))
    model.mean.fill_(0.1)
    params = {name: p.detach() + 0.1 * torch.randn(3, *p.shape) for name, p in model.named_parameters()}
    obs, action = torch.randn(3, 5, 6, 4), torch.randn(3, 5, 6, 2)
    start = torch.zeros(3, 5, 6, dtype=torch.bool)
    start[1, 2, 3] = True
    imagined = dynamics.BatchedWorldModel(model, params)
    state, steps = imagined.init_hidden(3).expand(3, 5, -1, -1, -1), []
    for t in range(6):
        following, state = imagined.step(obs[:, :, t], action[:, :, t], start[:, :, t], state)
        steps.append(following - obs[:, :, t])
    for i in range(3):
        own = {name: p[i] for name, p in params.items()}
        want = torch.func.functional_call(model, own, (features(obs[i], action[i], start[i]),)) * model.scale
        torch.testing.assert_close(torch.stack([s[i] for s in steps], dim=1), want, rtol=1e-4, atol=1e-5)


def test_folder_holds_report_plot_model_and_buffer(finished):
    folder, results = finished
    report = json.loads((folder / "report.json").read_text())
    assert report["variants"].keys() == results["variants"].keys() and report["settings"]["seed"] == 0
    assert (folder / "report.png").stat().st_size > 10_000
    tensors, metadata = checkpoint.load(folder / "model.safetensors", kind="dynamics")
    settings = metadata["settings"]
    model = DynamicsModel(4, 2, settings["hidden_dim"], settings["state_size"])
    model.load_state_dict(tensors)
    buffer = ExperienceBuffer.load(folder / "buffer.safetensors")
    assert len(buffer) == 8000 and buffer.get_batch(3).context_embedding.shape == (3, 28)


def test_command_line_prints_the_promised_lines_in_order(tmp_path, capsys):
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
        "Adaptation step 0, Hybrid Loss: ",
        "Adaptation step 10, Hybrid Loss: ",
        "Adaptation completed.",
        "=== Hybrid Execution completed successfully ===",
        "Prediction error on held-out tasks",
    ]
    found = [next(i for i, line in enumerate(lines) if line.startswith(p)) for p in patterns]
    assert found == sorted(found)
    assert any("Steps taken: 5" in line for line in lines)


def test_same_seed_same_numbers_and_the_settings_that_a_run_leaves_repeat_it(tmp_path):
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


def assert_same_run(folder, results, uninterrupted):
    wanted_folder, wanted = uninterrupted
    for part in ("meta_loss", "variants", "curves"):
        assert results[part] == wanted[part], part
    for name in ("model", "buffer"):
        got, kept = (checkpoint.load(f / f"{name}.safetensors")[0] for f in (folder, wanted_folder))
        assert got.keys() == kept.keys() and all(torch.equal(value, kept[key]) for key, value in got.items()), name


def test_a_killed_run_resumes_with_the_same_bits(uninterrupted, tmp_path):
    flags = [f"--{name}={value}" for name, value in {**RESUMED, "buffer_size": 8000, "checkpoint_every": 1}.items()]
    command = [sys.executable, "-m", "eaml_ext", *flags, "--threads=1", f"--out={tmp_path}", "--resume"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    path = tmp_path / "checkpoint.safetensors"
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.001)
    time.sleep(0.1 * random.SystemRandom().random())  # a dozen updates and six writes may fall into this
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "report.json").exists()
    results = run(DynamicsConfig(out=str(tmp_path), buffer_size=8000, resume=True, **RESUMED))
    assert_same_run(tmp_path, results, uninterrupted)


def test_ctrl_c_leaves_a_checkpoint_that_resumes(uninterrupted, tmp_path, monkeypatch, capsys):
    flags = [f"--{name}={value}" for name, value in {**RESUMED, "buffer_size": 8000}.items()]
    made = dynamics.update

    def interrupted(*args):
        loss = made(*args)
        if args[-1] == 4:
            signal.raise_signal(signal.SIGINT)
        return loss

    monkeypatch.setattr(dynamics, "update", interrupted)
    assert cli.main([*flags, f"--out={tmp_path}"]) == 130
    assert "the same command with --resume goes on" in capsys.readouterr().err
    monkeypatch.undo()
    assert cli.main([*flags, f"--out={tmp_path}", "--resume"]) == 0
    assert "Resumed after 5 of 12 meta-updates." in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert_same_run(tmp_path, report, uninterrupted)


def test_a_finished_run_resumes_at_its_end_and_other_settings_are_refused(uninterrupted, capsys):
    folder, _ = uninterrupted
    for changed, text in (
        ({"outer_lr": 0.1}, "is of a run with outer_lr=0.003, this one has 0.1"),
        ({"num_epochs": 7}, "is of a run with num_epochs=6, this one has 7"),
    ):
        flags = [f"--{n}={v}" for n, v in {**RESUMED, "buffer_size": 8000, "out": folder, **changed}.items()]
        assert cli.main([*flags, "--resume"]) == 2
        error = capsys.readouterr().err
        assert text in error and error.startswith("eaml-ext: resume: ") and error.count("\n") == 1
    results = run(DynamicsConfig(out=str(folder), buffer_size=8000, resume=True, **RESUMED))
    assert capsys.readouterr().out.startswith("Resumed after 12 of 12 meta-updates.")
    assert_same_run(folder, results, uninterrupted)


def test_resume_of_a_run_of_version_01_is_refused_in_one_sentence(uninterrupted, tmp_path, capsys):
    folder = uninterrupted[0]
    state = checkpoint.load_state(folder / "checkpoint.safetensors", kind="dynamics-run")
    del state["format"]
    checkpoint.save_state(tmp_path / "checkpoint.safetensors", state, kind="dynamics-run")
    flags = [f"--{name}={value}" for name, value in RESUMED.items()]
    assert cli.main([*flags, "--buffer_size=8000", f"--out={tmp_path}", "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("eaml-ext: resume: ") and error.count("\n") == 1
    assert "was begun by version 0.1, whose units differ; start a new run in another folder" in error


def test_a_damaged_checkpoint_is_refused(tmp_path, capsys):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"x" * 100)
    assert cli.main(["--out", str(tmp_path), "--resume"]) == 2
    assert "damaged" in capsys.readouterr().err


def test_any_environment_with_box_observations_works(tmp_path):
    small = {**SMALL, "num_epochs": 1, "updates_per_epoch": 2, "test_tasks": 4, "adaptation_calls": 1}
    results = run(DynamicsConfig(env_name="Pendulum-v1", out=str(tmp_path), **{**small, "plan_tasks": 2}))
    assert results["returns"] == {}  # it does not tell what imagined steps are worth
    assert all(torch.isfinite(torch.tensor(variant["mean"])) for variant in results["variants"].values())


EXTRA_OBSERVATIONS = {
    "clock": lambda t, noise: t,
    "clock in seconds": lambda t, noise: 0.02 * t,
    "constant": lambda t, noise: 5.0,
    "zero": lambda t, noise: 0.0,
    "rounding": lambda t, noise: 1 + 1e-7 * noise,
    "rounding of zero": lambda t, noise: 1e-16 * noise,
    "large clock": lambda t, noise: 1e6 + t,
    "large constant": lambda t, noise: 1e9,
    "large rounding": lambda t, noise: 1e6 + 0.05 * noise,
}


class ClockCartPole(gymnasium.Wrapper):
    """CartPole with observations appended that move by a constant, by rounding errors, or not at all."""

    def __init__(self, extra):
        super().__init__(gymnasium.make("CartPole-v1").unwrapped)
        self.extra, self.generator, self.t = extra, np.random.default_rng(0), 0
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4 + len(extra),), np.float32)

    def observe(self, observation):
        noise = self.generator.normal()
        return np.array([*observation, *(EXTRA_OBSERVATIONS[name](self.t, noise) for name in self.extra)], np.float32)

    def reset(self, *, seed=None, options=None):
        observation, info = self.env.reset(seed=seed, options=options)
        self.t = 0
        return self.observe(observation), info

    def step(self, action):
        observation, *rest = self.env.step(action)
        self.t += 1
        return (self.observe(observation), *rest)


def clock_tasks(*extra):
    """The registered name of a :class:`ClockCartPole`."""
    name = f"EamlClock{len(extra)}-v0"
    gymnasium.register(name, lambda: ClockCartPole(extra), max_episode_steps=500)
    return name


def transitions(column):
    """Trajectories of one task with a single observation, ``(time,)``."""
    column = torch.as_tensor(column, dtype=torch.float32).view(1, -1, 1)
    flags = torch.zeros(1, column.shape[1] - 1, dtype=torch.bool)
    return Trajectories(column[:, :-1], torch.zeros(*flags.shape, 1), column[:, 1:], flags.float(), flags, flags)


@pytest.mark.parametrize("name", EXTRA_OBSERVATIONS)
def test_normalise_observation_that_hardly_moves_has_inputs_and_steps_of_order_one(name):
    noise = torch.randn(400).tolist()
    data = transitions([EXTRA_OBSERVATIONS[name](t, noise[t]) for t in range(400)])
    model = DynamicsModel(1, 1, hidden_dim=4)
    model.normalise(data)
    steps = (data.next_observations - data.observations) / model.scale
    inputs = model.in_units(features(data.observations, data.actions, data.resets))[..., 0]
    assert steps.abs().max() <= 1.001 and inputs.abs().max() < 2
    if "clock" in name:
        torch.testing.assert_close(steps, torch.ones_like(steps), rtol=1e-3, atol=0)
    if "rounding" in name:  # an error that no model can predict must not count
        assert steps.abs().max() < 1e-3 and inputs.abs().max() < 1e-3
    if "constant" in name or name == "zero":
        assert model.scale.item() >= 1 and model.std.item() >= 1  # also where it moves later


@pytest.mark.parametrize("start", [0, 9e5, 1.1e6, 4e6, 1e7, 1.6e7, -1e7])
def test_normalise_clock_with_exact_steps_has_scale_one(start):
    model = DynamicsModel(1, 1, hidden_dim=4)
    model.normalise(transitions(start + torch.arange(21.0)))
    assert model.scale.item() == 1 and model.std.item() == pytest.approx(5.916, rel=1e-3)


@pytest.mark.parametrize("unit", [1.0, 1e-5, 1e-7, 1e-9])
def test_normalise_small_units_scale_with_the_observation(unit):
    observations = torch.randn(100)
    model, other = DynamicsModel(1, 1, hidden_dim=4), DynamicsModel(1, 1, hidden_dim=4)
    model.normalise(transitions(unit * observations))
    other.normalise(transitions(observations))
    assert model.scale.item() == pytest.approx(unit * other.scale.item(), rel=1e-5)
    assert model.std.item() == pytest.approx(unit * other.std.item(), rel=1e-5)


def test_normalise_moving_observation_has_unit_variance_and_unit_mean_square_steps():
    observations = 3 + 2 * torch.randn(1000)
    data = transitions(observations)
    model = DynamicsModel(1, 1, hidden_dim=4)
    model.normalise(data)
    steps = (data.next_observations - data.observations) / model.scale
    assert steps.square().mean().item() == pytest.approx(1, rel=1e-5)
    assert model.mean.item() == pytest.approx(float(observations[:-1].mean()), rel=1e-5)
    assert model.std.item() == pytest.approx(float(observations[:-1].std()), rel=1e-5)


def test_run_observations_that_hardly_move_leave_errors_of_the_same_order(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamics.report, "plot", lambda *_: None)
    small = {**SMALL, "num_epochs": 1, "test_tasks": 8, "adaptation_calls": 1, "query": 20, "tasks_per_update": 4}
    plain, extra = (
        run(DynamicsConfig(env_name=clock_tasks(*names), out=str(tmp_path / str(len(names))), **small))["variants"]
        for names in ((), tuple(EXTRA_OBSERVATIONS))
    )
    for name, variant in plain.items():
        assert 0.1 * variant["mean"] < extra[name]["mean"] < 2 * variant["mean"], name


class FaultyCartPole(ClockCartPole):
    """CartPole whose third step returns what is not finite, in the tasks of one split."""

    def __init__(self, split, reward, observation):
        super().__init__(())
        self.split, self.fault = split, {"reward": reward, "observation": observation}
        self.faulty = False

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.faulty = seed % 4 == SPLITS.index(self.split)  # the last two bits of a SeedTask's seed
        return super().reset(seed=seed, options=options)

    def step(self, action):
        observation, reward, *rest = super().step(action)
        if self.faulty and self.t == 3:
            observation[1] += self.fault["observation"]
            reward += self.fault["reward"]
        return (observation, reward, *rest)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    ("reward", "observation", "text"),
    [
        (float("nan"), 0.0, "reward must be finite, got nan"),
        (0.0, float("nan"), "observation must be finite, got nan"),
        (0.0, float("-inf"), "observation must be finite, got -inf"),
    ],
)
def test_run_one_value_that_is_not_finite_is_named_with_task_and_step(
    split, reward, observation, text, tmp_path, capsys
):
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
        """CartPole without rewards where a planner acts, which is with the tasks of all variants at once."""

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


def test_fingerprint_tells_flipped_actions_apart():
    x = torch.randn(2, 40, 7)
    x[1] = x[0]
    y = torch.stack([x[0, :, 4:5] - x[0, :, 5:6], x[0, :, 5:6] - x[0, :, 4:5]])
    a, b = task_embedding(x, y)
    assert torch.allclose(a, -b, atol=1e-5) and a.abs().max() > 0.5


def test_fingerprint_nearly_constant_inputs_leave_weights_of_the_others_unchanged():
    x = torch.randn(2, 40, 4)
    x[1] = x[0]
    x[1, :, 1] = 50 + 1e-3 * torch.arange(40.0)  # a clock long after the data of the units
    y = (x[..., :1] - 0.5 * x[..., 2:3]).clone()
    weights = task_embedding(x, y).view(2, 4, 1)[:, [0, 2]]
    torch.testing.assert_close(weights[1], torch.tensor([[1.0], [-0.5]]), rtol=0.01, atol=0.01)
    torch.testing.assert_close(weights[0], weights[1], rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    "flags, text",
    [
        (["--num_epochs", "0"], "num_epochs must be > 0"),
        (["--inner_lr", "-1"], "inner_lr must be > 0"),
        (["--inner_lr", "inf"], "inner_lr must be finite"),
        (["--experience_weight", "-1"], "experience_weight must be >= 0"),
        (["--retrieval", "magic"], "invalid choice"),
        (["--buffer_size", "3"], "buffer_size must hold one task"),
        (["--checkpoint_every", "0"], "checkpoint_every must be > 0"),
        (["--plan_tasks", "-1"], "plan_tasks must be >= 0"),
        (["--plan_steps", "0"], "plan_steps must be > 0"),
        (["--plan_horizon", "0"], "plan_horizon must be > 0"),
        (["--plan_candidates", "1"], "plan_candidates must be >= 2"),
        (["--num_epochs", "many"], "invalid int value"),
    ],
)
def test_bad_flags_are_refused_before_anything_runs(flags, text, capsys):
    with pytest.raises(SystemExit) as info:
        cli.main(flags)
    assert info.value.code == 2 and text in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, text",
    [
        (["--env_name", "NoSuch-v0"], "NoSuch"),
        (["--device", "cuda:77"], "device"),
        (["--device", "x"], "x"),
        (["--device", "meta"], "device must be"),
    ],
)
def test_bad_environment_or_device_is_one_sentence(flags, text, tmp_path, capsys):
    assert cli.main([*flags, "--out", str(tmp_path / "r")]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1 and not (tmp_path / "r").exists()


def test_settings_refuse_wrong_types():
    with pytest.raises(TypeError, match="num_epochs must be an integer"):
        DynamicsConfig(num_epochs=1.5)
    with pytest.raises(TypeError, match="resume must be True or False"):
        DynamicsConfig(resume="yes")
    with pytest.raises(TypeError, match="env_name must be a string"):
        DynamicsConfig(env_name=3)


def test_settings_numpy_scalars_become_pythons_and_are_written():
    given = DynamicsConfig(
        num_epochs=np.int64(3),
        seed=np.uint32(7),
        inner_lr=np.float32(0.5),
        outer_lr=np.int32(1),
        env_name=np.str_("Pendulum-v1"),
    )
    assert given == DynamicsConfig(num_epochs=3, seed=7, inner_lr=0.5, outer_lr=1, env_name="Pendulum-v1")
    assert {type(value) for value in vars(given).values()} == {int, float, str, bool}
    assert json.loads(json.dumps(vars(given))) == vars(given) and given.folder == "runs/Pendulum-v1-seed7"
    with pytest.raises(TypeError, match=r"^DynamicsConfig: num_epochs must be an integer, got .*3.0\)?$"):
        DynamicsConfig(num_epochs=np.float64(3))
    with pytest.raises(ValueError, match=r"^DynamicsConfig: inner_lr must be finite, got inf$"):
        DynamicsConfig(inner_lr=np.float64("inf"))


def test_model_numpy_sizes_become_ints():
    model = DynamicsModel(np.int64(4), np.int32(2), hidden_dim=8)
    assert model.sizes == (4, 2, 1) and {type(size) for size in model.sizes} == {int}
    with pytest.raises(ValueError, match=r"^DynamicsModel: action_dim must be > 0, got 0$"):
        DynamicsModel(4, 0)


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert cli.main(["--out", str(tmp_path / "file" / "run")]) == 2
    error = capsys.readouterr()
    assert "file" in error.err and error.err.count("\n") == 1 and "Epoch" not in error.out
