"""Check the CUDA build without a GPU: it compiles, links, loads and registers the ops, and hot kernels keep budgets.

    FORCE_CUDA=1 python tests/cuda_check.py build/cuda-check

compiles the CUDA half of the kernels, as setup.py describes them, into a library in that folder; objects are kept if
neither their source nor a header changed. TORCH_CUDA_ARCH_LIST lists the architectures. It needs nvcc, and the packages
nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.

A hot kernel (``cuda_check_budgets.py``) has budgets of spilled bytes and of accesses to local memory, nearly always 0.
Registers are limited for every architecture, instructions for sm_90.
"""

import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import setuptools  # noqa: F401  (has distutils where Python no longer does)
from cuda_check_budgets import HOT, Count, Kernel, budget, count, faults
from cuda_check_sass import functions

from distutils.core import run_setup  # isort: skip

CPU_ONLY = (
    "eaml_ext::mamba_step",
    "eaml_ext::rms_norm",
    "eaml_ext::row_invariant_linear",
)  # on a GPU, other ops run in their place
BUDGET_ARCH = "sm_90"  # of the budgets of instructions
FOUND = re.compile(
    r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers",
    re.S,
)


def build(folder: Path) -> tuple[Path, list[str]]:
    """Build the library and append the compilers' output to ``log``; return its path and architectures.

    If the build fails, its last lines are printed.
    """
    distribution = run_setup("setup.py", stop_after="init")
    (module,) = distribution.ext_modules = [m for m in distribution.ext_modules if m.name == "eaml_ext._kernels"]
    shared = ("op_common", "build_info")
    module.sources = [s for s in module.sources if Path(s).parent.name == "cuda" or Path(s).stem in shared]
    module.extra_compile_args["nvcc"] = [*module.extra_compile_args["nvcc"], "-Xptxas", "-v"]
    command = distribution.get_command_obj("build_ext")
    command.build_lib, command.build_temp = str(folder), str(folder / "objects")
    command.ensure_finalized()
    # A torch without CUDA gives ninja no dependencies of .cu files on headers.
    newest_header = max(path.stat().st_mtime for path in Path("csrc").rglob("*.*") if path.suffix in (".h", ".cuh"))
    for compiled in folder.rglob("*.o"):
        if compiled.stat().st_mtime < newest_header:
            compiled.unlink()
    with (folder / "log").open("a") as log:  # of the compilers, which are child processes
        kept = [os.dup(1), os.dup(2)]
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        built = False
        try:
            command.run()
            built = True
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
            if not built:
                print(*(folder / "log").read_text().splitlines()[-40:], sep="\n")
    archs = os.environ["TORCH_CUDA_ARCH_LIST"]  # set by setup.py unless it was set before
    return folder / command.get_ext_filename(module.name), [
        "sm_" + re.sub(r"\D", "", arch) for arch in re.split("[; ]+", archs)
    ]


def registered(library: Path) -> list[str]:
    """Load the library and return the names of the ops; assert that each but CPU_ONLY has a CUDA kernel."""
    import torch

    torch.ops.load_library(library)
    hidden = mock.patch.object(torch.ops, "load_library", side_effect=OSError("only the schemas"))
    with hidden, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import eaml_ext.ops  # noqa: F401

    names = [n for n in torch._C._dispatch_get_all_op_names() if re.match("eaml_ext::[^_]", n)]
    names = [n for n in names if n not in CPU_ONLY]
    without = [n for n in names if not torch._C._dispatch_has_kernel_for_dispatch_key(n, "CUDA")]
    assert len(names) == 9 and not without, f"no CUDA kernel for {without} of {names}"
    return names


def short_names(mangled: Iterable[str]) -> dict[str, str]:
    """The names of kernels without namespaces and parameters, by their mangled names."""
    mangled = list(mangled)
    names = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    namespaces = r"\(anonymous namespace\)::|eaml::|selective_scan::|causal_conv1d::|knn::|(?m:^void )"
    short = re.sub(namespaces, "", names).replace("> >", ">>")
    # The parameters follow the name or its template arguments, unlike the type of an enumerator as in "<(Half)0>".
    return dict(zip(mangled, (re.sub(r"(?<=[>\w])\(.*", "", name) for name in short.splitlines()), strict=True))


def resources(log: str, library: Path) -> dict[tuple[str, str], tuple[int, int, int]]:
    """(registers, bytes spilled, bytes of the stack) of the library's kernels, by mangled name and architecture."""
    binary = library.read_bytes()
    return {
        (m[1], m[2]): (int(m[6]), int(m[4]) + int(m[5]), int(m[3]))
        for m in FOUND.finditer(log)
        if m[1].encode() in binary
    }


def listing(library: Path, arch: str, mangled: Iterable[str]) -> str:
    """The machine code of kernels."""
    path = os.pathsep.join(
        [*(str(p) for p in Path(sys.prefix).glob("lib/python*/site-packages/nvidia/*/bin")), os.environ["PATH"]]
    )
    cuobjdump = shutil.which("cuobjdump", path=path)
    if cuobjdump is None:
        raise SystemExit("cuda_check: no cuobjdump; pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    command = [cuobjdump, "-sass", "-arch", arch, "-fun", ",".join(mangled), str(library)]
    # It warns of each object in the library that lacks a kernel.
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
        env={**os.environ, "PATH": path},
    ).stdout


def check(library: Path, log: str, archs: list[str]) -> list[str]:
    """Print the table of the hot kernels and return the faults."""
    found = resources(log, library)
    names = short_names({mangled for mangled, _ in found})
    wrong: list[str] = []
    for arch in archs:
        hot = {mangled: budget(names[mangled]) for mangled, of in found if of == arch}
        hot = {mangled: kernel for mangled, kernel in hot.items() if kernel}
        wrong += [
            f"{kernel.pattern}: {number} kernels for {arch}, expected {kernel.number}"
            for kernel in HOT
            if (number := [*hot.values()].count(kernel)) != kernel.number
        ]
        code = functions(listing(library, arch, hot))
        print(f"\n{arch}: registers, instructions a state and step, instructions an element; each with its budget")
        for mangled, kernel in sorted(hot.items(), key=lambda item: names[item[0]]):
            name = names[mangled]
            registers, spilled, stack = found[mangled, arch]
            try:
                counted = count(name, code[mangled], kernel)
            except ValueError as error:
                wrong.append(f"{name}, {arch}: {error}")
                continue
            print(row(name, kernel, registers, counted, limited=arch == BUDGET_ARCH))
            wrong += [f"{fault} ({arch})" for fault in faults(name, counted, kernel, arch == BUDGET_ARCH)]
            if registers > kernel.registers:
                wrong.append(f"{name}: {registers} registers, budget {kernel.registers} ({arch})")
            if max(spilled, stack) > kernel.spilled:
                bytes_used = f"{spilled} bytes spilled, {stack} bytes of stack"
                wrong.append(f"{name}: {bytes_used}, budget {kernel.spilled} ({arch})")
    return wrong


def row(name: str, kernel: Kernel, registers: int, counted: Count, limited: bool) -> str:
    """A line of the table; counts without a limit have no budget in it."""

    def cell(value: float | None, most: float | None) -> str:
        text = "" if value is None else f"{value:.2f} of {most:g}" if limited else f"{value:.2f}"
        return f"{text:>14}"

    per_update, per_element = cell(counted.per_update, kernel.per_update), cell(counted.per_element, kernel.per_element)
    return f"{registers:4} of {kernel.registers:3}{per_update}{per_element}  {name}"


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    library, archs = build(folder)
    print(f"CUDA kernels registered, loaded without a GPU: {', '.join(registered(library))}")
    wrong = check(library, (folder / "log").read_text(), archs)
    if wrong:
        raise SystemExit("\n".join(["cuda_check: budgets of tests/cuda_check_budgets.py exceeded:", *wrong]))


if __name__ == "__main__":
    main()
