"""Compile csrc/ against the installed torch; without torch or a C++ compiler, install Python only.

The kernels are a plain shared library, ``eaml_ext/_kernels-VERSION.so``. It needs LibTorch's stable ABI and no Python,
so one file serves every Python 3 and every torch from TORCH_TARGET on. ``csrc/module.cpp`` is ``eaml_ext._C``, a
binding for one Python that nothing needs. A wheel has both and the tag of this Python. With
``--build-option=--portable`` it has the library alone and the tag ``py3-none``.

CUDA kernels are added with FORCE_CUDA=1, or if torch has CUDA and there is an nvcc. They are compiled for
TORCH_CUDA_ARCH_LIST, or for the GPUs of this machine, or for CUDA_ARCHS.
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
from pathlib import Path
from typing import ClassVar

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

sys.path.append(sysconfig.get_paths()["purelib"])  # the user's own torch, also under pip's build isolation

TORCH_TARGET = "0x020b000000000000"  # LibTorch stable ABI of torch 2.11: one build serves every later release
INIT = Path(__file__).with_name("eaml_ext") / "__init__.py"
VERSION = re.search(r'^__version__ = "(.+)"$', INIT.read_text(encoding="utf-8"), re.MULTILINE)[1]
LIBRARY = f"_kernels-{VERSION}.so"  # a library of another version is never loaded; the dots keep it from being a module
BINDING = "csrc/module.cpp"
CUDA_SOURCES = "csrc/*/cuda/*.cpp"  # and every .cu
CUDA_ARCHS = "8.0;9.0+PTX;12.0"  # A100 to RTX 40, H100 and H200, RTX 50; other GPUs compile the PTX at load

# -ffp-contract is left at its default: both compilers fuse, and clang's `fast` would override pragmas that forbid it.
FLAGS = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]


def log(text: str) -> None:
    """Print a line to stderr and, where pip captures stderr, to the terminal."""
    print(f"eaml_ext: {text}", file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            print(f"  eaml_ext: {text}", file=terminal)


def cxx_command() -> list[str] | None:
    """Return the command of the C++ compiler, or None."""
    candidates = (os.environ.get("CXX", "c++").split(), ["g++"], ["clang++"])
    return next((command for command in candidates if command and shutil.which(command[0])), None)


def supports(command: list[str], flag: str) -> bool:
    """Return whether the compiler accepts a flag; -Werror, because clang only warns of unknown flags."""
    test = [*command, "-Werror", flag, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(test, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def supported_flags(command: list[str], machine: str, supports=supports) -> list[str] | None:
    """Return the flags of FLAGS that the compiler supports; None without C++20, which the sources require."""
    wanted = [*FLAGS, *(["-mprefer-vector-width=512"] if machine in ("x86_64", "AMD64") else [])]
    supported = [flag for flag in wanted if supports(command, flag)]
    return supported if "-std=c++20" in supported else None


def prefix_maps(command: list[str], folders: list[str], supports=supports) -> list[str]:
    """Return the flags that leave folders of this machine out of __FILE__, which torch's macros put into messages."""
    maps = [f"-fmacro-prefix-map={folder}{os.sep}=" for folder in folders]
    return [flag for flag in maps if supports(command, flag)]


def add_cuda(library) -> None:
    """Add the CUDA kernels to the library, if they are forced or torch has CUDA."""
    import torch
    from torch.utils import cpp_extension

    forced = os.environ.get("FORCE_CUDA") == "1"
    if not (forced or torch.version.cuda):
        return
    nvcc = shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin")) or shutil.which("nvcc")
    if nvcc is None:
        if forced:
            raise SystemExit("eaml_ext: FORCE_CUDA=1 needs nvcc, on PATH or in CUDA_HOME/bin; none was found")
        return log("building without CUDA kernels (no nvcc on PATH or in CUDA_HOME/bin)")
    version = re.search(r"release ([\d.]+)", subprocess.check_output([nvcc, "--version"], text=True))[1]
    if not forced and version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return log(f"building without CUDA kernels (nvcc is of CUDA {version}, torch of {torch.version.cuda})")
    dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    home = os.path.dirname(re.search(r"_HERE_=(.*)", dryrun)[1])  # nvcc on PATH may be a wrapper
    known = subprocess.check_output([nvcc, "--list-gpu-arch"], text=True).split()
    gpus = {"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())}
    archs = sorted(gpus) or [a for a in CUDA_ARCHS.split(";") if "compute_" + re.sub(r"\D", "", a) in known]
    archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(archs))
    cpp_extension.CUDA_HOME = home  # None in a torch without CUDA
    library.sources += sorted(glob(CUDA_SOURCES) + glob("csrc/*/cuda/*.cu"))
    names = re.sub(r"[; ]+", "/", archs)  # nvcc reads a comma as the start of the next macro
    library.define_macros += [("EAML_CUDA_VERSION", version), ("EAML_CUDA_ARCHS", names)]
    library.library_dirs.append(f"{home}/lib64")
    library.libraries += ["cudart_static", "rt", "dl", "pthread"]  # static, so that no libcudart is searched at load
    if torch.version.cuda:  # only a weak symbol needs torch_cuda, so the linker would drop it
        library.extra_link_args += ["-Wl,--no-as-needed", "-ltorch_cuda"]
    library.extra_compile_args["nvcc"] = ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden,-Wno-psabi"]


def without_kernels(reason: object) -> dict:
    log(f"building without kernels ({reason}): the slow reference will run")
    return {}


def extension() -> dict:
    """Return the arguments of ``setup`` for the extension module; none where it cannot be compiled."""
    if sys.platform == "win32":
        return without_kernels("they need the vector types of gcc and clang, which MSVC does not have")
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        return without_kernels(error)
    command = cxx_command()
    if command is None:
        return without_kernels("no C++ compiler; gcc and clang are supported")
    flags = supported_flags(command, platform.machine())
    if flags is None:
        return without_kernels(f"{' '.join(command)} does not support C++20; gcc 12 and clang 14 do")
    site_packages = os.path.dirname(os.path.dirname(torch.__file__))
    flags += prefix_maps(command, [os.getcwd(), site_packages])
    include_dirs = [os.path.abspath("csrc")]
    with contextlib.suppress(ImportError):  # without it, torch's own copy is used
        import pybind11

        include_dirs.append(pybind11.get_include())

    def make_extension(name: str, sources: set[str]):
        module = CppExtension(
            name=f"eaml_ext.{name}",
            sources=sorted(sources),
            include_dirs=include_dirs,
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
            extra_compile_args={"cxx": [*flags, *os.environ.get("CXXFLAGS", "").split()]},
        )
        # of the stable ABI only
        module.libraries = [name for name in module.libraries if name not in ("torch_python", "c10")]
        return module

    others = {BINDING, *glob(CUDA_SOURCES), *glob("csrc/bench/*")}
    library = make_extension("_kernels", set(glob("csrc/**/*.cpp", recursive=True)) - others)
    add_cuda(library)

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            log(f"compiling {len(library.sources)} files of kernels, one to two minutes of CPU time ({command[0]})")
            try:
                super().build_extensions()
            except Exception as error:
                if sys.platform == "linux":
                    raise
                without_kernels(error)  # other systems are untested
                self.extensions = []

        def build_extension(self, ext) -> None:
            objects = self.build_temp
            self.build_temp = os.path.join(objects, ext.name.rpartition(".")[2])  # each has a build.ninja
            super().build_extension(ext)
            self.build_temp = objects

        def get_ext_filename(self, name: str) -> str:
            path = super().get_ext_filename(name)
            return os.path.join(os.path.dirname(path), LIBRARY) if name.endswith("_kernels") else path

    return {"ext_modules": [make_extension("_C", {BINDING}), library], "cmdclass": {"build_ext": Build}}


class Wheel(bdist_wheel):
    """bdist_wheel with ``--portable``."""

    user_options: ClassVar = [
        *bdist_wheel.user_options,
        ("portable", None, "a wheel for every Python 3, without eaml_ext._C"),
    ]
    boolean_options: ClassVar = [*bdist_wheel.boolean_options, "portable"]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.portable = False

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.portable:
            modules = self.distribution.ext_modules or []
            self.distribution.ext_modules = [module for module in modules if module.name != "eaml_ext._C"]
            self.distribution.exclude_package_data = {"eaml_ext": ["_C.pyi"]}

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if self.portable else tag

    def run(self) -> None:
        if not self.skip_build:  # an earlier build may have left another version's library, or the binding
            built = Path(self.get_finalized_command("build").build_lib, "eaml_ext")
            for path in (*built.glob("_C.*"), *built.glob("_kernels-*")):
                path.unlink()
        super().run()


if __name__ == "__main__":
    options = extension()
    setup(**{**options, "cmdclass": {**options.get("cmdclass", {}), "bdist_wheel": Wheel}})
