"""Layers whose rows have the same bits in any batch, so that single steps and a scan of a sequence are equal on a CPU.

torch's products choose the order of their sums by the number of rows. Its silu, gelu and sigmoid compute the last
elements of a tensor by other instructions than the rest. Inside :class:`row_invariant` the functions of this module
replace them; outside, they are torch's. Normalisations, ``exp``, ``tanh``, ``erf`` and sums over a row are not
replaced: torch computes each row by itself.
"""

import math
import threading
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eaml_ext._torch_compat import is_any_autocast_enabled, transforms_active
from eaml_ext.nn.submodule import is_plain
from eaml_ext.ops._inference import PLAIN
from eaml_ext.ops._sigmoid import sigmoid
from eaml_ext.ops.row_invariant_linear import is_row_invariant, row_invariant_linear


class _State(threading.local):
    active = False


_state = _State()


class row_invariant:
    """Context manager: on a CPU, a row of :func:`linear`, :func:`silu`, ... has the bits that it has alone.

    It holds for the calling thread. It has no effect on other devices, in bfloat16 and float16, under autocast, under
    transforms of ``torch.func``, in compiled functions, and for layers that are no plain ``nn.Linear``.

    >>> layer, x = nn.Linear(30, 8), torch.randn(64, 30)
    >>> with row_invariant():
    ...     torch.equal(linear(layer, x)[:1], linear(layer, x[:1]))
    True
    """

    _before = False

    def __enter__(self) -> None:
        if not torch.compiler.is_compiling():
            self._before, _state.active = _state.active, True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not torch.compiler.is_compiling():
            _state.active = self._before


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``."""
    if _applies(x) and is_plain(layer, nn.Linear):
        return project(x, layer.weight, layer.bias)
    y: Tensor = layer(x)
    return y


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias``, ``(*, inputs)``, ``(outputs, inputs)`` and ``(outputs,)`` -> ``(*, outputs)``."""
    product = row_invariant_linear if _applies(x) and type(weight) in PLAIN else F.linear
    return product(x, weight, bias)


def silu(x: Tensor) -> Tensor:
    """``x sigmoid(x)``."""
    return x * sigmoid(x) if _applies(x) else F.silu(x)


def gelu(x: Tensor) -> Tensor:
    """``x / 2 (1 + erf(x / sqrt(2)))``."""
    return 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5))) if _applies(x) else F.gelu(x)


def glu(x: Tensor) -> Tensor:
    """``a sigmoid(b)``, with the halves a and b of the last dimension."""
    if not _applies(x):
        return F.glu(x)
    a, b = x.chunk(2, dim=-1)
    return a * sigmoid(b)


def _applies(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or not _state.active:
        return False
    return is_row_invariant(x) and not (transforms_active() or is_any_autocast_enabled())
