"""Layers for a step of decoding: without gradients, few rows run on kernels whose calls are cheap."""

import torch
from torch import Tensor, nn

from eaml_ext.nn._row_invariant import project
from eaml_ext.nn.submodule import is_plain
from eaml_ext.ops.rms_norm import rms_norm
from eaml_ext.ops.row_invariant_linear import reads_in_place, row_invariant_linear


def linear_step(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)`` for a step of decoding: few rows take the time of reading the weight once.

    A plain ``nn.Linear`` on a CPU runs on the package's kernel, where torch's product takes up to twice as long. It
    runs so without gradients, for up to eight rows, on float32, float64, bfloat16 and float16. Every other layer, a
    quantised one among them, and every other input is a call of the layer.

    Args:
        layer: maps ``(*, inputs)`` to ``(*, outputs)``.
        x: ``(*, inputs)``, floating.

    Returns:
        ``(*, outputs)``, dtype of ``x``.

    >>> head, x = nn.Linear(30, 8), torch.randn(1, 30)
    >>> with torch.no_grad():
    ...     torch.allclose(linear_step(head, x), head(x), atol=1e-5)
    True
    """
    if is_plain(layer, nn.Linear):
        return project_step(x, layer.weight, layer.bias)
    y: Tensor = layer(x)
    return y


def norm_step(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)`` for a step of decoding: one call where torch makes an RMS norm of six.

    A plain ``nn.RMSNorm`` of the last dimension runs on the package's kernel, on a CPU without gradients. In reduced
    precision it needs an ``eps`` of its own. Every other layer and every other input is a call of the layer.

    Args:
        layer: maps ``(*, size)`` to the same shape.
        x: ``(*, size)``, floating.

    Returns:
        ``(*, size)``, dtype of ``x``.

    >>> norm, x = nn.RMSNorm(30), torch.randn(1, 30)
    >>> with torch.no_grad():
    ...     torch.allclose(norm_step(norm, x), norm(x), atol=1e-5)
    True
    """
    if is_plain(layer, nn.RMSNorm) and layer.normalized_shape == x.shape[-1:]:
        eps = layer.eps
        if eps is None and x.dtype in (torch.float32, torch.float64):  # torch's own choice in reduced precision varies
            eps = torch.finfo(x.dtype).eps
        if eps is not None:
            return rms_norm(x, layer.weight, eps)
    y: Tensor = layer(x)
    return y


def project_step(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`linear_step` of a plain layer with these weights."""
    return (row_invariant_linear if reads_in_place(x, weight, bias) else project)(x, weight, bias)
