"""The folder of a run: its lock, files of earlier runs, paths that cannot be written."""

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from eaml_ext import cli
from eaml_ext.jobs import config_file, dynamics, run_folder
from eaml_ext.jobs.config import DynamicsConfig, algo_of
from eaml_ext.jobs.rl_config import MAMLConfig, RL2Config
from eaml_ext.jobs.run_folder import CHECKPOINT, LOCK, OUTPUTS, RunFolder, lock

FOREIGN = ("notes.txt", "report.json.bak", "model.safetensors.tmp", "report.json.1-2.tmp.txt", "other.json.1-2.tmp")
TEMPORARY = "checkpoint.safetensors.12-34.tmp"


@pytest.fixture
def settings(tmp_path):
    return DynamicsConfig(out=str(tmp_path / "run"))


def write(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(f"{name} of an earlier run")


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != LOCK}


# ------------------------------------------------------------------------------------------------------- the lock


def test_run_folder_second_run_is_refused_until_the_first_ends(settings):
    with RunFolder(settings) as folder:
        assert sorted(os.listdir(folder.path)) == [LOCK]
        text = rf"^RL2Config: out: {folder.path} is in use by another run; --out names another folder$"
        for _ in range(2):
            with pytest.raises(ValueError, match=text), RunFolder(RL2Config(out=settings.out)):
                pass
    with RunFolder(settings) as folder:
        folder.begin()
    assert os.listdir(folder.path) == ["settings.toml"]


HOLD = """
import sys, time
from eaml_ext.jobs.config import DynamicsConfig
from eaml_ext.jobs.run_folder import RunFolder
with RunFolder(DynamicsConfig(out=sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_run_folder_lock_ends_with_a_process_that_is_killed(settings, capsys):
    child = subprocess.Popen([sys.executable, "-c", HOLD, settings.out], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "locked\n"
        assert cli.main(["--out", settings.out]) == 2
        error = capsys.readouterr().err
        assert error == f"eaml-ext: out: {settings.out} is in use by another run; --out names another folder\n"
    finally:
        child.kill()
        assert child.wait() == -signal.SIGKILL
    assert os.listdir(settings.out) == [LOCK]
    with RunFolder(settings):
        pass
    assert os.listdir(settings.out) == []


def test_lock_file_removed_between_open_and_lock_is_made_again(tmp_path, monkeypatch):
    path, locked = tmp_path / LOCK, []

    def slow(descriptor):
        if not locked:
            path.unlink()  # the other process ends here
        locked.append(original(descriptor))
        return locked[-1]

    original = run_folder._lock_descriptor
    monkeypatch.setattr(run_folder, "_lock_descriptor", slow)
    with lock(path) as first:
        assert first and locked == [True, True] and path.exists()
        with lock(path) as second:
            assert not second
    assert not path.exists()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EDEADLK])
def test_lock_without_fcntl_uses_msvcrt(code, settings, monkeypatch):
    calls = []

    def locking(descriptor, mode, count):
        calls.append((mode, count))
        if len(calls) == 2:
            raise OSError(code, "locked")

    monkeypatch.setattr(run_folder, "fcntl", None)
    monkeypatch.setattr(run_folder, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2), raising=False)
    with RunFolder(settings), pytest.raises(ValueError, match="in use by another run"), RunFolder(settings):
        pass
    assert calls == [(2, 1)] * 2


def test_lock_on_file_system_without_locks_prints_a_line(settings, monkeypatch, capsys):
    def flock(descriptor, flags):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(run_folder, "fcntl", SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4))
    with RunFolder(settings):
        assert (
            capsys.readouterr().out == "The file system of the folder has no locks: two runs in it are not refused.\n"
        )


# ------------------------------------------------------------------------------------------------- earlier files


@pytest.mark.parametrize("kind", [DynamicsConfig, RL2Config, MAMLConfig])
@pytest.mark.parametrize("name", OUTPUTS)
def test_run_folder_with_a_file_of_an_earlier_run_is_refused(kind, name, tmp_path):
    write(tmp_path, name, *FOREIGN)
    before = content(tmp_path)
    text = f"{kind.__name__}: out: {tmp_path} has {name} of an earlier run; --resume continues that run, "
    with pytest.raises(ValueError) as info, RunFolder(kind(out=str(tmp_path))):
        pass
    assert str(info.value) == text + "--overwrite replaces its files; --out names another folder"
    assert content(tmp_path) == before and LOCK not in os.listdir(tmp_path)


@pytest.mark.parametrize("kind", [DynamicsConfig, RL2Config, MAMLConfig])
def test_run_folder_overwrite_removes_the_outputs_of_all_jobs_and_no_other_file(kind, tmp_path):
    write(tmp_path, *OUTPUTS, *FOREIGN, TEMPORARY)
    before, settings = content(tmp_path), kind(out=str(tmp_path), overwrite=True)
    with RunFolder(settings) as folder:
        assert content(tmp_path) == before  # the run may still be refused
        folder.begin()
    assert content(tmp_path) == {name: before[name] for name in FOREIGN} | {"settings.toml": config_file.text(settings)}


def test_run_folder_overwrite_of_a_link_keeps_its_target(tmp_path, settings):
    write(tmp_path, "target")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.json").symlink_to(tmp_path / "target")
    with RunFolder(replace(settings, overwrite=True)) as folder:
        folder.begin()
    assert os.listdir(folder.path) == ["settings.toml"] and content(tmp_path / "run")
    assert (tmp_path / "target").read_text() == "target of an earlier run"


@pytest.mark.parametrize("how", [{}, {"overwrite": True}, {"resume": True}])
def test_run_folder_with_a_folder_of_an_output_name_is_refused(how, tmp_path):
    (tmp_path / "report.json").mkdir()
    with (
        pytest.raises(ValueError, match=r"out: .* has a folder report.json, the name of a file that runs write; --out"),
        RunFolder(DynamicsConfig(out=str(tmp_path), **how)),
    ):
        pass
    assert os.listdir(tmp_path) == ["report.json"]


@pytest.mark.parametrize(
    ("names", "stored", "kind"),
    [
        ((CHECKPOINT, "policy.safetensors"), None, DynamicsConfig),
        ((CHECKPOINT, "model.safetensors"), None, RL2Config),
        ((CHECKPOINT, "settings.toml"), MAMLConfig(), RL2Config),
        ((CHECKPOINT, "settings.toml"), DynamicsConfig(), MAMLConfig),
        (("settings.toml",), RL2Config(), DynamicsConfig),
    ],
)
def test_run_folder_resume_of_another_job_is_refused(names, stored, kind, tmp_path):
    write(tmp_path, *names)
    if stored is not None:
        config_file.write(tmp_path, stored)
    before, algo = content(tmp_path), kind.__name__.removesuffix("Config").lower()
    with pytest.raises(ValueError) as info, RunFolder(kind(out=str(tmp_path), resume=True)):
        pass
    listed = ", ".join(name for name in OUTPUTS if name in names)
    job = "another job" if stored is None else f"--algo {algo_of(stored)}"
    text = f"{kind.__name__}: resume: {tmp_path} has {listed} of {job}, not of --algo {algo}"
    assert str(info.value) == f"{text}; --out names another folder"
    assert content(tmp_path) == before


def test_run_folder_resume_without_checkpoint_keeps_the_results_of_the_earlier_run(tmp_path, settings):
    write(tmp_path / "run", "report.json", "settings.toml")
    with (
        pytest.raises(ValueError, match=r"resume: .* has settings.toml, report.json, but no checkpoint; --overwrite"),
        RunFolder(replace(settings, resume=True)),
    ):
        pass
    assert (tmp_path / "run" / "report.json").exists()


def test_run_folder_resume_of_a_run_that_was_killed_before_its_first_checkpoint_begins(tmp_path, settings):
    write(tmp_path / "run", "settings.toml", TEMPORARY)
    with RunFolder(replace(settings, resume=True)) as folder:
        folder.begin()
    assert content(folder.path) == {"settings.toml": config_file.text(settings)}


@pytest.mark.parametrize(("changed", "kept"), [({}, True), ({"num_epochs": 60}, False), ({"plan_tasks": 0}, False)])
def test_run_folder_resume_keeps_results_of_the_same_settings_only(changed, kept, tmp_path, settings):
    results = {"report.json", "report.png", "model.safetensors", "buffer.safetensors"}
    write(tmp_path / "run", CHECKPOINT, *results)
    config_file.write(tmp_path / "run", settings)
    with RunFolder(replace(settings, resume=True, **changed)) as folder:
        folder.begin()
    assert set(content(folder.path)) == {CHECKPOINT, "settings.toml"} | (results if kept else set())


@pytest.mark.parametrize("kind", [DynamicsConfig, RL2Config, MAMLConfig])
def test_config_resume_and_overwrite_exclude_each_other(kind):
    with pytest.raises(ValueError, match=rf"^{kind.__name__}: resume and overwrite exclude each other, got both$"):
        kind(resume=True, overwrite=True)


def test_config_default_folder_names_job_environment_and_seed():
    for kind, algo in ((DynamicsConfig, "dynamics"), (RL2Config, "rl2"), (MAMLConfig, "maml")):
        assert kind(env_name="ALE/Pong-v5", seed=3).folder == f"runs/{algo}-ALE-Pong-v5-seed3"


# ---------------------------------------------------------------------------------------------------------- paths


def refusal(out, monkeypatch, capsys, algo="dynamics"):
    """The line that a run prints whose folder cannot be written."""

    def work(*_, **__):
        raise AssertionError("work before the folder was checked")

    monkeypatch.setattr(dynamics, "collect", work)
    assert cli.main(["--algo", algo, "--out", str(out)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err.removeprefix("eaml-ext: out must be a folder that can be written, got ")


@pytest.mark.parametrize("algo", cli.SETTINGS)
def test_main_out_that_is_a_file_or_below_a_file_is_one_sentence(algo, tmp_path, monkeypatch, capsys):
    write(tmp_path, "file")
    file = tmp_path / "file"
    assert refusal(file, monkeypatch, capsys, algo) == f"{str(file)!r}, and {str(file)!r} is a file\n"
    for path in (file / "run", file / "a" / "b"):
        assert refusal(path, monkeypatch, capsys, algo) == f"{str(path)!r}, and {str(file)!r} is a file\n"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="/proc is Linux's")
def test_main_out_in_proc_is_one_sentence(monkeypatch, capsys):
    assert refusal("/proc/run", monkeypatch, capsys) == "'/proc/run' (No such file or directory)\n"


def test_main_out_that_is_read_only_is_one_sentence(tmp_path, monkeypatch, capsys):
    def fails(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    for function in ("mkdir", "open"):  # of the folder, of the lock in a folder that exists
        with monkeypatch.context() as patch:
            patch.setattr(run_folder.Path if function == "mkdir" else run_folder.os, function, fails)
            text = refusal(tmp_path / "run", patch, capsys)
        assert text == f"{str(tmp_path / 'run')!r} (Read-only file system)\n"


def test_main_out_with_null_character_or_too_long_is_one_sentence(tmp_path, monkeypatch, capsys):
    path = tmp_path / "my.toml"
    path.write_text('out = "a\\u0000b"\n')
    assert cli.main(["--config", str(path)]) == 2
    assert "got 'a\\x00b' (embedded null byte)" in capsys.readouterr().err
    assert "(File name too long)" in refusal(tmp_path / ("x" * 300), monkeypatch, capsys)


# --------------------------------------------------------------------------------------------------------- Ctrl-C


SMALL = {
    "num_epochs": 2,
    "updates_per_epoch": 1,
    "tasks_per_update": 4,
    "hidden_dim": 8,
    "state_size": 4,
    "test_tasks": 3,
    "adaptation_calls": 3,
    "plan_tasks": 2,
    "plan_steps": 30,
    "plan_candidates": 4,
}
FLAGS = [f"--{name}={value}" for name, value in SMALL.items()]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("function", "text", "files"),
    [
        ("collect", "interrupted before training; the same command starts again", set()),
        (
            "save_run",
            "interrupted before the first checkpoint; the same command with --resume{} starts again",
            {"settings.toml"},
        ),
        (
            "adapt",
            "interrupted after training; the same command with --resume{} evaluates again",
            {"settings.toml", CHECKPOINT, "model.safetensors", "buffer.safetensors"},
        ),
        (
            "planned_returns",
            "interrupted after training; the same command with --resume{} evaluates again",
            {"settings.toml", CHECKPOINT, "model.safetensors", "buffer.safetensors"},
        ),
    ],
)
def test_main_ctrl_c_in_each_phase_keeps_files_and_names_the_way_on(
    function, text, files, overwrite, tmp_path, monkeypatch, capsys
):
    from eaml_ext.jobs import evaluation
    from eaml_ext.meta import trainer

    module = {"save_run": trainer, "planned_returns": evaluation}.get(function, dynamics)
    flags = [*FLAGS, "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(module, function, lambda *_, **__: signal.raise_signal(signal.SIGINT) or signal.raise_signal(2))
        assert cli.main([*flags, *(["--overwrite"] if overwrite else [])]) == 130
    text = text.format(" in place of --overwrite" if overwrite else "")
    assert capsys.readouterr().err == f"eaml-ext: {text}\n"
    assert set(os.listdir(tmp_path)) == files
    assert cli.main([*flags, "--resume"]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["returns"]


def test_main_prints_progress_of_the_planner(tmp_path, capsys):
    assert cli.main([*FLAGS, "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("Planning")] == [
        "Planning step 0 of 30",
        "Planning step 20 of 30",
    ]
    assert [line.split(",")[0] for line in lines if line.startswith("Adaptation step")] == [
        "Adaptation step 0",
        "Adaptation step 10",
    ]
