"""A buffer in a process that was forked."""

import os
import signal
import threading
import time

import pytest
import torch

from eaml_ext.experience import ExperienceBuffer


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork does not exist on this system")
def test_fork_during_a_write_waits_and_leaves_the_child_a_free_lock():
    buffer = ExperienceBuffer(8, seed=0)
    buffer.add(state=torch.zeros(3, 2))
    entered, leave, write = threading.Event(), threading.Event(), buffer.storage.write

    def paused(items):
        entered.set()
        leave.wait(10)
        write(items)

    buffer.storage.write = paused
    thread = threading.Thread(target=buffer.add, kwargs={"state": torch.ones(4, 2)})
    thread.start()
    assert entered.wait(10)
    threading.Timer(0.1, leave.set).start()
    child = os.fork()
    if child == 0:
        count = 0
        try:
            count = len(buffer.get_batch(2)) * len(buffer)
        finally:
            os._exit(count)
    deadline, (done, status) = time.monotonic() + 10, os.waitpid(child, os.WNOHANG)
    while not done and time.monotonic() < deadline:
        time.sleep(0.01)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    thread.join()
    assert done, "the child waits for a lock that nobody holds"
    assert os.waitstatus_to_exitcode(status) == 2 * 7
    assert len(buffer) == 7  # the parent's lock is free too


def test_forked_process_cannot_write_to_the_directory_of_its_parent(tmp_path, monkeypatch):
    buffer = ExperienceBuffer(8, seed=0, directory=tmp_path / "b")
    buffer.add(state=torch.zeros(3, 2), priority=1.0)
    buffer.flush()
    state, process = buffer.state_dict(), os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: process + 1)
    for name, call in {
        "add": lambda: buffer.add(state=torch.ones(2), priority=1.0),
        "clear": buffer.clear,
        "set_priority": lambda: buffer.set_priority(torch.tensor([0]), 2.0),
        "flush": buffer.flush,
        "load_state_dict": lambda: buffer.load_state_dict(state),
    }.items():
        with pytest.raises(ValueError, match=rf"^ExperienceBuffer.{name}: a forked process cannot write to the buffer"):
            call()
    assert len(buffer) == 3 and len(buffer.get_batch(2)) == 2
    written = (tmp_path / "b" / "buffer.safetensors").stat().st_mtime_ns
    buffer.close()  # a worker closes its copy at its end
    assert (tmp_path / "b" / "buffer.safetensors").stat().st_mtime_ns == written
