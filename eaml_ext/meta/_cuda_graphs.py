"""y = f(x) by replay: the kernels of f are captured once in a CUDA graph and launched together from then on.

A function of many small kernels is bound by their launches, not by the GPU. ``torch.cuda.graph`` captures the whole
function, inner gradients and second derivatives included, because no gradient crosses its boundary.
``torch.cuda.make_graphed_callables`` has no second derivative. The graph trees of ``torch.compile`` need Inductor and
one compilation for each shape, and do not bound the number of graphs. The optimizer's step stays outside: it may be any
optimizer with any schedule, ranks sum gradients before it, and a gradient that is not finite skips it.

*Requirements of a captured function.* A replay runs the kernels of the capture and no Python. So the function

- returns tensors that depend on its inputs, on tensors at fixed addresses and on Python values in the key alone
  (:class:`eaml_ext.meta._python_state.PythonState` collects both);
- does not wait for the GPU and reads no number on the host: no ``.item()``, ``bool(tensor)``, ``.cpu()``, boolean
  indexing or ``nonzero``;
- draws random numbers only from torch's default generator of the device, whose state a replay advances;
- has no side effect in Python that matters: hooks, counters and prints happen while it is captured.

:class:`CudaCapturer` detects a function that waits or that draws random numbers on the host. The cache then warns once,
with the reason, and runs all functions as usual.
"""

from __future__ import annotations

import contextlib
import random
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from eaml_ext._torch_compat import end_allocate_to_pool, foreach_copy_, transforms_active, tree_leaves, tree_map
from eaml_ext.meta._batching import caller_level

MAX_GRAPHS = 16  # a graph holds its inputs, its outputs and some MB of launch parameters

TensorFunction = Callable[..., list[Tensor]]
"""``(*inputs) -> tensors``."""


class Capturer(Protocol):
    """Captures functions on one device.

    Attributes:
        device_type: the type of the devices for which a capturer can be made.
    """

    device_type: str

    def __init__(self, device: torch.device) -> None: ...

    def ready(self) -> bool:
        """Return whether this thread may capture and replay now."""

    def check(self, function: Callable[[], Any]) -> None:
        """Run the function once, without an effect on random numbers; raise RuntimeError if it cannot be captured."""

    def capture(self, function: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        """Capture the kernels of the function without running them; return its outputs and the call that runs them."""


class CudaCapturer:
    """Captures functions on a CUDA device; the graphs share one pool of memory.

    Graphs are replayed on the stream that was current when the capturer was made, one after the other, so that they can
    share memory and static inputs. On other streams :meth:`ready` is False.
    """

    device_type = "cuda"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._capture_stream = torch.cuda.Stream(device)
        self._replay_stream = torch.cuda.current_stream(device)

    def ready(self) -> bool:
        """Return whether the stream is the one of the replays, and is not captured by the caller."""
        current = torch.cuda.current_stream(self._device)
        return bool(current == self._replay_stream) and not torch.cuda.is_current_stream_capturing()

    def check(self, function: Callable[[], Any]) -> None:
        """Run the function; raise RuntimeError if it waits for the GPU or draws random numbers on the host.

        A capture that fails leaves torch's allocator and generator in a state of capture, so these faults are found
        before.
        """
        mode, state = torch.cuda.get_sync_debug_mode(), torch.cuda.get_rng_state(self._device)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")  # not "error", which would raise in other threads
            try:
                refuse_host_randomness(function)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
                torch.cuda.set_rng_state(state, self._device)
        for each in caught:
            if "called a synchronizing CUDA operation" in str(each.message):
                raise RuntimeError(f"{each.filename}:{each.lineno} waits for the GPU")

    def capture(self, function: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        """See :meth:`Capturer.capture`."""
        graph, caches = torch.cuda.CUDAGraph(), torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # a cached cast would be freed when autocast ends
        try:
            with (
                torch.cuda.stream(self._replay_stream),  # restores the stream where the end of a failed capture raises
                # Threads that pin memory or wait for ranks may call CUDA meanwhile.
                torch.cuda.graph(
                    graph, pool=self._pool, stream=self._capture_stream, capture_error_mode="thread_local"
                ),
            ):
                outputs = function()
        except BaseException:
            self._recover()
            raise
        finally:
            torch.set_autocast_cache_enabled(caches)
        return outputs, graph.replay

    def _recover(self) -> None:
        """Reset torch's allocator and generator, which a capture that cannot end leaves as they are in a capture."""
        end_allocate_to_pool(self._device, self._pool)
        with (
            contextlib.suppress(RuntimeError),
            torch.cuda.stream(self._replay_stream),
            torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self._capture_stream),
        ):
            torch.zeros(1, device=self._device)  # the end of a capture resets the generator


@dataclass
class _Graph:
    """A function on inputs of fixed shapes.

    Attributes:
        addresses: of the tensors that the function reads or writes in place.
        inputs, outputs: the static tensors of the graph.
        replay: runs the graph; None before it is captured.
    """

    addresses: Hashable
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    replay: Callable[[], None] | None = None


class GraphCache:
    """Runs functions of tensors, from the second call with equal shapes on by replaying a graph.

    The first call with a key runs as usual, because libraries are initialised and kernels tuned in it; shapes that do
    not return cost nothing. The second is captured first. The least recently used graph is dropped where there are too many.
    A graph whose parameters or buffers have moved in memory is dropped, too. Results are new tensors. Copies and
    pickles of a cache are empty caches.

    Args:
        where: begins the warning.
        make_capturer: makes the capturer for a device, in the first call on it.
        max_graphs: how many graphs are kept.

    Attributes:
        replays: how many calls were replayed.
    """

    def __init__(self, where: str, make_capturer: type[Capturer] = CudaCapturer, max_graphs: int = MAX_GRAPHS) -> None:
        self._where, self._make_capturer, self._max_graphs = where, make_capturer, max_graphs
        self._capturers: dict[torch.device, Capturer] = {}
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._lock = threading.Lock()
        self._failed = False
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
            key: equal for calls whose functions differ in ``inputs`` and in the numbers of ``in_place`` alone.
            inputs: tensors of any shape, at least one, the first on the device of the graph; copied into static ones.
            in_place: tensors that the function reads or writes at their own addresses.
        """
        capturer = self._capturer(inputs[0].device)
        if capturer is None or not self._lock.acquire(blocking=False):  # another thread uses the static tensors
            return function(*inputs)
        try:
            key = (key, *map(_layout, inputs), *_settings(inputs[0].device))
            addresses = tuple([(t.data_ptr(), t.stride(), *_layout(t)) for t in in_place])
            graph = self._graphs.pop(key, None)
            if graph is None or graph.addresses != addresses:
                results = function(*inputs)
                graph = _Graph(addresses)
            elif graph.replay is not None or self._capture(capturer, graph, function, inputs, in_place):
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
        tensors = [leaf for leaf in tree_leaves(nest) if isinstance(leaf, Tensor)]

        def rebuilt(*given: Tensor) -> list[Tensor]:
            entries = iter(given)
            return function(tree_map(lambda leaf: next(entries) if isinstance(leaf, Tensor) else leaf, nest))

        structure = repr(tree_map(lambda leaf: "tensor" if isinstance(leaf, Tensor) else leaf, nest))
        return self.run(rebuilt, (key, structure), tensors, in_place)

    def _capturer(self, device: torch.device) -> Capturer | None:
        """The capturer of a device; None where functions run as usual."""
        if not self.serves(device) or torch.compiler.is_compiling() or transforms_active():
            return None
        if device not in self._capturers:
            self._capturers[device] = self._make_capturer(device)
        capturer = self._capturers[device]
        return capturer if capturer.ready() else None

    def _replay(self, graph: _Graph, inputs: Sequence[Tensor]) -> list[Tensor]:
        assert graph.replay is not None
        foreach_copy_(graph.inputs, list(inputs))
        graph.replay()
        results = [torch.empty_like(t) for t in graph.outputs]
        foreach_copy_(results, graph.outputs)
        self.replays += 1
        return results

    def _capture(
        self,
        capturer: Capturer,
        graph: _Graph,
        function: TensorFunction,
        inputs: Sequence[Tensor],
        in_place: Sequence[Tensor],
    ) -> bool:
        """Capture the function; return False, without graphs from then on and after a warning, where that fails."""
        try:
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
        except Exception as error:
            self._failed = True
            self._graphs.clear()
            while isinstance(error.__context__, Exception):
                error = error.__context__  # the end of an invalid capture hides the first error
            reason = str(error).partition("\n")[0]
            text = f"{self._where}: no CUDA graph can be captured, kernels are launched one by one: {reason}"
            warnings.warn(text, RuntimeWarning, stacklevel=caller_level())
            return False


def refuse_host_randomness(function: Callable[[], Any]) -> None:
    """Run the function; raise RuntimeError if it draws random numbers from torch's or Python's generator on the host.

    The generators are then as before.
    """
    python, of_torch = random.getstate(), torch.get_rng_state()
    try:
        function()
    finally:
        drew = random.getstate() != python or not torch.equal(torch.get_rng_state(), of_torch)
        if drew:
            random.setstate(python)
            torch.set_rng_state(of_torch)
    if drew:
        raise RuntimeError("it draws random numbers on the host")


def _layout(t: Tensor) -> tuple[Hashable, ...]:
    return t.shape, t.dtype, t.device


def _settings(device: torch.device) -> tuple[Hashable, ...]:
    """The global settings of torch that choose kernels and dtypes."""
    return (
        torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
    )
