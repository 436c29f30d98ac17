"""When an op without derivatives may take its arguments as they are."""

from collections.abc import Iterable

import torch
from torch import Tensor

from eaml_ext._torch_compat import dispatch_mode_active, is_any_autocast_enabled, transforms_active

PLAIN = frozenset((Tensor, torch.nn.Parameter))  # a quantised weight may be of a derived class
_PLAIN_OR_NONE = PLAIN | {type(None)}


def may_run_kernel(args: Iterable[Tensor | None]) -> bool:
    """Return whether nothing but a kernel would see a call: no autograd, compiler, transform, autocast or mode.

    Tensors of derived classes stand for other numbers than they store.
    """
    args = tuple(args)
    if torch.compiler.is_compiling() or not _PLAIN_OR_NONE.issuperset(map(type, args)):
        return False
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in args):
        return False
    return not (transforms_active() or is_any_autocast_enabled() or dispatch_mode_active())
