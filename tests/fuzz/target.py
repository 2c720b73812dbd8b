"""What is fuzzed: how an input of a kind is made from a random source, and what is done with it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Protocol


class Target(Protocol):
    """One kind of input."""

    name: str
    shown_by_console: bool
    """Whether errors repeat what the user gave, and only the console makes them safe to show."""

    seconds: float
    """Of processor time, after which an input hangs; of the clock, sixty times as many, for the machine may be shared."""

    def prepare(self) -> None:
        """Make the valid inputs that are mutated. Called once, in the parent of the workers."""

    def write(self, rng: random.Random, directory: Path) -> str:
        """Write one input into an empty directory; returns what was done to it."""

    def run(self, directory: Path) -> str:
        """Use the input as a user would. Returns "" where all is right, or else what is wrong; the caller judges errors."""
