"""Decoding at the size of mamba-130m: the time of a token beside the time of reading the weights once.

    python -m benchmarks.decoding [--quick] [--threads 1]

A model of 24 ``nn.Mamba`` blocks with RMSNorm, residuals and a tied head computes one token of one row at a time, with
random weights: in float32, in bfloat16, and with the linear layers in int8 by torch's dynamic quantisation.

"read" is the time in which a loop of sums reads the same weights from memory in order. "read in parts" is that of four
parts of each matrix at once, the fastest way known here. "products" is the time of the token's matrix-vector products
alone, one call each, in the same order. "torch" is the float32 model where torch computes them and the step
runs op by op. "accelerated" is transformers' model by ``accelerate``, if transformers is installed. All calls are
interleaved; times are medians of CPU seconds, divided by the threads. Logits are compared with those of float32 first.
--quick uses two layers.
"""

import copy
import importlib.util
import time
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.common import flags, reader, write
from eaml_ext.nn import Mamba, linear_step, norm_step

VOCABULARY, WIDTH, LAYERS = 50280, 768, 24
States = list[tuple[Tensor, Tensor]]


class Decoder(nn.Module):
    """A language model of Mamba blocks that decodes token by token."""

    def __init__(self, layers: int):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH, eps=1e-5) for _ in range(layers))
        self.blocks = nn.ModuleList(Mamba(WIDTH) for _ in range(layers))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def states(self) -> States:
        return [block.allocate_inference_cache(1) for block in self.blocks]

    def forward(self, token: Tensor, states: States) -> tuple[Tensor, States]:
        """``(1,)`` -> logits ``(1, VOCABULARY)`` and the states after the token."""
        x, after = self.embedding(token), []
        for norm, block, state in zip(self.norms, self.blocks, states, strict=True):
            y, *new = block.step(norm_step(norm, x), *state)
            x, after = x + y, [*after, tuple(new)]
        return linear_step(self.head, norm_step(self.norm, x)), after


def quantised(model: nn.Module) -> nn.Module:
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        return quantize_dynamic(model, {nn.Linear})


def decoder(model: Decoder) -> Callable[[], Any]:
    """One token after another, each from the states of the one before."""
    states, token = model.states(), torch.zeros(1, dtype=torch.int64)

    def step() -> None:
        nonlocal states, token
        logits, states = model(token, states)
        token = logits.argmax(-1)

    return step


def products(model: Decoder) -> Callable[[], Any]:
    """The matrix-vector products of a token."""
    layers = [layer for block in model.blocks for layer in (block.in_proj, block.x_proj, block.dt_proj, block.out_proj)]
    dtype = model.norm.weight.dtype
    inputs = {size: torch.randn(1, size).to(dtype) for size in {layer.in_features for layer in (*layers, model.head)}}
    return lambda: [linear_step(layer, inputs[layer.in_features]) for layer in (*layers, model.head)]


def weights(model: nn.Module) -> list[Tensor]:
    """The stored weights and parameters, each tensor once; quantised ones as bytes."""
    found: dict[int, Tensor] = {t.data_ptr(): t for t in model.parameters() if t.dim() > 1}
    for module in model.modules():
        if isinstance(module, torch.ao.nn.quantized.dynamic.Linear):
            packed = module.weight().int_repr()
            found[packed.data_ptr()] = packed
    if any(t.dtype == torch.int8 for t in found.values()):  # the head is quantised; the embedding reads one row
        found = {key: t for key, t in found.items() if t.shape != (VOCABULARY, WIDTH) or t.dtype == torch.int8}
    return list(found.values())


def torch_products(step: Callable[[], Any]) -> Callable[[], Any]:
    """``step`` on torch's products, op by op."""

    def run() -> None:
        with (
            mock.patch("eaml_ext.nn._decoding.reads_in_place", lambda *_: False),
            mock.patch("eaml_ext.ops.mamba_step._raw_op_accepts", lambda *_: False),
            mock.patch("eaml_ext.ops.rms_norm._ON_CPU", False),
        ):
            step()

    return run


def transformers_decoder(layers: int) -> Callable[[], Any]:
    from transformers import MambaConfig, MambaForCausalLM

    from eaml_ext.integrations.transformers import accelerate

    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=layers)
    model = accelerate(MambaForCausalLM(config).eval())
    cache = model(torch.ones(1, 8, dtype=torch.int64), use_cache=True).cache_params
    return lambda: model(torch.ones(1, 1, dtype=torch.int64), cache_params=cache, use_cache=True)


def medians(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of a thread, of interleaved calls, after two that warm up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 2):
        for name, function in functions.items():
            start = time.process_time()
            function()
            times[name].append((time.process_time() - start) / torch.get_num_threads())
    return {name: sorted(t[2:])[rounds // 2] for name, t in times.items()}


def difference(model: Decoder, reference: Decoder) -> float:
    """The largest difference of logits after eight tokens, over the largest logit."""
    tokens = torch.randint(VOCABULARY, (8, 1))
    results = []
    for one in (model, reference):
        states = one.states()
        for token in tokens:
            logits, states = one(token, states)
        results.append(logits.float())
    return float((results[0] - results[1]).abs().max() / results[1].abs().max())


@torch.inference_mode()
def main() -> None:
    arguments = flags(__doc__)
    layers, rounds = (2, 10) if arguments.quick else (LAYERS, 40)
    full = Decoder(layers).eval()
    models = {"float32": full, "bfloat16": copy.deepcopy(full).to(torch.bfloat16), "int8": quantised(full)}
    functions: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        functions[name] = decoder(model)
        functions[f"{name} read"] = reader(weights(model), arguments.threads)
        functions[f"{name} read in parts"] = reader(weights(model), arguments.threads, in_parts=True)
        functions[f"{name} products"] = products(model)
    functions["torch"] = torch_products(decoder(full))
    if importlib.util.find_spec("transformers") is not None:
        functions["accelerated"] = transformers_decoder(layers)
    off = {name: difference(model, full) for name, model in models.items()}
    t = medians(functions, rounds)

    rows = []
    for name, model in models.items():
        size = sum(w.numel() * w.element_size() for w in weights(model))
        row = {"weights": name, "bytes": size, "token": t[name], "difference of logits": off[name]}
        row |= {key: t[f"{name} {key}"] for key in ("read", "read in parts", "products")}
        rows.append(row)
        print(
            f"{name:<9} {size / 1e6:.0f} MB   token {1e3 * row['token']:.1f} ms, {row['token'] / row['read']:.2f} x "
            f"reading ({1e3 * row['read']:.1f} ms), {row['token'] / row['read in parts']:.2f} x in parts "
            f"({1e3 * row['read in parts']:.1f} ms); products {row['products'] / row['token']:.0%} of the token; "
            f"logits differ by {off[name]:.1e}"
        )
    others = {name: t[name] for name in ("torch", "accelerated") if name in t}
    for name, seconds in others.items():
        print(f"{name:<12} {1e3 * seconds:.1f} ms a token, {seconds / t['float32']:.2f} x ours")
    if not arguments.quick:
        results = {"threads": arguments.threads, "layers": layers, "decoding": rows, **others}
        write(f"decoding-{arguments.threads}-thread", results)


if __name__ == "__main__":
    main()
