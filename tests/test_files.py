"""Atomic writing: the old file or the new one, whole."""

import os
import stat
import threading

import pytest

from eaml_ext._files import atomic_write


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_atomic_write_error_in_block_keeps_old_file(error, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path) as temporary:
        assert os.path.dirname(temporary) == str(tmp_path)  # os.replace needs one file system
        with open(temporary, "w") as file:
            file.write("new")
        assert path.read_text() == "old"
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_atomic_write_block_that_replaces_or_removes_its_file(tmp_path):
    path = tmp_path / "file"
    with atomic_write(path) as temporary:
        (tmp_path / "other").write_text("replaced")
        os.replace(tmp_path / "other", temporary)
    assert path.read_text() == "replaced"
    with pytest.raises(FileNotFoundError), atomic_write(path) as temporary:
        os.unlink(temporary)
    assert path.read_text() == "replaced" and os.listdir(tmp_path) == ["file"]


def test_atomic_write_mode_is_that_of_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "file") as temporary:
            os.chmod(temporary, 0o600)  # as libraries do that write a file of their own
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_atomic_write_directory_that_does_not_exist_raises(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "none" / "file"):
        pass
    assert os.listdir(tmp_path) == []


def test_atomic_write_threads_leave_one_whole_file(tmp_path):
    path, texts = tmp_path / "file", [digit * 10_000 for digit in "0123"]

    def write(text):
        for _ in range(20):
            with atomic_write(path) as temporary, open(temporary, "w") as file:
                file.write(text)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts and os.listdir(tmp_path) == ["file"]
