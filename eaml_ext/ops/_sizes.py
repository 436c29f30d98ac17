"""The limit of sizes that reach kernels and allocations."""

from typing import Any

from eaml_ext import _check

SIZE_LIMIT = 2**31  # kernels index a dimension with 32 bits


def check_size(where: str, name: str, value: Any, *, zero: bool = False) -> int:
    """Return ``value`` as an int in [1, SIZE_LIMIT), in [0, SIZE_LIMIT) with ``zero``.

    Raises:
        TypeError: ``value`` is not integral.
        ValueError: ``value`` is out of range.
    """
    number = _check.positive(where, name, value, zero=zero, integer=True)
    if number >= SIZE_LIMIT:
        raise ValueError(f"{where}: {name} must be < {SIZE_LIMIT}, got {number}")
    return number
