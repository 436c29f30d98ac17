"""Load the library of compiled kernels, which registers them with torch: no other module of the package does.

Without the library the references registered in Python run, after one warning. ``load_error`` then holds the reason.
"""

import warnings
from pathlib import Path

import torch

import eaml_ext

library = torch.ops.eaml_ext
path = Path(__file__).parents[1] / f"_kernels-{eaml_ext.__version__}.so"  # as setup.py names it


def load() -> str | None:
    """Load the library; return the reason where there is none that can be loaded, else None."""
    if not path.exists():
        others = sorted(other.name for other in path.parent.glob("_kernels-*.so"))
        return (
            f"{', '.join(others)} is of another version than eaml_ext {eaml_ext.__version__}"
            if others
            else (f"{path} does not exist")
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return str(error.__cause__ or error)  # torch wraps the loader's reason
    return None if hasattr(library, "_build_info") else f"{path} does not register eaml_ext::_build_info"


load_error = load()
if load_error is not None:
    warnings.warn(
        f"eaml_ext: compiled kernels are not available ({load_error}); the slow pure-PyTorch reference is used. "
        "To get them, install gcc or clang and run, in the source folder: "
        "pip install --force-reinstall --no-deps --no-cache-dir .",
        RuntimeWarning,
        stacklevel=3,  # the module that imports eaml_ext.ops
    )
