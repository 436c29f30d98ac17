"""Random draws of a buffer, also in DataLoader workers. tests/test_workers.py starts real workers."""

import copy
import pickle

import pytest
import torch

from eaml_ext.distributed import torchrun_group
from eaml_ext.experience import ExperienceBuffer, ShardedExperienceBuffer, retrieval


def test_get_batch_same_seed_repeats_uniform_draws():
    buffer = ExperienceBuffer(10, seed=3)
    buffer.add(state=torch.arange(17.0).unsqueeze(1))
    drawn = buffer.get_batch(20_000)
    counts = torch.bincount(drawn.state.flatten().long(), minlength=17)
    assert counts[:7].sum() == 0
    assert (counts[7:] - 2000).abs().max() < 300  # seven standard deviations
    other = ExperienceBuffer(10, seed=3)
    other.add(state=torch.arange(17.0).unsqueeze(1))
    assert torch.equal(other.get_batch(20_000).indices, drawn.indices)
    for n, error in ((0, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match=r"^ExperienceBuffer.get_batch: n must be"):
            buffer.get_batch(n)


ROWS = torch.arange(10_000.0).unsqueeze(1)


def filled(seed=0, **options):
    buffer = ExperienceBuffer(len(ROWS), seed=seed, **options)
    buffer.add(state=ROWS, target=ROWS, priority=1.0)
    return buffer


DRAWS = {
    "get_batch": lambda buffer: buffer.get_batch(20).indices,
    "weighted": lambda buffer: buffer.get_batch(20, weighted=True).indices,
    "uniform": lambda buffer: retrieval.uniform(20)(buffer, {})["states"],
}


COPIES = {"fork": copy.deepcopy, "spawn": lambda buffer: pickle.loads(pickle.dumps(buffer))}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("draw", DRAWS)
def test_draws_in_workers_differ_by_worker_and_epoch_and_repeat_with_the_seed(draw, way, worker):
    buffer, draws = filled(), {}
    for attempt in range(2):
        for seed in (7, 8, 2**63 + 5):  # two workers of one epoch, and a worker of another
            worker(None)
            inside = COPIES[way](buffer)
            worker(seed)
            one, two = DRAWS[draw](inside), DRAWS[draw](inside)
            assert not torch.equal(one, two)
            draws[seed, attempt] = one
        worker(None)
        buffer.get_batch(3)  # draws of the parent must not change those of workers
    first = [draws[seed, 0] for seed in (7, 8, 2**63 + 5)]
    assert not any(torch.equal(first[i], first[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert all(torch.equal(draws[seed, 0], draws[seed, 1]) for seed in (7, 8, 2**63 + 5))


def test_draws_in_a_worker_depend_on_the_seed_of_the_buffer(worker):
    worker(7)
    one, same, other = (filled(seed).get_batch(20).indices for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_draws_of_buffers_loaded_inside_workers_differ(worker, tmp_path):
    filled().save(tmp_path / "b")
    draws = []
    for seed in (7, 8):
        worker(seed)
        draws.append(ExperienceBuffer.load(tmp_path / "b").get_batch(20).indices)
    assert not torch.equal(*draws)


def test_draws_of_a_shard_in_workers_differ(worker):
    with torchrun_group(alone=True) as group:
        shard = ShardedExperienceBuffer(len(ROWS), group=group, seed=0)
        shard.add(state=ROWS)
    draws = []
    for seed in (7, 8):
        local = copy.deepcopy(shard.local)
        worker(seed)
        draws.append(local.get_batch(20).indices)
        worker(None)
    assert not torch.equal(*draws)


def test_copy_inside_a_worker_draws_what_the_original_draws(worker):
    buffer = filled()
    worker(7)
    buffer.get_batch(3)
    for other in (copy.deepcopy(buffer), COPIES["spawn"](buffer)):
        assert torch.equal(other.get_batch(20).indices, copy.deepcopy(buffer).get_batch(20).indices)
    worker(None)  # a worker may send its buffer to the main process
    assert torch.equal(copy.deepcopy(buffer).get_batch(20).indices, buffer.get_batch(20).indices)


def test_draws_outside_of_workers_do_not_change_with_workers(worker):
    buffer, twin = filled(), filled()
    worker(7)
    copy.deepcopy(buffer).get_batch(5)
    worker(None)
    assert torch.equal(buffer.get_batch(20).indices, twin.get_batch(20).indices)


class Restored(torch.utils.data.Dataset):
    """Items are draws after ``state_dict`` and after ``load_state_dict``, into the same buffer or another."""

    def __init__(self):
        self.buffer = ExperienceBuffer(1000, seed=0)
        self.buffer.add(state=torch.arange(1000.0)[:, None])

    def __len__(self):
        return 2

    def __getitem__(self, i):
        self.buffer.get_batch(3)
        state, other = self.buffer.state_dict(), ExperienceBuffer(1000)
        wanted = self.buffer.get_batch(5).state
        target = (self.buffer, other)[i]
        target.load_state_dict(state)
        return wanted, target.get_batch(5).state


@pytest.mark.parametrize("workers", [0, 1])
def test_load_state_dict_in_a_worker_continues_the_stream(workers):
    for wanted, got in torch.utils.data.DataLoader(Restored(), batch_size=None, num_workers=workers):
        assert torch.equal(wanted, got)
