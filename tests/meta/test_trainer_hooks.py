"""MetaMAMLTrainer.meta_train with on_iteration, extra_state, lr_scheduler and a TaskSource of the caller's own."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from eaml_ext import checkpoint
from eaml_ext.meta import MetaBatch, MetaMAML, MetaMAMLTrainer, TaskBatch, TaskSource
from eaml_ext.tasks import SinusoidTasks


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)


def trainer(**options):
    return MetaMAMLTrainer(network(), 1e-2, 1e-2, progress=False, **options)


class Sinusoids:
    """A TaskSource that draws and scales its own data, and keeps those of the last meta-batch."""

    seed = 3

    def __init__(self):
        self.data, self.losses = None, []

    def batch(self, iteration):
        columns = SinusoidTasks(5).draw(4, seed=iteration)
        self.data = [(sx, 2 * sy, qx, 2 * qy) for sx, sy, qx, qy in zip(*columns, strict=True)]
        return MetaBatch(self.data, [None] * 4, [-1] * 4)

    def update(self, indices, losses):
        assert indices == [-1] * 4
        self.losses.append(losses.mean())

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert state == {}

    def describe(self):
        return {"tasks": "doubled sinusoids"}


class Memory:
    """Extra state: the inputs of every meta-batch seen."""

    def __init__(self):
        self.inputs = torch.empty(0)

    def remember(self, number, batch, loss):
        self.inputs = torch.cat([self.inputs, *(task[0].flatten() for task in batch.tasks)])

    def state_dict(self):
        return {"inputs": self.inputs}

    def load_state_dict(self, state):
        self.inputs = state["inputs"]


def test_meta_train_own_task_source_equals_loop_of_meta_updates():
    assert isinstance(Sinusoids(), TaskSource) and isinstance(TaskBatch(SinusoidTasks()), TaskSource)
    maml, losses = MetaMAML(network(), 1e-2, 1e-2), []
    schedule = cosine(maml.optimizer)
    for i in range(6):
        losses.append(maml.meta_update(Sinusoids().batch(i).tasks, mse_loss))
        schedule.step()
    t, source = trainer(lr_scheduler=cosine), Sinusoids()
    assert t.meta_train(source, 6) == losses
    assert torch.stack(source.losses).tolist() == pytest.approx(losses)
    for p, q in zip(maml.model.parameters(), t.maml.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert t.maml.optimizer.param_groups[0]["lr"] == maml.optimizer.param_groups[0]["lr"] < 1e-3


def test_on_iteration_every_meta_update_receives_number_batch_and_loss():
    t, source, seen = trainer(), Sinusoids(), []

    def record(number, batch, loss):
        assert t.iteration == number + 1 and batch.tasks is source.data
        seen.append((number, loss))

    t.meta_train(source, 2, on_iteration=record)
    t.meta_train(source, 1, on_iteration=record)
    assert seen == list(enumerate(t.losses)) and len(seen) == 3


@pytest.mark.parametrize("radii", [(0.0,), (0.0, 0.5)], ids=str)
def test_meta_train_extra_state_and_scheduler_resume_with_bits_of_uninterrupted_run(radii, tmp_path):
    path = tmp_path / "run.safetensors"
    options = {"lr_scheduler": cosine, "kl_radii": radii}
    whole, memory = trainer(**options), Memory()
    whole.meta_train(Sinusoids(), 6, on_iteration=memory.remember)

    class Stop(Exception):
        pass

    def stop_after_four(number, batch, loss):
        broken_memory.remember(number, batch, loss)
        if number == 4:  # before the checkpoint of this meta-update
            raise Stop

    broken_memory, resumed_memory, resumed = Memory(), Memory(), trainer(**options)
    with pytest.raises(Stop):
        trainer(**options).meta_train(
            *(Sinusoids(), 6),
            checkpoint=path,
            checkpoint_every=2,
            on_iteration=stop_after_four,
            extra_state=broken_memory,
        )
    assert len(checkpoint.load_state(path)["losses"]) == 4
    losses = resumed.meta_train(
        Sinusoids(), 6, checkpoint=path, on_iteration=resumed_memory.remember, extra_state=resumed_memory
    )
    assert losses == whole.losses and torch.equal(resumed_memory.inputs, memory.inputs)
    for one, other in zip(whole.mamls, resumed.mamls, strict=True):
        assert one.optimizer.param_groups[0]["lr"] == other.optimizer.param_groups[0]["lr"]
        for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(p, q)


def test_extra_state_is_loaded_after_everything_else(tmp_path):
    t, memory = trainer(), Memory()
    trainer().meta_train(Sinusoids(), 2, checkpoint=tmp_path / "run", extra_state=memory)
    memory.load_state_dict = lambda state: seen.append(t.iteration)
    seen = []
    t.meta_train(Sinusoids(), 3, checkpoint=tmp_path / "run", extra_state=memory)
    assert seen == [2] and t.iteration == 3


def test_extra_state_that_raises_leaves_trainer_unchanged(tmp_path):
    trainer(lr_scheduler=cosine).meta_train(Sinusoids(), 2, checkpoint=tmp_path / "run", extra_state=Memory())
    t, memory = trainer(lr_scheduler=cosine), Memory()
    before = copy.deepcopy(t.maml.state_dict())

    def fails(state):
        raise ValueError("too small")

    memory.load_state_dict = fails
    with pytest.raises(ValueError, match=r"^too small$"):
        t.meta_train(Sinusoids(), 3, checkpoint=tmp_path / "run", extra_state=memory)
    assert t.iteration == 0 and t.losses == [] and t.maml.state_dict()["optimizer"] == before["optimizer"]
    assert all(torch.equal(p, before["model"][name]) for name, p in t.maml.model.state_dict().items())


@pytest.mark.parametrize(
    ("first", "then", "text"), [(Memory(), None, "an"), (None, Memory(), "no")], ids=["file with", "file without"]
)
def test_checkpoint_with_and_without_extra_state_cannot_continue_each_other(first, then, text, tmp_path):
    trainer().meta_train(Sinusoids(), 1, checkpoint=tmp_path / "run", extra_state=first)
    with pytest.raises(ValueError, match=rf"^MetaMAMLTrainer.meta_train: checkpoint .*run holds {text} extra_state$"):
        trainer().meta_train(Sinusoids(), 2, checkpoint=tmp_path / "run", extra_state=then)


def test_checkpoint_of_other_scheduler_or_source_is_refused(tmp_path):
    trainer(lr_scheduler=cosine).meta_train(Sinusoids(), 1, checkpoint=tmp_path / "run")
    other = trainer(lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2))
    with pytest.raises(ValueError, match=r"lr_scheduler='CosineAnnealingLR', this one has 'StepLR'$"):
        other.meta_train(Sinusoids(), 2, checkpoint=tmp_path / "run")
    source = Sinusoids()
    source.describe = lambda: {"tasks": "others"}
    with pytest.raises(ValueError, match=r"tasks='doubled sinusoids', this one has 'others'$"):
        trainer(lr_scheduler=cosine).meta_train(source, 2, checkpoint=tmp_path / "run")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: trainer(lr_scheduler=3), "MetaMAMLTrainer: lr_scheduler must be callable, got int"),
        (
            lambda: trainer().meta_train(Sinusoids(), 1, on_iteration=3),
            "MetaMAMLTrainer.meta_train: on_iteration must be callable, got int",
        ),
        (
            lambda: trainer().meta_train(Sinusoids(), 1, extra_state=3),
            "MetaMAMLTrainer.meta_train: extra_state must have state_dict and load_state_dict, got int",
        ),
    ],
)
def test_hooks_of_the_wrong_kind_raise_type_error(call, text):
    with pytest.raises(TypeError) as info:
        call()
    assert str(info.value) == text


def test_meta_train_checkpoint_with_scheduler_is_refused_without_one(tmp_path):
    path = tmp_path / "run"
    trainer(lr_scheduler=cosine).meta_train(Sinusoids(), 1, checkpoint=path)
    with pytest.raises(ValueError, match=r"is of a run with lr_scheduler='CosineAnnealingLR', this one has None"):
        trainer().meta_train(Sinusoids(), 2, checkpoint=path)
