"""``eaml-ext info``: installed packages, compiled kernels, and the commands that install the missing ones."""

import platform
import shlex
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata

from packaging.requirements import Requirement

import eaml_ext
from eaml_ext import _terminal

INSTALL = f"{shlex.quote(sys.executable)} -m pip install"
BUILD = f"{INSTALL} --force-reinstall --no-deps --no-cache-dir ."  # run in the source folder
OPS = ("selective_scan", "knn")


def report() -> str:
    """Return the text of ``eaml-ext info``.

    >>> print(report().splitlines()[0].split()[0])
    eaml_ext
    """
    lines = [f"eaml_ext {eaml_ext.__version__}, Python {platform.python_version()}, {platform.platform()}", ""]
    wanted = requirements()
    unmet = [r for r in wanted.get("", []) if problem(r)]
    if any(r.name == "torch" for r in unmet):
        lines.append("kernels    unknown: torch is missing or too old")
    else:
        lines += kernels()
    lines += ["", "packages"]
    packages = [[f"  {r.name}", problem(r) or metadata.version(r.name)] for r in wanted.get("", [])]
    lines += _terminal.table(packages, first=18, width=0, align="<", gap=1)
    if not wanted:
        lines.append(f"  unknown: eaml_ext runs from a folder and is not installed; in that folder: {INSTALL} .")
    if unmet:
        lines.append(f"  to fix it: {install(unmet)}")
    for extra, needs in wanted.items():
        if extra:
            missing = [r for r in needs if problem(r)]
            names = ", ".join(f"{r.name} {problem(r) or metadata.version(r.name)}" for r in needs)
            lines += [f"[{extra}]", f"  {names}"]
            if missing:
                lines.append(f"  to get it: {install(missing)}")
    return "\n".join(lines)


def kernels() -> list[str]:
    """Return lines on the compiled extension and on torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that of eaml_ext.ops repeats these lines
        import torch

        from eaml_ext.ops._library import load_error  # registers the ops

        info = eaml_ext.build_info()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines = [f"torch      {torch.__version__}, {', '.join(gpus) or 'sees no GPU'}"]
    if not info["kernels"]:
        lines += [f"kernels    missing ({load_error}): the slow reference runs"]
        return [*lines, f"  to fix it, with gcc or clang installed, in the source folder: {BUILD}"]
    lines.append(f"kernels    {info['compiler']}, {info['simd']}, for torch {info['torch_target']} and later")
    lines.append(f"CUDA       {info['cuda'] or 'not compiled'}")
    if info["cuda"] is None:
        lines.append(f"  to get it, with nvcc installed, in the source folder: FORCE_CUDA=1 {BUILD}")
    rows = [["  op", "CPU", "CUDA"], *([f"  {op}", runs(op, "CPU"), runs(op, "CUDA")] for op in OPS)]
    return [*lines, *_terminal.table(rows, first=26, width=12, align="<")]


def runs(op: str, device: str) -> str:
    """Return whether the kernel of an op on a device is compiled or the reference."""
    from eaml_ext._torch_compat import has_kernel

    return "compiled" if has_kernel(f"eaml_ext::{op}", device) else "reference"


def requirements() -> dict[str, list[Requirement]]:
    """Return the requirements of the installed package by extra; empty where it is not installed.

    Requirements without an extra have the key "".
    """
    try:
        declared = metadata.requires("eaml_ext") or []
        extras = metadata.metadata("eaml_ext").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return {}
    wanted: dict[str, list[Requirement]] = {"": [], **{extra: [] for extra in extras}}
    for r in map(Requirement, declared):
        if r.marker is None or r.marker.evaluate({"extra": ""}):
            wanted[""].append(r)
            continue
        for extra in extras:
            if r.marker.evaluate({"extra": extra}):
                wanted[extra].append(r)
    return wanted


def problem(r: Requirement) -> str:
    """Return ``missing``, or the installed version where it is not accepted, or an empty string."""
    try:
        version = metadata.version(r.name)
    except metadata.PackageNotFoundError:
        return "missing"
    return "" if r.specifier.contains(version, prereleases=True) else f"{version}, wanted {r.specifier}"


def install(missing: Sequence[Requirement]) -> str:
    """Return the command that installs the missing requirements."""
    names = [f"{r.name}[{','.join(sorted(r.extras))}]" if r.extras else r.name for r in missing]
    return " ".join([INSTALL, *(shlex.quote(f"{n}{r.specifier}") for n, r in zip(names, missing, strict=True))])
