"""Runs of an experiment: one line of JSON each, appended as it ends; a restart continues from the file."""

import argparse
import gzip
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks.common import RESULTS, cpu_name
from eaml_ext._statistics import confidence_interval

Line = dict[str, Any]
Table = tuple[str, Sequence[str], list[Sequence[str]]]  # title, head and rows; an experiment's ``tables`` returns them


def parser(text: str | None, data: bool = True) -> argparse.ArgumentParser:
    """Return the parser of an experiment with the flags that all of them share.

    Args:
        text: the description.
        data: whether the experiment reads files of others from ``--data``.
    """
    flags = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    if data:
        flags.add_argument("--data", type=Path, required=True, help="folder of the data files, see docs/data.md")
    flags.add_argument("--seeds", type=int, default=5)
    flags.add_argument("--variants", nargs="+", help="these alone; default: all")
    flags.add_argument("--report", action="store_true", help="tables of the result file, without new runs")
    flags.add_argument("--quick", action="store_true", help="one seed, a small budget; writes no file")
    return flags


def open_data(directory: Path, name: str) -> IO[str]:
    """Open the data file ``name``, or ``name.gz``, of a folder as text; FileNotFoundError names both."""
    plain, packed = directory / name, directory / f"{name}.gz"
    if plain.exists():
        return plain.open()
    if packed.exists():
        return gzip.open(packed, "rt")
    raise FileNotFoundError(f"--data must hold {name} or {name}.gz, {directory} has neither: see docs/data.md")


class Runs:
    """The runs in ``benchmarks/results/NAME.jsonl``.

    Args:
        name: of the file.
        quick: start without runs and write no file.
    """

    def __init__(self, name: str, quick: bool = False):
        self.path = None if quick else RESULTS / f"{name}.jsonl"
        self.lines: list[Line] = []
        if self.path is not None and self.path.exists():
            complete = self.path.read_text().rpartition("\n")[0]  # a killed run may leave half a line
            self.lines = [json.loads(line) for line in complete.splitlines()]
            if self.path.read_text() not in ("", complete + "\n"):
                self.path.write_text(complete + "\n" if complete else "")

    def find(self, **settings: Any) -> list[Line]:
        """Return the lines whose settings have these entries."""
        return [one for one in self.lines if all(one["settings"].get(k) == v for k, v in settings.items())]

    def run(self, function: Callable[..., Line], **settings: Any) -> Line:
        """Return the line of these settings, from the file or by ``function(**settings)`` on one thread.

        The line has ``settings``, the entries of the result, the CPU seconds and the CPU.
        """
        settings = json.loads(json.dumps(settings))
        found = [one for one in self.lines if one["settings"] == settings]
        if found:
            return found[0]
        torch.set_num_threads(1)
        start = time.process_time()
        result = function(**settings)
        line = {"settings": settings, **result, "cpu_seconds": round(time.process_time() - start, 1), "cpu": cpu_name()}
        self.lines.append(line)
        print(json.dumps(line)[:400], flush=True)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        return line


def interval(values: Iterable[float], digits: int = 4) -> str:
    """Format mean and half the width of the 95 % interval of Student's t; one value alone."""
    found = confidence_interval([*values])
    if found["n"] == 1:
        return f"{found['mean']:.{digits}f}"
    return f"{found['mean']:.{digits}f} ± {found['half']:.{digits}f}"


def paired(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Return ``mean`` and ``half`` the width of the 95 % interval of ``first - second``, paired by seed."""
    return confidence_interval([a - b for a, b in zip(first, second, strict=True)])


def show(tables: Iterable[Table]) -> str:
    """Return tables in Markdown."""
    parts = []
    for title, head, rows in tables:
        lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
        parts.append("\n".join([*([f"**{title}**\n"] if title else []), *lines]) + "\n")
    return "\n".join(parts)
