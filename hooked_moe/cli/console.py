"""What every experiment's command line has in common: a parser with examples, and errors that are one line."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable

import torch


def parser_of(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the module's docstring, examples included, as it stands."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def run_command(work: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> int:
    """The exit status of `work`: 1 after an error that says what to do, 130 after Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a console that lacks a sign of the table shows "?"
    try:
        work(args)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0
