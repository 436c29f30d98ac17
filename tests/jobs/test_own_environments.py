"""Environments of Gymnasium and of users in the jobs: each run ends well, or with one right sentence."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import own_environments
import pytest

from eaml_ext import cli
from eaml_ext.jobs import config_file, memory, report
from eaml_ext.jobs.config import DynamicsConfig
from eaml_ext.jobs.rl_config import MAMLConfig, RL2Config
from eaml_ext.tasks import registry

SMALL = {"num_epochs": 1, "hidden_dim": 8, "state_size": 4, "test_tasks": 2, "tasks_per_update": 4}
FLAGS = {
    "dynamics": {**SMALL, "updates_per_epoch": 2, "shots": 4, "query": 8, "adaptation_calls": 1, "buffer_size": 90},
    "rl2": {**SMALL, "steps": 12, "episodes": 1},
    "maml": {**SMALL, "steps": 12, "rollouts_per_task": 2, "tasks_per_update": 2},
}
CLIFF_WALKING = max(name for name in gymnasium.registry if name.startswith("CliffWalking-"))
OWN = "own_environments:Own"
END_WELL = [
    "Acrobot-v1",
    "Pendulum-v1",
    "MountainCar-v0",
    "MountainCarContinuous-v0",
    "FrozenLake-v1",
    "Blackjack-v1",
    CLIFF_WALKING,
    *(f"{OWN}{name}-v0" for name in ("Dict", "MultiDiscrete", "Endless", "OneStep")),
    *(f"{OWN}{name}-v0" for name in ("Constant", "Clock", "PhysicsInReset")),
]
REFUSED = {
    f"{OWN}NotANumber-v0": r"\w+: observation must be finite, got nan at step 3 of tasks\[\d\] of "
    r"OwnNotANumber-v0-seeds-v1, OwnNotANumber-v0-seeds-v1/(train|valid|test)/0/\d+/\d",
    f"{OWN}Grows-v0": r"\w+: observation must fit Box\(-inf, inf, \(2,\), float32\), got float32 of shape \(3,\) at "
    r"step 5 of tasks\[0\] of OwnGrows-v0-seeds-v1, OwnGrows-v0-seeds-v1/(train|valid|test)/0/\d+/0",
    f"{OWN}Unrewarded-v0": "make_tasks: reward must be a number, got None at step 1 of OwnUnrewarded-v0",
    f"{OWN}FourValues-v0": r"make_tasks: step must take an action and return \(observation, reward, terminated, "
    r"truncated, info\), got ValueError: not enough values to unpack \(expected 5, got 4\) at step 1 "
    r"of OwnFourValues-v0",
    f"{OWN}ResetAlone-v0": r"make_tasks: reset must take seed and options and return \(observation, info\), got "
    r"float32 of shape \(2,\) at step 0 of OwnResetAlone-v0",
    f"{OWN}Buttons-v0": r"make_tasks: env_name 'own_environments:OwnButtons-v0' must have Discrete or Box actions, "
    r"got MultiDiscrete\(\[2 2\]\)",
    f"{OWN}Words-v0": r"make_tasks: env_name 'own_environments:OwnWords-v0' must have observations that "
    r"gymnasium.spaces.flatten flattens, got Sequence\(Discrete\(3\), stack=False\)",
    "no_such_module:Own-v0": r"make_tasks: env_name must name a module that Python finds, got 'no_such_module'",
}


def main(algo, env_name, out, *flags):
    settings = {**FLAGS[algo], "env_name": env_name, "out": out}
    return cli.main(["--algo", algo, *(f"--{name}={value}" for name, value in settings.items()), *flags])


def finite(value):
    """Whether all numbers of a report are finite; NaN and infinity are no JSON."""
    return "NaN" not in json.dumps(value) and "Infinity" not in json.dumps(value)


@pytest.mark.parametrize("algo", ["dynamics", "rl2"])
@pytest.mark.parametrize("env_name", END_WELL)
def test_main_environment_ends_well(env_name, algo, tmp_path, capsys, monkeypatch):
    if "Constant" not in env_name:  # errors of zero have no logarithm
        monkeypatch.setattr(report, "plot", lambda *_: None)
    assert main(algo, env_name, tmp_path) == 0
    results, out = json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().out
    assert finite(results) and f"Results: {tmp_path}" in out
    if algo == "dynamics":
        assert results["variants"]["plain"]["mean"] < 1e3
    else:
        assert len(results["returns"]) == 1
    name = env_name.rpartition(":")[2]
    assert f"{name}: tasks differ by the seed of reset() only" in out
    assert ("seems to draw gain" in out) == ("Physics" in name) and ("seems to draw" in out) == ("Physics" in name)
    unlimited = gymnasium.spec(name).max_episode_steps is None
    assert (f"{name}: the environment has no time limit, so episodes end after 1000 steps." in out) == unlimited


@pytest.mark.parametrize("env_name", ["FrozenLake-v1", f"{OWN}OneStep-v0"])
def test_main_maml_tabular_environment_ends_well(env_name, tmp_path):
    assert main("maml", env_name, tmp_path) == 0
    assert finite(json.loads((tmp_path / "report.json").read_text()))


@pytest.mark.filterwarnings("ignore:RL2.train. 10 of 10 updates were not finite:RuntimeWarning")
@pytest.mark.parametrize("algo", ["dynamics", "rl2"])
@pytest.mark.parametrize("env_name", REFUSED)
def test_main_environment_is_refused_in_one_sentence(env_name, algo, tmp_path, capsys):
    assert main(algo, env_name, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert re.fullmatch(f"eaml-ext: {REFUSED[env_name]}", error.splitlines()[-1]), error
    assert not (tmp_path / "run" / "report.json").exists()


@pytest.mark.parametrize("algo", ["dynamics", "rl2"])
def test_main_lunar_lander_ends_well_or_names_the_missing_package(algo, tmp_path, capsys):
    code = main(algo, "LunarLander-v3", tmp_path)
    error = capsys.readouterr().err
    try:
        import Box2D  # noqa: F401
    except ImportError:
        assert code == 2 and "cannot be made by Gymnasium: " in error and "box2d" in error.lower()
    else:
        assert code == 0


@pytest.mark.parametrize("algo", ["dynamics", "rl2"])
def test_main_exception_of_environment_passes_with_its_traceback(algo, tmp_path):
    with pytest.raises(RuntimeError, match=r"^the simulator has crashed$") as caught:
        main(algo, f"{OWN}Raises-v0", tmp_path)
    assert caught.traceback[-1].path.name == "own_environments.py"


PIXELS = f"{OWN}Pixels-v0"
PEAK = """
import resource, sys
from eaml_ext import cli
code = cli.main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
sys.exit(code)
"""


@pytest.mark.parametrize("updates", [1, pytest.param(11, marks=pytest.mark.exhaustive)])  # 11 fill the buffer
def test_main_pixels_stay_below_2_gb_of_memory(updates, tmp_path):
    flags = {**FLAGS["dynamics"], "buffer_size": 500, "updates_per_epoch": updates, "env_name": PIXELS, "out": tmp_path}
    command = [sys.executable, "-c", PEAK, *(f"--{name}={value}" for name, value in flags.items())]
    child = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert child.returncode == 0, child.stderr
    assert f"Experience Buffer populated with {min(500, 48 * updates)} experiences." in child.stdout
    assert int(child.stdout.split()[-1]) < 2e9


def test_main_pixels_rl2_ends_well(tmp_path):
    assert main("rl2", PIXELS, tmp_path, "--steps", "4", "--tasks_per_update", "2") == 0


def test_main_run_that_exceeds_memory_is_refused_before_collection(tmp_path, capsys, monkeypatch):
    def reset(self, *, seed=None, options=None):
        raise AssertionError("the environment must not be reset")

    monkeypatch.setattr(own_environments.Pixels, "reset", reset)
    monkeypatch.setattr(memory, "available", lambda device: 32 * 10**9)
    argv = ["--env_name", PIXELS, "--test_tasks", "2", "--out", str(tmp_path / "run")]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    text = r"buffer_size must be <= (\d+), got 50000: a run on observations of 100800 numbers needs at least "
    text += r"82.4 GB for buffer_size=50000, 2.3 GB for tasks_per_update=16, and 32.0 GB of memory are free\n"
    found = re.fullmatch(f"eaml-ext: {text}", error)
    assert found, error
    # The named size is accepted, and one above it is not.
    pixels = own_environments.Pixels.observation_space.shape
    sizes = SimpleNamespace(obs_dim=math.prod(pixels), action_dim=2)
    most = int(found[1])
    memory.check(DynamicsConfig(buffer_size=most, test_tasks=2), sizes)
    with pytest.raises(ValueError, match=rf"^DynamicsConfig: buffer_size must be <= {most}, got {most + 100}: "):
        memory.check(DynamicsConfig(buffer_size=most + 100, test_tasks=2), sizes)


@pytest.mark.parametrize("kind", [RL2Config, MAMLConfig])
def test_memory_check_rollouts_name_tasks_per_update(kind, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 10**9)
    with pytest.raises(ValueError, match=rf"^{kind.__name__}: tasks_per_update must be <= \d+, got [\d]+: "):
        memory.check(kind(), SimpleNamespace(obs_dim=100_800, action_dim=2))
    memory.check(kind(), SimpleNamespace(obs_dim=4, action_dim=2))


def test_main_import_of_module_in_current_directory_is_stored_and_repeated(tmp_path, monkeypatch, capsys):
    """The module is the block of the page that defines a task distribution."""
    page = (Path(__file__).parents[2] / "docs" / "bring-your-own.md").read_text()
    (code,) = (block for block in re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S) if "Bandits" in block)
    (tmp_path / "own_bandits.py").write_text(code)
    (tmp_path / "own_nothing.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))
    flags = ["--import", "own_nothing", "--import=own_bandits"]
    assert main("rl2", "Bandits", tmp_path / "a", *flags) == 0
    settings = config_file.read(tmp_path / "a" / "settings.toml")
    assert settings["import"] == "own_nothing,own_bandits" and "import_" not in settings
    assert "differ by the seed" not in capsys.readouterr().out  # the tasks are the user's
    code = f"import sys; from eaml_ext import cli; sys.exit(cli.main({['--config', 'a/settings.toml', '--out', 'b']}))"
    # Another process, whose path has no current directory, as that of an installed script.
    command = [sys.executable, "-c", f"import sys; sys.path.remove(''); {code}"]
    subprocess.run(command, check=True, capture_output=True)
    a, b = (json.loads((tmp_path / name / "report.json").read_text()) for name in "ab")
    assert a["returns"] == b["returns"] and a["curve"] == b["curve"]


@pytest.mark.parametrize("name", ["no_such_module", "own_empty.no_such_module", ".own_empty", "own_empty.py", "a-b"])
def test_main_import_of_missing_module_is_one_sentence(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "own_empty.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert cli.main(["--import", name]) == 2
    text = f"import must name a module that Python finds, got {name!r}"
    assert capsys.readouterr().err == f"eaml-ext: {text}\n" and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flag", ["--import={}", "--env_name={}:Any-v0"])
@pytest.mark.parametrize(
    ("code", "kind", "text"),
    [("1 / 0", ZeroDivisionError, "division"), ("import no_such_module", ModuleNotFoundError, "no_such_module")],
)
def test_main_exception_of_imported_module_passes_with_its_traceback(flag, code, kind, text, tmp_path, monkeypatch):
    module = f"own_broken_{kind.__name__}"
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(kind, match=text) as caught:
        cli.main([flag.format(module)])
    assert any(str(entry.path).endswith(f"{module}.py") for entry in caught.traceback)


def test_decisive_settings_leave_out_import():
    """A run may be resumed when its module has moved."""
    assert DynamicsConfig(import_="a").decisive == DynamicsConfig(import_="b").decisive
