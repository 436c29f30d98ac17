"""Settings of the main job: flags and values that are refused, NumPy scalars."""

import json

import numpy as np
import pytest

from eaml_ext import cli
from eaml_ext.jobs.config import DynamicsConfig


@pytest.mark.parametrize(
    "flags, text",
    [
        (["--num_epochs", "0"], "num_epochs must be > 0"),
        (["--inner_lr", "-1"], "inner_lr must be > 0"),
        (["--inner_lr", "inf"], "inner_lr must be finite"),
        (["--experience_weight", "-1"], "experience_weight must be >= 0"),
        (["--retrieval", "magic"], "invalid choice"),
        (["--buffer_size", "3"], "buffer_size must hold one task"),
        (["--checkpoint_every", "0"], "checkpoint_every must be > 0"),
        (["--plan_tasks", "-1"], "plan_tasks must be >= 0"),
        (["--plan_steps", "0"], "plan_steps must be > 0"),
        (["--plan_horizon", "0"], "plan_horizon must be > 0"),
        (["--plan_candidates", "1"], "plan_candidates must be >= 2"),
        (["--num_epochs", "many"], "invalid int value"),
    ],
)
def test_main_bad_flag_exits_with_its_name(flags, text, capsys):
    with pytest.raises(SystemExit) as info:
        cli.main(flags)
    assert info.value.code == 2 and text in capsys.readouterr().err


def test_dynamics_config_wrong_types_raise_type_error():
    with pytest.raises(TypeError, match="num_epochs must be an integer"):
        DynamicsConfig(num_epochs=1.5)
    with pytest.raises(TypeError, match="resume must be True or False"):
        DynamicsConfig(resume="yes")
    with pytest.raises(TypeError, match="env_name must be a string"):
        DynamicsConfig(env_name=3)
    with pytest.raises(ValueError, match=r"^DynamicsConfig: out must be Unicode text, got '\\udc80'$"):
        DynamicsConfig(out="\udc80")  # as Python decodes a byte 0x80 of the command line


def test_dynamics_config_numpy_scalars_become_pythons():
    given = DynamicsConfig(
        num_epochs=np.int64(3),
        seed=np.uint32(7),
        inner_lr=np.float32(0.5),
        outer_lr=np.int32(1),
        env_name=np.str_("Pendulum-v1"),
    )
    assert given == DynamicsConfig(num_epochs=3, seed=7, inner_lr=0.5, outer_lr=1, env_name="Pendulum-v1")
    assert {type(value) for value in vars(given).values()} == {int, float, str, bool}
    assert json.loads(json.dumps(vars(given))) == vars(given) and given.folder == "runs/dynamics-Pendulum-v1-seed7"
    with pytest.raises(TypeError, match=r"^DynamicsConfig: num_epochs must be an integer, got .*3.0\)?$"):
        DynamicsConfig(num_epochs=np.float64(3))
    with pytest.raises(ValueError, match=r"^DynamicsConfig: inner_lr must be finite, got inf$"):
        DynamicsConfig(inner_lr=np.float64("inf"))
