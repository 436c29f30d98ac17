"""``eaml-ext info``: its lines on installed packages and kernels, and the commands for missing ones."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement

import eaml_ext
from eaml_ext import cli, info


@pytest.fixture
def wants(monkeypatch):
    """Sets the requirements that the installed package declares."""

    def declare(*always, **extras):
        groups = {"": always, **extras}
        monkeypatch.setattr(
            info, "requirements", lambda: {name: [Requirement(r) for r in rs] for name, rs in groups.items()}
        )

    return declare


def test_report_lists_versions_and_commands_for_missing_packages(wants, capsys):
    wants("torch>=2.11", "no-such-package>=3", tidy=["nor-this-one[a,b]", "numpy"], ok=["numpy>=1"], old=["numpy>=999"])
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"eaml_ext {eaml_ext.__version__}, Python 3.")
    assert f"torch           {torch.__version__}" in "\n".join(lines)
    assert f"  to fix it: {info.INSTALL} 'no-such-package>=3'" in lines
    assert f"  to get it: {info.INSTALL} 'nor-this-one[a,b]'" in lines
    assert f"  to get it: {info.INSTALL} 'numpy>=999'" in lines
    assert sum("to get it: " in line and "FORCE_CUDA" not in line for line in lines) == 2


def test_report_long_package_name_does_not_run_into_its_version(wants):
    long = "a-package-whose-name-is-longer-than-its-column"
    wants("numpy", long)
    lines = info.report().splitlines()
    (of_long,) = [line for line in lines if line.startswith(f"  {long}")]
    (of_numpy,) = [line for line in lines if line.startswith("  numpy ")]
    assert of_long == f"  {long} missing" and of_numpy.split() == ["numpy", np.__version__]
    assert of_numpy.index(np.__version__) == of_long.index("missing")


def test_report_lists_compiled_kernels(reference_only):
    text = "\n".join(info.kernels())
    if reference_only:
        assert "kernels    missing (" in text
        assert info.BUILD in text
        return
    build = eaml_ext.build_info()
    assert build["compiler"] in text and build["simd"] in text
    assert "selective_scan          compiled    " in text and "knn                     compiled    " in text
    assert ("FORCE_CUDA=1" in text) == (build["cuda"] is None)


def test_main_without_kernels_prints_reason_and_command_and_no_warning():
    code = """
from unittest import mock
import torch
mock.patch.object(torch.ops, "load_library", side_effect=OSError("the test hides them")).start()
from eaml_ext import cli
cli.main(["info"])
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert "kernels    missing (" in done.stdout and info.BUILD in done.stdout
    assert done.stderr == ""


WITHOUT_TORCH = """
import sys
from importlib import metadata
sys.modules["torch"] = None
find = metadata.version
def version(name):
    if name == "torch":
        raise metadata.PackageNotFoundError(name)
    return find(name)
metadata.version = version
from eaml_ext import cli, info
from packaging.requirements import Requirement
info.requirements = lambda: {"": [Requirement("torch>=2.11")]}
cli.main(["info"])
"""


def test_main_without_torch_prints_command_that_installs_it():
    out = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=True).stdout
    assert "unknown: torch is missing" in out and f"to fix it: {info.INSTALL} 'torch>=2.11'" in out


def test_main_closed_pipe_is_no_error():
    command = [sys.executable, "-c", WITHOUT_TORCH]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 0


def test_requirements_package_not_installed_is_empty(monkeypatch):
    def nothing(name):
        raise info.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(info.metadata, "requires", nothing)
    assert info.requirements() == {}
    assert "is not installed" in info.report()


def test_requirements_are_grouped_by_extra(monkeypatch):
    declared = [
        "torch>=2.11",
        "tomli; python_version < '3'",
        "jax; extra == 'bench'",
        "x; extra == 'a' or extra == 'b'",
    ]

    class Metadata:
        def get_all(self, name):
            return ["bench", "a", "b"]

    monkeypatch.setattr(info.metadata, "requires", lambda name: declared)
    monkeypatch.setattr(info.metadata, "metadata", lambda name: Metadata())
    found = {extra: [r.name for r in rs] for extra, rs in info.requirements().items()}
    assert found == {"": ["torch"], "bench": ["jax"], "a": ["x"], "b": ["x"]}


def test_main_info_with_arguments_exits(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["info", "--quick"])
    assert end.value.code == 2 and "unrecognized arguments: --quick" in capsys.readouterr().err
