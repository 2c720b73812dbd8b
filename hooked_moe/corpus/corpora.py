"""The text that an audit reads: corpora of documents, and their tokens in windows that fit a model's context.

A corpus is named or is a file (`hooked_moe.corpus.sources` has other sources):

    "held-out"     72 public-domain documents in six domains, shipped with the package (`data/README.md`)
    "wikitext-2"   the test split of WikiText-2 (raw), from the Hugging Face hub
    a .jsonl file  one JSON object per line with "text", and optionally "id", "domain" and "title"
    a .txt file    documents separated by lines that hold only U+001E; without such a line, one document. Where blank lines
                   separate documents: `load_corpus(path, unit="paragraph")`, or --unit paragraph
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from hooked_moe.checks import as_unicode, check_text, expanded_path, quoted
from hooked_moe.json_text import JsonError, parse_json
from hooked_moe.loading.hub import download_file

CORPUS_NAMES = ("held-out", "wikitext-2")
SUFFIXES = (".jsonl", ".txt")
RECORD_SEPARATOR = "\x1e"
_WIKITEXT_REPO = "Salesforce/wikitext"
_WIKITEXT_FILE = "wikitext-2-raw-v1/test-00000-of-00001.parquet"


@dataclass(frozen=True)
class Document:
    """One text that is read on its own: no context crosses from one document to the next."""

    id: str
    domain: str
    title: str
    text: str

    def __post_init__(self) -> None:
        for name in ("id", "domain", "title", "text"):
            try:
                check_text(getattr(self, name))
            except ValueError as error:
                raise type(error)(f"{quoted(name)} of document {quoted(self.id)}: {error}") from error


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order. `sha256` is of their texts, joined by lines with U+001E, in UTF-8."""

    name: str
    documents: list[Document]
    sha256: str


@dataclass(frozen=True)
class Window:
    """Tokens to run in one forward pass.

    `tokens` (int64, [token]) are the tokens `start`, `start + 1`, ... of document number `document`; where a
    beginning-of-sequence token was asked for, it stands before them, at index 0 of `tokens`.
    """

    document: int
    start: int
    tokens: np.ndarray


def read_corpus(
    name_or_path: str,
    *,
    unit: str = "article",
    revision: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
) -> Corpus:
    """Read a corpus by name or from a file; see `hooked_moe.corpus.load_corpus`, which checks `unit`: that of WikiText-2."""
    if name_or_path == "wikitext-2":
        otherwise = "use the shipped corpus 'held-out'"
        path = download_file(_WIKITEXT_REPO, _WIKITEXT_FILE, revision, cache_dir, local_files_only, otherwise)
        rows = _parquet_rows(path)
        return corpus_of("wikitext-2", _wikitext_rows(rows) if unit == "row" else _wikitext_documents(rows, unit))
    if unit != "article" or revision is not None:
        argument = f"unit={quoted(unit)}" if unit != "article" else f"revision={quoted(revision)}"
        raise ValueError(f"{argument} is for 'wikitext-2'; {quoted(name_or_path)} has only one form. Leave the argument out.")
    if name_or_path == "held-out":
        data = resources.files("hooked_moe.corpus").joinpath("data", "held_out.jsonl").read_bytes()
        return corpus_of("held-out", _jsonl_documents(_decode(data, "the shipped corpus"), "held-out", "the shipped corpus"))
    return _file_corpus(name_or_path)


def tokenize_documents(
    documents: Iterable[Document], encode: Callable[[str], Sequence[int]], n_ctx: int, bos: int | None = None
) -> list[Window]:
    """Cut each document's tokens into windows of at most `n_ctx` tokens.

    Successive windows of a document share exactly one token: the last one of a window, which has no target there, is
    the first one of the next. So each token of a document except the first is predicted exactly once from tokens before
    it.

    A `bos` token is put before each window and counts towards `n_ctx`. Its own prediction, of token `start`, is an additional
    one: leave its position out of sums over a document, or token `start` of each later window counts twice.

    Raises ValueError if `n_ctx` leaves no room for a prediction, or if a document has fewer than two tokens.
    """
    prefix = [] if bos is None else [bos]
    room = n_ctx - len(prefix)
    if room < 2:
        kind = "two tokens" if bos is None else "a bos and two tokens"
        raise ValueError(f"n_ctx is {n_ctx}; a window has to hold {kind} to predict anything. Give a larger n_ctx.")
    documents = list(documents)
    encoded = [_encoded(document, encode) for document in documents]
    short = [f"{quoted(d.id)} ({len(ids)})" for d, ids in zip(documents, encoded, strict=True) if len(ids) < 2]
    if short:
        raise ValueError(f"Documents of fewer than two tokens have nothing to predict: {_listed(short)}. Leave them out.")
    return [
        Window(number, start, np.concatenate([np.asarray(prefix, dtype=np.int64), ids[start : start + room]]))
        for number, ids in enumerate(encoded)
        for start in range(0, len(ids) - 1, room - 1)
    ]


def _encoded(document: Document, encode: Callable[[str], Sequence[int]]) -> Int[np.ndarray, " token"]:
    try:
        return np.asarray(encode(document.text), dtype=np.int64)
    except ValueError as error:
        raise ValueError(f"document {quoted(document.id)} cannot be tokenized: {error}") from error


def corpus_of(name: str, documents: Iterable[Document]) -> Corpus:
    """A corpus with its checksum, after the checks that hold for every source."""
    documents = list(documents)
    if not documents:
        raise ValueError(f"Corpus {quoted(name)} is empty: it has no text. Expected at least one document.")
    repeated = [quoted(key) for key, count in Counter(d.id for d in documents).items() if count > 1]
    if repeated:
        raise ValueError(f"Corpus {quoted(name)} gives the same id to several documents: {_listed(repeated)}. Make ids unique.")
    text = f"\n{RECORD_SEPARATOR}\n".join(document.text for document in documents)
    return Corpus(name, documents, hashlib.sha256(text.encode("utf-8")).hexdigest())


def _listed(items: list[str], limit: int = 5) -> str:
    more = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {more} more" if more > 0 else "")


# --- files ------------------------------------------------------------------------------------------------------------


def _file_corpus(name: str) -> Corpus:
    path = expanded_path(name)
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(f"{name} is a link to {path.readlink()}, which is not there. Name the file itself.")
    if not path.is_file():
        if len(path.parts) > 1 or path.suffix:
            raise FileNotFoundError(f"There is no corpus file {name} (looked for {path.absolute()}). Check the path.")
        near = difflib.get_close_matches(name.lower(), CORPUS_NAMES, n=2, cutoff=0.4)
        hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else "Give one of those, or a path."
        known = ", ".join(map(repr, CORPUS_NAMES))
        raise ValueError(
            f"There is no corpus {quoted(name)}; expected {known}, a .jsonl or .txt file, or a directory of such. {hint}"
        )
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{name} ends in {path.suffix!r}; expected .jsonl (one JSON object per line) or .txt (plain text).")
    return corpus_of(as_unicode(name), file_documents(path, as_unicode(path.stem)))


def file_documents(path: Path, stem: str) -> Iterator[Document]:
    """The documents of a .jsonl or .txt file; `stem` is what they are called where the file does not say."""
    text = _decode(path.read_bytes(), str(path))
    return _jsonl_documents(text, stem, str(path)) if path.suffix == ".jsonl" else _text_documents(text, stem)


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{source} is not UTF-8: byte 0x{data[error.start]:02x} on line {line} (offset {error.start}). Convert it, "
            "for example with `iconv -f latin1 -t utf-8`."
        ) from error


def _jsonl_documents(text: str, stem: str, source: str) -> Iterator[Document]:
    """One document per line; a missing id, domain or title is filled in from the file's name."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        try:
            record = parse_json(line)
        except JsonError as error:
            raise ValueError(f"{where} is not JSON: {error}. Expected an object.") from error
        if not isinstance(record, dict) or "text" not in record:
            contents = f"has the fields {quoted(list(record))}" if isinstance(record, dict) else f"holds {line.strip()[:40]!r}"
            raise ValueError(f"{where} {contents}; expected an object with the document in a field 'text'.")
        if not isinstance(record["text"], str) or not record["text"].strip():
            found = quoted(record["text"])
            raise ValueError(f"{where}: 'text' is {found}; expected text that is not empty. Remove the line.")
        key = _label(record, "id", f"{stem}-{number}", where)
        try:
            yield Document(key, _label(record, "domain", stem, where), _label(record, "title", key, where), record["text"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def _label(record: dict[str, Any], name: str, otherwise: str, where: str) -> str:
    """A text or a whole number, as text; `otherwise` where the record has none or null."""
    value = record.get(name)
    if value is None:
        return otherwise
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"{where}: {quoted(name)} is {quoted(value)}; expected text, a whole number, or nothing at all.")
    return str(value)


def _text_documents(text: str, stem: str) -> Iterator[Document]:
    pieces = [piece.strip("\n") for piece in re.split(rf"(?m)^{RECORD_SEPARATOR}$", text)]
    for number, piece in enumerate((piece for piece in pieces if piece.strip()), 1):
        yield Document(f"{stem}-{number}", stem, f"{stem}, document {number}", piece)


# --- WikiText-2 -------------------------------------------------------------------------------------------------------


def _parquet_rows(path: Path) -> list[str]:
    table = pq.read_table(path)
    if "text" not in table.column_names or not _is_text(table.schema.field("text").type):
        raise ValueError(f"{path} has no column 'text' of text; it has {', '.join(table.column_names)}. Download it again.")
    return [row or "" for row in table.column("text").to_pylist()]


def _is_text(type_: pa.DataType) -> bool:
    return pa.types.is_string(type_) or pa.types.is_large_string(type_)


def _wikitext_rows(rows: list[str]) -> Iterator[Document]:
    for number, row in enumerate(rows):
        if row.strip():
            yield Document(f"wikitext-2-row-{number:04d}", "wikipedia", "", row)


def _wikitext_documents(rows: list[str], unit: str) -> Iterator[Document]:
    """Articles, or the paragraphs in them, from WikiText's rows: a line each, " = Title = " at the head of an article.

    A line between single equals signs is also found inside articles; a heading stands between empty rows.
    """

    def is_empty(index: int) -> bool:
        return not 0 <= index < len(rows) or not rows[index].strip()

    heading = re.compile(r" = [^=\s].*[^=\s] = \s*|  ?= [^=\s] = \s*")
    heads = [i for i, row in enumerate(rows) if heading.fullmatch(row) and is_empty(i - 1) and is_empty(i + 1)]
    if not heads:
        raise ValueError("The WikiText file has no article headings (' = Title = '). Expected the raw test split.")
    for number, (head, end) in enumerate(zip(heads, [*heads[1:], len(rows)], strict=True), 1):
        key, title = f"wikitext-2-{number:03d}", rows[head].strip(" =\n")
        if unit == "article":
            yield Document(key, "wikipedia", title, "".join(rows[head:end]).strip())
            continue
        paragraphs = [row.strip() for row in rows[head:end] if row.strip() and not re.fullmatch(r"\s*=.*=\s*", row)]
        for place, paragraph in enumerate(paragraphs, 1):
            yield Document(f"{key}-{place:03d}", "wikipedia", title, paragraph)
