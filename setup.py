"""Compiles csrc/ into eaml_ext._C against the torch already installed; without torch or compiler, Python only.

FORCE_CUDA=1, or a torch with CUDA and an nvcc, adds the CUDA kernels: for TORCH_CUDA_ARCH_LIST, or for the GPUs there
are, or for CUDA_ARCHS.
"""

import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from glob import glob

from setuptools import setup

sys.path.append(sysconfig.get_paths()["purelib"])  # the user's own torch, also under pip's build isolation

TORCH_TARGET = "0x020b000000000000"  # LibTorch stable ABI of torch 2.11: one build serves every later release
CUDA_SOURCES = "csrc/*/cuda/*.cpp"  # and every .cu
CUDA_ARCHS = "8.0;9.0+PTX;12.0"  # A100 to RTX 40, H100 and H200, RTX 50; others compile the PTX when they load it
# No -ffp-contract: both compilers fuse by default, and clang's `fast` would override pragmas that forbid it.
FLAGS = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]


def add_cuda(module) -> None:
    """The CUDA kernels, where they are asked for or may run."""
    import torch
    from torch.utils import cpp_extension

    wanted = os.environ.get("FORCE_CUDA") == "1"
    if not (wanted or torch.version.cuda):
        return
    nvcc = shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin")) or shutil.which("nvcc")
    if nvcc is None:
        if wanted:
            raise SystemExit("eaml_ext: FORCE_CUDA=1 needs nvcc, on PATH or in CUDA_HOME/bin; none was found")
        return say("building without CUDA kernels (no nvcc on PATH or in CUDA_HOME/bin)")
    version = re.search(r"release ([\d.]+)", subprocess.check_output([nvcc, "--version"], text=True))[1]
    if not wanted and version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return say(f"building without CUDA kernels (nvcc is of CUDA {version}, torch of {torch.version.cuda})")
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    home = os.path.dirname(re.search(r"_HERE_=(.*)", plan)[1])  # nvcc on PATH may be a wrapper
    known = subprocess.check_output([nvcc, "--list-gpu-arch"], text=True)
    here = {"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())}
    archs = sorted(here) or [a for a in CUDA_ARCHS.split(";") if "compute_" + re.sub(r"\D", "", a) in known.split()]
    archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(archs))
    cpp_extension.CUDA_HOME = home  # which a torch without CUDA leaves None
    module.sources += sorted(glob(CUDA_SOURCES) + glob("csrc/*/cuda/*.cu"))
    names = re.sub(r"[; ]+", "/", archs)  # nvcc takes a comma for the next macro
    module.define_macros += [("EAML_CUDA_VERSION", version), ("EAML_CUDA_ARCHS", names)]
    module.library_dirs.append(f"{home}/lib64")
    module.libraries += ["cudart_static", "rt", "dl", "pthread"]  # no libcudart to be found where it is loaded
    if torch.version.cuda:  # has a symbol that is weak, for which a linker alone would not keep the library
        module.extra_link_args += ["-Wl,--no-as-needed", "-ltorch_cuda"]
    module.extra_compile_args["nvcc"] = ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden,-Wno-psabi"]


def compiler() -> list[str] | None:
    """The C++ compiler's command; None where there is none."""
    candidates = (os.environ.get("CXX", "c++").split(), ["g++"], ["clang++"])
    return next((command for command in candidates if command and shutil.which(command[0])), None)


def accepts(command: list[str], flag: str) -> bool:
    """Whether the compiler knows a flag: clang only warns of one that it does not."""
    test = [*command, "-Werror", flag, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(test, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def flags(command: list[str], machine: str, accepted=accepts) -> list[str] | None:
    """Those of FLAGS that the compiler takes; None without C++20, which the sources need."""
    wanted = [*FLAGS, *(["-mprefer-vector-width=512"] if machine in ("x86_64", "AMD64") else [])]
    found = [flag for flag in wanted if accepted(command, flag)]
    return found if "-std=c++20" in found else None


def say(text: str) -> None:
    """Prints a line to stderr and, where pip captures that, to the terminal."""
    print(f"eaml_ext: {text}", file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            print(f"  eaml_ext: {text}", file=terminal)


def without_kernels(why: object) -> dict:
    say(f"building without kernels ({why}): the slow reference will run")
    return {}


def extension() -> dict:
    if sys.platform == "win32":
        return without_kernels("they need the vector types of gcc and clang, which MSVC does not have")
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        return without_kernels(error)
    command = compiler()
    if command is None:
        return without_kernels("no C++ compiler; gcc and clang are supported")
    taken = flags(command, platform.machine())
    if taken is None:
        return without_kernels(f"{' '.join(command)} does not know C++20; gcc 12 and clang 14 do")

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            say(f"compiling {len(module.sources)} files of kernels, one to two minutes of CPU time ({command[0]})")
            try:
                super().build_extensions()
            except Exception as error:
                if sys.platform == "linux":
                    raise
                without_kernels(error)  # a system on which this is not tested
                self.extensions = []

    try:
        import pybind11

        bindings = [pybind11.get_include()]
    except ImportError:
        bindings = []  # torch brings its own
    taken += os.environ.get("CXXFLAGS", "").split()  # the user's have the last word
    module = CppExtension(
        name="eaml_ext._C",
        sources=sorted(set(glob("csrc/**/*.cpp", recursive=True)) - set(glob(CUDA_SOURCES) + glob("csrc/bench/*"))),
        include_dirs=[os.path.abspath("csrc"), *bindings],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
        extra_compile_args={"cxx": taken},
    )
    module.libraries = [name for name in module.libraries if name not in ("torch_python", "c10")]  # stable ABI only
    add_cuda(module)
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


if __name__ == "__main__":
    setup(**extension())
