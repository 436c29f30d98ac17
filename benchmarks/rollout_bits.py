"""Time of the layers that give a rollout and training the same bits, in ratios to torch's own.

    python -m benchmarks.rollout_bits [--threads 1] [--repeats 15]

Times are CPU seconds. Each linear layer has a line, forward and with its gradient. Each policy of 64 channels has one:
a step of 64 environments, and the forward and backward pass of a scan of 64 trials of 100 steps. The two variants run
in turn, and a ratio is the median of the ratios of the turns.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F

from eaml_ext.nn import _row_invariant
from eaml_ext.ops.row_invariant_linear import row_invariant_linear
from eaml_ext.rl import SSMMetaPolicy

SHAPES = ((8, 64, 64), (64, 64, 64), (6400, 8, 64), (6400, 64, 36), (6400, 64, 64), (6400, 64, 256), (6400, 128, 512))
CORES = ("s6", "mamba", "s4d", "ssd", "retention", "rwkv")


def seconds(run: Callable[[], object], shortest: float = 0.01) -> float:
    """Return the mean CPU time of a call, in a loop of at least ``shortest`` seconds."""
    calls = 1
    while True:
        start = time.process_time()
        for _ in range(calls):
            run()
        taken = time.process_time() - start
        if taken >= shortest:
            return taken / calls
        calls *= 2


def compare(ours: Callable[[], object], torchs: Callable[[], object], repeats: int) -> dict[str, float]:
    """Return the median time of ours in microseconds, and the median ratio to torch's."""
    ours(), torchs()
    pairs = [(seconds(ours), seconds(torchs)) for _ in range(repeats)]
    ratio = statistics.median(a / b for a, b in pairs)
    return {"us": round(1e6 * statistics.median(a for a, _ in pairs), 1), "ratio": round(ratio, 2)}


def linear_layer(rows: int, inputs: int, outputs: int, repeats: int) -> dict[str, dict[str, float]]:
    """Compare the linear layer of one shape."""
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    grad = torch.randn(rows, outputs)
    return {
        "forward": compare(lambda: row_invariant_linear(x, weight, bias), lambda: F.linear(x, weight, bias), repeats),
        "with gradient": compare(
            lambda: torch.autograd.grad(row_invariant_linear(*leaves), leaves, grad),
            lambda: torch.autograd.grad(F.linear(*leaves), leaves, grad),
            repeats,
        ),
    }


def policy(core: str, repeats: int) -> dict[str, dict[str, float]]:
    """Compare a policy with one whose layers are torch's."""
    net = SSMMetaPolicy(8, 2, core=core)
    obs, state = torch.randn(64, 100, 8), net.init_hidden(64)

    def step() -> None:
        with torch.no_grad():
            net.step(obs[:, 0], state)

    def learn() -> None:
        distribution, values, _ = net.scan(obs)
        torch.autograd.grad(distribution.entropy().sum() + values.sum(), [*net.parameters()])

    def torchs(run: Callable[[], None]) -> Callable[[], None]:
        def patched() -> None:
            with mock.patch.object(_row_invariant, "_applies", lambda x: False):
                run()

        return patched

    return {
        "step": compare(step, torchs(step), repeats),
        "scan with gradient": compare(learn, torchs(learn), repeats),
    }


def main() -> None:
    """Print one line of JSON for each shape and each core."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for shape in SHAPES:
        print(json.dumps({"rows, inputs, outputs": shape, **linear_layer(*shape, options.repeats)}), flush=True)
    for core in CORES:
        print(json.dumps({"core": core, **policy(core, options.repeats)}), flush=True)


if __name__ == "__main__":
    main()
