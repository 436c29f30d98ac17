"""The custom ops. Loading this package registers them; without compiled kernels the references run."""

from eaml_ext.ops import _library as _library  # first: it warns, once, where the kernels are missing
from eaml_ext.ops.causal_conv1d import causal_conv1d, causal_conv1d_reference, causal_conv1d_step
from eaml_ext.ops.knn import Neighbors, PackedKeys, knn, knn_reference
from eaml_ext.ops.row_invariant_linear import row_invariant_linear as _row_invariant_linear  # noqa: F401
from eaml_ext.ops.selective_scan import selective_scan, selective_scan_reference, selective_scan_step, split_invariant

__all__ = [
    "Neighbors",
    "PackedKeys",
    "causal_conv1d",
    "causal_conv1d_reference",
    "causal_conv1d_step",
    "knn",
    "knn_reference",
    "selective_scan",
    "selective_scan_reference",
    "selective_scan_step",
    "split_invariant",
]
