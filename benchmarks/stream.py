"""Time of an outer step of StreamMAML, in units of a step of plain training of the same model on the same streams.

    python -m benchmarks.stream [--quick] [--threads 1]

Plain training runs each stream in one call and takes one backward pass. "in chunks" is plain training with a call per
chunk. The fast weights are the output layer, the last norm and the output projection of the last core ("behind the
scan"), or all parameters. "reference" is the same loop, second order behind the scan, with the scan's formula in plain
PyTorch. Calls are interleaved; times are medians of CPU seconds.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from benchmarks.common import flags, write
from eaml_ext import SSM, StreamMAML
from eaml_ext.ops.selective_scan import selective_scan_reference

# (hidden_dim, num_layers, streams, time, chunk_size)
SHAPES = ((32, 1, 16, 256, 16), (128, 1, 16, 1024, 64), (128, 2, 16, 1024, 128), (256, 2, 8, 2048, 256))


def steps(hidden: int, layers: int, streams: int, length: int, chunk: int) -> dict[str, Callable[[], Any]]:
    """Return one training step of each variant."""
    x = torch.randn(streams, length + 1, 2)
    x, y = x[:, :-1], x[:, 1:]

    def model() -> SSM:
        torch.manual_seed(0)
        return SSM(2, hidden, 2, num_layers=layers, dt_min=0.01, dt_max=1.0)

    def plain(size: int) -> Callable[[], Any]:
        own = model()
        optimizer = torch.optim.Adam(own.parameters(), 1e-3)

        def step() -> None:
            optimizer.zero_grad()
            state: Tensor | None = None
            losses = []
            for a, b in zip(x.split(size, 1), y.split(size, 1), strict=True):
                prediction, state = own.scan(a, state)
                losses.append(mse_loss(prediction, b))
            torch.stack(losses).mean().backward()
            optimizer.step()

        return step

    def learner(parameters: tuple[str, ...], **options: Any) -> Callable[[], Any]:
        maml = StreamMAML(model(), 0.05, 1e-3, chunk_size=chunk, parameters=parameters, **options)
        return lambda: maml.meta_update(x, y, mse_loss)

    behind = ("head", "norm", f"cores.{layers - 1}.out_proj")
    second = learner(behind)

    def on_reference() -> Any:
        with mock.patch("eaml_ext.nn.cores.s6.selective_scan", selective_scan_reference):
            return second()

    return {
        "plain": plain(length),
        "in chunks": plain(chunk),
        "first order": learner(behind, first_order=True),
        "second order": second,
        "recompute": learner(behind, memory="recompute"),
        "all parameters": learner(("embed", "norms", "cores", "norm", "head")),
        "reference": on_reference,
    }


def measure(shape: tuple[int, ...], rounds: int) -> dict[str, float]:
    """Return the CPU seconds of each variant, medians of ``rounds`` interleaved steps."""
    functions = steps(*shape)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if number:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    arguments = flags(__doc__)
    rows = []
    for shape in SHAPES[: 1 if arguments.quick else None]:
        found = measure(shape, 2 if arguments.quick else 7)
        rows.append({"shape": list(shape), "seconds": found})
        ratios = ", ".join(f"{name} {value / found['plain']:.2f}" for name, value in found.items())
        print(f"{shape}: plain {1e3 * found['plain']:.1f} ms; {ratios}", flush=True)
    if not arguments.quick:
        print(write(f"stream-{arguments.threads}-thread", {"threads": arguments.threads, "rows": rows}))


if __name__ == "__main__":
    main()
