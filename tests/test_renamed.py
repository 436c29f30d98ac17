"""Files that version 0.1 wrote, in ``files_of_0_1``, load under the names of today and compute the same values."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from eaml_ext import SSM, Adapter, MetaMAMLTrainer, SSMMetaPolicy, TaskBatch, checkpoint
from eaml_ext.nn.cores import CORES, Core

FOLDER = Path(__file__).parent / "files_of_0_1"


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(("kind", "prefix"), [(SSM, "ssm"), (SSMMetaPolicy, "policy")])
def test_load_model_of_version_0_1_computes_its_outputs(kind, prefix, core):
    model = kind.load(FOLDER / f"{prefix}-{core}.safetensors")
    x = torch.linspace(-1, 1, 2 * 6 * 3).view(2, 6, 3)
    want = json.loads((FOLDER / "outputs.json").read_text())[f"{prefix}-{core}"]
    with torch.no_grad():
        torch.testing.assert_close(model(x), torch.tensor(want), rtol=1e-5, atol=1e-6)


def test_meta_train_continues_checkpoint_of_version_0_1(tmp_path):
    path = shutil.copy(FOLDER / "trainer.safetensors", tmp_path)
    tasks = TaskBatch([tuple(torch.randn(4, size) for size in (3, 2, 3, 2)) for _ in range(4)], batch_size=2)
    model = SSM(3, 4, 2, state_size=2)
    trainer = MetaMAMLTrainer(model, 1e-2, 1e-2, progress=False)
    assert trainer.meta_train(tasks, 2, checkpoint=path) == [0.8429064750671387, 1.5009231567382812]
    tensors = checkpoint.load(FOLDER / "trainer.safetensors")[0].values()
    assert all(any(torch.equal(p, t) for t in tensors) for p in model.parameters())
    resumed = MetaMAMLTrainer(SSM(3, 4, 2, state_size=2), 1e-2, 1e-2, progress=False)
    losses = resumed.meta_train(tasks, 4, checkpoint=path)
    assert losses[:2] == trainer.losses and all(map(math.isfinite, losses)) and resumed.iteration == 4


OLD_NAMES = {"x_proj": "project", "in_proj": "project", "dt_proj": "expand", "out_proj": "mix"}
OLD_NAMES["token_shift_mix"] = "blend"


def old_key(key: str, core: str) -> str:
    """Return the name that a core's parameter had in version 0.1."""
    if core == "mamba":
        return key
    parts = [OLD_NAMES.get(part, part) for part in key.split(".")]
    return ".".join(parts).removesuffix("_log") if core == "lru" else ".".join(parts)


@pytest.mark.parametrize("core", CORES)
def test_adapter_load_state_dict_with_names_of_0_1_restores_it(core):
    model = SSM(3, 8, 2, core=core, state_size=4)
    adapter = Adapter(model)
    state = adapter.state_dict()
    for entry in ("average", "snapshot"):
        state[entry] = {old_key(name, core): value + 1 for name, value in state[entry].items()}
    adapter.load_state_dict(state)
    restored = adapter.state_dict()
    assert all(torch.equal(restored["average"][name], p + 1) for name, p in model.named_parameters())


class DerivedCore(Core):
    """A user's core whose parameters have names that cores of version 0.1 had."""

    def __init__(self, dim, state_size, dt_min=0.001, dt_max=0.1):
        super().__init__(dim, state_size)
        self.state_shape, self.A_log = (state_size,), torch.nn.Parameter(torch.zeros(1))
        self.mix, self.project = torch.nn.Linear(dim, dim), torch.nn.Linear(dim, dim)

    def scan(self, x, state=None, reset=None, lengths=None):
        return self.mix(self.project(x)) * self.A_log, x.new_zeros(len(x), *self.state_shape)


def test_load_state_dict_of_derived_core_keeps_its_names(tmp_path):
    model, other = (SSM(3, 8, 2, core=DerivedCore) for _ in range(2))
    checkpoint.save_state(tmp_path / "state", {"model": model.state_dict()})
    other.load_state_dict(checkpoint.load_state(tmp_path / "state")["model"])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_load_file_of_a_later_format_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    checkpoint.save(tmp_path / "file", {"x": torch.ones(1)})
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"was written by a newer version of eaml_ext$"):
        checkpoint.load(tmp_path / "file")
