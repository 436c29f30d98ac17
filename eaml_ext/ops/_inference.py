"""When a kernel of the CPU without derivatives may take its arguments as they are."""

from collections.abc import Iterable

import torch
from torch import Tensor

from eaml_ext._torch_compat import dispatch_mode_active, is_any_autocast_enabled, transforms_active

PLAIN = frozenset((Tensor, torch.nn.Parameter))  # a quantised weight may be of a derived class


def may_run_kernel(args: Iterable[Tensor | None]) -> bool:
    """Return whether nothing but a kernel would handle a call on these tensors, of any shape and dtype.

    They must be dense tensors on the CPU, of torch's own classes: others stand for numbers that they do not store.
    Autograd, torch.compile, torch.func, autocast and dispatch modes must have no part in the call.
    """
    if torch.compiler.is_compiling():  # first: tests of sizes would become conditions of an exported program
        return False
    given = [v for v in args if v is not None]
    if not all(type(v) in PLAIN and v.is_cpu and v.layout is torch.strided for v in given):
        return False
    if torch.is_grad_enabled() and any(v.requires_grad for v in given):
        return False
    return not (transforms_active() or is_any_autocast_enabled() or dispatch_mode_active())
