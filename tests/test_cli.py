"""The command line before a job starts: help, settings of flags and files, and errors."""

import os
import subprocess
import sys
from dataclasses import fields

import pytest

from eaml_ext import cli
from eaml_ext.jobs import config_file
from eaml_ext.jobs.config import DynamicsConfig, flag_name

HELP = [["--help"], ["info", "--help"], *(["--algo", algo, "--help"] for algo in cli.SETTINGS)]


def settings(*argv):
    algo, _, arguments = cli.parse(argv)
    return cli.SETTINGS[algo](**arguments)


@pytest.mark.parametrize("argv", HELP, ids=" ".join)
def test_main_help_loads_no_torch(argv):
    code = f"""
import sys
from eaml_ext import cli
try:
    cli.main({argv!r})
except SystemExit as end:
    print("heavy:", [name for name in ("torch", "numpy", "gymnasium") if name in sys.modules], end.code)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "heavy: [] 0"


def test_main_help_takes_less_than_three_tenths_of_a_second():
    def seconds() -> float:
        """CPU seconds, which do not depend on other processes of the machine."""
        before = os.times()
        subprocess.run([sys.executable, "-m", "eaml_ext", "--help"], capture_output=True, check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(3)) < 0.3


@pytest.mark.parametrize("algo", cli.SETTINGS)
def test_parser_help_lists_every_setting_with_its_default(algo):
    text = " ".join(cli.parser(algo).format_help().split())
    for f in fields(cli.SETTINGS[algo]):
        assert f"--{flag_name(f)} " in text and f.metadata["help"] in text, f.name
        assert f"(default: {f.default})" in text, f.name
    assert "--algo" in text and "--config" in text and "eaml-ext info" in text


def test_parse_flags_win_over_file_and_file_over_defaults(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text('num_epochs = 7\ninner_lr = 1\nresume = true\nout = "a \\"b\\""\n')
    got = settings("--config", str(path), "--num_epochs=9", "--no-resume")
    assert got == DynamicsConfig(num_epochs=9, inner_lr=1, out='a "b"')
    assert settings("--config", str(path)).resume is True


def test_parse_algo_of_file_is_used_unless_flag_is_given(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text('algo = "maml"\nnum_epochs = 3\n')
    assert settings("--config", str(path)) == cli.SETTINGS["maml"](num_epochs=3)
    assert settings("--algo", "rl2", "--config", str(path)) == cli.SETTINGS["rl2"](num_epochs=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "num_epoch = 3",
            "has the key 'num_epoch', which is no setting of --algo dynamics; the closest is 'num_epochs'",
        ),
        ("zzz = 3", "has the key 'zzz', which is no setting of --algo dynamics\n"),
        ("[dynamics]\nnum_epochs = 3", "has the key 'dynamics', which is no setting"),
        ('algo = "rl2"\ninner_lr = 1', "no setting of --algo rl2; it is a setting of --algo dynamics and maml\n"),
        ('algo = "magic"', "algo must be one of dynamics, rl2, maml"),
        ("algo = [1]", "algo must be one of dynamics, rl2, maml"),
        ("num_epochs = ", "is not a TOML file"),
        ("num_epochs = 3\nnum_epochs = 3", "is not a TOML file"),
        ('num_epochs = "3"', "my.toml: num_epochs must be an integer, got '3'\n"),
        ("num_epochs = 3.0", "my.toml: num_epochs must be an integer, got 3.0\n"),
        ("num_epochs = true", "my.toml: num_epochs must be an integer, got True\n"),
        ("num_epochs = [1]", "my.toml: num_epochs must be an integer, got [1]\n"),
        ("seed = 2026-01-01", "my.toml: seed must be an integer, got datetime.date(2026, 1, 1)\n"),
        ('inner_lr = "0.1"', "my.toml: inner_lr must be a number, got '0.1'\n"),
        ("inner_lr = false", "my.toml: inner_lr must be a number, got False\n"),
        ("env_name = 3", "my.toml: env_name must be a string, got 3\n"),
        ("out = false", "my.toml: out must be a string, got False\n"),
        ("retrieval = {}", "my.toml: retrieval must be a string, got {}\n"),
        ("resume = 1", "my.toml: resume must be true or false, got 1\n"),
        ('overwrite = "no"', "my.toml: overwrite must be true or false, got 'no'\n"),
        ('algo = "rl2"\nsteps = "20"', "my.toml: steps must be an integer, got '20'\n"),
        ('algo = "rl2"\nreward_scale = "0.5"', "my.toml: reward_scale must be 'auto' or a number, got '0.5'\n"),
        ('algo = "rl2"\nreward_scale = true', "my.toml: reward_scale must be 'auto' or a number, got True\n"),
        ('algo = "maml"\ngamma = "1"', "my.toml: gamma must be a number, got '1'\n"),
    ],
)
def test_main_config_with_bad_keys_or_types_is_refused_in_one_sentence(text, message, tmp_path, capsys):
    path = tmp_path / "my.toml"
    path.write_text(text)
    assert cli.main(["--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("eaml-ext: config: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_epochs = 0", "num_epochs must be > 0, got 0"),
        ("inner_lr = inf", "inner_lr must be finite, got inf"),
        ('retrieval = "magic"', "retrieval must be one of"),
        ("resume = true\noverwrite = true", "resume and overwrite exclude each other, got both"),
    ],
)
def test_main_config_with_bad_values_exits_like_bad_flags(text, message, tmp_path, capsys):
    path = tmp_path / "my.toml"
    path.write_text(text)
    with pytest.raises(SystemExit) as info:
        cli.main(["--config", str(path)])
    assert info.value.code == 2 and message in capsys.readouterr().err


def test_main_config_missing_binary_or_folder_is_refused(tmp_path, capsys):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, message in (("none", "there is no file"), ("binary", "is not a TOML file"), (".", "is a folder")):
        assert cli.main(["--config", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_epoch", "3"], "unrecognized arguments: --num_epoch 3; the closest is '--num_epochs'"),
        (["--sead=3"], "unrecognized arguments: --sead=3; the closest is '--seed'"),
        (["--algo", "maml", "--shots", "3"], "arguments: --shots 3; it is a setting of --algo dynamics"),
        (["infos"], "unrecognized arguments: infos; the command is info"),
        (["--config"], "expected one argument"),
    ],
)
def test_main_unknown_flag_error_names_the_closest(argv, message, capsys):
    with pytest.raises(SystemExit) as info:
        cli.main(argv)
    assert info.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("kind", cli.SETTINGS.values(), ids=cli.SETTINGS)
def test_config_file_write_then_read_gives_equal_settings(kind, tmp_path):
    odd = 'a\\b"c\n\té\x7f\x01'
    given = kind(env_name=odd, import_="a,b.c", seed=12345678901234567890, out=str(tmp_path), num_epochs=3)
    path = config_file.write(tmp_path, given)
    assert path == tmp_path / "settings.toml" and [p.name for p in tmp_path.iterdir()] == ["settings.toml"]
    assert settings("--config", str(path)) == given


def test_config_file_numbers_keep_their_bits(tmp_path):
    for value in (1e-07, 1e22, 0.1 + 0.2, 3.0, 5e-324):
        path = config_file.write(tmp_path, DynamicsConfig(inner_lr=value))
        assert settings("--config", str(path)).inner_lr == value
        assert {"resume", "overwrite"}.isdisjoint(config_file.read(path))


def test_config_file_failed_write_leaves_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        config_file.write(tmp_path / "none", DynamicsConfig())
    (tmp_path / "settings.toml").mkdir()
    with pytest.raises(OSError):
        config_file.write(tmp_path, DynamicsConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["settings.toml"]


@pytest.mark.parametrize("algo", ["dynamics", "rl2", "maml"])
def test_main_seed_beyond_64_bits_is_one_sentence(algo, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--algo", algo, "--seed", "99999999999999999999999", "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and not (tmp_path / "run").exists()
    assert "seed must be in [0, 18446744073709551616), got 99999999999999999999999" in error.splitlines()[-1]
