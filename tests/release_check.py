"""Check the packages that `make release-check` has built: python tests/release_check.py dist.

The sdist must contain all files that it is compiled and tested from, and the wheel the files that it runs from and no
others. A wheel with the tag ``py3-none`` has the library of kernels and no file for one Python alone. Both packages
must have the version of eaml_ext, and no file may contain a path of this machine. With ``--requirements EXTRA`` the
requirements of an extra of pyproject.toml are printed instead.
"""

import argparse
import os
import re
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WANTED = [
    *("pyproject.toml", "setup.py", "MANIFEST.in", "Makefile", "README.md", "LICENSE", "CHANGELOG.md", "mkdocs.yml"),
    *("csrc/build_info.cpp", "csrc/common/simd.h", "csrc/selective_scan/cuda/launch.cuh", "csrc/knn/cpu/vector_inl.h"),
    *("eaml_ext/__init__.py", "eaml_ext/py.typed", "eaml_ext/_C.pyi", "tests/conftest.py", "docs/ops.md"),
    ".pre-commit-config.yaml",
    *("tests/ops/op_conformance.py", "tests/ops/op_calls.py"),
    *("benchmarks/run.py", "benchmarks/results/gradient_figure.png", "requirements/demo.txt", "requirements/test.txt"),
]
BINDING_STUB = "eaml_ext/_C.pyi"
UNWANTED = re.compile(r"\.(so|pyc|o|part)$|__pycache__|\.git/|\.venv|(^|/)(build|runs)/")


def version(root: Path = ROOT) -> str:
    """Return the version in ``eaml_ext/__init__.py``."""
    found = re.search(r'^__version__ = "(.+)"$', (root / "eaml_ext/__init__.py").read_text(), flags=re.MULTILINE)
    assert found is not None
    return found[1]


def modules(root: Path = ROOT) -> list[str]:
    """Return the package's own files that a wheel contains."""
    package = root / "eaml_ext"
    files = [path for ending in ("*.py", "*.pyi", "py.typed") for path in package.rglob(ending)]
    return sorted(path.relative_to(root).as_posix() for path in files)


def sdist_faults(names: list[str], sources: list[str]) -> list[str]:
    """Return the faults of an sdist with the files ``names``, of which ``sources`` are compiled."""
    faults = [f"it lacks {name}" for name in [*WANTED, *sources] if name not in names]
    return [*faults, *(f"it has {name}" for name in names if UNWANTED.search(name))]


def wheel_faults(wheel: str, files: dict[str, bytes], modules: list[str]) -> list[str]:
    """Return the faults of the wheel with this name and these files; ``modules`` are the package's own files."""
    *_, python, abi, platform = wheel.removesuffix(".whl").split("-")
    portable = (python, abi) == ("py3", "none")
    wanted = [name for name in modules if name != BINDING_STUB or not portable]
    if platform != "any":
        wanted.append(f"eaml_ext/_kernels-{version()}.so")
    if not portable:
        wanted += [name for name in files if re.match(r"eaml_ext/_C\.\w+-\w+-.*so$", name)] or ["eaml_ext/_C.*.so"]
    faults = [f"it lacks {name}" for name in wanted if name not in files]
    foreign = [name for name in files if name not in wanted and not re.match(r"eaml_ext-[^/]*\.dist-info/", name)]
    faults += [f"it has {name}" for name in sorted(foreign)]
    for name, content in files.items():
        if name.startswith("eaml_ext/_kernels") and (symbol := re.search(rb"\0(_?Py[A-Z_]\w+)\0", content)):
            faults.append(f"{name} needs {symbol[1].decode()} of Python")
    return faults


def files_with_path(texts: dict[str, bytes], path: str) -> list[str]:
    """Return a fault for each file that contains the path."""
    return [f"{name} contains {path}" for name, text in texts.items() if path.encode() in text]


def check(folder: Path) -> list[str]:
    """Return all faults of the sdist and the wheel in a folder."""
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    faults = []
    for path in (sdist, wheel):
        if not path.name.startswith(f"eaml_ext-{version()}"):
            faults.append(f"{path.name} is not of version {version()}")
    with tarfile.open(sdist) as archive:
        files = {member.name.split("/", 1)[1]: member for member in archive.getmembers() if member.isfile()}
        texts = {name: archive.extractfile(member).read() for name, member in files.items()}  # type: ignore[union-attr]
    sources = [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")]
    faults += [f"{sdist.name}: {fault}" for fault in sdist_faults(list(files), sources)]
    faults += [f"{sdist.name}: {fault}" for fault in files_with_path(texts, str(ROOT))]
    with zipfile.ZipFile(wheel) as archive:
        texts = {name: archive.read(name) for name in archive.namelist()}
    faults += [f"{wheel.name}: {fault}" for fault in wheel_faults(wheel.name, texts, modules())]
    if "-py3-none-" not in wheel.name:
        faults.append(f"{wheel.name} is for one Python alone: build it with --build-option=--portable")
    elif sys.platform == "linux" and "none-any" in wheel.name:
        faults.append(f"{wheel.name} was built without kernels: no torch or no compiler was found")
    return [*faults, *(f"{wheel.name}: {fault}" for fault in files_with_path(texts, str(ROOT)))]


def pyproject() -> dict[str, Any]:
    """Return the content of pyproject.toml."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "dist")
    parser.add_argument("--requirements", metavar="EXTRA")
    arguments = parser.parse_args()
    if arguments.requirements:
        print(*pyproject()["project"]["optional-dependencies"][arguments.requirements], sep=os.linesep)
        return 0
    faults = check(arguments.folder)
    print("\n".join(faults) or f"{', '.join(sorted(p.name for p in arguments.folder.iterdir()))}: nothing is missing")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
