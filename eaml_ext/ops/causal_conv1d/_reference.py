"""The convolution as a sum of shifted inputs: the specification, and the kernel where no compiled one is registered."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eaml_ext._torch_compat import autograd_in_kernel
from eaml_ext.ops.causal_conv1d._schema import NUM_INPUTS, ConvInputs, ConvOptions, empty_gradients
from eaml_ext.ops.fallback import reference_of


def _per_row(parameter: Tensor, rank: int, batch: int) -> Tensor:
    """Repeat a parameter ``(tasks, *)`` for the rows of each task; return a shared one with one row."""
    if parameter.dim() == rank:
        return parameter.unsqueeze(0)
    return parameter.repeat_interleave(batch // parameter.shape[0], dim=0)


def _run_starts(x: Tensor, options: ConvOptions) -> tuple[Tensor, Tensor]:
    """Return the first step of each step's run, and the number of its sequence, -1 after a reset: ``(batch, length)``.

    A run is the steps between two resets or of one packed sequence.
    """
    batch, _, length = x.shape
    steps = torch.arange(length, device=x.device).expand(batch, length)
    if options.cu_seqlens is not None:
        boundaries = options.cu_seqlens.expand(batch, -1)
        # The last sequence that starts at the step or before; the ones before it may be empty.
        sequence = (boundaries[:, 1:-1, None] <= steps.unsqueeze(1)).sum(1)
        return boundaries.gather(1, sequence).long(), sequence
    if options.reset is None:
        return torch.zeros_like(steps), torch.zeros_like(steps)
    last_reset = torch.where(options.reset, steps, -1).cummax(1).values
    return last_reset.clamp(min=0), torch.where(last_reset >= 0, -1, 0)


def reference(x: ConvInputs, options: ConvOptions) -> Tensor:
    """Add the products with the taps, from the oldest to the newest."""
    inputs, weight, bias, states = x
    (batch, dim, length), width = inputs.shape, weight.shape[-1]
    values = inputs.to(weight.dtype)
    taps = _per_row(weight, 2, batch)
    y = values.new_zeros(()) if bias is None else _per_row(bias, 1, batch).unsqueeze(-1)
    start, sequence = _run_starts(inputs, options)
    steps = torch.arange(length, device=inputs.device)
    for distance in reversed(range(width)):
        past = F.pad(values, (distance, 0))[..., :length]
        if distance:
            before = start - (steps - distance)  # how far the input lies before the run, if positive
            past = past.masked_fill((before > 0).unsqueeze(1), 0)
            if states is not None and states.shape[1] and length:
                # Entry width - 1 - before of the state is the input that lies `before` steps before the run.
                flat = states.to(weight.dtype).transpose(1, 2).flatten(2)
                index = sequence.clamp(min=0) * (width - 1) + (width - 1 - before).clamp(0, width - 2)
                from_state = flat.gather(2, index.unsqueeze(1).expand(batch, dim, length))
                past = past + from_state.masked_fill(((before <= 0) | (sequence < 0)).unsqueeze(1), 0)
        y = y + past * taps[..., width - 1 - distance].unsqueeze(-1)
    y = F.silu(y) if options.silu else y
    return y.to(inputs.dtype)


@torch.library.impl("eaml_ext::causal_conv1d", "CompositeExplicitAutograd")
@reference_of("causal_conv1d")
def _kernel(*args: Any) -> Tensor:
    x = ConvInputs(*args[:NUM_INPUTS])
    return torch.empty_like(x.x).copy_(reference(x, ConvOptions(*args[NUM_INPUTS:])))


@torch.library.impl("eaml_ext::causal_conv1d_backward", "CompositeExplicitAutograd")
@reference_of("causal_conv1d")
def _backward_kernel(grad_y: Tensor, *args: Any) -> tuple[Tensor, ...]:
    x, options = ConvInputs(*args[:NUM_INPUTS]), ConvOptions(*args[NUM_INPUTS:])
    present = [i for i, v in enumerate(x) if v is not None]
    with autograd_in_kernel():
        leaves = [x[i].detach().requires_grad_() for i in present]  # type: ignore[union-attr]
        full: list[Any] = [None] * NUM_INPUTS
        for i, leaf in zip(present, leaves, strict=True):
            full[i] = leaf
        y = reference(ConvInputs(*full), options)
        grads = torch.autograd.grad(y, leaves, grad_y, allow_unused=True, materialize_grads=True)
    out = empty_gradients(x)
    for i, grad in zip(present, grads, strict=True):
        out[i].copy_(grad)
    return out
