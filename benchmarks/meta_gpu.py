"""A meta-update of an SSM on a GPU, as it is and compiled: 8 tasks of 50 steps, second order.

    python -m benchmarks.meta_gpu [--quick] [--out FOLDER]

Writes `meta-<gpu>.json`. At this size Python and kernel launches take the time, not the GPU. The first compiled call
takes the better part of a minute, so --quick leaves it out.
"""

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import eaml_ext
from benchmarks.common import save
from benchmarks.gpu import gpu_name, medians, start
from benchmarks.meta import make_tasks
from eaml_ext import SSM, MetaMAML

SHAPE = (8, 50)  # (tasks, steps)


def measure(compile: bool, tasks: list[tuple[Tensor, ...]], seconds: float) -> dict[str, Any]:
    """Seconds of the first update, and the median of later ones."""
    device = tasks[0][0].device
    maml = MetaMAML(SSM(6, 64, 4).to(device), inner_lr=0.05, outer_lr=1e-3, compile=compile)
    begin = time.perf_counter()
    maml.meta_update(tasks, F.mse_loss)
    first = time.perf_counter() - begin
    took = medians({"update": lambda: maml.meta_update(tasks, F.mse_loss)}, seconds)["update"]
    return {"tasks": SHAPE[0], "steps": SHAPE[1], "compile": compile, "seconds": took, "first call": first}


def main() -> None:
    arguments = start(__doc__, "meta_gpu")
    tasks = [tuple(x.cuda() for x in task) for task in make_tasks(*SHAPE)]
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "build": eaml_ext.build_info()}
    rows: list[dict[str, Any]] = []
    for compile in (False,) if arguments.quick else (False, True):
        rows.append(measure(compile, tasks, 1.0))
        row = rows[-1]
        print(f"8 tasks x 50 steps, compile={compile}: {1e3 * row['seconds']:.1f} ms, first {row['first call']:.0f} s")
        if not arguments.quick:
            save(arguments.out / f"meta-{gpu_name()}.json", {"machine": machine, "results": rows})


if __name__ == "__main__":
    main()
