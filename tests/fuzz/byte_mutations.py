"""Mutations of a file's bytes and of the file itself."""

from __future__ import annotations

import random
from pathlib import Path


def mutate_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Flipped, cut, doubled, overwritten or foreign bytes, and what was done."""
    kind = rng.choice(("flip", "flip", "cut", "cut start", "insert", "overwrite", "double", "empty", "swap", "foreign"))
    place = rng.randrange(len(data)) if data else 0
    noise = rng.randbytes(rng.choice((1, 4, 64)))
    changed = {
        "flip": lambda: data[:place] + bytes([(data[place : place + 1] or b"\0")[0] ^ 1 << rng.randrange(8)]) + data[place + 1 :],
        "cut": lambda: data[:place],
        "cut start": lambda: data[place:],
        "insert": lambda: data[:place] + noise + data[place:],
        "overwrite": lambda: data[:place] + noise + data[place + len(noise) :],
        "double": lambda: data + data,
        "empty": lambda: b"",
        "swap": lambda: data[place:] + data[:place],
        "foreign": lambda: rng.choice(
            (b"\x80\x04K\x01.", b"PK\x03\x04", b"version https://git-lfs", b"<html>", b"\xef\xbb\xbf" + data)
        ),
    }[kind]()
    return changed, f"{kind} at byte {place}"


def mutate_file(file: Path, rng: random.Random) -> str:
    """The file becomes something else: nothing, a directory, a link that leads nowhere or in a circle, or one without rights."""
    kind = rng.choice(("remove", "directory", "dangling link", "link to itself", "link to a directory", "unreadable"))
    file.unlink()
    if kind == "directory":
        file.mkdir()
    elif kind == "dangling link":
        file.symlink_to("nowhere")
    elif kind == "link to itself":
        file.symlink_to(file.name)
    elif kind == "link to a directory":
        file.symlink_to(".")
    elif kind == "unreadable":
        file.touch(0o000)
    return f"{kind}: {file.name}"
