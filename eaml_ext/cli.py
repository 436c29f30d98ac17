"""The command line: ``eaml-ext`` and ``python -m eaml_ext``. Flags are parsed before torch is imported."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from importlib import import_module
from opcode import opmap
from typing import Any

from eaml_ext import __version__
from eaml_ext.jobs import config_file
from eaml_ext.jobs.config import DynamicsConfig, flag_name
from eaml_ext.jobs.rl_config import MAMLConfig, RL2Config
from eaml_ext.jobs.signals import sigterm_as_interrupt

SETTINGS: dict[str, Any] = {"dynamics": DynamicsConfig, "rl2": RL2Config, "maml": MAMLConfig}
ABOUT = {
    "dynamics": "Meta-train an SSM on the dynamics of many tasks, then adapt it to unseen ones with experience.",
    "rl2": "Meta-train a policy on an SSM that learns unseen tasks in context, over the episodes of a trial (RL^2).",
    "maml": "Meta-train a policy on an SSM that learns unseen tasks by steps of policy gradient (MAML).",
}
MORE = """Each --algo has settings of its own: eaml-ext --algo rl2 --help lists them.
eaml-ext info lists compiled kernels, installed packages, and the commands that install the missing ones."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints defaults beside the flags and keeps line breaks."""


def parser(algo: str = "dynamics") -> argparse.ArgumentParser:
    """Return the parser of one algorithm: ``--algo``, ``--config`` and one flag per setting."""
    p = argparse.ArgumentParser(
        prog="eaml-ext", description=ABOUT[algo], epilog=MORE, formatter_class=HelpFormatter, allow_abbrev=False
    )
    p.add_argument("--version", action="version", version=f"eaml_ext {__version__}")
    p.add_argument("--algo", default="dynamics", choices=SETTINGS, help="what to run; each has settings of its own")
    text = "TOML file of settings, such as the settings.toml that a run leaves; flags win over it"
    p.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=text)
    for f in fields(SETTINGS[algo]):
        options, name = {"dest": f.name, **f.metadata}, f"--{flag_name(f)}"
        if isinstance(f.default, bool):
            p.add_argument(name, action=argparse.BooleanOptionalAction, default=f.default, **options)
        else:
            p.add_argument(name, default=f.default, **{"type": type(f.default), **options})
    return p


def parse(argv: Sequence[str]) -> tuple[str, argparse.ArgumentParser, dict[str, Any]]:
    """Parse the flags. A setting without a flag is that of ``--config``, or else the default.

    Args:
        argv: the flags.

    Returns:
        The algorithm, its parser, and its settings.

    Raises:
        OSError, ValueError: the file of ``--config`` cannot be read or does not fit the algorithm.
        SystemExit: a flag does not exist or has no valid value.
    """
    first = argparse.ArgumentParser(prog="eaml-ext", add_help=False, allow_abbrev=False)
    first.add_argument("--algo")
    first.add_argument("--config")
    first.add_argument("--import", dest="import_", action="append")
    given = first.parse_known_args(argv)[0]
    helps = not {"-h", "--help", "--version"}.isdisjoint(argv)
    config = {} if given.config is None or helps else config_file.read(given.config)
    algo = config.pop("algo", "dynamics")
    if algo not in list(SETTINGS):  # a list, because TOML's arrays have no hash
        raise ValueError(f"config: algo must be one of {', '.join(SETTINGS)}, got {algo!r}")
    algo = given.algo or algo
    p = parser(algo if algo in SETTINGS else "dynamics")
    if algo in SETTINGS and config:
        config = config_file.check(given.config, config, algo, SETTINGS)
    p.set_defaults(algo=algo, **config)
    arguments, unknown = p.parse_known_args(argv)
    if unknown:
        flags = [option for action in p._actions for option in action.option_strings]
        name = unknown[0].split("=")[0]
        hint = config_file.owners(name.removeprefix("--"), SETTINGS) or config_file.closest(name, flags)
        p.error(f"unrecognized arguments: {' '.join(unknown)}{hint if name[:1] == '-' else '; the command is info'}")
    if given.import_:
        arguments.import_ = ",".join(given.import_)  # a repeated flag
    return algo, p, {name: value for name, value in vars(arguments).items() if name not in ("algo", "config")}


def info(argv: Sequence[str]) -> int:
    """Run ``eaml-ext info``; return the exit code."""
    text = "List compiled kernels, installed packages, and the commands that install the missing ones."
    argparse.ArgumentParser(prog="eaml-ext info", description=text).parse_args(argv)
    with contextlib.suppress(BrokenPipeError):  # `eaml-ext info | head`
        print(import_module("eaml_ext.info").report(), flush=True)
        return 0
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout when it ends
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job.

    Args:
        argv: the flags; those of the process if absent.

    Returns:
        The exit code: 0, 2 for bad settings or a lost rank of torchrun, 130 for Ctrl-C and SIGTERM.

    Raises:
        Exception: any that this package did not raise on purpose, such as one of an environment.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["info"]:
        return info(argv[1:])
    prefix = ""
    try:
        algo, p, arguments = parse(argv)
        kind = SETTINGS[algo]
        prefix = f"{kind.__name__}: "
        try:
            settings = kind(**arguments)
        except (TypeError, ValueError) as error:
            p.error(str(error).removeprefix(prefix))
        if settings.import_ or ":" in settings.env_name:
            sys.path.insert(0, os.getcwd())  # modules of the current directory, as for `python -m`
        with sigterm_as_interrupt():
            import_module(f"eaml_ext.jobs.{'dynamics' if algo == 'dynamics' else 'rl'}").run(settings)
    except (ValueError, OSError) as error:
        if not is_refusal(error):
            raise
        print(f"eaml-ext: {str(error).removeprefix(prefix)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"eaml-ext: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


# Packages that this package calls with its own functions inside: torch.no_grad, for example, and vector environments.
_LIBRARIES = sys.stdlib_module_names | {"torch", "gymnasium", "numpy", "safetensors", "tqdm", "matplotlib"}


def is_refusal(error: BaseException) -> bool:
    """Return whether this package raised the error on purpose, so that its text is enough.

    Errors of other code keep their traceback, because their author needs it. Refusals have no class of their own, so
    the traceback decides:

    - The innermost frame is this package's and stands at a ``raise`` statement, unlike that of a failed ``int("x")``.
      An OSError may also come from a call of the system.
    - All frames are of this package and the libraries below it. A user's function that calls this package with a bad
      argument is at fault itself, and the traceback contains its line.
    """
    frames = list(_frames(error))
    if not {package for package, _ in frames} <= _LIBRARIES | {"eaml_ext"}:
        return False
    if isinstance(error, OSError):  # pathlib and others of the standard library call the system, too
        frames = [frame for frame in frames if frame[0] not in sys.stdlib_module_names]
        return bool(frames) and frames[-1][0] == "eaml_ext"
    return bool(frames) and frames[-1] == ("eaml_ext", True)


def _frames(error: BaseException) -> Iterator[tuple[str, bool]]:
    """Yield the top-level package of each frame, outermost first, and whether it stands at a ``raise`` statement."""
    trace = error.__traceback__
    while trace is not None:
        name = str(trace.tb_frame.f_globals.get("__name__", ""))
        yield name.partition(".")[0], trace.tb_frame.f_code.co_code[trace.tb_lasti] == opmap["RAISE_VARARGS"]
        trace = trace.tb_next
