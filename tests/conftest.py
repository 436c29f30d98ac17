"""Options and fixtures of the whole suite."""

import os
import random
import signal
import sys
import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import settings

THREADS = min(4, os.cpu_count() or 1)
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]

# Drawn examples are the same in every run; the slow references get fewer.
for name, examples in {"exhaustive": 200, "kernels": 60, "few": 25}.items():
    settings.register_profile(name, max_examples=examples, deadline=None, derandomize=True)

pytest.register_assert_rewrite("mamba_layer_checks", "op_calls", "op_conformance", "parametrisations", "scan_cases")


def pytest_addoption(parser):
    parser.addoption("--reference", action="store_true", help="hide the compiled kernels: test the references")
    parser.addoption(
        "--cuda-emulator", metavar="LIBRARY", help="run the CUDA kernels on the CPU, on an emulator of CUDA"
    )


def pytest_configure(config):
    library = config.getoption("--cuda-emulator")
    hidden = config.getoption("--reference") or library
    settings.load_profile("few" if hidden else "kernels" if config.option.markexpr else "exhaustive")
    if library:
        torch.ops.load_library(library)  # before the import, which finds out which kernels there are
        # Outputs that a kernel does not write are NaN.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    if hidden:
        assert "eaml_ext.ops" not in sys.modules
        refused = mock.patch.object(torch.ops, "load_library", side_effect=OSError("the tests hide them"))
        with refused, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "eaml_ext: compiled kernels are not available", RuntimeWarning)
            import eaml_ext.ops  # noqa: F401


def pytest_ignore_collect(collection_path, config):
    """Leave out the tests of the emulator without the emulator's library."""
    return True if collection_path.name == "cuda_emulator" and not config.getoption("--cuda-emulator") else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Without the compiled kernels, tests marked ``kernels`` are exhaustive.

    With ``--reference`` a test is exhaustive too if each of its parameters had the same value in an earlier test. The
    kernels need every combination of values; the reference, one implementation for all, needs every value once.
    """
    reference = config.getoption("--reference")
    if not (reference or config.getoption("--cuda-emulator")):
        return
    before = set()
    for item in items:
        values = item.callspec.params.items() if hasattr(item, "callspec") else []
        used = {(item.parent.nodeid, item.originalname, name, id(value)) for name, value in values}
        if item.get_closest_marker("kernels") or (reference and used and used <= before):
            item.add_marker("exhaustive")
        else:
            before |= used


def pytest_report_header(config):
    if config.getoption("--cuda-emulator"):
        return "eaml_ext: the CUDA kernels, on an emulator of CUDA"
    return "eaml_ext: references only" if config.getoption("--reference") else None


@pytest.fixture(scope="session")
def reference_only(request) -> bool:
    """Whether the compiled kernels are hidden (``--reference``), or replaced (``--cuda-emulator``)."""
    return request.config.getoption("--reference") or bool(request.config.getoption("--cuda-emulator"))


@pytest.fixture(scope="session")
def on_cuda_emulator(request) -> bool:
    """Whether CUDA kernels replace the CPU's (``--cuda-emulator``)."""
    return bool(request.config.getoption("--cuda-emulator"))


@pytest.fixture(scope="session", params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(autouse=True, scope="session")
def _raise_on_interrupt():
    """Make SIGINT raise KeyboardInterrupt, also where the suite was started with SIGINT ignored (nohup).

    Child processes inherit an ignored signal, so they need it too.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed_and_threads(request):
    """Start every test from the same seed and thread count: several threads for the ops, elsewhere one."""
    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(THREADS if request.path.parent.name == "ops" else 1)


@pytest.fixture
def worker(monkeypatch):
    """Return a function that makes this process a DataLoader worker with a seed, or the main process (None)."""

    def become(seed):
        info = None if seed is None else SimpleNamespace(id=seed % 2, num_workers=2, seed=seed, dataset=None)
        monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: info)

    return become
