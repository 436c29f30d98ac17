"""mkdocs hook: adds pages from elsewhere in the repository, and one API page for each subpackage.

README.md, CONTRIBUTING.md, CHANGELOG.md and SECURITY.md become pages whose links point into the site. The pictures of
benchmarks/results become files of it. Every name in the ``__all__`` of a subpackage gets an entry.
"""

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "eaml_ext"
SUBPACKAGES = ("ops", "nn", "experience", "meta", "adaptation", "tasks", "rl")
TEXTS = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
# Pages of several modules: each lists the public names of these.
MODULES = {
    "integrations": ["integrations.transformers", "integrations.onnx"],
    "package": ["checkpoint", "distributed", "testing", "info", "jobs.config", "jobs.rl_config", "jobs.config_file"],
}
# Classes with methods of a base that has no entry of its own.
INHERITING = {"ExperienceBuffer"}


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages and the pictures to the files that mkdocs found."""
    for source, page in TEXTS.items():
        files.append(File.generated(config, page, content=turned((ROOT / source).read_text(encoding="utf-8"), page)))
    for name, content in api_pages().items():
        files.append(File.generated(config, f"api/{name}.md", content=content))
    for picture in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"figures/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Replace links from docs/ into the rest of the repository by links of the site."""
    return turned(markdown, page.file.src_uri)


def turned(text: str, page: str) -> str:
    """Return the text with its repository links replaced by links of the site."""
    up = "../" * page.count("/")
    for source, target in TEXTS.items():
        text = re.sub(rf"\]\((?:\.\./)*{re.escape(source)}(#[\w-]*)?\)", rf"]({up}{target}\1)", text)
    text = re.sub(r"\]\((?:\.\./)*benchmarks/results/([\w.-]+\.png)\)", rf"]({up}figures/\1)", text)
    if page in TEXTS.values():
        text = re.sub(r"\]\(docs/([\w./#-]+)\)", r"](\1)", text)
    text = re.sub(rf"\]\((?:\.\./)*eaml_ext/({'|'.join(SUBPACKAGES)})/?\)", rf"]({up}api/\1.md)", text)
    # Other folders and source files have no page.
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)*(?:eaml_ext|benchmarks|csrc|tests)(?:/[\w./-]*)?\)", r"`\1`", text)


def api_pages() -> dict[str, str]:
    """Return the Markdown of each API page by its name."""
    pages = {}
    for name in SUBPACKAGES:
        where = public_names(PACKAGE / name / "__init__.py")
        about = f"# eaml_ext.{name}\n\n{ast.get_docstring(ast.parse((PACKAGE / name / '__init__.py').read_text()))}\n\n"
        pages[name] = about + "\n".join(entry(path, public) for public, path in where.items())
    cores = public_names(PACKAGE / "nn" / "cores" / "__init__.py")
    pages["nn"] += "\n".join(["", *(entry(path, name) for name, path in cores.items())])
    for page, modules in MODULES.items():
        entries = [f"::: eaml_ext.{module}\n    options:\n      heading: eaml_ext.{module}\n" for module in modules]
        first = ["::: eaml_ext\n    options:\n      members: [build_info]\n"] if page == "package" else []
        title = {"package": "Files, settings and the package"}.get(page, f"eaml_ext.{page}")
        pages[page] = f"# {title}\n\n" + "\n".join([*first, *entries])
    return pages


def entry(path: str, name: str) -> str:
    options = f"      heading: {name}\n      toc_label: {name}\n"
    options += "      inherited_members: true\n" if name in INHERITING else ""
    return f"::: {path}\n    options:\n{options}"


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
