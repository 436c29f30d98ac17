"""The main job over several seeds: each variant's error on held-out tasks, and the return of a planner with its model.

+- is a 95 % interval over seeds (Student's).

python -m benchmarks.main_job [--seeds 5]
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from typing import Any

from benchmarks.common import RESULTS, machine, save
from eaml_ext._statistics import confidence_interval
from eaml_ext.jobs.config import DynamicsConfig
from eaml_ext.jobs.dynamics import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    variants: dict[str, list[dict[str, float]]] = {}
    returns: dict[str, list[float]] = {}
    seconds = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            start = time.perf_counter()
            results = run(DynamicsConfig(seed=seed, out=folder))
            seconds.append(time.perf_counter() - start)
        for name, variant in results["variants"].items():
            variants.setdefault(name, []).append(variant)
        for name, row in results["returns"].items():
            returns.setdefault(name, []).append(row["mean"])
    table: dict[str, Any] = {
        name: {
            **confidence_interval([row["mean"] for row in runs]),
            "median": statistics.mean(row["median"] for row in runs),
        }
        for name, runs in variants.items()
    }
    acted = {name: confidence_interval(means) for name, means in returns.items()}
    print(f"{len(seeds)} seeds, {statistics.median(seconds):.0f} s each")
    print(f"| {'variant':<14} | mean error | mean of medians over tasks | return of the planner |")
    for name in dict.fromkeys([*acted, *table]):
        error = f"{_cell(table[name], 4)} | {table[name]['median']:.4f}" if name in table else "- | -"
        print(f"| {name:<14} | {error} | {_cell(acted[name], 1) if name in acted else '-'} |")
    save(
        RESULTS / "main_job.json",
        {"machine": machine(), "seconds": seconds, "variants": table, "returns": acted, "runs": variants},
    )


def _cell(row: dict[str, float], digits: int) -> str:
    return f"{row['mean']:.{digits}f} +- {row['half']:.{digits}f}"


if __name__ == "__main__":
    main()
