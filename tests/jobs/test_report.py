"""Tables with numbers of any size, and the plot without matplotlib."""

import json
import sys

import pytest

from eaml_ext.jobs import report

HUGE = {"mean": 612345678.12345, "interval": 1e38, "median": 612345678.0}
ROWS = {
    "tiny": {"mean": 1e-9, "interval": 0.0, "median": 0.0},
    "huge": HUGE,
    "negative": {"mean": -1e300, "interval": None, "median": -123456.7},
    "diverged": {"mean": float("nan"), "interval": float("nan"), "median": float("inf")},
    "a variant with quite a long name": HUGE,
}


@pytest.mark.parametrize("returns", [{}, ROWS, {"random actions": HUGE}])
def test_table_numbers_of_any_size_stay_in_their_columns(returns):
    lines = report.table(ROWS, returns, 10**12).splitlines()[1:]
    columns = lines[0].replace("95 % +-", "interval").split()
    names = [*(name for name in returns if name not in ROWS), *ROWS]
    assert len(lines) == 1 + len(names)
    for name, line in zip(names, lines[1:], strict=True):
        assert line.startswith(f"{name}  ")
        cells = line[len(name) :].split()
        assert len(cells) == len(columns) - 1
        for column, cell in zip(columns[1:4], cells, strict=False):
            value = ROWS.get(name, dict.fromkeys(columns))[column]
            assert (
                cell == "-" if value is None else float(cell) == pytest.approx(value, rel=1e-4, abs=1e-4, nan_ok=True)
            )
    assert len({len(line) for line in lines}) == 1


def test_draw_band_fills_the_interval_around_the_mean():
    figure = pytest.importorskip("matplotlib.figure", reason="the extra plot is not installed").Figure()
    axes = figure.subplots()
    report.draw_band(axes, [0, 1, 2, 3], [1.0, 2.0, 3.0, 4.0], [0.5, 0.25, None, 1.0], "plain", marker="o")
    (line,), (band,) = axes.get_lines(), axes.collections
    assert line.get_ydata().tolist() == [1, 2, 3, 4] and line.get_label() == "plain" and line.get_marker() == "o"
    corners = {tuple(corner) for path in band.get_paths() for corner in path.vertices.tolist()}
    assert {(0, 0.5), (0, 1.5), (1, 1.75), (1, 2.25)} <= corners and all(x != 2 for x, _ in corners)
    report.draw_band(axes, [0], [1.0], [None], "one task")
    assert len(axes.collections) == 1


def test_write_json_numbers_that_are_not_finite_become_null(tmp_path):
    infinite = float("inf")
    report.write_json(tmp_path / "report.json", {"a": {"b": [1.5, float("nan"), (infinite, -infinite)]}, "c": None})
    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert read["a"] == {"b": [1.5, None, [None, None]]} and read["c"] is None and "kernels" in read["build"]


def test_plot_without_matplotlib_prints_the_extra_and_leaves_no_earlier_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    (tmp_path / "report.png").write_text("of an earlier run")
    report.plot(tmp_path / "report.png", {})
    report.plot(tmp_path / "report.png", {})
    out = capsys.readouterr().out.splitlines()
    assert len(set(out)) == 1 and "pip install 'eaml_ext[plot]'" in out[0] and not list(tmp_path.iterdir())
