"""Releases: the flags that setup.py chooses, the version, the contents of the packages, workflows and the site."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import eaml_ext
from eaml_ext.ops import _library

ROOT = Path(__file__).parents[1]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
RELEASE = runpy.run_path(str(ROOT / "tests" / "release_check.py"), run_name="release_check")
README = (ROOT / "README.md").read_text(encoding="utf-8")


# ---- flags -------------------------------------------------------------------------------------------------------


def test_supported_flags_unknown_to_the_compiler_are_left_out():
    known = {"-O3", "-std=c++20", "-fvisibility=hidden", "-mprefer-vector-width=512"}
    tried = []

    def supports(command, flag):
        tried.append((tuple(command), flag))
        return flag in known

    assert SETUP["supported_flags"](["cc"], "x86_64", supports) == [
        "-O3",
        "-std=c++20",
        "-fvisibility=hidden",
        "-mprefer-vector-width=512",
    ]
    assert {command for command, _ in tried} == {("cc",)} and {flag for _, flag in tried} > known
    assert SETUP["supported_flags"](["cc"], "arm64", supports) == ["-O3", "-std=c++20", "-fvisibility=hidden"]


def test_supported_flags_without_cpp20_are_none():
    assert SETUP["supported_flags"](["old-cc"], "x86_64", lambda command, flag: flag != "-std=c++20") is None


def test_prefix_maps_leave_folders_out_of_file_macros(tmp_path):
    command = SETUP["cxx_command"]()
    if command is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "a.cpp"
    source.write_text("const char* file = __FILE__;\n")
    flags = SETUP["prefix_maps"](command, [str(tmp_path)])
    text = subprocess.run(
        [*command, *flags, "-E", "-P", str(source)], capture_output=True, text=True, check=True
    ).stdout
    assert "file = " in text and (str(tmp_path) not in text or not flags)
    assert SETUP["prefix_maps"](command, ["/a"], lambda command, flag: False) == []


def test_supports_unknown_flags_are_refused_by_the_real_compiler():
    command = SETUP["cxx_command"]()
    if command is None:
        pytest.skip("no C++ compiler")
    assert SETUP["supports"](command, "-O2")
    assert not SETUP["supports"](command, "-fno-such-flag-anywhere")
    assert not SETUP["supports"](command, "-mno-such-machine")


def test_cxx_command_cxx_comes_before_the_defaults(monkeypatch):
    for cxx, installed, wanted in (
        ("ccache g++-99", {"ccache", "g++"}, ["ccache", "g++-99"]),
        ("no-such", {"clang++"}, ["clang++"]),
        ("", {"g++", "clang++"}, ["g++"]),
        ("no-such", set(), None),
    ):
        monkeypatch.setenv("CXX", cxx)
        monkeypatch.setattr(shutil, "which", lambda name, installed=installed: name if name in installed else None)
        assert SETUP["cxx_command"]() == wanted


def test_extension_that_cannot_be_compiled_is_empty_and_logs_the_reason(monkeypatch, capsys):
    extension = SETUP["extension"]
    namespace = extension.__globals__
    cases = {
        "MSVC does not have": lambda at: at.setattr(sys, "platform", "win32"),
        "torch.utils.cpp_extension": lambda at: at.setitem(sys.modules, "torch.utils.cpp_extension", None),
        "no C++ compiler": lambda at: at.setitem(namespace, "cxx_command", lambda: None),
        "does not support C++20": lambda at: at.setitem(namespace, "supported_flags", lambda *_: None),
    }
    for reason, change in cases.items():
        with monkeypatch.context() as at:
            at.setitem(namespace, "cxx_command", lambda: ["c++"])
            change(at)
            assert extension() == {}
        logged = capsys.readouterr().err
        assert logged.startswith("eaml_ext: building without kernels (")
        assert reason in logged and logged.count("\n") == 1


def test_build_that_fails_raises_on_linux_and_leaves_python_only_elsewhere(monkeypatch, capsys):
    from torch.utils.cpp_extension import BuildExtension

    monkeypatch.chdir(ROOT)
    namespace = SETUP["extension"].__globals__
    monkeypatch.setitem(namespace, "cxx_command", lambda: ["c++"])
    monkeypatch.setitem(namespace, "supported_flags", lambda *_: ["-std=c++20"])
    monkeypatch.setitem(namespace, "prefix_maps", lambda *_: [])
    monkeypatch.setitem(namespace, "add_cuda", lambda module: None)
    options = SETUP["extension"]()
    binding, library = options["ext_modules"]
    assert binding.name == "eaml_ext._C" and binding.sources == ["csrc/module.cpp"]
    cpp = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.cpp")}
    assert set(library.sources) == {p for p in cpp if "/cuda/" not in p and "/bench/" not in p} - {"csrc/module.cpp"}

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


# ---- the library and its wheels --------------------------------------------------------------------------------------


def command(name: str, monkeypatch, **options):
    """Return a finalized command of setup.py."""
    from setuptools import Distribution

    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(SETUP["extension"].__globals__, "add_cuda", lambda module: None)
    described = SETUP["extension"]()
    if not described:
        pytest.skip("kernels cannot be compiled here")
    classes = {**described["cmdclass"], "bdist_wheel": SETUP["Wheel"]}
    distribution = Distribution({**described, "cmdclass": classes, "name": "eaml_ext", "version": eaml_ext.__version__})
    made = distribution.get_command_obj(name)
    for option, value in options.items():
        setattr(made, option, value)
    made.ensure_finalized()
    return made


def test_library_has_the_version_in_its_name_and_no_tag_of_python(monkeypatch):
    build = command("build_ext", monkeypatch)
    name = f"_kernels-{eaml_ext.__version__}.so"
    assert Path(build.get_ext_filename("eaml_ext._kernels")) == Path("eaml_ext", name)
    assert build.get_ext_filename("_kernels") == name  # as for builds in place
    assert sysconfig.get_config_var("EXT_SUFFIX") in build.get_ext_filename("eaml_ext._C")
    build.inplace = True
    assert Path(build.get_ext_fullpath("eaml_ext._kernels")).resolve() == _library.path


def test_wheel_portable_has_tag_of_every_python_and_no_binding(monkeypatch):
    wheel = command("bdist_wheel", monkeypatch, portable=True)
    assert wheel.get_tag()[:2] == ("py3", "none") and wheel.get_tag()[2] != "any"
    assert [module.name for module in wheel.distribution.ext_modules] == ["eaml_ext._kernels"]
    assert wheel.distribution.exclude_package_data == {"eaml_ext": ["_C.pyi"]}


def test_wheel_of_one_python_has_binding(monkeypatch):
    wheel = command("bdist_wheel", monkeypatch)
    assert wheel.get_tag()[0] != "py3" and wheel.get_tag()[1] != "none"
    assert [module.name for module in wheel.distribution.ext_modules] == ["eaml_ext._C", "eaml_ext._kernels"]


def test_wheel_deletes_libraries_of_earlier_builds_alone(monkeypatch, tmp_path):
    wheel = command("bdist_wheel", monkeypatch)
    built = tmp_path / "eaml_ext"
    built.mkdir()
    for name in ("_kernels-0.0.1.so", "_C.cpython-30-x.so", "_C.pyi", "info.py"):
        (built / name).touch()
    wheel.distribution.get_command_obj("build").build_lib = str(tmp_path)
    monkeypatch.setattr(SETUP["Wheel"].__base__, "run", lambda self: None)
    wheel.run()
    assert [path.name for path in built.iterdir()] == ["info.py"]
    (built / "_C.pyi").touch()
    wheel.skip_build = True
    wheel.run()
    assert len([*built.iterdir()]) == 2


def test_wheel_check_wheel_of_another_python_is_a_fault(tmp_path):
    pytest.importorskip("pip", reason="pip is not installed")
    wheel = tmp_path / "eaml_ext-0.1.0-cp27-none-any.whl"
    wheel.write_bytes(b"")
    run = [sys.executable, str(ROOT / "tests" / "wheel_check.py"), str(wheel), sys.executable]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 1 and "is not a supported wheel on this platform" in done.stdout, done


# ---- one version ---------------------------------------------------------------------------------------------------


def test_version_is_written_in_one_file():
    assert RELEASE["version"]() == eaml_ext.__version__
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project and not re.search(r'^version = "', project, flags=re.MULTILINE)
    assert f"## {eaml_ext.__version__}" in (ROOT / "CHANGELOG.md").read_text()


# ---- contents of the packages --------------------------------------------------------------------------------------


def test_sdist_faults_lists_missing_and_unwanted_files():
    faults, wanted = RELEASE["sdist_faults"], RELEASE["WANTED"]
    assert all((ROOT / name).exists() for name in wanted)
    assert faults([*wanted, "csrc/a.cpp"], ["csrc/a.cpp"]) == []
    assert faults(wanted, ["csrc/a.cpp"]) == ["it lacks csrc/a.cpp"]
    assert faults([*wanted, "eaml_ext/_C.so", "build/x"], []) == ["it has eaml_ext/_C.so", "it has build/x"]
    assert "it lacks csrc/common/simd.h" in faults([name for name in wanted if "simd" not in name], [])


KERNELS = f"eaml_ext/_kernels-{eaml_ext.__version__}.so"
BINDING = "eaml_ext/_C.cpython-311-x86_64-linux-gnu.so"
MODULES = ["eaml_ext/__init__.py", "eaml_ext/_C.pyi", "eaml_ext/py.typed"]


@pytest.mark.parametrize(
    "tag, added, removed, faults",
    [
        ("py3-none-any", [], ["eaml_ext/_C.pyi"], []),
        ("py3-none-linux_x86_64", [KERNELS], ["eaml_ext/_C.pyi"], []),
        ("cp311-cp311-linux_x86_64", [KERNELS, BINDING], [], []),
        ("py3-none-any", [KERNELS], ["eaml_ext/_C.pyi"], [f"it has {KERNELS}"]),
        ("py3-none-linux_x86_64", [], ["eaml_ext/_C.pyi"], [f"it lacks {KERNELS}"]),
        ("py3-none-linux_x86_64", [KERNELS, BINDING], [], [f"it has {BINDING}", "it has eaml_ext/_C.pyi"]),
        ("cp311-cp311-linux_x86_64", [KERNELS], [], ["it lacks eaml_ext/_C.*.so"]),
        (
            "cp311-cp311-linux_x86_64",
            [KERNELS, BINDING, "eaml_ext/_kernels-0.0.1.so", "eaml_ext/gone.py", "tests/conftest.py"],
            ["eaml_ext/py.typed"],
            [
                "it lacks eaml_ext/py.typed",
                "it has eaml_ext/_kernels-0.0.1.so",
                "it has eaml_ext/gone.py",
                "it has tests/conftest.py",
            ],
        ),
    ],
)
def test_wheel_faults_lists_missing_kernels_and_foreign_files(tag, added, removed, faults):
    names = {*MODULES, *added, "eaml_ext-0.1.0.dist-info/METADATA"} - {*removed}
    assert RELEASE["wheel_faults"](f"eaml_ext-0.1.0-{tag}.whl", dict.fromkeys(names, b""), MODULES) == faults


def test_wheel_faults_library_that_calls_python_is_one():
    files = {"eaml_ext/__init__.py": b"", KERNELS: b"\0PyErr_Clear\0malloc\0"}
    faults = RELEASE["wheel_faults"]("eaml_ext-0.1.0-py3-none-linux_x86_64.whl", files, ["eaml_ext/__init__.py"])
    assert faults == [f"{KERNELS} needs PyErr_Clear of Python"]


def test_modules_are_the_files_of_the_package():
    assert {*MODULES, "eaml_ext/ops/_library.py"} < {*RELEASE["modules"]()}


def test_files_with_path_of_this_machine_are_found():
    assert RELEASE["files_with_path"]({"a": b"/x/y/z", "b": b"/x"}, "/x/y") == ["a contains /x/y"]


def test_release_check_requirements_of_an_extra_are_printed():
    command = [sys.executable, str(ROOT / "tests" / "release_check.py"), "--requirements", "docs"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert any(line.startswith("mkdocs-material") for line in out) and len(out) == 3


def test_manifest_names_only_existing_files():
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        kind, *names = line.split()
        assert kind == "global-exclude" or all((ROOT / name).exists() for name in names), line


# ---- workflows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda p: p.name)
def test_workflow_is_valid_and_its_commands_exist(path):
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
    # every workflow that installs torch installs the Makefile's release
    releases = set(re.findall(r"install (torch\S*)", path.read_text()))
    assert releases <= set(re.findall(r"^TORCH_RELEASE := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert releases or "make test-latest" in path.read_text()


def test_continuous_integration_of_github_runs_the_local_script():
    assert ".ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK) or sys.platform == "win32"


# ---- the site ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages():
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (extra: docs)")
    return runpy.run_path(str(ROOT / "docs" / "site" / "pages.py"))


def test_api_pages_have_an_entry_for_every_public_name(pages):
    text = "\n".join(pages["api_pages"]().values())
    entries = set(re.findall(r"^::: (?:\w+\.)*(\w+)$", text, flags=re.MULTILINE))
    subpackages = [getattr(eaml_ext, name) for name in pages["SUBPACKAGES"]]
    assert set(pages["SUBPACKAGES"]) | {"distributed", "integrations", "jobs"} == set(eaml_ext._SUBPACKAGES)
    public = {name for module in (eaml_ext, *subpackages) for name in module.__all__} - {"__version__", "build_info"}
    assert public <= entries, public - entries


def test_turned_repository_links_become_site_links(pages):
    turned = pages["turned"]
    assert turned("[a](docs/ops.md) [b](CONTRIBUTING.md#x)", "index.md") == "[a](ops.md) [b](contributing.md#x)"
    assert turned("![p](benchmarks/results/a-1.png)", "index.md") == "![p](figures/a-1.png)"
    assert turned("[`meta`](../../eaml_ext/meta)", "tutorials/a.md") == "[`meta`](../api/meta.md)"
    assert turned("![p](../benchmarks/results/a.png)", "figures.md") == "![p](figures/a.png)"
    assert turned("[c](../../CONTRIBUTING.md)", "tutorials/x.md") == "[c](../contributing.md)"
    assert turned("[nn](../eaml_ext/nn/ssm.py)", "cores.md") == "`nn`"
    assert turned("[o](../api/meta.md)", "tutorials/x.md") == "[o](../api/meta.md)"


def test_as_markdown_docstring_becomes_markdown(pages):
    turned = runpy.run_path(str(ROOT / "docs" / "site" / "docstrings.py"))["as_markdown"]
    assert turned("A :class:`~eaml_ext.nn.SSM` and :func:`eaml_ext.ops.knn`.") == "A `SSM` and `eaml_ext.ops.knn`."
    example = ">>> f(\n...     1)\n2\n>>> g()"
    assert turned(f"Text.\n\n{example}\n\nMore.") == f"Text.\n\n```pycon\n{example}\n```\n\nMore."
    assert turned("As here::\n\n    >>> f()\n    2") == "As here:\n\n```pycon\n>>> f()\n2\n```"
    assert turned("    x = a >>> b") == "    x = a >>> b"


def test_docs_links_and_pictures_exist():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http", "mailto")) and "api/" not in target:  # generated with the site
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_first_screen_has_formula_pictures_and_commands():
    screen = README[: README.index("## Install")]
    assert "h_t = exp(dt_t A)" in screen and screen.count("![") == 2
    assert re.findall(r"^make (\w+)", screen, flags=re.MULTILINE) == ["demo", "test"]
    assert len(screen.splitlines()) <= 40
