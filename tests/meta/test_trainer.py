"""MetaMAMLTrainer: the loop, exact resume after any end, Ctrl-C, the log, shift levels."""

import copy
import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import l1_loss, mse_loss

from eaml_ext import checkpoint
from eaml_ext.meta import MetaMAMLTrainer, TaskBatch
from eaml_ext.tasks import SinusoidTasks


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))


def fixed_tasks(n=12):
    columns = SinusoidTasks(5).draw(n)
    return list(zip(*(c.unbind() for c in columns), strict=True))


def trainer(**options):
    return MetaMAMLTrainer(network(), 1e-2, 1e-2, progress=False, **options)


def state(trainer):
    return {k: v.clone() for maml in trainer.mamls for k, v in maml.model.state_dict().items()}


def assert_same_bits(one, other):
    assert one.losses == other.losses
    for a, b in zip(one.mamls, other.mamls, strict=True):
        for (name, p), q in zip(a.model.state_dict().items(), b.model.state_dict().values(), strict=True):
            assert torch.equal(p, q), name
        for p, q in zip(a.inner_lrs.values(), b.inner_lrs.values(), strict=True):
            assert torch.equal(p, q)


def test_training_pays_and_adapting_leaves_the_policy():
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


def test_calls_go_on_where_the_last_ended_and_leave_the_global_generator():
    task_batch = TaskBatch(fixed_tasks(), 4)
    whole, parts = trainer(), trainer()
    kept = torch.random.get_rng_state()
    whole.meta_train(task_batch, 7)
    assert torch.equal(torch.random.get_rng_state(), kept)
    torch.manual_seed(99)
    assert parts.meta_train(task_batch, 3) + parts.meta_train(task_batch, 4) == whole.losses
    assert_same_bits(whole, parts)
    assert trainer().meta_train(task_batch, 0) == []


def test_tasks_use_their_own_loss_and_tuples_the_trainers():
    called = []

    def my_loss(prediction, target):
        called.append(1)
        return mse_loss(prediction, target)

    trainer(loss_fn=my_loss).meta_train(TaskBatch(SinusoidTasks(), 2), 1)
    assert not called
    trainer(loss_fn=my_loss).meta_train(TaskBatch(fixed_tasks(), 2), 1)
    assert called


def test_adaptive_sampling_is_told_the_losses():
    task_batch = TaskBatch(fixed_tasks(), 4, sampling="adaptive")
    t = trainer()
    t.meta_train(task_batch, 1)
    scores = task_batch.state_dict()["scores"]
    told = torch.isfinite(scores)
    assert int(told.sum()) == 4 and float(scores[told].mean()) == pytest.approx(t.losses[0], rel=1e-6)


def test_updates_that_are_not_finite_are_counted_and_reported():
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


# ------------------------------------------------------------------------------------------------------ checkpoints


OPTIONS = [
    {},
    {"learn_inner_lr": True, "inner_steps": 2},
    {"optimizer": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)},
    {"kl_radii": (0.0, 0.5)},
    {"reptile": True},
]


@pytest.mark.parametrize("sampling", ["uniform", "adaptive"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: next(iter(o), "plain"))
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(options, sampling, tmp_path):
    def tasks():
        return TaskBatch(fixed_tasks(), 4, sampling=sampling)

    whole = trainer(**options)
    whole.meta_train(tasks(), 9)
    path = tmp_path / "run.safetensors"

    class Stop(Exception):
        pass

    broken = trainer(**options)
    update, count = broken._update, []

    def stops(*args):
        count.append(1)
        if len(count) == 6:  # after 5 updates; the last checkpoint is of 4
            raise Stop
        update(*args)

    broken._update = stops
    with pytest.raises(Stop):
        broken.meta_train(tasks(), 9, checkpoint=path, checkpoint_every=2)
    resumed = trainer(**options)
    torch.manual_seed(5)
    losses = resumed.meta_train(tasks(), 9, checkpoint=path, checkpoint_every=2)
    assert losses == whole.losses
    assert_same_bits(whole, resumed)
    again = trainer(**options)
    assert again.meta_train(tasks(), 9, checkpoint=path) == losses  # done already
    assert_same_bits(whole, again)


def test_a_longer_call_trains_on_from_the_same_file(tmp_path):
    path, whole = tmp_path / "run.safetensors", trainer()
    whole.meta_train(TaskBatch(fixed_tasks(), 4), 6)
    trainer().meta_train(TaskBatch(fixed_tasks(), 4), 3, checkpoint=path)
    assert trainer().meta_train(TaskBatch(fixed_tasks(), 4), 6, checkpoint=path) == whole.losses


def long_run():
    tasks = TaskBatch(fixed_tasks(), 4, sampling="adaptive")
    return MetaMAMLTrainer(network(), 1e-2, 1e-2, progress=False, learn_inner_lr=True), tasks


def main(path):
    """What the process of the next test does."""
    t, tasks = long_run()
    update = t._update

    def told(*args):
        update(*args)
        print(t.iteration, flush=True)

    t._update = told
    t.meta_train(tasks, 10_000, checkpoint=path, checkpoint_every=1)


def test_killed_at_any_moment_it_goes_on_with_the_same_bits(tmp_path):
    path = tmp_path / "run.safetensors"
    code = "import sys, test_trainer, torch; torch.set_num_threads(1); test_trainer.main(sys.argv[1])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True, cwd=os.path.dirname(__file__)
    )
    for line in process.stdout:
        if int(line) >= 20:
            break
    time.sleep(0.01 * random.SystemRandom().random())  # checkpoints are written all the time: before, inside or after
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    done = len(checkpoint.load_state(path)["losses"])
    assert done >= 19
    torch.set_num_threads(1)
    (whole, tasks), (resumed, same_tasks) = long_run(), long_run()
    whole.meta_train(tasks, done + 20)
    resumed.meta_train(same_tasks, done + 20, checkpoint=path)
    assert_same_bits(whole, resumed)


def test_ctrl_c_saves_between_checkpoints_and_gives_the_handler_back(tmp_path):
    t, path = trainer(), tmp_path / "run.safetensors"
    update = t._update

    def interrupted(*args):
        update(*args)
        if t.iteration == 3:
            os.kill(os.getpid(), signal.SIGINT)

    t._update = interrupted
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        t.meta_train(TaskBatch(fixed_tasks(), 4), 10, checkpoint=path, checkpoint_every=1000)
    assert signal.getsignal(signal.SIGINT) is before
    assert len(checkpoint.load_state(path)["losses"]) == 3 == t.iteration
    whole = trainer()
    whole.meta_train(TaskBatch(fixed_tasks(), 4), 10)
    assert trainer().meta_train(TaskBatch(fixed_tasks(), 4), 10, checkpoint=path) == whole.losses


def test_a_second_ctrl_c_ends_at_once():
    t = trainer()

    def stuck(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(100):
            time.sleep(0.01)
        pytest.fail("the second signal was lost")

    t._update = stuck
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    try:
        with pytest.raises(KeyboardInterrupt):
            t.meta_train(TaskBatch(fixed_tasks(), 4), 10)
    finally:
        signal.signal(signal.SIGINT, before)
    assert t.iteration == 0


def test_a_distribution_of_other_settings_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    trainer().meta_train(TaskBatch(SinusoidTasks(noise=0.3), 4), 1, checkpoint=path)
    with pytest.raises(ValueError, match=r"noise=0.3\)', this one has '.*noise=0.0\)'$"):
        trainer().meta_train(TaskBatch(SinusoidTasks(), 4), 2, checkpoint=path)


def test_tasks_come_to_the_device_of_the_policy(device):
    t = MetaMAMLTrainer(nn.Linear(1, 1).to(device), progress=False)
    assert len(t.meta_train(TaskBatch(SinusoidTasks(), 4), 2)) == 2


def test_it_trains_outside_the_main_thread():
    t = trainer()
    thread = threading.Thread(target=t.meta_train, args=(TaskBatch(fixed_tasks(), 4), 2))
    thread.start()
    thread.join()
    assert t.iteration == 2


def test_a_checkpoint_of_a_longer_run_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    trainer().meta_train(TaskBatch(fixed_tasks(), 4), 3, checkpoint=path)
    with pytest.raises(ValueError, match=r"run.safetensors holds 3 meta-updates, num_meta_iterations is 2$"):
        trainer().meta_train(TaskBatch(fixed_tasks(), 4), 2, checkpoint=path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    trainer().meta_train(TaskBatch(fixed_tasks(), 4), 2, checkpoint=path)
    wider = nn.Sequential(nn.Linear(1, 9), nn.Tanh(), nn.Dropout(0.1), nn.Linear(9, 1))
    other = MetaMAMLTrainer(wider, 1e-2, 1e-2, progress=False)
    with pytest.raises(ValueError, match=r"model has 0.weight of shape \(8, 1\), wanted \(9, 1\)$"):
        other.meta_train(TaskBatch(fixed_tasks(), 4), 3, checkpoint=path)
    assert other.iteration == 0


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    trainer().meta_train(TaskBatch(fixed_tasks(), 4), 2, checkpoint=path)
    others = [
        (trainer(inner_steps=2), TaskBatch(fixed_tasks(), 4), "inner_steps=1, this one has 2"),
        (trainer(), TaskBatch(fixed_tasks(), 3), "batch_size=4, this one has 3"),
        (trainer(), TaskBatch(fixed_tasks(), 4, seed=1), "seed=0, this one has 1"),
        (trainer(), TaskBatch(fixed_tasks(5), 4), "tasks=12, this one has 5"),
        (
            trainer(),
            TaskBatch(SinusoidTasks(), 4),
            "tasks=12, this one has 'sinusoid-v1: SinusoidTasks(shots=5, queries=",
        ),
        (trainer(loss_fn=l1_loss), TaskBatch(fixed_tasks(), 4), "loss_fn='mse_loss', this one has 'l1_loss'"),
        (trainer(kl_radii=(0.0, 1.0)), TaskBatch(fixed_tasks(), 4), "kl_radii="),
        (trainer(optimizer=torch.optim.SGD), TaskBatch(fixed_tasks(), 4), "optimizer='Adam', this one has 'SGD'"),
    ]
    for other, task_batch, text in others:
        before = state(other)
        with pytest.raises(ValueError, match=r"^MetaMAMLTrainer.meta_train: checkpoint .* is of a run with") as info:
            other.meta_train(task_batch, 3, checkpoint=path)
        assert text in str(info.value)
        assert other.iteration == 0 and all(torch.equal(v, before[k]) for k, v in state(other).items())
    wide = MetaMAMLTrainer(nn.Linear(1, 1), 1e-2, 1e-2, progress=False, inner_parameters=["weight"])
    with pytest.raises(ValueError, match="inner_parameters="):
        wide.meta_train(TaskBatch(fixed_tasks(), 4), 3, checkpoint=path)


# ------------------------------------------------------------------------------------------------------------- log


class Writer:
    def __init__(self):
        self.lines = []

    def add_scalar(self, name, value, step):
        self.lines.append((name, value, step))


def test_losses_are_logged():
    writer = Writer()
    t = trainer(log=writer, kl_radii=[0.0, 0.5])
    t.meta_train(TaskBatch(fixed_tasks(), 4), 2)
    assert [line for line in writer.lines if line[0] == "meta/loss"] == [
        ("meta/loss", loss, i) for i, loss in enumerate(t.losses)
    ]
    assert ("meta/skipped_updates", 0, 1) in writer.lines
    assert [step for name, _, step in writer.lines if name == "meta/loss_shift_0.5"] == [0, 1]


def test_tensorboard_reads_the_directory(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra: tensorboard)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    t = trainer(log=tmp_path / "log")
    t.meta_train(TaskBatch(fixed_tasks(), 4), 3)
    events = EventAccumulator(str(tmp_path / "log")).Reload()
    assert [event.step for event in events.Scalars("meta/loss")] == [0, 1, 2]
    assert [event.value for event in events.Scalars("meta/loss")] == pytest.approx(t.losses)


def test_a_directory_without_tensorboard_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"log is a directory, which needs TensorBoard: pip install tensorboard$"):
        trainer(log=tmp_path)


def test_the_bar_shows_only_where_it_is_wanted(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    MetaMAMLTrainer(network(), progress=True).meta_train(TaskBatch(fixed_tasks(), 4), 3)
    assert "meta-training:" in capsys.readouterr().err
    trainer().meta_train(TaskBatch(fixed_tasks(), 4), 3)
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------------------- shift levels


def slopes(values, n=12):
    tasks = []
    for a in values:
        x = torch.randn(2 * n, 1)
        tasks.append((x[:n], a * x[:n], x[n:], a * x[n:]))
    return tasks


def test_levels_trade_the_mean_for_the_worst_and_the_right_one_is_picked():
    torch.manual_seed(0)
    # Nineteen tasks of slope about 0 and one of slope 4: the plain mean cares little for the last one.
    tasks = slopes([0.1 * float(torch.randn(())) for _ in range(19)] + [4.0])
    torch.manual_seed(0)
    t = MetaMAMLTrainer(nn.Linear(1, 1), 3e-2, 1e-2, kl_radii=(0.0, 1.5), progress=False)
    t.meta_train(TaskBatch(tasks, 20), 200)
    plain, robust = t.mamls
    slope = [float(maml.model.weight.detach()) for maml in (plain, robust)]
    assert slope[0] < 0.6 and slope[1] > slope[0] + 0.7
    losses = [maml.task_losses(maml.parameters(), tasks, mse_loss) for maml in (plain, robust)]
    assert float(losses[0].mean()) < float(losses[1].mean()) and float(losses[0].max()) > float(losses[1].max())
    near, far = slopes([0.0])[0], slopes([4.0])[0]
    assert t.select_kl_radius(near[:2]) == 0 and t.select_kl_radius(far[:2]) == 1
    one = torch.ones(1, 1)  # a single row: judged before adaptation
    assert t.select_kl_radius((one, 0 * one)) == 0 and t.select_kl_radius((one, 4 * one)) == 1
    adapted = t.adapt_to_new_task(far[:2])
    assert float(mse_loss(adapted(far[2]), far[3])) < float(mse_loss(plain.adapt(*far[:2], mse_loss)(far[2]), far[3]))


def test_held_out_rows_decide_not_those_adapted_to():
    t = trainer(kl_radii=(0.0, 1.0))
    seen = []
    t.mamls[0].adapt_params = lambda start, x, y, loss_fn, steps: seen.append(len(x)) or start
    t.select_kl_radius((torch.randn(10, 1), torch.randn(10, 1)))
    assert seen == [8] * 5
    seen.clear()
    t.select_kl_radius((torch.randn(3, 1), torch.randn(3, 1)))
    assert seen == [2] * 3


def test_a_level_that_gives_nan_is_never_picked():
    t = trainer(kl_radii=(0.0, 1.0))
    with torch.no_grad():
        t.mamls[0].model[0].weight.fill_(torch.nan)
    assert t.select_kl_radius((torch.randn(6, 1), torch.randn(6, 1))) == 1


# ------------------------------------------------------------------------------------------------------- bad input


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
def test_bad_input_gets_one_sentence(call, error, text):
    with pytest.raises(error) as info:
        call()
    assert text in str(info.value) and "\n" not in str(info.value)


def pairs():
    x = torch.randn(12, 3)
    y = x.sum(1, keepdim=True).sin()
    return x[:6], y[:6], x[6:], y[6:]


@pytest.mark.parametrize("levels", [(0.0,), (0.0, 0.5)], ids=str)
def test_trainer_layer_frozen_later_stays_in_all_levels(levels):
    policy, tasks = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), TaskBatch([pairs()] * 4, 2)
    trainer = MetaMAMLTrainer(policy, 0.1, 0.1, kl_radii=levels, progress=False)
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


def test_trainer_in_inference_mode_trains_and_adapts_as_outside():
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


def test_trainer_numpy_numbers_are_those_of_python(tmp_path):
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


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_meta_train_continues_from_checkpoint_in_every_gradient_mode(mode, tmp_path):
    x, y = torch.randn(6, 4), torch.randn(6, 1)
    batches, start = TaskBatch([(x, y, x, y)] * 4, 2), nn.Linear(4, 1)

    def trainer():
        return MetaMAMLTrainer(copy.deepcopy(start), progress=False)

    wanted = trainer().meta_train(batches, 4)
    trainer().meta_train(batches, 2, checkpoint=tmp_path / "state")
    again = trainer()
    with mode():
        assert again.meta_train(batches, 4, checkpoint=tmp_path / "state") == wanted
