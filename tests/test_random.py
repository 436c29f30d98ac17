"""Seeds: different uses have different keys, and the streams of task distributions keep their values."""

import ast
import itertools
import re
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch

import eaml_ext
from eaml_ext._random import Purpose, check_seed, collection_sequence, derive_seed, seed_sequence
from eaml_ext.meta import TaskBatch
from eaml_ext.tasks import CartPoleTasks, SinusoidTasks
from eaml_ext.tasks.base import SPLITS, collection_stream, task_stream

SOURCES = {path: path.read_text() for path in Path(eaml_ext.__file__).parent.rglob("*.py")}


def test_seed_sequence_no_two_uses_share_a_stream():
    ids = [["a"], ["b"], ["a", "b"], ["b", "a"], ["ab"], ["1"], ["2"]]
    streams, count = set(), 0
    for seed in (0, 1, 2, 3, 2**31, 2**32 - 1, 2**32, 2**63):
        for purpose in Purpose:
            for indices in [(), *itertools.product(range(4)), *itertools.product(range(3), repeat=2)]:
                streams.add(tuple(seed_sequence(seed, purpose, *indices).generate_state(4)))
                count += 1
        streams |= {tuple(collection_sequence(seed, names).generate_state(4)) for names in ids}
        count += len(ids)
    assert len(streams) == count > 2000


@pytest.mark.parametrize("bits", [32, 63])
def test_derive_seed_neighbouring_seeds_purposes_and_indices_differ(bits):
    """Sums such as ``seed + 1`` and ``seed * steps + step`` gave two uses the same seed."""
    keys = list(itertools.product(range(8), Purpose, range(8)))
    seeds = {derive_seed(seed, purpose, index, bits=bits) for seed, purpose, index in keys}
    assert len(seeds) == len(keys) and max(seeds) < 2**bits and max(seeds) > 2 ** (bits - 1)


def test_task_streams_keep_the_values_of_published_results():
    for split, seed, epoch, index in (("train", 0, 0, 0), ("valid", 3, 5, 7), ("test", 2**32 - 1, 2**32 - 1, 9)):
        key = (("train", "valid", "test").index(split), epoch, index)
        want = np.random.SeedSequence(seed, spawn_key=key).generate_state(4)
        assert np.array_equal(task_stream(split, seed, epoch, index).generate_state(4), want)
    tasks = CartPoleTasks().sample(3, "test")
    digest = blake2b("\n".join(task.id for task in tasks).encode(), digest_size=8).digest()
    want = np.random.SeedSequence(5, spawn_key=(int.from_bytes(digest, "little"),)).generate_state(4)
    assert np.array_equal(collection_stream(tasks, 5).generate_state(4), want)
    draw = np.random.default_rng(np.random.SeedSequence(1, spawn_key=(2, 4, 1)))
    x = SinusoidTasks(shots=2, queries=3).draw(1, "test", seed=1, epoch=4)[0].flatten()
    assert np.allclose(x, -5 + 10 * draw.random(5)[:2])


def test_purpose_splits_are_first_in_the_order_of_splits():
    assert [Purpose(i).name for i in range(len(SPLITS))] == [f"{split}_tasks".upper() for split in SPLITS]


def test_purpose_each_member_has_one_use_in_the_package():
    text = "\n".join(source for path, source in SOURCES.items() if path.name != "_random.py")
    uses = re.findall(r"Purpose\.(\w+)", text)
    assert sorted(uses) == sorted(p.name for p in Purpose if p >= len(SPLITS))
    assert text.count("Purpose(SPLITS.index(split))") == 1


def test_package_makes_seed_sequences_in_one_module_and_does_no_arithmetic_on_seeds():
    for path, source in SOURCES.items():
        assert "SeedSequence(" not in source or path.name == "_random.py", path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)):
                names = [getattr(side, "id", getattr(side, "attr", "")) for side in (node.left, node.right)]
                assert "seed" not in names, f"{path}, line {node.lineno}"


def test_task_batch_order_choice_and_data_have_separate_streams(monkeypatch):
    seen = []
    monkeypatch.setattr("eaml_ext.meta.task_batch.derive_seed", lambda *key: seen.append(key) or derive_seed(*key))

    class Drawn:
        def sample(self):
            x = torch.rand(2, 1)
            return x, x, x, x

        def loss(self, prediction, target):
            return (prediction - target).square().mean()

    for sampling in ("uniform", "adaptive"):
        batch = TaskBatch([Drawn() for _ in range(4)], 2, sampling=sampling, seed=1)
        for iteration in range(4):
            batch.batch(iteration)
    purposes = {purpose for _, purpose, _ in seen}
    assert purposes == {Purpose.TASK_ORDER, Purpose.TASK_CHOICE, Purpose.TASK_DATA}
    assert len({derive_seed(*key) for key in seen}) == len(set(seen)) == 2 + 4 + 4


@pytest.mark.parametrize("make", [int, np.int64, np.uint8, torch.tensor])
def test_seed_sequence_any_integral_type_is_accepted(make):
    want = seed_sequence(3, Purpose.PLANNING, 2).generate_state(4)
    assert np.array_equal(seed_sequence(make(3), Purpose.PLANNING, make(2)).generate_state(4), want)
    assert type(check_seed("f", "seed", make(3))) is int


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: seed_sequence(-1, Purpose.PLANNING), ValueError, "seed_sequence: seed must be in .*, got -1"),
        (lambda: seed_sequence(0.5, Purpose.PLANNING), TypeError, "seed_sequence: seed must be an integer, got 0.5"),
        # Two words: with them (2**32 + 5, 7) and (5, 7 * 2**32 + 1) would be one key.
        (lambda: seed_sequence(0, Purpose.PLANNING, 2**32), ValueError, "seed_sequence: indices must be in .*, got .*"),
        (lambda: check_seed("f", "s", 2**32), ValueError, r"f: s must be in \[0, 2\*\*32\), got 4294967296"),
        (lambda: check_seed("f", "s", True), TypeError, "f: s must be an integer, got True"),
    ],
)
def test_seed_or_index_out_of_range_raises(call, error, text):
    with pytest.raises(error, match=f"^{text}$"):
        call()


def test_collection_sequence_ids_with_newlines_equal_no_other_ids():
    lists = [["a", "b"], ["a\nb"], ["a\n", "b"], ["a", "\nb"], [repr(["a\nb"])], ["a", "", "b"], ["a\n\nb"]]
    states = {tuple(collection_sequence(0, ids).generate_state(4)) for ids in lists}
    assert len(states) == len(lists)
    digest = int.from_bytes(blake2b(b"a\nb", digest_size=8).digest(), "little")
    assert collection_sequence(0, ["a", "b"]).spawn_key == (digest,)
