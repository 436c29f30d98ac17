"""The compiled module, ``csrc/module.cpp``. Loading it registers the kernels with torch's dispatcher."""

def build_info() -> dict[str, str | None]:
    """Return ``compiler``, ``simd`` (the instruction set in use), ``cuda`` (None without) and ``torch_target``."""

def knn_panel_rows(features: int, is_float: bool) -> int:
    """Return the rows of 32 numbers in a panel of keys with ``features``; ``is_float``: the keys are float32."""
