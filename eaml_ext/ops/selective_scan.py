"""h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t;  y_t = (C_t . h_t + D u_t) silu(z_t);  dt = softplus(delta + delta_bias).

The recurrence of Mamba (Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", eq. 2 with
the zero-order hold on A and Euler's rule on B), with states and episode resets as arguments. With a complex A (S4D,
Gu et al. 2022, "On the Parameterization and Initialization of Diagonal State Space Models") the states stand for
conjugate pairs: 2 Re(C_t . h_t) takes the place of C_t . h_t.

From top to bottom: schemas, reference (the specification; it also runs where no kernel is registered), shapes for the
compiler, operation counts, autograd, public functions. Kernels: ``csrc/selective_scan``.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from eaml_ext import _check
from eaml_ext.ops._typed import Function, allow_in_graph, register_fake
from eaml_ext.ops.fallback import reference_of, warn_once

CHUNK = 32  # steps between two saved states; kChunk in csrc/selective_scan/params.h
MOST = 256  # states of a channel that the CUDA kernels take, a complex one counting twice

_HALF = (torch.bfloat16, torch.float16)
_FULL = {dtype: (dtype, dtype.to_complex()) for dtype in (torch.float32, torch.float64)}

# The differentiable arguments, in the order of every schema, gradient and tangent list.
ARGUMENTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
_COUNT = len(ARGUMENTS)

# --- schemas ---------------------------------------------------------------------------------------------------------

_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "Tensor? initial_state"
)
_TANGENTS = ", ".join(f"Tensor? {name}_tangent" for name in ARGUMENTS)
_OPTIONS = "Tensor? reset, bool delta_softplus, bool B_invariant, bool C_invariant"

_GRADIENTS = ", ".join(["Tensor"] * _COUNT)

# Gradients come in the order of ARGUMENTS, an empty tensor for an argument that is None; so are saved states without
# `save`, and (y, last state) without `outputs`.
torch.library.define("eaml_ext::selective_scan", f"({_INPUTS}, {_OPTIONS}, bool save) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "eaml_ext::selective_scan_step",
    "(Tensor state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus) -> (Tensor, Tensor)",
)
torch.library.define(
    "eaml_ext::selective_scan_backward",
    f"(Tensor grad_y, Tensor? grad_state, {_INPUTS}, {_OPTIONS}, Tensor? saved) -> ({_GRADIENTS})",
)
torch.library.define("eaml_ext::selective_scan_jvp", f"({_INPUTS}, {_TANGENTS}, {_OPTIONS}) -> (Tensor, Tensor)")
torch.library.define(
    "eaml_ext::selective_scan_backward_jvp",
    "(Tensor grad_y, Tensor? grad_state, Tensor? grad_y_tangent, Tensor? grad_state_tangent, "
    f"{_INPUTS}, {_TANGENTS}, {_OPTIONS}, bool outputs) -> (Tensor, Tensor, {_GRADIENTS})",
)

_ops = torch.ops.eaml_ext

# --- reference -------------------------------------------------------------------------------------------------------


def _per_row(parameter: Tensor | None, rank: int, batch: int) -> Tensor | None:
    """(tasks, ...) -> (batch, ...): the row of the task that each batch row belongs to; shared parameters broadcast."""
    if parameter is None or parameter.dim() == rank:
        return parameter
    tasks = parameter.shape[0]
    return parameter.repeat_interleave(batch // tasks, dim=0)


def _per_step(matrix: Tensor, invariant: bool, batch: int, dim: int) -> Callable[[int], Tensor]:
    """B or C at step t, broadcastable to (batch, dim, state)."""
    if invariant:
        fixed = _per_row(matrix, 2, batch)
        assert fixed is not None
        return lambda t: fixed
    if matrix.dim() == 3:
        return lambda t: matrix[..., t].unsqueeze(1)
    repeats = dim // matrix.shape[1]
    return lambda t: matrix[..., t].repeat_interleave(repeats, dim=1)


def _reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    delta_softplus: bool,
    B_invariant: bool,
    C_invariant: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The formula, one step at a time: y, last state, and the states at the start of each chunk but the first."""
    batch, dim, length = u.shape
    dtype = u.dtype
    if dtype in _HALF:
        u, delta, z = u.float(), delta.float(), None if z is None else z.float()
    bias = _per_row(delta_bias, 1, batch)
    dt = delta if bias is None else delta + bias.unsqueeze(-1)
    if delta_softplus:
        dt = -F.logsigmoid(-dt)  # softplus without torch's linear branch above 20
    A, D = _per_row(A, 2, batch), _per_row(D, 1, batch)  # type: ignore[assignment]
    B_at, C_at = _per_step(B, B_invariant, batch, dim), _per_step(C, C_invariant, batch, dim)
    h = A.new_zeros(batch, dim, A.shape[-1]) if initial_state is None else initial_state
    x = dt * u
    ys, saved = [], []
    for t in range(length):
        if t and t % CHUNK == 0:
            saved.append(h)
        if reset is not None:
            h = torch.where(reset[:, t, None, None], torch.zeros_like(h), h)
        h = torch.exp(dt[..., t, None] * A) * h + x[..., t, None] * B_at(t)
        ys.append((h * C_at(t)).sum(-1))
    y = torch.stack(ys, dim=-1) if ys else torch.zeros_like(u)
    if y.is_complex():
        y = 2 * y.real
    if D is not None:
        y = y + u * D.unsqueeze(-1)
    if z is not None:
        y = y * F.silu(z)
    return y.to(dtype), h, saved


def _present(values: Sequence[Any]) -> list[int]:
    return [i for i, value in enumerate(values) if value is not None]


def _as_function(inputs: Sequence[Any], options: Sequence[Any]) -> tuple[Callable[..., Any], list[Tensor]]:
    """The reference as a function of its present tensors alone, for torch.func; and those tensors."""
    indices = _present(inputs)

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        full: list[Any] = [None] * _COUNT
        for i, tensor in zip(indices, tensors, strict=True):
            full[i] = tensor
        return _reference(*full, *options)[:2]

    return function, [inputs[i] for i in indices]


def _empty_gradients(inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """Uninitialised gradients; those of sequences have the strides of their argument."""
    u, A = inputs[0], inputs[2]
    return tuple(
        (u if name == "z" else A).new_empty(0)
        if v is None
        else torch.empty_like(v)
        if name in ("u", "delta", "z")
        else v.new_empty(v.shape)
        for name, v in zip(ARGUMENTS, inputs, strict=True)
    )


def _spread(present: Sequence[Tensor], inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """A tuple over ARGUMENTS from the gradients of the present ones."""
    grads = iter(present)
    like = _empty_gradients(inputs)
    return tuple(to if v is None else to.copy_(next(grads)) for to, v in zip(like, inputs, strict=True))


def _fill(tangents: Sequence[Any], values: Sequence[Any]) -> tuple[Tensor, ...]:
    """Tangents of the present values, zero where none was given."""
    pairs = zip(tangents, values, strict=True)
    return tuple(torch.zeros_like(v) if t is None else t for t, v in pairs if v is not None)


@contextlib.contextmanager
def _autograd() -> Iterator[None]:
    """Lets a kernel record gradients, below a dispatch mode too (a FLOP counter), where what this takes is off."""
    keys, exclude = torch._C.DispatchKey, torch._C._SetExcludeDispatchKeyGuard
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        for key in (keys.AutogradFunctionality, keys.ADInplaceOrView, keys.Conjugate, keys.Negative):
            stack.enter_context(exclude(key, False))
        yield


def _leaves(values: Sequence[Tensor]) -> list[Tensor]:
    return [v.detach().requires_grad_() for v in values]


def _pull(outs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], graph: bool = False) -> Any:
    """J^T g, zero where nothing connects, as over no steps."""
    pairs = [(out, g) for out, g in zip(outs, cotangents, strict=True) if out.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(x) for x in inputs)
    outs, cotangents = zip(*pairs, strict=True)
    return torch.autograd.grad(
        outs, inputs, cotangents, retain_graph=True, create_graph=graph, allow_unused=True, materialize_grads=True
    )


def _saved_size(u: Tensor, A: Tensor) -> Any:
    """Of (chunks - 1, state, dim), a state of zeros if there is but one chunk.

    One dimension, and never empty: else a compiled call would be compiled anew on each side of 0 and of 1.
    """
    return torch.sym_max((u.shape[2] - 1) // CHUNK, 1) * A.shape[-1] * u.shape[1]


@torch.library.impl("eaml_ext::selective_scan", "CompositeExplicitAutograd")
@reference_of("selective_scan")
def _scan_reference(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, save = args
    u, A = inputs[0], inputs[2]
    y, last, saved = _reference(*inputs)
    y = torch.empty_like(u).copy_(y)
    last = last.clone(memory_format=torch.contiguous_format)
    if not save:
        return y, last, A.new_empty(0)
    saved = saved or [torch.zeros_like(last)]
    return y, last, torch.stack(saved, dim=1).transpose(2, 3).reshape(len(u), _saved_size(u, A))


def _with_time(
    state: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any, z: Any, bias: Any
) -> Any:
    """The arguments of a scan over the one step."""
    gate = None if z is None else z.unsqueeze(-1)
    return u.unsqueeze(-1), delta.unsqueeze(-1), A, B.unsqueeze(-1), C.unsqueeze(-1), D, gate, bias, state


def _step_arguments(
    state: Any, u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, delta_bias: Any, delta_softplus: Any
) -> tuple[Any, Any, torch.dtype]:
    """The inputs and options of a scan over the one step, and the dtype of y. Raises on bad input."""
    where = "selective_scan_step"
    for name, value, ranks, text in (
        ("u", u, (2,), "(batch, dim)"),
        ("delta", delta, (2,), "(batch, dim)"),
        ("B", B, (2, 3), "(batch, state) or (batch, groups, state)"),
        ("C", C, (2, 3), "(batch, state) or (batch, groups, state)"),
        ("z", z, (2,), "(batch, dim)"),
    ):
        if value is None and name == "z":
            continue
        _check.tensor(where, name, value)
        if value.dim() not in ranks:
            raise ValueError(f"{where}: {name} must have shape {text}, got {tuple(value.shape)}")
    _check.tensor(where, "state", state)
    x = _autocast(_with_time(state, u, delta, A, B, C, D, z, delta_bias))
    dtype, x = x[0].dtype, _widest(x)
    return x, (None, bool(delta_softplus), *_check_arguments(where, x, delta_softplus, None, "state")), dtype


@torch.library.impl("eaml_ext::selective_scan_step", "CompositeExplicitAutograd")
@reference_of("selective_scan")
def _step_reference(*args: Any) -> tuple[Tensor, Tensor]:
    x, options, _ = _step_arguments(*args)
    y, last, _ = _reference(*x, *options)
    return y.squeeze(-1).contiguous(), last.contiguous()


@torch.library.impl("eaml_ext::selective_scan_backward", "CompositeExplicitAutograd")
@reference_of("selective_scan")
def _backward_reference(grad_y: Tensor, grad_state: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    inputs, options = args[:_COUNT], args[_COUNT:-1]
    function, present = _as_function(inputs, options)
    with _autograd():
        x = _leaves(present)
        y, last = function(*x)
        grads = _pull((y, last), x, (grad_y, torch.zeros_like(last) if grad_state is None else grad_state))
    return _spread(grads, inputs)


@torch.library.impl("eaml_ext::selective_scan_jvp", "CompositeExplicitAutograd")
@reference_of("selective_scan")
def _jvp_reference(*args: Any) -> tuple[Tensor, Tensor]:
    inputs, tangents, options = args[:_COUNT], args[_COUNT : 2 * _COUNT], args[2 * _COUNT :]
    function, present = _as_function(inputs, options)
    with _autograd():
        x = _leaves(present)
        outs = function(*x)
        g = _leaves([torch.zeros_like(out) for out in outs])
        # J v is the gradient in g of <v, J^T g>: reverse mode alone, as forward-mode levels do not nest.
        y, last = _pull(_pull(outs, x, g, graph=True), g, _fill(tangents, inputs))
    return torch.empty_like(inputs[0]).copy_(y), last.clone(memory_format=torch.contiguous_format)


@torch.library.impl("eaml_ext::selective_scan_backward_jvp", "CompositeExplicitAutograd")
@reference_of("selective_scan")
def _backward_jvp_reference(
    grad_y: Tensor,
    grad_state: Tensor | None,
    grad_y_tangent: Tensor | None,
    grad_state_tangent: Tensor | None,
    *args: Any,
) -> tuple[Tensor, ...]:
    inputs, tangents, options = args[:_COUNT], args[_COUNT : 2 * _COUNT], args[2 * _COUNT : -1]
    function, present = _as_function(inputs, options)
    u, A = inputs[0], inputs[2]
    if grad_state is None:
        grad_state = A.new_zeros(*u.shape[:2], A.shape[-1])
    with _autograd():
        x, g = _leaves(present), _leaves((grad_y, grad_state))
        outs = function(*x)
        # The gradient of <v, J(x)^T g>: in g it is J v, in x it is d/de J(x + e v)^T g.
        y, last, *grads = _pull(_pull(outs, x, g, graph=True), (*g, *x), _fill(tangents, inputs))
        moved = _pull(outs, x, _fill((grad_y_tangent, grad_state_tangent), g))
    if args[-1]:
        y, last = torch.empty_like(u).copy_(y), last.clone(memory_format=torch.contiguous_format)
    else:
        y, last = u.new_empty(0), A.new_empty(0)
    return (y, last, *_spread([a + b for a, b in zip(grads, moved, strict=True)], inputs))


# --- shapes for torch.compile, torch.export and FakeTensor ------------------------------------------------------------


def _fake_state(u: Tensor, A: Tensor) -> Tensor:
    return A.new_empty(u.shape[0], u.shape[1], A.shape[-1])


@register_fake("eaml_ext::selective_scan")
def _scan_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    u, A, save = args[0], args[2], args[-1]
    saved = A.new_empty(u.shape[0], _saved_size(u, A)) if save else A.new_empty(0)
    return torch.empty_like(u), _fake_state(u, A), saved


@register_fake("eaml_ext::selective_scan_step")
def _step_fake(state: Tensor, u: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), state.new_empty(state.shape)


@register_fake("eaml_ext::selective_scan_backward")
def _backward_fake(grad_y: Tensor, grad_state: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    return _empty_gradients(args[:_COUNT])


@register_fake("eaml_ext::selective_scan_jvp")
def _jvp_fake(*args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(args[0]), _fake_state(args[0], args[2])


@register_fake("eaml_ext::selective_scan_backward_jvp")
def _backward_jvp_fake(
    grad_y: Any, grad_state: Any, gy_tangent: Any, gs_tangent: Any, *args: Any
) -> tuple[Tensor, ...]:
    u, A = args[0], args[2]
    outs = (torch.empty_like(u), _fake_state(u, A)) if args[-1] else (u.new_empty(0), A.new_empty(0))
    return (*outs, *_empty_gradients(args[:_COUNT]))


# --- operation counts for torch.utils.flop_counter -------------------------------------------------------------------

# What the kernels do for one state of one channel at one step. An exponential counts as one, as a sine and a cosine do;
# on duals a sum counts as two and a product as four. What has no state (step size, skip, gate) is left out.


def _count(name: str, u_at: int, real: int, complex: int) -> None:
    @register_flop_formula(getattr(_ops, name), get_raw=True)
    def formula(*args: Any, **_: Any) -> int:
        u, A = args[u_at], args[u_at + 2]
        return int((complex if A.is_complex() else real) * u.numel() * A.shape[-1])


_count("selective_scan", 0, 7, 21)  # dt A, exp, a h, x B, + and C h, +
_count("selective_scan_backward", 2, 19, 53)  # a, h again; step_backward in csrc/selective_scan/recurrence.h and sums
_count("selective_scan_jvp", 0, 22, 63)
_count("selective_scan_backward_jvp", 4, 79, 220)  # the jvp, a, h again, step_backward and sums

# --- autograd --------------------------------------------------------------------------------------------------------
# f is the scan, x its arguments. Four Functions close the calculus up to second order, each derivative of one being
# another: _Scan f(x); _Vjp J(x)^T g; _Jvp J(x) v; _VjpJvp d/de of J(x + e v)^T (g + e w), the forward-mode derivative
# of _Vjp, which is also its reverse-mode one: grad_x <v, J(x)^T g> = d/de J(x + e v)^T g. Its kernel is the backward
# kernel run on dual numbers.

_THIRD = (
    "selective_scan: derivatives of third order, and forward-mode over forward-mode, are not implemented; "
    "differentiate selective_scan_reference instead"
)


class _Function(Function):
    @classmethod
    def ready(cls) -> None:
        # Kept, because apply() asks for it at each call.
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]


def _save(ctx: Any, tensors: Sequence[Any], options: Sequence[Any]) -> None:
    """Keeps tensors (None among them) and options for both modes."""
    reset, *flags = options
    ctx.flags = tuple(flags)
    ctx.save_for_backward(*tensors, reset)
    ctx.save_for_forward(*tensors, reset)


def _saved(ctx: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    *tensors, reset = ctx.saved_tensors
    return tuple(tensors), (reset, *ctx.flags)


def _pick(values: Sequence[Any], inputs: Sequence[Any]) -> tuple[Any, ...]:
    """The entries of ``values`` whose argument is present."""
    return tuple(v for v, x in zip(values, inputs, strict=True) if x is not None)


def _place(values: Sequence[Any], inputs: Sequence[Any]) -> tuple[Any, ...]:
    """The opposite of _pick: None where the argument is None."""
    entries = iter(values)
    return tuple(None if x is None else next(entries) for x in inputs)


def _applied(function: type[_Function], tensors: Sequence[Any], *options: Any) -> tuple[Any, ...]:
    """The function, without autograd's bookkeeping where nothing asks for it."""
    call = function.forward if _plain(tensors) else function.apply
    out: tuple[Any, ...] = call(*tensors, *options)
    return out


class _Scan(_Function):
    """(y, last state, saved states) = f(x). The third output has no gradient."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        outs: tuple[Tensor, ...] = _ops.selective_scan(*args, True)
        return outs

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)
        _save(ctx, (*inputs[:_COUNT], output[2]), inputs[_COUNT:])

    @staticmethod
    def backward(ctx: Any, grad_y: Any, grad_state: Any, _: Any) -> Any:
        (*x, saved), options = _saved(ctx)
        if grad_y is None and grad_state is None:
            return (None,) * (_COUNT + 4)
        grad_y = torch.zeros_like(x[0]) if grad_y is None else grad_y
        grads = _applied(_Vjp, (grad_y, grad_state, *x), *options, saved)
        return (*_place(grads, x), None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        (*x, _), options = _saved(ctx)
        return (*_Jvp.apply(*x, *tangents[:_COUNT], *options), None)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        fold = _Fold(info.batch_size, args[:_COUNT], in_dims[:_COUNT], args[_COUNT:])
        x, options = fold.inputs(args, in_dims), fold.options(args[_COUNT:], in_dims[_COUNT:])
        return tuple(fold.unfold_rows(out) for out in _Scan.apply(*x, *options)), (0, 0, 0)


class _Vjp(_Function):
    """J(x)^T (grad_y, grad_state), a tuple over the present arguments."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _pick(_ops.selective_scan_backward(*args), args[2 : 2 + _COUNT])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        _save(ctx, inputs[: 2 + _COUNT], inputs[2 + _COUNT : -1])

    @staticmethod
    def backward(ctx: Any, *v: Any) -> Any:
        (grad_y, grad_state, *x), options = _saved(ctx)
        outputs = any(ctx.needs_input_grad[:2])
        grads = _applied(_VjpJvp, (grad_y, grad_state, None, None, *x, *_place(v, x)), *options, outputs)
        y, last = grads[:2] if outputs else (None, None)
        grads = _place(grads[2 * outputs :], x)
        return (y, None if grad_state is None else last, *grads, None, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        (grad_y, grad_state, *x), options = _saved(ctx)
        moves = tangents[: 2 + _COUNT]
        return tuple(_VjpJvp.apply(grad_y, grad_state, *moves[:2], *x, *moves[2:], *options, False))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        # Gradients of shared parameters differ from sample to sample, so all of them become per-task.
        fold = _Fold(info.batch_size, args[2 : 2 + _COUNT], in_dims[2 : 2 + _COUNT], args[2 + _COUNT : -1], True)
        grad_y, grad_state, saved = (fold.rows(args[i], in_dims[i]) for i in (0, 1, -1))
        x = fold.inputs(args[2:], in_dims[2:])
        options = fold.options(args[2 + _COUNT : -1], in_dims[2 + _COUNT : -1])
        grads = _Vjp.apply(grad_y, grad_state, *x, *options, saved)
        return fold.unfold_gradients(grads), (0,) * len(grads)


class _Jvp(_Function):
    """J(x) v, for y and the last state."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        outs: tuple[Tensor, ...] = _ops.selective_scan_jvp(*args)
        return outs

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        _save(ctx, inputs[: 2 * _COUNT], inputs[2 * _COUNT :])

    @staticmethod
    def backward(ctx: Any, grad_y: Any, grad_state: Any) -> Any:
        tensors, options = _saved(ctx)
        x, v = tensors[:_COUNT], tensors[_COUNT:]
        if grad_y is None and grad_state is None:
            return (None,) * (2 * _COUNT + 4)
        grad_y = torch.zeros_like(x[0]) if grad_y is None else grad_y
        to_x = _VjpJvp.apply(grad_y, grad_state, None, None, *x, *v, *options, False)
        to_v = _place(_Vjp.apply(grad_y, grad_state, *x, *options, None), x)
        to_v = tuple(None if move is None else grad for grad, move in zip(to_v, v, strict=True))
        return (*_place(to_x, x), *to_v, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(_THIRD)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        fold = _Fold(info.batch_size, args[:_COUNT], in_dims[:_COUNT], args[2 * _COUNT :], True)
        x, options = fold.inputs(args, in_dims), fold.options(args[2 * _COUNT :], in_dims[2 * _COUNT :])
        v = fold.inputs(args[_COUNT:], in_dims[_COUNT:])
        return tuple(fold.unfold_rows(out) for out in _Jvp.apply(*x, *v, *options)), (0, 0)


class _VjpJvp(_Function):
    """d/de J(x + e v)^T (g + e w) over the present arguments; g = (grad_y, grad_state), w its tangent.

    With ``outputs`` (the last argument), J(x) v comes before them.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        outs = _ops.selective_scan_backward_jvp(*args)
        grads = _pick(outs[2:], args[4 : 4 + _COUNT])
        return (*outs[:2], *grads) if args[-1] else grads

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(_THIRD)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(_THIRD)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        start = 4 + 2 * _COUNT
        fold = _Fold(info.batch_size, args[4 : 4 + _COUNT], in_dims[4 : 4 + _COUNT], args[start:-1], True)
        cotangents = (fold.rows(a, d) for a, d in zip(args[:4], in_dims[:4], strict=True))
        x = fold.inputs(args[4:], in_dims[4:])
        v = fold.inputs(args[4 + _COUNT :], in_dims[4 + _COUNT :])
        options = fold.options(args[start:-1], in_dims[start:])
        outs = _VjpJvp.apply(*cotangents, *x, *v, *options, args[-1])
        rows, grads = (outs[:2], outs[2:]) if args[-1] else ((), outs)
        outs = (*map(fold.unfold_rows, rows), *fold.unfold_gradients(grads))
        return outs, (0,) * len(outs)


class _Fold:
    """Folds a vmapped dimension of size ``size`` into the batch: rows become (size * batch), parameters per-task.

    With ``per_sample`` every parameter gets an entry per sample, also where all samples share it, so that its gradient
    comes apart by sample.
    """

    def __init__(self, size: int, x: Any, in_dims: Any, options: Any, per_sample: bool = False):
        self.size, self.per_sample = size, per_sample
        _, _, B_invariant, C_invariant = options
        ranks = {"A": 2, "D": 1, "delta_bias": 1}  # of a parameter shared by all rows
        if B_invariant:
            ranks["B"] = 2
        if C_invariant:
            ranks["C"] = 2
        self.ranks = [ranks.get(name) for name in ARGUMENTS]
        self.x, self.in_dims = x, in_dims

    def rows(self, value: Any, in_dim: int | None) -> Any:
        """(size, batch, ...) -> (size * batch, ...)."""
        if value is None:
            return None
        value = value.expand(self.size, *value.shape) if in_dim is None else value.movedim(in_dim, 0)
        return value.reshape(self.size * value.shape[1], *value.shape[2:])

    def parameter(self, value: Any, in_dim: int | None, rank: int) -> Any:
        """([size,] [tasks,] ...) -> (size * tasks, ...), or as it is where all rows share it."""
        if value is None or (in_dim is None and value.dim() == rank and not self.per_sample):
            return value
        value = value.expand(self.size, *value.shape) if in_dim is None else value.movedim(in_dim, 0)
        if value.dim() == rank + 1:
            return value
        return value.reshape(self.size * value.shape[1], *value.shape[2:])

    def inputs(self, args: Any, in_dims: Any) -> tuple[Any, ...]:
        return tuple(
            self.rows(a, d) if rank is None else self.parameter(a, d, rank)
            for a, d, rank in zip(args[:_COUNT], in_dims[:_COUNT], self.ranks, strict=True)
        )

    def options(self, options: Any, in_dims: Any) -> tuple[Any, ...]:
        reset, *flags = options
        return (self.rows(reset, in_dims[0]), *flags)

    def unfold_rows(self, value: Tensor) -> Tensor:
        return value.reshape(self.size, value.shape[0] // self.size, *value.shape[1:])

    def unfold_gradients(self, grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        out = []
        entries = iter(grads)
        for value, in_dim, rank in zip(self.x, self.in_dims, self.ranks, strict=True):
            if value is None:
                continue
            grad = next(entries)
            shared = rank is not None and value.dim() - (in_dim is not None) == rank
            out.append(grad if shared else self.unfold_rows(grad))
        return tuple(out)


for _function in (_Scan, _Vjp, _Jvp, _VjpJvp):
    _function.ready()


# --- public ----------------------------------------------------------------------------------------------------------


def _check_arguments(
    where: str, x: Sequence[Any], delta_softplus: Any, reset: Any, state_name: str = "initial_state"
) -> tuple[bool, bool]:
    """Raises on bad input; returns whether B and C are invariant in time."""
    names = (*ARGUMENTS[:-1], state_name)
    for name, value in zip(names, x, strict=True):
        if value is None and name not in ("u", "delta", "A", "B", "C"):
            continue
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            _check.tensor(where, name, value)
    _check.flag(where, "delta_softplus", delta_softplus)
    u, delta, A, B, C, D, z, delta_bias, initial_state = x
    complex_A = A.is_complex()
    if u.dim() != 3:
        raise ValueError(f"{where}: u must have shape (batch, dim, length), got {tuple(u.shape)}")
    if A.dim() not in (2, 3):
        raise ValueError(f"{where}: A must have shape (dim, state) or (tasks, dim, state), got {tuple(A.shape)}")
    batch, dim, length = u.shape
    state = A.shape[-1]

    def parameter(name: str, value: Tensor, sizes: tuple[int, ...], text: str) -> None:
        shape, rank = value.shape, len(sizes)
        if value.dim() not in (rank, rank + 1) or shape[-rank:] != sizes:
            raise ValueError(f"{where}: {name} must have shape {text} = {sizes}, alone or per task, got {tuple(shape)}")
        if value.dim() > rank and (shape[0] == 0 or batch % shape[0]):
            raise ValueError(f"{where}: {name} has {shape[0]} tasks, which do not divide the batch of {batch}")

    def packed(value: Tensor) -> bool:
        return complex_A and value.is_floating_point() and value.shape[-1] == 2 * length

    def variable(name: str, value: Tensor) -> None:
        shape = value.shape
        if value.dim() not in (3, 4):
            raise ValueError(
                f"{where}: {name} must have shape (batch, state, length), (batch, groups, state, length) "
                f"or (dim, state), got {tuple(shape)}"
            )
        if shape[0] != batch:
            raise ValueError(f"{where}: {name} has batch {shape[0]}, u has batch {batch}")
        if shape[-2] != state:
            raise ValueError(f"{where}: {name} has {shape[-2]} states, A has {state}")
        if shape[-1] != length and not packed(value):
            raise ValueError(f"{where}: {name} has length {shape[-1]}, u has length {length}")
        if value.dim() == 4 and (shape[1] == 0 or dim % shape[1]):
            raise ValueError(f"{where}: {name} has {shape[1]} groups, which do not divide the {dim} channels of u")

    parameter("A", A, (dim, state), "(dim, state)")
    _check.shape(where, "delta", delta, u.shape, f"of u, {tuple(u.shape)}")
    invariant = B.dim() == 2, C.dim() == 2
    for name, value, fixed in (("B", B, invariant[0]), ("C", C, invariant[1])):
        parameter(name, value, (dim, state), "(dim, state)") if fixed else variable(name, value)
    groups = [v.shape[1] if v.dim() == 4 else 1 for v in (B, C) if v.dim() > 2]
    if len(set(groups)) > 1:
        raise ValueError(f"{where}: C has {groups[1]} groups, B has {groups[0]}")
    if D is not None:
        parameter("D", D, (dim,), "(dim,)")
    if delta_bias is not None:
        parameter("delta_bias", delta_bias, (dim,), "(dim,)")
    if z is not None:
        _check.shape(where, "z", z, u.shape, f"of u, {tuple(u.shape)}")
    if initial_state is not None:
        _check.shape(
            where, state_name, initial_state, (batch, dim, state), f"(batch, dim, state) = {(batch, dim, state)}"
        )
    if reset is not None:
        _check.tensor(where, "reset", reset)
        _check.shape(where, "reset", reset, (batch, length), f"(batch, length) = {(batch, length)}")
        _check.dtype(where, "reset", reset, (torch.bool,))
        _check.device(where, "reset", reset, u.device, "u")

    _check.dtype(where, "u", u, (*_FULL, *_HALF))
    wide = torch.float32 if u.dtype in _HALF else u.dtype
    plain = {name for name, value in (("B", B), ("C", C)) if value.dim() > 2 and (packed(value) or not complex_A)}
    for name, value in zip(names[1:], x[1:], strict=True):
        if value is None:
            continue
        if name in ("delta", "z") or name in plain:
            wanted: tuple[torch.dtype, ...] = (u.dtype,)
        elif complex_A and name in ("A", "B", "C", state_name):
            wanted = (wide.to_complex(),)
        else:
            wanted = (wide, *_HALF) if u.dtype != torch.float64 else (wide,)
        if value.dtype not in wanted:
            kind = f" and {'complex' if complex_A else 'real'} A" * (name in ("B", "C", state_name))
            _check.dtype(where, name, value, wanted[:1], f"{wanted[0]} for u of {u.dtype}{kind}".replace("torch.", ""))
        if value.device != u.device:
            _check.device(where, name, value, u.device, "u")
    return invariant


def _autocast(x: tuple[Any, ...]) -> tuple[Any, ...]:
    """Under autocast, real sequences of mixed dtypes become the widest of them, as in torch's own ops."""
    if not torch._C._is_any_autocast_enabled() or not isinstance(x[0], Tensor):
        return x
    device = x[0].device.type
    return _widest(x) if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) else x


def _widest(x: tuple[Any, ...]) -> tuple[Any, ...]:
    """Real sequences of mixed dtypes, none of them float64, in the widest of them."""
    names = ("u", "delta", "B", "C", "z")
    sequences = [i for i, v in enumerate(x) if ARGUMENTS[i] in names and isinstance(v, Tensor) and v.dim() > 2]
    found = [i for i in sequences if not x[i].is_complex()]
    dtypes = {x[i].dtype for i in found}
    if len(dtypes) < 2 or not dtypes <= {torch.float32, *_HALF}:
        return x
    return tuple(v.to(functools.reduce(torch.promote_types, dtypes)) if i in found else v for i, v in enumerate(x))


def _plain(x: Sequence[Any]) -> bool:
    """Whether nothing asks for derivatives or batching, so that the raw op may be called."""
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return not torch.is_grad_enabled() or not any(v is not None and v.requires_grad for v in x)


def _complex(matrix: Tensor) -> Tensor:
    """B or C of a complex A, whose parts may be interleaved along time."""
    return matrix if matrix.is_complex() else torch.complex(matrix[..., ::2], matrix[..., 1::2])


def _scan(x: Sequence[Any], options: Sequence[Any], run: Callable[..., Any] | None = None) -> tuple[Tensor, Tensor]:
    """(y, last state) of checked arguments; ``run`` replaces the op, which takes u, delta and z in half types, too."""
    if x[0].dtype != torch.float64:
        full = (torch.float32, torch.complex64)
        kept = ("u", "delta", "z")
        x = [
            v if v is None or name in kept or v.dtype in full else v.float()
            for name, v in zip(ARGUMENTS, x, strict=True)
        ]
    if x[2].is_complex():
        x = [*x[:3], _complex(x[3]), _complex(x[4]), *x[5:]]
    if run is None and x[0].is_cuda and x[2].shape[-1] * (2 if x[2].is_complex() else 1) > MOST:
        warn_once(f"selective_scan of more than {MOST} states", x[0].device)
        run = _reference
    if run is not None:
        y, last, _ = run(*x, *options)
    elif _plain(x):
        y, last, _ = _ops.selective_scan(*x, *options, False)
    else:
        y, last, _ = _Scan.apply(*x, *options)
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
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan, ``h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t``, ``y_t = C_t . h_t + D u_t``, ``y_t *= silu(z_t)``.

    The positional arguments are those of mamba_ssm's ``selective_scan_fn``. Derivatives are exact to second order in
    every argument: reverse over reverse, forward over reverse, reverse over forward. ``torch.func``, ``vmap`` (per-task
    parameters in one call) and ``torch.compile`` compose with it. The batch is task-major: with per-task parameters,
    row ``b`` belongs to task ``b // (batch / tasks)``. Under ``torch.autocast``, ``u``, ``delta``, ``z`` and variable
    real ``B``, ``C`` of mixed dtypes are taken in the widest of them.

    A complex ``A`` (S4D) takes complex ``B``, ``C`` and ``initial_state`` and gives a complex last state and a real
    ``y_t = 2 Re(C_t . h_t) + D u_t``; gradients follow PyTorch's convention, dL/dRe + i dL/dIm.

    Args:
        u: input, ``(batch, dim, length)``, float32, float64, bfloat16 or float16, any strides; channel-last memory is
            the fastest on a CPU.
        delta: step size, like ``u``.
        A: ``(dim, state)`` or, one per task, ``(tasks, dim, state)``; float32 or complex64 (float64 or complex128 for
            float64 ``u``).
        B: ``(batch, state, length)``, ``(batch, groups, state, length)``, both in the dtype of ``u``, or, the same at
            every step, ``(dim, state)`` in the dtype of ``A``. With a complex ``A`` all are in its dtype, or, as in
            mamba_ssm, ``(batch, [groups,] state, 2 * length)`` in that of ``u``, real and imaginary parts interleaved.
        C: as ``B``.
        D: skip weight, ``(dim,)`` or ``(tasks, dim)``, float32 (float64 for float64 ``u``).
        z: gate, like ``u``.
        delta_bias: added to ``delta``, like ``D``.
        delta_softplus: take ``softplus(delta + delta_bias)`` as the step size.
        return_last_state: also return ``h`` after the last step.
        initial_state: ``h`` before the first step, ``(batch, dim, state)`` in the dtype of ``A``; zero if absent.
        reset: ``(batch, length)`` bool: the state is zeroed before step t, so that an episode starts at t.

    Returns:
        ``y`` like ``u``, and with ``return_last_state`` also the last state ``(batch, dim, state)`` in the dtype of
        ``A``, half types widened.

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype.
        ValueError: an argument has the wrong shape or device.

    Source: Gu & Dao 2023, "Mamba", algorithm 2.

    >>> batch, dim, length, state = 2, 3, 5, 4
    >>> u, delta = torch.randn(batch, dim, length), torch.rand(batch, dim, length)
    >>> A = -torch.rand(dim, state)
    >>> B, C = torch.randn(batch, state, length), torch.randn(batch, state, length)
    >>> y, last = selective_scan(u, delta, A, B, C, return_last_state=True)
    >>> y.shape, last.shape
    (torch.Size([2, 3, 5]), torch.Size([2, 3, 4]))
    """
    x = _autocast((u, delta, A, B, C, D, z, delta_bias, initial_state))
    invariant = _check_arguments("selective_scan", x, delta_softplus, reset)
    _check.flag("selective_scan", "return_last_state", return_last_state)
    y, last = _scan(x, (reset, bool(delta_softplus), *invariant))
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
) -> Tensor | tuple[Tensor, Tensor]:
    """The specification of :func:`selective_scan`: the same arguments, a loop over time, derivatives of any order.

    >>> u = torch.randn(1, 2, 3)
    >>> A, B = -torch.ones(2, 1), torch.ones(1, 1, 3)
    >>> torch.allclose(selective_scan_reference(u, u, A, B, B), selective_scan(u, u, A, B, B), atol=1e-6)
    True
    """
    x = _autocast((u, delta, A, B, C, D, z, delta_bias, initial_state))
    invariant = _check_arguments("selective_scan_reference", x, delta_softplus, reset)
    _check.flag("selective_scan_reference", "return_last_state", return_last_state)
    y, last = _scan(x, (reset, bool(delta_softplus), *invariant), _reference)
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
    """One step of :func:`selective_scan`; differentiable, changes nothing in place.

    Args:
        state: ``(batch, dim, state)`` in the dtype of ``A``.
        u, delta, z: ``(batch, dim)``.
        B, C: ``(batch, state)`` or ``(batch, groups, state)``; one that is the same for all rows is expanded by the
            caller: ``B.expand(batch, dim, state)`` for ``(dim, state)``. Complex with a complex ``A``, never packed.
            float32, bfloat16 and float16 may be mixed among ``u``, ``delta``, ``B``, ``C`` and ``z``, as in mamba_ssm's
            ``selective_state_update``: the step is then computed in float32.
        A, D, delta_bias, delta_softplus: as in :func:`selective_scan`.

    Returns:
        ``y`` ``(batch, dim)`` in the dtype of ``u``, and the next state.

    Raises:
        TypeError, ValueError: as :func:`selective_scan`.

    >>> state, u, A, B = torch.zeros(1, 2, 3), torch.ones(1, 2), -torch.ones(2, 3), torch.ones(1, 3)
    >>> y, state = selective_scan_step(state, u, u, A, B, B)
    >>> y
    tensor([[3., 3.]])
    """
    arguments = (state, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    refusal = None
    if _raw_step_takes(arguments):
        try:
            pair: tuple[Tensor, Tensor] = _ops.selective_scan_step(*arguments)
            return pair
        except ValueError as error:  # its check of the shapes
            refusal = error
    x, options, dtype = _step_arguments(*arguments)  # raises, naming the argument, where a shape is wrong
    if refusal is not None:
        raise refusal
    y, last = _scan(x, options)
    return y.squeeze(-1).to(dtype), last


def _raw_step_takes(arguments: Sequence[Any]) -> bool:
    """Whether the raw step runs on the arguments, but for their shapes, which it checks itself."""
    *x, delta_softplus = arguments
    if type(delta_softplus) is not bool or not isinstance(x[0], Tensor) or not isinstance(x[1], Tensor):
        return False
    state, device, dtypes, dense = x[0], x[0].device, _FULL.get(x[1].dtype, ()), torch.strided
    for i, v in enumerate(x):
        if not isinstance(v, Tensor):
            if v is None and i > 5:  # D, z and delta_bias are optional
                continue
            return False
        if v.dtype not in dtypes or v.device != device or v.layout is not dense:
            return False
    return (
        state.dim() == 3
        and not (state.is_cuda and state.shape[-1] * (2 if state.is_complex() else 1) > MOST)
        and _plain(x)
    )
