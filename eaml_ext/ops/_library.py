"""Load the compiled kernels: the only module that imports ``eaml_ext._C``, which registers them with torch.

Without ``_C`` the references registered in Python run, after one warning. ``load_error`` then holds the reason.
"""

import warnings

import torch

try:
    # torch is imported above, because the kernels link against libtorch.
    from eaml_ext import _C as _C

    load_error = None
except ImportError as error:
    _C = None  # type: ignore[assignment]
    load_error = str(error)
    warnings.warn(
        f"eaml_ext: compiled kernels are not available ({error}); the slow pure-PyTorch reference is used. "
        "To get them, install gcc or clang and run, in the source folder: "
        "pip install --force-reinstall --no-deps --no-cache-dir .",
        RuntimeWarning,
        stacklevel=3,  # the module that imports eaml_ext.ops
    )

library = torch.ops.eaml_ext
