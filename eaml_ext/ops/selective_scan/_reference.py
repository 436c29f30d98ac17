"""The scan as a loop over time: the specification, and the kernel of every op where no compiled one is registered."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eaml_ext._torch_compat import autograd_in_kernel
from eaml_ext.ops.fallback import reference_of
from eaml_ext.ops.selective_scan._schema import (
    CHUNK_SIZE,
    NUM_INPUTS,
    NUM_OPTIONS,
    REDUCED_PRECISION,
    ScanInputs,
    ScanOptions,
    empty_gradients,
    saved_size,
    split_args,
    state_shape,
)
from eaml_ext.ops.selective_scan._validation import check_step_arguments

OptionalTensors = Sequence[Tensor | None]


def _per_row(parameter: Tensor, rank: int, batch: int) -> Tensor:
    """Repeat a parameter ``(tasks, *)`` for the rows of each task, ``(batch, *)``; return a shared one as it is."""
    if parameter.dim() == rank:
        return parameter
    return parameter.repeat_interleave(batch // parameter.shape[0], dim=0)


def _matrix_at(matrix: Tensor, invariant: bool, batch: int, dim: int) -> Callable[[int], Tensor]:
    """Return B or C as a function of the step, broadcastable to ``(batch, dim, dstate)``."""
    if invariant:
        fixed = _per_row(matrix, 2, batch)
        return lambda t: fixed
    if matrix.dim() == 3:
        return lambda t: matrix[..., t].unsqueeze(1)
    repeats = dim // matrix.shape[1]
    return lambda t: matrix[..., t].repeat_interleave(repeats, dim=1)


def reference(x: ScanInputs, options: ScanOptions) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Run the formula one step at a time, and packed sequences one by one.

    Returns:
        ``y``, the last state, and the states at the start of every chunk but the first. If a packed sequence starts
        at step ``c``, its states begin at entry ``c // CHUNK_SIZE``. Entries that belong to no chunk are zeros.
    """
    cu_seqlens = options.cu_seqlens
    if cu_seqlens is None:
        return _scan_steps(x, options)
    batch, dim, length = x.u.shape
    zeros = x.A.new_zeros(batch, dim, x.A.shape[-1])
    saved = [zeros] * (length // CHUNK_SIZE)
    ys, states = [x.u[..., :0]], []
    for i, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        sequence = _steps_of(x, options, start, stop)
        if x.initial_state is not None:
            sequence = sequence._replace(initial_state=x.initial_state[i :: len(cu_seqlens) - 1])
        reset = None if options.reset is None else options.reset[:, start:stop]
        y, last, checkpoints = _scan_steps(sequence, options._replace(reset=reset))
        ys.append(y)
        states.append(last)
        first = start // CHUNK_SIZE
        saved[first : first + len(checkpoints)] = checkpoints
    last = torch.stack(states, dim=1).flatten(0, 1) if states else zeros[:0]
    return torch.cat(ys, dim=-1), last, saved


def _steps_of(x: ScanInputs, options: ScanOptions, start: int, stop: int) -> ScanInputs:
    """Return the inputs of the steps from ``start`` to ``stop - 1``."""
    invariant = {"B": options.B_invariant, "C": options.C_invariant}
    names = ("u", "delta", "z", *(name for name in invariant if not invariant[name]))
    return x._replace(**{n: v[..., start:stop] for n, v in x._asdict().items() if n in names and v is not None})


def _scan_steps(x: ScanInputs, options: ScanOptions) -> tuple[Tensor, Tensor, list[Tensor]]:
    """As :func:`reference`, of rows that are one sequence each."""
    u, delta, A, B, C, D, z, delta_bias, initial_state = x
    batch, dim, length = u.shape
    dtype = u.dtype
    if dtype in REDUCED_PRECISION:
        u, delta, z = u.float(), delta.float(), None if z is None else z.float()
    dt = delta if delta_bias is None else delta + _per_row(delta_bias, 1, batch).unsqueeze(-1)
    if options.delta_softplus:
        dt = -F.logsigmoid(-dt)  # softplus without torch's linear branch above 20
    A = _per_row(A, 2, batch)
    B_at, C_at = _matrix_at(B, options.B_invariant, batch, dim), _matrix_at(C, options.C_invariant, batch, dim)
    h = A.new_zeros(batch, dim, A.shape[-1]) if initial_state is None else initial_state
    dt_u = dt * u
    ys, saved = [], []
    for t in range(length):
        if t and t % CHUNK_SIZE == 0:
            saved.append(h)
        if options.reset is not None:
            h = torch.where(options.reset[:, t, None, None], torch.zeros_like(h), h)
        h = torch.exp(dt[..., t, None] * A) * h + dt_u[..., t, None] * B_at(t)
        ys.append((h * C_at(t)).sum(-1))
    y = torch.stack(ys, dim=-1) if ys else torch.zeros_like(u)
    if y.is_complex():
        y = 2 * y.real
    if D is not None:
        y = y + u * _per_row(D, 1, batch).unsqueeze(-1)
    if z is not None:
        y = y * F.silu(z)
    return y.to(dtype), h, saved


# ---- derivatives of the reference --------------------------------------------------------------------------------


def _as_function(x: ScanInputs, options: ScanOptions) -> tuple[Callable[..., tuple[Tensor, Tensor]], list[Tensor]]:
    """Return (y, last state) as a function of the present tensors alone, and these tensors."""
    present = [i for i, value in enumerate(x) if value is not None]

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        full: list[Any] = [None] * NUM_INPUTS
        for i, tensor in zip(present, tensors, strict=True):
            full[i] = tensor
        y, last, _ = reference(ScanInputs(*full), options)
        return y, last

    return function, [value for value in x if value is not None]


def expand_none(present: Sequence[Tensor], x: ScanInputs) -> tuple[Tensor, ...]:
    """Expand gradients of the present arguments to all arguments, with an empty tensor for an absent one."""
    grads = iter(present)
    return tuple(to if v is None else to.copy_(next(grads)) for to, v in zip(empty_gradients(x), x, strict=True))


def fill_zeros(tangents: OptionalTensors, values: OptionalTensors) -> tuple[Tensor, ...]:
    """Return the tangents of the present values, zeros in place of None."""
    pairs = zip(tangents, values, strict=True)
    return tuple(torch.zeros_like(v) if t is None else t for t, v in pairs if v is not None)


def _leaves(values: Sequence[Tensor]) -> list[Tensor]:
    return [v.detach().requires_grad_() for v in values]


def vjp(
    outs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], create_graph: bool = False
) -> tuple[Tensor, ...]:
    """J^T g, zeros where no output depends on an input, as with length 0."""
    pairs = [(out, g) for out, g in zip(outs, cotangents, strict=True) if out.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(x) for x in inputs)
    outs, cotangents = zip(*pairs, strict=True)
    return torch.autograd.grad(
        outs,
        inputs,
        cotangents,
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )


# ---- kernels of the ops ------------------------------------------------------------------------------------------


@torch.library.impl("eaml_ext::selective_scan", "CompositeExplicitAutograd")
@reference_of("selective_scan")
def _scan_kernel(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, flat_options, (save,) = split_args(args, NUM_INPUTS, NUM_OPTIONS)
    x, options = ScanInputs(*inputs), ScanOptions(*flat_options)
    y, last, saved = reference(x, options)
    y = torch.empty_like(x.u).copy_(y)
    last = last.clone(memory_format=torch.contiguous_format)
    if not save:
        return y, last, x.A.new_empty(0)
    batch, dim, _ = x.u.shape
    states = torch.stack(saved or [x.A.new_zeros(batch, dim, x.A.shape[-1])], dim=1)
    return y, last, states.transpose(2, 3).reshape(batch, saved_size(x, options))


@torch.library.impl("eaml_ext::selective_scan_step", "CompositeExplicitAutograd")
@reference_of("selective_scan")
def _step_kernel(*args: Any) -> tuple[Tensor, Tensor]:
    x, options, _ = check_step_arguments(args)
    y, last, _ = reference(x, options)
    return y.squeeze(-1).contiguous(), last.contiguous()


@torch.library.impl("eaml_ext::selective_scan_backward", "CompositeExplicitAutograd")
@reference_of("selective_scan")
def _backward_kernel(grad_y: Tensor, grad_state: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    x, options = ScanInputs(*args[:NUM_INPUTS]), ScanOptions(*args[NUM_INPUTS:-1])
    function, present = _as_function(x, options)
    with autograd_in_kernel():
        leaves = _leaves(present)
        y, last = function(*leaves)
        grads = vjp((y, last), leaves, (grad_y, torch.zeros_like(last) if grad_state is None else grad_state))
    return expand_none(grads, x)


@torch.library.impl("eaml_ext::selective_scan_jvp", "CompositeExplicitAutograd")
@reference_of("selective_scan")
def _jvp_kernel(*args: Any) -> tuple[Tensor, Tensor]:
    inputs, tangents, options = split_args(args, NUM_INPUTS, NUM_INPUTS)
    x = ScanInputs(*inputs)
    function, present = _as_function(x, ScanOptions(*options))
    with autograd_in_kernel():
        leaves = _leaves(present)
        outs = function(*leaves)
        g = _leaves([torch.zeros_like(out) for out in outs])
        # J v is the gradient in g of <v, J^T g>. Reverse mode alone is used, because forward-mode levels do not nest.
        y, last = vjp(vjp(outs, leaves, g, create_graph=True), g, fill_zeros(tangents, x))
    return torch.empty_like(x.u).copy_(y), last.clone(memory_format=torch.contiguous_format)


@torch.library.impl("eaml_ext::selective_scan_backward_jvp", "CompositeExplicitAutograd")
@reference_of("selective_scan")
def _backward_jvp_kernel(
    grad_y: Tensor,
    grad_state: Tensor | None,
    grad_y_tangent: Tensor | None,
    grad_state_tangent: Tensor | None,
    *args: Any,
) -> tuple[Tensor, ...]:
    inputs, tangents, (*flat_options, outputs) = split_args(args, NUM_INPUTS, NUM_INPUTS)
    x, options = ScanInputs(*inputs), ScanOptions(*flat_options)
    function, present = _as_function(x, options)
    if grad_state is None:
        grad_state = x.A.new_zeros(state_shape(x, options))
    with autograd_in_kernel():
        leaves, g = _leaves(present), _leaves((grad_y, grad_state))
        outs = function(*leaves)
        # The gradient of <v, J(x)^T g> is J v in g and d/de J(x + e v)^T g in x.
        y, last, *grads = vjp(vjp(outs, leaves, g, create_graph=True), (*g, *leaves), fill_zeros(tangents, x))
        by_cotangents = vjp(outs, leaves, fill_zeros((grad_y_tangent, grad_state_tangent), g))
    if outputs:
        y, last = torch.empty_like(x.u).copy_(y), last.clone(memory_format=torch.contiguous_format)
    else:
        y, last = x.u.new_empty(0), x.A.new_empty(0)
    return (y, last, *expand_none([a + b for a, b in zip(grads, by_cotangents, strict=True)], x))
