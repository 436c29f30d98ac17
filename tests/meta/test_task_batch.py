"""Meta-batches: pure functions of seed and number, every task once a pass, failing tasks more often."""

import collections

import pytest
import torch
from torch.nn.functional import mse_loss

from eaml_ext.meta import MetaMAML, MetaTask, TaskBatch
from eaml_ext.tasks import SinusoidTasks


def pair(value=0.0, n=4):
    x = torch.full((n, 1), float(value))
    return x, x, x, x


class Drawn:
    """Draws its data from torch's global generator."""

    def sample(self):
        x = torch.randn(4, 1)
        return x, x, x, x

    loss = staticmethod(mse_loss)


def test_iter_each_pass_visits_every_task_once_in_another_order():
    tasks = [pair(i) for i in range(12)]
    task_batch = TaskBatch(tasks, 4, seed=3)
    passes = [[int(task[0][0]) for batch in task_batch for task in batch] for _ in range(3)]
    assert len(task_batch) == 3
    for order in passes:
        assert sorted(order) == list(range(12))
    assert passes[0] != passes[1] != passes[2]


def test_iter_tasks_that_fill_no_batch_change_from_pass_to_pass():
    task_batch = TaskBatch([pair(i) for i in range(10)], 4)
    seen = collections.Counter(i for number in range(200) for i in task_batch.batch(number).indices)
    assert sum(seen.values()) == 800 and len(seen) == 10
    assert max(seen.values()) - min(seen.values()) < 40
    assert all(len(set(task_batch.batch(number).indices)) == 4 for number in range(20))


def test_batch_short_list_is_one_batch():
    task_batch = TaskBatch([pair(i) for i in range(3)])
    assert task_batch.batch_size == 3 and [len(batch) for batch in task_batch] == [3]


@pytest.mark.parametrize("sampling", ["uniform", "adaptive"])
def test_batch_same_seed_and_number_is_the_same(sampling):
    tasks = [Drawn() for _ in range(20)]
    one, other = (TaskBatch(tasks, 5, sampling=sampling, seed=7) for _ in range(2))
    state = torch.random.get_rng_state()
    backwards = {number: other.batch(number) for number in (8, 2, 5)}
    assert torch.equal(torch.random.get_rng_state(), state)
    for number in (2, 5, 8):
        torch.manual_seed(number)
        a, b = one.batch(number), backwards[number]
        assert a.indices == b.indices
        assert all(torch.equal(s[0], t[0]) for s, t in zip(a.tasks, b.tasks, strict=True))
    assert one.batch(2).indices != one.batch(3).indices
    assert TaskBatch(tasks, 5, sampling=sampling, seed=8).batch(2).indices != one.batch(2).indices
    assert not torch.equal(one.batch(2).tasks[0][0], one.batch(3).tasks[0][0])  # drawn at each call


def test_batch_objects_and_tuples_may_be_mixed():
    assert isinstance(Drawn(), MetaTask)
    batch = TaskBatch([Drawn(), pair(), Drawn()], 3).batch(0)
    kinds = sorted((i, loss_fn is None) for i, loss_fn in zip(batch.indices, batch.loss_fns, strict=True))
    assert kinds == [(0, False), (1, True), (2, False)]
    drawn = [loss_fn for loss_fn in batch.loss_fns if loss_fn is not None]
    assert drawn[0] is drawn[1]  # shared: they run as one batch


def test_iter_batch_is_accepted_by_meta_update():
    maml = MetaMAML(torch.nn.Linear(1, 1), 0.01, 0.01)
    for tasks in TaskBatch([Drawn() for _ in range(6)], 3):
        assert maml.meta_update(tasks, mse_loss) >= 0


def test_batch_distribution_has_new_tasks_in_every_batch():
    task_batch = TaskBatch(SinusoidTasks(5), 4, seed=2)
    stream = iter(task_batch)
    first, second = next(stream), next(stream)
    assert len(first) == 4 and not torch.equal(first[0][1], second[0][1])
    again = task_batch.batch(1)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(second, again.tasks, strict=True))
    assert again.indices == [-1] * 4
    task_batch.update(again.indices, torch.ones(4))  # nothing to learn from them
    with pytest.raises(TypeError, match="a distribution has no length"):
        len(task_batch)


def test_batch_adaptive_sampling_prefers_tasks_of_high_loss():
    task_batch = TaskBatch([pair(i) for i in range(20)], 2, sampling="adaptive")
    losses = torch.full((20,), 0.1)
    losses[3] = 2.0
    task_batch.update(list(range(20)), losses)
    seen = collections.Counter(i for number in range(2000) for i in task_batch.batch(number).indices)
    assert len(seen) == 20  # no task is forgotten
    # The first of the two is task 3 with probability 0.2 / 20 + 0.8 * 2 / 3.9 = 0.42, the second adds 0.25.
    assert seen[3] / 2000 == pytest.approx(0.67, abs=0.05)
    assert seen[3] > 5 * max(count for i, count in seen.items() if i != 3)
    for _ in range(20):
        task_batch.update([3], torch.tensor([0.1]))
    seen = collections.Counter(i for number in range(2000) for i in task_batch.batch(number).indices)
    assert seen[3] < 2 * min(seen.values())  # learned: as the others again


def test_batch_adaptive_sampling_counts_unseen_tasks_as_worst():
    task_batch = TaskBatch([pair(i) for i in range(10)], 1, sampling="adaptive")
    task_batch.update(list(range(9)), torch.tensor([0.0] * 8 + [1.0]))
    seen = collections.Counter(i for number in range(1000) for i in task_batch.batch(number).indices)
    assert abs(seen[9] - seen[8]) < 120 and seen[9] > 300


def test_update_non_finite_losses_are_ignored():
    task_batch = TaskBatch([pair(i) for i in range(3)], 2, sampling="adaptive")
    task_batch.update([0, 1], torch.tensor([1.0, torch.nan]))
    task_batch.update([0], torch.tensor([torch.inf]))
    scores = task_batch.state_dict()["scores"]
    assert scores[0] == 1 and scores[1] != scores[1]
    task_batch.update([0, 1, 2], torch.zeros(3))
    for _ in range(60):
        task_batch.update([0, 1, 2], torch.zeros(3))
    assert len(task_batch.batch(0).indices) == 2  # all solved: uniform


def test_load_state_dict_running_losses_are_restored():
    one, other = (TaskBatch([pair(i) for i in range(8)], 2, sampling="adaptive") for _ in range(2))
    one.update(list(range(8)), torch.rand(8).square() * 10)
    other.load_state_dict(one.state_dict())
    assert [one.batch(i).indices for i in range(50)] == [other.batch(i).indices for i in range(50)]
    with pytest.raises(ValueError, match="state is of 8 tasks, wanted 3"):
        TaskBatch([pair() for _ in range(3)]).load_state_dict(one.state_dict())


class WrongSample(Drawn):
    def sample(self):
        return torch.ones(2, 1), torch.ones(3, 1), torch.ones(2, 1), torch.ones(2, 1)


def bad_calls():
    good = TaskBatch([pair(), pair()], 2)
    yield lambda: TaskBatch([]), ValueError, "TaskBatch: tasks is empty"
    yield lambda: TaskBatch(3), TypeError, "tasks must be a list of tasks or a distribution of them, got int"
    yield lambda: TaskBatch("abc"), TypeError, "TaskBatch: tasks must be a list, got str"
    yield lambda: TaskBatch(Drawn()), TypeError, "tasks must be a list of tasks or a distribution of them, got Drawn"
    yield lambda: TaskBatch([3]), TypeError, "tasks[0] must be a tuple or have sample() and loss(), got int"
    yield (
        lambda: TaskBatch([pair(), pair()[:3]]),
        ValueError,
        "tasks[1] must be (support_x, support_y, query_x, query_y)",
    )
    yield lambda: TaskBatch([pair()], 0), ValueError, "batch_size must be > 0"
    yield lambda: TaskBatch([pair()], 1.5), TypeError, "batch_size must be an integer"
    yield lambda: TaskBatch([pair()], sampling="best"), ValueError, "sampling must be uniform or adaptive, got 'best'"
    yield lambda: TaskBatch([pair()], seed=-1), ValueError, "seed must be >= 0"
    yield lambda: TaskBatch([pair()], seed=2**32), ValueError, "seed must be in [0, 2**32)"
    yield lambda: TaskBatch(SinusoidTasks(), sampling="adaptive"), ValueError, "sampling must be uniform for a distr"
    yield lambda: good.batch(-1), ValueError, "iteration must be >= 0"
    yield lambda: good.batch("0"), TypeError, "iteration must be an integer"
    yield lambda: TaskBatch([WrongSample()]).batch(0), ValueError, "support_y has shape (3, 1)"
    yield lambda: good.update([0], [1.0]), TypeError, "losses must be a torch.Tensor"
    yield lambda: good.update([0], torch.ones(2)), ValueError, "losses must have shape (1,), got (2,)"
    yield lambda: good.update([2], torch.ones(1)), ValueError, "indices must be in [0, 2), got 2"
    yield lambda: good.update([0.5], torch.ones(1)), ValueError, "indices must be in [0, 2), got 0.5"


@pytest.mark.parametrize(("call", "error", "text"), list(bad_calls()), ids=lambda v: v if isinstance(v, str) else "")
def test_task_batch_bad_argument_raises_one_sentence(call, error, text):
    with pytest.raises(error) as info:
        call()
    assert text in str(info.value) and "\n" not in str(info.value)


def test_batch_adaptive_sampling_with_negative_losses_prefers_the_higher():
    x, y = torch.randn(4, 1), torch.randn(4, 1)
    batches = TaskBatch([(x, y, x, y)] * 3, 1, sampling="adaptive")
    batches.update([0, 1, 2], torch.tensor([-5.0, -4.0, -0.01]))
    drawn = collections.Counter(i for n in range(300) for i in batches.batch(n).indices)
    assert drawn[2] > 2 * drawn[1] > 2 * drawn[0]
