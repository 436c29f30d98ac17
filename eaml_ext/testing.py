"""Check second derivatives: which are right, which raise an error, and which are wrong without one.

>>> import torch
>>> from eaml_ext.testing import check_second_order
>>> check_second_order(torch.sin, torch.randn(5, requires_grad=True)).verdict
'right'
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from eaml_ext import _check

__all__ = ["SecondOrder", "SecondOrderWay", "check_second_order"]

Verdict = Literal["right", "raises", "silently wrong"]

_DIRECTIONS = 8
# Step of the finite differences in units of an input's root mean square, and tolerance of the relative error. With
# Richardson's extrapolation the truncation is of order step^4, the rounding of order epsilon / step.
_STEP = {torch.float64: 1e-5, torch.float32: 2e-2}
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-2}
# Ratio of the two steps. With an integer ratio, rounding inside fn can make both differences agree by chance.
_RATIO = 1.7
_COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}


class SecondOrderWay(NamedTuple):
    """Second derivative of a function by one of autograd's entry points.

    ``relative_error`` is None and ``error`` is the text of the error if the verdict is ``"raises"``; otherwise
    ``error`` is None.
    """

    verdict: Verdict
    relative_error: float | None
    error: str | None

    def __str__(self) -> str:
        if self.relative_error is None:
            return f"raises {self.error}"
        return f"{self.verdict}, relative error {self.relative_error:.1e}"


class SecondOrder(NamedTuple):
    """Result of :func:`check_second_order`. ``str()`` is one line.

    ``verdict`` is the worse one of ``grad`` (``torch.autograd.grad``) and ``backward`` (``Tensor.backward``), where
    ``"silently wrong"`` is worse than ``"raises"``. ``dtype`` is the precision of the check.
    """

    verdict: Verdict
    grad: SecondOrderWay
    backward: SecondOrderWay
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.verdict} in {dtype} (autograd.grad: {self.grad}; backward: {self.backward})"


def check_second_order(fn: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Any) -> SecondOrder:
    """Compare the second derivatives of ``fn`` with finite differences of its first ones.

    The loss is ``L(x) = |fn(x) - target|^2 / 2`` with random targets, and ``g`` is its gradient. The check takes
    ``d/dx <x - g(x), v>`` for a random ``v``, as the outer gradient of MAML does, by ``torch.autograd.grad`` and by
    ``.backward()``. The part of ``g`` is compared with central differences of ``<g, v>`` along eight random directions.
    The relative error is the ratio of the medians of difference and size over them.

    A gradient step depends on ``x`` also directly. A function that cuts the graph of its gradient therefore causes no
    error: the outer gradient is only wrong. A function that is marked as ``once_differentiable`` raises an error by
    ``.backward()`` and is silent by ``torch.autograd.grad``. If a loss is linear in the outputs of such a function,
    ``.backward()`` is silent, too.

    The check runs in float64 with a tolerance of 1e-6 of the second derivative. It runs in float32 with a tolerance of
    2e-2 if ``fn`` raises an error in float64 or rounds to float32 inside. First derivatives are assumed to be right
    (``torch.autograd.gradcheck`` tests them). Every call of ``fn`` starts from the same random state.
    Autocast must be off, because finite differences have no digits in half types.

    Args:
        fn: function of ``inputs`` that returns a tensor or a tuple of tensors.
        *inputs: arguments of ``fn``. The second derivative is taken for all floating-point or complex tensors that
            require a gradient, together. Other floating-point tensors are converted to the precision of the check, and
            all else is passed as it is.

    Returns:
        A :class:`SecondOrder`: ``verdict``, and for ``grad`` and ``backward`` a verdict, the relative error and the
        text of the error.

    Raises:
        TypeError: ``fn`` returns something other than tensors.
        ValueError: no input requires a gradient, no output depends on one that does, outputs are not finite, or finite
            differences are unreliable: near kinks, if ``fn`` is random, or if it computes in a half type.
        Exception: ``fn`` raises an error in float64 and in float32; the latter is passed on.

    >>> x = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
    >>> check_second_order(torch.relu, x).verdict
    'right'

    A backward pass that leaves autograd's graph is wrong without an error:

    >>> class Square(torch.autograd.Function):
    ...     @staticmethod
    ...     def forward(ctx, x):
    ...         ctx.save_for_backward(x)
    ...         return x * x
    ...     @staticmethod
    ...     def backward(ctx, dy):
    ...         return 2 * ctx.saved_tensors[0].detach() * dy.detach()
    >>> print(check_second_order(Square.apply, x).backward)
    silently wrong, relative error 1.0e+00
    """
    where = "check_second_order"
    if not any(_is_differentiated(x) for x in inputs):
        raise ValueError(f"{where}: no input is a floating-point tensor that requires a gradient")
    with torch.enable_grad():
        truth = _in_float64_or_float32(fn, inputs)
        grad, backward = _way(truth, _by_grad), _way(truth, _by_backward)
    worst_first: tuple[Verdict, ...] = ("silently wrong", "raises", "right")
    verdict = min(grad.verdict, backward.verdict, key=worst_first.index)
    return SecondOrder(verdict, grad, backward, truth.loss.dtype)


def _in_float64_or_float32(fn: Callable[..., Any], inputs: Sequence[Any]) -> "_Truth":
    """Return the truth in the first precision in which ``fn`` runs and its finite differences agree."""
    errors: list[Exception] = []
    for dtype in _STEP:
        try:
            truth = _finite_differences(_Loss(fn, inputs, dtype))
        except Exception as error:  # fn may accept the other precision alone
            errors.append(error)
        else:
            if truth is not None:
                return truth
    if len(errors) == len(_STEP):
        raise errors[-1]
    raise ValueError(
        "check_second_order: finite differences are unreliable: fn has a kink nearby, is random or rounds to half types"
    )


def _is_differentiated(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad  # integer tensors cannot require a gradient


def _inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Inner product over all tensors."""
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


class _Loss:
    """Squared error of ``fn`` against random targets, a function of real tensors ``point``.

    Complex inputs and outputs are pairs of real numbers. The residuals at the inputs are random numbers times the root
    mean square of an output, so both terms of the Hessian count: the second derivative of ``fn`` and the square of the
    first one.
    """

    def __init__(self, fn: Callable[..., Any], inputs: Sequence[Any], dtype: torch.dtype) -> None:
        self.fn, self.dtype = fn, dtype
        self.inputs = [self._converted(x) for x in inputs]
        self.places = [i for i, x in enumerate(inputs) if _is_differentiated(x)]
        values = [self.inputs[i] for i in self.places]
        self.point = [torch.view_as_real(x) if x.is_complex() else x for x in values]
        self._generator = torch.Generator().manual_seed(0)
        self._scales = [_rms(x) for x in self.point]
        outputs = [y.detach() for y in self._outputs(self.point)]
        if not all(y.isfinite().all() for y in outputs):
            raise ValueError("check_second_order: fn returns infinite numbers or NaN")
        self._sizes = [_rms(y) for y in outputs]
        self._targets = [y / s + self._randn(y) for y, s in zip(outputs, self._sizes, strict=True)]

    def _converted(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
            return x
        return x.detach().to(_COMPLEX[self.dtype] if x.is_complex() else self.dtype).clone().resolve_conj()

    def _randn(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self._generator, dtype=like.dtype).to(like.device)

    def direction(self) -> list[Tensor]:
        """Return a random direction in which every input has its own scale."""
        return [self._randn(x) * s for x, s in zip(self.point, self._scales, strict=True)]

    def _outputs(self, point: Sequence[Tensor]) -> list[Tensor]:
        arguments = list(self.inputs)
        for i, x in zip(self.places, point, strict=True):
            arguments[i] = torch.view_as_complex(x) if arguments[i].is_complex() else x
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found = self.fn(*arguments)
        outputs = list(found) if isinstance(found, tuple | list) else [found]
        for y in outputs:
            _check.tensor("check_second_order", "fn's result", y)
        real = [torch.view_as_real(y) if y.is_complex() else y for y in outputs]
        return [y for y in real if y.is_floating_point()]

    def gradient(self, point: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
        """Return the gradient at ``point``, whose tensors are leaves that require a gradient."""
        outputs = self._outputs(point)
        if not any(y.requires_grad for y in outputs):
            raise ValueError("check_second_order: no output of fn depends on an input that requires a gradient")
        residuals = [y / s - t for y, s, t in zip(outputs, self._sizes, self._targets, strict=True)]
        loss = _inner(residuals, residuals) / 2
        found = torch.autograd.grad(loss, point, create_graph=create_graph, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(point, found, strict=True)]

    def leaves(self, direction: Sequence[Tensor] | None = None, step: float = 0.0) -> list[Tensor]:
        """Return the inputs, moved by ``step`` along ``direction``, as new leaves."""
        moved = direction or [torch.zeros_like(x) for x in self.point]
        return [(x + step * u).requires_grad_() for x, u in zip(self.point, moved, strict=True)]


def _rms(x: Tensor) -> float:
    """Root mean square; 1 for tensors that are empty or 0."""
    return float(x.square().mean().sqrt()) or 1.0 if x.numel() else 1.0


class _Truth(NamedTuple):
    """Derivatives of ``<g, v>`` along each of ``directions``, and the size of their rounding errors."""

    loss: _Loss
    v: list[Tensor]
    directions: list[list[Tensor]]
    derivatives: Tensor
    noise: float


def _finite_differences(loss: _Loss) -> _Truth | None:
    """Return second derivatives by finite differences, or None if they are unreliable.

    Differences with two step sizes must agree along three quarters of the directions, and so must one-sided ones. At a
    kink, as of relu, a central difference is the mean of two second derivatives. The other directions are left out.
    """
    step, tolerance = _STEP[loss.dtype], _TOLERANCE[loss.dtype]
    v = loss.direction()
    gradient = loss.gradient(loss.leaves())
    middle = float(_inner(gradient, v))
    terms = _inner([g.abs() for g in gradient], [x.abs() for x in v])
    noise = 4 * torch.finfo(loss.dtype).eps / step * float(terms)

    def differences(u: list[Tensor], step: float) -> tuple[float, float]:
        """Return the central difference, and half the difference of the one-sided ones."""
        ahead, behind = (float(_inner(loss.gradient(loss.leaves(u, s)), v)) for s in (step, -step))
        return (ahead - behind) / (2 * step), (ahead + behind - 2 * middle) / (2 * step)

    directions = [loss.direction() for _ in range(_DIRECTIONS)]
    (fine, fine_jump), (coarse, coarse_jump) = (
        torch.tensor([differences(u, s) for u in directions], dtype=torch.float64).T for s in (step, _RATIO * step)
    )
    jump = (_RATIO * fine_jump - coarse_jump) / (_RATIO - 1)  # extrapolated to step 0: smooth functions have 0
    bound = tolerance * fine.abs().median()
    # The error of the central difference at a kink is the jump; extrapolation amplifies rounding by 4.
    agree = ((fine - coarse).abs() <= bound + noise) & (jump.abs() <= bound / 2 + 4 * noise)
    # If the loss has a gradient, it has a Hessian: a difference of 0 is of outputs that are rounded to the same number.
    rounds = 0 < noise >= float(fine.abs().max())
    if rounds or 4 * int(agree.sum()) < 3 * _DIRECTIONS:
        return None
    kept = [u for u, same in zip(directions, agree.tolist(), strict=True) if same]
    return _Truth(loss, v, kept, ((_RATIO**2 * fine - coarse) / (_RATIO**2 - 1))[agree], noise)


def _way(truth: _Truth, by: Callable[[Tensor, list[Tensor]], list[Tensor]]) -> SecondOrderWay:
    """Compare the second derivative by one entry point of autograd with the truth."""
    point = truth.loss.leaves()
    try:
        gradient = truth.loss.gradient(point, create_graph=True)
        # The direct path from x has the factor 0, not 1: the sum then loses no digits, and the graph is the same.
        direct = _inner(point, [torch.zeros_like(x) for x in point])
        second = by(direct + _inner(gradient, truth.v), point)
    except Exception as error:
        text = " ".join(str(error).split())
        return SecondOrderWay("raises", None, f"{type(error).__name__}: {text}")
    found = torch.stack([_inner(second, u) for u in truth.directions]).cpu().double()
    # Medians are robust to directions along which a step crosses a kink and two step sizes agree by chance.
    difference, *sizes = (float(x.abs().median()) for x in (found - truth.derivatives, found, truth.derivatives))
    size = max(sizes)
    right = difference <= _TOLERANCE[truth.loss.dtype] * size + truth.noise
    relative = difference / size if size else 0.0
    return SecondOrderWay("right" if right else "silently wrong", relative, None)


def _by_grad(scalar: Tensor, point: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(scalar, point))


def _by_backward(scalar: Tensor, point: list[Tensor]) -> list[Tensor]:
    """Return the gradient by ``backward()``, and restore ``grad`` of all other leaves, such as a model's parameters.

    ``backward(inputs=point)`` would visit the nodes that ``torch.autograd.grad`` visits, and miss errors of others.
    """
    seen: set[Any] = set()
    stack = [scalar.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(following for following, _ in node.next_functions)
    leaves = [node.variable for node in seen if hasattr(node, "variable")]
    before = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None  # so that backward() does not add in place
    try:
        scalar.backward()
        return [cast(Tensor, x.grad) for x in point]
    finally:
        for leaf, grad in zip(leaves, before, strict=True):
            leaf.grad = grad
