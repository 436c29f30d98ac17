"""Compiles csrc/ into eaml_ext._C against the torch already installed; without torch or compiler, Python only.

FORCE_CUDA=1, or a torch with CUDA and an nvcc, adds the CUDA kernels: for TORCH_CUDA_ARCH_LIST, or for the GPUs there
are, or for CUDA_ARCHS.
"""

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
CUDA_SOURCES = "csrc/*/cuda_*.cpp"  # and every .cu
CUDA_ARCHS = "8.0;9.0+PTX;12.0"  # A100 to RTX 40, H100 and H200, RTX 50; others compile the PTX when they load it


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
        return print("eaml_ext: building without CUDA kernels (no nvcc on PATH or in CUDA_HOME/bin)", file=sys.stderr)
    version = re.search(r"release ([\d.]+)", subprocess.check_output([nvcc, "--version"], text=True))[1]
    if not wanted and version.split(".")[0] != torch.version.cuda.split(".")[0]:
        why = f"nvcc is of CUDA {version}, torch of {torch.version.cuda}"
        return print(f"eaml_ext: building without CUDA kernels ({why})", file=sys.stderr)
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    home = os.path.dirname(re.search(r"_HERE_=(.*)", plan)[1])  # nvcc on PATH may be a wrapper
    known = subprocess.check_output([nvcc, "--list-gpu-arch"], text=True)
    here = {"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())}
    archs = sorted(here) or [a for a in CUDA_ARCHS.split(";") if "compute_" + re.sub(r"\D", "", a) in known.split()]
    archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(archs))
    cpp_extension.CUDA_HOME = home  # which a torch without CUDA leaves None
    module.sources += sorted(glob(CUDA_SOURCES) + glob("csrc/*/*.cu"))
    names = re.sub(r"[; ]+", "/", archs)  # nvcc takes a comma for the next macro
    module.define_macros += [("EAML_CUDA_VERSION", version), ("EAML_CUDA_ARCHS", names)]
    module.library_dirs.append(f"{home}/lib64")
    module.libraries += ["cudart_static", "rt", "dl", "pthread"]  # no libcudart to be found where it is loaded
    if torch.version.cuda:  # has a symbol that is weak, for which a linker alone would not keep the library
        module.extra_link_args += ["-Wl,--no-as-needed", "-ltorch_cuda"]
    module.extra_compile_args["nvcc"] = ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden,-Wno-psabi"]


def extension() -> dict:
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        print(f"eaml_ext: building without kernels ({error})", file=sys.stderr)
        return {}
    if not any(shutil.which(c) for c in (os.environ.get("CXX", "c++").split()[0], "g++", "clang++")):
        print("eaml_ext: building without kernels (no C++ compiler; gcc and clang are supported)", file=sys.stderr)
        return {}
    try:
        import pybind11

        bindings = [pybind11.get_include()]
    except ImportError:
        bindings = []  # torch brings its own
    # No -ffp-contract: both compilers fuse by default, and clang's `fast` would override pragmas that forbid it.
    flags = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
    flags += ["-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append("-mprefer-vector-width=512")
    flags += os.environ.get("CXXFLAGS", "").split()  # the user's have the last word
    module = CppExtension(
        name="eaml_ext._C",
        sources=sorted(set(glob("csrc/*/*.cpp") + glob("csrc/*.cpp")) - set(glob(CUDA_SOURCES))),
        include_dirs=[os.path.abspath("csrc"), *bindings],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
        extra_compile_args={"cxx": flags},
    )
    module.libraries = [name for name in module.libraries if name not in ("torch_python", "c10")]  # stable ABI only
    add_cuda(module)
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension())
