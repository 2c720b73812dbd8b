"""Shards by way of an object store, such as "s3://bucket/prefix", for machines that share no file system.

Whoever measures a document puts its files there, the record last; whoever merges fetches what it lacks. An object appears when it
is whole, so what a killed writer leaves there is a document without a record, which counts as not measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.fs

from hooked_moe.tables import atomic_path


@dataclass(frozen=True)
class ShardTransfer:
    """A place in an object store for the shards of one part of a measurement."""

    uri: str
    """As pyarrow.fs.FileSystem.from_uri takes it: "s3://bucket/prefix", "gs://...", "file:///...". Credentials are the
    environment's."""

    def __post_init__(self) -> None:
        """Raises `ValueError` for what names no file system."""
        self._place()

    @classmethod
    def below(cls, uri: str, *names: str) -> ShardTransfer:
        """The place of these names below another; what follows a "?" in a URI is of the store."""
        place, mark, options = uri.partition("?")
        return cls("/".join([place.rstrip("/"), *names]) + mark + options)

    def put(self, directory: Path, names: Iterable[str]) -> None:
        """Copy files of a directory there, in this order. Raises `OSError` that names the place."""
        store, prefix = self._place()
        try:
            if isinstance(store, pyarrow.fs.LocalFileSystem):  # object stores have no directories
                store.create_dir(prefix)
            for name in names:
                with store.open_output_stream(f"{prefix}/{name}") as stream:
                    stream.write((directory / name).read_bytes())
        except OSError as error:
            raise OSError(f"cannot write shards to {self.uri}: {error}") from error

    def fetch(self, directory: Path) -> None:
        """Copy what is there and not in a directory, records after all else. Raises `OSError` that names the place."""
        store, prefix = self._place()
        try:
            there = store.get_file_info(pyarrow.fs.FileSelector(prefix, allow_not_found=True))
            names = sorted((info.base_name for info in there if info.is_file), key=lambda name: (name.endswith(".json"), name))
            missing = [name for name in names if not (directory / name).is_file()]
            if missing:
                directory.mkdir(parents=True, exist_ok=True)
            for name in missing:
                with store.open_input_stream(f"{prefix}/{name}") as stream, atomic_path(directory / name) as temporary:
                    temporary.write_bytes(stream.read())
        except OSError as error:
            raise OSError(f"cannot read shards from {self.uri}: {error}") from error

    def clear(self) -> None:
        """Delete what is there."""
        store, prefix = self._place()
        for info in store.get_file_info(pyarrow.fs.FileSelector(prefix, allow_not_found=True)):
            store.delete_file(info.path)

    def _place(self) -> tuple[pyarrow.fs.FileSystem, str]:
        try:
            return pyarrow.fs.FileSystem.from_uri(self.uri)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ValueError(
                f"{self.uri!r} names no file system that pyarrow knows ({error}): give s3://bucket/prefix"
            ) from error
