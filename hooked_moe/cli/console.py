"""What all commands have in common: a parser that shows examples, and errors that are one line."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from hooked_moe.checks import printable

MOST_OF_AN_ERROR = 20_000
"""Characters; a list of what does not fit may be long."""


class Parser(argparse.ArgumentParser):
    """Answers what `argparse` itself stumbles over: it takes the value in `--option=--` for the end of the options."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else list(args)
        for argument in args:
            if argument.startswith("--") and argument.endswith("=--"):
                self.error(f"{printable(argument[:-3])}: there is no value after the =")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        super().error(printable(message, MOST_OF_AN_ERROR))


def parser_of(command: str, description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the docstring of the command's module, examples included, as it stands."""
    return Parser(prog=f"hooked-moe {command}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def run_command(work: Callable[[argparse.Namespace], object], args: argparse.Namespace, resumes: bool = True) -> int:
    """The exit code of a command: what `work` returns, if that is a number, or else 0; 1 after an error that says what to do,
    and 130 after Ctrl-C. `resumes` says whether the same command would then continue from where it stopped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a console that lacks a sign of the table shows "?"
    try:
        result = work(args)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {printable(error, MOST_OF_AN_ERROR)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted" + ("; the same command resumes from here" if resumes else ""), file=sys.stderr)
        return 130
    return result if isinstance(result, int) else 0
