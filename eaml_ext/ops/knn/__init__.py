"""Nearest neighbours: value[q, j] = ‖query_q − key_j‖² − bias_j, or similarity(query_q, key_j) + bias_j; the k best j.

Results are exact: a value is summed from direct differences (or products) in float64 in one fixed order and rounded
once, and neighbours are ordered by (value, index). So a query and a memory give the same bits whatever the number of
queries, the batch, the threads or the kernel.
"""

from eaml_ext.ops.knn._functional import Neighbors, knn, knn_reference
from eaml_ext.ops.knn._packed_keys import PackedKeys
from eaml_ext.ops.knn._reference import COSINE, DTYPES, INNER_PRODUCT, METRICS, SQEUCLIDEAN, KnnArgs

Neighbors.__module__ = PackedKeys.__module__ = __name__  # the path in pickles

__all__ = [
    "COSINE",
    "DTYPES",
    "INNER_PRODUCT",
    "METRICS",
    "SQEUCLIDEAN",
    "KnnArgs",
    "Neighbors",
    "PackedKeys",
    "knn",
    "knn_reference",
]
