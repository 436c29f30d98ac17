"""Tasks of different sizes in one launch: losses and gradients are those of each task alone."""

import math

import pytest
import torch
from meta_tasks import assert_same_gradient, mlp, task
from torch import nn
from torch.nn.functional import mse_loss

from eaml_ext.meta import MaskedLoss, MetaMAML, MetaMAMLTrainer, TaskBatch
from eaml_ext.meta._padding import launches, pad_set, pad_tasks
from eaml_ext.nn import SSM
from eaml_ext.rl import SSMMetaPolicy

LOSS = MaskedLoss(nn.MSELoss(reduction="none"))
LENGTHS = [9, 5, 12, 7]


def ssm(core="s6"):
    return SSM(4, 8, 2, state_size=4, core=core).double()


def sequences(*lengths):
    """x and y of a set, a list of sequences each."""
    return tuple([torch.randn(n, dim, dtype=torch.float64) for n in lengths] for dim in (4, 2))


def one_sequence_tasks(lengths=LENGTHS):
    """Tasks with one sequence in each set, as lists and as tensors (1, time, ...)."""
    lists = [(*sequences(n), *sequences(n + 2)) for n in lengths]
    return lists, [tuple(part[0].unsqueeze(0) for part in task) for task in lists]


def gradient(maml, tasks, loss_fn, kl_radius=0.0):
    losses, grads = maml._meta_gradient().run(tasks, [loss_fn] * len(tasks), kl_radius)
    return losses, {i: g for i, g in enumerate(grads) if g is not None}


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the inputs of every scan of an SSM, without dimensions of vmap."""
    seen, scan = [], SSM.scan

    def recorded(self, x, *args, **kwargs):
        seen.append(tuple(x.shape))
        return scan(self, x, *args, **kwargs)

    monkeypatch.setattr(SSM, "scan", recorded)
    return seen


class MeanOverTime(nn.Module):
    """Not causal: padding has an influence unless the lengths are used."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x, lengths=None):
        h = self.inner(x).tanh()
        if lengths is None:
            return self.outer(h + h.mean(1, keepdim=True))
        steps = (torch.arange(x.shape[1]) < lengths.unsqueeze(1)).unsqueeze(-1)
        mean = (h * steps).sum(1, keepdim=True) / lengths.clamp(min=1).view(-1, 1, 1)
        return self.outer(h + mean)


class Branching(nn.Module):
    """Its branch depends on data, so vmap cannot run it."""

    def __init__(self):
        super().__init__()
        self.inner = ssm()

    def forward(self, x, lengths=None):
        y = self.inner(x, lengths=lengths)
        return -y if float(y.detach().sum()) > 0 else y


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"first_order": True},
        {"reptile": True},
        {"inner_steps": 3},
        {"learn_inner_lr": True},
        {"inner_parameters": "head"},
        {"micro_batch": 3},
        {"inner_steps": 3, "memory": "recompute"},
        {"inner_steps": 3, "memory": "forward_over_reverse"},
    ],
    ids=str,
)
def test_meta_gradient_sequences_of_other_lengths_equal_each_task_alone(options):
    maml = MetaMAML(ssm(), 0.1, 1e-3, **options)
    lists, tensors = one_sequence_tasks()
    assert_same_gradient(gradient(maml, tensors, mse_loss), gradient(maml, lists, LOSS))


def several_sequences_tasks():
    return [
        (*sequences(3, 7), *sequences(5)),
        (*sequences(6), *sequences(2, 4, 4)),
        (*sequences(1, 1, 8), *sequences(9)),
    ]


RAGGED = {
    "one sequence": (ssm, lambda: one_sequence_tasks()[0]),
    "several sequences": (ssm, several_sequences_tasks),
    "mamba": (lambda: ssm("mamba"), several_sequences_tasks),
    "not causal": (lambda: MeanOverTime().double(), several_sequences_tasks),
    "rows": (mlp, lambda: [task(n, m) for n, m in ((10, 6), (7, 6), (10, 9), (8, 4))]),
    "two launches": (ssm, lambda: one_sequence_tasks([40, 3, 35, 4])[0]),
    "branch": (Branching, several_sequences_tasks),
}


@pytest.mark.filterwarnings("ignore:MetaMAML. vmap cannot", "ignore:MetaMAML. forward mode cannot")
@pytest.mark.parametrize("memory", ["recompute", "forward_over_reverse"])
@pytest.mark.parametrize(
    "options, kl_radius", [({}, 0.0), ({"learn_inner_lr": True, "micro_batch": 2}, 0.3)], ids=["plain", "options"]
)
@pytest.mark.parametrize("kind", RAGGED)
def test_meta_gradient_ragged_tasks_by_products_equals_that_of_the_graph(kind, options, kl_radius, memory):
    model, tasks = (make() for make in RAGGED[kind])
    one, other = (
        MetaMAML(model, 0.1, 1e-3, inner_steps=3, memory=m, **options) for m in ("reverse_over_reverse", memory)
    )
    assert_same_gradient(gradient(one, tasks, LOSS, kl_radius), gradient(other, tasks, LOSS, kl_radius), 1e-9)


@pytest.mark.parametrize("core", ["mamba", "s4d", "s5", "lru", "ssd", "retention", "rwkv"])
def test_meta_gradient_every_core_equals_each_task_alone(core):
    maml = MetaMAML(ssm(core), 0.1, 1e-3)
    lists, tensors = one_sequence_tasks()
    assert_same_gradient(gradient(maml, tensors, mse_loss), gradient(maml, lists, LOSS))


def test_meta_gradient_kl_radius_equals_each_task_alone():
    maml = MetaMAML(ssm(), 0.1, 1e-3)
    lists, tensors = one_sequence_tasks()
    assert_same_gradient(gradient(maml, tensors, mse_loss, 0.3), gradient(maml, lists, LOSS, 0.3))


def test_meta_gradient_sets_of_several_sequences_equal_a_loop_over_sequences():
    model, tasks = ssm(), several_sequences_tasks()

    def loss(params, x, y):
        parts = [torch.func.functional_call(model, params, (a.unsqueeze(0),))[0] for a in x]
        return mse_loss(torch.cat(parts), torch.cat(y))

    params, wanted = dict(model.named_parameters()), []
    for support_x, support_y, query_x, query_y in tasks:
        grads = torch.autograd.grad(loss(params, support_x, support_y), list(params.values()), create_graph=True)
        adapted = {name: p - 0.1 * g for (name, p), g in zip(params.items(), grads, strict=True)}
        wanted.append(loss(adapted, query_x, query_y))
    wanted = torch.stack(wanted)
    meta = torch.autograd.grad(wanted.mean(), list(params.values()))
    assert_same_gradient((wanted.detach(), dict(enumerate(meta))), gradient(MetaMAML(model, 0.1, 1e-3), tasks, LOSS))


@pytest.mark.parametrize("options", [{}, {"reptile": True}], ids=str)
def test_meta_gradient_sets_of_other_sizes_equal_each_task_alone(options):
    maml = MetaMAML(mlp(), 0.1, 1e-3, **options)
    tasks = [task(n, m) for n, m in ((10, 6), (7, 6), (10, 9), (8, 4))]
    assert launches(tasks, [LOSS] * 4) == [[2, 0, 1, 3]]
    assert_same_gradient(gradient(maml, tasks, mse_loss), gradient(maml, tasks, LOSS))


def test_meta_update_sequences_of_other_lengths_call_the_model_once_per_step(calls):
    lists, _ = one_sequence_tasks()
    MetaMAML(ssm(), 0.1, 1e-3, inner_steps=2).meta_update(lists, LOSS)
    assert calls == [(1, 12, 4), (1, 12, 4), (1, 14, 4)]


def test_meta_update_loss_without_mask_runs_every_shape_alone(calls):
    _, tensors = one_sequence_tasks()
    MetaMAML(ssm(), 0.1, 1e-3).meta_update(tensors, mse_loss)
    assert len(calls) == 2 * len(LENGTHS)


def test_meta_update_tasks_of_one_shape_have_the_bits_of_the_plain_loss():
    maml, tasks = MetaMAML(mlp(), 0.1, 1e-3), [task() for _ in range(3)]
    one, other = (gradient(maml, tasks, loss_fn) for loss_fn in (mse_loss, LOSS))
    assert torch.equal(one[0], other[0]) and all(torch.equal(one[1][i], other[1][i]) for i in one[1])


def test_launches_padding_above_twice_the_data_is_split():
    lists, _ = one_sequence_tasks([100, 3, 90, 4, 1])
    found = launches(lists, [LOSS] * 5)
    assert found == [[0, 2, 3], [1, 4]]
    for launch in found:
        padded = pad_tasks([lists[i] for i in launch])
        real = sum(len(x) for i in launch for x in (lists[i][0][0], lists[i][2][0]))
        assert sum(t[0].shape[1] + t[2].shape[1] for t in padded) <= 2 * real


def test_launches_uneven_sequences_within_a_set_do_not_separate_tasks():
    tasks = [(*sequences(50 + i, 1, 1, 1), *sequences(9)) for i in range(3)]
    assert launches(tasks, [LOSS] * 3) == [[2, 1, 0]]


def test_launches_other_losses_dtypes_or_widths_do_not_share_one():
    lists, _ = one_sequence_tasks([4, 5, 5, 5])
    other = MaskedLoss(nn.L1Loss(reduction="none"))
    assert launches(lists[:2], [LOSS, other]) == [[0], [1]]
    assert launches(lists[:2], [LOSS, MaskedLoss(LOSS.elementwise)]) == [[1, 0]]  # equal by value
    single = tuple([part[0].float()] for part in lists[1])
    wide = (*[[part[0].repeat(1, 2)] for part in lists[2]],)
    assert launches([lists[0], single, wide, lists[3]], [LOSS] * 4) == [[3, 0], [1], [2]]


def test_pad_set_rows_and_steps_are_zero_after_the_data():
    x, y = sequences(2, 3)
    padded_x, padded_y, mask = pad_set(x, y, (3, 4))
    assert mask.tolist() == [[True, True, False, False], [True, True, True, False], [False] * 4]
    assert torch.equal(padded_x[mask], torch.cat(x)) and torch.equal(padded_y[mask], torch.cat(y))
    assert not padded_x[~mask].any() and not padded_y[~mask].any()


def test_masked_loss_infinite_on_padding_has_finite_derivatives():
    log_loss = MaskedLoss(lambda prediction, target: (prediction - target).log().square())  # log 0 on padding
    prediction = torch.tensor([[2.0, 3.0, math.nan]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    value = log_loss(prediction, torch.zeros(1, 3, dtype=torch.float64), mask)
    (first,) = torch.autograd.grad(value, prediction, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), prediction)
    assert float(value) == pytest.approx((math.log(2) ** 2 + math.log(3) ** 2) / 2)
    want = [(1 - math.log(p)) / p**2 for p in (2, 3)]
    torch.testing.assert_close(second, torch.tensor([[*want, 0.0]], dtype=torch.float64))


def test_masked_loss_several_elements_per_step_average_over_all():
    prediction, target, mask = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    torch.testing.assert_close(LOSS(prediction, target, mask), mse_loss(prediction[mask], target[mask]))
    torch.testing.assert_close(LOSS(prediction, target), mse_loss(prediction, target))


def test_masked_loss_half_precision_averages_beyond_its_largest_number():
    prediction = torch.full((1000, 1), 10.0, dtype=torch.float16)  # the losses sum to 1e5, float16 ends at 65504
    got = LOSS(prediction, torch.zeros_like(prediction), torch.arange(1000) < 999)
    assert got.dtype == torch.float16 and got.item() == 100


def test_adapt_sequences_equal_padded_tensors_with_a_mask():
    x, y = sequences(4, 6)
    maml = MetaMAML(ssm(), 0.1, 1e-3, inner_steps=2)
    adapted = dict(maml.adapt(x, y, LOSS).named_parameters())
    padded_x, padded_y, mask = pad_set(x, y)
    padded_x[~mask] = padded_y[~mask] = 7.0  # padding has no influence
    given = maml.adapt_params(maml.parameters(), padded_x, padded_y, LOSS, mask=mask)
    alone = maml.adapt_params(maml.parameters(), x[0].unsqueeze(0), y[0].unsqueeze(0), mse_loss)
    short = maml.adapt_params(maml.parameters(), x[:1], y[:1], LOSS)
    for name, p in adapted.items():
        torch.testing.assert_close(given[name], p, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(short[name], alone[name], rtol=1e-12, atol=1e-12)


def test_adapt_params_sequences_and_a_tensor_raise_one_sentence():
    maml, (x, _) = MetaMAML(ssm(), 0.1, 1e-3), sequences(3, 4)
    with pytest.raises(TypeError, match=r"^MetaMAML.adapt_params: support_x must be a torch.Tensor, got list$"):
        maml.adapt_params(maml.parameters(), x, torch.zeros(2, 4, 2), LOSS)


@pytest.mark.parametrize(
    "model, loss_fn, mask, error, text",
    [
        (ssm, LOSS, torch.ones(2, 6), TypeError, "mask must be bool, got float32"),
        (ssm, LOSS, torch.ones(2, 5).bool(), ValueError, "mask must have shape (n,) or (n, time) = (2, 6), got (2, 5)"),
        (ssm, mse_loss, torch.ones(2, 6).bool(), TypeError, "need a MaskedLoss as loss_fn, got mse_loss"),
        (ssm, mse_loss, torch.ones(2).bool(), TypeError, "a mask needs a MaskedLoss as loss_fn, got mse_loss"),
        (mlp, LOSS, torch.ones(2, 6).bool(), TypeError, "need a model called as model(x, lengths=lengths)"),
    ],
    ids=range(5),
)
def test_adapt_params_bad_mask_raises_one_sentence(model, loss_fn, mask, error, text):
    maml, x, y = MetaMAML(model(), 0.1, 1e-3), torch.randn(2, 6, 4).double(), torch.randn(2, 6, 2).double()
    with pytest.raises(error) as info:
        maml.adapt_params(maml.parameters(), x, y, loss_fn, mask=mask)
    assert text in str(info.value) and "\n" not in str(info.value)


def test_trainer_sequences_of_other_lengths_train_and_select_a_radius():
    lists, tensors = one_sequence_tasks()
    several = sequences(3, 8, 5)

    def trained(tasks, loss_fn):
        torch.manual_seed(0)
        options = {"loss_fn": loss_fn, "progress": False, "kl_radii": (0.0, 0.5)}
        trainer = MetaMAMLTrainer(ssm(), 1e-2, 0.1, **options)
        return trainer, trainer.meta_train(TaskBatch(tasks, batch_size=3), 4)

    trainer, losses = trained(lists, LOSS)
    assert losses == pytest.approx(trained(tensors, mse_loss)[1], rel=1e-10)
    chosen = trainer.mamls[trainer.select_kl_radius(several)]
    wanted = chosen.adapt(*several, LOSS)
    for p, q in zip(trainer.adapt_to_new_task(several).parameters(), wanted.parameters(), strict=True):
        assert torch.equal(p, q)


def test_meta_update_policy_learns_from_episodes_of_other_lengths():
    policy = SSMMetaPolicy(4, 2, hidden_dim=8).double()
    lists, tensors = one_sequence_tasks()
    maml = MetaMAML(policy, 0.1, 1e-3)
    assert_same_gradient(gradient(maml, tensors, mse_loss), gradient(maml, lists, LOSS))


def test_meta_gradient_model_that_is_not_causal_equals_each_task_alone():
    maml, (lists, tensors) = MetaMAML(MeanOverTime().double(), 0.1, 1e-3), one_sequence_tasks()
    assert_same_gradient(gradient(maml, tensors, mse_loss), gradient(maml, lists, LOSS))


def test_meta_gradient_model_that_vmap_cannot_run_equals_each_task_alone():
    maml, (lists, tensors) = MetaMAML(Branching(), 0.1, 1e-3), one_sequence_tasks()
    with pytest.warns(RuntimeWarning, match="vmap cannot run the model"):
        got = gradient(maml, lists, LOSS)
    assert_same_gradient(gradient(maml, tensors, mse_loss), got)


@pytest.mark.parametrize(
    "model, change, loss_fn, error, text",
    [
        (
            mlp,
            None,
            LOSS,
            TypeError,
            "sets of sequences need a model called as model(x, lengths=lengths), got Sequential",
        ),
        (ssm, None, mse_loss, TypeError, "sets of sequences need a MaskedLoss as loss_fn, got mse_loss"),
        (ssm, lambda x, y: ([], []), LOSS, ValueError, "support_x is empty"),
        (ssm, lambda x, y: (x, y[:1]), LOSS, ValueError, "support_x has 2 sequences, support_y has 1"),
        (
            ssm,
            lambda x, y: (x, [y[0], y[1][1:]]),
            LOSS,
            ValueError,
            "support_x has shape (4, 4), support_y has shape (3, 2)",
        ),
        (
            ssm,
            lambda x, y: ([x[0], x[1][:, :3]], y),
            LOSS,
            ValueError,
            "support_x must have shape (time, 4), got (4, 3)",
        ),
        (ssm, lambda x, y: ([x[0], x[1].float()], y), LOSS, TypeError, "support_x must be float64, got float32"),
        (ssm, lambda x, y: ([x[0][:0], x[1]], [y[0][:0], y[1]]), LOSS, ValueError, "support_x is empty"),
        (ssm, lambda x, y: (x, torch.zeros(2, 2)), LOSS, TypeError, "support_x must be a torch.Tensor, got list"),
        (ssm, lambda x, y: ([x], [y]), LOSS, TypeError, "sequence 0: support_x must be a torch.Tensor, got list"),
    ],
    ids=range(10),
)
def test_meta_update_bad_sequences_raise_one_sentence(model, change, loss_fn, error, text):
    x, y = sequences(3, 4)
    support = (x, y) if change is None else change(x, y)
    maml = MetaMAML(model(), 0.1, 1e-3)
    with pytest.raises(error) as info:
        maml.meta_update([(*support, *sequences(5))], loss_fn)
    assert text in str(info.value) and "\n" not in str(info.value)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: MaskedLoss(3), TypeError, "elementwise must be callable, got int"),
        (lambda: MaskedLoss(mse_loss)(torch.ones(2), torch.ones(2)), ValueError, "losses of shape (2, ...), got ()"),
        (lambda: MaskedLoss(lambda p, t: 1)(torch.ones(2), torch.ones(2)), TypeError, "must return a tensor, got int"),
        (
            lambda: LOSS(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3, dtype=torch.bool)),
            ValueError,
            "prediction has shape (2, 3), the mask has shape (3,)",
        ),
    ],
    ids=["not callable", "mean", "number", "mask"],
)
def test_masked_loss_bad_arguments_raise_one_sentence(call, error, text):
    with pytest.raises(error) as info:
        call()
    assert text in str(info.value)
