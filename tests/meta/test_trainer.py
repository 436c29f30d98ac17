"""MetaMAMLTrainer: the loop, the log, the progress bar, refused arguments."""

import copy
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from trainer_runs import assert_same_bits, fixed_tasks, network, trainer

from eaml_ext import checkpoint
from eaml_ext.meta import MetaMAMLTrainer, TaskBatch
from eaml_ext.tasks import SinusoidTasks


def test_meta_train_sinusoids_lowers_losses_and_adapting_leaves_policy():
    t = MetaMAMLTrainer(nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 1)), 5e-3, 1e-2, progress=False)
    losses = t.meta_train(TaskBatch(SinusoidTasks(10), 16), num_meta_iterations=300)
    assert len(losses) == 300 == t.iteration and t.losses == losses
    assert sum(losses[-30:]) < 0.8 * sum(losses[:30])
    data = SinusoidTasks(10, queries=50).draw(20, "test")
    before = copy.deepcopy(t.maml.model.state_dict())
    plain, adapted = 0.0, 0.0
    for sx, sy, qx, qy in zip(*data, strict=True):
        policy = t.adapt_to_new_task((sx, sy), num_steps=5)
        plain += float(mse_loss(t.maml.model(qx), qy))
        adapted += float(mse_loss(policy(qx), qy))
    assert adapted < 0.9 * plain
    assert all(torch.equal(v, before[k]) for k, v in t.maml.model.state_dict().items())


def test_meta_train_two_calls_equal_one_and_leave_global_generator():
    task_batch = TaskBatch(fixed_tasks(), 4)
    whole, parts = trainer(), trainer()
    kept = torch.random.get_rng_state()
    whole.meta_train(task_batch, 7)
    assert torch.equal(torch.random.get_rng_state(), kept)
    torch.manual_seed(99)
    assert parts.meta_train(task_batch, 3) + parts.meta_train(task_batch, 4) == whole.losses
    assert_same_bits(whole, parts)
    assert trainer().meta_train(task_batch, 0) == []


def test_meta_train_tasks_use_their_own_loss_and_tuples_the_trainers():
    called = []

    def my_loss(prediction, target):
        called.append(1)
        return mse_loss(prediction, target)

    trainer(loss_fn=my_loss).meta_train(TaskBatch(SinusoidTasks(), 2), 1)
    assert not called
    trainer(loss_fn=my_loss).meta_train(TaskBatch(fixed_tasks(), 2), 1)
    assert called


def test_meta_train_adaptive_sampling_receives_losses():
    task_batch = TaskBatch(fixed_tasks(), 4, sampling="adaptive")
    t = trainer()
    t.meta_train(task_batch, 1)
    scores = task_batch.state_dict()["scores"]
    told = torch.isfinite(scores)
    assert int(told.sum()) == 4 and float(scores[told].mean()) == pytest.approx(t.losses[0], rel=1e-6)


def test_meta_train_non_finite_updates_are_counted_and_warned_of():
    tasks = fixed_tasks(4)
    tasks.append((tasks[0][0], tasks[0][1] * torch.nan, *tasks[0][2:]))
    t = trainer()
    with pytest.warns(
        RuntimeWarning, match="^MetaMAMLTrainer.meta_train: 3 meta-updates were not finite and left out$"
    ):
        losses = t.meta_train(TaskBatch(tasks, 5), 3)
    assert all(loss != loss for loss in losses) and t.maml.skipped_updates == 3
    assert_same_parameters(t.maml.model, network())


def assert_same_parameters(one, other):
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_meta_train_policy_on_device_moves_tasks_there(device):
    t = MetaMAMLTrainer(nn.Linear(1, 1).to(device), progress=False)
    assert len(t.meta_train(TaskBatch(SinusoidTasks(), 4), 2)) == 2


def test_meta_train_outside_main_thread_trains():
    t = trainer()
    thread = threading.Thread(target=t.meta_train, args=(TaskBatch(fixed_tasks(), 4), 2))
    thread.start()
    thread.join()
    assert t.iteration == 2


class Writer:
    def __init__(self):
        self.lines = []

    def add_scalar(self, name, value, step):
        self.lines.append((name, value, step))


def test_log_object_receives_losses_of_all_radii():
    writer = Writer()
    t = trainer(log=writer, kl_radii=[0.0, 0.5])
    t.meta_train(TaskBatch(fixed_tasks(), 4), 2)
    assert [line for line in writer.lines if line[0] == "meta/loss"] == [
        ("meta/loss", loss, i) for i, loss in enumerate(t.losses)
    ]
    assert ("meta/skipped_updates", 0, 1) in writer.lines
    assert [step for name, _, step in writer.lines if name == "meta/loss_kl_radius_0.5"] == [0, 1]


def test_log_directory_is_read_by_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra: tensorboard)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    t = trainer(log=tmp_path / "log")
    t.meta_train(TaskBatch(fixed_tasks(), 4), 3)
    events = EventAccumulator(str(tmp_path / "log")).Reload()
    assert [event.step for event in events.Scalars("meta/loss")] == [0, 1, 2]
    assert [event.value for event in events.Scalars("meta/loss")] == pytest.approx(t.losses)


def test_log_directory_without_tensorboard_names_package_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"log is a directory, which needs TensorBoard: pip install tensorboard$"):
        trainer(log=tmp_path)


def test_progress_bar_is_drawn_only_with_progress(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    MetaMAMLTrainer(network(), progress=True).meta_train(TaskBatch(fixed_tasks(), 4), 3)
    assert "meta-training:" in capsys.readouterr().err
    trainer().meta_train(TaskBatch(fixed_tasks(), 4), 3)
    assert capsys.readouterr().err == ""


def bad_calls():
    model, tasks = nn.Linear(1, 1), TaskBatch(fixed_tasks(4), 2)
    t = MetaMAMLTrainer(model, progress=False)
    x = torch.ones(3, 1)
    yield lambda: MetaMAMLTrainer(3), TypeError, "policy must be a torch.nn.Module, got int"
    yield lambda: MetaMAMLTrainer(model, 0), ValueError, "MetaMAMLTrainer: meta_lr must be > 0"
    yield lambda: MetaMAMLTrainer(model, "a"), TypeError, "MetaMAMLTrainer: meta_lr must be a number"
    yield lambda: MetaMAMLTrainer(model, 1e-3, -1), ValueError, "inner_lr must be > 0"
    yield lambda: MetaMAMLTrainer(model, loss_fn="mse"), TypeError, "loss_fn must be callable, got str"
    yield lambda: MetaMAMLTrainer(model, progress=1), TypeError, "progress must be True or False"
    yield lambda: MetaMAMLTrainer(model, kl_radii=()), TypeError, "kl_radii must be a list of at least one"
    yield lambda: MetaMAMLTrainer(model, kl_radii=0.1), TypeError, "kl_radii must be a list of at least one"
    yield lambda: MetaMAMLTrainer(model, kl_radii=[-1.0]), ValueError, "kl_radii must be >= 0"
    yield lambda: MetaMAMLTrainer(model, kl_radii=["a"]), TypeError, "kl_radii must be a number"
    yield lambda: MetaMAMLTrainer(model, log=3), TypeError, "log must be a directory or have add_scalar"
    yield lambda: MetaMAMLTrainer(model, inner_step=3), TypeError, "inner_step"
    yield lambda: MetaMAMLTrainer(model, inner_steps=0), ValueError, "inner_steps must be > 0"
    yield lambda: t.meta_train([1]), TypeError, "task_batch must be a TaskBatch or a TaskSource, got list"
    yield lambda: t.meta_train(tasks, -1), ValueError, "num_meta_iterations must be >= 0"
    yield lambda: t.meta_train(tasks, 1.0), TypeError, "num_meta_iterations must be an integer"
    yield lambda: t.meta_train(tasks, 1, checkpoint=3), TypeError, "checkpoint must be a path, got int"
    yield lambda: t.meta_train(tasks, 1, checkpoint_every=0), ValueError, "checkpoint_every must be > 0"
    yield lambda: t.meta_train(tasks, 1, checkpoint_every=None), TypeError, "checkpoint_every must be an integer"
    yield lambda: t.meta_train(tasks, 1, checkpoint="/no/such/folder/f"), FileNotFoundError, "does not exist"
    yield lambda: t.adapt_to_new_task(x), TypeError, "new_task_data must be (support_x, support_y)"
    yield lambda: t.adapt_to_new_task((x, x, x)), TypeError, "new_task_data must be (support_x, support_y)"
    yield lambda: t.adapt_to_new_task((x, x[:2])), ValueError, "support_y has shape (2, 1)"
    yield lambda: t.adapt_to_new_task((x, x), -1), ValueError, "num_steps must be >= 0"
    yield lambda: t.select_kl_radius((x, x[:2])), ValueError, "support_y has shape (2, 1)"
    yield lambda: t.select_kl_radius(3), TypeError, "new_task_data must be (support_x, support_y)"


@pytest.mark.parametrize(("call", "error", "text"), list(bad_calls()), ids=lambda v: v if isinstance(v, str) else "")
def test_trainer_bad_argument_raises_one_sentence(call, error, text):
    with pytest.raises(error) as info:
        call()
    assert text in str(info.value) and "\n" not in str(info.value)


def pairs():
    x = torch.randn(12, 3)
    y = x.sum(1, keepdim=True).sin()
    return x[:6], y[:6], x[6:], y[6:]


@pytest.mark.parametrize("radii", [(0.0,), (0.0, 0.5)], ids=str)
def test_meta_train_layer_frozen_later_stays_for_all_radii(radii):
    policy, tasks = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), TaskBatch([pairs()] * 4, 2)
    trainer = MetaMAMLTrainer(policy, 0.1, 0.1, kl_radii=radii, progress=False)
    trainer.meta_train(tasks, 1)
    policy[0].requires_grad_(False)
    before = [copy.deepcopy(maml.model) for maml in trainer.mamls]
    trainer.meta_train(tasks, 2)
    adapted = trainer.adapt_to_new_task(pairs()[:2])
    for old, maml in zip(before, trainer.mamls, strict=True):
        assert torch.equal(old[0].weight, maml.model[0].weight) and not torch.equal(old[2].weight, maml.model[2].weight)
    assert any(torch.equal(adapted[0].weight, maml.model[0].weight) for maml in trainer.mamls)
    policy[0].requires_grad_(True)
    trainer.meta_train(tasks, 1)
    assert all(not torch.equal(o[0].weight, m.model[0].weight) for o, m in zip(before, trainer.mamls, strict=True))
    policy[2] = nn.Linear(4, 1)
    with pytest.raises(ValueError, match=r"2.weight was unfrozen or replaced after this MetaMAML\w* was made"):
        trainer.meta_train(tasks, 1)


def test_trainer_inference_mode_trains_and_adapts_as_outside():
    policy, data = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), [pairs() for _ in range(4)]
    results = []
    for mode in (torch.enable_grad, torch.inference_mode):
        model = copy.deepcopy(policy)
        with mode():
            tasks = TaskBatch([tuple(t.clone() for t in task) for task in data], 2, sampling="adaptive")
            trainer = MetaMAMLTrainer(model, 0.1, 0.1, kl_radii=(0.0, 0.5), progress=False)
            losses = trainer.meta_train(tasks, 3)
            adapted = trainer.adapt_to_new_task(tasks.tasks[0][:2])
        trainer.meta_train(tasks, 1)  # what was made inside goes on outside
        results.append((losses, trainer.losses, [p.tolist() for p in adapted.parameters()]))
    assert results[0] == results[1]


def test_trainer_numpy_numbers_equal_those_of_python(tmp_path):
    policy, data = nn.Linear(3, 1), [pairs() for _ in range(4)]
    results = []
    for number, whole in ((float, int), (np.float64, np.int64)):
        tasks = TaskBatch(data, whole(2), seed=whole(7))
        trainer = MetaMAMLTrainer(
            copy.deepcopy(policy), number(0.1), number(0.1), kl_radii=[number(0), number(0.5)], progress=False
        )
        path = tmp_path / f"{whole.__name__}.pt"
        losses = trainer.meta_train(tasks, whole(3), checkpoint=path, checkpoint_every=whole(2))
        tasks.update([whole(1)], torch.ones(1))
        adapted = trainer.adapt_to_new_task(data[0][:2], whole(2))
        assert {type(v) for v in tasks.describe().values()} <= {int, str}
        assert tasks.batch(whole(1)).indices == TaskBatch(data, 2, seed=7).batch(1).indices
        settings = checkpoint.load_state(path, kind="MetaMAMLTrainer")["settings"]
        results.append((losses, [p.tolist() for p in adapted.parameters()], settings))
    assert results[0] == results[1]
