"""griffe extension: docstrings, written for ``help()``, as Markdown."""

import re
from typing import Any

import griffe


def as_markdown(text: str) -> str:
    """Roles become code, an interactive example a fenced block.

    >>> as_markdown("See :class:`~eaml_ext.nn.SSM`.")
    'See `SSM`.'
    """
    text = re.sub(r":\w+:`~(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    text = re.sub(r":\w+:`([^`]+)`", r"`\1`", text)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    return re.sub(r"^( *)(>>> .*(?:\n(?! *\n).+)*)", fenced, text, flags=re.MULTILINE)


def fenced(found: re.Match[str]) -> str:
    """At the margin: further in, the fence itself would be code."""
    indent, body = found.groups()
    return "```pycon\n" + body.replace("\n" + indent, "\n") + "\n```"


class Docstrings(griffe.Extension):
    """Turns every docstring as it is collected."""

    def on_instance(self, *, node: Any, obj: Any, agent: Any, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
