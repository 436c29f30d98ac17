"""Every private name of torch that the package uses, with the versions of torch it was tried with.

The other modules import these names from here, so that a new release of torch needs changes in one file.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.modules.module as torch_module
from torch import nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten as tree_flatten  # 2.13.0
from torch.utils._pytree import tree_leaves as tree_leaves  # 2.11.0, 2.13.0
from torch.utils._pytree import tree_map as tree_map  # 2.11.0, 2.13.0
from torch.utils._pytree import tree_unflatten as tree_unflatten  # 2.13.0

# 2.11.0, 2.13.0: whether a tensor is the stand-in of a torch.func transform, whose numbers cannot be read.
is_functorch_wrapped_tensor = torch._C._functorch.is_functorch_wrapped_tensor

# 2.11.0, 2.13.0: copies a list of tensors into another in one kernel.
foreach_copy_ = torch._foreach_copy_

# 2.11.0, 2.13.0: whether autocast is enabled for any device type.
is_any_autocast_enabled = torch._C._is_any_autocast_enabled

# 2.11.0, 2.13.0: the base classes of normalisation layers that may keep running statistics.
RUNNING_STATISTICS_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)

# 2.11.0, 2.13.0: the attributes that every module has, among them the dicts of tensors, submodules and hooks.
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))

# 2.11.0, 2.13.0: the innermost transform of torch.func, None outside of all.
_peek_interpreter_stack = torch._C._functorch.peek_interpreter_stack


def transforms_active() -> bool:
    """Return whether a transform of torch.func or a level of forward-mode differentiation is active.

    Tried with 2.11.0, 2.13.0.
    """
    level: int = forward_ad._current_level
    return level >= 0 or _peek_interpreter_stack() is not None


def has_kernel(op: str, dispatch_key: str) -> bool:
    """Return whether ``op`` (``eaml_ext::knn``) has a kernel of its own for ``CPU`` or ``CUDA``.

    Tried with 2.11.0, 2.13.0.
    """
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(op, dispatch_key))


@contextlib.contextmanager
def autograd_in_kernel() -> Iterator[None]:
    """Record gradients inside a kernel, where the dispatcher has disabled autograd.

    Dispatch modes such as FlopCounterMode exclude more keys than autograd's own; all of them are included again.
    Tried with 2.11.0, 2.13.0.
    """
    keys, exclude = torch._C.DispatchKey, torch._C._SetExcludeDispatchKeyGuard
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        for key in (keys.AutogradFunctionality, keys.ADInplaceOrView, keys.Conjugate, keys.Negative):
            stack.enter_context(exclude(key, False))
        yield


def own_parameters(module: nn.Module) -> dict[str, Any]:
    """Return the dict in which ``module`` stores its parameters, without those of submodules.

    A value is a Parameter or None; functional calls put plain tensors in their place.
    Tried with 2.11.0, 2.13.0.
    """
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Any]:
    """Return the dict in which ``module`` stores its buffers, tensors or None, without those of submodules.

    Tried with 2.11.0, 2.13.0.
    """
    return module._buffers


def own_submodules(module: nn.Module) -> dict[str, Any]:
    """Return the direct submodules of ``module`` by name, modules or None.

    Tried with 2.11.0, 2.13.0.
    """
    return dict(module._modules.items())  # that of a ScriptModule is no dict


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of ``module`` besides its tensors, its submodules and those of every module.

    Tried with 2.11.0, 2.13.0.
    """
    return {name: value for name, value in vars(module).items() if name not in _MODULE_ATTRIBUTES}


def end_allocate_to_pool(device: torch.device, pool: tuple[int, int]) -> None:
    """Let torch's allocator leave the memory pool of a CUDA graph whose capture failed, where it is still in it.

    Read in the sources of 2.13.0, not yet run on a GPU.
    """
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device.index, pool)


def has_hooks(module: nn.Module) -> bool:
    """Return whether a call of ``module`` runs hooks, its own or global ones: the test of ``nn.Module.__call__``.

    Tried with 2.11.0, 2.13.0.
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def run_frame_eagerly(function: Callable[..., Any]) -> None:
    """Keep torch.compile from tracing the frame of a function, and frames within, if it is the outermost one.

    The function of ``allow_in_graph`` is such a frame where its caller is not traced. 2.13.0; where the names are
    missing, nothing is done.
    """
    with contextlib.suppress(ImportError):
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

        set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))


def hooks(module: nn.Module | None) -> list[tuple[Any, ...]]:
    """Return the hooks that a call of ``module`` runs, those of every module if it is None: kind, function, options.

    Tried with 2.13.0.
    """
    owner: Any = torch_module if module is None else module
    prefix = "_global" if module is None else ""

    def store(name: str) -> dict[int, Any]:
        return getattr(owner, f"{prefix}_{name}", {})

    kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    options = ("forward_hooks_with_kwargs", "forward_pre_hooks_with_kwargs", "forward_hooks_always_called")
    found = [(kind, number, hook) for kind in kinds for number, hook in store(kind).items()]
    return [(kind, hook, *[number in store(option) for option in options]) for kind, number, hook in found]


def dispatch_mode_active() -> bool:
    """Return whether a mode such as FakeTensorMode or FlopCounterMode receives every op.

    Tried with 2.13.0.
    """
    return torch._C._len_torch_dispatch_stack() > 0


def record_onnx_nodes(nodes: Sequence[Any]) -> None:
    """Add nodes to those of the op that torch.onnx.export is translating.

    ONNX Script's own functions add a node of an op without a fixed number of outputs, such as Scan, with one output.
    Tried with 2.13.0.
    """
    from onnxscript import evaluator

    recorder: Any = evaluator.default()  # torch.onnx._internal.exporter._building.OpRecorder
    recorder.nodes.extend(nodes)


def is_check_of_op(error: Exception, op: str) -> bool:
    """Return whether a check in the C++ of ``op`` raised ``error``: its sentence begins with the name.

    torch makes a ValueError of std::invalid_argument, and from 2.15.0 on a RuntimeError. Tried with 2.11.0 to 2.15.0.
    """
    return isinstance(error, ValueError) or str(error).startswith(op)


def is_compiler_error(error: BaseException) -> bool:
    """Return whether torch.compile raised ``error`` because it cannot compile a function.

    Tried with 2.11.0, 2.13.0.
    """
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


__all__ = [
    "RUNNING_STATISTICS_NORMS",
    "autograd_in_kernel",
    "dispatch_mode_active",
    "end_allocate_to_pool",
    "foreach_copy_",
    "has_hooks",
    "has_kernel",
    "hooks",
    "is_any_autocast_enabled",
    "is_check_of_op",
    "is_compiler_error",
    "is_functorch_wrapped_tensor",
    "own_buffers",
    "own_parameters",
    "own_submodules",
    "plain_attributes",
    "record_onnx_nodes",
    "transforms_active",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
]
