"""Ragged fields: sequences of any lengths are returned as they were added, padded, with lengths and a mask."""

import copy
import pickle
import random
import threading

import pytest
import ranks
import torch
from buffer_helpers import same, snapshot

from eaml_ext import checkpoint
from eaml_ext.experience import ExperienceBuffer, ShardedExperienceBuffer, _ring

RAGGED = ("state", "action", "reward", "next_state")


def episode(steps, number):
    return {
        "state": torch.randn(steps, 4),
        "action": torch.randint(0, 2, (steps,)),
        "reward": torch.randn(steps),
        "next_state": torch.randn(steps, 4),
        "context_embedding": torch.full((2,), float(number)),
        "task": number,
    }


def together(episodes):
    """The arguments of one add of several episodes."""
    lists = {name: [torch.as_tensor(e[name]) for e in episodes] for name in episodes[0]}
    return {name: values if name in RAGGED else torch.stack(values) for name, values in lists.items()}


def make(capacity=20, **options):
    return ExperienceBuffer(capacity, 4, 2, seed=0, **{"ragged": RAGGED, **options})


def assert_holds(found, episodes):
    """Compare with the episodes bit for bit, padding included."""
    lengths = [len(e["reward"]) for e in episodes]
    longest = max(lengths)
    assert found.lengths.tolist() == lengths and found.mask.shape == (len(lengths), longest)
    for i, e in enumerate(episodes):
        assert found.mask[i].tolist() == [True] * lengths[i] + [False] * (longest - lengths[i])
        for name in RAGGED:
            value = found.fields[name]
            assert value.shape[1] == longest and not value[i, lengths[i] :].any()
            assert torch.equal(value[i, : lengths[i]], e[name])


def without(fields, name):
    return {n: value for n, value in fields.items() if n != name}


@pytest.fixture
def narrow(monkeypatch):
    """Reduce the spare slots on disk, so that the buffer flushes by itself often."""
    monkeypatch.setattr(_ring, "MIN_SPARE_SLOTS", 5)


@pytest.mark.parametrize("max_length", [None, 30])
@pytest.mark.parametrize("on_disk", [False, True])
def test_add_any_lengths_one_or_many_are_returned_as_added(on_disk, max_length, tmp_path, narrow):
    draws = random.Random(0)
    buffer = make(8, max_length=max_length, directory=tmp_path / "b" if on_disk else None)
    kept = []
    for step in range(12):
        new = [episode(draws.randint(1, 3 + 2 * step), 100 * step + i) for i in range(draws.randint(1, 4))]
        if len(new) == 1 or draws.random() < 0.3:
            for e in new:
                buffer.add(**e)
        else:
            buffer.add(**together(new))
        kept = (kept + new)[-8:]
        for e in kept:
            assert_holds(buffer.of_task(e["task"]), [e])
        found = buffer.retrieve(torch.full((2,), float(kept[-1]["task"])), 3)
        by_task = {e["task"]: e for e in kept}
        assert_holds(found, [by_task[task] for task in found.task.tolist()])
        drawn = buffer.get_batch(5)
        assert_holds(drawn, [by_task[task] for task in drawn.task.tolist()])
        assert buffer.is_current(drawn.indices, drawn.generations).all()
    if on_disk:
        buffer.close()
        opened = ExperienceBuffer.open(tmp_path / "b")
        assert opened.ragged == RAGGED and opened.max_length == max_length
        for e in kept:
            assert_holds(opened.of_task(e["task"]), [e])
        opened.add(**episode(30, 7))
        assert_holds(opened.of_task(7), [opened.of_task(7)[0].fields])


def test_add_longer_item_overwritten_by_shorter_leaves_no_old_steps():
    buffer = make(1)
    for steps in (9, 2, 5):
        last = episode(steps, steps)
        buffer.add(**last)
    assert_holds(buffer.get(torch.tensor([0])), [last])
    assert not buffer.storage.columns["state"][0, 5:].any()


def test_columns_longer_items_enlarge_in_few_copies_and_keep_the_index():
    buffer = make(200)
    keys, enlarged = None, set()
    for steps in range(1, 101):
        buffer.add(**episode(steps, steps))
        buffer.retrieve(torch.zeros(2), 1)
        enlarged.add(buffer.storage.columns["state"].shape[1])
        keys = keys if keys is not None else buffer.storage.columns["context_embedding"]
        assert buffer.storage.columns["context_embedding"] is keys
    assert 100 <= max(enlarged) <= 150 and len(enlarged) < 14
    assert buffer.retrieve(torch.full((2,), 57.0), 1).lengths.tolist() == [57]


def test_columns_max_length_is_allocated_at_once():
    buffer = make(max_length=12)
    buffer.add(**episode(3, 0))
    assert buffer.storage.columns["state"].shape == (20, 12, 4)


@pytest.mark.parametrize("to", ["state_dict", "file", "pickle", "deepcopy"])
@pytest.mark.parametrize("max_length", [None, 30])
def test_saved_buffer_returns_the_same(to, max_length, tmp_path):
    buffer = make(5, max_length=max_length)
    for number in range(7):
        buffer.add(**episode(9 - number, number))
    if to == "state_dict":
        other = make(5, max_length=max_length)
        other.load_state_dict(snapshot(buffer))
    elif to == "file":
        buffer.save(tmp_path / "b")
        other = ExperienceBuffer.load(tmp_path / "b")
    else:
        other = pickle.loads(pickle.dumps(buffer)) if to == "pickle" else copy.deepcopy(buffer)
    assert repr(other) == repr(buffer) and other.ragged == RAGGED
    for _ in range(3):
        a, b = buffer.get_batch(4), other.get_batch(4)
        assert same(a.fields, b.fields) and a.ragged == b.ragged
        for each in (buffer, other):
            torch.manual_seed(0)
            each.add(**episode(25, 8))


def test_load_state_dict_spare_steps_beyond_max_length_are_left_out():
    buffer, other = make(5), make(5, max_length=5)
    episodes = [episode(steps, steps) for steps in (4, 5)]  # the second enlarges the columns to 6 steps
    for each in episodes:
        buffer.add(**each)
    other.load_state_dict(snapshot(buffer))
    assert other.storage.columns["state"].shape == (5, 5, 4)
    assert_holds(other.get(torch.tensor([0, 1])), episodes)


def test_state_of_another_kind_is_refused_and_nothing_changes(tmp_path):
    buffer, plain = make(5), ExperienceBuffer(5, 4, seed=0)
    buffer.add(**episode(3, 0))
    plain.add(state=torch.zeros(3, 4), lengths=torch.arange(3))
    before, good = snapshot(buffer), snapshot(buffer)
    bad_lengths = [torch.tensor([0]), torch.tensor([4]), torch.tensor([-1]), torch.tensor([3.0]), torch.tensor([[3]])]
    states = [{**good, "fields": {**good["fields"], "lengths": bad}} for bad in bad_lengths]
    states += [{**good, "fields": without(good["fields"], name)} for name in ("state", "lengths")]
    states += [{**good, "ragged": ["state"]}, without(good, "ragged"), plain.state_dict()]
    states += [{**good, "fields": {**good["fields"], "reward": good["fields"]["reward"][:, :2]}}]
    for state in states:
        with pytest.raises(ValueError, match=r"ExperienceBuffer\.load_state_dict: "):
            buffer.load_state_dict(state)
        assert same(snapshot(buffer), before)
    with pytest.raises(ValueError, match="state must be a dict"):
        plain.load_state_dict(good)
    with pytest.raises(ValueError, match="max_length is 2"):
        make(5, max_length=2).load_state_dict(good)


def test_open_damaged_lengths_are_refused(tmp_path):
    make(5, directory=tmp_path / "b").close()
    buffer = ExperienceBuffer.open(tmp_path / "b")
    buffer.add(**episode(3, 0))
    buffer.storage.columns["lengths"][0] = 99
    buffer.close()
    with pytest.raises(ValueError, match="sequences must have 0 to 3 steps, got 0 to 99"):
        ExperienceBuffer.open(tmp_path / "b")


def test_file_without_ragged_fields_loads_as_before(tmp_path):
    plain = ExperienceBuffer(5, 4, seed=0)
    plain.add(state=torch.zeros(3, 4))
    plain.save(tmp_path / "b")
    tensors, metadata = checkpoint.load(tmp_path / "b", kind="ExperienceBuffer")
    for name in ("ragged", "max_length"):  # of 0.1
        metadata["options"].pop(name)
    checkpoint.save(tmp_path / "b", tensors, metadata, kind="ExperienceBuffer")
    assert len(ExperienceBuffer.load(tmp_path / "b")) == 3


def shorter(name):
    return lambda e: {**e, name: e[name][:-1]}


def twice(**change):
    """Two equal episodes, the second with other values."""
    return lambda e: together([e, {**e, **{name: function(e[name]) for name, function in change.items()}}])


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    "change, error, text",
    [
        (shorter("next_state"), ValueError, r"next_state"),
        (shorter("action"), ValueError, r"action has shape \(4,\)"),
        (lambda e: {**e, "state": e["state"][:, :3]}, ValueError, r"state has shape \(5, 3\)"),
        (
            lambda e: {n: v[:0] if n in RAGGED else v for n, v in e.items()},
            ValueError,
            "must have 1 to [19] steps, got 0 to 0",
        ),
        (
            lambda e: {n: v.repeat_interleave(2, 0) if n in RAGGED else v for n, v in e.items()},
            ValueError,
            "length is 9",
        ),
        (lambda e: {**e, "lengths": 5}, ValueError, "lengths"),
        (lambda e: without(e, "reward"), ValueError, "reward"),
        (twice(reward=lambda x: x[:2]), ValueError, r"reward has sequences of lengths \[5, 2\], state of \[5, 5\]"),
        (twice(state=lambda x: x[:, :2]), ValueError, r"state\[1\] has shape \(5, 2\), wanted \(time, 4\)"),
        (twice(state=lambda x: x.double()), TypeError, r"state\[1\] has dtype float64, wanted float32"),
        (lambda e: {**twice()(e), "task": torch.zeros(3, dtype=torch.int64)}, ValueError, "task has shape"),
    ],
    ids=range(11),
)
def test_add_items_that_do_not_fit_raise_and_nothing_changes(change, error, text, first):
    buffer = make(max_length=9)
    if not first:
        buffer.add(**episode(3, 0))
    before = snapshot(buffer)
    with pytest.raises(error, match=text) as info:
        buffer.add(**change(episode(5, 1)))
    assert "\n" not in str(info.value) and same(snapshot(buffer), before)


def test_add_list_of_single_steps_raises_and_nothing_changes():
    buffer = ExperienceBuffer(5, 4, ragged=("state", "next_state"))
    buffer.add(state=torch.randn(2, 4), next_state=torch.randn(2, 4))
    before, steps = snapshot(buffer), [torch.randn(4) for _ in range(6)]
    with pytest.raises(ValueError, match=r"add: state\[0\] has shape \(4,\), wanted \(time, 4\)"):
        buffer.add(state=steps, next_state=steps)
    assert same(snapshot(buffer), before)


def test_add_other_length_without_ragged_is_refused():
    buffer = ExperienceBuffer(5, 4, seed=0)
    buffer.add(state=torch.zeros(1, 7, 4))
    with pytest.raises(ValueError, match=r"state has shape \(5, 4\), wanted \(7, 4\)"):
        buffer.add(state=torch.zeros(5, 4))


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"ragged": 3}, TypeError, "ragged must be names of fields, got 3"),
        ({"ragged": ("state", 3)}, TypeError, "ragged must be names of fields"),
        ({"ragged": "task"}, ValueError, "the field task cannot be ragged"),
        ({"ragged": ("mask",)}, ValueError, "the field mask cannot be ragged"),
        ({"max_length": 0}, ValueError, "max_length must be > 0"),
        ({"ragged": (), "max_length": 3}, ValueError, "ragged names none"),
    ],
    ids=str,
)
def test_buffer_bad_ragged_options_raise_one_sentence(options, error, text):
    with pytest.raises(error, match=text):
        make(**options)


def test_first_add_without_a_ragged_field_or_its_time_raises():
    with pytest.raises(ValueError, match="the ragged field action is missing"):
        ExperienceBuffer(5, ragged=("state", "action")).add(state=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="the ragged field x has no time dimension"):
        ExperienceBuffer(5, ragged="x").add(x=torch.zeros(()))


@pytest.mark.parametrize(
    "targets, masked",
    [
        (None, True),
        ("reward", True),
        ("context_embedding", False),
        (lambda e: e.next_state - e.state, True),
        (lambda e: e.task, False),
    ],
    ids=range(5),
)
def test_batch_has_a_mask_where_targets_are_ragged(targets, masked):
    buffer = make()
    buffer.add(**together([episode(n, n) for n in (3, 5)]))
    batch = buffer.get_batch(4).batch(("state", "action"), targets)
    assert batch["states"].shape[2] == 5 and ("mask" in batch) == masked


def test_batch_function_whose_width_is_the_number_of_steps_has_no_mask():
    buffer = ExperienceBuffer(4, ragged="state")
    buffer.add(state=torch.ones(3, 2), target=torch.arange(3.0))
    experiences = buffer.get_batch(2)
    assert "mask" not in experiences.batch(targets=lambda e: e.target)
    assert "mask" in experiences.batch(targets=lambda e: e.state)


def test_experiences_chosen_items_keep_their_mask():
    buffer = make()
    buffer.add(**together([episode(n, n) for n in (3, 5)]))
    found = buffer.get(torch.tensor([[0, 1], [1, 0]]))
    assert found.mask.sum(-1).tolist() == [[3, 5], [5, 3]] and found[0].mask.sum(-1).tolist() == [3, 5]
    assert found[0, 1].lengths == 5 and "mask" in found[0].batch()


def test_batch_no_items_is_empty():
    buffer = make()
    buffer.add(**episode(3, 0))
    found = buffer.retrieve(torch.zeros(2), 1, exclude_task=0)
    assert len(found) == 0 and found.mask.shape == (0, 0) and found.batch()["targets"].shape == (0, 0, 4)


# ---------------------------------------------------------------------------------------------- threads and ranks


def test_threads_read_whole_items_while_longer_ones_are_added():
    buffer = ExperienceBuffer(50, seed=0, ragged="x")
    buffer.add(x=torch.ones(1))
    stop, faults = threading.Event(), []

    def read():
        while not stop.is_set():
            found = buffer.get_batch(8)
            if not torch.equal(found.x, found.mask * found.lengths.unsqueeze(1)):
                faults.append(found)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for steps in range(1, 120):
        buffer.add(x=torch.full((steps,), float(steps)))
    stop.set()
    for reader in readers:
        reader.join()
    assert not faults


def sharded_ragged_equals_one_buffer(group, folder):
    whole = make(8, max_length=20)
    buffer = ShardedExperienceBuffer(8, 4, 2, group=group, seed=0, ragged=RAGGED, max_length=20)
    torch.manual_seed(0)
    for number in range(12):
        e = episode(1 + number % 7, number)
        whole.add(**e)
        if number % group.size == group.rank:
            buffer.add(**e)
    for query in (torch.full((2,), 3.0 + group.rank), torch.randn(3, 2)):
        found, wanted = buffer.retrieve(query, 3), whole.retrieve(query, 3)
        assert same(found.fields, wanted.fields) and found.ragged == wanted.ragged
        assert torch.equal(found.indices, wanted.indices) and torch.equal(found.distances, wanted.distances)
    buffer.save(folder)
    loaded = ShardedExperienceBuffer.load(folder, group)
    assert same(loaded.retrieve(torch.zeros(2), 4).fields, whole.retrieve(torch.zeros(2), 4).fields)
    with pytest.raises(ValueError, match="ragged fields need a max_length"):
        ShardedExperienceBuffer(8, group=group, ragged=RAGGED)


def test_sharded_on_two_ranks_equals_one_buffer(tmp_path):
    assert ranks.failures(__file__, [sharded_ragged_equals_one_buffer], tmp_path) == []
