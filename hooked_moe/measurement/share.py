"""A share of a measurement: what one of several processes that know nothing of each other measures, as in a Slurm array."""

from __future__ import annotations

from dataclasses import dataclass

from hooked_moe.checks import as_int_or_none, quoted


@dataclass(frozen=True)
class Share:
    """Share `number` of `of`, counted from 1: every `of`-th document.

    >>> [document for document in range(10) if document in Share(2, 4)]
    [1, 5, 9]
    """

    number: int
    of: int

    def __post_init__(self) -> None:
        number, of = (as_int_or_none(value) for value in (self.number, self.of))
        if number is None or of is None or not 1 <= number <= of:
            raise ValueError(f"share {self.number!r} of {self.of!r}: shares are counted from 1, as in 1/8 to 8/8")

    def __contains__(self, document: int) -> bool:
        return document % self.of == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @classmethod
    def parse(cls, text: str) -> Share:
        """The share that "I/N" names. Raises `ValueError` for anything else."""
        number, separator, of = text.partition("/")
        if not separator or not number.strip().isdecimal() or not of.strip().isdecimal():
            raise ValueError(f"{quoted(text)}: give the number of the share and how many there are, as in 3/8")
        return cls(int(number), int(of))
