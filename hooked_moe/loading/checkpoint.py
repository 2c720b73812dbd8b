"""The tensors of a checkpoint directory: what there is, from the headers alone, and their values, one at a time.

Only safetensors files are ever opened. Nothing is unpickled, and no file outside the directory is named by an index.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hooked_moe.checks import printable, quoted
from hooked_moe.json_text import JsonError, parse_json
from hooked_moe.loading.quantised import STORED, QuantisedTensor, StoredTensor, widened
from hooked_moe.warn_user import warn_user
from weights_conversion.errors import CheckpointError, abbreviated

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
RECOMPUTED = re.compile(r"(.+\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")
"""Tensors that checkpoints from before transformers 4.33 hold, and every loader computes from the config instead."""
PIECE = 2**20
"""How many bytes are read at a time: few enough to be still in the processor's cache when they are converted and checked."""
DTYPES = {name: dtype for name, dtype in STORED.items() if dtype.itemsize > 1}
"""Types that a tensor may have by itself; narrower ones need scales."""


class Checkpoint:
    """The safetensors files of a directory as one mapping from tensor names."""

    def __init__(self, directory: Path) -> None:
        """Reads the headers. Raises `CheckpointError` for files that are missing, broken or not where the index has them."""
        self.directory = directory
        self.notes: list[str] = []
        """What is in the files and was left there, because the model is certainly right without it."""
        if present(directory / SINGLE_FILE):  # before the index, as in transformers
            stored = read_header(directory / SINGLE_FILE)
        elif present(directory / INDEX_FILE):
            stored = self._read_shards(read_index(directory / INDEX_FILE))
        else:
            raise CheckpointError(_no_weights(directory))
        recomputed = [name for name in stored if RECOMPUTED.fullmatch(name)]
        self._note("they follow from the config, and are computed from it", recomputed)
        self.tensors = widened({name: tensor for name, tensor in stored.items() if name not in recomputed})
        plain = {name: tensor for name, tensor in self.tensors.items() if isinstance(tensor, StoredTensor)}
        unsupported = [f"{name}: {tensor.dtype}" for name, tensor in plain.items() if tensor.dtype not in DTYPES]
        if unsupported:
            raise CheckpointError(
                f"{directory} has tensors of a dtype that is not supported ({', '.join(DTYPES)} are): {abbreviated(unsupported)}"
            )

    def _read_shards(self, weight_map: Mapping[str, str]) -> dict[str, StoredTensor]:
        index = self.directory / INDEX_FILE
        shards = sorted(set(weight_map.values()))
        absent = [shard for shard in shards if not present(self.directory / shard)]
        if absent:
            raise CheckpointError(
                f"{index} names shards that do not exist; download them again, into the same directory:{abbreviated(absent)}"
            )
        stored: dict[str, StoredTensor] = {}
        others: list[tuple[str, str]] = []
        for shard in shards:
            for name, tensor in read_header(self.directory / shard).items():
                if weight_map.get(name) == shard:
                    stored[name] = tensor
                elif not RECOMPUTED.fullmatch(name):
                    others.append((name, shard))
        wrong = [
            f"{name} is in {shard}; the index says {weight_map.get(name, 'nothing of it')}"
            for name, shard in others
            if name not in stored
        ]
        lost = weight_map.keys() - stored.keys() - {name for name, _ in others}
        wrong += [f"{name} is not in {weight_map[name]}, where the index has it" for name in sorted(lost)]
        if wrong:
            raise CheckpointError(
                f"{index} and its shards disagree; download both again, or write in its weight_map which shard has what:"
                f"{abbreviated(wrong)}"
            )
        superseded = [f"{name} in {shard}: the index takes it from {weight_map[name]}" for name, shard in others]
        self._note("the index takes them from elsewhere", superseded)
        return stored

    def _note(self, why: str, items: list[str]) -> None:
        if items:
            left = f"{len(items)} of its tensors were not read, for {why}"
            self.notes.append(f"{self.directory}: {left}:{abbreviated(items)}")

    def read_into(self, places: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Fill the places with the tensors of these names, converted to the dtype and moved to the device of each.

        Yields every piece of about `PIECE` bytes as it was stored, or widened, right after it was read; the next one may
        overwrite it. Pieces are read into place, not mapped: the pages of a mapped file count against the process until it is
        closed, which would be the whole checkpoint on top of the model.
        """
        buffer = torch.empty(PIECE, dtype=torch.uint8, device="cpu")
        by_file: dict[Path, list[str]] = {}
        for name in sorted(places, key=lambda name: self.tensors[name].start):  # so that the disk reads forward
            by_file.setdefault(self.tensors[name].file, []).append(name)
        for file, names in by_file.items():
            with file.open("rb", buffering=0) as stream:
                for name in names:
                    tensor = self.tensors[name]
                    if isinstance(tensor, QuantisedTensor):
                        yield from ((name, piece) for piece in _widened_into(places[name], tensor, stream))
                        continue
                    stream.seek(tensor.start)
                    stored = DTYPES[tensor.dtype]
                    for place in _pieces(places[name], PIECE // stored.itemsize):
                        direct = place.dtype == stored and place.device.type == "cpu" and place.is_contiguous()
                        piece = place if direct else buffer[: place.numel() * stored.itemsize].view(stored).view(place.shape)
                        _read_fully(stream, piece, file)
                        if not direct:
                            place.copy_(piece)
                        yield name, piece

    def warn_of_what_was_left(self) -> None:
        for note in self.notes:
            warn_user(note)

    def warn_of_non_finite(self, names: Sequence[str]) -> None:
        """Warn that these tensors have NaN or infinite values, if there are any."""
        if names:
            warn_user(
                f"{self.directory} has NaN or infinite weights, and what they touch will be NaN. Tensors:{abbreviated(names)}"
            )


def all_finite(values: Tensor) -> bool:
    """Whether there is no NaN and no infinity: a sum shows either, at half the cost of looking at every value."""
    return bool(values.sum().isfinite()) or all(bool(end.isfinite()) for end in values.aminmax())  # finite sums may overflow


def _pieces(place: Tensor, most: int) -> Iterator[Tensor]:
    """Parts of a view in the order of its elements, of at most so many elements, or of a row where rows are longer."""
    if place.is_contiguous():
        yield from place.view(-1).split(most)
    elif place.dim() > 1 and place[0].numel() > most:
        for part in place:
            yield from _pieces(part, most)
    else:
        yield from place.split(max(1, most // place[:1].numel()))


def _widened_into(place: Tensor, tensor: QuantisedTensor, stream: RawIOBase) -> Iterator[Tensor]:
    """Fill a place with a quantised tensor, some rows at a time."""
    columns, to_a_scale, first = tensor.shape[-1], tensor.rows_to_a_scale, 0
    all_rows = torch.Size(tensor.shape[:-1]).numel()
    rows_at_once = max(1, PIECE // columns // to_a_scale) * to_a_scale
    with tensor.scales.file.open("rb", buffering=0) as scale_stream:
        for part in _pieces(place, rows_at_once * columns):
            assert first % to_a_scale == 0, "a part begins within a block"
            last = first + part.numel() // columns
            values = _read_rows(stream, tensor.values, all_rows, first, last)
            scales = _read_rows(
                scale_stream, tensor.scales, -(-all_rows // to_a_scale), first // to_a_scale, -(-last // to_a_scale)
            )
            wide = tensor.widen(values, scales)
            part.copy_(wide.view(part.shape))
            first = last
            yield wide


def _read_rows(stream: RawIOBase, tensor: StoredTensor, of: int, first: int, last: int) -> Tensor:
    """Rows `first` to `last` of a tensor taken for a matrix of `of` rows."""
    width, dtype = torch.Size(tensor.shape).numel() // of, STORED[tensor.dtype]
    rows = torch.empty(last - first, width, dtype=dtype, device="cpu")
    stream.seek(tensor.start + first * width * dtype.itemsize)
    _read_fully(stream, rows, tensor.file)
    return rows


def _read_fully(stream: RawIOBase, piece: Tensor, file: Path) -> None:
    left = piece.view(-1).view(torch.uint8).numpy().data
    while left:
        count = stream.readinto(left)
        if not count:
            raise CheckpointError(f"{file} became shorter while it was read; download it again")
        left = left[count:]


def present(file: Path) -> bool:
    """Whether a file is there. Raises `CheckpointError` for a link that leads nowhere: the file was there once."""
    if file.is_symlink() and not file.exists():
        raise CheckpointError(
            f"{file} is a link to {os.readlink(file)}, which is not there: in the cache of the hub, the blobs were cleaned away. "
            "Download the model again, or copy it with what its links lead to (cp -rL)"
        )
    return file.is_file()


def opened(file: Path) -> Any:
    """A safetensors file; `CheckpointError` names one that is truncated or something else."""
    try:
        return safe_open(file, framework="pt", backend="pread")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file ({printable(error)}){_likely_cause(file)}") from error


def read_header(file: Path) -> dict[str, StoredTensor]:
    with opened(file) as handle:  # which checks that the header and the file are sound
        names = list(handle.keys())
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = parse_json(stream.read(length))  # which may be read differently only where a name stands twice
        except JsonError as error:
            raise CheckpointError(f"the header of {file} cannot be read: {error}; download it again") from error
    entries = {name: header[name] for name in names}
    if not all(isinstance(entry, dict) for entry in entries.values()):  # the library reads lists, too
        raise CheckpointError(f"the header of {file} cannot be read: a tensor is described by no object; download it again")
    return {
        name: StoredTensor(file, tuple(entry["shape"]), entry["dtype"], 8 + length + entry["data_offsets"][0])
        for name, entry in entries.items()
    }


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; `CheckpointError` names a file that is none."""
    try:
        values = parse_json(file.read_bytes())
    except (OSError, JsonError) as error:
        raise CheckpointError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not {type(values).__name__}")
    return values


def read_index(file: Path) -> dict[str, str]:
    """Tensor names to shard names. A shard must be a safetensors file beside the index: no path is followed out of there."""
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{file} has no weight_map from tensor names to shard files; download it again")
    unsafe = sorted({shard for shard in weight_map.values() if not _is_plain_name(shard)})
    if unsafe:
        listed = abbreviated([quoted(shard) for shard in unsafe])
        raise CheckpointError(f"{file} names shards that are not plain .safetensors file names, and is not followed:{listed}")
    return weight_map


def _is_plain_name(shard: str) -> bool:
    return shard.endswith(".safetensors") and shard.isprintable() and len(shard) < 200 and not set(shard) & set("/\\:")


def _no_weights(directory: Path) -> str:
    pickles = sorted(file.name for file in directory.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        return (
            f"{directory} has its weights only as pickles ({', '.join(pickles[:3])}), which can run code and are never opened: "
            "convert them to safetensors (load them in transformers and call save_pretrained)"
        )
    others = sorted(file.name for file in directory.glob("*.safetensors"))
    instead = f"; it has {', '.join(others[:3])}, which neither names" if others else ""
    return f"{directory} has no weights: expected {SINGLE_FILE}, or {INDEX_FILE} with its shards{instead}"


def _likely_cause(file: Path) -> str:
    if not file.is_file():
        return ""
    with file.open("rb") as stream:
        start = stream.read(40)
    if start.startswith(b"version https://git-lfs"):
        return ": it is a git-lfs pointer, not the weights; run `git lfs pull`"
    return f": it has {file.stat().st_size:,} bytes and may be truncated; download it again"
