"""The one confidence interval of reports and benchmarks. Needs no torch."""

import math
import statistics
from collections.abc import Sequence

# Quantiles 0.975 of Student's t with 1 to 9 degrees of freedom.
_QUANTILES = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157)
# Beyond: z + sum_i c_i / df^i, the expansion of Abramowitz & Stegun (1964), 26.7.5, at z = 1.959964.
_EXPANSION = (2.372274, 2.822501, 2.555853, 1.589536)


def half_width(std: float, n: int) -> float:
    """Half the width of the 95 % confidence interval of a mean (Student's t); infinite for n = 1.

    Args:
        std: the sample standard deviation of the values.
        n: the number of independent values, at least 1.

    >>> round(half_width(1.0, 4), 4), round(half_width(1.0, 100), 4)
    (1.5912, 0.1984)
    """
    df = n - 1
    if df < 1:
        return math.inf
    t = _QUANTILES[df - 1] if df <= len(_QUANTILES) else 1.959964 + sum(c / df**i for i, c in enumerate(_EXPANSION, 1))
    return t * std / math.sqrt(n)


def confidence_interval(values: Sequence[float]) -> dict[str, float]:
    """Return mean, half width of the 95 % interval and number of independent values; NaN values are left out.

    >>> confidence_interval([1.0, 3.0])
    {'mean': 2.0, 'half': 12.706205, 'n': 2}
    """
    values = [float(v) for v in values if not math.isnan(v)]
    if not values:
        return {"mean": math.nan, "half": math.nan, "n": 0}
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "half": half_width(std, len(values)), "n": len(values)}
