"""Timing that can be believed: everything in one process, interleaved, medians; limits measured in the same run."""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import eaml_ext

RESULTS = Path(__file__).parent / "results"


def cpu_name() -> str:
    """The CPU model, as a file name."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        name = f"{fields.get('model name', name)} family {fields.get('cpu family')} model {fields.get('model')}"
    return "-".join(name.replace("(R)", "").replace("(TM)", "").split()).replace("/", "-")


def machine() -> dict[str, Any]:
    """What a result was measured on."""
    return {"cpu": cpu_name(), "torch": torch.__version__, "build": eaml_ext.build_info()}


def flags(text: str | None) -> argparse.Namespace:
    """The flags every benchmark takes; seeds torch and sets its threads."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes, less time, no file written")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    return arguments


def once(function: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def medians(functions: dict[str, Callable[[], Any]], *, seconds: float = 1.0, at_most: int = 200) -> dict[str, float]:
    """Median seconds of each function, calls interleaved round by round for about ``seconds`` per function.

    A round calls fast functions several times (each up to the slowest's share), so that all get enough samples.
    """
    for function in functions.values():
        function()
    cost = {name: min(once(f), once(f)) for name, f in functions.items()}
    repeats = {name: max(2, min(at_most, int(seconds / c))) for name, c in cost.items()}
    rounds = min(10, *repeats.values())
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            samples[name] += [once(function) for _ in range(max(1, repeats[name] // rounds))]
    return {name: sorted(s)[len(s) // 2] for name, s in samples.items()}


def write(name: str, results: Any) -> Path:
    """``benchmarks/results/<name>-<cpu>.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{cpu_name()}.json"
    path.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    return path
