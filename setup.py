"""Compiles csrc/ into eaml_ext._C against the torch already installed; without torch or compiler, Python only."""

import os
import platform
import shutil
import sys
import sysconfig
from glob import glob

from setuptools import setup

sys.path.append(sysconfig.get_paths()["purelib"])  # the user's own torch, also under pip's build isolation

TORCH_TARGET = "0x020b000000000000"  # LibTorch stable ABI of torch 2.11: one build serves every later release


def extension() -> dict:
    try:
        import pybind11
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        print(f"eaml_ext: building without kernels ({error})", file=sys.stderr)
        return {}
    if not any(shutil.which(c) for c in (os.environ.get("CXX", "c++").split()[0], "g++", "clang++")):
        print("eaml_ext: building without kernels (no C++ compiler; gcc and clang are supported)", file=sys.stderr)
        return {}
    # No -ffp-contract: both compilers fuse by default, and clang's `fast` would override pragmas that forbid it.
    flags = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
    flags += ["-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append("-mprefer-vector-width=512")
    flags += os.environ.get("CXXFLAGS", "").split()  # the user's have the last word
    module = CppExtension(
        name="eaml_ext._C",
        sources=sorted(set(glob("csrc/*/*.cpp") + glob("csrc/*.cpp")) - set(glob("csrc/*/cuda_*.cpp"))),
        include_dirs=[os.path.abspath("csrc"), pybind11.get_include()],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
        extra_compile_args={"cxx": flags},
    )
    module.libraries = [name for name in module.libraries if name not in ("torch_python", "c10")]  # stable ABI only
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension())
