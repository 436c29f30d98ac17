"""Buffers on disk: the same answers as in memory, and after a crash exactly the last flush."""

import copy
import os
import re
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from buffer_helpers import same

from eaml_ext.experience import ExperienceBuffer, _ring


@pytest.fixture
def narrow(monkeypatch):
    """Reduce the spare slots, so that the buffer flushes by itself often."""
    monkeypatch.setattr(_ring, "MIN_SPARE_SLOTS", 5)


def items(n, task=0):
    return {
        "state": torch.randn(n, 2, 4),
        "reward": torch.randn(n, 2),
        "context_embedding": torch.randn(n, 3),
        "priority": torch.rand(n) + 0.1,
        "done": torch.rand(n) > 0.5,
        "half": torch.randn(n).bfloat16(),
        "task": torch.full((n,), task),
    }


def pair(tmp_path, capacity=20, **options):
    """Return one buffer in memory and one on disk."""
    options = {"seed": 1, **options}
    return ExperienceBuffer(capacity, **options), ExperienceBuffer(capacity, directory=tmp_path / "b", **options)


def test_buffer_on_disk_answers_as_in_memory(tmp_path, narrow):
    memory, disk = pair(tmp_path, age_half_life=11.0)
    for step, size in enumerate((3, 1, 0, 20, 4, 13, 1, 1, 67, 5, 2)):
        more = items(size, step % 3)
        for buffer in (memory, disk):
            buffer.add(**more)
        if step == 7:
            memory.clear()
            disk.clear()
            assert len(disk) == 0
            continue
        assert len(memory) == len(disk)
        for weighted in (False, True):
            a, b = memory.get_batch(9, weighted=weighted), disk.get_batch(9, weighted=weighted)
            assert same(a.fields, b.fields)
        query = torch.randn(2, 3)
        for exclude in (None, 1):
            a, b = memory.retrieve(query, 6, exclude), disk.retrieve(query, 6, exclude)
            assert torch.equal(a.distances, b.distances) and same(a.fields, b.fields)
        assert torch.equal(memory.tasks(), disk.tasks())
        torch.testing.assert_close(memory.task_embeddings(), disk.task_embeddings())
        task = int(memory.tasks()[-1])
        assert same(memory.of_task(task).fields, disk.of_task(task).fields)
        assert same(memory.state_dict(), disk.state_dict())


def test_get_on_disk_after_overwriting_refuses_stale_indices(tmp_path, narrow):
    _, disk = pair(tmp_path, capacity=8)
    disk.add(**items(8))
    old = disk.get_batch(30)
    numbers = old.generations * 13 + old.indices  # 8 slots and 5 spare ones
    disk.add(**items(3))
    fresh = disk.is_current(old.indices, old.generations)
    assert torch.equal(fresh, numbers >= 3) and not fresh.all()
    with pytest.raises(ValueError, match="indices are stale or out of range"):
        disk.get(old.indices, old.generations)
    assert same(disk.get(old.indices[fresh], old.generations[fresh]).fields, old[fresh].fields)
    assert disk.set_priority(old.indices, 3.0, old.generations).tolist() == fresh.tolist()


@pytest.mark.parametrize("closed", [True, False])
def test_open_after_close_or_flush_continues_as_in_memory(tmp_path, closed, narrow):
    memory, disk = pair(tmp_path, age_half_life=11.0, metric="cosine")
    for size in (17, 9, 30):
        more = items(size)
        memory.add(**more)
        disk.add(**more)
    memory.get_batch(3)
    disk.get_batch(3)
    disk.close() if closed else disk.flush()
    del disk  # releases the lock
    disk = ExperienceBuffer.open(tmp_path / "b")
    assert same(memory.state_dict(), disk.state_dict())
    assert repr(disk) == repr(memory)[:-1] + f", directory={tmp_path / 'b'})"
    more = items(4)
    for buffer in (memory, disk):
        buffer.add(**more)
    query = torch.randn(3)
    assert torch.equal(memory.retrieve(query, 5).distances, disk.retrieve(query, 5).distances)
    assert same(memory.get_batch(7).fields, disk.get_batch(7).fields)


def test_load_state_dict_on_disk_replaces_files_and_copies_are_independent(tmp_path, narrow):
    memory, disk = pair(tmp_path)
    for size in (13, 22):
        memory.add(**items(size))
    disk.add(state=torch.zeros(3))  # has another schema, so that its files are replaced
    disk.load_state_dict(memory.state_dict())
    assert same(memory.state_dict(), disk.state_dict())
    assert len(list((tmp_path / "b").glob("field-*"))) == 7
    in_memory = copy.deepcopy(disk)
    disk.save(tmp_path / "saved")
    for other in (in_memory, ExperienceBuffer.load(tmp_path / "saved")):
        other.add(**items(4))
        assert same({**other.state_dict(), "generator": 0}.keys(), memory.state_dict().keys())
        assert "directory" not in repr(other)
    assert same(memory.state_dict(), disk.state_dict())  # changes of copies do not reach it
    more = items(30)
    memory.add(**more)
    disk.add(**more)
    del disk
    kept = ExperienceBuffer.open(tmp_path / "b")
    assert 13 < len(kept) <= 20  # the buffer has flushed by itself


CRASH = """
import os, signal, sys, torch
from eaml_ext.experience import ExperienceBuffer, _ring
_ring.MIN_SPARE_SLOTS = int(sys.argv[4])
folder, flushed, after = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
b = ExperienceBuffer(50, directory=folder, seed=0)
def add(first, count):
    x = torch.arange(first, first + count)
    wide = x.unsqueeze(1).double().expand(-1, 1000)
    b.add(number=x, state=wide, context_embedding=x.unsqueeze(1).float(), task=x % 3)
for first in range(0, flushed, 7):
    add(first, min(7, flushed - first))
b.flush()
for first in range(flushed, flushed + after):
    add(first, 1)
print(b.storage.flushed, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a POSIX kill")
@pytest.mark.parametrize(("flushed", "after"), [(30, 9), (120, 16), (333, 130)])
def test_open_after_a_crash_restores_the_last_flush(tmp_path, flushed, after):
    margin = 16
    run = [sys.executable, "-c", textwrap.dedent(CRASH), str(tmp_path / "b"), *map(str, (flushed, after, margin))]
    child = subprocess.run(run, capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    last = int(child.stdout)  # the buffer may have flushed by itself later
    assert last == flushed if after <= margin else flushed < last <= flushed + after
    buffer = ExperienceBuffer.open(tmp_path / "b")
    wanted = torch.arange(max(0, last - 50), last)
    got = torch.cat([buffer.of_task(task).number for task in range(3)]).sort().values
    assert torch.equal(got, wanted)
    everything = buffer.retrieve(torch.zeros(1), 50)
    assert torch.equal(everything.number, wanted)
    assert (everything.state == wanted.unsqueeze(1)).all(), "a torn item"
    buffer.add(number=last, state=torch.zeros(1000).double(), context_embedding=torch.zeros(1), task=0)
    assert len(buffer) == min(50, last + 1)


@pytest.mark.parametrize("moment", ["map", "checkpoint"])
def test_flush_interrupted_keeps_the_flush_before(tmp_path, monkeypatch, moment, narrow):
    _, disk = pair(tmp_path)
    disk.add(**items(24))
    disk.flush()
    before = disk.state_dict()
    disk.add(**items(3))

    def fails(*_, **__):
        raise KeyboardInterrupt

    target = "numpy.memmap.flush" if moment == "map" else "eaml_ext.checkpoint.save"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(target, fails)
        disk.flush()
    del disk
    assert same(ExperienceBuffer.open(tmp_path / "b").state_dict(), before)


def test_open_directory_in_use_raises_blocking_error(tmp_path):
    _, disk = pair(tmp_path)
    disk.add(**items(3))
    folder = re.escape(str(tmp_path / "b"))
    for call in (lambda: ExperienceBuffer.open(tmp_path / "b"), lambda: ExperienceBuffer(5, directory=tmp_path / "b")):
        with pytest.raises(BlockingIOError, match=rf"directory {folder} is in use by another buffer$"):
            call()
    disk.close()
    with pytest.raises(
        ValueError, match=rf"^ExperienceBuffer: directory {folder} holds a buffer, ExperienceBuffer.open"
    ):
        ExperienceBuffer(5, directory=tmp_path / "b")
    assert len(ExperienceBuffer.open(tmp_path / "b")) == 3


def test_calls_on_a_closed_buffer_raise(tmp_path):
    _, disk = pair(tmp_path)
    disk.add(**items(3))
    disk.close()
    disk.close()
    assert len(disk) == 0
    for name, call in {
        "add": lambda: disk.add(**items(3)),
        "clear": disk.clear,
        "flush": disk.flush,
        "get_batch": lambda: disk.get_batch(3),
        "retrieve": lambda: disk.retrieve(torch.zeros(3), 1),
        "set_priority": lambda: disk.set_priority(torch.tensor([0]), 1.0),
        "state_dict": disk.state_dict,
        "load_state_dict": lambda: disk.load_state_dict(ExperienceBuffer(20).state_dict()),
    }.items():
        with pytest.raises(ValueError, match=rf"^ExperienceBuffer.{name}: the buffer is closed$"):
            call()


def test_directory_wrong_argument_raises(tmp_path):
    with pytest.raises(TypeError, match=r"^ExperienceBuffer: directory must be a path, got int"):
        ExperienceBuffer(5, directory=3)
    with pytest.raises(
        ValueError, match=r"^ExperienceBuffer: a buffer on disk \(directory\) lives on the cpu, got device"
    ):
        ExperienceBuffer(5, directory=tmp_path / "b", device="meta")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^ExperienceBuffer: directory '.*file' cannot be made: "):
        ExperienceBuffer(5, directory=tmp_path / "file")
    with pytest.raises(ValueError, match=r"^ExperienceBuffer.flush: the buffer lives in memory"):
        ExperienceBuffer(5).flush()
    with pytest.raises(TypeError, match=r"^ExperienceBuffer.open: directory must be a path, got int"):
        ExperienceBuffer.open(3)
    with pytest.raises(FileNotFoundError, match=r"^ExperienceBuffer.open: there is no directory .*nowhere$"):
        ExperienceBuffer.open(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"^ExperienceBuffer.open: the directory .* holds no buffer$"):
        ExperienceBuffer.open(tmp_path)


def test_open_damaged_files_raises(tmp_path):
    _, disk = pair(tmp_path)
    disk.add(**items(3))
    disk.close()
    field = tmp_path / "b" / "field-0-0.bin"
    whole = field.read_bytes()
    field.write_bytes(whole[:-1])
    with pytest.raises(
        ValueError, match=r"^ExperienceBuffer.open: .*field-0-0.bin of field state is missing or damaged"
    ):
        ExperienceBuffer.open(tmp_path / "b")
    field.unlink()
    with pytest.raises(ValueError, match="of field state is missing or damaged, wanted"):
        ExperienceBuffer.open(tmp_path / "b")
    field.write_bytes(whole)
    about = tmp_path / "b" / "buffer.safetensors"
    kept = about.read_bytes()
    about.write_bytes(kept.replace(b'\\"written\\": 3', b'\\"written\\": 4'))
    assert about.read_bytes() != kept
    with pytest.raises(ValueError, match=r"^checkpoint\.load: "):
        ExperienceBuffer.open(tmp_path / "b")
    about.write_bytes(kept)
    assert len(ExperienceBuffer.open(tmp_path / "b")) == 3  # a failed open releases the lock


def test_open_file_outside_of_the_directory_raises(tmp_path, monkeypatch):
    _, disk = pair(tmp_path)
    disk.add(**items(3))
    outside = tmp_path / "outside"
    (tmp_path / "b" / disk.storage.files._files["state"]).rename(outside)
    disk.storage.files._files["state"] = os.path.join("..", "outside")
    disk.close()
    with pytest.raises(ValueError, match=r"outside of field state is missing or damaged"):
        ExperienceBuffer.open(tmp_path / "b")


def test_open_empty_buffer_or_field_without_numbers_works(tmp_path):
    _, disk = pair(tmp_path)
    disk.close()
    disk = ExperienceBuffer.open(tmp_path / "b")
    assert len(disk) == 0
    disk.add(state=torch.zeros(3, 0), task=1)  # a field without numbers has no file to map
    disk.close()
    assert ExperienceBuffer.open(tmp_path / "b").of_task(1).state.shape == (3, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_open_after_close_while_a_forked_process_lives_holds_the_directory(tmp_path):
    buffer = ExperienceBuffer(10, directory=tmp_path, seed=0)
    buffer.add(state=torch.ones(3, 2))
    (ask, tell), child = os.pipe(), os.fork()
    if child == 0:
        os.close(tell)
        os.read(ask, 1)  # returns when the parent closes the pipe
        buffer.close()  # must not release the lock of the parent
        os._exit(0)
    try:
        buffer.close()
        again = ExperienceBuffer.open(tmp_path)
        assert len(again) == 3
    finally:
        os.close(tell)
        os.waitpid(child, 0)
    with pytest.raises(BlockingIOError):
        ExperienceBuffer.open(tmp_path)
    again.close()
