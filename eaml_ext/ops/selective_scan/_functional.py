"""The public functions: selective_scan, selective_scan_step, selective_scan_reference."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from eaml_ext import _check
from eaml_ext._torch_compat import dispatch_mode_active, has_kernel, is_check_of_op, transforms_active
from eaml_ext.ops._inference import PLAIN
from eaml_ext.ops._library import library
from eaml_ext.ops._typed import allow_in_graph
from eaml_ext.ops.fallback import warn_once
from eaml_ext.ops.selective_scan._autograd import can_skip_autograd, differentiable_scan
from eaml_ext.ops.selective_scan._reference import reference
from eaml_ext.ops.selective_scan._schema import (
    ARGUMENTS,
    FULL_PRECISION,
    MAX_CUDA_STATE_SIZE,
    REDUCED_PRECISION,
    REQUIRED,
    ScanInputs,
    ScanOptions,
)
from eaml_ext.ops.selective_scan._split_invariance import is_split_invariant
from eaml_ext.ops.selective_scan._validation import check_arguments, check_step_arguments, promote_under_autocast

_ON_CPU, _ON_CUDA = (has_kernel("eaml_ext::selective_scan", key) for key in ("CPU", "CUDA"))


def _raw_dtypes(dtype: torch.dtype) -> tuple[tuple[torch.dtype, ...], ...]:
    """The dtypes of :class:`ScanInputs` for ``u`` of this dtype, from which the raw op's follow by conversion alone."""
    if dtype in FULL_PRECISION:
        return (FULL_PRECISION[dtype],) * len(ARGUMENTS)
    return tuple((dtype,) if name in ("u", "delta", "B", "C", "z") else (torch.float32,) for name in ARGUMENTS)


_RAW_DTYPES = {dtype: _raw_dtypes(dtype) for dtype in (*FULL_PRECISION, *REDUCED_PRECISION)}


def _unpack_complex(matrix: Tensor) -> Tensor:
    """Return B or C of a complex A as complex numbers, whose components may be interleaved along time."""
    return matrix if matrix.is_complex() else torch.complex(matrix[..., ::2], matrix[..., 1::2])


def _exceeds_cuda_states(states: Tensor) -> bool:
    """Return whether a CUDA tensor, ``A`` or a state, has more states per channel than the CUDA kernels accept."""
    return states.is_cuda and states.shape[-1] * (2 if states.is_complex() else 1) > MAX_CUDA_STATE_SIZE


def _scan(x: ScanInputs, options: ScanOptions, use_reference: bool = False) -> tuple[Tensor, Tensor]:
    """Run the scan on checked arguments.

    Returns:
        ``y`` and the last state.
    """
    if x.u.dtype != torch.float64:
        # The ops accept u, delta and z in reduced precision, the other inputs in float32 or complex64.
        kept, full = ("u", "delta", "z"), (torch.float32, torch.complex64)
        pairs = zip(ARGUMENTS, x, strict=True)
        x = ScanInputs._make([v if v is None or name in kept or v.dtype in full else v.float() for name, v in pairs])
    if x.A.is_complex():
        x = x._replace(B=_unpack_complex(x.B), C=_unpack_complex(x.C))
    if not use_reference and _exceeds_cuda_states(x.A):
        warn_once(f"selective_scan of more than {MAX_CUDA_STATE_SIZE} states", x.u.device)
        use_reference = True
    if use_reference:
        y, last, _ = reference(x, options)
    elif can_skip_autograd(x):
        y, last, _ = library.selective_scan(*x, *options, False)
    else:
        y, last = differentiable_scan(x, options)
    return y, last


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    delta_bias: Tensor | None = ...,
    delta_softplus: bool = ...,
    return_last_state: Literal[False] = ...,
    *,
    initial_state: Tensor | None = ...,
    reset: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    seq_idx: Tensor | None = ...,
) -> Tensor: ...
@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    delta_bias: Tensor | None = ...,
    delta_softplus: bool = ...,
    *,
    return_last_state: Literal[True],
    initial_state: Tensor | None = ...,
    reset: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    seq_idx: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    delta_bias: Tensor | None = ...,
    delta_softplus: bool = ...,
    return_last_state: bool = ...,
    *,
    initial_state: Tensor | None = ...,
    reset: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    seq_idx: Tensor | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
@allow_in_graph
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan, ``h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t``, ``y_t = C_t . h_t + D u_t``, ``y_t *= silu(z_t)``.

    The positional arguments are those of mamba_ssm's ``selective_scan_fn``. Derivatives are exact to second order in
    every argument: reverse over reverse, forward over reverse, reverse over forward. Higher orders and forward over
    forward differentiate the slow reference, with one warning. ``torch.func``, ``vmap`` (per-task parameters in one
    call) and ``torch.compile`` compose with it. The batch is task-major: with per-task parameters, row ``b`` belongs to
    task ``b // (batch / tasks)``. Under ``torch.autocast``, ``u``, ``delta``, ``z`` and variable real ``B``, ``C`` of
    mixed dtypes are promoted to the widest of them.

    With a complex ``A`` (S4D), ``B``, ``C`` and ``initial_state`` are complex, the last state is complex, and ``y`` is
    real: ``y_t = 2 Re(C_t . h_t) + D u_t``. Gradients follow PyTorch's convention, dL/dRe + i dL/dIm.

    Sequences of any lengths may be packed into one row, without padding: ``cu_seqlens`` has their boundaries, and each
    has its own initial and last state. On a CPU the results of a sequence have the bits of a call with this sequence
    alone, and so have its gradients. ``seq_idx`` has resets in place of states.

    Args:
        u: ``(batch, dim, length)``, float32, float64, bfloat16 or float16; the input, of any strides. Channel-last
            memory is the fastest on a CPU.
        delta: ``(batch, dim, length)``, dtype of ``u``; the step size.
        A: ``(dim, dstate)`` or per task ``(tasks, dim, dstate)``, float32 or complex64 (float64 or complex128 for
            float64 ``u``).
        B: ``(batch, dstate, length)`` or ``(batch, groups, dstate, length)``, dtype of ``u``; or, the same at every
            step, ``(dim, dstate)``, dtype of ``A``. With a complex ``A`` all of them have its dtype. As in mamba_ssm,
            ``(batch, [groups,] dstate, 2 * length)``, dtype of ``u``, has real and imaginary parts interleaved.
        C: shapes and dtypes of ``B``.
        D: ``(dim,)`` or ``(tasks, dim)``, float32 (float64 for float64 ``u``); the skip weight.
        z: ``(batch, dim, length)``, dtype of ``u``; the gate.
        delta_bias: ``(dim,)`` or ``(tasks, dim)``, dtype of ``D``; added to ``delta``.
        delta_softplus: use ``softplus(delta + delta_bias)`` as the step size.
        return_last_state: also return ``h`` after the last step.
        initial_state: ``(batch, dim, dstate)``, dtype of ``A``; ``h`` before the first step, zero by default. With
            ``cu_seqlens`` ``(sequences, dim, dstate)``.
        reset: ``(batch, length)``, bool; True zeroes the state before a step, so that an episode starts there.
        cu_seqlens: ``(sequences + 1,)``, int32, on the device of ``u``, whose batch must be 1. Sequence ``i`` has the
            steps ``cu_seqlens[i]`` to ``cu_seqlens[i + 1] - 1``: the first value is 0, the last the length, none is
            smaller than that before it. These values are checked on a CPU; on a GPU, wrong ones give wrong results.
        seq_idx: ``(batch, length)``, integers, as in mamba_ssm; the state is zeroed before each step whose index
            differs from that of the step before.

    Returns:
        ``y``: ``(batch, dim, length)``, dtype and strides of ``u``. With ``return_last_state`` also the last state,
        ``(batch, dim, dstate)``, or ``(sequences, dim, dstate)`` with ``cu_seqlens``, dtype of ``A``; float32 where
        ``A`` is bfloat16 or float16. A sequence of length 0 returns its initial state.

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype.
        ValueError: an argument has the wrong shape or device; ``cu_seqlens`` has wrong values; ``seq_idx`` is given
            together with ``reset`` or ``cu_seqlens``.

    Source: Gu & Dao 2023, "Mamba", algorithm 2.

    >>> batch, dim, length, dstate = 2, 3, 5, 4
    >>> u, delta = torch.randn(batch, dim, length), torch.rand(batch, dim, length)
    >>> A = -torch.rand(dim, dstate)
    >>> B, C = torch.randn(batch, dstate, length), torch.randn(batch, dstate, length)
    >>> y, last = selective_scan(u, delta, A, B, C, return_last_state=True)
    >>> y.shape, last.shape
    (torch.Size([2, 3, 5]), torch.Size([2, 3, 4]))

    Two sequences, of two and three steps, in one row:

    >>> cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    >>> u, delta, B, C = u[:1], delta[:1], B[:1], C[:1]
    >>> y, last = selective_scan(u, delta, A, B, C, return_last_state=True, cu_seqlens=cu_seqlens)
    >>> y.shape, last.shape
    (torch.Size([1, 3, 5]), torch.Size([2, 3, 4]))
    """
    x = ScanInputs(u, delta, A, B, C, D, z, delta_bias, initial_state)
    plain = cu_seqlens is None and seq_idx is None and type(delta_softplus) is bool and type(return_last_state) is bool
    if plain and _raw_scan_accepts(x, reset):
        options = ScanOptions(reset, None, delta_softplus, B.dim() == 2, C.dim() == 2, is_split_invariant())
        if B.dtype in REDUCED_PRECISION:
            B, C = B.float(), C.float()
        try:
            y, last, _ = library.selective_scan(u, delta, A, B, C, D, z, delta_bias, initial_state, *options, False)
            return (y, last) if return_last_state else y
        except (ValueError, RuntimeError) as error:
            if not is_check_of_op(error, "selective_scan"):
                raise  # else the checks below raise an error that names the argument
    x = promote_under_autocast(x)
    options = check_arguments("selective_scan", x, delta_softplus, reset, cu_seqlens, seq_idx)
    _check.flag("selective_scan", "return_last_state", return_last_state)
    y, last = _scan(x, options)
    return (y, last) if return_last_state else y


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run :func:`selective_scan` as a loop over time, with derivatives of any order: its specification.

    Arguments, results and errors are those of :func:`selective_scan`.

    >>> u = torch.randn(1, 2, 3)
    >>> A, B = -torch.ones(2, 1), torch.ones(1, 1, 3)
    >>> torch.allclose(selective_scan_reference(u, u, A, B, B), selective_scan(u, u, A, B, B), atol=1e-6)
    True
    """
    x = promote_under_autocast(ScanInputs(u, delta, A, B, C, D, z, delta_bias, initial_state))
    options = check_arguments("selective_scan_reference", x, delta_softplus, reset, cu_seqlens, seq_idx)
    _check.flag("selective_scan_reference", "return_last_state", return_last_state)
    y, last = _scan(x, options, use_reference=True)
    return (y, last) if return_last_state else y


@allow_in_graph
def selective_scan_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute one step of :func:`selective_scan`; differentiable, without in-place changes.

    A matrix that is the same for all rows must be expanded: ``B.expand(batch, dim, dstate)`` for ``(dim, dstate)``.
    float32, bfloat16 and float16 may be mixed among ``u``, ``delta``, ``B``, ``C`` and ``z``, as in mamba_ssm's
    ``selective_state_update``. The step is then computed in float32.

    Args:
        state: ``(batch, dim, dstate)``, dtype of ``A``; ``h`` before the step.
        u: ``(batch, dim)``, float32, float64, bfloat16 or float16; the input.
        delta: ``(batch, dim)``, dtype of ``u``; the step size.
        A: ``(dim, dstate)`` or ``(tasks, dim, dstate)``, as in :func:`selective_scan`.
        B: ``(batch, dstate)`` or ``(batch, groups, dstate)``, dtype of ``u``; with a complex ``A`` complex, never
            interleaved.
        C: shapes and dtypes of ``B``.
        D: ``(dim,)`` or ``(tasks, dim)``, as in :func:`selective_scan`.
        z: ``(batch, dim)``, dtype of ``u``; the gate.
        delta_bias: ``(dim,)`` or ``(tasks, dim)``, dtype of ``D``; added to ``delta``.
        delta_softplus: use ``softplus(delta + delta_bias)`` as the step size.

    Returns:
        ``y``: ``(batch, dim)``, dtype of ``u``, and the next state, ``(batch, dim, dstate)``.

    Raises:
        TypeError, ValueError: as :func:`selective_scan`.

    >>> state, u, A, B = torch.zeros(1, 2, 3), torch.ones(1, 2), -torch.ones(2, 3), torch.ones(1, 3)
    >>> y, state = selective_scan_step(state, u, u, A, B, B)
    >>> y
    tensor([[3., 3.]])
    """
    arguments = (state, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    shape_error = None
    if _raw_step_accepts(arguments):
        if dispatch_mode_active():
            check_step_arguments(arguments)  # the fake kernel checks no shapes
        try:
            pair: tuple[Tensor, Tensor] = library.selective_scan_step(*arguments)
            return pair
        except (ValueError, RuntimeError) as error:
            if not is_check_of_op(error, "selective_scan"):
                raise
            shape_error = ValueError(str(error))
    x, options, dtype = check_step_arguments(arguments)  # raises an error that names the argument
    if shape_error is not None:
        raise shape_error
    y, last = _scan(x, options)
    return y.squeeze(-1).to(dtype), last


def _raw_scan_accepts(x: ScanInputs, reset: Tensor | None) -> bool:
    """Return whether the raw op may run on the arguments of a scan, whose shapes it checks itself.

    References and fake kernels check no shapes, so tensors that reach them are excluded: FakeTensorMode gives them
    plain tensors, too.
    """
    u = x.u
    if type(u) not in PLAIN or u.dtype not in _RAW_DTYPES or transforms_active() or dispatch_mode_active():
        return False
    if not (u.is_cpu and _ON_CPU) and not (u.is_cuda and _ON_CUDA):
        return False
    device, dense, records = u.device, torch.strided, torch.is_grad_enabled()
    for i, (v, dtypes) in enumerate(zip(x, _RAW_DTYPES[u.dtype], strict=True)):
        if v is None:
            if i < len(REQUIRED):
                return False
            continue
        if type(v) not in PLAIN or v.dtype not in dtypes or v.device != device or v.layout is not dense:
            return False
        if records and v.requires_grad:
            return False
    if reset is not None and (type(reset) is not Tensor or reset.layout is not dense or reset.device != device):
        return False
    # Real B and C of a complex A are interleaved.
    alike = x.A.dtype == x.B.dtype == x.C.dtype or u.dtype in REDUCED_PRECISION
    return alike and not _exceeds_cuda_states(x.A)


def _raw_step_accepts(arguments: Sequence[Any]) -> bool:
    """Return whether the raw op may run on the arguments of a step, whose shapes it checks itself."""
    *tensors, delta_softplus = arguments
    state, u = tensors[:2]
    if type(delta_softplus) is not bool or not isinstance(state, Tensor) or not isinstance(u, Tensor):
        return False
    device, dtypes, dense = state.device, FULL_PRECISION.get(u.dtype, ()), torch.strided
    for i, v in enumerate(tensors):
        if not isinstance(v, Tensor):
            if v is None and i > 5:  # D, z and delta_bias are optional
                continue
            return False
        if v.dtype not in dtypes or v.device != device or v.layout is not dense:
            return False
    return state.dim() == 3 and not _exceeds_cuda_states(state) and can_skip_autograd(tensors)
