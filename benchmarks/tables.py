"""What every benchmark prints: a Markdown table, and a line that says what it means."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hooked_moe.cli.console import tolerate_any_console
from hooked_moe.tables import write_text_atomic


@dataclass(frozen=True)
class Table:
    title: str
    """With the settings that all rows share."""
    meaning: str
    """How to read it, in a line."""
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return f"### {self.title}\n\n{self.meaning}\n\n{body}\n"


def show(tables: Sequence[Table]) -> None:
    print_page("\n".join(map(str, tables)))


def print_page(text: str) -> None:
    """On any console: one that lacks a sign, such as the plus-minus of errors, shows "?" in its place."""
    tolerate_any_console()
    print(text)


def write_or_print(page: str, out: Path | None) -> None:
    """A page of results into its file, or onto the console where it has none."""
    if out is None:
        print_page(page)
    else:
        write_text_atomic(page, out)
        print(f"{out} is written")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have; the module's docstring is their help."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--small", action="store_true", help="seconds; shows that it works, measures nothing")
    result.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own choice, %(default)s")
    result.add_argument("--repeats", type=int, default=5, help="of every measurement, after a warm-up (default: %(default)s)")
    return result


def parse(options: argparse.ArgumentParser, argv: Sequence[str] | None, small: Mapping[str, Any]) -> argparse.Namespace:
    """`--small` gives options other defaults. Ends the process with a message where a number is out of range."""
    args = options.parse_args(argv)
    if args.small:
        options.set_defaults(**small)
        args = options.parse_args(argv)
    if args.threads < 1 or args.repeats < 1:
        options.error("--threads and --repeats must be 1 or more")
    return args


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many for the operations of torch, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def count(number: int, noun: str) -> str:
    """ "1 thread", "2 threads"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
