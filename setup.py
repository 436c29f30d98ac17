"""Compiles csrc/ into eaml_ext._C against the torch already installed; without torch or compiler, Python only."""

import os
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
    if not any(shutil.which(c) for c in (os.environ.get("CXX", "c++").split()[0], "g++", "clang++", "cl")):
        print("eaml_ext: building without kernels (no C++ compiler)", file=sys.stderr)
        return {}
    if sys.platform == "win32":
        flags = ["/O2", "/std:c++20"]
    else:
        flags = ["-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
        flags += ["-mprefer-vector-width=512", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
    module = CppExtension(
        name="eaml_ext._C",
        sources=sorted(glob("csrc/**/*.cpp", recursive=True)),
        include_dirs=[os.path.abspath("csrc"), pybind11.get_include()],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
        extra_compile_args={"cxx": flags},
    )
    module.libraries = [name for name in module.libraries if name not in ("torch_python", "c10")]  # stable ABI only
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension())
