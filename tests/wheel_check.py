"""Test one wheel with several Pythons and releases of torch: python tests/wheel_check.py WHEEL PYTHON... [-- PYTEST].

Each PYTHON is an interpreter with pip, pytest, hypothesis and the requirements of eaml_ext. The wheel is installed into
a folder of its own, where pip refuses a tag that the interpreter does not accept. The tests of the ops run on it;
pytest's arguments after ``--`` replace ``tests/ops``. A line for each interpreter names its versions, the SHA-256 of
the library of kernels and the number of tests that passed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DESCRIBE = """
import hashlib, json, platform, torch, eaml_ext
from eaml_ext.ops import _library
print(json.dumps({
    "python": platform.python_version(),
    "torch": torch.__version__,
    "folder": str(_library.path.parents[1]),
    "fault": _library.load_error,
    "sha256": hashlib.sha256(_library.path.read_bytes()).hexdigest() if _library.load_error is None else None,
}))
"""


class Fault(Exception):
    """A step that failed, in one sentence."""


def run(command: list[str], folder: Path) -> str:
    """Run a command in a folder that holds the package; return its output.

    The repository comes second on the path: tests import its benchmarks.
    """
    env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise Fault("\n".join([f"{' '.join(command[:4])} failed:", *done.stdout.splitlines()[-40:]]))
    return done.stdout


def check(wheel: Path, python: str, options: list[str]) -> tuple[str, str]:
    """Install the wheel and run the tests; return the line of the report and the library's SHA-256."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(wheel)], folder)
        found = json.loads(run([python, "-W", "ignore", "-c", DESCRIBE], folder).splitlines()[-1])
        versions = f"Python {found['python']}, torch {found['torch']}"
        if found["fault"]:
            raise Fault(f"{versions}: {found['fault']}")
        if found["folder"] != str(folder):
            raise Fault(f"{versions}: eaml_ext is imported from {found['folder']}, not from the wheel")
        pytest = [python, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider"]
        tests = run([*pytest, *(options or [str(ROOT / "tests" / "ops")])], folder).splitlines()[-1]
        if not re.search(r"\b[1-9]\d* passed", tests):
            raise Fault(f"{versions}: no test ran: {tests}")
        return f"{versions}, library {found['sha256'][:16]}: {tests}", found["sha256"]


def main(arguments: list[str]) -> int:
    arguments, options = arguments, []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, options = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("pythons", nargs="+", metavar="PYTHON")
    given = parser.parse_args(arguments)
    libraries, faults = set(), 0
    for python in given.pythons:
        try:
            line, library = check(given.wheel.resolve(), str(Path(python).absolute()), options)
        except Fault as fault:
            faults += 1
            print(f"{python}: {fault}", flush=True)
        else:
            libraries.add(library)
            print(line, flush=True)
    return int(faults > 0 or len(libraries) > 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
