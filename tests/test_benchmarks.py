"""The benchmarks' plots: of the results that are committed, and of what a quick run has measured."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # last, so as not to hide an installed eaml_ext

from benchmarks import common, results_page, transformers_families
from benchmarks.experiments import main_job_streams, runs, switching_streams
from benchmarks.ops import gpu_plots, gpu_small, gpu_tables, knn, scan_plot, scan_vs_mamba

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


def test_gpu_results_are_plotted_and_those_of_cpus_are_not(tmp_path):
    for path in common.RESULTS.glob("*.json"):
        shutil.copy(path, tmp_path)
    pictures = gpu_plots.plots(tmp_path)
    assert sorted(path.name.split("-")[0] for path in pictures) == ["knn", "scan_vs_mamba"]
    assert all(is_picture(path) for path in pictures)


def test_gpu_tables_of_the_figures_are_those_of_the_results():
    page = (results_page.PAGE.parent / "figures.md").read_text(encoding="utf-8")
    tables = gpu_tables.tables(common.RESULTS)
    assert len(tables) == 2 and all(table in page for table in tables)


def test_table_of_transformers_families_in_the_figures_is_that_of_the_results():
    page = (results_page.PAGE.parent / "figures.md").read_text(encoding="utf-8")
    path = next(common.RESULTS.glob("transformers_families-1-thread-*.json"))
    rows = common.load(path)["results"]["rows"]
    assert [row["family"] for row in rows] == list(transformers_families.FAMILIES)
    assert transformers_families.table(rows) in page


def test_labels_are_spread_in_their_order():
    places = scan_plot.spread([1.0, 1.01, 100.0], gap=2.0)
    assert places[1] / places[0] == pytest.approx(2, rel=1e-6) and places[2] == pytest.approx(100)


@pytest.mark.parametrize("path", sorted(Path(common.__file__).parent.rglob("*.py")), ids=lambda path: path.stem)
def test_benchmark_module_imports(path):
    relative = path.relative_to(Path(common.__file__).parents[1]).with_suffix("")
    importlib.import_module(".".join(relative.parts).removesuffix(".__init__"))


@pytest.mark.parametrize("module", [switching_streams, main_job_streams], ids=lambda module: module.__name__)
def test_quick_run_of_streams_prints_every_variant_and_writes_no_file(module, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["", "--quick"])
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    module.main()  # compares Adapter.adapt_stream with StreamMAML.predict in every training
    printed = capsys.readouterr().out
    variants = [variant for some in module.TRAINED.values() for variant in some]
    assert all(re.search(rf"\n\| {re.escape(variant)} \| \d\.\d{{4}} \|", printed) for variant in variants)
    assert not any(tmp_path.iterdir())


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


# ---- GPU benchmarks, as far as they run without a GPU ----------------------------------------------------------------


@pytest.mark.parametrize("task, tensors", [("forward", 1), ("+backward", 7), (scan_vs_mamba.SECOND_ORDER, 7)])
def test_scan_vs_mamba_pass_returns_output_or_a_gradient_for_each_input(task, tensors):
    p = scan_vs_mamba.problem(2, 9, 8, 4, channel_last=False)
    x = [*p.arguments, torch.randn(8), torch.randn_like(p.grad)]
    call = scan_vs_mamba.prepare(scan_vs_mamba.selective_scan, task, x, p.grad)
    found = call()
    assert len(found) == tensors and all(map(torch.equal, found, call()))
    assert tensors == 1 or [v.shape for v in found] == [v.shape for v in x]


def test_scan_vs_mamba_limits_count_bytes_and_exponentials_of_a_forward_pass():
    job = ("forward", (2, 10, 6, 4), torch.bfloat16, "channel-first", True)
    moved = 2 * 2 * 10 * (4 * 6 + 2 * 4)  # u, delta, z, y; B, C
    assert scan_vs_mamba.limits(job, 100.0, 10.0) == {"copy": moved / 100, "exp": 2 * 10 * 6 * 4 / 10}
    assert scan_vs_mamba.limits(job, 100.0, None)["exp"] is None
    assert scan_vs_mamba.limits(("+backward", *job[1:]), 100.0, 10.0) == {"copy": None, "exp": None}


@pytest.mark.parametrize("dtype", gpu_small.TYPES, ids=str)
def test_gpu_small_calls_return_finite_numbers(dtype):
    for channel_last, gated in ((False, True), (True, False)):
        gpu_small.scan((1, 40, 16, 16), dtype, channel_last, gated, "cpu")
    gpu_small.search((3, 2, 50, 16), dtype, "cpu")


@pytest.mark.skipif(torch.cuda.is_available() or shutil.which("bash") is None, reason="there is a GPU, or no bash")
def test_gpu_check_without_a_gpu_says_so_and_exits_with_2(tmp_path):
    script = Path(common.__file__).with_name("gpu_check.sh")
    environment = {**os.environ, "PYTHON": sys.executable}
    found = subprocess.run(["bash", script, tmp_path], capture_output=True, text=True, env=environment)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == "gpu_check: no GPU that torch can use, nothing was run\n"
