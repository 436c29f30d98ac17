"""The command line: ``eaml-ext`` and ``python -m eaml_ext``. Nothing heavy is imported before the flags are parsed."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields

from eaml_ext import __version__
from eaml_ext.jobs.settings import DynamicsSettings


def parser() -> argparse.ArgumentParser:
    """The flags, one per setting."""
    p = argparse.ArgumentParser(
        prog="eaml-ext",
        description="Meta-train an SSM on the dynamics of many tasks, then adapt it to unseen ones with experience.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--version", action="version", version=f"eaml_ext {__version__}")
    for f in fields(DynamicsSettings):
        options = dict(f.metadata)
        if isinstance(f.default, bool):
            p.add_argument(f"--{f.name}", action="store_true", **options)
        else:
            p.add_argument(f"--{f.name}", type=type(f.default), default=f.default, **options)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; returns the exit code: 0, 2 for bad settings, 130 for Ctrl-C."""
    p = parser()
    arguments = p.parse_args(argv)
    try:
        settings = DynamicsSettings(**vars(arguments))
    except (TypeError, ValueError) as error:
        p.error(str(error).removeprefix("DynamicsSettings: "))
    from eaml_ext.jobs import dynamics

    try:
        dynamics.run(settings)
    except (ValueError, OSError) as error:
        print(f"eaml-ext: {str(error).removeprefix('DynamicsSettings: ')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("eaml-ext: interrupted; the same command with --resume goes on from the checkpoint", file=sys.stderr)
        return 130
    return 0
