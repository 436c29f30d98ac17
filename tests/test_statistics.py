"""Confidence intervals: the quantiles of Student's t, and the edge cases."""

import math

import pytest

from eaml_ext._statistics import confidence_interval, half_width


@pytest.mark.parametrize(
    "df, quantile",
    [(1, 12.7062), (5, 2.5706), (9, 2.2622), (10, 2.2281), (11, 2.2010), (15, 2.1314), (30, 2.0423), (120, 1.9799)],
)
def test_half_width_of_unit_deviation_is_the_tabulated_quantile(df, quantile):
    assert half_width(1.0, df + 1) * math.sqrt(df + 1) == pytest.approx(quantile, abs=1e-4)


def test_confidence_interval_leaves_out_nan_and_is_infinite_for_one_value():
    assert confidence_interval([2.0, math.nan]) == {"mean": 2.0, "half": math.inf, "n": 1}
    assert math.isnan(confidence_interval([math.nan])["mean"])
    assert confidence_interval([0.0, 2.0, 4.0]) == pytest.approx({"mean": 2.0, "half": 4.9683, "n": 3}, abs=1e-3)
