"""Collectives on two processes, and their errors when a process fails, does not answer or dies."""

import os
import time
import weakref
from datetime import timedelta

import numpy as np
import pytest
import ranks
import torch

from eaml_ext.distributed import Group, RankError, destroy_process_group, torchrun_group
from eaml_ext.experience import ShardedExperienceBuffer


def on_ranks_collectives(group, folder):
    mine = torch.tensor([group.rank, 5])
    assert group.all_gather(mine).tolist() == [[0, 5], [1, 5]]
    assert group.all_gather(torch.tensor(group.rank == 1)).tolist() == [False, True]
    parts = [torch.full((2, 2), 1.0 + group.rank), torch.tensor(3.0).double(), torch.ones(0), mine[:1].clone()]
    group.all_reduce_(parts)
    assert [part.tolist() for part in parts] == [[[3.0, 3.0], [3.0, 3.0]], 6.0, [], [1]]
    weights = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(weights.weight, group.rank + 1.0)
    counter = torch.tensor(group.rank)
    group.broadcast_([weights.weight, counter])
    assert (weights.weight == 1).all() and counter == 0 and weights.weight.requires_grad
    # Rank 0 sends one byte to itself and two to rank 1, rank 1 none to rank 0 and one to itself.
    send, receive = ([1, 2], [1, 0]) if group.rank == 0 else ([0, 1], [2, 1])
    got = group.all_to_all(torch.arange(sum(send), dtype=torch.uint8) + 10 * group.rank, send, receive)
    assert got.tolist() == ([0] if group.rank == 0 else [1, 2, 10])
    assert group.any(group.rank == 1) and not group.any(False)
    assert group.broadcast_object(1, {"is": group.rank}) == {"is": 1}
    assert group.broadcast_from_rank_zero(lambda: group.rank) == 0


def on_ranks_error_of_one_rank_is_raised_on_all(group, folder):
    def fails():
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        group.broadcast_from_rank_zero(fails)
    kind, text = (KeyError, "lost") if group.rank else (RankError, "here: rank 1 of 2 failed")
    with pytest.raises(kind, match=text), group.errors_on_all_ranks("here"):
        if group.rank == 1:
            raise KeyError("lost")
    with group.errors_on_all_ranks("here"):
        pass


def on_ranks_rank_that_does_not_answer_raises_on_the_other(group, folder):
    import torch.distributed as dist

    short = Group(dist.new_group(timeout=timedelta(seconds=1)))
    assert repr(short) == f"Group(rank {group.rank} of 2)"
    short.any(True)
    if group.rank == 1:
        time.sleep(4)
        with pytest.raises(RankError):
            short.any(True)
    else:
        start = time.monotonic()
        for limit in (3.5, 0.5):  # the second call raises at once
            with pytest.raises(RankError, match=r"^distributed.all_gather: another rank does not answer, ra") as error:
                short.any(True)
            assert time.monotonic() - start < limit and "\n" not in str(error.value)
            start = time.monotonic()
    group.any(True)  # the other group still works


def on_ranks_rank_that_dies_raises_on_the_other(group, folder):
    buffer = ShardedExperienceBuffer(8, group=group)
    buffer.add(context_embedding=torch.zeros(3))
    buffer.retrieve(torch.zeros(3), 1)
    if group.rank == 1:
        os._exit(9)
    start = time.monotonic()
    with pytest.raises(RankError, match=r"another rank has died or closed the connection, rank 0 of 2") as error:
        buffer.retrieve(torch.zeros(3), 1)
    assert time.monotonic() - start < 5 and "\n" not in str(error.value)
    assert len(buffer.local.retrieve(torch.zeros(3), 1)) == 1  # the local shard still works


def test_group_on_two_processes_returns_and_raises_alike(tmp_path):
    functions = [
        on_ranks_collectives,
        on_ranks_error_of_one_rank_is_raised_on_all,
        on_ranks_rank_that_does_not_answer_raises_on_the_other,
        on_ranks_rank_that_dies_raises_on_the_other,
    ]
    failed = ranks.failures(__file__, functions, tmp_path)
    assert failed == ["rank 1 ended with 9:\n"], "\n".join(failed)


def test_shard_of_all_ranks_is_consecutive_complete_and_even():
    with torchrun_group(alone=True) as group:
        for size in (1, 2, 3, 5):
            group.size = size
            for count in range(12):
                shares = [group.shard(count, rank) for rank in range(size)]
                assert [i for share in shares for i in share] == list(range(count))
                assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_group_numpy_integers_are_accepted_as_ints():
    with torchrun_group(np.float32(30), alone=True) as group:
        assert group.broadcast_object(np.int64(0), "value") == "value" and group.any(np.bool_(True))
        group.size = 3
        share = group.shard(np.uint8(200), np.int64(1))  # in uint8 the products would overflow
        assert share == range(66, 133) and type(share.stop) is int
        for rank in (-1, 3, 1.0):
            with pytest.raises((TypeError, ValueError), match=r"^Group.shard: rank must be "):
                group.shard(5, rank)
        with pytest.raises(ValueError, match=r"^Group.shard: count must be >= 0, got -1$"):
            group.shard(-1)
        with pytest.raises(ValueError, match=r"^Group.broadcast_object: rank must be in \[0, 3\), got 3$"):
            group.broadcast_object(3, None)


def test_group_without_torch_distributed_raises_value_error():
    with pytest.raises(ValueError, match=r"^Group: torch.distributed is not initialised: run under torchrun"):
        Group()


def test_group_of_another_type_raises_type_error():
    with (
        torchrun_group(alone=True),
        pytest.raises(TypeError, match=r"^Group: group must be a torch.distributed.ProcessGroup, got int"),
    ):
        Group(3)


@pytest.mark.parametrize(("timeout", "error"), [(0, ValueError), ("x", TypeError), (float("inf"), ValueError)])
def test_torchrun_group_bad_timeout_raises(timeout, error):
    with pytest.raises(error, match=r"^torchrun_group: timeout must be "), torchrun_group(timeout):
        pass


def test_torchrun_group_alone_that_is_no_bool_raises_type_error():
    match = r"^torchrun_group: alone must be True or False, got int"
    with pytest.raises(TypeError, match=match), torchrun_group(alone=1):
        pass


def test_torchrun_group_inside_another_uses_and_keeps_the_process_group():
    with torchrun_group(alone=True) as group:
        with torchrun_group() as inner:
            assert inner.size == 1
        assert group.any(True)


def test_torchrun_group_with_a_missing_rank_raises_rank_error(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    match = r"^torchrun_group: not all of 2 ranks have come within 0.5 s \("
    with pytest.raises(RankError, match=match), torchrun_group(0.5):
        pass


def test_group_after_its_process_group_is_destroyed_raises_and_keeps_no_threads():
    """Process groups that a Group kept alive beyond their destruction aborted one exit of Python in thirty."""
    with torchrun_group(alone=True) as group:
        process_group = weakref.ref(torch.distributed.group.WORLD)
    assert process_group() is None
    with pytest.raises(RankError, match=r"^Group: its process group has been destroyed$"):
        group.any(True)


def test_torchrun_group_destroyed_inside_the_block_ends_without_error():
    with torchrun_group(alone=True):
        destroy_process_group()
    assert not torch.distributed.is_initialized()
