"""mkdocs hook: the pages that come from elsewhere in the repository, and one API page for each room of the package.

README.md, CONTRIBUTING.md and CHANGELOG.md become pages with their links turned to the site, the pictures of
benchmarks/results come along, and every name in a room's ``__all__`` gets its entry.
"""

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "eaml_ext"
ROOMS = ("ops", "nn", "experience", "meta", "adaptation", "tasks", "rl")
TEXTS = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
# Pages of more than one room: the modules whose public names they list.
MODULES = {
    "integrations": ["integrations.transformers"],
    "package": ["checkpoint", "distributed", "info", "jobs.config", "jobs.rl_config", "jobs.config_file"],
}


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages and pictures to what mkdocs found."""
    for source, page in TEXTS.items():
        files.append(File.generated(config, page, content=turned((ROOT / source).read_text(encoding="utf-8"), page)))
    for name, content in api_pages().items():
        files.append(File.generated(config, f"api/{name}.md", content=content))
    for picture in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"figures/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links from docs/ into the rest of the repository become links of the site."""
    return turned(markdown, page.file.src_uri)


def turned(text: str, page: str) -> str:
    """The text with links that hold in the repository made to hold in the site."""
    up = "../" * page.count("/")
    for source, target in TEXTS.items():
        text = re.sub(rf"\]\((?:\.\./)*{re.escape(source)}(#[\w-]*)?\)", rf"]({up}{target}\1)", text)
    text = re.sub(r"\]\((?:\.\./)*benchmarks/results/([\w.-]+\.png)\)", rf"]({up}figures/\1)", text)
    if page in TEXTS.values():
        text = re.sub(r"\]\(docs/([\w./#-]+)\)", r"](\1)", text)
    # A folder or a source file: there is no page of it.
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)*(?:eaml_ext|benchmarks|csrc|tests)(?:/[\w./-]*)?\)", r"`\1`", text)


def api_pages() -> dict[str, str]:
    """Markdown of each API page by its name."""
    pages = {}
    for room in ROOMS:
        where = public_names(PACKAGE / room / "__init__.py")
        about = f"# eaml_ext.{room}\n\n{ast.get_docstring(ast.parse((PACKAGE / room / '__init__.py').read_text()))}\n\n"
        pages[room] = about + "\n".join(entry(path, name) for name, path in where.items())
    cores = public_names(PACKAGE / "nn" / "cores" / "__init__.py")
    pages["nn"] += "\n".join(["", *(entry(path, name) for name, path in cores.items())])
    for page, modules in MODULES.items():
        entries = [f"::: eaml_ext.{module}\n    options:\n      heading: eaml_ext.{module}\n" for module in modules]
        first = ["::: eaml_ext\n    options:\n      members: [build_info]\n"] if page == "package" else []
        title = {"package": "Files, settings and the package"}.get(page, f"eaml_ext.{page}")
        pages[page] = f"# {title}\n\n" + "\n".join([*first, *entries])
    return pages


def entry(path: str, name: str) -> str:
    return f"::: {path}\n    options:\n      heading: {name}\n      toc_label: {name}\n"


def public_names(init: Path) -> dict[str, str]:
    """Each name of ``__all__`` and the full path of what it stands for, read from the imports."""
    tree = ast.parse(init.read_text(encoding="utf-8"))
    here = ".".join(init.parent.relative_to(ROOT).parts)
    paths = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            paths |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    )
    return {name: paths.get(name, f"{here}.{name}") for name in names}
