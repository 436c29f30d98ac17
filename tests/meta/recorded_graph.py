"""A graph of recorded operations on the CPU, with the rules of a CUDA graph."""

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            raise RuntimeError(f"{func} waits for the GPU")
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, Tensor):
                self.before.setdefault(t.untyped_storage().data_ptr(), (t.detach(), t.detach().clone()))
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class RecordingCapturer:
    """A capturer for the CPU: a replay repeats the operations on the memory of the capture, without any Python.

    As on a GPU, a capture changes no tensor from outside and no generator, and outputs have no values before a replay.
    """

    device_type = "cpu"

    def __init__(self, device):
        self.is_ready = True

    def ready(self):
        return self.is_ready

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
                for func, args, kwargs, out in recorder.calls:
                    for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                        if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                            old.detach().copy_(new)

        return outputs, replay
