"""The tables a run leaves behind: what their columns mean, and how files are written.

A schema is documentation that travels with the data: every field carries its meaning and unit in its metadata, so
`pyarrow.parquet.read_schema(path).field("gap_norm").metadata` answers without this repository at hand.

Files appear under their final name complete or not at all. Each write goes to a temporary file in the same directory,
is flushed to the disk, and is renamed over the target (`os.replace` is atomic within one file system). Contents depend
on the data alone, so a rerun produces the same bytes.
"""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq


def _schema(*columns: tuple[str, pa.DataType, str, str]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, metadata={"meaning": meaning, "unit": unit}) for name, kind, unit, meaning in columns])


_DOCUMENT = ("document", pa.int32(), "index", "document of the corpus, counted from 0")
_POSITION = ("position", pa.int32(), "index", "token position inside the document, counted from 0")
_LAYER = ("layer", pa.int16(), "index", "transformer block, counted from 0")
_SLOT = ("slot", pa.int8(), "index", "rank of the expert among the active ones; 0 has the highest routing weight")
_EXPERT = ("expert", pa.int16(), "index", "routed expert that was removed")
_BASELINE = ("baseline_loss", pa.float32(), "nats", "-log p(next token) of the intact model; NaN at a document's end")

EFFECTS = _schema(
    _DOCUMENT,
    _POSITION,
    _LAYER,
    _SLOT,
    _EXPERT,
    ("routing_weight", pa.float32(), "1", "weight g of the expert as applied, after renormalisation and scaling"),
    (
        "output_norm",
        pa.float32(),
        "residual stream",
        "||E(x)||, Euclidean norm of the expert's output before weighting",
    ),
    ("gap_norm", pa.float32(), "residual stream", "g ||E(x)||, how far the removal moves the block's output"),
    ("rest_cosine", pa.float32(), "1", "cosine between the removed contribution and the rest of the routed sum"),
    ("rest_norm", pa.float32(), "residual stream", "Euclidean norm of the rest of the routed sum"),
    _BASELINE,
    (
        "delta_loss",
        pa.float32(),
        "nats",
        "loss without the expert at this position minus baseline_loss; above 0 where the expert helps; NaN if not measured",
    ),
    (
        "first_order",
        pa.float32(),
        "nats",
        "first-order estimate of delta_loss: -g E(x) . dloss/dy, y the block's routed output here; NaN if not measured",
    ),
)
EFFECTS_SEQUENCE = _schema(
    _DOCUMENT,
    _POSITION,
    _LAYER,
    _SLOT,
    _EXPERT,
    (
        "delta_loss",
        pa.float32(),
        "nats",
        "loss here without the expert at every token of the sequence minus the intact model's loss here",
    ),
)
PROGRESSIVE = _schema(
    _DOCUMENT,
    _POSITION,
    _LAYER,
    ("order", pa.string(), "name", "which experts go first: descending or ascending routing weight, or random"),
    ("removed", pa.int8(), "experts", "how many of the active experts are removed at this position, from 1"),
    ("delta_loss", pa.float32(), "nats", "loss without them at this position minus baseline_loss"),
    _BASELINE,
)
ROUTING = _schema(
    _DOCUMENT,
    _LAYER,
    ("expert", pa.int16(), "index", "routed expert"),
    ("n_tokens", pa.int32(), "tokens", "tokens of the document that select the expert"),
    ("document_tokens", pa.int32(), "tokens", "all tokens of the document"),
    ("sum_probability", pa.float64(), "tokens", "router's softmax probability of the expert, summed over all tokens"),
    ("sum_entropy", pa.float64(), "nats", "entropy of the router's softmax, summed over the tokens that select the expert"),
    (
        "max_activation",
        pa.float32(),
        "residual stream",
        "largest |coordinate| of E(x) over the tokens that select the expert; NaN if there are none",
    ),
)
EXPERT_WEIGHTS = _schema(
    _LAYER,
    ("expert", pa.int16(), "index", "routed expert"),
    ("router_row_norm", pa.float64(), "weights", "Euclidean norm of the expert's row of the router"),
    ("weight_norm", pa.float64(), "weights", "Frobenius norm of the expert's three matrices together"),
    ("mean_abs_weight", pa.float64(), "weights", "mean |w| over the expert's three matrices"),
    ("rms_weight", pa.float64(), "weights", "root mean square of w over the expert's three matrices"),
)
TOKENS = _schema(
    _DOCUMENT,
    _POSITION,
    ("window", pa.int32(), "index", "context window that the document was cut into"),
    ("context_position", pa.int32(), "index", "position inside that window: how many tokens the model saw before"),
    ("token", pa.int32(), "token id", "input token"),
    ("target", pa.int32(), "token id", "next token of the document; -1 where there is none"),
    _BASELINE,
)
DOCUMENTS = _schema(
    _DOCUMENT,
    ("id", pa.string(), "text", "stable name of the document"),
    ("domain", pa.string(), "text", "kind of text"),
    ("title", pa.string(), "text", "title for people"),
    ("n_tokens", pa.int32(), "tokens", "length of the document"),
)


# --- files -------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`; what is written there takes the name `path` when the block ends well.

    An exception inside the block removes the temporary file and leaves any earlier `path` as it was. A killed process
    can leave a file `.NAME.PID.tmp`; `remove_temporaries` sweeps those.

    Raises OSError (with the original errno) that names the target where the directory is missing, is not writable, or
    the disk is full.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            temporary.touch()
            yield temporary
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, target)
            _sync_directory(target.parent)
        except OSError as error:
            if error.errno is None:
                raise
            raise OSError(error.errno, f"cannot write {target}: {_reason(error, target)}") from error
    finally:
        if target.parent.is_dir():
            temporary.unlink(missing_ok=True)


def _reason(error: OSError, target: Path) -> str:
    text = os.strerror(error.errno or 0)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{text}; free some space or choose another directory, then run again"
    if error.errno == errno.ENOENT and not target.parent.exists():
        return f"the directory {target.parent} does not exist"
    if error.errno == errno.ENOTDIR:
        return f"{target.parent} is not a directory"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{text}; the directory {target.parent} must be writable"
    return text


def _sync_directory(directory: Path) -> None:
    """Make the rename itself durable, where the platform lets a directory be opened."""
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_temporaries(directory: str | os.PathLike[str]) -> int:
    """Delete what killed writers left in `directory`; call it while nothing else writes there. Returns the count."""
    leftovers = sorted(Path(directory).glob(".*.tmp"))
    for path in leftovers:
        path.unlink()
    return len(leftovers)


def write_parquet_atomic(table: pa.Table, path: str | os.PathLike[str], *, row_group_size: int = 1 << 17) -> None:
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=row_group_size)


def write_csv_atomic(table: pa.Table, path: str | os.PathLike[str]) -> None:
    """Numbers in their shortest exact decimal form; missing values as empty fields, NaN as `nan`."""
    with atomic_path(path) as temporary:
        pyarrow.csv.write_csv(table, temporary, pyarrow.csv.WriteOptions(quoting_style="needed"))


def required_file(run: Path, name: str, origin: str) -> Path:
    """The path of a run's file; FileNotFoundError that says what it comes from where it is missing."""
    if not (run / name).is_file():
        raise FileNotFoundError(f"{run / name} does not exist; {origin}")
    return run / name


def read_csv(path: str | os.PathLike[str], schema: pa.Schema | None = None) -> pa.Table:
    """The inverse of `write_csv_atomic`, exact for the types in `schema` (those it does not name are inferred)."""
    kinds = {} if schema is None else dict(zip(schema.names, schema.types, strict=True))
    options = pyarrow.csv.ConvertOptions(column_types=kinds, null_values=[""], strings_can_be_null=False)
    return pyarrow.csv.read_csv(path, pyarrow.csv.ReadOptions(use_threads=False), convert_options=options)


def write_json_atomic(value: Any, path: str | os.PathLike[str]) -> None:
    """Keys sorted. Raises ValueError for NaN and infinity, which JSON has no word for."""
    write_text_atomic(json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n", path)


def write_text_atomic(text: str, path: str | os.PathLike[str]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
