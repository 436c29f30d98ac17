"""Resident memory stays constant over thousands of gradient steps with experience, a full ring and rollbacks.

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

from eaml_ext import AdaptationConfig, Adapter, ExperienceBuffer, StreamExperience


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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which Linux alone has")
def test_adapt_stream_10000_chunks_do_not_grow():
    """Resident memory after 2,000 chunks and after 10,000 more, with a state, a memory and a label delay."""
    torch.set_num_threads(1)
    torch.manual_seed(0)

    class Average(nn.Module):  # an SSM would take a minute
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 2)

        def scan(self, x, state=None, reset=None):
            total = x.cumsum(1) + (0 if state is None else state.unsqueeze(1))
            return self.head(total), 0.5 * total[:, -1]

        step = scan

    cfg, experience = AdaptationConfig(max_steps_per_call=1), StreamExperience(nn.Linear(2, 4), slots=16, k=2)
    adapter = Adapter(Average(), cfg, ExperienceBuffer(16), 0.5, retriever=experience, step_sizes={"head.weight": 0.01})
    x = torch.randn(1, 5, 2)

    def batches():
        for _ in range(12_000):
            yield {"states": x[:, :-1].clone(), "targets": x[:, 1:].clone()}

    sizes = []
    for i, (_, loss) in enumerate(adapter.adapt_stream(mse_loss, batches(), label_delay=2), 1):
        assert i <= 2 or math.isfinite(loss)
        if i in (2000, 12_000):
            sizes.append(resident())
    assert sizes[1] - sizes[0] < 4 * 2**20, "a kept graph of 10 kB a chunk would be 100 MB"
