"""Resident memory stays constant over 3,000 gradient steps with experience, a full ring and rollbacks.

``python -m benchmarks.soak`` takes a million steps.
"""

import gc
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from eaml_ext import AdaptationConfig, Adapter, ExperienceBuffer


def resident() -> int:
    gc.collect()
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which Linux alone has")
def test_adapt_3000_steps_resident_memory_stays():
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    buffer = ExperienceBuffer(200, seed=0)
    adapter = Adapter(model, AdaptationConfig(lr=0.01, max_steps_per_call=5), buffer, 0.3)
    steps, before = 0, 0
    for call in range(700):
        if call == 100:
            before, steps = resident(), 0
        x = torch.randn(8, 3)
        y, embedding = x.sum(-1, keepdim=True).sin(), x.mean(0)
        buffer.add(x, y, context_embedding=embedding.expand(8, 3))
        spoilt = y * math.nan if call % 50 == 0 else y
        adapter.adapt(mse_loss, {"states": x, "targets": spoilt, "context_embedding": embedding})
        steps += adapter.last_steps
    assert steps > 2900 and adapter.rollbacks > 5
    assert resident() - before < 2**20  # 350 bytes a step would be too much
