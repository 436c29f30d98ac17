"""Files that version 0.1 wrote: a saved buffer, a directory with four spare slots, and a shard of a group of one."""

import shutil
from pathlib import Path

import pytest
import torch

from eaml_ext.distributed import torchrun_group
from eaml_ext.experience import ExperienceBuffer, ShardedExperienceBuffer

FILES = Path(__file__).parent / "files_of_0_1"
NUMBERS = torch.arange(2, 8)  # eight items were added to a buffer of six, then three were drawn


def load(kind, folder):
    """Load a copy of the files, because opening a directory writes to it."""
    shutil.copytree(FILES, folder, dirs_exist_ok=True)
    if kind == "file":
        return ExperienceBuffer.load(folder / "buffer.safetensors")
    if kind == "directory":
        return ExperienceBuffer.open(folder / "directory")
    with torchrun_group(alone=True) as group:
        return ShardedExperienceBuffer.load(folder / "sharded", group).local


@pytest.mark.parametrize("kind", ["file", "directory", "sharded"])
def test_load_files_of_0_1_restore_items_options_and_draws(kind, tmp_path):
    buffer = load(kind, tmp_path)
    assert (buffer.capacity, buffer.state_dim, buffer.action_dim) == (6, 2, None)
    assert (buffer.metric, buffer.age_half_life) == ("cosine", 8.0)
    found = torch.cat([buffer.of_task(task).indices for task in buffer.tasks().tolist()])
    items = buffer.get(found)
    wanted = {
        "state": NUMBERS.float().unsqueeze(1).expand(6, 2) / 2,
        "action": NUMBERS % 2,
        "reward": -NUMBERS.float(),
        "context_embedding": torch.stack([NUMBERS, -NUMBERS], 1).float(),
        "task": NUMBERS // 3,
        "priority": 1.0 + NUMBERS.double(),
    }
    assert list(items.fields) == list(wanted)
    for name, value in wanted.items():
        assert items.fields[name].dtype == value.dtype and torch.equal(items.fields[name], value), name
    slots = 10 if kind == "directory" else 6
    assert torch.equal(items.generations * slots + items.indices, NUMBERS)
    assert buffer.get_batch(8).reward.tolist() == [-3.0, -4.0, -6.0, -6.0, -5.0, -7.0, -7.0, -4.0]
    nearest = buffer.retrieve(torch.tensor([1.0, 0.5]), 3)
    assert nearest.reward.tolist() == [-7.0, -6.0, -5.0]
    torch.testing.assert_close(nearest.distances, torch.tensor([-1.3957, -1.1755, -0.9347]), rtol=0, atol=1e-4)


def test_open_directory_of_0_1_goes_on_and_is_opened_again(tmp_path):
    buffer = load("directory", tmp_path)
    newest = buffer.get(torch.tensor([7]))
    buffer.add(**{name: value[0] for name, value in newest.fields.items()})
    buffer.close()
    buffer = ExperienceBuffer.open(tmp_path / "directory")
    assert buffer.get(torch.tensor([3, 4, 5, 6, 7, 8])).reward.tolist() == [-3.0, -4.0, -5.0, -6.0, -7.0, -7.0]
    buffer.close()
