"""What all commands have in common: a parser that shows examples, and errors that are one line."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable

import torch


def parser_of(command: str, description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the docstring of the command's module, examples included, as it stands."""
    return argparse.ArgumentParser(
        prog=f"hooked-moe {command}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def run_command(work: Callable[[argparse.Namespace], object], args: argparse.Namespace, resumes: bool = True) -> int:
    """The exit code of a command: what `work` returns, if that is a number, or else 0; 1 after an error that says what to do,
    and 130 after Ctrl-C. `resumes` says whether the same command would then continue from where it stopped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a console that lacks a sign of the table shows "?"
    try:
        result = work(args)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted" + ("; the same command resumes from here" if resumes else ""), file=sys.stderr)
        return 130
    return result if isinstance(result, int) else 0
