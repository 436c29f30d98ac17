"""Imports need only declared dependencies, and importing the package loads no torch."""

import ast
import itertools
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import eaml_ext

ROOT = Path(eaml_ext.__file__).parent


def third_party(path: Path) -> dict[bool, set[str]]:
    """Packages that a file imports: on import of the file (True), or inside a function or for type checkers (False)."""
    found: dict[bool, set[str]] = {True: set(), False: set()}

    def visit(node: ast.AST, at_import: bool) -> None:
        if isinstance(node, ast.Import):
            found[at_import] |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found[at_import].add(str(node.module).split(".")[0])
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        lazy |= isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            visit(child, at_import and not lazy)

    visit(ast.parse(path.read_text(encoding="utf-8")), True)
    ours = {*sys.stdlib_module_names, "eaml_ext", "__future__", "tomllib"}
    return {at_import: names - ours for at_import, names in found.items()}


def test_third_party_imports_are_dependencies_or_lazy_extras():
    pyproject = runpy.run_path(str(ROOT.parent / "tests" / "release_check.py"), run_name="release_check")["pyproject"]
    project = pyproject()["project"]
    by_extra = {
        extra: {re.split(r"\W", requirement)[0] for requirement in requirements}
        for extra, requirements in {"": project["dependencies"], **project["optional-dependencies"]}.items()
    }
    always = by_extra.pop("")
    extras = set(itertools.chain(*by_extra.values()))
    used: set[str] = set()
    for path in ROOT.rglob("*.py"):
        names = third_party(path)
        allowed = always | by_extra.get(path.stem, set()) if path.parent.name == "integrations" else always
        assert names[True] <= allowed, f"{path.name} imports {names[True] - allowed}"
        assert names[False] <= always | extras, f"{path.name} imports {names[False] - always - extras}"
        used |= names[True] | names[False]
    assert always <= used and {"matplotlib", "tqdm"} <= used


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_package_and_asking_for_help_load_no_torch():
    assert python("import sys, eaml_ext, eaml_ext.cli; print('torch' in sys.modules)").strip() == "False"
    out = subprocess.run([sys.executable, "-m", "eaml_ext", "--help"], capture_output=True, text=True, check=True)
    assert "--env_name" in out.stdout


def test_every_public_name_exists():
    for name in eaml_ext.__all__:
        assert getattr(eaml_ext, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        eaml_ext.nothing  # noqa: B018


def test_type_checkers_see_what_is_imported_on_first_use():
    """The two lists of names in ``eaml_ext/__init__.py``, one for Python and one for type checkers, agree."""
    nodes = [n for n in ast.walk(ast.parse((ROOT / "__init__.py").read_text())) if isinstance(n, ast.ImportFrom)]
    nodes = [n for n in nodes if str(n.module).startswith("eaml_ext.")]
    seen = {a.asname: n.module.split(".")[1] for n in nodes for a in n.names if a.asname}
    assert seen == eaml_ext._EXPORTS
    assert (ROOT / "py.typed").exists()
