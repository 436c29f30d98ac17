import subprocess
import sys

import pytest

from eaml_ext.tasks import CartPoleTasks, SeedTasks, make_tasks, register, registry


@pytest.fixture
def clean_registry(monkeypatch):
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))


def test_make_tasks_unregistered_name_gives_seed_tasks():
    assert isinstance(make_tasks("CartPole-v1"), CartPoleTasks)
    assert isinstance(make_tasks("Acrobot-v1"), SeedTasks)


@pytest.mark.filterwarnings("ignore:.*latest versioned:UserWarning")
def test_make_tasks_name_without_version_gives_the_registered_one():
    assert isinstance(make_tasks("CartPole"), CartPoleTasks)


def test_register_replaces_an_earlier_registration(clean_registry):
    class Mine(CartPoleTasks):
        name = "mine-v1"

    register("CartPole-v1", Mine)
    register("a name of my own", Mine)
    assert make_tasks("CartPole-v1").name == make_tasks("a name of my own").name == "mine-v1"


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((1, CartPoleTasks), "env_name must be a string, got int"),
        (("X-v0", CartPoleTasks()), "distribution_factory must be callable without arguments, got CartPoleTasks"),
    ],
)
def test_register_bad_argument_raises(clean_registry, args, text):
    with pytest.raises(TypeError, match=f"^register: {text}$"):
        register(*args)


@pytest.mark.parametrize(
    ("env_name", "text"),
    [
        ("CartPol-v1", "env_name 'CartPol-v1' cannot be made by Gymnasium: .* Did you mean: `CartPole`?"),
        ("CartPole-v9", "env_name 'CartPole-v9' cannot be made by Gymnasium: .*`v0`, `v1`"),
        ("nowhere:Foo-v1", "env_name must name a module that Python finds, got 'nowhere'$"),
        (":Foo-v1", "env_name must name a module that Python finds, got ''$"),
        ("", "env_name '' cannot be made by Gymnasium: Malformed environment ID"),
    ],
)
def test_make_tasks_unusable_environment_raises(env_name, text):
    with pytest.raises(ValueError, match=f"^make_tasks: {text}") as caught:
        make_tasks(env_name)
    assert "\n" not in str(caught.value)


def test_make_tasks_name_that_is_no_string_raises():
    with pytest.raises(TypeError, match=r"^make_tasks: env_name must be a string, got int$"):
        make_tasks(1)
    with pytest.raises(TypeError, match=r"^make_tasks: env_name must be a string, got NoneType$"):
        SeedTasks(None)


def test_import_does_not_load_gymnasium():
    code = "import sys, eaml_ext.tasks, eaml_ext.rl; sys.exit('gymnasium' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0
