"""Files that version 0.1 wrote, in ``files_of_0_1``, load under the names of today and compute the same values."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from eaml_ext import SSM, MetaMAMLTrainer, SSMMetaPolicy, TaskBatch, checkpoint
from eaml_ext.nn.cores import CORES

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
