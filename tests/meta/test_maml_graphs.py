"""MetaMAML(compile=True) replays graphs: recorded operations in place of CUDA graphs, without torch.compile."""

import copy
import gc
import math
import weakref

import pytest
import torch
from meta_tasks import mlp, sequences, task
from recorded_graph import RecordingCapturer
from torch import nn
from torch.nn.functional import mse_loss

from eaml_ext.meta import MaskedLoss, MetaMAML
from eaml_ext.meta._cuda_graphs import GraphCache
from eaml_ext.nn import SSM
from eaml_ext.nn.cores import CORES


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch):
    monkeypatch.setattr("eaml_ext.meta._meta_gradient.try_compile", lambda function: function)


def replaying(model, *args, **options):
    maml = MetaMAML(model, *args, compile=True, **options)
    maml._graphs = GraphCache("MetaMAML", RecordingCapturer)
    return maml


def pair(model, *args, **options):
    """A MetaMAML that replays graphs and one that does not, of equal models."""
    return replaying(copy.deepcopy(model), *args, **options), MetaMAML(model, *args, **options)


def assert_same_updates(replayed, plain, batches, loss_fn=mse_loss, **options):
    for tasks in batches:
        got, want = (maml.meta_update(tasks, loss_fn, **options) for maml in (replayed, plain))
        assert got == pytest.approx(want, rel=1e-9)
        torch.testing.assert_close(replayed.last_losses, plain.last_losses, rtol=1e-9, atol=1e-12)
    assert_same_parameters(replayed, plain)


def assert_same_parameters(replayed, plain):
    for p, q in zip(replayed.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


OPTIONS = {
    "second order": {},
    "first order": {"first_order": True},
    "step sizes": {"learn_inner_lr": True},
    "head": {"inner_parameters": "2"},
    "reptile": {"reptile": True},
    "micro-batch": {"micro_batch": 2},
    "sgd": {"optimizer": torch.optim.SGD},
}


@pytest.mark.parametrize("kl_radius", [0.0, 0.2])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_meta_update_replayed_equals_plain(options, kl_radius):
    replayed, plain = pair(mlp(), 0.1, 1e-2, inner_steps=2, **options)
    batches = [[task() for _ in range(4)] for _ in range(6)]
    assert_same_updates(replayed, plain, batches, kl_radius=kl_radius)
    assert replayed._graphs.replays >= 5


def test_meta_update_replayed_ragged_tasks_equal_plain():
    replayed, plain = pair(SSM(4, 6, 2, state_size=3).double(), 0.1, 1e-2)
    batches = [[sequences(1, 12 if i % 3 else 5) for i in range(6)] for _ in range(4)]
    assert_same_updates(replayed, plain, batches)
    assert len(replayed._graphs) == 2 and replayed._graphs.replays == 6


def test_meta_update_replayed_padded_tasks_equal_plain():
    replayed, plain = pair(SSM(4, 6, 2, state_size=3).double(), 0.1, 1e-2)
    tasks = [[sequences(1, 12 - i) for i in (0, 2, 5)] for _ in range(4)]
    batches = [[tuple(list(part) for part in task) for task in some] for some in tasks]
    assert_same_updates(replayed, plain, batches, MaskedLoss(nn.MSELoss(reduction="none")))
    assert len(replayed._graphs) == 1 and replayed._graphs.replays == 3


def test_meta_update_replayed_twice_in_one_step_accumulates():
    replayed, plain = pair(mlp(), 0.1, 1e-2, micro_batch=1)
    assert_same_updates(replayed, plain, [[task() for _ in range(5)] for _ in range(2)])
    assert len(replayed._graphs) == 1 and replayed._graphs.replays == 9


@pytest.mark.filterwarnings("ignore:MetaMAML. no CUDA graph was used in 6 calls")
def test_meta_update_replayed_many_shapes_keep_bounded_number_of_graphs():
    replayed, plain = pair(mlp(), 0.1, 1e-2)
    replayed._graphs._max_graphs = 3
    batches = [[task(n=5 + i % 5) for i in range(k)] for k in (5, 5, 3, 3, 5, 2, 2)]
    assert_same_updates(replayed, plain, batches)
    assert len(replayed._graphs) <= 3


@pytest.mark.parametrize("core", CORES)
def test_meta_update_every_core_can_be_captured(core):
    replayed, plain = pair(SSM(4, 16, 2, state_size=4, core=core).double(), 0.1, 1e-3)
    assert_same_updates(replayed, plain, [[sequences(1, 9) for _ in range(2)] for _ in range(3)])
    assert replayed._graphs.replays == 2


def test_meta_update_replayed_follows_learning_rates():
    replayed, plain = pair(mlp(), 0.1, 1e-2)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(maml.optimizer, 0.5) for maml in (replayed, plain)]
    batches = [[task(), task()] for _ in range(3)]
    for inner_lr in (0.1, 0.2, 0.05):
        replayed.inner_lr = plain.inner_lr = inner_lr
        assert_same_updates(replayed, plain, batches)
        for schedule in schedules:
            schedule.step()
    assert len(replayed._graphs) == 3


def test_meta_update_replayed_non_finite_step_is_skipped():
    replayed, plain = pair(mlp(), 0.1, 1e-2)
    good = [[task(), task()] for _ in range(4)]
    assert_same_updates(replayed, plain, good[:3])
    sx, sy, qx, qy = task()
    assert math.isnan(replayed.meta_update([good[0][0], (sx, sy * torch.nan, qx, qy)], mse_loss))
    assert replayed.skipped_updates == 1
    assert_same_updates(replayed, plain, good[3:])


def change_load(maml, state):
    maml.load_state_dict(copy.deepcopy(state))


def change_data(maml, state):
    for p, q in zip(maml.model.parameters(), state["model"].values(), strict=True):
        p.data = q.clone()


def change_freeze(maml, state):
    maml.model[0].requires_grad_(False)


@pytest.mark.parametrize("change", [change_load, change_data, change_freeze])
def test_meta_update_replayed_after_change_of_parameters_equals_plain(change):
    replayed, plain = pair(mlp(), 0.1, 1e-2)
    state = copy.deepcopy(plain.state_dict())
    batches = [[task(), task()] for _ in range(4)]
    assert_same_updates(replayed, plain, batches)
    for maml in (replayed, plain):
        change(maml, state)
    assert_same_updates(replayed, plain, batches)
    assert replayed._graphs.replays >= 6


def test_meta_update_replayed_frozen_parameter_that_moves_is_read():
    model = mlp()
    model[0].requires_grad_(False)
    replayed, plain = pair(model, 0.1, 1e-2)
    batches = [[task(), task()] for _ in range(3)]
    assert_same_updates(replayed, plain, batches)
    for maml in (replayed, plain):
        maml.model[0].weight.data = 2 * maml.model[0].weight.data
    assert_same_updates(replayed, plain, batches)


def test_meta_update_replayed_learned_rates_that_move_are_read():
    replayed, plain = pair(mlp(), 0.1, 1e-2, learn_inner_lr=True)
    batches = [[task(), task()] for _ in range(3)]
    assert_same_updates(replayed, plain, batches)
    for maml in (replayed, plain):
        for rate in maml.inner_lrs.values():
            rate.data = 2 * rate.data
    assert_same_updates(replayed, plain, batches)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.drop, self.scale = mlp(), nn.Dropout(0.3), 1.0

    def forward(self, x):
        return self.scale * self.net(self.drop(x))


def test_meta_update_replayed_attribute_of_model_and_weight_of_loss_are_read():
    replayed, plain = pair(Scaled().eval(), 0.1, 1e-2)
    batches, weight = [[task(), task()] for _ in range(3)], 1.0

    def loss_fn(prediction, target):
        return weight * mse_loss(prediction, target)

    for scale, factor in ((1.0, 1.0), (2.0, 1.0), (2.0, 3.0)):
        replayed.model.scale, plain.model.scale, weight = scale, scale, factor
        assert_same_updates(replayed, plain, batches, loss_fn)
    assert len(replayed._graphs) == 3


def test_meta_update_replayed_dropout_draws_as_usual():
    replayed = replaying(Scaled(), 0.1, 1e-2)
    usual = MetaMAML(copy.deepcopy(replayed.model), 0.1, 1e-2, compile=True)
    batches = [[task(), task()] for _ in range(4)]
    for maml in (replayed, usual):
        torch.manual_seed(1)
        for tasks in batches:
            maml.meta_update(tasks, mse_loss)
    assert replayed._graphs.replays == 3 and usual._graphs.replays == 0
    assert_same_parameters(replayed, usual)


def test_meta_update_loss_that_reads_a_number_runs_as_usual_after_one_warning():
    scale = torch.tensor(2.0)

    def loss_fn(prediction, target):
        return mse_loss(prediction, target) * scale.item()

    replayed, plain = pair(mlp(), 0.1, 1e-2)
    batches = [[task(), task()] for _ in range(2)]
    with pytest.warns(RuntimeWarning, match="^MetaMAML: no CUDA graph can be captured") as caught:
        assert_same_updates(replayed, plain, batches * 2, loss_fn)
    assert len(caught) == 1 and caught[0].filename == __file__


def test_meta_update_copied_maml_has_graphs_of_its_own():
    replayed, plain = pair(mlp(), 0.1, 1e-2)
    batches = [[task(), task()] for _ in range(3)]
    assert_same_updates(replayed, plain, batches)
    copied, want = copy.deepcopy((replayed, plain))
    assert_same_updates(copied, want, batches)
    assert_same_updates(replayed, plain, batches)


class Weighted:
    """A loss whose weights change."""

    def __init__(self):
        self.weight, self.table = 1.0, {"scales": [torch.ones((), dtype=torch.float64)]}

    def __call__(self, prediction, target):
        return self.weight * self.table["scales"][0] * mse_loss(prediction, target)

    def loss(self, prediction, target):
        return self(prediction, target)


@pytest.mark.parametrize("pick", [lambda o: o, lambda o: o.loss], ids=["object", "method"])
def test_meta_update_replayed_loss_object_with_other_attributes_is_captured_again(pick):
    replayed, plain = pair(mlp(), 0.1, 1e-2)
    batches, owner = [[task(), task()] for _ in range(3)], Weighted()
    assert_same_updates(replayed, plain, batches, pick(owner))
    owner.weight = 5.0
    assert_same_updates(replayed, plain, batches, pick(owner))
    owner.table["scales"][0] = torch.full((), 7.0, dtype=torch.float64)
    assert_same_updates(replayed, plain, batches, pick(owner))
    assert replayed._graphs.replays == 6 and len(replayed._graphs) == 2


def test_meta_update_replayed_tasks_with_history_keep_none():
    replayed, plain = pair(mlp(), 0.1, 1e-2)
    batches = [[task(), task()] for _ in range(4)]
    for tasks in batches:
        for t in tasks[0]:
            t.requires_grad_()
    assert_same_updates(replayed, plain, [[tuple(2 * t for t in each) for each in tasks] for tasks in batches])
    (graph,) = replayed._graphs._graphs.values()
    assert replayed._graphs.replays == 3 and all(t.grad_fn is None for t in graph.inputs)


def test_meta_update_of_maml_pickled_without_graphs_runs_as_usual():
    maml, tasks = MetaMAML(mlp(), 0.1, 1e-2, compile=True), [task(), task()]
    old = copy.deepcopy(maml)
    del vars(old)["_graphs"]
    assert old.meta_update(tasks, mse_loss) == pytest.approx(maml.meta_update(tasks, mse_loss))


def test_meta_update_dropped_maml_frees_its_graphs():
    maml, tasks = replaying(mlp(), 0.1, 1e-2), [task(), task()]
    for _ in range(3):
        maml.meta_update(tasks, mse_loss)
    assert maml._graphs.replays == 2
    graphs = weakref.ref(maml._graphs)
    maml._compiled.clear()  # compiled functions hold bound methods of the learner
    gc.collect()
    gc.disable()
    try:
        del maml
        assert graphs() is None
    finally:
        gc.enable()
