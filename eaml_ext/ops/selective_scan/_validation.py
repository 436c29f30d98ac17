"""Checks of the public functions' arguments, and the promotion of mixed dtypes."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eaml_ext import _check
from eaml_ext._torch_compat import is_any_autocast_enabled
from eaml_ext.ops._packing import check_cu_seqlens, reset_from_seq_idx
from eaml_ext.ops.selective_scan._schema import (
    ARGUMENTS,
    FULL_PRECISION,
    REDUCED_PRECISION,
    REQUIRED,
    ScanInputs,
    ScanOptions,
    state_shape,
)
from eaml_ext.ops.selective_scan._split_invariance import is_split_invariant

_DTYPES = (*FULL_PRECISION, *REDUCED_PRECISION)
_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def check_arguments(
    where: str,
    x: ScanInputs,
    delta_softplus: Any,
    reset: Any = None,
    cu_seqlens: Any = None,
    seq_idx: Any = None,
    state_name: str = "initial_state",
) -> ScanOptions:
    """Check the arguments of a scan.

    Args:
        where: the public function, which starts every message.
        x: the inputs, of any type.
        delta_softplus: must be a bool.
        reset: None or a tensor, ``(batch, length)``, bool.
        cu_seqlens: None or a tensor, ``(sequences + 1,)``, int32.
        seq_idx: None or a tensor, ``(batch, length)``, of integers; becomes the reset of the options.
        state_name: the public function's name of ``initial_state``.

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype.
        ValueError: an argument has the wrong shape or device.
    """
    names = (*ARGUMENTS[:-1], state_name)
    for name, value in zip(names, x, strict=True):
        if value is None and name not in REQUIRED:
            continue
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            _check.tensor(where, name, value)
    softplus = _check.flag(where, "delta_softplus", delta_softplus)
    u, delta, A, B, C, D, z, delta_bias, initial_state = x
    complex_A = A.is_complex()
    if complex_A and torch.onnx.is_in_onnx_export():
        raise ValueError(f"{where}: A must be real in an export to ONNX, got {A.dtype}".replace("torch.", ""))
    if u.dim() != 3:
        raise ValueError(f"{where}: u must have shape (batch, dim, length), got {tuple(u.shape)}")
    if A.dim() not in (2, 3):
        raise ValueError(f"{where}: A must have shape (dim, dstate) or (tasks, dim, dstate), got {tuple(A.shape)}")
    batch, dim, length = u.shape
    dstate = A.shape[-1]

    def check_parameter(name: str, value: Tensor, sizes: tuple[int, ...], text: str) -> None:
        shape, rank = value.shape, len(sizes)
        if value.dim() not in (rank, rank + 1) or shape[-rank:] != sizes:
            # A parameter that fits the last axis of u is probably right, and u is channel-last; a step has length 1.
            is_channel_last = shape[-rank:] == (length, *sizes[1:]) and length > 1
            axes = f", and u has (batch, dim, length) = {tuple(u.shape)}" if is_channel_last else ""
            text = f"{text} = {sizes}, alone or per task, got {tuple(shape)}{axes}"
            raise ValueError(f"{where}: {name} must have shape {text}")
        if value.dim() > rank and (shape[0] == 0 or batch % shape[0]):
            raise ValueError(f"{where}: {name} has {shape[0]} tasks, which do not divide the batch of {batch}")

    def is_packed(value: Tensor) -> bool:
        return complex_A and value.is_floating_point() and value.shape[-1] == 2 * length

    def check_variable(name: str, value: Tensor) -> None:
        shape = value.shape
        if value.dim() not in (3, 4):
            raise ValueError(
                f"{where}: {name} must have shape (batch, dstate, length), (batch, groups, dstate, length) "
                f"or (dim, dstate), got {tuple(shape)}"
            )
        if shape[0] != batch:
            raise ValueError(f"{where}: {name} has batch {shape[0]}, u has batch {batch}")
        if shape[-2] != dstate:
            raise ValueError(f"{where}: {name} has {shape[-2]} states, A has {dstate}")
        if shape[-1] != length and not is_packed(value):
            raise ValueError(f"{where}: {name} has length {shape[-1]}, u has length {length}")
        if value.dim() == 4 and (shape[1] == 0 or dim % shape[1]):
            raise ValueError(f"{where}: {name} has {shape[1]} groups, which do not divide the {dim} channels of u")

    check_parameter("A", A, (dim, dstate), "(dim, dstate)")
    if delta.shape != u.shape:
        _check.shape(where, "delta", delta, u.shape, f"of u, {tuple(u.shape)}")
    reset, cu_seqlens = _check_sequences(where, u, reset, cu_seqlens, seq_idx)
    options = ScanOptions(reset, cu_seqlens, softplus, B.dim() == 2, C.dim() == 2, is_split_invariant())
    for name, value, invariant in (("B", B, options.B_invariant), ("C", C, options.C_invariant)):
        check_parameter(name, value, (dim, dstate), "(dim, dstate)") if invariant else check_variable(name, value)
    groups = [v.shape[1] if v.dim() == 4 else 1 for v in (B, C) if v.dim() > 2]
    if len(set(groups)) > 1:
        raise ValueError(f"{where}: C has {groups[1]} groups, B has {groups[0]}")
    if D is not None:
        check_parameter("D", D, (dim,), "(dim,)")
    if delta_bias is not None:
        check_parameter("delta_bias", delta_bias, (dim,), "(dim,)")
    if z is not None and z.shape != u.shape:
        _check.shape(where, "z", z, u.shape, f"of u, {tuple(u.shape)}")
    if initial_state is not None:
        sizes, rows = state_shape(x, options), "batch" if cu_seqlens is None else "sequences"
        if initial_state.shape != sizes:
            _check.shape(where, state_name, initial_state, sizes, f"({rows}, dim, dstate) = {sizes}")

    _check.dtype(where, "u", u, _DTYPES)
    opmath = torch.float32 if u.dtype in REDUCED_PRECISION else u.dtype
    # Variable B and C that are real or packed have the dtype of u.
    like_u = {name for name, value in (("B", B), ("C", C)) if value.dim() > 2 and (is_packed(value) or not complex_A)}
    one_dtype, device = None if complex_A else opmath, u.device  # ``opmath`` is right for every argument of a real scan
    for name, value in zip(names[1:], x[1:], strict=True):
        if value is None or (value.dtype == one_dtype == u.dtype and value.device == device):
            continue
        if name in ("delta", "z") or name in like_u:
            wanted: tuple[torch.dtype, ...] = (u.dtype,)
        elif complex_A and name in ("A", "B", "C", state_name):
            wanted = (opmath.to_complex(),)
        else:
            wanted = (opmath, *REDUCED_PRECISION) if u.dtype != torch.float64 else (opmath,)
        if value.dtype not in wanted:
            kind = f" and {'complex' if complex_A else 'real'} A" * (name in ("B", "C", state_name))
            _check.dtype(where, name, value, wanted[:1], f"{wanted[0]} for u of {u.dtype}{kind}".replace("torch.", ""))
        if value.device != u.device:
            _check.device(where, name, value, u.device, "u")
    return options


def _check_sequences(
    where: str, u: Tensor, reset: Any, cu_seqlens: Any, seq_idx: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Check the arguments that divide rows into sequences; return ``reset`` and ``cu_seqlens`` of the op."""
    batch, _, length = u.shape
    if seq_idx is not None and (reset is not None or cu_seqlens is not None):
        other = "reset" if reset is not None else "cu_seqlens"
        raise ValueError(f"{where}: seq_idx and {other} both say where sequences start, give one of them")
    for name, value, dtypes in (("reset", reset, (torch.bool,)), ("seq_idx", seq_idx, _INTEGERS)):
        if value is None:
            continue
        _check.tensor(where, name, value)
        _check.shape(where, name, value, (batch, length), f"(batch, length) = {(batch, length)}")
        _check.dtype(where, name, value, dtypes)
        _check.device(where, name, value, u.device, "u")
    if seq_idx is not None:
        reset = reset_from_seq_idx(seq_idx)
    if cu_seqlens is not None:
        cu_seqlens = check_cu_seqlens(where, cu_seqlens, batch, length).contiguous()
        _check.device(where, "cu_seqlens", cu_seqlens, u.device, "u")
    return reset, cu_seqlens


def one_step_inputs(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> ScanInputs:
    """Return the inputs of the scan of length 1 that equals a step."""
    gate = None if z is None else z.unsqueeze(-1)
    return ScanInputs(
        u.unsqueeze(-1), delta.unsqueeze(-1), A, B.unsqueeze(-1), C.unsqueeze(-1), D, gate, delta_bias, state
    )


def check_step_arguments(arguments: Sequence[Any]) -> tuple[ScanInputs, ScanOptions, torch.dtype]:
    """Check the arguments of ``selective_scan_step``, given in its order.

    Returns:
        The inputs and options of a scan of length 1, and the dtype of ``y``.

    Raises:
        TypeError, ValueError: as :func:`check_arguments`.
    """
    where = "selective_scan_step"
    state, u, delta, _, B, C, _, z, _, delta_softplus = arguments
    for name, value, ranks, text in (
        ("u", u, (2,), "(batch, dim)"),
        ("delta", delta, (2,), "(batch, dim)"),
        ("B", B, (2, 3), "(batch, dstate) or (batch, groups, dstate)"),
        ("C", C, (2, 3), "(batch, dstate) or (batch, groups, dstate)"),
        ("z", z, (2,), "(batch, dim)"),
    ):
        if value is None and name == "z":
            continue
        _check.tensor(where, name, value)
        if value.dim() not in ranks:
            raise ValueError(f"{where}: {name} must have shape {text}, got {tuple(value.shape)}")
    _check.tensor(where, "state", state)
    x = promote_under_autocast(one_step_inputs(*arguments[:-1]))
    dtype, x = x.u.dtype, promote_sequences(x)
    return x, check_arguments(where, x, delta_softplus, state_name="state"), dtype


def promote_under_autocast(x: ScanInputs) -> ScanInputs:
    """Under torch.autocast, promote real sequences of mixed dtypes, as torch's own ops do."""
    if not is_any_autocast_enabled() or not isinstance(x.u, Tensor):
        return x
    device = x.u.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return promote_sequences(x) if enabled else x


def promote_sequences(x: ScanInputs) -> ScanInputs:
    """Promote real sequences of mixed dtypes to the widest of them; with float64 among them, return ``x``."""
    names = ("u", "delta", "B", "C", "z")
    sequences = {
        name: v
        for name, v in zip(ARGUMENTS, x, strict=True)
        if name in names and isinstance(v, Tensor) and v.dim() > 2 and not v.is_complex()
    }
    dtypes = {v.dtype for v in sequences.values()}
    if len(dtypes) < 2 or not dtypes <= {torch.float32, *REDUCED_PRECISION}:
        return x
    widest = functools.reduce(torch.promote_types, dtypes)
    return x._replace(**{name: v.to(widest) for name, v in sequences.items()})
