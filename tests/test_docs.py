"""Documentation is code: blocks of README and docs run, tutorials print what they say, examples in docstrings run."""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
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


@pytest.fixture(autouse=True)
def _registrations_end_with_their_example(monkeypatch):
    from eaml_ext.tasks import registry

    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))


def blocks(path: Path) -> list:
    code = re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.M | re.S)
    return [pytest.param(c, id=f"{path.name}-{i}") for i, c in enumerate(code)]


@pytest.mark.parametrize("code", [block for page in PAGES for block in blocks(page)])
def test_documentation_blocks_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {"__name__": "__readme__"})


@pytest.mark.parametrize("name", ["eaml_ext", *MODULES])
def test_docstring_examples_run(name):
    if name == "eaml_ext.integrations.transformers":
        pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


def alike(printed: str, promised: str) -> bool:
    """Equal text and whole numbers; other numbers to a tenth, as training ends elsewhere on another machine."""
    number = r"-?\d+\.\d+(?:e[-+]\d+)?"
    if re.split(number, printed) != re.split(number, promised):
        return False
    pairs = zip(re.findall(number, printed), re.findall(number, promised), strict=True)
    return all(float(a) == pytest.approx(float(b), rel=0.1) for a, b in pairs)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_tutorials_print_what_they_say(path, tmp_path, monkeypatch):
    """The blocks of a page are one program; a ``text`` block after one of ``python`` is what that one prints."""
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "__tutorial__"}
    found = re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", path.read_text(), flags=re.M | re.S)
    assert sum(bool(promised) for _, promised in found) >= 2
    for code, promised in found:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, path.name, "exec"), space)
        if promised:
            assert alike(out.getvalue(), promised), f"{path.name} printed\n{out.getvalue()}instead of\n{promised}"


def test_numbers_in_tutorials_are_compared():
    assert alike("error 0.51 of 12\n", "error 0.50 of 12\n") and alike("1.0e-07", "1.05e-07")
    assert not alike("error 0.6 of 12\n", "error 0.50 of 12\n") and not alike("0.5 of 13", "0.5 of 12")
    assert not alike("-0.5", "0.5") and not alike("a 0.5", "b 0.5") and not alike("1.0e-07", "1.0e-06")


def test_docs_have_an_example_per_layer():
    assert sum(len(blocks(page)) for page in PAGES) >= 15
