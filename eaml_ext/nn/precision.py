"""What the scan keeps in full precision beside half types, and complex numbers as pairs of reals."""

import torch
from torch import Tensor


def to_opmath(x: Tensor) -> Tensor:
    """Half types as float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def as_complex(x: Tensor) -> Tensor:
    """``(*, 2)`` real -> ``(*)`` complex, in full precision."""
    x = to_opmath(x)
    return torch.complex(x[..., 0], x[..., 1])


def as_real(x: Tensor) -> Tensor:
    """``(*)`` complex -> ``(*, 2)`` real."""
    return torch.stack([x.real, x.imag], dim=-1)


def zero_order_hold(z: Tensor) -> Tensor:
    """``exp(z) - 1`` of a complex z, without the cancellation near 0."""
    a, b = z.real, z.imag
    return torch.complex(torch.expm1(a) * b.cos() - 2 * (b / 2).sin().square(), a.exp() * b.sin())
