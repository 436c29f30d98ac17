"""Meta-gradients by Hessian-vector products against those by the graph of the inner loop."""

import copy
import itertools
import random
import warnings

import pytest
import torch
from meta_tasks import assert_same_gradient, gradients, mlp, sequences, task
from torch import nn
from torch.nn.functional import dropout, mse_loss
from torch.utils.flop_counter import FlopCounterMode
from user_models import UNBATCHABLE, Attention, Shared, Tied, Transformer
from user_models import sequences as user_sequences

from eaml_ext.meta import MetaMAML
from eaml_ext.nn import SSM
from eaml_ext.ops import knn

PRODUCTS = ["recompute", "forward_over_reverse"]
FALLBACK = "^MetaMAML: forward mode cannot run the model, so reverse mode recomputes inner steps: "


class Lookup(nn.Module):
    """Regression on the values of the nearest of learned keys."""

    def __init__(self):
        super().__init__()
        self.query, self.keys = nn.Linear(3, 3), nn.Parameter(torch.randn(20, 3))
        self.values = nn.Parameter(torch.randn(20))

    def forward(self, x):
        near = knn(self.query(x.flatten(0, 1)), self.keys, 4)
        return (torch.softmax(-near.values, -1) * self.values[near.indices]).sum(-1).view(*x.shape[:-1], 1)


def ssm(core):
    return SSM(4, 6, 2, state_size=3, core=core).double()


def equal_tasks():
    return [user_sequences() for _ in range(3)]


MODELS = {
    "mlp": lambda: (mlp(), [task() for _ in range(5)]),
    "s6": lambda: (ssm("s6"), [sequences(2, 12) for _ in range(3)]),
    "mamba": lambda: (ssm("mamba"), [sequences(2, 12) for _ in range(3)]),
    "ragged": lambda: (ssm("s6"), [sequences(1, 12), sequences(2, 5), sequences(1, 12), sequences(1, 7)]),
    "attention": lambda: (Transformer().double(), equal_tasks()),
    "kept maps": lambda: (Attention().double(), equal_tasks()),
    "knn": lambda: (Lookup().double(), equal_tasks()),
    "shared": lambda: (Shared().double(), equal_tasks()),
    "tied": lambda: (Tied().double(), equal_tasks()),
    **{kind: lambda kind=kind: (UNBATCHABLE[kind]().double(), equal_tasks()) for kind in UNBATCHABLE},
}


def pair(model, memory, *, steps=3, **options):
    """A MetaMAML with the given memory and one that keeps the graph."""
    other = MetaMAML(copy.deepcopy(model), 0.1, 1e-3, inner_steps=steps, **options)
    return MetaMAML(model, 0.1, 1e-3, inner_steps=steps, memory=memory, **options), other


@pytest.mark.filterwarnings("ignore:MetaMAML. vmap cannot", "ignore:MetaMAML. forward mode cannot")
@pytest.mark.parametrize("memory", PRODUCTS)
@pytest.mark.parametrize("kind", MODELS)
def test_meta_gradient_any_model_equals_that_of_the_graph(kind, memory):
    torch.manual_seed(0)
    model, tasks = MODELS[kind]()
    one, other = pair(model, memory)
    assert_same_gradient(gradients(one, tasks), gradients(other, tasks), 1e-9)


@pytest.mark.filterwarnings("ignore:MetaMAML. forward mode cannot")
@pytest.mark.parametrize("memory", PRODUCTS)
@pytest.mark.parametrize("kl_radius", [0.0, 0.3])
@pytest.mark.parametrize(
    "options",
    [
        {"learn_inner_lr": True},
        {"inner_parameters": "head"},
        {"inner_parameters": ("cores", "head.bias"), "learn_inner_lr": True},
        {"micro_batch": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("core", ["s6", "mamba"])
def test_meta_gradient_options_equal_those_of_the_graph(core, options, kl_radius, memory):
    torch.manual_seed(0)
    tasks = [sequences(2, 12) for _ in range(4)] + [sequences(1, 5)]
    one, other = pair(ssm(core), memory, **options)
    with torch.no_grad():
        for maml in (one, other):
            for i, rate in enumerate(maml.inner_lrs.values()):
                rate.mul_(torch.linspace(0.5, 1.5, rate.numel()).view_as(rate) / (1 + i))
    got, wanted = gradients(one, tasks, kl_radius), gradients(other, tasks, kl_radius)
    assert_same_gradient(got, wanted, 1e-9)
    assert all(float(g.abs().max()) > 0 for g in wanted[1].values())


@pytest.mark.parametrize("memory", PRODUCTS)
def test_meta_gradient_unused_parameters_have_none_as_from_the_graph(memory):
    class Partial(nn.Module):
        """``body`` has gradients in the support loss of some steps only through the target; ``unused`` has none."""

        def __init__(self):
            super().__init__()
            self.body, self.support_only, self.unused = mlp(), nn.Linear(1, 1).double(), nn.Linear(1, 1).double()

        def forward(self, x):
            y = self.body(x)
            return self.support_only(y) if len(x) == 10 else y

    tasks = [task() for _ in range(3)]
    one, other = pair(Partial(), memory, learn_inner_lr=True)
    (_, got), (_, wanted) = gradients(one, tasks), gradients(other, tasks)
    assert {name for name, g in got.items() if g is None} == {name for name, g in wanted.items() if g is None}
    assert got["unused.weight"] is None and got["rate of unused.weight"] is None
    for name, g in wanted.items():
        if g is not None:
            torch.testing.assert_close(got[name], g, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("memory", PRODUCTS)
def test_meta_gradient_loss_linear_in_parameters_has_no_second_derivative(memory):
    one, other = pair(nn.Linear(4, 1).double(), memory)
    tasks = [task() for _ in range(3)]

    def mean(y, target):
        return y.mean()

    def grads(maml):
        return maml._meta_gradient().run(tasks, [mean] * 3)[1]

    for a, b in zip(grads(one), grads(other), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:MetaMAML. vmap cannot", "ignore:MetaMAML. forward mode cannot")
@pytest.mark.parametrize("memory", PRODUCTS)
@pytest.mark.parametrize("kind", ["batchable", "branch"])
def test_meta_update_dropout_draws_the_numbers_of_the_graph(kind, memory):
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 1)

        def forward(self, x):
            y = self.head(dropout(self.body(x).tanh(), 0.5))
            return 2 * y if kind == "branch" and y.sum() > 0 else y

    one, other = pair(Dropping().double(), memory, steps=4)
    # Without vmap tasks run one after the other, so the order of draws is that of the graph for one task alone.
    tasks = [task() for _ in range(1 if kind == "branch" else 3)]
    results, states = [], []
    for maml in (one, other):
        torch.manual_seed(3)
        results.append(gradients(maml, tasks))
        states.append(torch.get_rng_state())
    assert_same_gradient(*results, 1e-9)
    assert torch.equal(*states)
    torch.manual_seed(4)
    assert not torch.equal(gradients(one, tasks)[0], results[0][0])


@pytest.mark.parametrize("memory", PRODUCTS)
def test_meta_update_random_numbers_of_python_are_refused(memory):
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, x):
            return self.inner(x) * random.random()

    maml = MetaMAML(Skipping(), 0.1, 0.1, inner_steps=3, memory=memory)
    before = copy.deepcopy(maml.state_dict())
    with pytest.raises(ValueError, match=r"^MetaMAML: memory must be 'reverse_over_reverse', because model or loss_fn"):
        maml.meta_update([task() for _ in range(3)], mse_loss)
    for name, p in maml.model.state_dict().items():
        assert torch.equal(p, before["model"][name])


@pytest.mark.parametrize("memory", PRODUCTS)
def test_meta_update_non_finite_support_loss_is_skipped(memory):
    maml, (sx, sy, qx, qy) = MetaMAML(mlp(), 0.1, 0.1, inner_steps=2, memory=memory), task()
    loss = maml.meta_update([(sx, sy * torch.nan, qx, qy), task()], mse_loss)
    assert loss != loss and maml.skipped_updates == 1 and bool(torch.isfinite(maml.last_losses[1]))


@pytest.mark.parametrize("kind", ["ragged", "gru", "checkpoint"])
def test_meta_update_forward_mode_fails_gives_gradient_after_one_warning(kind):
    torch.manual_seed(0)
    model, tasks = MODELS[kind]()
    one, other = pair(model, "forward_over_reverse")
    other_losses, wanted = gradients(other, tasks)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [gradients(one, tasks) for _ in range(2)]
    assert len([w for w in caught if str(w.message).startswith(FALLBACK[1:])]) == 1
    for result in results:
        assert_same_gradient(result, (other_losses, wanted), 1e-9)


def test_meta_update_forward_mode_fails_in_a_later_step_gives_the_same_gradient():
    calls = []

    def fails_once(y, target):
        calls.append(None)
        if len(calls) == 3 + 1 + 2:  # inner steps, query, second product
            raise RuntimeError("mine")
        return mse_loss(y, target)

    one, other = pair(mlp(), "forward_over_reverse")
    tasks = [task() for _ in range(3)]
    with pytest.warns(RuntimeWarning, match=FALLBACK + "mine$"):
        got = one._meta_gradient().run(tasks, [fails_once] * 3)
    for a, b in zip(got[1], gradients(other, tasks)[1].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_meta_update_forward_mode_runs_without_warning_where_it_can():
    for kind in ("mlp", "s6", "mamba", "attention", "knn", "shared"):
        model, tasks = MODELS[kind]()
        maml = MetaMAML(model, 0.1, 1e-3, inner_steps=2, memory="forward_over_reverse")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="MetaMAML")
            maml.meta_update(tasks, mse_loss)


def test_meta_update_error_of_the_model_is_raised_without_warning():
    calls = []

    def fails_in_third_call(y, target):
        calls.append(None)
        if len(calls) > 2:
            raise RuntimeError("mine")
        return mse_loss(y, target)

    maml = MetaMAML(mlp(), 0.1, 0.1, memory="forward_over_reverse")
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match=r"^mine$"):
        warnings.filterwarnings("error", message="MetaMAML")
        maml.meta_update([task()], fails_in_third_call)


@pytest.mark.parametrize("memory", PRODUCTS)
def test_meta_update_under_a_dispatch_mode_gives_the_same_gradient(memory):
    one, other = pair(mlp(), memory)
    tasks = [task() for _ in range(3)]
    with FlopCounterMode(display=False):
        got = gradients(one, tasks)
    assert_same_gradient(got, gradients(other, tasks), 1e-9)


@pytest.mark.parametrize("memory", PRODUCTS)
def test_meta_update_hooks_of_the_caller_run(memory):
    one, other = pair(ssm("s6"), memory)
    tasks = [sequences(2, 12) for _ in range(3)]
    with torch.autograd.graph.save_on_cpu():
        got = gradients(one, tasks)
    assert_same_gradient(got, gradients(other, tasks), 1e-9)


MEMORY_TASKS = 2


def peak_allocated(memory, steps):
    """The largest sum of bytes that torch's CPU allocator has given out in a meta-gradient: the same in every run."""
    torch.manual_seed(0)
    tasks = [tuple(t.float() for t in sequences(16, 32)) for _ in range(MEMORY_TASKS)]
    model = SSM(4, 16, 2)
    gradients(MetaMAML(model, 0.1, 1e-3, memory=memory), tasks)  # fills caches
    maml = MetaMAML(model, 0.1, 1e-3, inner_steps=steps, memory=memory)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        gradients(maml, tasks)
    events = [profiled.profiler.kineto_results.experimental_event_tree()]
    changes = []
    while events:
        for event in events.pop():
            events.append(event.children)
            if event.name == "[memory]":
                changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    return max(itertools.accumulate(size for _, size in sorted(changes)))


@pytest.fixture(scope="module")
def peak_of_the_graph():
    return peak_allocated("reverse_over_reverse", 50)


@pytest.mark.parametrize("memory", PRODUCTS)
def test_meta_update_inner_steps_allocate_a_copy_of_the_parameters_each(memory, peak_of_the_graph):
    few, many = (peak_allocated(memory, steps) for steps in (10, 50))
    assert 10 * many < peak_of_the_graph
    adapted = MEMORY_TASKS * sum(4 * p.numel() for p in SSM(4, 16, 2).parameters())
    assert 0.95 * 40 * adapted < many - few < 1.05 * 40 * (adapted + torch.get_rng_state().numel())


@pytest.mark.parametrize("options", [{"first_order": True}, {"reptile": True}], ids=str)
@pytest.mark.parametrize("memory", PRODUCTS)
def test_meta_update_without_second_order_ignores_memory(options, memory):
    one, other = pair(mlp(), memory, **options)
    tasks = [task() for _ in range(3)]
    for _ in range(2):
        assert one.meta_update(tasks, mse_loss) == other.meta_update(tasks, mse_loss)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"memory": "less"}, "memory must be one of reverse_over_reverse, recompute, forward_over_reverse, got 'less'"),
        ({"memory": None}, "memory must be one of"),
        ({"memory": ["recompute"]}, "memory must be one of"),
        ({"memory": "recompute", "compile": True}, "memory must be reverse_over_reverse, got recompute"),
    ],
)
def test_maml_bad_memory_raises_one_sentence(options, text):
    with pytest.raises(ValueError, match=text) as info:
        MetaMAML(mlp(), 0.1, 0.1, **options)
    assert "\n" not in str(info.value)
