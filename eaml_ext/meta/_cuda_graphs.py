"""y = f(x) by replay: the kernels of f are captured once in a CUDA graph and launched together from then on.

A function of many small kernels is bound by their launches, not by the GPU. ``torch.cuda.graph`` captures the whole
function, inner gradients and second derivatives included, because no gradient crosses its boundary.
``torch.cuda.make_graphed_callables`` has no second derivative. The graph trees of ``torch.compile`` need Inductor and
one compilation for each shape, and do not bound the number of graphs. The optimizer's step stays outside: it may be any
optimizer with any schedule, ranks sum gradients before it, and a gradient that is not finite skips it.

*Requirements of a captured function.* A replay runs the kernels of the capture and no Python. So the function

- returns tensors that depend on its inputs, on tensors at fixed addresses and on Python values in the key alone
  (:class:`eaml_ext.meta._python_state.PythonState` collects both), all tensors on one device;
- does not wait for the GPU and reads no number on the host: no ``.item()``, ``bool(tensor)``, ``.cpu()``, boolean
  indexing or ``nonzero``;
- draws random numbers only from torch's default generator of the device, whose state a replay advances;
- has no side effect in Python that matters: hooks, counters and prints happen while it is captured.

:class:`eaml_ext.meta._cuda_capturer.CudaCapturer` detects a function that waits or that draws random numbers on the
host. The cache then warns once, with the reason, and runs all functions as usual.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from eaml_ext._torch_compat import (
    dispatch_mode_active,
    foreach_copy_,
    transforms_active,
    tree_flatten,
    tree_unflatten,
)
from eaml_ext.meta._batching import caller_level
from eaml_ext.meta._cuda_capturer import Capturer, CudaCapturer, NotCapturableError
from eaml_ext.meta._python_state import NoState, PythonState
from eaml_ext.ops.selective_scan._split_invariance import is_split_invariant

MAX_GRAPHS = 16  # a graph holds its inputs, its outputs and some MB of launch parameters

TensorFunction = Callable[..., list[Tensor]]
"""``(*inputs) -> tensors``."""

# Held during a capture, because the debug mode and the warnings of its check belong to the whole process.
_CAPTURE_LOCK = threading.Lock()


@dataclass
class _Graph:
    """A function on inputs of fixed shapes.

    Attributes:
        addresses: where the tensors are that the function reads or writes in place.
        inputs, outputs: the static tensors of the graph.
        replay: runs the graph; None before it is captured.
    """

    addresses: Hashable
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    replay: Callable[[], None] | None = None


class GraphCache(NoState):
    """Runs functions of tensors, from the second call with equal shapes on by replaying a graph.

    The first call with a key runs as usual, because libraries are initialised and kernels tuned in it; a shape that
    occurs once has no cost. The second is captured first. The least recently used graph is dropped where there are too
    many. A graph whose parameters or buffers have moved in memory is dropped, too. Results are new tensors. Copies and
    pickles of a cache are empty caches.

    A function with a tensor that graphs cannot have, on another device or sparse, runs as usual, after one warning.
    A warning is also given once if no graph was used in ``2 * max_graphs`` calls in a row.

    Args:
        where: begins the warning.
        make_capturer: makes the capturer for a device, in the first call on it.
        max_graphs: how many graphs are kept.

    Attributes:
        replays: how many calls were replayed.
    """

    def __init__(self, where: str, make_capturer: type[Capturer] = CudaCapturer, max_graphs: int = MAX_GRAPHS) -> None:
        self._where, self._make_capturer, self._max_graphs = where, make_capturer, max_graphs
        self._capturers: dict[tuple[torch.device, Hashable], Capturer] = {}
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._lock = threading.Lock()
        self._failed = self._warned = False
        self._misses = 0  # calls without a graph since the last replay
        self.replays = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._where, self._make_capturer, self._max_graphs)

    def __len__(self) -> int:
        return sum(graph.replay is not None for graph in self._graphs.values())

    def serves(self, device: torch.device) -> bool:
        """Return whether functions on this device are captured."""
        return not self._failed and device.type == self._make_capturer.device_type

    def run(
        self, function: TensorFunction, key: Hashable, inputs: Sequence[Tensor], in_place: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        """Return ``function(*inputs)``, replayed where a graph of it exists.

        Args:
            function: see the requirements at the top of this module.
            key: equal if two calls compute the same function of ``inputs`` and of the numbers of ``in_place``.
            inputs: tensors of any shape, at least one, the first on the device of the graph; copied into static ones.
            in_place: tensors that the function reads or writes at their own addresses.
        """
        device = inputs[0].device
        stream = self._stream(device)
        if stream is None or not self._lock.acquire(blocking=False):  # another thread uses the static tensors
            return function(*inputs)
        try:
            obstacle = _obstacle(device, [*inputs, *in_place])
            if obstacle is not None:
                self._warn_once(f"no CUDA graph can be captured, {obstacle}")
                return function(*inputs)
            key = (key, stream, *map(_layout, inputs), *_settings(device))
            addresses = tuple([(t.data_ptr(), t.stride(), *_layout(t)) for t in in_place])
            graph = self._graphs.pop(key, None)
            if graph is None or graph.addresses != addresses:
                results = function(*inputs)
                graph = _Graph(addresses)
                self._count_miss()
            elif graph.replay is not None or self._capture(device, stream, graph, function, inputs, in_place):
                results = self._replay(graph, inputs)
            else:
                return function(*inputs)
            self._graphs[key] = graph  # the most recently used is the last
            while len(self._graphs) > self._max_graphs:
                self._graphs.popitem(last=False)
            return results
        finally:
            self._lock.release()

    def run_nested(
        self, function: Callable[[Any], list[Tensor]], key: Hashable, nest: Any, in_place: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        """Return ``function(nest)`` as :meth:`run`, where the tensors of a nest are the inputs.

        Args:
            function: see the requirements at the top of this module.
            key, in_place: as in :meth:`run`.
            nest: dicts, lists and tuples with at least one tensor; their other values belong to the key.
        """
        leaves, structure = tree_flatten(nest)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        others = PythonState(*[Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves])

        def rebuilt(*given: Tensor) -> list[Tensor]:
            entries = iter(given)
            replaced = [next(entries) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            return function(tree_unflatten(replaced, structure))

        return self.run(rebuilt, (key, structure, others.key), tensors, [*in_place, *others.tensors])

    def _stream(self, device: torch.device) -> Hashable | None:
        """Return the stream of the replays; None where functions run as usual."""
        if not self.serves(device) or torch.compiler.is_compiling() or transforms_active() or dispatch_mode_active():
            return None
        return self._make_capturer.current_stream(device)

    @torch.no_grad()  # autograd would record the copies of an input with a history, one after the other
    def _replay(self, graph: _Graph, inputs: Sequence[Tensor]) -> list[Tensor]:
        assert graph.replay is not None
        foreach_copy_(graph.inputs, list(inputs))
        graph.replay()
        results = [torch.empty_like(t) for t in graph.outputs]
        foreach_copy_(results, graph.outputs)
        self.replays += 1
        self._misses = 0
        return results

    def _capture(
        self,
        device: torch.device,
        stream: Hashable,
        graph: _Graph,
        function: TensorFunction,
        inputs: Sequence[Tensor],
        in_place: Sequence[Tensor],
    ) -> bool:
        """Capture the function; return False if it has no graph, after a warning if the cache captures no more."""
        if not _CAPTURE_LOCK.acquire(blocking=False):
            return False
        try:
            if (device, stream) not in self._capturers:
                self._capturers[device, stream] = self._make_capturer(device)
            capturer = self._capturers[device, stream]
            before = [t.detach().clone() for t in in_place]
            try:
                capturer.check(lambda: function(*inputs))
            finally:
                for t, old in zip(in_place, before, strict=True):
                    if not torch.equal(t, old):
                        t.detach().copy_(old)
            graph.inputs = [t.detach().clone() for t in inputs]
            graph.outputs, graph.replay = capturer.capture(lambda: [t.detach() for t in function(*graph.inputs)])
            return True
        except torch.OutOfMemoryError:
            return False  # memory may be free later
        except NotCapturableError as error:
            self._failed = True
            self._graphs.clear()
            reason = str(error).partition("\n")[0]
            self._warn(f"no CUDA graph can be captured, kernels are launched one by one: {reason}")
            return False
        finally:
            _CAPTURE_LOCK.release()

    def _count_miss(self) -> None:
        self._misses += 1
        if self._misses == 2 * self._max_graphs:
            changing = "shapes, values or tensors on which the function depends change in every call"
            self._warn_once(f"no CUDA graph was used in {self._misses} calls, {changing}")

    def _warn_once(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(text)

    def _warn(self, text: str) -> None:
        warnings.warn(f"{self._where}: {text}", RuntimeWarning, stacklevel=caller_level())


def _obstacle(device: torch.device, tensors: Sequence[Tensor]) -> str | None:
    """Return why a graph on the device cannot read these tensors; None if it can."""
    for t in tensors:
        if is_lazy(t):
            return "a parameter is not initialised"
        if t.device != device:
            return f"tensors are on {device} and on {t.device}"
        if t.layout is not torch.strided or t.is_nested or (t.numel() and not t.data_ptr()):
            return f"a tensor is sparse, nested or has no memory: {type(t).__name__} of {t.layout}"
    return None


def _layout(t: Tensor) -> tuple[Hashable, ...]:
    return t.shape, t.dtype, t.device


def _settings(device: torch.device) -> tuple[Hashable, ...]:
    """The global settings of torch that choose kernels and dtypes."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    return (
        torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
        # The older getters raise where these have been set.
        *[owner.fp32_precision for owner in (matmul, cudnn.conv, cudnn.rnn)],
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        is_split_invariant(),
    )
