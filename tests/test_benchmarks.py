"""The benchmarks' plots: of the results that are committed, and of what a quick run has measured."""

import importlib
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))  # last, so as not to hide an installed eaml_ext

from benchmarks import common, results_page
from benchmarks.ops import knn, scan_plot

QUICK = (8, 128, 64, 16)


def results(stem: str) -> dict:
    path = next(common.RESULTS.glob(f"{stem}-1-thread-*.json"))
    found = common.load(path)["results"]
    for row in found["rows"]:
        row["shape"] = tuple(row["shape"])
    return found


def is_picture(path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 20_000


def test_the_scan_is_plotted_from_full_and_from_quick_results(tmp_path):
    rows = results("selective_scan")["rows"]
    assert is_picture(scan_plot.plot(rows, tmp_path / "full.png"))
    # a quick run: short lengths, some peers absent, bars at its own shape
    quick = [{**row, "seconds": None, "reason": "absent: x"} if row["peer"] == "jax" else row for row in rows]
    quick = [row for row in quick if row["shape"] == QUICK or row["shape"][1] <= 256]
    assert is_picture(scan_plot.plot(quick, tmp_path / "quick.png", QUICK, threads=2))


def test_knn_is_plotted_without_the_peers_that_are_absent(tmp_path):
    found = results("knn")
    rows = [{**row, "seconds": None} if "faiss" in row["peer"] else row for row in found["rows"]]
    assert is_picture(knn.plot(rows, found["shares"][:3], tmp_path / "knn.png", threads=2))


def test_labels_are_spread_in_their_order():
    places = scan_plot.spread([1.0, 1.01, 100.0], gap=2.0)
    assert places[1] / places[0] == pytest.approx(2, rel=1e-6) and places[2] == pytest.approx(100)


@pytest.mark.parametrize("path", sorted(Path(common.__file__).parent.rglob("*.py")), ids=lambda path: path.stem)
def test_benchmark_module_imports(path):
    relative = path.relative_to(Path(common.__file__).parents[1]).with_suffix("")
    importlib.import_module(".".join(relative.parts).removesuffix(".__init__"))


def test_save_load_restores_a_nest_with_rounded_numbers(tmp_path):
    contents = {"rows": [{"a": 1 / 3, "b": [i, None]} for i in range(4)], "deep": {"x": {"y": True}}, "few": [{"a": 1}]}
    common.save(tmp_path / "file.json", contents)
    wanted = {**contents, "rows": [{"a": 0.333333, "b": [i, None]} for i in range(4)]}
    assert common.load(tmp_path / "file.json") == wanted


def test_committed_results_are_compact_and_make_the_page():
    assert sum(path.stat().st_size for path in common.RESULTS.glob("*.json")) < 170_000
    assert results_page.PAGE.read_text(encoding="utf-8") == results_page.page()


def test_quick_plots_stay_out_of_the_results():
    path = common.brief_path("selective_scan")
    assert path.parent.is_dir() and path.parts[-3:] == ("build", "bench", "selective_scan.png")
    assert common.RESULTS not in path.parents
