"""Documentation is code: README blocks run, and so do the examples in docstrings."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import eaml_ext

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(eaml_ext.__path__, "eaml_ext.")
    if m.name not in ("eaml_ext._C", "eaml_ext.__main__")
)


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


def test_readme_has_an_example_per_layer():
    assert len(blocks(ROOT / "README.md")) >= 6
