"""What a release is made of: how setup.py chooses flags, one version, the workflows, what the packages must hold."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import eaml_ext

ROOT = Path(__file__).parents[1]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
RELEASE = runpy.run_path(str(ROOT / "tests" / "release_check.py"), run_name="release_check")
README = (ROOT / "README.md").read_text(encoding="utf-8")


# ---- flags -------------------------------------------------------------------------------------------------------


def test_a_flag_that_the_compiler_does_not_know_is_left_out():
    known = {"-O3", "-std=c++20", "-fvisibility=hidden", "-mprefer-vector-width=512"}
    asked = []

    def accepted(command, flag):
        asked.append((tuple(command), flag))
        return flag in known

    assert SETUP["flags"](["cc"], "x86_64", accepted) == [
        "-O3",
        "-std=c++20",
        "-fvisibility=hidden",
        "-mprefer-vector-width=512",
    ]
    assert {command for command, _ in asked} == {("cc",)} and {flag for _, flag in asked} > known
    assert SETUP["flags"](["cc"], "arm64", accepted) == ["-O3", "-std=c++20", "-fvisibility=hidden"]


def test_without_cpp20_there_are_no_kernels():
    assert SETUP["flags"](["old-cc"], "x86_64", lambda command, flag: flag != "-std=c++20") is None


def test_the_compiler_itself_is_asked():
    command = SETUP["compiler"]()
    if command is None:
        pytest.skip("no C++ compiler")
    assert SETUP["accepts"](command, "-O2")
    assert not SETUP["accepts"](command, "-fno-such-flag-anywhere")
    assert not SETUP["accepts"](command, "-mno-such-machine")


def test_the_users_compiler_is_taken_first_and_none_is_none(monkeypatch):
    for CXX, there, wanted in (
        ("ccache g++-99", {"ccache", "g++"}, ["ccache", "g++-99"]),
        ("no-such", {"clang++"}, ["clang++"]),
        ("", {"g++", "clang++"}, ["g++"]),
        ("no-such", set(), None),
    ):
        monkeypatch.setenv("CXX", CXX)
        monkeypatch.setattr(shutil, "which", lambda name, there=there: name if name in there else None)
        assert SETUP["compiler"]() == wanted


def test_where_kernels_cannot_be_built_the_package_is_python_only_and_says_why(monkeypatch, capsys):
    extension = SETUP["extension"]
    here = extension.__globals__
    cases = {
        "MSVC does not have": lambda at: at.setattr(sys, "platform", "win32"),
        "torch.utils.cpp_extension": lambda at: at.setitem(sys.modules, "torch.utils.cpp_extension", None),
        "no C++ compiler": lambda at: at.setitem(here, "compiler", lambda: None),
        "does not know C++20": lambda at: at.setitem(here, "flags", lambda *_: None),
    }
    for why, change in cases.items():
        with monkeypatch.context() as at:
            at.setitem(here, "compiler", lambda: ["c++"])
            change(at)
            assert extension() == {}
        said = capsys.readouterr().err
        assert said.startswith("eaml_ext: building without kernels (") and why in said and said.count("\n") == 1


def test_a_build_that_fails_is_an_error_on_linux_and_python_only_elsewhere(monkeypatch, capsys):
    from torch.utils.cpp_extension import BuildExtension

    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(SETUP["extension"].__globals__, "compiler", lambda: ["c++"])
    monkeypatch.setitem(SETUP["extension"].__globals__, "flags", lambda *_: ["-std=c++20"])
    monkeypatch.setitem(SETUP["extension"].__globals__, "add_cuda", lambda module: None)
    options = SETUP["extension"]()
    (module,) = options["ext_modules"]
    assert module.name == "eaml_ext._C" and "csrc/module.cpp" in module.sources
    assert not any("cuda" in source for source in module.sources)

    def fails(self):
        raise RuntimeError("error: no such thing")

    monkeypatch.setattr(BuildExtension, "build_extensions", fails)
    build = options["cmdclass"]["build_ext"].__new__(options["cmdclass"]["build_ext"])
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(RuntimeError, match="no such thing"):
        build.build_extensions()
    monkeypatch.setattr(sys, "platform", "darwin")
    build.build_extensions()
    assert build.extensions == [] and "(error: no such thing)" in capsys.readouterr().err


# ---- one version ---------------------------------------------------------------------------------------------------


def test_the_version_stands_in_one_place():
    assert RELEASE["version"]() == eaml_ext.__version__
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project and not re.search(r'^version = "', project, flags=re.MULTILINE)
    assert f"## {eaml_ext.__version__}" in (ROOT / "CHANGELOG.md").read_text()


# ---- what the packages hold ----------------------------------------------------------------------------------------


def test_faults_of_an_sdist_are_named():
    faults, wanted = RELEASE["sdist_faults"], RELEASE["WANTED"]
    assert all((ROOT / name).exists() for name in wanted)
    assert faults([*wanted, "csrc/a.cpp"], ["csrc/a.cpp"]) == []
    assert faults(wanted, ["csrc/a.cpp"]) == ["it lacks csrc/a.cpp"]
    assert faults([*wanted, "eaml_ext/_C.so", "build/x"], []) == ["it has eaml_ext/_C.so", "it has build/x"]
    assert "it lacks csrc/common/simd.h" in faults([name for name in wanted if "simd" not in name], [])


def test_faults_of_a_wheel_are_named():
    faults = RELEASE["wheel_faults"]
    plain = ["eaml_ext/__init__.py", "eaml_ext/py.typed", "eaml_ext-0.1.0.dist-info/METADATA"]
    assert faults(plain, kernels=False) == []
    assert faults([*plain, "eaml_ext/_C.cpython-311-x86_64-linux-gnu.so"], kernels=True) == []
    assert faults(plain, kernels=True) == ["it lacks the kernels"]
    assert faults([*plain[:1], "tests/conftest.py"], kernels=False) == ["it lacks eaml_ext/py.typed", "it has tests"]


def test_a_path_of_this_machine_is_found():
    assert RELEASE["paths_named"]({"a": b"/x/y/z", "b": b"/x"}, "/x/y") == ["a names /x/y"]


def test_requirements_of_an_extra_are_printed():
    command = [sys.executable, str(ROOT / "tests" / "release_check.py"), "--requirements", "docs"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert any(line.startswith("mkdocs-material") for line in out) and len(out) == 3


def test_everything_a_manifest_names_is_there():
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        kind, *names = line.split()
        assert kind == "global-exclude" or all((ROOT / name).exists() for name in names), line


# ---- workflows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda p: p.name)
def test_workflows_are_valid_and_their_commands_are_there(path):
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    workflow = yaml.safe_load(path.read_text())
    assert set(workflow) == {"name", True, "permissions", "jobs"} | ({"concurrency"} & set(workflow))  # `on` is True
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for name, job in workflow["jobs"].items():
        assert {"runs-on", "timeout-minutes", "steps"} <= set(job), name
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            assert "uses" not in step or re.search(r"@v\d", step["uses"]), step
            for target in re.findall(r"\bmake ([\w-]+)$", step.get("run", ""), flags=re.MULTILINE):
                assert target in targets, target
            for script in re.findall(r"(?<!\S)(?:\.ci/run|tests/[\w/.]+)", step.get("run", "")):
                assert (ROOT / script).exists(), script
    # every workflow that installs torch installs the release that the Makefile names
    releases = set(re.findall(r"install (torch\S*)", path.read_text()))
    assert releases <= set(re.findall(r"^TORCH_RELEASE := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert releases or "make test-latest" in path.read_text()


def test_continuous_integration_here_and_there_run_the_same():
    assert ".ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK) or sys.platform == "win32"


# ---- the site ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages():
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (extra: docs)")
    return runpy.run_path(str(ROOT / "docs" / "site" / "pages.py"))


def test_every_public_name_has_an_entry(pages):
    text = "\n".join(pages["api_pages"]().values())
    entries = set(re.findall(r"^::: (?:\w+\.)*(\w+)$", text, flags=re.MULTILINE))
    subpackages = [getattr(eaml_ext, name) for name in pages["SUBPACKAGES"]]
    assert set(pages["SUBPACKAGES"]) | {"distributed", "integrations", "jobs"} == set(eaml_ext._SUBPACKAGES)
    public = {name for module in (eaml_ext, *subpackages) for name in module.__all__} - {"__version__", "build_info"}
    assert public <= entries, public - entries


def test_links_of_the_repository_become_links_of_the_site(pages):
    turned = pages["turned"]
    assert turned("[a](docs/ops.md) [b](CONTRIBUTING.md#x)", "index.md") == "[a](ops.md) [b](contributing.md#x)"
    assert turned("![p](benchmarks/results/a-1.png)", "index.md") == "![p](figures/a-1.png)"
    assert turned("![p](../benchmarks/results/a.png)", "figures.md") == "![p](figures/a.png)"
    assert turned("[c](../../CONTRIBUTING.md)", "tutorials/x.md") == "[c](../contributing.md)"
    assert turned("[nn](../eaml_ext/nn/ssm.py)", "cores.md") == "`nn`"
    assert turned("[o](../api/meta.md)", "tutorials/x.md") == "[o](../api/meta.md)"


def test_docstrings_become_markdown(pages):
    turned = runpy.run_path(str(ROOT / "docs" / "site" / "docstrings.py"))["as_markdown"]
    assert turned("A :class:`~eaml_ext.nn.SSM` and :func:`eaml_ext.ops.knn`.") == "A `SSM` and `eaml_ext.ops.knn`."
    example = ">>> f(\n...     1)\n2\n>>> g()"
    assert turned(f"Text.\n\n{example}\n\nMore.") == f"Text.\n\n```pycon\n{example}\n```\n\nMore."
    assert turned("As here::\n\n    >>> f()\n    2") == "As here:\n\n```pycon\n>>> f()\n2\n```"
    assert turned("    x = a >>> b") == "    x = a >>> b"


def test_links_and_pictures_of_readme_and_docs_are_there():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http", "mailto")) and "api/" not in target:  # generated with the site
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_sells_in_its_first_screen():
    screen = README[: README.index("## Install")]
    assert "h_t = exp(dt_t A)" in screen and screen.count("![") == 2
    assert re.findall(r"^make (\w+)", screen, flags=re.MULTILINE) == ["demo", "test"]
    assert len(screen.splitlines()) <= 40
