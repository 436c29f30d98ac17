"""The module of PackedKeys in version 0.1, which pickles of that version name."""

from eaml_ext.ops.knn import PackedKeys as PackedKeys
