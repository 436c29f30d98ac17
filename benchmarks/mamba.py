"""Mamba of transformers at the size of mamba-130m: its path without mamba_ssm against the accelerated model.

    python -m benchmarks.mamba [--quick] [--threads 1]

Weights are random, in float32. Prefill computes the logits of the last token of a prompt, without gradients. A training
step is loss, backward and AdamW on one batch. Decoding computes one token from a cache. The time of the scans of all
layers is that of one scan on the same shape, times the layers. Two models of equal weights are called in turn, after
their logits and gradients have been compared. Times are CPU seconds of the process, because calls take tens of them and
other work would count on a clock. --quick uses two layers.
"""

import copy
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import flags, write
from eaml_ext.ops import selective_scan

PREFILL = [(1, 128), (1, 512)]  # (batch, length)
TRAINING = [(1, 128), (1, 256)]  # their gradients take time by length squared


def models(layers: int) -> dict[str, Any]:
    from transformers import MambaConfig, MambaForCausalLM

    from eaml_ext.integrations.transformers import accelerate

    theirs = MambaForCausalLM(
        MambaConfig(
            vocab_size=50280,
            hidden_size=768,
            num_hidden_layers=layers,
            initializer_range=0.02,  # this and the next as in mamba_ssm; the default magnifies rounding
            rescale_prenorm_residual=True,
        )
    )
    return {"transformers": theirs, "ours": accelerate(copy.deepcopy(theirs))}


def scans(batch: int, length: int, gradients: bool) -> dict[str, Callable[[], Any]]:
    """The scan of a layer, as both paths call it."""
    inner, state = 1536, 16
    xz = torch.randn(batch, length, 2 * inner)
    A = -torch.arange(1.0, state + 1).repeat(inner, 1)
    x, delta, B, C = (torch.randn(batch, length, width) for width in (inner, inner, state, state))
    D, bias = torch.ones(inner), torch.full((inner,), -4.0)
    leaves = [v.requires_grad_(gradients) for v in (xz, x, delta, B, C, A, D, bias)]
    target = torch.randn(batch, inner, length)

    def run(scan: Callable[..., Any]) -> None:
        with torch.set_grad_enabled(gradients):
            y = scan(x.mT, delta.mT, A, B.mT, C.mT, D, xz[..., inner:].mT, bias, True)
        if gradients:
            torch.autograd.grad(y, leaves, target)

    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    def theirs(*x: Any) -> Tensor:
        u, delta, A, B, C, D, z, bias, softplus = x
        return mamba_selective_scan(u, delta, A, B, C, D, z, delta_bias=bias, delta_softplus=softplus)

    return {"transformers": lambda: run(theirs), "ours": lambda: run(selective_scan)}


def measure(functions: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Medians of interleaved calls after one that warms up; the faster of two where they take ten seconds."""

    def wall_time(function: Callable[[], Any]) -> float:
        start = time.process_time()
        function()
        return time.process_time() - start

    times = {name: [wall_time(function)] for name, function in functions.items()}
    slowest = max(t[0] for t in times.values())
    for _ in range(1 if slowest > 10 else 4 if slowest > 1 else 20):
        for name, function in functions.items():
            times[name].append(wall_time(function))
    return {name: min(t) if slowest > 10 else statistics.median(t[1:]) for name, t in times.items()}


def prefill(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(tokens, logits_to_keep=1, use_cache=False).logits


def training_step(model: Any, optimizer: torch.optim.Optimizer, tokens: Tensor) -> None:
    optimizer.zero_grad()
    model.train()(tokens, labels=tokens).loss.backward()
    optimizer.step()


def decoder(model: Any) -> Callable[[], Any]:
    with torch.no_grad():
        cache = model.eval()(torch.ones(1, 8, dtype=torch.int64), use_cache=True).cache_params

    def step() -> None:
        with torch.no_grad():
            model(torch.ones(1, 1, dtype=torch.int64), cache_params=cache, use_cache=True)

    return step


def compare(pair: dict[str, Any]) -> dict[str, float]:
    """The largest differences: of logits, and of a parameter's gradient over its largest entry."""
    tokens = torch.randint(50280, (1, 32))
    outs = [m.train()(tokens, labels=tokens) for m in pair.values()]
    for out in outs:
        out.loss.backward()
    off = 0.0
    for theirs, ours in zip(*(m.parameters() for m in pair.values()), strict=True):
        off = max(off, float((ours.grad - theirs.grad).abs().max() / theirs.grad.abs().max()))
    for m in pair.values():
        m.zero_grad()
    return {"logits": (outs[1].logits - outs[0].logits).abs().max().item(), "gradients": off}


def main() -> None:
    arguments = flags(__doc__)
    if importlib.util.find_spec("transformers") is None:
        print("absent: transformers is not installed")
        return
    layers = 2 if arguments.quick else 24
    pair = models(layers)
    results: dict[str, Any] = {"threads": arguments.threads, "layers": layers, "differences": compare(pair)}
    print(f"differences: {results['differences']}")
    results["passes"] = []

    def report(name: str, shape: tuple[int, int], t: dict[str, float], alone: dict[str, float] | None) -> None:
        alone = None if alone is None else {k: layers * s for k, s in alone.items()}
        results["passes"].append({"pass": name, "shape": shape, **t, "scans alone": alone})
        if not arguments.quick:
            write(f"mamba-{arguments.threads}-thread", results)
        ratio, text = t["transformers"] / t["ours"], ""
        if alone is not None:
            text = "   scans " + ", ".join(
                f"{alone[k]:.3f} s ({alone[k] / t[k]:.0%})" for k in ("ours", "transformers")
            )
        print(
            f"{name:<14} {shape!s:<10} ours {t['ours']:.3f} s, "
            f"transformers {t['transformers']:.3f} s, {ratio:.1f}x{text}"
        )

    report("decoding", (1, 1), measure({name: decoder(m) for name, m in pair.items()}), None)
    for shape in PREFILL[: 1 if arguments.quick else None]:
        tokens = torch.randint(50280, shape)
        t = measure({name: lambda m=m, tokens=tokens: prefill(m, tokens) for name, m in pair.items()})
        report("prefill", shape, t, measure(scans(*shape, False)))
    optimizers = {name: torch.optim.AdamW(m.parameters(), lr=1e-4) for name, m in pair.items()}
    for shape in TRAINING[: 1 if arguments.quick else None]:
        tokens = torch.randint(50280, shape)
        t = measure(
            {
                name: lambda m=m, name=name, tokens=tokens: training_step(m, optimizers[name], tokens)
                for name, m in pair.items()
            }
        )
        report("training step", shape, t, measure(scans(*shape, True)))


if __name__ == "__main__":
    main()
