"""The command line: ``eaml-ext`` and ``python -m eaml_ext``. Nothing heavy is imported before the flags are parsed."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module

from eaml_ext import __version__
from eaml_ext.jobs.rl_settings import MAMLSettings, RL2Settings
from eaml_ext.jobs.settings import DynamicsSettings

SETTINGS = {"dynamics": DynamicsSettings, "rl2": RL2Settings, "maml": MAMLSettings}
ABOUT = {
    "dynamics": "Meta-train an SSM on the dynamics of many tasks, then adapt it to unseen ones with experience.",
    "rl2": "Meta-train a policy on an SSM that learns unseen tasks in context, over the episodes of a trial (RL^2).",
    "maml": "Meta-train a policy on an SSM that learns unseen tasks by steps of policy gradient (MAML).",
}


def parser(algo: str = "dynamics") -> argparse.ArgumentParser:
    """The flags of one algorithm: ``--algo`` and one per setting."""
    p = argparse.ArgumentParser(
        prog="eaml-ext",
        description=ABOUT[algo],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--version", action="version", version=f"eaml_ext {__version__}")
    p.add_argument("--algo", default="dynamics", choices=SETTINGS, help="what to run; each has settings of its own")
    for f in fields(SETTINGS[algo]):
        options = dict(f.metadata)
        if isinstance(f.default, bool):
            p.add_argument(f"--{f.name}", action="store_true", **options)
        else:
            p.add_argument(f"--{f.name}", type=type(f.default), default=f.default, **options)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; returns the exit code: 0, 2 for bad settings, 130 for Ctrl-C."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--algo", default="dynamics")
    algo = first.parse_known_args(argv)[0].algo
    p = parser(algo if algo in SETTINGS else "dynamics")
    arguments = vars(p.parse_args(argv))
    kind = SETTINGS[arguments.pop("algo")]
    prefix = f"{kind.__name__}: "
    try:
        settings = kind(**arguments)
    except (TypeError, ValueError) as error:
        p.error(str(error).removeprefix(prefix))
    job = import_module(f"eaml_ext.jobs.{'dynamics' if algo == 'dynamics' else 'rl'}")

    try:
        job.run(settings)
    except (ValueError, OSError) as error:
        print(f"eaml-ext: {str(error).removeprefix(prefix)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("eaml-ext: interrupted; the same command with --resume goes on from the checkpoint", file=sys.stderr)
        return 130
    return 0
