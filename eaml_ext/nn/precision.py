"""Full precision for parameters and states beside bfloat16 and float16; complex numbers as pairs of real ones."""

import torch
from torch import Tensor


def to_opmath(x: Tensor) -> Tensor:
    """Convert bfloat16 and float16 to float32, in which torch computes them; other dtypes stay.

    Args:
        x: ``(*)``, floating.
    """
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def as_complex(x: Tensor) -> Tensor:
    """``(*, 2)`` real -> ``(*)`` complex, in full precision."""
    x = to_opmath(x)
    return torch.complex(x[..., 0], x[..., 1])


def as_real(x: Tensor) -> Tensor:
    """``(*)`` complex -> ``(*, 2)`` real."""
    return torch.stack([x.real, x.imag], dim=-1)


def zero_order_hold(z: Tensor) -> Tensor:
    """``exp(z) - 1`` of a complex z ``(*)``, without the cancellation near 0."""
    a, b = z.real, z.imag
    return torch.complex(torch.expm1(a) * b.cos() - 2 * (b / 2).sin().square(), a.exp() * b.sin())
