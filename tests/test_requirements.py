"""The locks in requirements/, the bounds of pyproject.toml, and ``latest_check.py``, which compares them."""

import itertools
import re
import runpy
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = runpy.run_path(str(ROOT / "tests" / "release_check.py"), run_name="release_check")["pyproject"]()
LATEST = runpy.run_path(str(ROOT / "tests" / "latest_check.py"), run_name="latest_check")
ALWAYS, EXTRAS = PROJECT["project"]["dependencies"], PROJECT["project"]["optional-dependencies"]
BUILD = PROJECT["build-system"]["requires"]
# The sources of each lock (`make lock`).
SOURCES = {
    "demo": [*ALWAYS, *BUILD, *EXTRAS["plot"], *EXTRAS["progress"]],
    "test": [*ALWAYS, *BUILD, *EXTRAS["dev"]],
    "docs": [*ALWAYS, *EXTRAS["docs"]],
    "release": [*ALWAYS, *EXTRAS["release"]],
}
SYSTEMS = {
    "linux": {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"},
    "macos": {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix", "platform_machine": "arm64"},
    "windows": {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt", "platform_machine": "AMD64"},
}
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
ENVIRONMENTS = [
    pytest.param({"python_version": python, "python_full_version": f"{python}.1", **system}, id=f"{name}-{python}")
    for (name, system), python in itertools.product(SYSTEMS.items(), PYTHONS)
]
LOCKS = {use: (ROOT / "requirements" / f"{use}.txt").read_text() for use in SOURCES}


def applies(requirement: Requirement, environment: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": "", **environment})


def pins(use: str, environment: dict[str, str]) -> dict[str, Version]:
    return {name: Version(version) for name, version in LATEST["locked"](LOCKS[use], environment)}


@pytest.mark.parametrize("use", SOURCES)
def test_lock_lines_are_names_versions_and_markers_alone(use):
    lines = [line for line in LOCKS[use].splitlines() if not line.startswith("#")]
    assert len(lines) > 20
    for line in lines:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*( ; [\w\s'\"<>=!.*()]+)?", line), line


@pytest.mark.parametrize("use", SOURCES)
def test_lock_torch_and_its_cuda_packages_are_left_out(use):
    names = {re.split(r"\W*==", line)[0] for line in LOCKS[use].splitlines()}
    tools = {"nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm"} if use == "test" else set()  # no dependencies of torch
    assert {name for name in names if re.match(r"(torch|triton|cuda|nvidia)(-|$)", name)} == tools


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("use", SOURCES)
def test_lock_every_requirement_of_pyproject_has_one_version_within_its_bounds(use, environment):
    lines = [Requirement(line) for line in LOCKS[use].splitlines() if not line.startswith("#")]
    applying = [requirement.name for requirement in lines if applies(requirement, environment)]
    assert len(applying) == len(set(applying))
    locked = pins(use, environment)
    for requirement in map(Requirement, SOURCES[use]):
        if requirement.name != "torch" and applies(requirement, environment):
            assert locked[canonicalize_name(requirement.name)] in requirement.specifier, requirement


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_locks_package_in_two_locks_has_one_version(environment):
    for a, b in itertools.combinations(LOCKS, 2):
        one, other = pins(a, environment), pins(b, environment)
        assert one.keys() & other.keys() and all(one[name] == other[name] for name in one.keys() & other.keys())


def test_lock_demo_has_no_package_of_the_tests():
    assert not {"pytest", "hypothesis", "transformers", "mujoco", "ruff"} & pins("demo", {}).keys()
    assert {"matplotlib", "tqdm", "gymnasium"} <= pins("demo", {}).keys()


@pytest.mark.parametrize("use", SOURCES)
def test_lock_versions_satisfy_the_installed_torch(use):
    locked = pins(use, {})
    wanted = [r for r in map(Requirement, metadata.requires("torch") or []) if applies(r, {}) and r.name in locked]
    assert len(wanted) >= 3
    assert all(locked[r.name] in r.specifier for r in wanted)


def test_pyproject_extras_that_repeat_others_agree_with_them():
    optional = [
        r for extra in ("plot", "progress", "tensorboard", "transformers", "onnx", "mujoco") for r in EXTRAS[extra]
    ]
    assert EXTRAS["all"] == optional and set(optional) < set(EXTRAS["dev"])
    assert set(BUILD) < set(EXTRAS["dev"]) and PROJECT["dependency-groups"]["build"] == BUILD


def test_pyproject_packages_with_breaking_releases_have_an_upper_bound():
    """torch has none, because pip would replace the torch that the kernels were compiled against."""
    breaking = {"numpy", "gymnasium", "transformers", "mujoco", "matplotlib", "tensorboard", "ruff", "mypy"}
    found = set()
    for requirement in map(Requirement, [*ALWAYS, *itertools.chain(*EXTRAS.values())]):
        operators = {specifier.operator for specifier in requirement.specifier}
        if requirement.name in breaking:
            assert {">=", "<"} <= operators, requirement
            found.add(requirement.name)
        assert requirement.name != "torch" or operators == {">="}
    assert found == breaking


# ---- the newest releases ---------------------------------------------------------------------------------------------


def test_locked_lines_of_another_python_are_left_out():
    text = "# made\na==1 ; python_full_version < '3.11'\na==2 ; python_full_version >= '3.11'\nb-c==3.0.post1\n"
    assert dict(LATEST["locked"](text, {"python_full_version": "3.10.4"})) == {"a": "1", "b-c": "3.0.post1"}
    assert dict(LATEST["locked"](text, {"python_full_version": "3.12.0"})) == {"a": "2", "b-c": "3.0.post1"}


def test_moved_differing_and_new_packages_are_listed():
    assert LATEST["moved"]({"a": "1", "b": "2", "gone": "1"}, {"b": "3", "a": "1", "c": "4"}) == {
        "b": "2 → 3",
        "c": "new → 4",
    }


@pytest.mark.parametrize(
    "text, named",
    [
        ("import numpy as np", ["numpy"]),
        ("    from yaml.nodes import Node", ["PyYAML"]),
        (".venv/lib/python3.11/site-packages/numpy/linalg.py:3: LinAlgError", ["numpy"]),
        (".venv\\lib\\site-packages\\six.py:3: Error", ["six"]),
        ("pytest.importorskip('yaml', reason='numpy is an import')", ["PyYAML"]),
        ("six numpy arrays; import numpy2, yamls", []),
    ],
)
def test_named_in_imports_and_paths_of_a_package_count(text, named):
    modules = {"numpy": ["numpy"], "PyYAML": ["yaml", "_yaml"], "six": ["six"]}
    assert LATEST["named_in"](text, modules) == named


def test_suspects_failing_tests_are_listed_with_what_they_import(tmp_path):
    (tmp_path / "test_a.py").write_text("import numpy\n")
    failures = {"test_a.py::test_x[1]": "E  assert 1 == 2", "test_b.py": "site-packages/six.py:1: Error"}
    modules = {"numpy": ["numpy"], "six": ["six"], "yaml": ["yaml"]}
    assert LATEST["suspects"](failures, modules, tmp_path) == {"numpy": ["test_a.py::test_x[1]"], "six": ["test_b.py"]}


def test_failures_reports_that_failed_are_kept():
    plugin = LATEST["Failures"]()
    assert hash(plugin) == hash(plugin)  # pytest keeps its plugins in a set
    for name, failed in (("a::test_x", True), ("a::test_y", False)):
        plugin.pytest_runtest_logreport(SimpleNamespace(nodeid=name, failed=failed, longreprtext=f"E {name}"))
    plugin.pytest_collectreport(SimpleNamespace(nodeid="b", failed=True, longreprtext="ImportError"))
    assert plugin.tracebacks == {"a::test_x": "E a::test_x", "b": "ImportError"}
