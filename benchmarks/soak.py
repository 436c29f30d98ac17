"""Resident memory along a million gradient steps of adaptation.

    python -m benchmarks.soak [--quick] [--threads 1]

Each call adapts an SSM by five gradient steps on a new batch and on retrieved experience, and adds the batch to a full
experience buffer. Every hundredth batch is corrupted and causes a rollback. The run takes an hour, with --quick half a
minute.
"""

import gc
import math
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import flags, write
from eaml_ext import SSM, AdaptationConfig, Adapter, ExperienceBuffer

STEPS = 5  # of a call


def resident() -> float:
    """MB of this process, after garbage has been collected."""
    gc.collect()
    match = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match
    return int(match[1]) / 1024


def run(calls: int, looks: int = 10) -> dict[str, Any]:
    """Adapts ``calls`` times; resident memory after a twentieth of them, which warm up, and then ``looks`` times."""
    torch.manual_seed(0)
    model = SSM(3, 8, 1, state_size=4)
    buffer = ExperienceBuffer(2000, seed=0)
    config = AdaptationConfig(lr=0.01, max_steps_per_call=STEPS)
    adapter = Adapter(model, config, experience_buffer=buffer, experience_weight=0.3)
    steps, memory = 0, []
    warm = max(1, calls // 20)
    for call in range(calls):
        x = torch.randn(4, 5, 3)
        y = x.cumsum(1).sum(-1, keepdim=True).sin()
        embedding = x.mean(dim=(0, 1))
        batch = {"states": x, "targets": y * math.nan if call % 100 == 99 else y, "context_embedding": embedding}
        if call:
            adapter.adapt(F.mse_loss, batch)
            steps += adapter.last_steps
        buffer.add(x, y, context_embedding=embedding.expand(4, 3))
        if call + 1 == warm or (call >= warm and (call + 1 - warm) % max(1, (calls - warm) // looks) == 0):
            memory.append(resident())
            print(f"{steps} steps: {memory[-1]:.1f} MB", flush=True)
    finite = all(bool(p.isfinite().all()) for p in model.parameters())
    return {"gradient steps": steps, "rollbacks": adapter.rollbacks, "finite": finite, "MB": memory}


def main() -> None:
    arguments = flags(__doc__)
    result = run(2_000 if arguments.quick else 210_000)
    print(result)
    if not arguments.quick:
        write("soak", result, timed=False)


if __name__ == "__main__":
    main()
