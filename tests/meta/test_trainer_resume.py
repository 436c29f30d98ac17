"""MetaMAMLTrainer.meta_train with a checkpoint: exact resume after any end, Ctrl-C, files of other runs."""

import copy
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from torch.nn.functional import l1_loss
from trainer_runs import assert_same_bits, fixed_tasks, network, state, trainer

from eaml_ext import checkpoint
from eaml_ext.meta import MetaMAMLTrainer, TaskBatch
from eaml_ext.tasks import SinusoidTasks

OPTIONS = [
    {},
    {"learn_inner_lr": True, "inner_steps": 2},
    {"optimizer": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)},
    {"kl_radii": (0.0, 0.5)},
    {"reptile": True},
]


@pytest.mark.parametrize("sampling", ["uniform", "adaptive"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: next(iter(o), "plain"))
def test_meta_train_resumed_run_has_bits_of_uninterrupted_one(options, sampling, tmp_path):
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


def test_meta_train_longer_call_continues_from_same_file(tmp_path):
    path, whole = tmp_path / "run.safetensors", trainer()
    whole.meta_train(TaskBatch(fixed_tasks(), 4), 6)
    trainer().meta_train(TaskBatch(fixed_tasks(), 4), 3, checkpoint=path)
    assert trainer().meta_train(TaskBatch(fixed_tasks(), 4), 6, checkpoint=path) == whole.losses


def long_run():
    tasks = TaskBatch(fixed_tasks(), 4, sampling="adaptive")
    return MetaMAMLTrainer(network(), 1e-2, 1e-2, progress=False, learn_inner_lr=True), tasks


def main(path):
    """Train for ever, as the process of the next test."""
    t, tasks = long_run()
    update = t._update

    def told(*args):
        update(*args)
        print(t.iteration, flush=True)

    t._update = told
    t.meta_train(tasks, 10_000, checkpoint=path, checkpoint_every=1)


def test_meta_train_killed_at_any_moment_continues_with_same_bits(tmp_path):
    path = tmp_path / "run.safetensors"
    code = "import sys, test_trainer_resume, torch; torch.set_num_threads(1); test_trainer_resume.main(sys.argv[1])"
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


def test_meta_train_ctrl_c_saves_between_checkpoints_and_restores_handler(tmp_path):
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


def test_meta_train_second_ctrl_c_ends_at_once():
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


def test_meta_train_checkpoint_of_other_distribution_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    trainer().meta_train(TaskBatch(SinusoidTasks(noise=0.3), 4), 1, checkpoint=path)
    with pytest.raises(ValueError, match=r"noise=0.3\)', this one has '.*noise=0.0\)'$"):
        trainer().meta_train(TaskBatch(SinusoidTasks(), 4), 2, checkpoint=path)


def test_meta_train_checkpoint_of_longer_run_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    trainer().meta_train(TaskBatch(fixed_tasks(), 4), 3, checkpoint=path)
    with pytest.raises(ValueError, match=r"run.safetensors holds 3 meta-updates, num_meta_iterations is 2$"):
        trainer().meta_train(TaskBatch(fixed_tasks(), 4), 2, checkpoint=path)


def test_meta_train_checkpoint_of_other_model_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    trainer().meta_train(TaskBatch(fixed_tasks(), 4), 2, checkpoint=path)
    wider = nn.Sequential(nn.Linear(1, 9), nn.Tanh(), nn.Dropout(0.1), nn.Linear(9, 1))
    other = MetaMAMLTrainer(wider, 1e-2, 1e-2, progress=False)
    with pytest.raises(ValueError, match=r"model has 0.weight of shape \(8, 1\), wanted \(9, 1\)$"):
        other.meta_train(TaskBatch(fixed_tasks(), 4), 3, checkpoint=path)
    assert other.iteration == 0


def test_meta_train_checkpoint_of_other_settings_is_refused(tmp_path):
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


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_meta_train_continues_from_checkpoint_in_every_gradient_mode(mode, tmp_path):
    x, y = torch.randn(6, 4), torch.randn(6, 1)
    batches, start = TaskBatch([(x, y, x, y)] * 4, 2), nn.Linear(4, 1)

    def linear_trainer():
        return MetaMAMLTrainer(copy.deepcopy(start), progress=False)

    wanted = linear_trainer().meta_train(batches, 4)
    linear_trainer().meta_train(batches, 2, checkpoint=tmp_path / "state")
    again = linear_trainer()
    with mode():
        assert again.meta_train(batches, 4, checkpoint=tmp_path / "state") == wanted
