"""Timing in one process: interleaved calls, medians, and limits measured in the same run."""

import argparse
import concurrent.futures
import ctypes
import functools
import gc
import json
import multiprocessing
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import eaml_ext
from eaml_ext._files import atomic_write

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
    """Describe the CPU, torch and the build."""
    return {"cpu": cpu_name(), "build": eaml_ext.build_info()}


def cpus() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def flags(text: str | None, shape: Sequence[str] = (), peers: Sequence[str] = ()) -> argparse.Namespace:
    """Parse the flags that benchmarks share; seed torch and set its number of threads."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes, less time; plots go to build/bench")
    parser.add_argument("--threads", type=int, default=1)
    if shape:
        parser.add_argument(
            "--shape", type=int, nargs=len(shape), metavar=tuple(shape), help="this shape alone, no file written"
        )
    if peers:
        parser.add_argument("--peers", nargs="+", choices=peers, metavar="PEER", help="these alone, no file written")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    return arguments


# --- time ------------------------------------------------------------------------------------------------------------


def wall_time(function: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def medians(
    functions: dict[str, Callable[[], Any]],
    *,
    seconds: float = 1.0,
    at_most: int = 200,
    before: Callable[[str], Any] = lambda name: None,
) -> dict[str, float]:
    """Median seconds of each function, calls interleaved round by round for about ``seconds`` per function.

    A round calls fast functions several times (each up to the slowest's share), so that all get enough samples.
    ``before(name)`` runs untimed before a function's calls of a round.
    """
    cost = {}
    for name, function in functions.items():
        before(name)
        function()
        cost[name] = min(wall_time(function), wall_time(function))
    repeats = {name: max(2, min(at_most, int(seconds / c))) for name, c in cost.items()}
    rounds = min([10, *repeats.values()])
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            before(name)
            samples[name] += [wall_time(function) for _ in range(max(1, repeats[name] // rounds))]
    return {name: sorted(s)[len(s) // 2] for name, s in samples.items()}


def cores(function: Callable[[], Any], seconds: float = 0.2) -> float:
    """The number of cores that a function keeps busy: CPU seconds per second, the largest of a few tries."""
    function()
    calls = 1 + int(seconds / wall_time(function))
    busy = []
    for _ in range(3):
        start = time.process_time()
        wall = wall_time(lambda: [function() for _ in range(calls)])
        busy.append((time.process_time() - start) / wall)
    return max(busy)


# --- memory ----------------------------------------------------------------------------------------------------------


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's value in a new interpreter whose malloc returns freed memory at once, as peak_bytes requires."""
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
    context = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, settings), concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()


def peak_bytes(function: Callable[[], Any]) -> int:
    """The largest increase of resident memory during one call, after a call that warms up. Linux only."""

    def resident(field: str) -> int:
        match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        assert match, f"no {field} in /proc/self/status"
        return 1024 * int(match[1])

    function()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # free pages below the top of the heap
    if trim is not None:
        trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to the resident memory
    function()
    return max(0, resident("VmHWM") - before)


# --- limits ----------------------------------------------------------------------------------------------------------


def fastest(function: Callable[[], Any], seconds: float = 0.5) -> float:
    """Seconds of the fastest call."""
    function()
    repeats = max(5, int(seconds / wall_time(function)))
    return min(wall_time(function) for _ in range(repeats))


@functools.cache
def rates() -> ctypes.CDLL | None:
    """csrc/bench/rates.cpp, compiled into build/bench: rates of one thread. None without a C++ compiler.

    ``exp_rate()`` and ``fma_rate()``: float32 operations per second in registers. ``read_rate(size)``: bytes/s.
    ``read_arrays``: see :func:`reader`.
    """
    root = Path(__file__).parents[1]
    source, library = root / "csrc" / "bench" / "rates.cpp", root / "build" / "bench" / "rates.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    flags = [
        "-O3",
        "-std=c++20",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fvisibility=hidden",
        "-Wno-psabi",
        "-pthread",
    ]
    command = [
        *os.environ.get("CXX", "c++").split(),
        *flags,
        "-pthread",
        "-shared",
        "-fPIC",
        f"-I{root / 'csrc'}",
        str(source),
        "-o",
        str(library),
    ]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    found = ctypes.CDLL(str(library))
    for name in ("exp_rate", "fma_rate", "read_rate"):
        getattr(found, name).restype = ctypes.c_double
    found.read_rate.argtypes = [ctypes.c_int64]
    found.read_arrays.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_bool]
    found.read_arrays.restype = None
    return found


def reader(tensors: Sequence[torch.Tensor], threads: int, *, in_parts: bool = False) -> Callable[[], Any]:
    """A function that reads the memory of contiguous tensors once, on threads; each in order or in four parts at once.

    Processors prefetch several streams at once, so that one thread often reads four parts faster than one.
    """
    own = rates()
    if own is None:
        raise SystemExit("the rate of the memory needs a C++ compiler")
    pointers = torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64)
    counts = torch.tensor([t.numel() * t.element_size() // 4 for t in tensors], dtype=torch.int64)
    held = list(tensors)
    return lambda: own.read_arrays(pointers.data_ptr(), counts.data_ptr(), len(held), threads, in_parts)


def exp_rates() -> dict[str, float]:
    """float32 exponentials per second of one thread: torch.exp in L1, and the kernels' exponential in registers."""
    x, out, calls = torch.randn(4096), torch.empty(4096), 100
    found = {"torch.exp": calls * x.numel() / fastest(lambda: [torch.exp(x, out=out) for _ in range(calls)])}
    own = rates()
    return found if own is None else {**found, "kernel": max(own.exp_rate() for _ in range(5))}


def l2_bytes() -> int:
    """The size of the second-level cache in bytes; 1 MiB where the system does not report it."""
    size = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
    return 1024 * int(size.read_text().strip().rstrip("K")) if size.exists() else 2**20


def copy_rate(size: int) -> float:
    """Bytes read and written per second by a copy of ``size`` bytes."""
    source, target = torch.ones(size // 4), torch.ones(size // 4)
    return 2 * size / fastest(lambda: target.copy_(source))


# --- results ---------------------------------------------------------------------------------------------------------


def result_path(name: str, suffix: str = ".json") -> Path:
    """``benchmarks/results/<name>-<cpu><suffix>``."""
    RESULTS.mkdir(exist_ok=True)
    return RESULTS / f"{name}-{cpu_name()}{suffix}"


def brief_path(name: str) -> Path:
    """``build/bench/<name>.png``: where ``--quick`` leaves its plots, so that the results of full runs stay."""
    path = Path(__file__).parents[1] / "build" / "bench" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write(name: str, results: Any, *, timed: bool = True) -> Path:
    """Save the results and the machine in :func:`result_path`; results without times need no CPU in their name."""
    path = result_path(name) if timed else RESULTS / f"{name}.json"
    save(path, {"machine": machine(), "results": results})
    return path


def line_plot(path: Path, curves: dict[str, tuple[Sequence[float], Sequence[float], str]], **axes: Any) -> None:
    """Plot one curve per label, each as ``(x, y, style)``, on a logarithmic y axis; ``axes`` goes to ``Axes.set``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    plot = figure.subplots()
    for label, (x, y, style) in curves.items():
        plot.plot(x, y, style, label=label)
    plot.set(yscale="log", **axes)
    plot.grid(alpha=0.3, which="both")
    plot.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=150)


def save(path: Path, contents: dict[str, Any]) -> None:
    """Write a result file: numbers of six digits, one line per entry, records of equal keys as a table.

    :func:`load` restores the nest, with rounded numbers.
    """
    path.parent.mkdir(exist_ok=True)
    lines = (f" {json.dumps(key)}:{dumps(value)}" for key, value in contents.items())
    with atomic_write(path) as temporary:
        Path(temporary).write_text("{\n" + ",\n".join(lines) + "\n}\n")


def load(path: Path) -> dict[str, Any]:
    """Read a file that :func:`save` wrote."""
    return unpack(json.loads(path.read_text()))


def dumps(value: Any) -> str:
    """Compact JSON of a nest; a list of three or more records of equal keys becomes ``{"columns": ..., "rows": ...}``.

    >>> dumps([{"a": 1.2345601, "b": i} for i in range(3)])
    '{"columns":["a","b"],"rows":[\\n  [1.23456,0],\\n  [1.23456,1],\\n  [1.23456,2]]}'
    """
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(str(key))}:{dumps(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        if len(value) > 2 and all(isinstance(item, dict) and item.keys() == value[0].keys() for item in value):
            rows = ",".join("\n  " + dumps(list(item.values())) for item in value)
            return f'{{"columns":{json.dumps(list(value[0]), separators=(",", ":"))},"rows":[{rows}]}}'
        return "[" + ",".join(dumps(item) for item in value) + "]"
    return json.dumps(float(f"{value:.6g}") if isinstance(value, float) else value)


def unpack(value: Any) -> Any:
    """Restore the records of :func:`dumps`."""
    if isinstance(value, dict):
        if value.keys() == {"columns", "rows"}:
            return [dict(zip(value["columns"], map(unpack, row), strict=True)) for row in value["rows"]]
        return {key: unpack(item) for key, item in value.items()}
    return [unpack(item) for item in value] if isinstance(value, list) else value
