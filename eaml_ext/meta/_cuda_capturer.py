"""Capture of the kernels of one function in a CUDA graph, after a check that they can be captured."""

from __future__ import annotations

import contextlib
import random
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from eaml_ext._torch_compat import end_allocate_to_pool


class NotCapturableError(RuntimeError):
    """A graph of the function cannot be captured, for the reason that the message gives."""


class Capturer(Protocol):
    """Captures functions on one device and one stream.

    Attributes:
        device_type: the type of the devices for which a capturer can be made.
    """

    device_type: str

    def __init__(self, device: torch.device) -> None: ...

    @staticmethod
    def current_stream(device: torch.device) -> Hashable | None:
        """Return the stream on which this thread may capture and replay now; None if there is none."""

    def check(self, function: Callable[[], Any]) -> None:
        """Run the function once, without an effect on random numbers.

        Raises:
            NotCapturableError: the function cannot be captured. Its own errors are raised as they are.
        """

    def capture(self, function: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        """Capture the kernels of the function without running them; return its outputs and the call that runs them.

        Raises:
            NotCapturableError: the function cannot be captured.
        """


class CudaCapturer:
    """Captures functions on the stream of a CUDA device that is current now; the graphs share one pool of memory.

    Graphs are replayed on this stream, one after the other, so that they can share memory and static inputs.
    """

    device_type = "cuda"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._capture_stream = torch.cuda.Stream(device)
        self._replay_stream = torch.cuda.current_stream(device)

    @staticmethod
    def current_stream(device: torch.device) -> Hashable | None:
        """Return the current stream; None while the caller captures it."""
        return None if torch.cuda.is_current_stream_capturing() else torch.cuda.current_stream(device)

    def check(self, function: Callable[[], Any]) -> None:
        """Run the function; raise NotCapturableError if it waits for the GPU or draws random numbers on the host.

        A capture that fails leaves torch's allocator and generator in a state of capture, so these faults are found
        before.
        """
        mode, state = torch.cuda.get_sync_debug_mode(), torch.cuda.get_rng_state(self._device)
        with _waits_of_this_thread(show_others=mode != 0) as waits:
            torch.cuda.set_sync_debug_mode("warn")  # not "error", which would raise in other threads
            try:
                raise_on_host_randomness(function)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
                torch.cuda.set_rng_state(state, self._device)
        if waits:
            raise NotCapturableError(f"{waits[0]} waits for the GPU")

    def capture(self, function: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        """See :meth:`Capturer.capture`."""
        graph, caches = torch.cuda.CUDAGraph(), torch.is_autocast_cache_enabled()
        first: BaseException | None = None
        torch.set_autocast_cache_enabled(False)  # a cached cast would be freed when autocast ends
        try:
            with (
                torch.cuda.stream(self._replay_stream),  # restores the stream where the end of a failed capture raises
                # Threads that pin memory or wait for ranks may call CUDA meanwhile.
                torch.cuda.graph(
                    graph, pool=self._pool, stream=self._capture_stream, capture_error_mode="thread_local"
                ),
            ):
                try:
                    outputs = function()
                except BaseException as error:
                    first = error
                    raise
        except BaseException as error:
            self._recover()
            first = error if first is None else first  # the end of an invalid capture hides the first error
            if isinstance(first, RuntimeError) and not isinstance(first, torch.OutOfMemoryError):
                raise NotCapturableError(str(first)) from first
            raise first from None
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


def raise_on_host_randomness(function: Callable[[], Any]) -> None:
    """Run the function; raise NotCapturableError if it draws from torch's or Python's generator on the host.

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
        raise NotCapturableError("it draws random numbers on the host")


@contextlib.contextmanager
def _waits_of_this_thread(show_others: bool) -> Iterator[list[str]]:
    """Collect the lines at which this thread waits for the GPU, in torch's debug mode of synchronisation.

    Args:
        show_others: whether other threads show the warnings of this mode.
    """
    thread, waits = threading.get_ident(), []
    with warnings.catch_warnings():
        show = warnings.showwarning

        def collect(message: Any, category: Any, file: str, line: int, stream: Any = None, text: Any = None) -> None:
            is_wait = "called a synchronizing CUDA operation" in str(message)
            if is_wait and threading.get_ident() == thread:
                waits.append(f"{file}:{line}")
            elif show_others or not is_wait:
                show(message, category, file, line, stream, text)

        warnings.showwarning = collect  # type: ignore[assignment]  # names of arguments
        warnings.filterwarnings("always", message="called a synchronizing CUDA operation")
        yield waits
