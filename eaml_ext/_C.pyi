"""The pybind11 module, ``csrc/module.cpp``. Nothing in the package needs it, and it needs torch imported."""

def build_info() -> str:
    """JSON: ``compiler``, ``simd`` (the instruction set in use), ``cuda`` (or null) and ``torch_target``."""

def knn_panel_rows(features: int, is_float: bool) -> int:
    """Return the rows of 32 numbers in a panel of keys with ``features``; ``is_float``: the keys are float32."""
