"""Errors of a job: one sentence for what this package refuses, the traceback for errors of other code."""

import subprocess
import sys

import gymnasium
import pytest
from gymnasium.envs.classic_control import CartPoleEnv

from eaml_ext import cli
from eaml_ext.tasks import CartPoleTasks, registry

SMALL = ["--num_epochs=1", "--updates_per_epoch=1", "--tasks_per_update=2", "--test_tasks=2", "--adaptation_calls=1"]


class RaisingCartPole(CartPoleEnv):
    """CartPole that raises an error in one of its methods."""

    def __init__(self, method, error):
        self._method, self._error = method, error
        self._raise_in("__init__")
        super().__init__()

    def _raise_in(self, method):
        if method == self._method:
            raise self._error("mine")

    def reset(self, **options):
        self._raise_in("reset")
        return super().reset(**options)

    def step(self, action):
        self._raise_in("step")
        return super().step(action)


@pytest.mark.parametrize("algo", cli.SETTINGS)
@pytest.mark.parametrize("method", ["__init__", "reset", "step"])
@pytest.mark.parametrize("error", [ValueError, FileNotFoundError])
def test_main_error_of_an_environment_keeps_its_traceback(algo, method, error, tmp_path):
    name = f"EamlRaising-{algo}-{method}-{error.__name__}-v0".replace("__", "")
    gymnasium.register(name, lambda: RaisingCartPole(method, error), max_episode_steps=50)
    with pytest.raises(error, match=r"^mine$") as info:
        cli.main(["--algo", algo, "--env_name", name, "--out", str(tmp_path)])
    assert info.traceback[-1].name == "_raise_in" and info.traceback[-2].name == method


def factory_that_raises():
    raise ValueError("mine")


def factory_that_calls_the_package_with_a_bad_argument():
    return CartPoleTasks().sample(-1, "train")


def factory_that_reads_a_missing_file():
    return open("/no/such/file")


@pytest.mark.parametrize(
    "factory",
    [factory_that_raises, factory_that_calls_the_package_with_a_bad_argument, factory_that_reads_a_missing_file],
)
def test_main_error_below_a_registered_factory_keeps_its_traceback(factory, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_FACTORIES", {"EamlFactory-v0": factory})
    with pytest.raises((ValueError, OSError)) as info:
        cli.main(["--env_name", "EamlFactory-v0", "--out", str(tmp_path)])
    assert factory.__name__ in [entry.name for entry in info.traceback]


def test_main_fault_of_the_package_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="invalid literal for int"):  # raised by int(), not by a raise statement
        cli.main(["--algo", "rl2", "--out", str(tmp_path / "run")])


def test_main_full_disk_is_one_sentence(tmp_path):
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)\n"
    code = limited + "from eaml_ext import cli; sys.exit(cli.main(sys.argv[1:]))"
    for size, name in ((100, "settings.toml"), (10_000, "checkpoint.safetensors")):
        out = tmp_path / str(size)
        command = [sys.executable, "-c", code, str(size), *SMALL, "--out", str(out)]
        child = subprocess.run(command, capture_output=True, text=True)
        assert child.returncode == 2 and child.stderr.startswith("eaml-ext: "), child.stderr
        assert child.stderr.count("\n") == 1 and "File too large" in child.stderr, child.stderr
        assert not (out / name).exists()


def caught(*packages, last="raise ValueError('x')"):
    """The error of functions of the packages, each called by the one before; the last one runs ``last``."""
    function = None
    for name in reversed(packages):
        space = {"__name__": name, "inner": function}
        exec(f"def call():\n    {last if function is None else 'inner()'}", space)
        function = space["call"]
    try:
        function()
    except Exception as error:
        return error.with_traceback(error.__traceback__.tb_next)  # without the frame of this function


@pytest.mark.parametrize(
    ("packages", "last", "refusal"),
    [
        (["eaml_ext.cli", "eaml_ext.rl"], "raise ValueError('x')", True),
        (["eaml_ext.cli", "torch.utils._contextlib", "eaml_ext.rl"], "raise ValueError('x')", True),
        (["eaml_ext.cli", "contextlib", "gymnasium.vector", "eaml_ext.tasks"], "raise ValueError('x')", True),
        (["eaml_ext.cli", "eaml_ext.rl"], "int('x')", False),
        (["eaml_ext.cli", "torch.nn"], "raise ValueError('x')", False),
        (["eaml_ext.cli", "gymnasium.core"], "raise ValueError('x')", False),
        (["eaml_ext.cli", "my_env"], "raise ValueError('x')", False),
        (["eaml_ext.cli", "eaml_extras"], "raise ValueError('x')", False),
        (["eaml_ext.cli", "my_env", "eaml_ext.tasks"], "raise ValueError('x')", False),
        (["eaml_ext.cli", "eaml_ext._files"], "open('/no/such/file')", True),
        (["eaml_ext.cli", "eaml_ext._files", "pathlib"], "open('/no/such/file')", True),
        (["eaml_ext.cli", "my_env"], "open('/no/such/file')", False),
        (["eaml_ext.cli", "my_env", "pathlib"], "open('/no/such/file')", False),
        (["eaml_ext.cli", "torch.serialization"], "open('/no/such/file')", False),
    ],
)
def test_is_refusal_of_frames(packages, last, refusal):
    assert cli.is_refusal(caught(*packages, last=last)) is refusal
