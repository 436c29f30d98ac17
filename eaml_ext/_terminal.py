"""Progress bars and aligned tables for terminal output. Needs neither torch nor tqdm."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any


def progress_bar(
    items: Iterable[Any] | None = None,
    *,
    desc: str,
    unit: str = "it",
    total: int | None = None,
    initial: int = 0,
    hidden: bool = False,
) -> Any:
    """Return a tqdm bar that is drawn on terminals only, or :class:`PlainProgress` where tqdm is not installed.

    Args:
        items: the iterable; None for a bar that ``update`` moves.
        desc, unit, total, initial: as of ``tqdm.tqdm``.
        hidden: never draw the bar.

    >>> with progress_bar(range(3), desc="squares") as bar:
    ...     for i in bar:
    ...         write_line(f"{i * i}")
    0
    1
    4
    """
    try:
        from tqdm import tqdm
    except ImportError:
        return PlainProgress(items)
    disable = True if hidden else None  # None: where the output is no terminal
    return tqdm(items, desc=desc, unit=unit, total=total, initial=initial, leave=False, disable=disable)


def write_line(text: str) -> None:
    """Print a line above the progress bars that are drawn, at once even if the output is a pipe.

    >>> write_line("Epoch 0")
    Epoch 0
    """
    try:
        from tqdm import tqdm
    except ImportError:
        print(text)
    else:
        tqdm.write(text)
    sys.stdout.flush()


class PlainProgress:
    """The part of tqdm's interface that :mod:`eaml_ext` uses, without a bar: moves are ignored."""

    def __init__(self, items: Iterable[Any] | None = None) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(() if self._items is None else self._items)

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, n: float = 1) -> None:
        pass

    def set_postfix(self, *, refresh: bool = True, **values: Any) -> None:
        pass


def table(rows: Sequence[Sequence[str]], first: int, width: int, align: str = ">", gap: int = 2) -> list[str]:
    """Return one line per row; a column is as wide as its longest cell and a gap, so columns never run together.

    Args:
        rows: cells, the same number in every row.
        first, width: least width of the first column, which is aligned to the left, and of the others.
        align: ``">"`` or ``"<"``, alignment of all columns but the first.
        gap: least number of spaces between two cells.

    >>> print(*table([["variant", "mean"], ["plain", "0.5"], ["uniform", "612345678.0"]], first=8, width=6), sep="\\n")
    variant           mean
    plain              0.5
    uniform    612345678.0
    """
    columns = list(zip(*rows, strict=True))
    least = [first, *[width] * (len(columns) - 1)]
    widths = [max(low, *(len(cell) + gap for cell in column)) for low, column in zip(least, columns, strict=False)]
    aligns = "<" + align * (len(widths) - 1)
    return ["".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, aligns, widths, strict=True)).rstrip() for row in rows]
