"""Check the CUDA build without a GPU: it compiles, links, loads and registers the ops, and no hot kernel spills.

    FORCE_CUDA=1 python tests/cuda_check.py build/cuda-check

compiles the CUDA half of the extension, as setup.py describes it, into a library in that folder; objects are kept if
neither their source nor a header changed. It needs nvcc; TORCH_CUDA_ARCH_LIST lists the architectures.
"""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import setuptools  # noqa: F401  (has distutils where Python no longer does)

from distutils.core import run_setup  # isort: skip

PASSES = ("forward", "backward")
# For each type of A, B, C and the states of the scan: the number of tilings, and the most registers per thread, forward
# and backward. With so few, a multiprocessor holds the threads of each hot kernel: 256 to 640 forward, 256 or 384 back.
KINDS = {"float": (5, 96, 168), "Dual<float>": (5, 168, 255)}
KINDS |= {"Complex<float>": (3, 128, 255), "Complex<Dual<float>>": (3, 255, 255)}
KINDS |= {"double": (3, 128, 255), "Dual<double>": (3, 255, 255), "Complex<double>": (2, 128, 255)}
MAX_REGISTERS = {
    (name, kind): most for kind, (_, *both) in KINDS.items() for name, most in zip(PASSES, both, strict=True)
}
# A kernel is hot if a thread's states take 16 bytes; for floats, only the kernels for B and C that vary in time. Dual
# kernels of complex states in double precision are not checked: the backward one spills 124 bytes a thread.
HOT = re.compile(
    r"(\w+)_kernel<.*Tiling<(?:(float), \d+, 4>, false|(Dual<float>), \d+, 4>, true"
    r"|(double|Dual<double>|Complex<float>|Complex<Dual<float>>), \d+, 2>, true|(Complex<double>), \d+, 1>, true)>"
)
# The fast forward kernels, for 16 and 64 states: three dtypes, two layouts, with or without a gate. Three or four
# blocks of 128 threads fit a multiprocessor.
FAST = re.compile(r"fast_forward_kernel<.*Tiling<float, (4|16), 4>")
NUM_FAST, MAX_REGISTERS_FAST = 24, 168
# The kernels of knn that read every key: three blocks of 128 threads, two blocks of 256, or one fit a multiprocessor.
MAX_REGISTERS_KNN = {"filter_kernel<4, false>": 168, "filter_kernel<1, false>": 168, "pack_kernel": 128}
MAX_REGISTERS_KNN |= {"rows_kernel<float, 1, true>": 128, "rows_kernel<float, 4, true>": 255}
FOUND = re.compile(
    r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.S,
)


def build(folder: Path) -> tuple[Path, list[str]]:
    """Build the library and append the compilers' output to ``log``; return its path and architectures."""
    distribution = run_setup("setup.py", stop_after="init")
    (module,) = distribution.ext_modules
    module.sources = [
        source for source in module.sources if Path(source).parent.name == "cuda" or Path(source).stem == "op_common"
    ]
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
        try:
            command.run()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
    archs = os.environ["TORCH_CUDA_ARCH_LIST"]  # set by setup.py unless it was set before
    return folder / command.get_ext_filename(module.name), [
        re.sub(r"\D", "", arch) for arch in re.split("[; ]+", archs)
    ]


def registered(library: Path) -> list[str]:
    """Load the library and return the names of the ops; assert that each has a CUDA kernel."""
    import torch

    sys.modules["eaml_ext._C"] = None  # type: ignore[assignment]  # only the schemas
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import eaml_ext.ops  # noqa: F401

    torch.ops.load_library(library)
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("eaml_ext::")]
    without = [n for n in names if not torch._C._dispatch_has_kernel_for_dispatch_key(n, "CUDA")]
    assert len(names) == 7 and not without, f"no CUDA kernel for {without} of {names}"
    return names


def kernels(log: str, library: Path) -> list[tuple[str, str, int, int]]:
    """Return (name, architecture, bytes spilled, registers) of each kernel of the library."""
    binary = library.read_bytes()
    found = {(m[1], m[2]): (int(m[3]) + int(m[4]), int(m[5])) for m in FOUND.finditer(log) if m[1].encode() in binary}
    names = subprocess.run(["c++filt"], input="\n".join(n for n, _ in found), capture_output=True, text=True).stdout
    short = [re.sub(r"\(anonymous namespace\)::|eaml::|selective_scan::|knn::", "", n) for n in names.split("\n")]
    short = [n.replace("> >", ">>") for n in short]
    rows = zip(short, found, found.values(), strict=False)
    return sorted((re.sub(r"^void |\(.*", "", name), arch, *sizes) for name, (_, arch), sizes in rows)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    library, archs = build(folder)
    print(f"CUDA kernels registered, loaded without a GPU: {', '.join(registered(library))}")
    faults, seen = [], []
    for name, arch, spilled, used in kernels((folder / "log").read_text(), library):
        hot, fast = HOT.match(name), FAST.search(name)
        if not (hot or fast or name in MAX_REGISTERS_KNN) or arch.removeprefix("sm_") not in archs:
            continue
        kind: Any = (hot[1], next(filter(None, hot.groups()[1:]))) if hot else "fast" if fast else name
        most = MAX_REGISTERS[kind] if hot else MAX_REGISTERS_FAST if fast else MAX_REGISTERS_KNN[kind]
        seen.append((kind, arch))
        print(f"{used:4} registers of {most}, {spilled} bytes spilled, {arch}: {name}")
        faults += [name] if spilled or used > most else []
    every = {(kind, f"sm_{arch}") for kind in [*MAX_REGISTERS, *MAX_REGISTERS_KNN, "fast"] for arch in archs}
    wanted = (sum(tilings for tilings, *_ in KINDS.values()) * len(PASSES) + NUM_FAST + len(MAX_REGISTERS_KNN)) * len(
        archs
    )
    assert {*seen} == every and len(seen) == wanted, f"not all kernels of each kind in the log: {seen}"
    assert not faults, f"too many registers, or spills: {faults}"


if __name__ == "__main__":
    main()
