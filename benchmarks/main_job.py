"""The main job over several seeds: mean error of each arm on held-out tasks, and its spread over seeds.

python -m benchmarks.main_job [--seeds 5]
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from typing import Any

from benchmarks.common import RESULTS, machine
from eaml_ext.jobs import report
from eaml_ext.jobs.dynamics import run
from eaml_ext.jobs.settings import DynamicsSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    arms: dict[str, list[dict[str, float]]] = {}
    seconds = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            start = time.perf_counter()
            results = run(DynamicsSettings(seed=seed, out=folder))
            seconds.append(time.perf_counter() - start)
        for name, arm in results["arms"].items():
            arms.setdefault(name, []).append(arm)
    table: dict[str, Any] = {
        name: {
            "mean": statistics.mean(a["mean"] for a in runs),
            "spread": statistics.stdev(a["mean"] for a in runs) if len(runs) > 1 else 0.0,
            "median": statistics.mean(a["median"] for a in runs),
        }
        for name, runs in arms.items()
    }
    print(f"{len(seeds)} seeds, {statistics.median(seconds):.0f} s each")
    print(f"| {'arm':<14} | mean +- spread over seeds | mean of medians over tasks |")
    for name, row in table.items():
        print(f"| {name:<14} | {row['mean']:.4f} +- {row['spread']:.4f} | {row['median']:.4f} |")
    RESULTS.mkdir(exist_ok=True)
    report.write_json(
        RESULTS / "main_job.json", {"machine": machine(), "seconds": seconds, "arms": table, "runs": arms}
    )


if __name__ == "__main__":
    main()
