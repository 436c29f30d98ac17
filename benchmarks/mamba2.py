"""A Mamba-2 layer: nn.Mamba2 against transformers' Mamba2Mixer without mamba_ssm, its chunked path.

    python -m benchmarks.mamba2 [--quick] [--threads 1] [--shape 2 512 256 64]

Shapes are (batch, length, d_model, d_state); heads have 64 channels, chunks 256 steps. Both layers have the same random
weights, in float32, and are compared before they are measured. A step is one token from the states of the sequence;
transformers keeps them in its cache, which it changes in place. "scan alone" is our op on the tensors that the layer
gives it. Times are medians of interleaved calls, in CPU seconds of the process. --quick uses one small shape.
"""

import importlib.util
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.common import flags, write
from benchmarks.mamba import measure
from eaml_ext.nn import Mamba2
from eaml_ext.nn import _mamba2_mixer as module

SHAPES = [(2, 512, 256, 64), (1, 2048, 512, 128), (8, 128, 256, 64), (1, 4096, 256, 16)]
QUICK = [(2, 128, 128, 16)]
Layers = dict[str, Any]


def layers(d_model: int, d_state: int) -> Layers:
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=d_model,
        num_heads=2 * d_model // 64,
        head_dim=64,
        state_size=d_state,
        n_groups=1,
        num_hidden_layers=1,
    )
    theirs, ours = Mamba2Mixer(config, 0), Mamba2(d_model, d_state)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return {"transformers": theirs, "ours": ours}


def forward(layer: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = layer(x)
    return y


def backward(layer: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(layer(x), list(layer.parameters()), weight)


def steps(pair: Layers, x: Tensor) -> dict[str, Callable[[], Any]]:
    """One token after the sequence ``x``, from the states of each layer."""
    from transformers import DynamicCache, Mamba2Config

    theirs, ours = pair["transformers"], pair["ours"]
    cache, token = DynamicCache(config=Mamba2Config(num_hidden_layers=1)), x[:, :1]
    with torch.no_grad():
        theirs(x, cache)
        _, states = ours.scan(x)
    return {
        "transformers": torch.no_grad()(lambda: theirs(token, cache)),
        "ours": torch.no_grad()(lambda: ours.step(token, *states)),
    }


def scan(layer: Mamba2, x: Tensor, gradients: bool) -> Callable[[], Any]:
    """Our op on the tensors of the layer; with ``gradients``, also its gradients in all of them."""
    calls: list[tuple[Any, Any]] = []

    def record(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        return module_scan(*args, **options)

    module_scan = module.selective_scan
    with mock.patch.object(module, "selective_scan", record), torch.no_grad():
        layer(x)
    ((args, options),) = calls
    if not gradients:
        return torch.no_grad()(lambda: module_scan(*args, **options))
    args = tuple(None if v is None else v.detach().requires_grad_() for v in args)
    inputs = [v for v in args if v is not None]
    weight = torch.randn_like(args[0])
    return lambda: torch.autograd.grad(module_scan(*args, **options)[0], inputs, weight)


def compare(pair: Layers, x: Tensor, weight: Tensor) -> dict[str, float]:
    """The largest differences over the largest entry: of outputs, and of a parameter's gradient."""

    def relative(got: Tensor, want: Tensor) -> float:
        return float((got - want).abs().max() / want.abs().max())

    outs = [forward(layer, x) for layer in pair.values()]
    grads = [
        dict(zip(dict(layer.named_parameters()), backward(layer, x, weight), strict=True)) for layer in pair.values()
    ]
    gradients = max(relative(grads[1][name], want) for name, want in grads[0].items())
    return {"outputs": relative(outs[1], outs[0]), "gradients": gradients}


def rows(shape: tuple[int, int, int, int]) -> list[dict[str, Any]]:
    batch, length, d_model, d_state = shape
    pair, x = layers(d_model, d_state), torch.randn(batch, length, d_model)
    weight = torch.randn_like(x)
    differences = compare(pair, x, weight)
    found = []
    for name, functions, alone in (
        ("forward", {key: lambda m=m: forward(m, x) for key, m in pair.items()}, scan(pair["ours"], x, False)),
        (
            "+backward",
            {key: lambda m=m: backward(m, x, weight) for key, m in pair.items()},
            scan(pair["ours"], x, True),
        ),
        ("step", steps(pair, x), None),
    ):
        times = measure(functions | ({} if alone is None else {"scan alone": alone}))
        found.append({"shape": shape, "pass": name, "scan alone": None, **times, **differences})
        share = "" if alone is None else f"   scan {times['scan alone'] / times['ours']:.0%}"
        print(
            f"{shape!s:<22} {name:<10} ours {1e3 * times['ours']:8.3f} ms, transformers "
            f"{1e3 * times['transformers']:8.3f} ms, {times['transformers'] / times['ours']:.1f}x{share}"
        )
    return found


def main() -> None:
    arguments = flags(__doc__, shape=("batch", "length", "d_model", "d_state"))
    if importlib.util.find_spec("transformers") is None:
        print("absent: transformers is not installed")
        return
    import transformers

    transformers.logging.set_verbosity_error()  # it warns that mamba_ssm is absent
    shapes = [tuple(arguments.shape)] if arguments.shape else QUICK if arguments.quick else SHAPES
    results = {"threads": arguments.threads, "rows": [row for shape in shapes for row in rows(shape)]}
    if shapes is SHAPES:
        write(f"mamba2-{arguments.threads}-thread", results)


if __name__ == "__main__":
    main()
