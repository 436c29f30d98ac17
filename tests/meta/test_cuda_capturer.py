"""CudaCapturer without a GPU: its calls of torch.cuda, which are replaced, and what it leaves after a failure."""

import contextlib
import math
import random
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch

from eaml_ext.meta import _cuda_capturer
from eaml_ext.meta._cuda_capturer import CudaCapturer, NotCapturableError, raise_on_host_randomness

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
    monkeypatch.setattr(_cuda_capturer, "end_allocate_to_pool", lambda device, pool: state.pools.append((device, pool)))
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *sizes, device=None: zeros(*sizes))
    return state


def test_current_stream_that_captures_is_none(cuda):
    assert CudaCapturer.current_stream(DEVICE) == "user"
    cuda.stream = "capture"
    assert CudaCapturer.current_stream(DEVICE) is None


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
    waits = pytest.raises(NotCapturableError, match=f"test_cuda_capturer.py:{line} waits for the GPU$")
    with pytest.warns(UserWarning, match="^something else$"), waits:
        CudaCapturer(DEVICE).check(function)


def test_check_function_that_draws_on_the_host_raises(cuda):
    with pytest.raises(NotCapturableError, match="draws random numbers on the host"):
        CudaCapturer(DEVICE).check(lambda: torch.rand(1))


def test_capture_runs_on_capture_stream_without_autocast_cache(cuda):
    capturer = CudaCapturer(DEVICE)
    found, replay = capturer.capture(lambda: [cuda.stream, torch.is_autocast_cache_enabled()])
    assert found == ["capture", False] and torch.is_autocast_cache_enabled() and cuda.stream == "user"
    replay()
    assert cuda.captures == [(0, 1), "replay"] and not cuda.pools and cuda.error_mode == "thread_local"


def test_capture_that_cannot_end_restores_stream_allocator_and_generator(cuda):
    capturer, cuda.end_fails = CudaCapturer(DEVICE), True
    with pytest.raises(NotCapturableError, match="capture invalidated"):
        capturer.capture(lambda: [torch.full((1,), math.pi)])
    assert cuda.stream == "user" and torch.is_autocast_cache_enabled()
    assert cuda.pools == [(DEVICE, (0, 1))]
    assert cuda.captures == [(0, 1), None]  # the second is empty and ends, which resets the generator


@pytest.mark.parametrize("end_fails", [False, True])
def test_capture_fails_names_the_first_error(cuda, end_fails):
    capturer, cuda.end_fails = CudaCapturer(DEVICE), end_fails

    def function():
        try:
            raise KeyError("handled")
        except KeyError:
            raise RuntimeError("operation not permitted when stream is capturing") from None

    with pytest.raises(NotCapturableError, match=r"^operation not permitted when stream is capturing$"):
        capturer.capture(function)


@pytest.mark.parametrize("error", [ValueError("no loss"), torch.OutOfMemoryError("CUDA out of memory")])
@pytest.mark.parametrize("end_fails", [False, True])
def test_capture_error_of_function_or_memory_is_raised_as_it_is(cuda, end_fails, error):
    capturer, cuda.end_fails = CudaCapturer(DEVICE), end_fails

    def function():
        raise error

    with pytest.raises(type(error)) as raised:
        capturer.capture(function)
    assert raised.value is error


@pytest.mark.parametrize("mode", [0, 1])
def test_check_other_thread_that_waits_is_not_the_function(cuda, mode):
    cuda.mode = mode

    def function():
        for text in ("called a synchronizing CUDA operation", "something else"):
            thread = threading.Thread(target=warnings.warn, args=(text,))
            thread.start()
            thread.join()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CudaCapturer(DEVICE).check(function)
    shown = [str(each.message) for each in caught]
    assert shown == ["called a synchronizing CUDA operation"] * mode + ["something else"]


@pytest.mark.parametrize("draw", [random.random, lambda: torch.rand(1)])
def test_raise_on_host_randomness_drawn_numbers_are_drawn_again(draw):
    random.seed(1)
    torch.manual_seed(1)
    with pytest.raises(NotCapturableError, match="it draws random numbers on the host"):
        raise_on_host_randomness(draw)
    got = draw()
    random.seed(1)
    torch.manual_seed(1)
    assert got == draw()
    raise_on_host_randomness(lambda: torch.ones(1))
