"""Files damaged as disks and copies damage them: a flipped bit, a lost end, nothing, other bytes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path


def flip_bit(path: Path, chance: random.Random) -> None:
    """Flip one bit, anywhere in the file."""
    content = bytearray(path.read_bytes())
    place = chance.randrange(8 * len(content))
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


def cut_short(path: Path, chance: random.Random) -> None:
    """Keep a random beginning of the file."""
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content))])


def overwrite(path: Path, chance: random.Random) -> None:
    """As many bytes of something else."""
    path.write_bytes(chance.randbytes(path.stat().st_size))


def delete(path: Path, _: random.Random) -> None:
    path.unlink()


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (flip_bit, cut_short, overwrite, delete)
