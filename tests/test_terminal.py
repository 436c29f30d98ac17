"""Progress bars with and without tqdm, and tables whose columns stay apart."""

import re
import sys

import pytest

from eaml_ext._terminal import PlainProgress, progress_bar, table, write_line


@pytest.fixture(params=["tqdm", "plain"])
def bar_kind(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setitem(sys.modules, "tqdm", None)  # `import` then raises ImportError
    else:
        pytest.importorskip("tqdm", reason="the extra progress is not installed")
    return request.param


def test_progress_bar_with_and_without_tqdm_iterates_and_writes_lines(bar_kind, capsys):
    with progress_bar(iter("abc"), desc="letters", unit="letter", total=3) as bar:
        assert isinstance(bar, PlainProgress) == (bar_kind == "plain")
        for letter in bar:
            bar.set_postfix(letter=letter, refresh=False)
            write_line(letter)
    assert capsys.readouterr() == ("a\nb\nc\n", "")


def test_progress_bar_without_items_is_moved_by_update(bar_kind, capsys):
    with progress_bar(desc="updates", total=10, initial=3, hidden=True) as bar:
        for _ in range(7):
            bar.update()
    assert capsys.readouterr() == ("", "")


def test_progress_bar_unknown_option_is_refused(bar_kind):
    with pytest.raises(TypeError, match="colour"):
        progress_bar(range(3), desc="squares", colour="red")


@pytest.mark.parametrize("align", ["<", ">"])
def test_table_cells_longer_than_columns_stay_apart(align):
    rows = [["", "mean", "median"], ["plain", "0.5", "-"], ["a name of more than ten letters", "6" * 40, "7" * 12]]
    lines = table(rows, first=10, width=8, align=align)
    assert [re.split("  +", line) for line in lines[2:]] == [rows[2]]
    ends = [len(line) for line in lines]
    assert (ends[0] == ends[1] == ends[2]) == (align == ">")
    starts = {line.rstrip().rfind(row[2]) for line, row in zip(lines, rows, strict=True)}
    assert (len(starts) == 1) == (align == "<")


def test_table_short_cells_keep_the_least_widths():
    assert table([["variant", "mean"], ["plain", "0.5"]], first=16, width=10) == [
        "variant               mean",
        "plain                  0.5",
    ]
    assert table([], first=16, width=10) == []
