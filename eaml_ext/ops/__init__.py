"""The two custom ops. Loading this package registers them; without compiled kernels the references stand in."""

import warnings

import torch  # noqa: F401  (the kernels link against libtorch: it has to be loaded first)

try:
    from eaml_ext import _C as _C
except ImportError as error:
    _C = None
    warnings.warn(
        f"eaml_ext: compiled kernels are not available ({error}); the slow pure-PyTorch reference is used. "
        "To get them, install gcc or clang and run, in the source folder: "
        "pip install --force-reinstall --no-deps --no-cache-dir .",
        RuntimeWarning,
        stacklevel=2,
    )

from eaml_ext.ops.knn import Neighbors, knn, knn_reference
from eaml_ext.ops.packed_keys import PackedKeys
from eaml_ext.ops.selective_scan import (
    selective_scan,
    selective_scan_reference,
    selective_scan_step,
)

__all__ = [
    "Neighbors",
    "PackedKeys",
    "knn",
    "knn_reference",
    "selective_scan",
    "selective_scan_reference",
    "selective_scan_step",
]
