"""Documentation is code: blocks of README and docs run, tutorials print their text blocks, docstring examples run."""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
from decimal import Decimal
from pathlib import Path

import pytest
import torch

import eaml_ext

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(eaml_ext.__path__, "eaml_ext.")
    if m.name not in ("eaml_ext._C", "eaml_ext.__main__")
)
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", flags=re.M | re.S)


@pytest.fixture(autouse=True)
def _restored_task_registry(monkeypatch):
    """Remove the tasks that an example registers."""
    from eaml_ext.tasks import registry

    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))


def blocks(path: Path) -> list:
    """Return the Python blocks of a page, each with the ``text`` block after it, its output, as test parameters."""
    return [pytest.param(*block, id=f"{path.name}-{i}") for i, block in enumerate(BLOCK.findall(path.read_text()))]


@pytest.mark.parametrize("code, expected", [block for page in PAGES for block in blocks(page)])
def test_documentation_blocks_run_and_print_their_text_blocks(code, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run_block(code, expected, "README.md", {"__name__": "__readme__"})


def run_block(code: str, expected: str, name: str, space: dict) -> None:
    """Run a block; compare its output with ``expected`` unless that is empty."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, name, "exec"), space)
    if expected:
        # After training, errors depend on instruction set and torch release by a few hundredths of their value.
        same = alike(out.getvalue(), expected, relative="0.1")
        assert same, f"{name} printed\n{out.getvalue()}instead of\n{expected}"


NUMBER = re.compile(r"-?\d+\.\d+(?:e[-+]\d+)?|-?\d+e[-+]\d+")


def alike(printed: str, expected: str, relative: str, units: int = 1) -> bool:
    """Return whether two texts agree: text and integers exactly, other numbers within a tolerance.

    The tolerance is ``relative`` of the expected number plus ``units`` of the last printed digit, because numbers that
    differ by x can differ by x and one unit after rounding.
    """
    if NUMBER.split(printed) != NUMBER.split(expected):
        return False
    pairs = [(Decimal(a), Decimal(b)) for a, b in zip(NUMBER.findall(printed), NUMBER.findall(expected), strict=True)]
    lasts = [Decimal(units).scaleb(min(x.as_tuple().exponent for x in pair)) for pair in pairs]
    return all(abs(a - b) <= Decimal(relative) * abs(b) + last for (a, b), last in zip(pairs, lasts, strict=True))


class Checker(doctest.OutputChecker):
    """Compare docstring examples up to the last digits of float32, which depend on instruction set and threads."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return super().check_output(want, got, optionflags) or alike(got, want, relative="1e-4", units=0)


@pytest.mark.parametrize("name", ["eaml_ext", *MODULES])
def test_docstring_examples_run(name):
    package = {"eaml_ext.integrations.transformers": "transformers", "eaml_ext.integrations.onnx": "onnxruntime"}.get(
        name
    )
    if package is not None:
        pytest.importorskip(package, reason=f"{package} is not installed")
    torch.manual_seed(0)
    runner = doctest.DocTestRunner(Checker())
    for example in doctest.DocTestFinder().find(importlib.import_module(name)):
        runner.run(example)
    assert runner.failures == 0


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_tutorials_print_their_text_blocks(path, tmp_path, monkeypatch):
    """The Python blocks of a page are one program; a ``text`` block after one of them is its output."""
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "__tutorial__"}
    found = BLOCK.findall(path.read_text())
    assert sum(bool(expected) for _, expected in found) >= 2
    for code, expected in found:
        run_block(code, expected, path.name, space)


@pytest.mark.parametrize(
    "printed, expected, relative, same",
    [
        ("error 0.51 of 12", "error 0.50 of 12", "0.1", True),
        ("0.006", "0.007", "0.1", True),  # may be 0.0064 and 0.0066
        ("0.0064", "0.0066", "0.01", False),
        ("0.005", "0.007", "0.1", False),
        ("49.3%, 1.18", "48.9%, 1.25", "0.1", True),
        ("0.00", "-0.00", "0.1", True),
        ("1.05e-07", "1.0e-07", "0.1", True),
        ("6e-08", "5e-08", "0.1", True),
        ("8e-08", "5e-08", "0.1", False),
        ("1.0e-06", "1.0e-07", "0.1", False),
        ("0.6 of 12", "0.50 of 12", "0.1", False),
        ("0.5 of 13", "0.5 of 12", "0.1", False),
        ("-0.5", "0.5", "0.1", False),
        ("a 0.5", "b 0.5", "0.1", False),
        ("0.5", "0.5 0.5", "0.1", False),
        ("nan", "0.5", "0.1", False),
    ],
)
def test_alike_numbers_within_tolerance_and_rounding_are_accepted(printed, expected, relative, same):
    assert alike(printed, expected, relative) is same


@pytest.mark.parametrize("printed, same", [("2.0", True), ("1.9999998", True), ("1.9", False), ("1.999", False)])
def test_checker_last_digits_of_float32_are_accepted(printed, same):
    assert Checker().check_output("(2.0, 3)\n", f"({printed}, 3)\n", 0) is same
    assert not Checker().check_output("(2.0, 3)\n", f"({printed}, 4)\n", 0)


def headings(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\]\(.*?\)", "]", title).lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "page", [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda p: str(p.relative_to(ROOT))
)
def test_links_lead_to_files_and_headings_of_the_repository(page):
    dead = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (heading and heading not in headings(target)):
            dead.append(link)
    assert not dead


def test_docs_have_fifteen_examples_or_more():
    assert sum(len(blocks(page)) for page in PAGES) >= 15


def test_guarantees_name_tests_that_exist():
    named = re.findall(r"`(tests/[\w/.]+\.py)::(test_\w+)`", (ROOT / "docs/guarantees.md").read_text())
    missing = [test for path, test in named if f"def {test}(" not in (ROOT / path).read_text()]
    assert len(named) >= 25 and not missing
