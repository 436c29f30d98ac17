"""One item or many, names and types of fields, and integers of any type."""

import copy
import json
import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from eaml_ext.distributed import torchrun_group
from eaml_ext.experience import ExperienceBuffer, ShardedExperienceBuffer, retrieval
from eaml_ext.experience._options import BufferOptions


def z(*shape):
    return torch.zeros(shape)


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int64)


ONE = {
    "image, scalars": {"state": z(84, 84, 3), "action": 2, "reward": 0.5},
    "channels first": {"state": z(3, 84, 84), "action": 2, "reward": 0.5, "done": False},
    "grey image": {"observation": z(84, 84), "action": 2, "reward": 0.5},
    "two images, scalars": {"state": z(84, 84, 3), "next_state": z(84, 84, 3), "action": 2, "reward": 0.5},
    "image, vector, scalar": {"state": z(84, 84, 3), "action": z(4), "reward": 0.5},
    "image, discrete vector": {"state": z(84, 84, 3), "action": ints(2), "reward": 0.5},
    "image, class": {"observation": z(84, 84, 3), "target": 7},
    "image, task": {"state": z(84, 84, 3), "action": 1, "task": 3, "priority": 2.0},
    "image, embedding": {"state": z(84, 84, 3), "context_embedding": z(5)},
    "images and embedding": {"state": z(84, 84, 3), "next_state": z(84, 84, 3), "context_embedding": z(84)},
    "sequence": {"state": z(6, 4), "action": z(6, 2), "reward": z(6), "context_embedding": z(5)},
    "sequence as long as its embedding": {"state": z(6, 4), "reward": z(6), "context_embedding": z(6)},
    "vectors": {"state": z(4), "action": z(2), "reward": 0.0},
    "vectors of one size": {"state": z(2), "action": z(2), "reward": 0.0, "task": 1},
    "pair of vectors": {"observation": z(4), "target": z(4)},
    "scalars": {"state": 3, "action": 1, "reward": 0.5},
    "a vector of priorities would be many": {"state": z(4), "priority": 1.0},
}
MANY = {
    "images": {"state": z(5, 84, 84, 3), "action": ints(5), "reward": z(5)},
    "images, one batch of one": {"state": z(1, 84, 84, 3), "action": ints(1), "reward": z(1)},
    "image alone": {"state": z(1, 84, 84, 3)},
    "pairs": {"observation": z(5, 4), "target": z(5, 1)},
    "pairs of images and classes": {"observation": z(5, 8, 8), "target": ints(5), "task": 3},
    "rollout": {"state": z(5, 4), "action": z(5, 2), "reward": z(5), "done": z(5) > 0},
    "rollout of discrete actions, shared scalars": {"state": z(5, 4), "action": ints(5), "reward": 1.0, "done": False},
    "sequences": {"state": z(5, 6, 4), "action": z(5, 6, 2), "reward": z(5, 6), "context_embedding": z(5, 3)},
    "matrix, shared scalar": {"state": z(32, 4), "reward": 0.0},
    "matrices, shared scalar": {"state": z(32, 4), "next_state": z(32, 4), "done": False},
    "matrices, shared reward": {"state": z(10, 4), "action": z(10, 2), "reward": 1.0},
    "matrices, vector, shared scalar": {"state": z(32, 4), "action": z(32, 2), "reward": z(32), "done": False},
    "matrix, shared target": {"observation": z(32, 4), "target": 1.0},
    "square matrix, vector, shared scalar": {"state": z(4, 4), "action": z(4), "reward": 0.5},
    "shared scalars, embeddings": {"state": z(5, 4), "reward": 0.0, "context_embedding": z(5, 3)},
    "scalars, tasks": {"state": z(5), "action": ints(5), "reward": z(5), "task": ints(5)},
    "vectors, priorities": {"state": z(5), "priority": torch.ones(5)},
    "task and priority are shared": {"state": z(5, 84, 84), "task": 1, "priority": 2.0},
    "none": {"state": z(0, 4), "target": z(0, 1)},
}


@pytest.mark.parametrize("case", ONE)
def test_first_add_of_one_item_stores_one(case):
    buffer = ExperienceBuffer(200)
    buffer.add(**ONE[case])
    assert len(buffer) == 1
    stored = buffer.get(torch.tensor([0])).fields
    assert all(tuple(value.shape) == (1, *np.shape(ONE[case][name])) for name, value in stored.items())
    buffer.add(**ONE[case])
    buffer.add(
        **{name: torch.as_tensor(value).expand(3, *np.shape(value)) for name, value in stored_as(buffer).items()}
    )
    assert len(buffer) == 5


def stored_as(buffer):
    return {name: value[0] for name, value in buffer.get(torch.tensor([0])).fields.items()}


@pytest.mark.parametrize("case", MANY)
def test_first_add_of_many_items_stores_many(case):
    buffer, fields = ExperienceBuffer(200), MANY[case]
    buffer.add(**fields)
    count = len(next(iter(fields.values())))
    assert len(buffer) == count
    if count:
        buffer.add(**stored_as(buffer))  # the schema makes it one item
        assert len(buffer) == count + 1
    buffer.add(**fields)
    assert len(buffer) == 2 * count + bool(count)


@pytest.mark.parametrize(
    "fields",
    [
        {"state": z(84, 84, 3), "depth": z(84, 84), "action": 2},
        {"state": z(5, 6, 4), "action": z(5, 6, 2), "reward": z(5, 6), "done": True},
        {"state": z(5, 84, 84, 3), "reward": 0.0},
        {"state": z(6, 4), "reward": z(6), "action": 1},
        {"state": ints(5), "action": ints(5), "reward": z(5)},
    ],
)
def test_first_add_of_ambiguous_shapes_is_refused(fields):
    buffer = ExperienceBuffer(200)
    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in fields.items() if np.ndim(value))
    text = f"ExperienceBuffer.add: {shapes} can be one item or {len(fields['state'])}, add one item first or give"
    with pytest.raises(ValueError, match="^" + re.escape(text)):
        buffer.add(**fields)
    assert not buffer.storage.columns
    buffer.add(**{name: torch.as_tensor(value).unsqueeze(0) for name, value in fields.items()}, task=ints(1))
    assert len(buffer) == 1  # every field has a leading dimension


def test_first_add_of_unequal_sizes_names_the_field_and_the_way_out():
    buffer = ExperienceBuffer(200)
    text = "action has shape (31, 2), wanted (32, 2) (one item needs a leading dimension of 1 in every field)"
    with pytest.raises(ValueError, match="^" + re.escape(f"ExperienceBuffer.add: {text}")):
        buffer.add(state=z(32, 4), action=z(31, 2))
    with pytest.raises(ValueError, match=r"target has shape \(5, 1\), wanted \(6, 1\)"):
        buffer.add(z(6, 4), z(5, 1))
    with pytest.raises(ValueError, match=r"action has shape \(31, 2\), wanted \(32, 2\)"):
        buffer.add(state=z(32, 4), action=z(31, 2), done=False)
    buffer.add(state=z(1, 32, 4), action=z(1, 31, 2))
    assert len(buffer) == 1


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"state": z(32, 4), "action": z(32, 2), "reward": z(32), "done": False}, 32),
        ({"state": z(10, 4), "action": z(10, 2), "reward": 1.0}, 10),  # in a sequence each step would have a reward
        ({"state": z(10, 4), "reward": 1.0}, 10),
        ({"state": z(4), "action": z(2), "reward": z(4)}, 1),
        ({"state": z(4, 4), "action": z(4, 2), "reward": z(4)}, 4),
        ({"state": z(4, 4), "action": z(4, 2), "reward": z(4), "context_embedding": z(3)}, 1),
    ],
)
def test_first_add_where_the_sizes_leave_one_reading_takes_it(fields, count):
    buffer = ExperienceBuffer(200, state_dim=4, action_dim=2)
    buffer.add(**fields)
    assert len(buffer) == count


def test_sequence_without_state_dim_is_checked_by_its_actions():
    sequence = {"state": z(6, 7, 7), "action": z(6, 2), "reward": z(6), "context_embedding": z(3)}
    for action in (sequence["action"], ints(6)):
        buffer = ExperienceBuffer(10, action_dim=2)
        buffer.add(**{**sequence, "action": action})
        assert len(buffer) == 1
    for change, text in (
        ({"reward": z(5)}, r"reward has shape \(5,\) per item, wanted one per step of state"),
        ({"action": z(5, 2)}, r"action has shape \(5, 2\) per item, wanted \(2,\)"),
    ):
        with pytest.raises(ValueError, match=text):
            ExperienceBuffer(10, action_dim=2).add(**{**sequence, **change})


@pytest.mark.parametrize("order", [("flag", "grid"), ("grid", "flag")])
def test_add_after_the_first_decides_by_the_schema_in_any_order_of_fields(order):
    buffer = ExperienceBuffer(10)
    buffer.add(**{name: {"flag": torch.tensor([1.0, 2.0]), "grid": z(2, 3, 3)}[name] for name in order})
    buffer.add(
        **{name: {"flag": 5.0, "grid": torch.ones(4, 3, 3)}[name] for name in order}
    )  # the scalar holds for all items
    assert buffer.get(torch.arange(6)).flag.tolist() == [1, 2, 5, 5, 5, 5]
    buffer.add(**{name: {"flag": 6.0, "grid": z(3, 3)}[name] for name in order})
    assert len(buffer) == 7


def test_add_of_scalars_alone_decides_by_the_schema():
    buffer = ExperienceBuffer(10)
    buffer.add(state=3, reward=0.5)
    buffer.add(state=torch.tensor([1, 2, 4]), reward=0.0)
    buffer.add(state=7, reward=torch.tensor([1.0, 2.0]))
    assert buffer.get(torch.arange(6)).state.tolist() == [3, 1, 2, 4, 7, 7]
    assert buffer.get(torch.arange(6)).reward.tolist() == [0.5, 0, 0, 0, 1, 2]


# -------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("context_embeddings", "context_embedding"),
        ("context_embeding", "context_embedding"),
        ("contex_embedding", "context_embedding"),
        ("ContextEmbedding", "context_embedding"),
        ("tasks", "task"),
        ("Task", "task"),
        ("priorities", "priority"),
        ("priorty", "priority"),
        ("prioritiy", "priority"),
        ("states", "state"),
        ("observatoin", "observation"),
        ("actions", "action"),
    ],
)
def test_add_refuses_a_name_that_is_nearly_one_with_a_meaning(name, meant):
    buffer = ExperienceBuffer(10, state_dim=4, action_dim=2)
    text = f"ExperienceBuffer.add: a field cannot be called {name!r}, which is nearly {meant!r}"
    with pytest.raises(ValueError, match=f"^{text}$"):
        buffer.add(**{"value": z(3, 4), name: z(3, 4)})
    assert not buffer.storage.columns


def test_add_accepts_other_names():
    names = ["mask", "stage", "next_observation", "next_context_embedding", "context_embedding_2", "proprio", "tag"]
    names += ["states", "actions", "rewards"]  # without state_dim and action_dim these names have no meaning
    buffer = ExperienceBuffer(10)
    buffer.add(**{name: z(3, 4) for name in names}, task=ints(3), tasks=ints(3))
    assert buffer.get_batch(2).next_observation.shape == (2, 4)


@pytest.mark.parametrize("name", ["attention", "read", "batch", "distances"])
def test_add_refuses_a_name_that_experiences_would_hide(name):
    with pytest.raises(ValueError, match=f"^ExperienceBuffer.add: a field cannot be called '{name}'$"):
        ExperienceBuffer(10).add(**{"value": z(3, 4), name: z(3, 4)})


# ----------------------------------------------------------------------------------------------------- numbers


def filled(integer=int, real=float, **options):
    sizes = {"state_dim": integer(4), "action_dim": integer(2), "seed": integer(3), "age_half_life": real(50)}
    buffer = ExperienceBuffer(integer(30), **{**sizes, **options})
    draw = torch.Generator().manual_seed(0)
    for task in range(3):
        state = torch.randn(10, 4, generator=draw)
        fields = {"state": state, "action": state[:, :2], "reward": real(0.5), "priority": real(task + 1)}
        buffer.add(**fields, context_embedding=state[:, :3], task=integer(task))
    return buffer


INTEGERS = [np.int64, np.int32, np.uint8, torch.tensor]
REALS = [np.float64, np.float32, np.float16]


@pytest.mark.parametrize("integer", INTEGERS)
def test_buffer_accepts_any_integer(integer):
    plain, buffer = filled(), filled(integer)
    json.dumps([BufferOptions.of(buffer), buffer.state_dict()["capacity"]])
    assert repr(buffer) == repr(plain) and type(buffer.capacity) is int and type(buffer.state_dim) is int
    query, one, two = torch.zeros(3), integer(1), integer(2)
    for got, wanted in (
        (buffer.get_batch(integer(7)), plain.get_batch(7)),
        (buffer.retrieve(query, integer(5)), plain.retrieve(query, 5)),
        (buffer.retrieve(query, 5, one), plain.retrieve(query, 5, 1)),
        (buffer.retrieve(query, 5, exclude_task=[one, two]), plain.retrieve(query, 5, [1, 2])),
        (buffer.of_task(two), plain.of_task(2)),
    ):
        assert torch.equal(got.indices, wanted.indices) and torch.equal(got.state, wanted.state)
    assert buffer.get(torch.arange(30)).task.dtype == torch.int64
    state = {**buffer.state_dict(), "written": integer(30), "cleared": integer(0), "capacity": integer(30)}
    other = filled()
    other.load_state_dict(state)
    assert type(other.storage.written) is int and len(other) == 30


@pytest.mark.parametrize(
    "exclude", [np.array([1, 2]), np.array(1, dtype=np.uint64), torch.tensor([1], dtype=torch.int32)]
)
def test_exclude_task_accepts_arrays(exclude):
    found = filled().retrieve(torch.zeros(3), 30, exclude)
    assert set(found.task.tolist()) == {0, 1, 2} - set(np.atleast_1d(exclude).tolist())


@pytest.mark.parametrize("real", [*REALS, Fraction])
def test_buffer_accepts_any_real_number(real, tmp_path):
    if real is Fraction:
        buffer = ExperienceBuffer(10, age_half_life=Fraction(1, 2))
        assert buffer.age_half_life == 0.5 and type(buffer.age_half_life) is float
        assert ExperienceBuffer(10, age_half_life=np.array(0.5)).age_half_life == 0.5
        with pytest.raises(TypeError, match="age_half_life must be a number"):
            ExperienceBuffer(10, age_half_life=np.array([0.5]))
        return
    plain, buffer = filled(), filled(real=real)
    assert repr(plain) == repr(buffer)
    everything = buffer.get(torch.arange(30))
    assert everything.reward.dtype == everything.priority.dtype == torch.float32
    buffer.set_priority(torch.tensor([3]), real(4))
    assert buffer.get(torch.tensor([3])).priority.item() == 4
    buffer.save(tmp_path / "b")
    assert repr(ExperienceBuffer.load(tmp_path / "b")) == repr(plain)
    found, temperature = buffer.retrieve(torch.zeros(3), 4), 0.5
    assert torch.equal(found.attention(real(temperature)), found.attention(temperature))
    assert torch.equal(found.read("state", real(temperature)), found.read("state", temperature))


@pytest.mark.parametrize("integer", INTEGERS)
def test_retrievers_accept_any_integer_and_task(integer):
    makers = {
        "uniform": lambda i: retrieval.uniform(i(4), targets="action"),
        "nearest": lambda i: retrieval.nearest(i(4), targets="action"),
        "attention": lambda i: retrieval.attention(i(4), targets="action"),
        "ivf": lambda i: retrieval.ivf(i(2), i(1), nlist=i(6), seed=i(1), targets="action"),
        "best_fit": lambda i: retrieval.best_fit(lambda b, t, _: t.float(), i(1), targets="action"),
    }
    for name, make in makers.items():
        buffer, plain = filled(), filled()
        got = make(integer)(buffer, {"context_embedding": torch.zeros(3), "task": integer(0)})
        wanted = make(int)(plain, {"context_embedding": torch.zeros(3), "task": 0})
        assert all(torch.equal(got[key], value) for key, value in wanted.items()), name
    assert torch.equal(got["states"], plain.of_task(1).state)  # task 0 fits best, but is the batch's own


@pytest.mark.parametrize("integer", INTEGERS)
def test_sharded_buffer_accepts_any_integer(integer):
    with torchrun_group(alone=True) as group:
        buffer = ShardedExperienceBuffer(integer(8), integer(2), group=group, seed=integer(0))
        buffer.add(state=torch.eye(2), context_embedding=torch.eye(2), task=torch.tensor([0, 1]))
        assert buffer.capacity == 8 and type(buffer.capacity) is int
        assert buffer.retrieve(torch.zeros(2), integer(2), exclude_task=integer(0)).task.tolist() == [1]


@pytest.mark.parametrize("bad", [True, np.True_, 1.0, np.float32(1), "1", None, torch.tensor(True), torch.tensor(1.0)])
def test_calls_non_integer_argument_raises(bad):
    buffer, query = filled(), torch.zeros(3)
    before = copy.deepcopy(buffer.state_dict())
    for name, call in {
        "ExperienceBuffer: capacity": lambda: ExperienceBuffer(bad),
        "ExperienceBuffer.get_batch: n": lambda: buffer.get_batch(bad),
        "ExperienceBuffer.retrieve: k": lambda: buffer.retrieve(query, bad),
        "ExperienceBuffer.of_task: task": lambda: buffer.of_task(bad),
        "ExperienceBuffer.load_state_dict: written": lambda: buffer.load_state_dict({**before, "written": bad}),
        "retrieval.uniform: n": lambda: retrieval.uniform(bad),
        "retrieval.ivf: k": lambda: retrieval.ivf(bad),
    }.items():
        with pytest.raises(TypeError, match=f"^{name} must be an integer, got "):
            call()
    if bad is not None:
        with pytest.raises(TypeError, match=r"^ExperienceBuffer.retrieve: exclude_task must be an integer"):
            buffer.retrieve(query, 1, bad)
        batch = {"task": bad}
        with pytest.raises(TypeError, match=r"^retrieval.best_fit: the task of the batch must be an integer"):
            retrieval.best_fit(lambda b, t, _: t.float())(buffer, batch)
    assert all(torch.equal(before["fields"][n], value) for n, value in buffer.state_dict()["fields"].items())


def test_task_beyond_int64_raises():
    for call in (lambda: filled().of_task(2**63), lambda: filled().retrieve(torch.zeros(3), 1, -(2**63) - 1)):
        with pytest.raises(ValueError, match=r"task must be in \[-9223372036854775808, 9223372036854775808\), got "):
            call()


@pytest.mark.parametrize("task", [True, np.True_, torch.tensor(True), [True, False]])
def test_add_boolean_task_raises_at_every_add(task):
    buffer = ExperienceBuffer(10)
    with pytest.raises(TypeError, match=r"^ExperienceBuffer.add: task must be int64, got bool"):
        buffer.add(state=z(2, 4), task=task)
    buffer.add(state=z(2, 4), task=1)
    with pytest.raises(TypeError, match=r"^ExperienceBuffer.add: task has dtype bool, wanted int64"):
        buffer.add(state=z(2, 4), task=task)
    assert len(buffer) == 2


@pytest.mark.parametrize("make", [lambda s: ExperienceBuffer(9, seed=s), lambda s: retrieval.ivf(3, seed=s)])
def test_seed_beyond_128_bits_raises_in_the_name_of_the_class(make):
    make(2**128 - 1)
    with pytest.raises(ValueError, match=r"^(ExperienceBuffer|retrieval.ivf): seed must be in \[0, 3402823"):
        make(2**128)
