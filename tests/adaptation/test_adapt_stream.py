"""adapt_stream: predictions before the steps, the hidden state, corrupted targets, and memory that does not grow."""

import copy
import gc
import math
import re
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eaml_ext import SSM
from eaml_ext.adaptation import AdaptationConfig, Adapter
from eaml_ext.nn import Mamba, Mamba2
from eaml_ext.rl import SSMMetaPolicy
from eaml_ext.tasks import LDSTasks


def segments(batches=6, rows=2, length=5):
    x = torch.randn(rows, batches * length + 1, 3)
    return [
        {"states": x[:, i * length : (i + 1) * length], "targets": x[:, i * length + 1 : (i + 1) * length + 1]}
        for i in range(batches)
    ]


def test_adapt_stream_batch_is_predicted_before_the_steps_on_it():
    model = nn.Linear(3, 3)
    twin, data = copy.deepcopy(model), segments()
    other = Adapter(twin, AdaptationConfig(lr=0.1))
    for batch, (predictions, loss) in zip(data, Adapter(model, other.cfg).adapt_stream(F.mse_loss, data), strict=True):
        assert torch.equal(predictions, twin(batch["states"]).detach()) and not predictions.requires_grad
        assert loss == other.adapt(F.mse_loss, batch)


@pytest.mark.parametrize("single", [False, True])
def test_adapt_stream_recurrent_model_continues_its_state(single):
    """With steps too small to matter, a stream in segments equals the whole sequence; single: one step per batch."""
    model, data = SSM(3, 16, 3).double(), segments()
    data = [{name: value.double() for name, value in batch.items()} for batch in data]
    whole = model(torch.cat([batch["states"] for batch in data], 1)).detach()
    if single:
        data = [{name: v[:, t] for name, v in batch.items()} for batch in data for t in range(5)]
    adapter = Adapter(model, AdaptationConfig(lr=1e-12))
    stream = [y for y, _ in adapter.adapt_stream(F.mse_loss, data)]
    torch.testing.assert_close(torch.stack(stream, 1) if single else torch.cat(stream, 1), whole, rtol=1e-8, atol=1e-9)
    assert adapter.last_steps == 5 and adapter.rollbacks == 0


LAYERS = {"Mamba": lambda: Mamba(3), "Mamba2": lambda: Mamba2(3, headdim=2), "S6": lambda: SSM(3, 3).cores[0]}


@pytest.mark.parametrize("name", LAYERS)
def test_adapt_stream_bare_layer_step_by_step_equals_its_scan(name):
    layer, data = LAYERS[name]().double(), segments(3)
    x = torch.cat([batch["states"] for batch in data], 1).double()
    steps = [{"states": x[:, t], "targets": x[:, t]} for t in range(x.shape[1])]
    found = [y for y, _ in Adapter(layer, AdaptationConfig(lr=1e-12)).adapt_stream(F.mse_loss, steps)]
    torch.testing.assert_close(torch.stack(found, 1), layer.scan(x)[0].detach(), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_adapt_stream_batch_norm_statistics_move_once_a_batch(delay):
    torch.manual_seed(0)
    norm, data = nn.BatchNorm1d(3), segments(4)
    data = [{name: v.flatten(0, 1) for name, v in batch.items()} for batch in data]
    wanted = copy.deepcopy(norm)
    for batch in data[: 4 - delay]:
        wanted(batch["states"])
    list(Adapter(norm, AdaptationConfig(max_steps_per_call=1)).adapt_stream(F.mse_loss, data, label_delay=delay))
    assert norm.num_batches_tracked == 4 - delay
    torch.testing.assert_close(norm.running_mean, wanted.running_mean, rtol=0, atol=0)
    torch.testing.assert_close(norm.running_var, wanted.running_var, rtol=0, atol=0)


class WithoutReset(nn.Module):
    """A recurrent model whose ``scan`` takes no ``reset``."""

    def __init__(self):
        super().__init__()
        self.ssm = SSM(3, 8, 3)

    def scan(self, x, state=None):
        return self.ssm.scan(x, state)

    def step(self, x, state=None):
        return self.ssm.step(x, state)


def test_adapt_stream_models_with_another_interface_raise():
    data = segments(1)[0]
    text = "Adapter.adapt_stream: scan and step of SSMMetaPolicy must return (prediction, state), got 3 values"
    with pytest.raises(TypeError, match="^" + re.escape(text)):
        next(Adapter(SSMMetaPolicy(3, 3)).adapt_stream(F.mse_loss, [data]))
    reset = torch.zeros(2, 5, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"^Adapter.adapt_stream: reset needs a model that takes reset, got WithoutR"):
        next(Adapter(WithoutReset()).adapt_stream(F.mse_loss, [{**data, "reset": reset}]))


def test_adapt_stream_given_state_or_other_batch_size_restarts():
    model, data = SSM(3, 16, 3), segments()
    adapter = Adapter(model, AdaptationConfig(lr=1e-12))
    state = torch.randn_like(model.init_hidden(2))
    data[2]["hidden_state"], data[3]["hidden_state"] = state, None
    data[5] = {name: value[:1] for name, value in data[5].items()}
    found = [y for y, _ in adapter.adapt_stream(F.mse_loss, data)]
    for i, start in ((0, None), (2, state), (3, None), (5, None)):
        torch.testing.assert_close(found[i], model(data[i]["states"], start).detach())
    assert not torch.allclose(found[4], model(data[4]["states"]).detach())


def test_adapt_stream_non_finite_states_leave_the_hidden_state():
    model, data = SSM(3, 16, 3), segments()
    adapter = Adapter(model, AdaptationConfig(lr=1e-12))
    clean = [y for y, _ in adapter.adapt_stream(F.mse_loss, [*data[:2], *data[3:]])]
    data[2]["states"] = data[2]["states"].clone()
    data[2]["states"][0, 3] = math.nan
    found = [y for y, _ in adapter.adapt_stream(F.mse_loss, data)]
    assert adapter.rollbacks == 1
    for ours, theirs in zip([*found[:2], *found[3:]], clean, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_adapt_stream_batches_are_read_one_by_one():
    taken = []

    def batches():
        for i, batch in enumerate(segments()):
            taken.append(i)
            yield batch

    stream = Adapter(nn.Linear(3, 3)).adapt_stream(F.mse_loss, batches())
    assert taken == []
    next(stream)
    assert taken == [0]


def test_adapt_stream_wrong_arguments_raise():
    adapter = Adapter(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"^Adapter.adapt_stream: loss_fn must be callable, got str"):
        adapter.adapt_stream("mse", [])
    for bad in (3, {"states": 1}):
        text = f"Adapter.adapt_stream: batches must be an iterable of dicts, got {type(bad).__name__}"
        with pytest.raises(TypeError, match="^" + re.escape(text)):
            adapter.adapt_stream(F.mse_loss, bad)
    with pytest.raises(TypeError, match=r"^Adapter.adapt_stream: batch_dict must be a dict, got int"):
        next(adapter.adapt_stream(F.mse_loss, [1]))
    with pytest.raises(ValueError, match=r"^Adapter.adapt_stream: batch_dict has no targets"):
        next(adapter.adapt_stream(F.mse_loss, [{"states": torch.zeros(1, 3)}]))


# ------------------------------------------------------------------------------------------------ corrupted targets

TASKS = LDSTasks()
KINDS = ("nan", "huge", "flip", "noise")


def corrupt(targets, kind):
    if kind == "nan":
        return torch.where(torch.arange(targets.shape[1]).view(1, -1, 1) == 3, math.nan, targets)
    return {"huge": 1e4 * targets, "flip": -targets, "noise": 10 * torch.randn_like(targets)}[kind]


@pytest.fixture(scope="module")
def pretrained():
    """Return an SSM trained on 16 systems; ``python -m benchmarks.adaptation`` trains the default one."""
    torch.manual_seed(0)
    model = SSM(TASKS.obs_dim, 32, TASKS.obs_dim)
    x = TASKS.simulate(TASKS.sample(16), 8, 33)[0].flatten(0, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(200):
        rows = x[torch.randint(len(x), (32,))]
        optimizer.zero_grad()
        F.mse_loss(model(rows[:, :-1]), rows[:, 1:]).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_adapt_stream_corrupted_targets_harm_only_without_guards(pretrained, seed, guarded):
    """1 % of 600 batches are corrupted, and the first one; without guards the model diverges."""
    steps, length, model = 600, 16, copy.deepcopy(pretrained)
    tasks = TASKS.sample(1, "test", seed)
    run = TASKS.simulate(tasks, 2, steps * length + 1, seed)[0][0]
    clean = TASKS.simulate(tasks, 16, 64, seed + 1)[0][0]
    generator = torch.Generator().manual_seed(seed)
    bad = {int(i): KINDS[n % 4] for n, i in enumerate(torch.randperm(steps, generator=generator)[: steps // 100])}
    bad[0] = "huge"

    def error():
        with torch.no_grad():
            return float(F.mse_loss(model(clean[:, :-1])[:, 3:], clean[:, 4:]))

    def batches():
        for i in range(steps):
            here = run[:, i * length : (i + 1) * length + 1]
            yield {"states": here[:, :-1], "targets": corrupt(here[:, 1:], bad[i]) if i in bad else here[:, 1:]}

    off = {} if guarded else {"grad_clip_norm": None, "trust_region_eps": None, "ema_decay": None}
    adapter = Adapter(model, AdaptationConfig(lr=0.02, max_steps_per_call=1, **off))
    unadapted, errors = error(), []
    for i, _ in enumerate(adapter.adapt_stream(F.mse_loss, batches()), 1):
        if guarded:
            assert all(bool(torch.isfinite(p).all()) for p in model.parameters()), f"after step {i}"
        if i % 100 == 0:
            errors.append(error())
    if guarded:
        assert max(errors) <= 1.1 * unadapted and errors[-1] < 0.9 * unadapted, (unadapted, errors)
    else:
        assert not max(errors) < 10 * unadapted


# ------------------------------------------------------------------------------------------------------------ memory


def test_adapt_stream_and_adapt_many_1000_steps_do_not_grow():
    """Count tensors, blocks of Python's own allocator, and resident memory on Linux."""
    torch.set_num_threads(1)  # two threads that wait for each other cost minutes on a busy machine
    model, batch = SSM(4, 32, 4), {"states": torch.randn(1, 8, 4), "targets": torch.randn(1, 8, 4)}
    adapter = Adapter(model, AdaptationConfig(lr=1e-4, max_steps_per_call=1))
    history, params = adapter.history(2), None
    users = {name: torch.stack([value, value]) for name, value in batch.items()}

    def loop(steps):
        nonlocal params
        for _ in adapter.adapt_stream(F.mse_loss, (batch for _ in range(steps))):
            pass
        for _ in range(steps // 10):
            params, _ = adapter.adapt_many(F.mse_loss, users, params, history)

    def tensors():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    def grown():
        """Return the growth over 1000 steps: tensors, blocks and bytes."""
        before = tensors(), sys.getallocatedblocks(), resident() if sys.platform == "linux" else 0
        loop(1000)
        after = tensors(), sys.getallocatedblocks(), resident() if sys.platform == "linux" else 0
        return [a - b for a, b in zip(after, before, strict=True)]

    loop(300)
    # A leak grows each time; other threads and caches of the process grow once.
    count, blocks, pages = (min(each) for each in zip(grown(), grown(), grown(), strict=True))
    assert count <= 0
    assert blocks < 1000, "less than one object a step"
    assert pages < 2**20, "1000 steps of 3.2 kB gradients each would be 3 MB"
