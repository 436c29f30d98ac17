"""Shards on two processes answer as one buffer would."""

import math
import random
import re

import pytest
import ranks
import torch

from eaml_ext import checkpoint
from eaml_ext.distributed import RankError, torchrun_group
from eaml_ext.experience import ExperienceBuffer, ShardedExperienceBuffer

CASES = 1000


def draw(case, kind):
    """Return the sizes and options of a case, equal on both ranks."""
    draws = random.Random(case)
    big = draws.random() < 0.03  # large enough to be packed
    return {
        "turn": draws.randint(300, 400) if big else draws.randint(1, 12),  # slots of a shard
        "dim": 64 if big else draws.randint(1, 3),
        "metric": draws.choice(["sqeuclidean", "cosine"]),
        "half_life": draws.choice([None, None, 5.0]) if kind == "even" else None,
        "weighted": draws.random() < 0.4,
        "dtype": draws.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16]),
        "adds": [(draws.randint(0, 400), draws.randint(0, 400)) if big else (draws.randint(0, 9), draws.randint(0, 9))
                 for _ in range(draws.randint(1, 4))],
        "clear": draws.random() < 0.1,
    }  # fmt: skip


def items(n, case, rank, generator):
    """Return items whose embeddings are small integers, so that many are equal."""
    fields = {
        "number": torch.arange(n) * 2 + rank,
        "state": torch.randn(n, 2, generator=generator),
        "done": torch.rand(n, generator=generator) > 0.5,
        "nothing": torch.zeros(n, 0),
        "context_embedding": torch.randint(-2, 3, (n, case["dim"]), generator=generator).to(case["dtype"]),
        "task": torch.randint(0, 3, (n,), generator=generator),
    }
    if case["weighted"]:
        priority = torch.tensor([0.5, 1.0, 4.0])[torch.randint(0, 3, (n,), generator=generator)]
        fields["priority"] = priority.double() if case["dim"] == 2 else priority
    return fields


def same(found, wanted, *, places):
    """Compare bit by bit. Without ``places``, indices differ because the one buffer has another numbering."""
    assert found.fields.keys() == wanted.fields.keys()
    for name, value in wanted.fields.items():
        assert found.fields[name].dtype == value.dtype and torch.equal(found.fields[name], value), name
    assert torch.equal(found.distances, wanted.distances)
    if places:
        assert torch.equal(found.indices, wanted.indices) and torch.equal(found.generations, wanted.generations)


def compare(group, seed, kind):
    case, generator = draw(seed, kind), torch.Generator().manual_seed(seed)
    options = {"metric": case["metric"], "age_half_life": case["half_life"]}
    sharded = ShardedExperienceBuffer(case["turn"] * group.size, group=group, **options)
    whole = ExperienceBuffer(case["turn"] * group.size, **options)
    added: list[list] = [[], []]
    for sizes in case["adds"]:
        sizes = (sizes[0], sizes[0]) if kind == "even" else sizes
        parts = [items(n, case, rank, generator) for rank, n in enumerate(sizes)]
        sharded.add(**parts[group.rank])
        if kind == "uneven":
            for rank, part in enumerate(parts):
                added[rank].append(part)
            continue
        whole.add(**{name: torch.stack([parts[0][name], parts[1][name]], 1).flatten(0, 1) for name in parts[0]})
        if case["clear"]:
            sharded.local.clear()
            whole.clear()
    if kind == "uneven":  # the live items in the order of their indices
        shards = [{name: torch.cat([part[name] for part in parts]) for name in parts[0]} for parts in added]
        counts = [len(shard["task"]) for shard in shards]
        live = sorted(
            (number % case["turn"], rank, number)
            for rank in range(2)
            for number in range(max(0, counts[rank] - case["turn"]), counts[rank])
        )
        chosen = torch.tensor([number + rank * counts[0] for _, rank, number in live], dtype=torch.int64)
        whole.add(**{name: torch.cat([shard[name] for shard in shards])[chosen] for name in shards[0]})
    draws = random.Random(10_000 + seed * 2 + group.rank)  # each rank has other queries
    k, exclude = draws.randint(1, 20), draws.choice([None, None, 1, [0, 2], torch.tensor([2]), []])
    query = torch.randint(-2, 3, (draws.choice([1, 3]), case["dim"])).to(case["dtype"])
    query = query[0] if draws.random() < 0.3 else query
    if not len(whole):
        with pytest.raises(ValueError, match=r"^ShardedExperienceBuffer.retrieve: the buffer is empty$"):
            sharded.retrieve(query, k, exclude)
        return 0
    same(sharded.retrieve(query, k, exclude), whole.retrieve(query, k, exclude), places=kind == "even")
    return 1


def on_ranks_retrieve_equals_one_buffer(group, folder):
    torch.manual_seed(group.rank)
    compared = sum(compare(group, seed, "even") for seed in range(CASES * 7 // 10))
    compared += sum(compare(group, seed, "uneven") for seed in range(CASES * 3 // 10))
    assert compared > 0.85 * CASES  # the other buffers were empty


def on_ranks_retrieve_uneven_shards_weighs_ages_over_all_ranks(group, folder):
    """Rank 0 has overwritten two items, rank 1 has three: weights follow the numbers over all ranks."""
    sharded = ShardedExperienceBuffer(8, group=group, age_half_life=4.0)
    counts = (6, 3)
    for s in range(counts[group.rank]):
        sharded.add(number=s * 2 + group.rank, context_embedding=torch.zeros(1))
    found = sharded.retrieve(torch.zeros(1), 8)
    numbers = [10, 8, 6, 5, 4, 3, 1]  # items 0 and 2, on rank 0, are overwritten
    assert found.number.tolist() == numbers
    ages = [10 - number for number in numbers]  # item 10 is the newest of all ranks
    torch.testing.assert_close(found.distances, torch.tensor(ages) * math.log(2) / 4)


def on_ranks_retrieve_differentiates_the_query(group, folder):
    sharded, whole = ShardedExperienceBuffer(20, group=group), ExperienceBuffer(20)
    keys = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    sharded.add(context_embedding=keys[group.rank :: 2])
    whole.add(context_embedding=keys)
    grads = []
    for buffer in (sharded, whole):
        query = torch.full((2, 3), 0.1 * (1 + group.rank), requires_grad=True)
        grads += torch.autograd.grad(buffer.retrieve(query, 4).distances.square().sum(), query)
    assert grads[0].abs().min() > 0
    torch.testing.assert_close(*grads)


def on_ranks_rank_without_items_receives_the_schema(group, folder):
    sharded = ShardedExperienceBuffer(8, state_dim=2, group=group)
    with pytest.raises(ValueError, match=r"^ShardedExperienceBuffer.retrieve: the buffer is empty$"):
        sharded.retrieve(torch.zeros(3), 1)
    if group.rank == 1:
        sharded.add(state=torch.ones(2), context_embedding=torch.zeros(3), task=4)
    found = sharded.retrieve(torch.zeros(3), 2)
    assert found.state.tolist() == [[1.0, 1.0]] and found.indices.tolist() == [1]
    with pytest.raises(ValueError, match=r"state has shape \(3,\), wanted \(2,\)"):
        sharded.add(state=torch.ones(3), context_embedding=torch.zeros(3), task=4)
    queries = torch.zeros(3 * group.rank, 3)  # rank 0 has no queries
    assert sharded.retrieve(queries, 2).state.shape == (3 * group.rank, 1, 2)
    assert sharded.retrieve(queries, 2, exclude_task=4).state.shape[1] == (1 - group.rank)


def on_ranks_different_schemas_raise(group, folder):
    sharded = ShardedExperienceBuffer(8, group=group)
    sharded.add(state=torch.ones(2 + group.rank), context_embedding=torch.zeros(3))
    with pytest.raises(
        ValueError, match=r"retrieve: rank 1 stores other fields, shapes or dtypes than rank 0, which has {"
    ):
        sharded.retrieve(torch.zeros(3), 2)


def on_ranks_wrong_argument_on_one_rank_raises_on_all(group, folder):
    sharded = ShardedExperienceBuffer(8, group=group)
    sharded.add(state=torch.ones(2), context_embedding=torch.zeros(3))
    good = (torch.zeros(3), 2)
    bad = {
        r"query_embedding has shape \(2,\), wanted \(3,\) or \(queries, 3\)": (torch.zeros(2), 2),
        "query_embedding must be a torch.Tensor, got int": (3, 2),
        "query_embedding must be float32, got float64": (torch.zeros(3).double(), 2),
        "query_embedding must be finite": (torch.full((3,), torch.nan), 2),
        "k must be > 0, got 0": (torch.zeros(3), 0),
        "k must be an integer, got 1.5": (torch.zeros(3), 1.5),
        "the buffer stores no task, only state, context_embedding": (*good, 3),
    }
    for text, args in bad.items():
        if group.rank == 0:
            with pytest.raises((TypeError, ValueError), match=f"^ShardedExperienceBuffer.retrieve: {text}"):
                sharded.retrieve(*args)
        else:
            with pytest.raises(RankError, match=r"retrieve: rank 0 of 2 failed, its own error says why$"):
                sharded.retrieve(*good)
    tasks = ShardedExperienceBuffer(8, group=group)
    tasks.add(context_embedding=torch.zeros(3), task=1)
    with pytest.raises(TypeError, match="exclude_task must be an integer or a list or tensor of them"):
        tasks.retrieve(*good, exclude_task="one")
    plain = ShardedExperienceBuffer(8, group=group)
    plain.add(state=torch.ones(2))
    with pytest.raises(ValueError, match="the buffer stores no context_embedding, only state"):
        plain.retrieve(*good)
    assert len(sharded.retrieve(*good)) == 2  # the ranks still make the same calls


def on_ranks_restored_shards_answer_as_before(group, folder):
    options = {"age_half_life": 6.0, "metric": "cosine"}
    sharded = ShardedExperienceBuffer(10, group=group, **options)
    whole = ExperienceBuffer(10, **options)
    rows = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    sharded.add(context_embedding=rows[group.rank :: 2], priority=0.5)
    whole.add(context_embedding=rows, priority=0.5)
    wanted = whole.retrieve(rows[3], 6)
    sharded.save(folder / "kept")
    other = ShardedExperienceBuffer(10, group=group, **options)
    other.load_state_dict(sharded.state_dict())
    for buffer in (sharded, ShardedExperienceBuffer.load(folder / "kept", group), other):
        same(buffer.retrieve(rows[3], 6), wanted, places=True)
        assert buffer.capacity == 10
    disk = ShardedExperienceBuffer(10, group=group, directory=folder / "disk", **options)
    disk.add(context_embedding=rows[group.rank :: 2], priority=0.5)
    disk.local.close()
    disk = ShardedExperienceBuffer.open(folder / "disk", group)
    same(disk.retrieve(rows[3], 6), wanted, places=False)
    with pytest.raises(ValueError, match=r"state is of rank \d of 2, this is rank \d of 2"):
        other.load_state_dict({**sharded.state_dict(), "rank": 1 - group.rank})
    with pytest.raises(ValueError, match=r"capacity must be a multiple of the 2 ranks, got 9$"):
        ShardedExperienceBuffer(9, group=group)


def test_sharded_buffer_on_two_processes_equals_one_buffer(tmp_path):
    functions = [function for name, function in globals().items() if name.startswith("on_ranks_")]
    failed = ranks.failures(__file__, functions, tmp_path)
    assert not failed, "\n".join(failed)


def test_sharded_wrong_argument_raises(tmp_path):
    with pytest.raises(TypeError, match=r"^ShardedExperienceBuffer: group must be .*, got NoneType"):
        ShardedExperienceBuffer(8, group=None)
    with torchrun_group(alone=True) as group:
        for options, error, text in (
            ({"capacity": 0}, ValueError, "ShardedExperienceBuffer: capacity must be > 0"),
            ({"capacity": 1.0}, TypeError, "ShardedExperienceBuffer: capacity must be an integer"),
            ({"state_dim": 0}, ValueError, "ExperienceBuffer: state_dim must be > 0"),
            ({"action_dim": "x"}, TypeError, "ExperienceBuffer: action_dim must be an integer"),
            ({"device": "nowhere"}, ValueError, "ExperienceBuffer: device 'nowhere' cannot be used"),
            ({"seed": -1}, ValueError, "ExperienceBuffer: seed must be >= 0"),
            ({"metric": "x"}, ValueError, "ExperienceBuffer: metric must be"),
            ({"age_half_life": 0}, ValueError, "ExperienceBuffer: age_half_life must be > 0"),
            ({"directory": 3}, TypeError, "ShardedExperienceBuffer: directory must be a path, got int"),
        ):
            with pytest.raises(error, match=f"^{re.escape(text)}"):
                ShardedExperienceBuffer(**{"capacity": 8, "group": group, **options})
        buffer = ShardedExperienceBuffer(8, group=group)
        assert repr(buffer).startswith("ShardedExperienceBuffer(rank 0 of 1: ExperienceBuffer(0 of 8")
        with pytest.raises(TypeError, match=r"^ShardedExperienceBuffer.save: directory must be a path, got int"):
            buffer.save(3)
        with pytest.raises(ValueError, match=r"load_state_dict: state must be a dict as state_dict"):
            buffer.load_state_dict({})
        with pytest.raises(FileNotFoundError, match=r"there is no file .*rank-0-of-1.safetensors"):
            ShardedExperienceBuffer.load(tmp_path, group)
        with pytest.raises(TypeError, match=r"load: group must be"):
            ShardedExperienceBuffer.load(tmp_path, None)
        with pytest.raises(TypeError, match=r"open: group must be"):
            ShardedExperienceBuffer.open(tmp_path, None)
        with pytest.raises(FileNotFoundError, match=r"there is no directory"):
            ShardedExperienceBuffer.open(tmp_path, group)
        checkpoint.save_state(tmp_path / "rank-0-of-1.safetensors", {}, kind="SSM")
        with pytest.raises(ValueError, match="holds SSM, wanted ShardedExperienceBuffer"):
            ShardedExperienceBuffer.load(tmp_path, group)
