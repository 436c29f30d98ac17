"""Meta-training continues from ``files_of_0_1/run.safetensors``, which version 0.1 wrote after three meta-updates."""

import copy
import shutil
from pathlib import Path

import pytest
import torch

from eaml_ext import SSM, MetaMAML, MetaMAMLTrainer, TaskBatch, checkpoint

RUN = Path(__file__).parent / "files_of_0_1" / "run.safetensors"
# Five meta-updates of version 0.1: losses, and the parameters of the last layer afterwards.
LOSSES = [2.0772924423217773, 2.098323106765747, 2.050615072250366, 1.9922243356704712, 1.953203797340393]
HEAD_WEIGHT, HEAD_BIAS = [[-0.4947156012058258, -0.12922503054141998]], [-0.3250081539154053]
OPTIONS = {"learn_inner_lr": True, "inner_parameters": ["cores.0.x_proj", "cores.0.out_proj"]}
OLD_NAMES = {"x_proj": "project", "dt_proj": "expand", "out_proj": "mix"}


def tasks():
    """The three tasks of the run; a meta-batch is all of them, so the random streams of 0.1 are not needed."""
    x = torch.sin(torch.arange(6.0).view(1, 6, 1) + torch.arange(4.0).view(4, 1, 1))
    return TaskBatch([(x[:2], a * x[:2], x[2:], a * x[2:]) for a in (-2.0, 0.5, 3.0)], 3)


def trainer(radius=0.5, **options):
    options = {**OPTIONS, **options}
    return MetaMAMLTrainer(SSM(1, 2, 1, state_size=1), 1e-2, 5e-2, kl_radii=(radius,), progress=False, **options)


def test_meta_train_file_of_0_1_continues_as_0_1_did(tmp_path):
    t = trainer()
    losses = t.meta_train(tasks(), 5, checkpoint=shutil.copy(RUN, tmp_path))
    assert losses == pytest.approx(LOSSES, rel=1e-4) and losses[:3] == LOSSES[:3]
    torch.testing.assert_close(t.maml.model.head.weight.detach(), torch.tensor(HEAD_WEIGHT), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(t.maml.model.head.bias.detach(), torch.tensor(HEAD_BIAS), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"radius": 0.4}, r"kl_radii=\[0.5\], this one has \[0.4\]"),
        ({"inner_parameters": "cores.0.x_proj"}, r"inner_parameters=\['cores.0.x_proj.weight', 'cores.0.out_proj.we"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_meta_train_file_of_0_1_with_other_settings_is_refused(other, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        trainer(**other).meta_train(tasks(), 5, checkpoint=shutil.copy(RUN, tmp_path))


def old_names(tensors):
    return {".".join(OLD_NAMES.get(word, word) for word in name.split(".")): t for name, t in tensors.items()}


@pytest.mark.parametrize("renamed", [True, False], ids=["from checkpoint.load_state", "with the names of 0.1"])
def test_load_state_dict_state_of_0_1_is_that_of_today(renamed):
    state = checkpoint.load_state(RUN)["mamls"][0]
    given = copy.copy(state)
    if not renamed:
        given |= {part: old_names(state[part]) for part in ("model", "inner_lrs")}
        assert "cores.0.project.weight" in given["inner_lrs"]
    maml = MetaMAML(SSM(1, 2, 1, state_size=1), 5e-2, 1e-2, **OPTIONS)
    maml.load_state_dict(given)
    for part in ("model", "inner_lrs"):
        assert all(torch.equal(t, state[part][name]) for name, t in maml.state_dict()[part].items())
    moments = maml.state_dict()["optimizer"]["state"]
    assert all(torch.equal(m["exp_avg"], state["optimizer"]["state"][i]["exp_avg"]) for i, m in moments.items())
