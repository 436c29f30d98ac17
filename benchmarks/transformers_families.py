"""Mamba models of transformers, family by family: their path without mamba_ssm against the accelerated model.

    python -m benchmarks.transformers_families [--quick] [--threads 1] [--families Mamba Jamba]

Two models of equal random weights are compared on a small configuration, in float32. Logits and gradients are those of
a batch. "padding" is for a batch padded on both sides. "cache" compares a sequence that enters the cache in parts and
single tokens with transformers' logits of the whole. Generation is greedy, from prompts with left padding. Errors are
over the largest entry of logits or of a parameter's gradient. On a larger configuration the two are called in turn: a
forward pass without gradients, a training step's forward and backward, greedy generation after a prompt. Times are
medians, in CPU seconds of the process. The last lines are the table of docs/figures.md. --quick measures on the small
configuration.
"""

import argparse
import copy
import importlib.util
import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common import flags, write
from benchmarks.mamba import measure

PAD = 0


class Size(NamedTuple):
    vocab: int
    hidden: int
    layers: int
    conv: int  # width of the convolution
    state: int  # of Mamba-1
    head_dim: int
    heads_state: int  # state of Mamba-2
    groups: int
    chunk: int
    batch: int
    length: int  # of the sequences
    prompt: int
    new_tokens: int


SMALL = Size(61, 32, 3, 4, 5, 8, 6, 2, 8, 3, 40, 6, 20)
LARGE = Size(1000, 256, 4, 4, 16, 64, 128, 1, 256, 1, 256, 32, 32)
PASSES = ("forward", "training", "generation")


def _common(size: Size) -> dict[str, Any]:
    """Names that all configurations share; the weights are small so that rounding is not magnified."""
    return {
        "vocab_size": size.vocab,
        "hidden_size": size.hidden,
        "initializer_range": 0.02,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": None,
    }


def _attention(size: Size) -> dict[str, Any]:
    return {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 2 * size.hidden}


def _mamba1(size: Size) -> dict[str, Any]:
    return {**_common(size), "num_hidden_layers": size.layers, "state_size": size.state, "conv_kernel": size.conv}


def _jamba(size: Size) -> dict[str, Any]:
    return {
        **_common(size),
        **_attention(size),
        "num_hidden_layers": size.layers,
        "mamba_d_state": size.state,
        "mamba_d_conv": size.conv,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,  # all are active, because rounding could change the choice of one
        "num_experts_per_tok": 2,
    }


def _mamba2(size: Size) -> dict[str, Any]:
    return {
        **_common(size),
        "num_hidden_layers": size.layers,
        "conv_kernel": size.conv,
        "state_size": size.heads_state,
        "num_heads": 2 * size.hidden // size.head_dim,
        "head_dim": size.head_dim,
        "n_groups": size.groups,
        "chunk_size": size.chunk,
    }


def _hybrid(size: Size) -> dict[str, Any]:
    return {
        **_common(size),
        **_attention(size),
        "num_hidden_layers": size.layers,
        "mamba_n_heads": 2 * size.hidden // size.head_dim,
        "mamba_d_head": size.head_dim,
        "mamba_d_state": size.heads_state,
        "mamba_d_conv": size.conv,
        "mamba_n_groups": size.groups,
        "mamba_chunk_size": size.chunk,
    }


def _granite(size: Size) -> dict[str, Any]:
    layers = ["mamba", "attention", "mamba", "mamba"][: size.layers]
    experts = {"num_local_experts": 2, "num_experts_per_tok": 2, "shared_intermediate_size": 2 * size.hidden}
    return {**_hybrid(size), **experts, "layer_types": layers}


def _nemotron(size: Size) -> dict[str, Any]:
    return {
        **_common(size),
        **_attention(size),
        "head_dim": size.hidden // 4,
        "mamba_num_heads": 2 * size.hidden // size.head_dim,
        "mamba_head_dim": size.head_dim,
        "ssm_state_size": size.heads_state,
        "conv_kernel": size.conv,
        "n_groups": size.groups,
        "chunk_size": size.chunk,
        "layers_block_type": ["mamba", "attention", "mamba", "mlp"][: size.layers],
    }


def _zamba2(size: Size) -> dict[str, Any]:
    return {
        **_common(size),
        "num_attention_heads": 4,
        "intermediate_size": 2 * size.hidden,
        "num_hidden_layers": size.layers,
        "layers_block_type": ["mamba", "hybrid", "mamba", "mamba"][: size.layers],
        "num_mem_blocks": 1,
        "adapter_rank": 4,
        "mamba_d_state": size.heads_state,
        "mamba_d_conv": size.conv,
        "mamba_ngroups": size.groups,
        "n_mamba_heads": 2 * size.hidden // size.head_dim,
        "mamba_headdim": size.head_dim,
        "chunk_size": size.chunk,
    }


# The prefix of transformers' classes -> the options of its configuration.
FAMILIES: dict[str, Callable[[Size], dict[str, Any]]] = {
    "Mamba": _mamba1,
    "FalconMamba": _mamba1,
    "Jamba": _jamba,
    "Mamba2": _mamba2,
    "Bamba": lambda size: {**_hybrid(size), "attn_layer_indices": [1]},
    "GraniteMoeHybrid": _granite,
    "NemotronH": _nemotron,
    "Zamba2": _zamba2,
    "FalconH1": lambda size: {**_hybrid(size), "mamba_d_ssm": 2 * size.hidden},
}


def build(family: str, size: Size = SMALL, **options: Any) -> Any:
    """Return transformers' model with random weights; ``options`` replace those of its configuration."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**{**FAMILIES[family](size), **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():  # so that no bias is zero and no norm's weight is one
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def pair(family: str, size: Size = SMALL, **options: Any) -> tuple[Any, Any]:
    """Return transformers' model and an accelerated copy."""
    from eaml_ext.integrations.transformers import accelerate

    theirs = build(family, size, **options)
    return theirs, accelerate(copy.deepcopy(theirs))


def tokens(size: Size, batch: int | None = None, length: int | None = None) -> Tensor:
    return torch.randint(2, size.vocab, (batch or size.batch, length or size.length))


def padding(x: Tensor, left: int, right: int = 0) -> Tensor:
    """Return a mask that marks ``left`` first tokens of row 0 and ``right`` last tokens of row 1 as padding."""
    mask = torch.ones_like(x)
    mask[0, :left] = 0
    mask[1, x.shape[1] - right :] = 0
    return mask


def in_parts(model: Any, x: Tensor, parts: list[int]) -> Tensor:
    """Return the logits of ``x``, whose parts enter the model one after another through its cache."""
    names = inspect.signature(model.forward).parameters
    argument = next(name for name in ("cache", "cache_params", "past_key_values") if name in names)
    cache, begin, logits = None, 0, []
    for part in x.split(parts, dim=1):
        positions = torch.arange(begin, begin + part.shape[1]).expand(part.shape)
        # Bamba would number the tokens of each part from zero.
        extra = {"position_ids": positions} if "position_ids" in names else {}
        out = model(part, use_cache=True, **{argument: cache}, **extra)
        cache, begin = out[argument], begin + part.shape[1]
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def generate(model: Any, x: Tensor, mask: Tensor, new_tokens: int) -> Tensor:
    written: Tensor = model.generate(
        x, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
    )
    return written


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def gradients(model: Any, x: Tensor) -> dict[str, Tensor]:
    """Return the gradient of the loss in training, by parameter; without those that take no part."""
    model.train()
    model(x, labels=x).loss.backward()
    model.eval()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {name: grad for name, grad in found.items() if grad.abs().max() > 0}


def compare(family: str, size: Size = SMALL) -> dict[str, Any]:
    theirs, ours = pair(family, size)
    x, prompts = tokens(size), tokens(size, length=size.prompt)
    mask, prompt_mask = padding(x, 7, 10), padding(prompts, 2)
    prompts[prompt_mask == 0] = PAD
    grads = [gradients(m, x) for m in (theirs, ours)]
    with torch.no_grad():
        want = theirs(x).logits
        padded = [m(x, attention_mask=mask).logits[mask == 1] for m in (ours, theirs)]
        written = [generate(m, prompts, prompt_mask, size.new_tokens) for m in (theirs, ours)]
        parts = [size.length - 9, 1, 1, 5, 2]
        return {
            "family": family,
            "logits": relative_error(ours(x).logits, want),
            "gradients": max(relative_error(grads[1][name], g) for name, g in grads[0].items()),
            "padding": relative_error(*padded),
            "cache": relative_error(in_parts(ours, x, parts), want),
            "tokens are equal": torch.equal(*written),
        }


def speed(family: str, size: Size) -> dict[str, float]:
    """CPU seconds of each pass of transformers' model, "forward", and of the accelerated one, "forward, ours"."""
    models = dict(zip(("", ", ours"), pair(family, size), strict=True))
    x, prompts = tokens(size), tokens(size, length=size.prompt)
    passes = {
        "forward": torch.no_grad()(lambda m: m(x, use_cache=False)),
        "training": lambda m: gradients(m, x),
        "generation": lambda m: generate(m, prompts, torch.ones_like(prompts), size.new_tokens),
    }
    times = {}
    for name, run in passes.items():
        times |= measure({name + key: lambda m=m, run=run: run(m) for key, m in models.items()})
    return times


def table(rows: list[dict[str, Any]]) -> str:
    """The Markdown table of :func:`compare` and the ratios of :func:`speed`."""
    lines = [
        "| family | logits | gradients | padding | cache | tokens | forward | training | generation |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        errors = " | ".join(f"{row[name]:.0e}" for name in ("logits", "gradients", "padding", "cache"))
        ratios = " | ".join(f"{row[name] / row[f'{name}, ours']:.1f}×" for name in PASSES)
        lines.append(f"| {row['family']} | {errors} | {'equal' if row['tokens are equal'] else 'differ'} | {ratios} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="no file written")
    chosen, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    arguments = flags(__doc__)
    if importlib.util.find_spec("transformers") is None:
        print("absent: transformers is not installed")
        return
    import transformers

    transformers.logging.set_verbosity_error()  # it warns that mamba_ssm is absent
    size, rows = SMALL if arguments.quick else LARGE, []
    for family in chosen.families:
        rows.append({**compare(family), **speed(family, size)})
        print(rows[-1])
    if not arguments.quick and chosen.families == list(FAMILIES):
        results = {"threads": arguments.threads, "transformers": transformers.__version__, "size": size._asdict()}
        write(f"transformers_families-{arguments.threads}-thread", {**results, "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
