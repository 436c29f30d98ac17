"""The public functions: causal_conv1d, causal_conv1d_step, causal_conv1d_reference."""

from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from eaml_ext import _check
from eaml_ext._torch_compat import dispatch_mode_active, has_kernel, is_check_of_op, transforms_active
from eaml_ext.ops._inference import PLAIN
from eaml_ext.ops._library import library
from eaml_ext.ops._typed import allow_in_graph
from eaml_ext.ops.causal_conv1d._autograd import can_skip_autograd, differentiable_conv
from eaml_ext.ops.causal_conv1d._reference import reference
from eaml_ext.ops.causal_conv1d._schema import MAX_KERNEL_WIDTH, REDUCED_PRECISION, ConvInputs, ConvOptions
from eaml_ext.ops.causal_conv1d._validation import check_arguments, check_step_arguments
from eaml_ext.ops.fallback import warn_once

Activation = Literal["silu", "swish"] | None

_ON_CPU, _ON_CUDA = (has_kernel("eaml_ext::causal_conv1d", key) for key in ("CPU", "CUDA"))


def _conv(x: ConvInputs, options: ConvOptions, use_reference: bool = False) -> Tensor:
    """Run the convolution on checked arguments."""
    if not use_reference and x.weight.shape[-1] > MAX_KERNEL_WIDTH:
        warn_once(f"causal_conv1d of more than {MAX_KERNEL_WIDTH} taps", x.x.device)
        use_reference = True
    if use_reference:
        return reference(x, options)
    if can_skip_autograd(x):
        y: Tensor = library.causal_conv1d(*x, *options)
        return y
    return differentiable_conv(x, options)


def _final_states(x: ConvInputs, options: ConvOptions) -> Tensor:
    """Return the last ``width - 1`` inputs of each sequence's last run, ``(batch, sequences, dim, width - 1)``."""
    inputs, size, length = x.x, x.weight.shape[-1] - 1, x.x.shape[2]
    batch, dim = inputs.shape[:2]
    sequences = 1 if options.cu_seqlens is None else options.cu_seqlens.shape[1] - 1
    states = x.initial_states
    if states is None:
        states = inputs.new_zeros(batch, sequences, dim, size)
    if options.cu_seqlens is None:
        if not torch.compiler.is_exporting():  # torch.export cannot prove the sizes of this slice at every length
            inputs = inputs[..., max(length - size, 0) :]
        last = torch.cat([states.squeeze(1), inputs], dim=-1)
        last = last[..., last.shape[-1] - size :].contiguous()
        if options.reset is not None:
            reset = F.pad(options.reset, (size, 0))[:, length:].int()
            later = reset.flip(1).cumsum(1).flip(1) - reset  # resets after each input
            last = last.masked_fill((later > 0).unsqueeze(1), 0)
        return last.unsqueeze(1)
    if not length:
        return states.clone(memory_format=torch.contiguous_format)
    begin, end = options.cu_seqlens[0, :-1, None].long(), options.cu_seqlens[0, 1:, None].long()
    positions = end - size + torch.arange(size, device=inputs.device)  # (sequences, width - 1)
    in_sequence = positions >= begin
    from_inputs = inputs[0][:, positions.clamp(0, length - 1)].movedim(0, 1)
    from_states = states[0].gather(2, (positions - begin + size).clamp(0, size - 1).unsqueeze(1).expand_as(from_inputs))
    return torch.where(in_sequence.unsqueeze(1), from_inputs, from_states).unsqueeze(0)


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    seq_idx: Tensor | None = ...,
    initial_states: Tensor | None = ...,
    return_final_states: Literal[False] = ...,
    final_states_out: None = ...,
    activation: Activation = ...,
    *,
    reset: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
) -> Tensor: ...
@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    seq_idx: Tensor | None = ...,
    initial_states: Tensor | None = ...,
    *,
    return_final_states: Literal[True],
    final_states_out: Tensor | None = ...,
    activation: Activation = ...,
    reset: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    seq_idx: Tensor | None = ...,
    initial_states: Tensor | None = ...,
    return_final_states: bool = ...,
    final_states_out: Tensor | None = ...,
    activation: Activation = ...,
    *,
    reset: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
@allow_in_graph
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: Activation = None,
    *,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution, ``y_t = act(bias + sum_j weight[:, width - 1 - j] x_{t-j})``, ``j < width``.

    The positional arguments are those of causal-conv1d's ``causal_conv1d_fn``. Derivatives are exact in every order and
    mode, by kernels. ``torch.func``, ``vmap`` (per-task parameters in one call) and ``torch.compile`` compose with it.
    The batch is task-major: with per-task parameters, row ``b`` belongs to task ``b // (batch / tasks)``.

    A row of ``y`` has the same bits in any batch and with any number of threads. Its parts with the states handed over,
    its single steps and its sequences alone have these bits, too.

    Args:
        x: ``(batch, dim, length)``, float32, float64, bfloat16 or float16; the input, of any strides, without
            a copy; adjacent channels or steps are the fastest.
        weight: ``(dim, width)`` or per task ``(tasks, dim, width)``, float32, bfloat16 or float16 (float64 for float64
            ``x``); the tap of the newest input last. Sums are in float32 (float64). Kernels take up to 4 taps; wider
            filters run the reference.
        bias: ``(dim,)`` or ``(tasks, dim)``, dtypes as of ``weight``.
        seq_idx: ``(batch, length)``, int32; a new sequence starts at each change, and the first one continues
            ``initial_states``.
        initial_states: ``(batch, dim, width - 1)``, or ``(sequences, dim, width - 1)`` with ``cu_seqlens``, dtype of
            ``x``; the inputs before the first step, the newest last, zeros by default.
        return_final_states: also return the inputs that ``initial_states`` of the next call takes.
        final_states_out: written with the final states and returned for them; of their shape and dtype.
        activation: ``"silu"``, its synonym ``"swish"``, or None.
        reset: ``(batch, length)``, bool; True starts an episode: inputs before it count as zeros.
        cu_seqlens: ``(sequences + 1,)``, int32; the boundaries of the sequences packed into the only row of ``x``, from
            0 to ``length``. Values are checked on a CPU; elsewhere invalid ones give undefined results.

    At most one of ``seq_idx``, ``reset`` and ``cu_seqlens`` may be given.

    Returns:
        ``y``: ``(batch, dim, length)``, dtype and strides of ``x``. With ``return_final_states`` also the final states,
        of the shape of ``initial_states``, dtype of ``x``: zeros where the last episode has fewer inputs.

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype.
        ValueError: an argument has the wrong shape, device or value, or excludes another.

    Source: Gu & Dao 2023, "Mamba", figure 3; the package causal-conv1d.

    >>> x, weight = torch.tensor([[[2.0, 4.0, 6.0]]]), torch.tensor([[0.5, 1.0]])
    >>> y, states = causal_conv1d(x, weight, return_final_states=True)
    >>> y, states
    (tensor([[[2., 5., 8.]]]), tensor([[[6.]]]))
    """
    if (
        seq_idx is None
        and cu_seqlens is None
        and return_final_states is False
        and final_states_out is None
        and (activation is None or activation == "silu")
        and _raw_conv_accepts(x, weight, bias, initial_states, reset)
    ):
        states = None if initial_states is None else initial_states.unsqueeze(1)
        try:
            y: Tensor = library.causal_conv1d(x, weight, bias, states, reset, None, activation is not None)
            return y
        except (ValueError, RuntimeError) as error:
            if not is_check_of_op(error, "causal_conv1d"):
                raise  # else the checks below raise an error that names the argument
    return _public_conv(
        "causal_conv1d",
        (x, weight, bias, seq_idx, initial_states, activation, reset, cu_seqlens),
        return_final_states,
        final_states_out,
    )


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: Activation = None,
    *,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run :func:`causal_conv1d` as a sum of shifted inputs: its specification.

    Arguments, results and errors are those of :func:`causal_conv1d`.

    >>> x, weight = torch.randn(1, 2, 5), torch.randn(2, 3)
    >>> torch.allclose(causal_conv1d_reference(x, weight), causal_conv1d(x, weight), atol=1e-6)
    True
    """
    return _public_conv(
        "causal_conv1d_reference",
        (x, weight, bias, seq_idx, initial_states, activation, reset, cu_seqlens),
        return_final_states,
        final_states_out,
        use_reference=True,
    )


def _public_conv(
    where: str,
    arguments: tuple[Any, ...],
    return_final_states: bool,
    final_states_out: Tensor | None,
    use_reference: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    x, options = check_arguments(where, *arguments)
    if final_states_out is not None:
        if not _check.flag(where, "return_final_states", return_final_states):
            raise ValueError(f"{where}: final_states_out must be None without return_final_states, got a tensor")
        size = x.weight.shape[-1] - 1
        rows = x.x.shape[0] if options.cu_seqlens is None else options.cu_seqlens.shape[1] - 1
        _check.tensor(where, "final_states_out", final_states_out)
        sizes = (rows, x.x.shape[1], size)
        _check.shape(where, "final_states_out", final_states_out, sizes, f"of the final states, {sizes}")
        _check.dtype(where, "final_states_out", final_states_out, (x.x.dtype,))
        _check.device(where, "final_states_out", final_states_out, x.x.device, "x")
    y = _conv(x, options, use_reference)
    if not _check.flag(where, "return_final_states", return_final_states):
        return y
    states = _final_states(x, options).squeeze(1 if options.cu_seqlens is None else 0)
    return y, states if final_states_out is None else final_states_out.copy_(states)


@allow_in_graph
def causal_conv1d_step(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation = None
) -> tuple[Tensor, Tensor]:
    """Compute one step of :func:`causal_conv1d`; differentiable, without in-place changes.

    The arguments are those of causal-conv1d's ``causal_conv1d_update``.

    Args:
        x: ``(batch, dim)``, float32, float64, bfloat16 or float16; the input.
        conv_state: ``(batch, dim, size)``, dtype of ``x``; the last inputs, the newest last. ``size`` is ``width - 1``
            or more; mamba_ssm keeps ``width``.
        weight: ``(dim, width)`` or ``(tasks, dim, width)``, as in :func:`causal_conv1d`.
        bias: ``(dim,)`` or ``(tasks, dim)``, as in :func:`causal_conv1d`.
        activation: ``"silu"``, its synonym ``"swish"``, or None.

    Returns:
        ``y``: ``(batch, dim)``, dtype of ``x``, and the next ``conv_state``, of the same shape.

    Raises:
        TypeError, ValueError: as :func:`causal_conv1d`.

    >>> weight, conv_state = torch.tensor([[0.5, 1.0]]), torch.tensor([[[2.0]]])
    >>> causal_conv1d_step(torch.tensor([[4.0]]), conv_state, weight)
    (tensor([[5.]]), tensor([[[4.]]]))
    """
    inputs, options = check_step_arguments("causal_conv1d_step", x, conv_state, weight, bias, activation)
    size = conv_state.shape[2]
    next_state = torch.cat([conv_state[..., 1:], x.unsqueeze(-1)], dim=-1)[..., :size]
    return _conv(inputs, options).squeeze(-1), next_state


def _raw_conv_accepts(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_states: Tensor | None, reset: Tensor | None
) -> bool:
    """Return whether the raw op may run on these arguments, whose shapes it checks itself.

    References and fake kernels check no shapes, so tensors that reach them are excluded.
    """
    if type(x) not in PLAIN or type(weight) not in PLAIN or transforms_active() or dispatch_mode_active():
        return False
    if not (x.is_cpu and _ON_CPU) and not (x.is_cuda and _ON_CUDA):
        return False
    device, records = x.device, torch.is_grad_enabled()
    full = torch.float32 if x.dtype in REDUCED_PRECISION else x.dtype
    for v, dtype in ((x, x.dtype), (weight, full), (bias, full), (initial_states, x.dtype), (reset, torch.bool)):
        if v is None:
            continue
        if type(v) not in PLAIN or v.dtype != dtype or v.device != device or v.layout is not torch.strided:
            return False
        if records and v.requires_grad:
            return False
    return (
        (initial_states is None or initial_states.dim() == 3)
        and (bias is None or bias.dim() == weight.dim() - 1)
        and weight.dim() > 0
        and weight.shape[-1] <= MAX_KERNEL_WIDTH
    )
