"""A run that version 0.1 began, in ``files_of_0_1``, goes on: its checkpoint after 32 of 48 meta-updates."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from eaml_ext import checkpoint, cli
from eaml_ext.jobs import format_1
from eaml_ext.jobs.world_model import DynamicsModel, model_data, task_embedding
from eaml_ext.rl import collect
from eaml_ext.tasks import make_tasks

FOLDER = Path(__file__).parent / "files_of_0_1"
# Mean errors with which version 0.1 itself ended this run.
ERRORS = {"copy input": 1.539, "no adaptation": 1.6093, "plain": 0.8702, "uniform": 0.7038, "best_fit": 0.7029}


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(FOLDER, tmp_path / "run"))


def resume(folder, *flags):
    return cli.main([f"--config={folder / 'settings.toml'}", f"--out={folder}", "--resume", *flags])


def test_resume_run_of_version_0_1_ends_with_its_errors(folder, capsys):
    old = checkpoint.load_state(folder / "checkpoint.safetensors", kind=format_1.KIND)
    assert resume(folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Resumed after 32 of 48 meta-updates." and lines[-1] == f"Results: {folder}"
    report = json.loads((folder / "report.json").read_text())
    for name, mean in ERRORS.items():
        assert report["variants"][name]["mean"] == pytest.approx(mean, rel=0.02), name
    assert report["meta_loss"][:4] == [sum(old["losses"][i : i + 8]) / 8 for i in range(0, 32, 8)]
    new = checkpoint.load_state(folder / "checkpoint.safetensors", kind="MetaMAMLTrainer")
    for name in ("mean", "std", "scale"):
        assert torch.equal(new["mamls"][0]["model"][name], old["maml"]["model"][name])
    assert new["extra_state"]["written"] == old["buffer"]["written"] + 16 * 6 * 30
    assert resume(folder) == 0
    assert capsys.readouterr().out.startswith("Resumed after 48 of 48 meta-updates.")


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("--seed=3", "{} is of a run with seed=0, this one has 3"),
        ("--num_epochs=3", "checkpoint {} holds 32 meta-updates, num_epochs=3 makes 24"),
    ],
)
def test_resume_run_of_version_0_1_with_other_settings_leaves_its_file(flag, text, folder, capsys):
    path = folder / "checkpoint.safetensors"
    assert resume(folder, flag) == 2
    error = capsys.readouterr().err
    assert error == f"eaml-ext: resume: {text.format(path)}\n"
    assert path.read_bytes() == (FOLDER / path.name).read_bytes()


@pytest.mark.parametrize("part", ["settings", "losses", "maml", "schedule", "buffer"])
def test_resume_file_of_version_0_1_without_a_part_is_refused(part, folder, capsys):
    path = folder / "checkpoint.safetensors"
    state = checkpoint.load_state(path)
    del state[part]
    checkpoint.save_state(path, state, kind=format_1.KIND)
    assert resume(folder) == 2
    error = capsys.readouterr().err
    assert error.startswith("eaml-ext: resume: ") and f"(KeyError: '{part}')" in error and error.count("\n") == 1


def test_embeddings_equal_those_of_whole_tasks():
    distribution = make_tasks("CartPole-v1")
    data = collect(distribution, distribution.sample(3, "train", 0), 20, 0)
    model = DynamicsModel(4, 2, hidden_dim=4)
    model.normalise(data)
    x, y = model_data(data, model)
    want = task_embedding(model.in_units(x), y).repeat_interleave(20, dim=0)
    fields = {
        "state": data.observations.flatten(0, 1),
        "action": data.actions.flatten(0, 1),
        "start": data.resets.flatten(),
        "next_state": data.next_observations.flatten(0, 1),
        "task": torch.tensor([7, 3, 5]).repeat_interleave(20),
    }
    order = torch.randperm(60)
    got = format_1.embeddings(model, {name: value[order] for name, value in fields.items()})
    torch.testing.assert_close(got, want[order], rtol=1e-4, atol=1e-5)
