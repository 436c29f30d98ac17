"""Report sentences of comments, docstrings and pages that break the style: ``python prose_check.py FILE ...``."""

import io
import re
import sys
import tokenize
from pathlib import Path

MOST_WORDS = 30
OPENING = re.compile(r"(What(?! is| are| does| do)|Of|Which|Those (that|of)|One (that|of which))\b(?!.*\?)")
WORDS = "anew|likewise|mend(s|ed)?|tells?|told|nobody|somebody|refuge|so many|as many|thereof|be it"
EXAMPLE = re.compile(r"^\s*>>>.*?(?=\n\s*\n|\Z)|::\n\n.*?\n\n|^\s*\|[^\n]*$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"``.*?``|`.*?`|:\w+:`.*?`|\(https?:.*?\)|<https?:.*?>", re.DOTALL)


def prose(path: Path) -> str:
    """The comments and docstrings of a source file, or the text of a page without code, headings and tables."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return re.sub(r"(?ms)^```.*?^```|^\|.*?$|^#.*?$", "\n\n", text)
    if path.suffix != ".py":
        comments = re.findall(r"(?ms)((?:^[ \t]*//[^\n]*\n)+|//[^\n]*\n|/\*.*?\*/)", text)
        return "\n\n".join(re.sub(r"(?m)^\s*(///?<?|/?\*+/?)", "", comment) for comment in comments)
    parts, row = [], 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            follows = token.start[0] == row + 1 and not token.line[: token.start[1]].strip()
            parts.append(("" if follows else "\n\n") + token.string.lstrip("#: "))
            row = token.start[0]
        elif token.type == tokenize.STRING and token.line.lstrip().lstrip("rR").startswith('"""'):
            parts.append("\n\n" + re.sub(EXAMPLE, "\n\n", re.sub(r'^[rR]?"""|"""$', "", token.string)) + "\n\n")
    return "\n".join(parts)


def faults(text: str) -> list[str]:
    """The sentences that open wrongly, hold a private word, or are too long."""
    paragraphs = re.split(r"\n\s*\n|\n\s*[-*] |\n\s*[\w*, ]+:\s", CODE.sub("CODE", text))
    sentences = [" ".join(s.split()) for p in paragraphs for s in re.split(r"(?<=[.!?])\s+", p)]
    return [
        s
        for s in sentences
        if OPENING.match(s) or re.search(rf"\b({WORDS})\b", s, re.IGNORECASE) or len(s.split()) > MOST_WORDS
    ]


if __name__ == "__main__":
    found = [f"{name}: {sentence}" for name in sys.argv[1:] for sentence in faults(prose(Path(name)))]
    print(*found, f"{len(found)} sentences", sep="\n")
    sys.exit(bool(found))
