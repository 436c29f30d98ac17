"""The data, the forecasts and the lookup of benchmarks.experiments.forecasting, on made series."""

import gzip

import pytest
import torch
from torch.nn.functional import mse_loss

from benchmarks.experiments import forecasting
from benchmarks.experiments.forecasting import CHUNK, DELAY, FAST, HORIZON, Forecaster, WindowEncoder, forecast
from benchmarks.experiments.forecasting_data import Series, read, windows
from benchmarks.experiments.forecasting_model import CycleLinear, lookup, ridge
from eaml_ext.meta import StreamExperience, StreamMAML

CHANNELS, LOOK_BACK = 2, 96


@pytest.fixture
def series():
    torch.manual_seed(0)
    time = torch.arange(2400).unsqueeze(1)
    values = (time / 24 * 2 * torch.pi).sin() + 0.3 * torch.randn(2400, CHANNELS).cumsum(0) / 10
    return Series(values, (1700, 2000, 2300), 24)


@pytest.fixture
def short_streams(monkeypatch):
    monkeypatch.setattr(forecasting, "WARMUP", 2 * CHUNK)
    monkeypatch.setattr(forecasting, "PAST", 3)
    monkeypatch.setattr(forecasting, "SLOTS", 4)


def model(series, look_back=LOOK_BACK):
    return CycleLinear(ridge(series, look_back), CHANNELS, series.period)


def forecaster(series, kind):
    if kind == "frozen":
        return Forecaster(model(series))
    torch.manual_seed(1)
    experience = StreamExperience(WindowEncoder(CHANNELS), 4, 2) if kind == "experience" else None
    return Forecaster(model(series), dict.fromkeys(FAST, 0.05), experience)


@pytest.mark.parametrize("kind", ["frozen", "adapted", "experience", "lookup"])
def test_forecast_with_future_values_overwritten_is_unchanged_up_to_the_origin(series, short_streams, kind):
    fitted = forecaster(series, kind) if kind != "lookup" else None

    def run(given):
        if kind == "lookup":
            return lookup(given, "valid", LOOK_BACK, 5, CHUNK)
        return forecast(fitted, given, "valid", LOOK_BACK)

    expected = run(series)
    first, last = series.targets("valid")
    assert len(expected) == last - first - HORIZON + 1
    for origin in (first - 1, first + CHUNK - 2, first + CHUNK - 1, first + CHUNK + 40):
        values = series.values.clone()
        values[origin + 1 :] = torch.nan if kind != "experience" else 100.0  # a buffer takes no query with NaN
        found = run(series._replace(values=values))
        known = origin - (first - 1) + 1  # the number of forecasts whose origins lie at or before this one
        assert torch.equal(found[:known], expected[:known])
        assert kind == "frozen" or not torch.equal(found, expected)


def test_update_chunk_is_known_before_the_next_origin():
    last_target = CHUNK - 1 + HORIZON  # of chunk 0, whose first origin is 0
    first_origin_after_its_update = (DELAY + 1) * CHUNK
    assert last_target <= first_origin_after_its_update


def test_forecast_equals_predict_of_stream_maml(series, short_streams):
    fitted = forecaster(series, "adapted")
    maml = StreamMAML(fitted.model, 0.05, 1e-3, chunk_size=CHUNK, parameters=FAST, label_delay=DELAY)
    first, last = series.targets("test")
    x, y = windows(series, first - 1 - 2 * CHUNK, last - HORIZON, LOOK_BACK)
    expected = maml.predict(x[None], y[None], mse_loss)[0, 2 * CHUNK :]
    torch.testing.assert_close(forecast(fitted, series, "test", LOOK_BACK), expected)


def test_windows_hold_the_phase_the_values_seen_and_the_values_after(series):
    x, y = windows(series, 200, 210, LOOK_BACK)
    assert x.shape == (10, 1 + LOOK_BACK, CHANNELS) and y.shape == (10, HORIZON, CHANNELS)
    assert torch.equal(x[3, 1:], series.values[204 - LOOK_BACK : 204]) and torch.equal(y[3], series.values[204:300])
    assert x[3, 0, 0] == (204 - LOOK_BACK) % 24


def test_cycle_linear_of_a_pure_cycle_forecasts_it(series):
    cycle = torch.randn(24, CHANNELS)
    fitted = model(series)
    fitted.cycle.data = cycle / dict(CycleLinear.SCALES)["cycle"]
    fitted.weight.data.zero_()
    exact = series._replace(values=cycle.repeat(100, 1))
    x, y = windows(exact, 500, 530, LOOK_BACK)
    torch.testing.assert_close(fitted(x), y)


def test_read_standardises_by_the_training_part_and_splits_as_the_field(tmp_path):
    rows = torch.randn(17420, 7, dtype=torch.float64) * 3 + 5
    with gzip.open(tmp_path / "ETTh1.csv.gz", "wt") as file:
        file.write("date," + ",".join("abcdefg") + "\n")
        file.writelines("2016-07-01," + ",".join(map(repr, row)) + "\n" for row in rows.tolist())
    found = read(tmp_path, "ETTh1")
    assert found.borders == (8640, 11520, 14400)
    torch.testing.assert_close(found.values[:8640].mean(0), torch.zeros(7), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.values[:8640].std(0, correction=0), torch.ones(7))
    assert read(tmp_path, "ETTh1 60/20/20").borders == (10452, 13936, 17420)
    first, last = found.targets("test")
    assert len(windows(found, first - 1, last - HORIZON, LOOK_BACK)[0]) == 2785
