"""Models that vmap cannot run: one warning, then tasks one at a time, with the gradients of a loop by hand."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import mse_loss
from user_models import UNBATCHABLE, Attention, Checkpointed, Once, Shared, Transformer, sequences

from eaml_ext.experience import ExperienceBuffer
from eaml_ext.meta import AdaptedTaskModels, MetaLearner, MetaMAML, MetaMAMLTrainer, TaskBatch
from eaml_ext.meta._batching import Batching

WARNING = "vmap cannot run the model, so tasks run one at a time from now on: "


def plain(model):
    """The same function without checkpoints or shared names, which torch.func.functional_call runs rightly."""
    twin = Once().double() if isinstance(model, Shared) else copy.deepcopy(model)
    twin.load_state_dict({n: t for n, t in model.state_dict().items() if n in twin.state_dict()})
    if isinstance(twin, Checkpointed):
        twin.enabled = False
    return twin


def by_hand(model, tasks, inner_lr, steps, first_order=False, prefix=""):
    """Mean query loss and meta-gradient by a loop on the tape."""
    model = plain(model)
    params = dict(model.named_parameters())
    total = 0
    for support_x, support_y, query_x, query_y in tasks:
        fast = dict(params)
        for _ in range(steps):
            names = [n for n in fast if n.startswith(prefix)]
            loss = mse_loss(functional_call(model, fast, (support_x,)), support_y)
            grads = torch.autograd.grad(loss, [fast[n] for n in names], create_graph=not first_order)
            fast.update({n: fast[n] - inner_lr * g for n, g in zip(names, grads, strict=True)})
        total = total + mse_loss(functional_call(model, fast, (query_x,)), query_y) / len(tasks)
    return float(total.detach()), torch.autograd.grad(total, list(params.values()))


def meta_gradient(maml, tasks):
    """The change of the parameters by plain gradient descent of step size 1."""
    before = [p.detach().clone() for p in maml.model.parameters()]
    loss = maml.meta_update(tasks, mse_loss)
    return loss, [b - p.detach() for b, p in zip(before, maml.model.parameters(), strict=True)]


def assert_gradient(got, wanted):
    assert got[0] == pytest.approx(wanted[0], rel=1e-10)
    for a, b in zip(got[1], wanted[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("kind", UNBATCHABLE)
def test_meta_update_vmap_fails_gives_gradient_of_a_loop_and_one_warning(kind, first_order):
    model, tasks = UNBATCHABLE[kind]().double(), [sequences() for _ in range(3)] + [sequences(rows=1)]
    wanted = by_hand(model, tasks, 0.1, 2, first_order)
    maml = MetaMAML(model, 0.1, 1.0, first_order, inner_steps=2, optimizer=torch.optim.SGD)
    with pytest.warns(RuntimeWarning, match=f"^MetaMAML: {WARNING}") as caught:
        assert_gradient(meta_gradient(maml, tasks), wanted)
    assert len([w for w in caught if "vmap cannot run" in str(w.message)]) == 1
    wanted = by_hand(model, tasks, 0.1, 2, first_order)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*vmap")
        assert_gradient(meta_gradient(maml, tasks), wanted)


@pytest.mark.parametrize("kind", ["gru", "checkpoint", "branch"])
def test_single_task_calls_vmap_fails_equal_those_of_a_loop(kind):
    model, (sx, sy, qx, qy) = UNBATCHABLE[kind]().double(), sequences()
    maml = MetaMAML(model, 0.1, 1.0, inner_steps=2)
    wanted = by_hand(model, [(sx, sy, qx, qy)], 0.1, 2)
    adapted = maml.adapt_params(maml.parameters(), sx, sy, mse_loss)
    loss = mse_loss(maml.call(adapted, qx), qy)
    assert_gradient((loss.item(), torch.autograd.grad(loss, list(maml.parameters().values()))), wanted)
    copied = maml.adapt(sx, sy, mse_loss)
    for name, p in copied.named_parameters():
        torch.testing.assert_close(p, adapted[name])


def test_task_losses_vmap_fails_are_differentiable():
    model, tasks = UNBATCHABLE["lstm"]().double(), [sequences() for _ in range(3)]
    maml = MetaMAML(model, 0.1, 1.0)
    with pytest.warns(RuntimeWarning, match=WARNING):
        losses = maml.task_losses(maml.parameters(), tasks, mse_loss)
    grads = torch.autograd.grad(losses.mean(), list(maml.parameters().values()))
    assert_gradient((losses.mean().item(), grads), by_hand(model, tasks, 0.1, 1))


def test_meta_update_checkpoint_outside_the_inner_parameters_gives_gradient_of_a_loop():
    """The inner gradient recomputes nothing: only the outer backward pass could fail under vmap."""
    model, tasks = Checkpointed().double(), [sequences() for _ in range(3)]
    wanted = by_hand(model, tasks, 0.1, 1, prefix="head")
    for call in ("task_losses", "meta_update"):
        maml = MetaMAML(model, 0.1, 1.0, inner_parameters="head", optimizer=torch.optim.SGD)
        with pytest.warns(RuntimeWarning, match=WARNING):
            if call == "meta_update":
                assert_gradient(meta_gradient(maml, tasks), wanted)
            else:
                mean = maml.task_losses(maml.parameters(), tasks, mse_loss).mean()
                assert_gradient((mean.item(), torch.autograd.grad(mean, list(model.parameters()))), wanted)


@pytest.mark.parametrize("options", [{"reptile": True}, {"micro_batch": 2}, {"learn_inner_lr": True}], ids=str)
def test_meta_update_options_vmap_fails_move_as_on_a_batchable_model(options):
    branching, tasks = UNBATCHABLE["checkpoint"]().double(), [sequences() for _ in range(3)]
    batchable = plain(branching)
    one, other = (MetaMAML(m, 0.1, 1.0, optimizer=torch.optim.SGD, **options) for m in (branching, batchable))
    with pytest.warns(RuntimeWarning, match=WARNING):
        got = meta_gradient(one, tasks)
    assert_gradient(got, meta_gradient(other, tasks))
    assert one.meta_update(tasks, mse_loss, kl_radius=0.2) == pytest.approx(
        other.meta_update(tasks, mse_loss, kl_radius=0.2), rel=1e-9
    )


def test_meta_update_compile_vmap_fails_runs_as_a_loop(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model, tasks = UNBATCHABLE["gru"]().double(), [sequences() for _ in range(3)]
    wanted = by_hand(model, tasks, 0.1, 1)
    maml = MetaMAML(model, 0.1, 1.0, optimizer=torch.optim.SGD, compile=True)
    with pytest.warns(RuntimeWarning, match=WARNING):
        assert_gradient(meta_gradient(maml, tasks), wanted)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_meta_update_fused_attention_gives_second_order_gradient(training):
    model, tasks = Transformer(training).double(), [sequences() for _ in range(3)]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            wanted = by_hand(model, tasks, 0.1, 1)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    single = MetaMAML(copy.deepcopy(model), 0.1, 1.0)
    losses = single.task_losses(single.parameters(), tasks[:1], mse_loss)
    torch.autograd.grad(losses.sum(), list(single.parameters().values()))
    maml = MetaMAML(model, 0.1, 1.0, optimizer=torch.optim.SGD)
    assert_gradient(meta_gradient(maml, tasks), wanted)
    assert torch.backends.mha.get_fastpath_enabled() and torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("first_order", [False, True])
def test_meta_update_shared_submodule_gives_gradient_of_one_name(first_order):
    model, tasks = Shared().double(), [sequences() for _ in range(3)]
    wanted = by_hand(model, tasks, 0.1, 2, first_order)
    maml = MetaMAML(model, 0.1, 1.0, first_order, inner_steps=2, optimizer=torch.optim.SGD)
    assert_gradient(meta_gradient(maml, tasks), wanted)
    assert model.b is model.a and model.layers[0] is model.a
    wanted = by_hand(model, tasks[:1], 0.1, 2, first_order)
    assert_gradient(meta_gradient(maml, tasks[:1]), wanted)


def test_calls_model_keeps_tensors_leave_it_as_it_was():
    model, (sx, sy, qx, qy) = Attention().double(), sequences()
    model(sx)
    kept = model.map
    maml = MetaMAML(model, 0.1, 1.0)
    maml.meta_update([(sx, sy, qx, qy)] * 2, mse_loss)
    adapted = maml.adapt(sx, sy, mse_loss, 2)
    assert model.map is kept and len(model.maps) == 1
    wanted = maml.adapt_params(maml.parameters(), sx, sy, mse_loss, 2)
    torch.testing.assert_close(adapted(qx), maml.call(wanted, qx))
    trainer = MetaMAMLTrainer(model, inner_lr=0.1, kl_radii=(0.0, 0.5), progress=False)
    assert isinstance(trainer.adapt_to_new_task((sx, sy)), Attention)


def test_meta_train_resumed_after_fallback_has_bits_of_uninterrupted_run(tmp_path):
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 1)

        def forward(self, x):
            y = self.head(nn.functional.dropout(x, 0.5))
            return 2 * y if y.sum() > 0 else y

    def train(*counts):
        model.load_state_dict(start)
        for count in counts:
            trainer = MetaMAMLTrainer(model, 0.1, 0.1, progress=False)
            losses = trainer.meta_train(tasks, count, checkpoint=tmp_path / f"{counts}.pt")
        return losses

    model, tasks = Dropping().double(), TaskBatch([sequences() for _ in range(4)], 2)
    start = copy.deepcopy(model.state_dict())
    with pytest.warns(RuntimeWarning, match=WARNING):
        assert train(4) == train(2, 4)


def test_adapted_task_models_vmap_fails_scores_equal_those_of_a_loop():
    model = UNBATCHABLE["branch"]()
    maml, buffer = MetaMAML(model, 0.1, 1.0, inner_steps=3), ExperienceBuffer(100)
    for task in range(3):
        buffer.add(torch.randn(4, 3), torch.randn(4, 1), task=torch.full((4,), task))
    x, y = torch.randn(5, 3), torch.randn(5, 1)
    with pytest.warns(RuntimeWarning, match="^AdaptedTaskModels: " + WARNING):
        models = AdaptedTaskModels(maml, buffer, mse_loss)
    scores = models.score(buffer, torch.arange(3), {"states": x, "targets": y})
    for task in range(3):
        past = buffer.of_task(task)
        adapted = maml.adapt(past.observation, past.target, mse_loss)
        torch.testing.assert_close(scores[task], mse_loss(adapted(x), y).detach())


def test_meta_learner_vmap_fails_takes_the_same_steps():
    def branching(prediction, target):
        error = (prediction - target).abs().sum()
        return error.square() if error < 1 else 2 * error - 1

    def batchable(prediction, target):
        error = (prediction - target).abs().sum()
        return torch.where(error < 1, error.square(), 2 * error - 1)

    torch.manual_seed(0)
    one = MetaLearner(3, 1, 8, 1e-2, loss_fn=branching)
    other = MetaLearner(3, 1, 8, 1e-2, loss_fn=batchable)
    other.load_state_dict(one.state_dict())
    task = torch.randn(4, 3), (torch.randn(6, 3), torch.randn(6, 1)), (torch.randn(5, 3), torch.randn(5, 1))
    with pytest.warns(RuntimeWarning, match="^MetaLearner: vmap cannot run the model, so pairs run one at a time"):
        losses = [one.meta_update([task]) for _ in range(3)]
    assert losses == pytest.approx([other.meta_update([task]) for _ in range(3)], rel=1e-5)
    for a, b in zip(one.adapt(*task[:2]).values(), other.adapt(*task[:2]).values(), strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------------------ Batching


def test_batching_fallback_draws_the_numbers_of_a_loop():
    def compute(batch):
        noise = torch.rand(3)
        return noise + batch(lambda x: torch.zeros(()) if x > 0 else x)(torch.ones(3))

    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    with pytest.warns(RuntimeWarning, match="^Here: vmap cannot run the model, so rows run one at a time"):
        got = Batching("Here", "row").run(compute, torch.device("cpu"))
    assert torch.equal(got, wanted)


def test_batching_vmap_and_loop_fail_raises_and_vmap_stays():
    batching, shapes = Batching("Here", "row"), []

    def failing(x):
        shapes.append(x.shape)
        raise RuntimeError("mine")

    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^mine$") as info:
            batching.run(lambda batch: batch(failing)(torch.ones(3, 2)), torch.device("cpu"))
        assert info.value.__context__ is None and batching.vmapped


def test_batching_other_error_is_raised_without_loop():
    for error in (ValueError("mine"), torch.OutOfMemoryError("none left")):
        calls = []

        def failing(x, error=error, calls=calls):
            calls.append(x)
            raise error

        with pytest.raises(type(error)):
            Batching("Here", "row").run(lambda batch, f=failing: batch(f)(torch.ones(3)), torch.device("cpu"))
        assert len(calls) == 1


def test_batching_hooks_of_caller_run():
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor

    model, tasks = nn.Linear(3, 1).double(), [sequences() for _ in range(2)]
    wanted = by_hand(model, tasks, 0.1, 1)
    maml = MetaMAML(model, 0.1, 1.0, optimizer=torch.optim.SGD)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert_gradient(meta_gradient(maml, tasks), wanted)
    assert packed
