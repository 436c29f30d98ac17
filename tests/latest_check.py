"""Run pytest and list the packages whose versions differ from the lock: python tests/latest_check.py [ARGUMENT ...]

``make test-latest`` runs it in an environment with the newest releases that pyproject.toml allows. Each package is
listed with the failing tests that import it or have it in their traceback.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def locked(text: str, environment: Mapping[str, str] | None = None) -> Iterator[tuple[str, str]]:
    """Yield names and versions of a lock for an environment of markers; None: the running Python."""
    for line in text.splitlines():
        requirement = None if line.startswith("#") else Requirement(line)
        if requirement and (requirement.marker is None or requirement.marker.evaluate(dict(environment or {}))):
            (pin,) = requirement.specifier
            yield requirement.name, pin.version


def moved(lock: Mapping[str, str], installed: Mapping[str, str]) -> dict[str, str]:
    """Return ``locked → installed`` of every installed package whose version differs from the lock."""
    versions = {name: (lock.get(name, "new"), version) for name, version in sorted(installed.items())}
    return {name: f"{old} → {new}" for name, (old, new) in versions.items() if old != new}


def named_in(text: str, modules: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the packages that a source imports or a traceback contains; ``modules`` has import names by package."""
    found = re.findall(r"^\s*(?:import|from) (\w+)|importorskip\(.(\w+)|site-packages[/\\](\w+)", text, re.MULTILINE)
    words = {word for words in found for word in words}
    return [package for package, names in modules.items() if words.intersection(names)]


def suspects(
    failures: Mapping[str, str], modules: Mapping[str, Sequence[str]], root: Path = ROOT
) -> dict[str, list[str]]:
    """Return failing tests by package; ``failures`` has the traceback of each test id."""
    tests: dict[str, list[str]] = {}
    for test, traceback in failures.items():
        path = root / test.split("::")[0]
        source = path.read_text(encoding="utf-8") if path.is_file() else ""
        for package in named_in(f"{traceback}\n{source}", modules):
            tests.setdefault(package, []).append(test)
    return tests


class Failures:
    """A pytest plugin that collects the tracebacks of failing tests and of files that cannot be imported, by id."""

    def __init__(self) -> None:
        self.tracebacks: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed:
            self.tracebacks[report.nodeid] = report.longreprtext

    pytest_collectreport = pytest_runtest_logreport


def main(arguments: Sequence[str]) -> int:
    """Print the differences, run pytest, print the suspects, and return pytest's status."""
    installed = {str(canonicalize_name(d.name)): d.version for d in metadata.distributions()}
    lock = dict(locked((ROOT / "requirements" / "test.txt").read_text()))
    changes = moved(lock, {name: v for name, v in installed.items() if name not in ("pip", "torch", "eaml-ext")})
    print("locked → installed:", *(f"{name:<24}{change}" for name, change in changes.items()), sep="\n  ", flush=True)
    failures = Failures()
    status = pytest.main(["-n", "2", *arguments], plugins=[failures])
    modules: dict[str, list[str]] = {name: [] for name in changes}
    for module, packages in metadata.packages_distributions().items():
        for package in map(canonicalize_name, packages):
            modules.get(package, []).append(module)
    for package, tests in suspects(failures.tracebacks, modules).items():
        print(f"* {package} {changes[package]}:", *tests, sep="\n    ")
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
