"""Checks of the public functions' arguments."""

from typing import Any

import torch
from torch import Tensor

from eaml_ext import _check
from eaml_ext.ops._packing import check_cu_seqlens, reset_from_seq_idx
from eaml_ext.ops.causal_conv1d._schema import REDUCED_PRECISION, ConvInputs, ConvOptions

_DTYPES = (torch.float32, torch.float64, *REDUCED_PRECISION)


def _opmath(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_activation(where: str, activation: Any) -> bool:
    """Return whether ``activation`` is silu, which has two names; None is no activation."""
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"{where}: activation must be None, 'silu' or 'swish', got {activation!r}")
    return activation is not None


def check_parameters(where: str, x: Tensor, weight: Any, bias: Any) -> tuple[Tensor, Tensor | None]:
    """Check weight and bias for ``x``, ``(batch, dim, *)``.

    Returns:
        Weight and bias in the opmath type, either both per task or both shared.

    Raises:
        TypeError: one is not a tensor or has the wrong dtype.
        ValueError: one has the wrong shape or device.
    """
    batch, dim = x.shape[:2]
    _check.tensor(where, "weight", weight)
    if weight.dim() not in (2, 3) or weight.shape[-2] != dim or weight.shape[-1] == 0:
        raise ValueError(
            f"{where}: weight must have shape (dim, width) or (tasks, dim, width) with dim = {dim}, "
            f"got {tuple(weight.shape)}"
        )
    opmath = _opmath(x.dtype)
    named = {"weight": weight}
    if bias is not None:
        _check.tensor(where, "bias", bias)
        if bias.dim() not in (1, 2) or bias.shape[-1] != dim:
            raise ValueError(
                f"{where}: bias must have shape (dim,) or (tasks, dim) with dim = {dim}, got {tuple(bias.shape)}"
            )
        named["bias"] = bias
    tasks = {name: v.shape[0] for name, v in named.items() if v.dim() == (3 if name == "weight" else 2)}
    for name, number in tasks.items():
        if number == 0 or batch % number:
            raise ValueError(f"{where}: {name} has {number} tasks, which do not divide the batch of {batch}")
    if len(set(tasks.values())) > 1:
        raise ValueError(f"{where}: bias has {tasks['bias']} tasks, weight has {tasks['weight']}")
    wanted = (opmath,) if x.dtype == torch.float64 else (opmath, *REDUCED_PRECISION)
    for name, v in named.items():
        _check.dtype(where, name, v, wanted, f"{opmath} for x of {x.dtype}".replace("torch.", ""))
        _check.device(where, name, v, x.device, "x")
    weight = weight.to(opmath)
    bias = None if bias is None else bias.to(opmath)
    if tasks:
        (number,) = set(tasks.values())
        weight = weight.expand(number, *weight.shape[-2:])
        bias = None if bias is None else bias.expand(number, dim)
    return weight, bias


def check_arguments(
    where: str,
    x: Any,
    weight: Any,
    bias: Any,
    seq_idx: Any,
    initial_states: Any,
    activation: Any,
    reset: Any,
    cu_seqlens: Any,
) -> tuple[ConvInputs, ConvOptions]:
    """Check the arguments of a convolution and return those of the op.

    Args:
        where: the public function, which starts every message.

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype.
        ValueError: an argument has the wrong shape, device or value, or excludes another.
    """
    _check.tensor(where, "x", x)
    assert isinstance(x, Tensor)
    if x.dim() != 3:
        raise ValueError(f"{where}: x must have shape (batch, dim, length), got {tuple(x.shape)}")
    _check.dtype(where, "x", x, _DTYPES)
    weight, bias = check_parameters(where, x, weight, bias)
    batch, dim, length = x.shape
    silu = check_activation(where, activation)

    boundaries = {"reset": reset, "seq_idx": seq_idx, "cu_seqlens": cu_seqlens}
    given = [name for name, v in boundaries.items() if v is not None]
    if len(given) > 1:
        raise ValueError(
            f"{where}: {given[1]} must be None beside {given[0]}, got {type(boundaries[given[1]]).__name__}"
        )
    for name, v, dtype in (("reset", reset, torch.bool), ("seq_idx", seq_idx, torch.int32)):
        if v is not None:
            _check.tensor(where, name, v)
            _check.shape(where, name, v, (batch, length), f"(batch, length) = {(batch, length)}")
            _check.dtype(where, name, v, (dtype,))
            _check.device(where, name, v, x.device, "x")
    if seq_idx is not None:
        reset = reset_from_seq_idx(seq_idx)
    states_text, rows = "(batch, dim, width - 1)", batch
    if cu_seqlens is not None:
        cu_seqlens = check_cu_seqlens(where, cu_seqlens, batch, length)
        _check.device(where, "cu_seqlens", cu_seqlens, x.device, "x")
        states_text, rows = "(sequences, dim, width - 1)", cu_seqlens.shape[0] - 1
        cu_seqlens = cu_seqlens.unsqueeze(0)
    if initial_states is not None:
        sizes = (rows, dim, weight.shape[-1] - 1)
        _check.tensor(where, "initial_states", initial_states)
        _check.shape(where, "initial_states", initial_states, sizes, f"{states_text} = {sizes}")
        _check.dtype(where, "initial_states", initial_states, (x.dtype,), f"{x.dtype}".replace("torch.", ""))
        _check.device(where, "initial_states", initial_states, x.device, "x")
        initial_states = initial_states.unsqueeze(1 if cu_seqlens is None else 0)
    return ConvInputs(x, weight, bias, initial_states), ConvOptions(reset, cu_seqlens, silu)


def check_step_arguments(
    where: str, x: Any, conv_state: Any, weight: Any, bias: Any, activation: Any
) -> tuple[ConvInputs, ConvOptions]:
    """Check the arguments of a step and return those of the convolution of length 1.

    Raises:
        TypeError, ValueError: as :func:`check_arguments`.
    """
    _check.tensor(where, "x", x)
    assert isinstance(x, Tensor)
    if x.dim() != 2:
        raise ValueError(f"{where}: x must have shape (batch, dim), got {tuple(x.shape)}")
    _check.dtype(where, "x", x, _DTYPES)
    weight, bias = check_parameters(where, x, weight, bias)
    _check.tensor(where, "conv_state", conv_state)
    width = weight.shape[-1]
    if conv_state.dim() != 3 or conv_state.shape[:2] != x.shape or conv_state.shape[2] < width - 1:
        raise ValueError(
            f"{where}: conv_state must have shape (batch, dim, {width - 1} or more) with "
            f"(batch, dim) = {tuple(x.shape)}, got {tuple(conv_state.shape)}"
        )
    _check.dtype(where, "conv_state", conv_state, (x.dtype,), f"{x.dtype}".replace("torch.", ""))
    _check.device(where, "conv_state", conv_state, x.device, "x")
    states = conv_state[..., conv_state.shape[2] - (width - 1) :].unsqueeze(1)
    silu = check_activation(where, activation)
    return ConvInputs(x.unsqueeze(-1), weight, bias, states), ConvOptions(None, None, silu)
