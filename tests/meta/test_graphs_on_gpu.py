"""CUDA graphs of meta-updates on a GPU: equal results, few launches, and torch as before where a capture fails."""

import copy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from meta_tasks import sequences
from torch import nn
from torch.nn.functional import mse_loss

from eaml_ext.meta import MetaMAML
from eaml_ext.nn import SSM
from eaml_ext.nn.cores import CORES

sys.path.append(str(Path(__file__).parents[2]))  # last, so as not to hide an installed eaml_ext

from benchmarks.gpu import launches

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


@pytest.fixture
def uncompiled(monkeypatch):
    """Capture the functions as they are, without torch.compile."""
    monkeypatch.setattr("eaml_ext.meta._meta_gradient.try_compile", lambda function: function)


def tasks_on_gpu(count, steps=12, dtype=torch.float64):
    return [tuple(t.to("cuda", dtype) for t in sequences(1, steps)) for _ in range(count)]


def pair(model, **options):
    """A MetaMAML with graphs and one without, of equal models on the GPU."""
    model = model.cuda()
    return MetaMAML(copy.deepcopy(model), 0.1, 1e-2, compile=True, **options), MetaMAML(model, 0.1, 1e-2, **options)


def assert_same_updates(compiled, plain, batches, loss_fn=mse_loss):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="MetaMAML: ")
        for tasks in batches:
            got, want = (maml.meta_update(tasks, loss_fn) for maml in (compiled, plain))
            assert got == pytest.approx(want, rel=1e-7)
    for p, q in zip(compiled.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("core", CORES)
def test_meta_update_graph_of_every_core_equals_plain(core):
    compiled, plain = pair(SSM(4, 16, 2, state_size=4, core=core).double())
    assert_same_updates(compiled, plain, [tasks_on_gpu(3) for _ in range(5)])
    assert compiled._graphs.replays == 4


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    "options",
    [{"first_order": True}, {"learn_inner_lr": True}, {"reptile": True}, {"micro_batch": 2, "inner_steps": 2}],
    ids=str,
)
def test_meta_update_graph_of_ragged_tasks_equals_plain(options):
    compiled, plain = pair(SSM(4, 16, 2, state_size=4).double(), **options)
    assert_same_updates(compiled, plain, [tasks_on_gpu(4) + tasks_on_gpu(2, 7) for _ in range(4)])
    assert compiled._graphs.replays >= 6


def test_meta_update_compiled_and_captured_equals_plain_with_few_launches():
    compiled, plain = pair(SSM(4, 64, 2).double())
    batches = [tasks_on_gpu(8, 50) for _ in range(4)]
    assert_same_updates(compiled, plain, batches)
    kernels, graphs = launches(lambda: compiled.meta_update(batches[0], mse_loss))
    assert graphs == 1 and kernels <= 60 < launches(lambda: plain.meta_update(batches[0], mse_loss))[0] / 5


@pytest.mark.usefixtures("uncompiled")
def test_meta_update_graph_after_move_of_parameters_equals_plain():
    compiled, plain = pair(SSM(4, 16, 2, state_size=4).double())
    batches = [tasks_on_gpu(3) for _ in range(3)]
    assert_same_updates(compiled, plain, batches)
    for maml in (compiled, plain):
        for p in maml.model.parameters():
            p.data = 0.9 * p.data
    assert_same_updates(compiled, plain, batches)


@pytest.mark.usefixtures("uncompiled")
def test_meta_update_graph_with_dropout_draws_as_without():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 2)).double().cuda()
    batches, results = [tasks_on_gpu(3) for _ in range(5)], []
    for serves in (True, False):
        maml = MetaMAML(copy.deepcopy(model), 0.1, 1e-2, compile=True)
        maml._graphs._failed = not serves
        torch.manual_seed(1)
        results.append([maml.meta_update(tasks, mse_loss) for tasks in batches])
        assert maml._graphs.replays == (4 if serves else 0)
    assert results[0] == pytest.approx(results[1], rel=1e-7)


def loss_that_reads(prediction, target):
    loss = mse_loss(prediction, target)
    torch.ones(1, device="cuda").item()
    return loss


def loss_that_waits(prediction, target):
    torch.cuda.synchronize()  # torch's debug mode does not report it, so the capture itself fails
    return mse_loss(prediction, target)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("loss_fn", [loss_that_reads, loss_that_waits])
def test_meta_update_graph_cannot_be_captured_runs_as_usual(loss_fn):
    compiled, plain = pair(SSM(4, 16, 2, state_size=4).double())
    batches, stream = [tasks_on_gpu(3) for _ in range(4)], torch.cuda.current_stream()
    with pytest.warns(RuntimeWarning, match="^MetaMAML: no CUDA graph can be captured"):
        for tasks in batches:
            assert compiled.meta_update(tasks, loss_fn) == pytest.approx(plain.meta_update(tasks, loss_fn), rel=1e-7)
    assert torch.cuda.current_stream() == stream
    assert bool(torch.isfinite(torch.randn(1000, device="cuda")).all())
    other, plain = pair(SSM(4, 16, 2, state_size=4).double())
    assert_same_updates(other, plain, batches)  # later captures succeed
    assert other._graphs.replays == 3
