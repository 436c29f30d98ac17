"""CudaCapturer without a GPU: its calls of torch.cuda, which are replaced, and what it leaves after a failure."""

import contextlib
import math
import warnings
from types import SimpleNamespace

import pytest
import torch

from eaml_ext.meta import _cuda_graphs
from eaml_ext.meta._cuda_graphs import CudaCapturer

DEVICE = torch.device("cuda", 0)


class Cuda:
    """The state of a device, and the names of torch.cuda that the capturer calls."""

    def __init__(self):
        self.mode, self.generator, self.stream, self.pools, self.captures = 0, 7, "user", [], []
        self.end_fails = False

    def names(self):
        return {
            "graph_pool_handle": lambda: (0, 1),
            "Stream": lambda device: "capture",
            "current_stream": lambda device: self.stream,
            "is_current_stream_capturing": lambda: self.stream == "capture",
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
            "get_rng_state": lambda device: self.generator,
            "set_rng_state": lambda state, device: setattr(self, "generator", state),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.captures.append("replay")),
            "stream": self.on_stream,
            "graph": self.capturing,
        }

    @contextlib.contextmanager
    def on_stream(self, stream):
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextlib.contextmanager
    def capturing(self, graph, pool=None, stream=None, capture_error_mode="global"):
        """As torch.cuda.graph, which does not restore the stream where the end of the capture raises."""
        self.error_mode = capture_error_mode
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.captures.append(pool)
            if self.end_fails:
                self.end_fails = False
                raise RuntimeError("capture invalidated")
            self.stream = before


@pytest.fixture
def cuda(monkeypatch):
    state = Cuda()
    for name, value in state.names().items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(_cuda_graphs, "end_allocate_to_pool", lambda device, pool: state.pools.append((device, pool)))
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *sizes, device=None: zeros(*sizes))
    return state


def test_ready_on_the_stream_of_construction_alone(cuda):
    capturer = CudaCapturer(DEVICE)
    assert capturer.ready()
    cuda.stream = "other"
    assert not capturer.ready()


@pytest.mark.parametrize("fails", [False, True])
def test_check_leaves_mode_and_generator_as_before(cuda, fails):
    capturer, modes = CudaCapturer(DEVICE), []

    def function():
        modes.append(cuda.mode)
        cuda.generator = 8
        if fails:
            raise ValueError("no loss")

    with pytest.raises(ValueError, match="no loss") if fails else contextlib.nullcontext():
        capturer.check(function)
    assert modes == ["warn"] and (cuda.mode, cuda.generator) == (0, 7)


def test_check_function_that_waits_raises_its_line(cuda):
    def function():
        warnings.warn("something else", UserWarning, stacklevel=1)
        warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)

    line = function.__code__.co_firstlineno + 2
    with pytest.raises(RuntimeError, match=f"test_cuda_capturer.py:{line} waits for the GPU$"):
        CudaCapturer(DEVICE).check(function)


def test_check_function_that_draws_on_the_host_raises(cuda):
    with pytest.raises(RuntimeError, match="draws random numbers on the host"):
        CudaCapturer(DEVICE).check(lambda: torch.rand(1))


def test_capture_runs_on_capture_stream_without_autocast_cache(cuda):
    capturer = CudaCapturer(DEVICE)
    found, replay = capturer.capture(lambda: [cuda.stream, torch.is_autocast_cache_enabled()])
    assert found == ["capture", False] and torch.is_autocast_cache_enabled() and cuda.stream == "user"
    replay()
    assert cuda.captures == [(0, 1), "replay"] and not cuda.pools and cuda.error_mode == "thread_local"


def test_capture_that_cannot_end_restores_stream_allocator_and_generator(cuda):
    capturer, cuda.end_fails = CudaCapturer(DEVICE), True
    with pytest.raises(RuntimeError, match="capture invalidated"):
        capturer.capture(lambda: [torch.full((1,), math.pi)])
    assert cuda.stream == "user" and torch.is_autocast_cache_enabled()
    assert cuda.pools == [(DEVICE, (0, 1))]
    assert cuda.captures == [(0, 1), None]  # the second is empty and ends, which resets the generator
