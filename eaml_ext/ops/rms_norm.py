"""y = x / sqrt(mean(x^2) + eps) weight, in one call on a CPU: torch's own is made of six operations there."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from eaml_ext._torch_compat import has_kernel
from eaml_ext.ops._inference import may_run_kernel
from eaml_ext.ops._library import library
from eaml_ext.ops._typed import register_fake

torch.library.define("eaml_ext::rms_norm", "(Tensor x, Tensor? weight, float eps) -> Tensor")

_op = library.rms_norm.default
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_ON_CPU = has_kernel("eaml_ext::rms_norm", "CPU")


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """``torch.nn.functional.rms_norm`` over the last dimension; without derivatives a kernel of the CPU runs.

    Arithmetic is in full precision. A row has the same bits in any batch, but not those of torch's own function.

    Args:
        x: ``(*, size)``, float32, float64, bfloat16 or float16.
        weight: ``(size,)``, dtype of ``x``; ones if absent.
        eps: added to the mean of squares.

    Returns:
        ``(*, size)``, dtype of ``x``.

    Raises:
        RuntimeError: from torch, if ``weight`` has another shape.

    Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.

    >>> rms_norm(torch.tensor([1.0, -1.0, 7.0, 7.0]), torch.tensor([5.0, 5.0, 5.0, 0.0]), eps=0.0)
    tensor([ 1., -1.,  7.,  0.])
    """
    if _ON_CPU and may_run_kernel((x, weight)) and _fits(x, weight):
        y: Tensor = _op(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]), weight, eps)
        return y if x.dim() == 2 else y.reshape(x.shape)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Run :func:`rms_norm` in operations of torch, in full precision: its specification."""
    full = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(full)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight.to(full)).to(x.dtype)


torch.library.impl("eaml_ext::rms_norm", "CompositeExplicitAutograd", rms_norm_reference)


def _fits(x: Tensor, weight: Tensor | None) -> bool:
    if x.dim() == 0 or x.numel() == 0 or x.dtype not in _DTYPES:
        return False
    return weight is None or (weight.shape == x.shape[-1:] and weight.dtype == x.dtype)


@register_fake("eaml_ext::rms_norm")
def _fake(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@register_flop_formula(library.rms_norm, get_raw=True)
def _count_flops(x: Tensor, weight: Tensor | None, *_: object, **__: object) -> int:
    """Count a product and a sum for the square, and a product for the scale and the weight each."""
    return int(x.numel() * (3 if weight is None else 4))
