"""Files with a right checksum and harmful content are refused with one sentence, and nothing changes."""

import json

import pytest
import torch
from safetensors.torch import save_file

from eaml_ext import SSM, ExperienceBuffer, MetaMAMLTrainer, SSMMetaPolicy, TaskBatch, checkpoint
from eaml_ext.nn.cores import CORES


def refused(load, part=""):
    with pytest.raises(ValueError, match=r"^[A-Za-z_.]+: \S.*\S$") as error:  # one line that names the function
        load()
    assert part in str(error.value)


@pytest.mark.parametrize("make", [SSM, SSMMetaPolicy])
def test_load_model_with_wrong_options_or_tensors_is_refused(make, tmp_path):
    path = tmp_path / "model"
    make(3, hidden_dim=4, **({"action_dim": 2} if make is SSMMetaPolicy else {})).save(path)
    tensors, options = checkpoint.load(path)
    bad = [None, [], {}, {**options, "x": 1}, {**options, "device": "cpu"}, {**options, "core": "os.system"}]
    bad += [{**options, "hidden_dim": value} for value in ("8", 8, float("nan"), -1, 60_000, 10**13)]  # 60,000: 14 GB
    bad += [{**options, "num_layers": value} for value in (10**9, "many", None)]
    for other in bad:
        checkpoint.save(path, tensors, other, kind=make.__name__)
        refused(lambda: make.load(path))
    checkpoint.save(path, {}, options, kind=make.__name__)
    refused(lambda: make.load(path))
    checkpoint.save(path, {**tensors, "more": torch.ones(1)}, options, kind=make.__name__)
    refused(lambda: make.load(path), "more of shape (1,), its options want None")


@pytest.mark.parametrize("core", sorted(CORES))
def test_load_model_of_every_core_computes_its_outputs(core, tmp_path):
    model = SSM(3, 8, 2, core=core, num_layers=2)
    model.save(tmp_path / "model")
    x = torch.randn(2, 5, 3)
    assert torch.equal(SSM.load(tmp_path / "model")(x), model(x))


def filled(**options):
    buffer = ExperienceBuffer(8, seed=0, **options)
    buffer.add(state=torch.ones(3, 2), context_embedding=torch.ones(3, 2), task=1, priority=1.0)
    return buffer


def test_load_buffer_with_wrong_content_is_refused(tmp_path):
    path, outside = tmp_path / "buffer", tmp_path / "outside"
    filled().save(path)
    tensors, state = checkpoint.load(path)
    options = state["options"]
    bad = [(tensors, other) for other in (None, {}, {**state, "fields": None}, {**state, "fields": ["nope"]})]
    bad += [
        (tensors, {**state, "options": other}) for other in (None, {}, {**options, "x": 1}, {**options, "metric": 3})
    ]
    bad += [(tensors, {**state, "options": {**options, "directory": str(outside)}})]  # a directory outside
    bad += [(tensors, {**state, "capacity": 10**15, "options": {**options, "capacity": 10**15}})]
    bad += [(tensors, {**state, "written": value}) for value in (-1, 10**30, "x", None, 2)]
    bad += [({name: t for name, t in tensors.items() if name != "generator"}, state)]
    for name, value in {
        "generator": torch.ones(3),
        "field.context_embedding": torch.full((3, 2), torch.nan),
        "field.priority": -torch.ones(3),
        "field.task": torch.ones(3),
        "field.state": torch.ones(2, 2),
    }.items():
        bad.append(({**tensors, name: value}, state))
    bad.append(({**tensors, "field.__class__": torch.ones(3)}, {**state, "fields": [*state["fields"], "__class__"]}))
    for some, other in bad:
        checkpoint.save(path, some, other, kind="ExperienceBuffer")
        refused(lambda: ExperienceBuffer.load(path))
    assert not outside.exists()


def test_open_directory_with_wrong_content_is_refused_and_unlocked(tmp_path):
    folder, outside = tmp_path / "buffer", tmp_path / "outside"
    filled(directory=folder).close()
    about = folder / "buffer.safetensors"
    tensors, state = checkpoint.load(about)
    fields, files = state["fields"], state["files"]
    (tmp_path / files["state"]).write_bytes((folder / files["state"]).read_bytes())  # a file of the right name and size
    bad = [None, {}, {name: value for name, value in state.items() if name != "fields"}]
    bad += [{**state, "options": {**state["options"], "directory": str(outside)}}, {**state, "options": None}]
    bad += [{**state, "slots": value} for value in (10**12, 0, "x", 1033, 8)]
    bad += [{**state, "written": value} for value in ("x", -5, 10**30, True)] + [{**state, "cleared": 10**6}]
    bad += [{**state, "files": value} for value in (3, {}, dict.fromkeys(files, files["state"]))]
    bad += [{**state, "files": {**files, "state": value}} for value in ("/etc/passwd", "../" + files["state"], 3)]
    bad += [{**state, "fields": {**fields, "state": value}} for value in (["load", [1032, 2]], ["float32", [-1]])]
    bad += [
        {**state, "fields": {**fields, "state": value}} for value in (["float32", "abc"], ["float32", [1033, 2]], 3)
    ]
    bad += [{**state, "fields": {**fields, "task": ["float64", [1032]]}}]
    for other in bad:
        checkpoint.save(about, tensors, other, kind="ExperienceBuffer.directory")
        refused(lambda: ExperienceBuffer.open(folder))
    assert not outside.exists()
    checkpoint.save(about, tensors, state, kind="ExperienceBuffer.directory")
    assert len(ExperienceBuffer.open(folder)) == 3  # the errors have released the lock


def test_meta_train_checkpoint_with_wrong_content_leaves_trainer_unchanged(tmp_path):
    path = tmp_path / "run"
    x, y = torch.randn(4, 3), torch.randn(4, 1)

    def make():
        return MetaMAMLTrainer(torch.nn.Linear(3, 1), progress=False), TaskBatch([(x, y, x, y)] * 4, batch_size=2)

    trainer, task_batch = make()
    trainer.meta_train(task_batch, 2, checkpoint=path)
    state = checkpoint.load_state(path)
    maml, adam = state["mamls"][0], state["mamls"][0]["optimizer"]
    parts = {"losses": "x", "began": "x", "mamls": [], "task_batch": {}, "settings": None}
    bad = [None, {}, [], *({**state, name: value} for name, value in parts.items()), {**state, "began": 7}]
    for part in ({}, {**maml, "optimizer": {}}, {**maml, "model": {"weight": 3}}, {**maml, "model": None}):
        bad.append({**state, "mamls": [part]})
    for moments in ({7: {}}, {"x": {}}, {0: 3}, 3):
        bad.append({**state, "mamls": [{**maml, "optimizer": {**adam, "state": moments}}]})
    for other in bad:
        checkpoint.save_state(path, other, kind="MetaMAMLTrainer")
        trainer, task_batch = make()
        before = trainer.maml.model.weight.clone()
        refused(lambda: trainer.meta_train(task_batch, 2, checkpoint=path))  # noqa: B023 (called at once)
        assert torch.equal(before, trainer.maml.model.weight) and not trainer.losses
        assert not trainer.maml.optimizer.state_dict()["state"] and not trainer.maml.last_losses


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, "3", "null", "{}", "{", '{"kind": "a"}', "NaN"])
def test_load_wrong_metadata_is_refused(text, tmp_path):
    path = tmp_path / "file"
    save_file({}, path, {"eaml_ext": text, "crc32": str(checkpoint._checksum({}, text))})
    refused(lambda: checkpoint.load(path))


@pytest.mark.parametrize(
    "tree", [{"tensor": "no"}, {"a": 1, "b": 2}, {}, {"evil": [1]}, {"dict": [[1]]}, {"dict": [[[1], 2]]}, {"list": 3}]
)
def test_load_state_wrong_nest_is_refused(tree, tmp_path):
    checkpoint.save(tmp_path / "file", {}, json.loads(json.dumps(tree)))
    refused(lambda: checkpoint.load_state(tmp_path / "file"))


@pytest.mark.parametrize("size", [2**63, 2**40, 10**8, 3])
def test_load_header_of_wrong_size_is_refused(size, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(size.to_bytes(8, "little") + b"{}" + b" " * 1000)
    refused(lambda: checkpoint.load(path), "damaged or not a checkpoint")
