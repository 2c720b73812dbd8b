"""What all commands have in common: a parser that shows examples, and errors that are one line."""

from __future__ import annotations

import argparse
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import torch

from hooked_moe.checks import printable, quoted

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it: 128 and the number of the signal."""
CLOSED_PIPE = 141
"""The exit code where the reader of what is printed has gone."""
MOST_OF_AN_ERROR = 8_000
"""Characters; a list of what does not fit may be long."""
_MOST = 2**31 - 1


class Parser(argparse.ArgumentParser):
    """Options as argparse reads them, on any console."""

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        tolerate_any_console()
        given = sys.argv[1:] if args is None else list(args)
        for argument in given:
            name, _, value = argument.partition("=")
            if name.startswith("--") and value == "--":  # argparse drops the value and then fails for want of it
                self.error(f"argument {name}: '--' is no value")
        return super().parse_known_args(given, namespace)

    def error(self, message: str) -> NoReturn:
        super().error(printable(message, MOST_OF_AN_ERROR))


def parser_of(command: str, description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the docstring of the command's module, examples included, as it stands."""
    return Parser(prog=f"hooked-moe {command}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def whole_number(text: str) -> int:
    """An option's value, for `type=`; what numbers make sense is for the command to say."""
    number = int_or_none(text)
    if number is None:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a whole number of up to {_MOST:,}")
    return number


def int_or_none(text: str) -> int | None:
    """A whole number of up to 31 bits; None for other text, and for numbers that nothing here could count to."""
    digits = text.strip().lstrip("+-")
    if not digits.isdecimal() or len(digits) > len(str(_MOST)):
        return None
    try:
        number = int(text)
    except ValueError:
        return None
    return number if abs(number) <= _MOST else None


def tolerate_any_console() -> None:
    """A console that lacks a sign of what is printed shows "?" in its place."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def run_command(work: Callable[[argparse.Namespace], object], args: argparse.Namespace, resumes: bool = True) -> int:
    """The exit code of a command: what `work` returns, if that is a number, or else 0; 1 after an error that says what to do,
    and 130 after Ctrl-C. `resumes` says whether the same command would then continue from where it stopped."""
    tolerate_any_console()
    try:
        with _second_interrupt_kills():
            result = work(args)
            sys.stdout.flush()  # so that a reader who has gone is noticed here
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            return CLOSED_PIPE
        print(f"error: {printable(error, MOST_OF_AN_ERROR)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted" + ("; the same command resumes from here" if resumes else ""), file=sys.stderr)
        return INTERRUPTED
    return result if isinstance(result, int) else 0


@contextmanager
def _second_interrupt_kills() -> Iterator[None]:
    """After Ctrl-C a command waits for what its threads have begun, some seconds. Another Ctrl-C then ends the process at once,
    as a kill does, which no file minds; Python's own way would be a traceback of whatever waits.
    """
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt

    before = threading.enumerate()
    if ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        for thread in threading.enumerate():  # one that was just starting is not waited for by who started it
            if thread not in before and not thread.daemon:
                thread.join()
        raise
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _reader_has_gone() -> bool:
    """Whether nothing can be printed any more, as after `hooked-moe compare | head`. Such a command ends without a word."""
    console = select.poll()
    console.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in console.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
    return True
