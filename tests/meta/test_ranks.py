"""Tasks shared over two processes: the meta-update of one, to rounding."""

import math
import signal

import pytest
import ranks
import torch
from torch import nn
from torch.nn.functional import l1_loss, mse_loss

from eaml_ext import SSM
from eaml_ext.distributed import RankError
from eaml_ext.meta import MaskedLoss, MetaMAML, MetaMAMLTrainer, TaskBatch
from eaml_ext.tasks import SinusoidTasks


def network(kind="mlp", seed=0):
    torch.manual_seed(seed)
    if kind == "ssm":
        return SSM(2, 8, 1, state_size=4)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))


def draw(count, seed, *, ragged=False, time=6):
    generator = torch.Generator().manual_seed(seed)

    def data(n):
        x = torch.randn(n, time, 2, generator=generator)
        return x, x.cumsum(1).sum(-1, keepdim=True) * torch.randn((), generator=generator)

    return [(*data(1 + i % 3 if ragged else 2), *data(2)) for i in range(count)]


def close(model, other):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


WAYS = [
    ({}, "mlp", 6, (4, 2), 0.0),
    ({"inner_steps": 3}, "ssm", 5, (2, 3), 0.0),
    ({}, "ssm", 1, (0, 1), 0.0),  # fewer tasks than ranks
    ({}, "mlp", 3, (3, 0), 0.3),
    ({"micro_batch": 2}, "mlp", 7, (3, 4), 0.3),
    ({"learn_inner_lr": True, "inner_parameters": "2"}, "mlp", 5, (3, 2), 0.0),
    ({"first_order": True}, "mlp", 5, (1, 4), 0.0),
    ({"reptile": True}, "mlp", 5, (1, 4), 0.3),
    ({"inner_steps": 3, "memory": "recompute"}, "ssm", 5, (2, 3), 0.3),
]


def on_ranks_as_one_process(group, folder):
    for options, kind, count, sizes, radius in WAYS:
        # SGD, because Adam makes a rounding of a gradient near 0 as large as the step.
        options = {"inner_lr": 0.05, "outer_lr": 0.05, "optimizer": torch.optim.SGD, **options}
        one = MetaMAML(network(kind), **options)
        shared = MetaMAML(network(kind, seed=group.rank), **options, group=group)  # started as on rank 0
        start = [p.detach().clone() for p in one.model.parameters()]
        for step in range(4):
            tasks = draw(count, step, ragged=step == 3)
            loss_fns = [l1_loss if i % 2 else mse_loss for i in range(count)]
            mine = range(sizes[0]) if group.rank == 0 else range(sizes[0], count)
            wanted = one.meta_update(tasks, loss_fns, kl_radius=radius)
            got = shared.meta_update([tasks[i] for i in mine], [loss_fns[i] for i in mine], kl_radius=radius)
            assert got == pytest.approx(wanted, rel=1e-5)
            torch.testing.assert_close(shared.last_losses, one.last_losses, rtol=1e-5, atol=1e-6)
        close(shared.model, one.model)
        for name, rate in one.inner_lrs.items():
            torch.testing.assert_close(shared.inner_lrs[name], rate, rtol=1e-4, atol=1e-6)
        assert any((p - q).abs().max() > 1e-3 for p, q in zip(start, one.model.parameters(), strict=True))
        everywhere = group.all_gather(torch.cat([p.detach().flatten() for p in shared.model.parameters()]))
        assert torch.equal(everywhere[0], everywhere[1])


def on_ranks_sequences_of_other_lengths_as_one_process(group, folder):
    loss_fn, options = MaskedLoss(nn.MSELoss(reduction="none")), {"optimizer": torch.optim.SGD}
    one = MetaMAML(network("ssm"), 0.05, 0.05, **options)
    shared = MetaMAML(network("ssm"), 0.05, 0.05, **options, group=group)
    tasks = [tuple(list(part) for part in draw(1, i, time=3 + i)[0]) for i in range(5)]
    wanted = one.meta_update(tasks, loss_fn)
    assert shared.meta_update(tasks[:2] if group.rank == 0 else tasks[2:], loss_fn) == pytest.approx(wanted, rel=1e-5)
    close(shared.model, one.model)


def on_ranks_a_parameter_that_is_not_used(group, folder):
    """It gets no gradient, as in one process: weight decay would move it."""

    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Linear(2, 1)
            self.spare, self.second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.used(x) if x.shape[1] == 6 else self.used(x) * self.second

    def optimizer(parameters, lr):
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.5)

    maml = MetaMAML(Spare(), 0.1, 0.1, optimizer=optimizer, group=group)
    maml.meta_update(draw(2, 0, time=6 if group.rank else 5), mse_loss)
    assert torch.equal(maml.model.spare, torch.ones(3)) and maml.model.second != 1


def on_ranks_what_is_not_finite_on_one_is_left_out_on_all(group, folder):
    maml = MetaMAML(network(), 0.1, 0.1, group=group)
    before = [p.detach().clone() for p in maml.model.parameters()]
    tasks = draw(2, group.rank)
    if group.rank == 1:
        tasks[1][3][0] = math.nan
    assert math.isnan(maml.meta_update(tasks, mse_loss)) and maml.skipped_updates == 1
    assert all(torch.equal(p, q) for p, q in zip(before, maml.model.parameters(), strict=True))
    assert not maml.optimizer.state
    maml.meta_update(draw(2, group.rank), mse_loss)
    assert maml.skipped_updates == 1 and maml.optimizer.state


def on_ranks_what_fails_on_one_fails_on_all(group, folder):
    maml = MetaMAML(network(), 0.1, 0.1, group=group)
    good = draw(2, 0)

    def broken(prediction, target):
        raise ArithmeticError("no loss today")

    for kind, text, args, radius in (
        (ValueError, r"tasks\[0\] must be", ([good[0][:3]], mse_loss), 0.0),
        (TypeError, "loss_fn must be callable", (good, 3), 0.0),
        (ValueError, "kl_radius must be >= 0", (good, mse_loss), -1.0),
        (ArithmeticError, "no loss today", (good, broken), 0.0),
        (ArithmeticError, "no loss today", (good, broken), 0.1),
    ):
        if group.rank == 0:
            with pytest.raises(kind, match=text):
                maml.meta_update(*args, kl_radius=radius)
        else:
            with pytest.raises(RankError, match=r"^MetaMAML.meta_update: rank 0 of 2 failed, its own error says why$"):
                maml.meta_update(good, mse_loss, kl_radius=max(0.0, radius))
    with pytest.raises(ValueError, match=r"^MetaMAML.meta_update: tasks is empty on all ranks$"):
        maml.meta_update([], mse_loss)
    with pytest.raises(ValueError, match=r"^MetaMAML: model has other parameters or buffers on rank 1 than on rank 0$"):
        MetaMAML(nn.Linear(2, 1 + group.rank), 0.1, 0.1, group=group)
    assert maml.skipped_updates == 0 and not maml.optimizer.state


def trainer(group=None, **options):
    torch.manual_seed(3)
    policy = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    options = {"optimizer": torch.optim.SGD, "progress": False, **options}
    return MetaMAMLTrainer(policy, 1e-2, 1e-2, group=group, **options)


class Scalars(list):
    def add_scalar(self, *args):
        self.append(args)


def on_ranks_the_trainer(group, folder):
    def batches(kind):
        if kind == "list":
            return TaskBatch(draw_flat(9), batch_size=5, sampling="adaptive")
        return TaskBatch(SinusoidTasks(shots=5), batch_size=3)

    def draw_flat(count):
        return [tuple(t[..., :1] for t in task) for task in draw(count, 5)]

    for kind, radii in (("list", (0.0, 0.5)), ("endless", (0.0,))):
        log = Scalars()
        one, shared = trainer(kl_radii=radii), trainer(group, kl_radii=radii, log=log)
        theirs, mine = batches(kind), batches(kind)
        wanted = one.meta_train(theirs, 12)
        path = folder / kind / "run.safetensors"  # only rank 0's machine has the folder
        path.parent.mkdir(exist_ok=True)
        got = shared.meta_train(mine, 12, checkpoint=path, checkpoint_every=5)
        assert got == pytest.approx(wanted, rel=1e-4)
        torch.testing.assert_close(mine.scores, theirs.scores, rtol=1e-4, atol=0, equal_nan=True)
        for a, b in zip(shared.mamls, one.mamls, strict=True):
            close(a.model, b.model)
        assert len(log) == (0 if group.rank else 12 * (1 + len(radii)))
        again = trainer(group, kl_radii=radii)
        assert again.meta_train(batches(kind), 12, checkpoint=path) == got and again.iteration == 12
        alone = trainer(kl_radii=radii)  # another number of ranks goes on from it
        if group.rank == 0:
            assert alone.meta_train(batches(kind), 14, checkpoint=path)[:12] == got


class Numbers(list):
    """Extra state: the numbers of the meta-updates that this rank has seen."""

    def state_dict(self):
        return list(self)

    def load_state_dict(self, state):
        self[:] = state


def on_ranks_extra_state_is_that_of_rank_zero(group, folder):
    path, task_batch = folder / "extra.safetensors", TaskBatch(SinusoidTasks(), batch_size=3)
    shared, seen = trainer(group), Numbers()
    shared.meta_train(task_batch, 3, checkpoint=path, on_iteration=lambda n, *_: seen.append(n), extra_state=seen)
    assert seen == [0, 1, 2]
    again, seen = trainer(group), Numbers()
    again.meta_train(task_batch, 4, checkpoint=path, on_iteration=lambda n, *_: seen.append(n), extra_state=seen)
    assert seen == ([3] if group.rank else [0, 1, 2, 3]) and again.losses[:3] == shared.losses
    too_small = Numbers()
    too_small.load_state_dict = lambda state: [].pop()
    unchanged = trainer(group)
    with pytest.raises(ValueError, match=r"is whole, but does not hold what it should \(IndexError: pop from empty"):
        unchanged.meta_train(task_batch, 5, checkpoint=path, extra_state=too_small)
    assert unchanged.losses == []


def on_ranks_ctrl_c_on_one_ends_all_and_resumes(group, folder):
    path = folder / "interrupted.safetensors"
    whole = trainer(group).meta_train(TaskBatch(SinusoidTasks(), batch_size=3), 9)
    shared, made = trainer(group), []
    update = shared._update

    def interrupted(*args):
        update(*args)
        made.append(1)
        if len(made) == 4 and group.rank == 1:
            signal.raise_signal(signal.SIGINT)

    shared._update = interrupted
    with pytest.raises(KeyboardInterrupt):
        shared.meta_train(TaskBatch(SinusoidTasks(), batch_size=3), 9, checkpoint=path)
    assert shared.iteration == 4
    group.any(True)
    assert trainer(group).meta_train(TaskBatch(SinusoidTasks(), batch_size=3), 9, checkpoint=path) == whole


def on_ranks_a_checkpoint_that_cannot_be_used(group, folder):
    task_batch = TaskBatch(SinusoidTasks(), batch_size=3)
    with pytest.raises(FileNotFoundError, match="checkpoint needs a directory that exists"):
        trainer(group).meta_train(task_batch, 3, checkpoint=folder / "no" / "run")
    path = folder / "damaged"
    if group.rank == 0:
        path.write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"checkpoint.load: .*damaged is damaged or not a checkpoint"):
        trainer(group).meta_train(task_batch, 3, checkpoint=path)


def test_meta_learning_on_two_processes_equals_one(tmp_path):
    functions = [function for name, function in globals().items() if name.startswith("on_ranks_")]
    failed = ranks.failures(__file__, functions, tmp_path)
    assert not failed, "\n".join(failed)


def test_group_of_other_type_raises_type_error():
    with pytest.raises(TypeError, match=r"^MetaMAML: group must be an eaml_ext.distributed.Group or None, got int"):
        MetaMAML(nn.Linear(1, 1), 0.1, 0.1, group=2)
    with pytest.raises(TypeError, match=r"group must be an eaml_ext.distributed.Group or None, got str"):
        MetaMAMLTrainer(nn.Linear(1, 1), group="world")
