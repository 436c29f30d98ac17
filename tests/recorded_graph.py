"""A graph of recorded operations on the CPU, with the rules of a CUDA graph."""

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from eaml_ext.meta._cuda_capturer import NotCapturableError


def waits(func, args):
    """Return whether the host reads the result or its shape: a number, or what a mask selects."""
    packet = func.overloadpacket
    if packet in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


def fixed(nest):
    """Return the nest with tensors at the present addresses, which no assignment to ``.data`` changes."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, nest)


class Recorder(TorchDispatchMode):
    """Records all operations, and refuses those for which the host would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.before = {}  # by address of its storage: a tensor from outside and its numbers

    def restore(self):
        """Undo the changes of tensors from outside."""
        for t, numbers in self.before.values():
            t.copy_(numbers)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if waits(func, args):
            raise NotCapturableError(f"{func} waits for the GPU")
        args, kwargs, given = *fixed((args, kwargs or {})), tree_leaves((args, kwargs))
        storages = {t.untyped_storage().data_ptr() for t in given if isinstance(t, Tensor)}
        for t in given:
            if isinstance(t, Tensor):
                self.before.setdefault(t.untyped_storage().data_ptr(), (t.detach(), t.detach().clone()))
        out = func(*args, **kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        is_view = all(t.untyped_storage().data_ptr() in storages for t in made) and not func._schema.is_mutable
        if not is_view:
            self.calls.append((func, args, kwargs, [t.detach() for t in made]))
        return out


class RecordingCapturer:
    """A capturer for the CPU: a replay repeats the operations on the memory of the capture, without any Python.

    As on a GPU, a capture changes no tensor from outside and no generator, and outputs have no values before a replay.
    """

    device_type = "cpu"

    stream = "default"

    def __init__(self, device):
        pass

    @classmethod
    def current_stream(cls, device):
        return cls.stream

    def check(self, function):
        state = torch.get_rng_state()
        try:
            with Recorder():
                function()
        finally:
            torch.set_rng_state(state)

    def capture(self, function):
        state, recorder = torch.get_rng_state(), Recorder()
        with recorder:
            outputs = function()
        torch.set_rng_state(state)
        with torch.no_grad():
            recorder.restore()
            for t in outputs:
                t.fill_(math.nan)

        def replay():
            with torch.no_grad():
                for func, args, kwargs, made in recorder.calls:
                    out = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
                    for old, new in zip(made, out, strict=True):
                        if old.data_ptr() != new.data_ptr():
                            old.copy_(new)

        return outputs, replay
