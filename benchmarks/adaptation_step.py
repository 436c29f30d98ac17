"""The cost of one adaptation step of the default SSM: python -m benchmarks.adaptation_step [--quick] [--threads 1].

The table has its time beside those of a forward pass and of a loss with its gradient, and the growth of the process
over 20,000 steps. It also has the memory of the whole main job (a minute), and the part that imported modules take.
"""

import gc
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import flags, medians, write
from eaml_ext import SSM, AdaptationConfig, Adapter


def step_times(seconds: float) -> dict[str, dict[str, float]]:
    print("one step of the default SSM, ms: | states | forward | loss and gradient | Adapter.adapt |")
    results = {}
    for shape in ((1, 16, 4), (16, 4), (1, 64, 4)):
        model = SSM(4)
        params, adapter = list(model.parameters()), Adapter(model, AdaptationConfig(1e-4, max_steps_per_call=1))
        batch = {"states": torch.randn(shape), "targets": torch.randn(*shape[:-1], 32)}

        def loss(model: SSM = model, batch: Any = batch) -> Tensor:
            return F.mse_loss(model(batch["states"]), batch["targets"])

        def forward(loss: Any = loss) -> Tensor:
            with torch.no_grad():
                return loss()

        t = medians(
            {
                "forward": forward,
                "gradient": lambda loss=loss, params=params: torch.autograd.grad(loss(), params),
                "adapt": lambda adapter=adapter, batch=batch: adapter.adapt(F.mse_loss, batch),
            },
            seconds=seconds,
            at_most=2000,
        )
        results[str(shape)] = t
        print(f"| {shape} | {1e3 * t['forward']:.3f} | {1e3 * t['gradient']:.3f} | {1e3 * t['adapt']:.3f} |")
    return results


def resident() -> int:
    """Resident memory of this process in bytes. Linux only."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def growth(steps: int) -> int:
    """The growth of resident memory in bytes over ``steps`` steps, after the same number to warm up."""
    model = SSM(4)
    adapter = Adapter(model, AdaptationConfig(1e-4, max_steps_per_call=1))
    batch = {"states": torch.randn(1, 16, 4), "targets": torch.randn(1, 16, 32)}
    marks = []
    for _ in range(2):
        for _ in range(steps):
            adapter.adapt(F.mse_loss, batch)
        gc.collect()
        marks.append(resident())
    print(f"{steps} steps more: {(marks[1] - marks[0]) / 1024:+.0f} kB resident")
    return marks[1] - marks[0]


JOB = """
import json, sys
from eaml_ext import cli
assert cli.main(sys.argv[2:]) == 0
json.dump([name for name in sys.modules if name != "__main__"], open(sys.argv[1], "w"))
"""
IMPORTS = "import importlib, json, sys; [importlib.import_module(name) for name in json.load(open(sys.argv[1]))]"
PEAK = "\nprint(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"


def job_memory(epochs: int) -> dict[str, int]:
    """Peak resident memory of the main job, in bytes, and of a process that only imports the same modules. Linux."""

    def peak(code: str, *arguments: str) -> int:
        run = subprocess.run([sys.executable, "-c", code + PEAK, *arguments], stdout=subprocess.PIPE, check=True)
        return int(run.stdout.split()[-1]) * 1024

    with tempfile.TemporaryDirectory() as folder:
        modules = str(Path(folder) / "modules.json")
        job = peak(JOB, modules, "--env_name", "CartPole-v1", "--num_epochs", str(epochs), "--out", folder)
        imports = peak(IMPORTS, modules)
    print(f"main job: {(job - imports) / 2**20:.0f} MB over the {imports / 2**20:.0f} MB that its imports take")
    return {"main job": job, "its imports": imports}


def main() -> None:
    arguments = flags(__doc__)
    times = step_times(0.5 if arguments.quick else 3.0)
    grown = growth(500 if arguments.quick else 20_000)
    memory = job_memory(2 if arguments.quick else 50)
    if not arguments.quick:
        out = {"threads": arguments.threads, "seconds": times, "bytes grown": grown, "bytes": memory}
        print(write(f"adaptation-step-{arguments.threads}-thread", out))


if __name__ == "__main__":
    main()
