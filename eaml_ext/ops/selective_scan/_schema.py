"""Arguments, dispatcher schemas, fake kernels and operation counts of the scan's ops.

Every op takes the fields of :class:`ScanInputs` and :class:`ScanOptions` as separate arguments. Gradients and tangents
come in the order of :class:`ScanInputs`. An op returns an empty tensor as the gradient of an absent argument.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from eaml_ext.ops._library import library
from eaml_ext.ops._typed import register_fake

CHUNK_SIZE = 32  # steps between two saved states; kChunk in csrc/selective_scan/params.h
MAX_CUDA_STATE_SIZE = 256  # states per channel that the CUDA kernels accept; a complex state counts twice

REDUCED_PRECISION = (torch.bfloat16, torch.float16)
# By dtype of u: the dtypes of A and the states, real and complex.
FULL_PRECISION = {dtype: (dtype, dtype.to_complex()) for dtype in (torch.float32, torch.float64)}


class ScanInputs(NamedTuple):
    """The differentiable arguments, with the shapes of :func:`selective_scan`."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor | None


class ScanOptions(NamedTuple):
    """The arguments without a gradient.

    Attributes:
        reset: as in :func:`selective_scan`.
        cu_seqlens: as in :func:`selective_scan`, but the batch may have several rows, all with these sequences. The
            states of sequence ``i`` of row ``b`` are row ``b * sequences + i`` of ``(batch * sequences, dim, dstate)``.
        delta_softplus: as in :func:`selective_scan`.
        B_invariant: whether B is the same at every step.
        C_invariant: whether C is the same at every step.
        split_invariant: whether CUDA kernels may not divide time into segments, see :func:`split_invariant`.
    """

    reset: Tensor | None
    cu_seqlens: Tensor | None
    delta_softplus: bool
    B_invariant: bool
    C_invariant: bool
    split_invariant: bool


ARGUMENTS = ScanInputs._fields
REQUIRED = ("u", "delta", "A", "B", "C")
NUM_INPUTS = len(ARGUMENTS)
NUM_OPTIONS = len(ScanOptions._fields)


def split_args(args: Sequence[Any], *sizes: int) -> list[Sequence[Any]]:
    """Split a flat argument list into groups of ``sizes``; the remaining arguments are the last group.

    >>> split_args((1, 2, 3, 4), 1, 2)
    [(1,), (2, 3), (4,)]
    """
    groups = []
    for size in sizes:
        groups.append(args[:size])
        args = args[size:]
    return [*groups, args]


# ---- schemas -----------------------------------------------------------------------------------------------------

_INPUTS = ", ".join(f"Tensor{'' if name in REQUIRED else '?'} {name}" for name in ARGUMENTS)
_TANGENTS = ", ".join(f"Tensor? {name}_tangent" for name in ARGUMENTS)
_OPTIONS = (
    "Tensor? reset, Tensor? cu_seqlens, bool delta_softplus, bool B_invariant, bool C_invariant, bool split_invariant"
)
_COTANGENTS = "Tensor grad_y, Tensor? grad_state"
_GRADIENTS = ", ".join(["Tensor"] * NUM_INPUTS)

# (y, last state, saved states); the saved states are empty without `save`.
torch.library.define("eaml_ext::selective_scan", f"({_INPUTS}, {_OPTIONS}, bool save) -> (Tensor, Tensor, Tensor)")
# (y, next state)
torch.library.define(
    "eaml_ext::selective_scan_step",
    "(Tensor state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus) -> (Tensor, Tensor)",
)
torch.library.define(
    "eaml_ext::selective_scan_backward", f"({_COTANGENTS}, {_INPUTS}, {_OPTIONS}, Tensor? saved) -> ({_GRADIENTS})"
)
# Tangents of (y, last state).
torch.library.define("eaml_ext::selective_scan_jvp", f"({_INPUTS}, {_TANGENTS}, {_OPTIONS}) -> (Tensor, Tensor)")
# Tangents of (y, last state), empty without `outputs`, then tangents of the gradients.
torch.library.define(
    "eaml_ext::selective_scan_backward_jvp",
    f"({_COTANGENTS}, Tensor? grad_y_tangent, Tensor? grad_state_tangent, "
    f"{_INPUTS}, {_TANGENTS}, {_OPTIONS}, bool outputs) -> (Tensor, Tensor, {_GRADIENTS})",
)

# ---- shapes of results, for torch.compile, torch.export and FakeTensor -------------------------------------------


def empty_gradients(x: ScanInputs) -> tuple[Tensor, ...]:
    """Allocate gradients; those of u, delta and z have the strides of their argument."""
    sequences = ("u", "delta", "z")
    return tuple(
        (x.u if name == "z" else x.A).new_empty(0)
        if v is None
        else torch.empty_like(v)
        if name in sequences
        else v.new_empty(v.shape)
        for name, v in zip(ARGUMENTS, x, strict=True)
    )


def saved_size(x: ScanInputs, options: ScanOptions) -> Any:
    """Return the elements that the ``(saved_chunks, dstate, dim)`` saved states of a row take, an int or a SymInt.

    ``saved_chunks`` is that of csrc/selective_scan/op_common.h: a state for each chunk but the first. The saved states
    of a row have one dimension and are never empty (with one chunk, one state of zeros). Sizes 0 and 1 would make
    torch.compile specialise on them.
    """
    length = x.u.shape[2]
    chunks = (length if options.cu_seqlens is not None else length - 1) // CHUNK_SIZE
    return torch.sym_max(chunks, 1) * x.A.shape[-1] * x.u.shape[1]


def state_shape(x: ScanInputs, options: ScanOptions) -> tuple[Any, ...]:
    """Return the shape of the initial and last states: one row per batch row, or per sequence of each."""
    rows, dim, _ = x.u.shape
    sequences = 1 if options.cu_seqlens is None else options.cu_seqlens.shape[0] - 1
    return rows * sequences, dim, x.A.shape[-1]


@register_fake("eaml_ext::selective_scan")
def _scan_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, flat_options, (save,) = split_args(args, NUM_INPUTS, NUM_OPTIONS)
    x, options = ScanInputs(*inputs), ScanOptions(*flat_options)
    saved = x.A.new_empty(x.u.shape[0], saved_size(x, options)) if save else x.A.new_empty(0)
    return torch.empty_like(x.u), x.A.new_empty(state_shape(x, options)), saved


@register_fake("eaml_ext::selective_scan_step")
def _step_fake(state: Tensor, u: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), state.new_empty(state.shape)


@register_fake("eaml_ext::selective_scan_backward")
def _backward_fake(grad_y: Tensor, grad_state: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    return empty_gradients(ScanInputs(*args[:NUM_INPUTS]))


@register_fake("eaml_ext::selective_scan_jvp")
def _jvp_fake(*args: Any) -> tuple[Tensor, Tensor]:
    inputs, _, flat_options = split_args(args, NUM_INPUTS, NUM_INPUTS)
    x, options = ScanInputs(*inputs), ScanOptions(*flat_options)
    return torch.empty_like(x.u), x.A.new_empty(state_shape(x, options))


@register_fake("eaml_ext::selective_scan_backward_jvp")
def _backward_jvp_fake(
    grad_y: Tensor,
    grad_state: Tensor | None,
    grad_y_tangent: Tensor | None,
    grad_state_tangent: Tensor | None,
    *args: Any,
) -> tuple[Tensor, ...]:
    inputs, _, (*flat_options, outputs) = split_args(args, NUM_INPUTS, NUM_INPUTS)
    x, options = ScanInputs(*inputs), ScanOptions(*flat_options)
    last = x.A.new_empty(state_shape(x, options) if outputs else 0)
    outs = torch.empty_like(x.u) if outputs else x.u.new_empty(0), last
    return (*outs, *empty_gradients(x))


# ---- operation counts for torch.utils.flop_counter ---------------------------------------------------------------


def _count_flops(name: str, u_index: int, real: int, complex: int) -> None:
    """Register the operations that a kernel does for one state of one channel at one step.

    An exponential, a sine and a cosine count as one operation each. On dual numbers a sum counts as two and a product
    as four. Operations without a state (step size, skip, gate) are not counted.
    """

    @register_flop_formula(getattr(library, name), get_raw=True)
    def formula(*args: Any, **_: Any) -> int:
        x = ScanInputs(*args[u_index : u_index + NUM_INPUTS])
        return int((complex if x.A.is_complex() else real) * x.u.numel() * x.A.shape[-1])


_count_flops("selective_scan", 0, 7, 21)  # dt A, exp, a h, x B, + and C h, +
# a and h are recomputed; then step_backward of csrc/selective_scan/recurrence.h and the sums.
_count_flops("selective_scan_backward", 2, 19, 53)
_count_flops("selective_scan_jvp", 0, 22, 63)
# The jvp; a and h recomputed; step_backward and the sums.
_count_flops("selective_scan_backward_jvp", 4, 79, 220)
