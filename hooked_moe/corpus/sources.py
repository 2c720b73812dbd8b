"""`load_corpus`: corpora by name, from files and directories, and from texts that are in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from os import PathLike
from typing import Any

from hooked_moe.checks import as_unicode, expanded_path, quoted
from hooked_moe.corpus import corpora
from hooked_moe.corpus.corpora import Corpus, Document, corpus_of, file_documents


def load_corpus(
    source: str | PathLike[str] | Iterable[Any] = "held-out",
    *,
    unit: str = "article",
    field: str = "text",
    name: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
) -> Corpus:
    """A corpus by name ("held-out", "wikitext-2"), from a file or a directory, or of documents in memory.

    A directory gives its .txt and .jsonl files, at any depth and in the order of their paths. In memory, any iterable of texts,
    `Document`s, and mappings as the lines of a .jsonl file are: a list, a generator, a split of a Hugging Face data set. `field`
    is where such a mapping has its text, and `name` what the corpus is called.

    `unit` is what counts as one document. "article": what the source has as one. "paragraph": the pieces between blank lines.
    "row", for WikiText-2 alone: the file's own lines, headings and surrounding spaces included, as the released code of
    arXiv 2606.10703 reads them. `revision`, `cache_dir` and `local_files_only` are for WikiText-2, which comes from the hub.

        load_corpus(["It was the best of times.", "Call me Ishmael."]).documents[1].id  # 'documents-2'

    Raises ValueError for an unknown name or malformed contents, TypeError for what is no source, FileNotFoundError for a path
    that leads to no text, `HubError` (an OSError) where the hub does not give it.
    """
    if unit not in ("article", "paragraph", "row"):
        raise ValueError(f"unit is {quoted(unit)}; expected 'article', 'paragraph' or 'row'.")
    if isinstance(source, str | PathLike):
        source = os.fspath(source)
        if field != "text" or name is not None:
            raise ValueError(f"field and name are for documents in memory; {quoted(source)} has its own. Leave them out.")
        hub: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
        in_pieces = unit == "paragraph" and source != "wikitext-2"  # which has its own rule for them
        if source in corpora.CORPUS_NAMES or not expanded_path(source).is_dir():
            corpus = corpora.read_corpus(source, unit="article" if in_pieces else unit, **hub)
            return corpus_of(corpus.name, _paragraphs(corpus.documents)) if in_pieces else corpus
        name, documents = as_unicode(source), _directory_documents(source)
    else:
        name = name or _name_of(source)
        documents = _given_documents(source, field, name)
    if unit == "row" or revision is not None:
        raise ValueError(f"unit='row' and revision= are for 'wikitext-2', not for {quoted(name)}. Leave them out.")
    return corpus_of(name, _paragraphs(documents) if unit == "paragraph" else documents)


def count_paragraphs(corpus: Corpus) -> int:
    """How many documents `unit="paragraph"` makes of a corpus."""
    return sum(1 for _ in _paragraphs(corpus.documents))


def _paragraphs(documents: Iterable[Document]) -> Iterator[Document]:
    for document in documents:
        pieces = [piece.strip("\n") for piece in re.split(r"\n[^\S\n]*\n", document.text)]
        for number, piece in enumerate((piece for piece in pieces if piece.strip()), 1):
            yield replace(document, id=f"{document.id}-{number:03d}", text=piece)


def _directory_documents(name: str) -> Iterator[Document]:
    root = expanded_path(name)
    files = sorted(path for path in root.rglob("*") if path.suffix in corpora.SUFFIXES and path.is_file())
    if not files:
        raise FileNotFoundError(f"{name} is a directory without text: it has no .txt or .jsonl file. Check the path.")
    stems = [as_unicode(path.relative_to(root).with_suffix("").as_posix()) for path in files]
    return chain.from_iterable(map(file_documents, files, stems))


def _name_of(source: Any) -> str:
    """The data set and split of a Hugging Face data set, as far as it says, and else "documents"."""
    parts = (getattr(getattr(source, "info", None), "dataset_name", None), getattr(source, "split", None))
    return "/".join(str(part) for part in parts if isinstance(part, str)) or "documents"


def _given_documents(source: Any, field: str, name: str) -> Iterator[Document]:
    if isinstance(source, Mapping):
        raise TypeError(f"A corpus is a list of documents, not a mapping of {list(source)[:5]}; give one of its values.")
    if isinstance(source, Document):
        raise TypeError("A corpus is a list of documents, not one document; put it in a list.")
    if not isinstance(source, Iterable) or isinstance(source, bytes):
        raise TypeError(f"A corpus is a name, a path or an iterable of documents, not {type(source).__name__}.")
    for number, item in enumerate(source, 1):
        where = f"Document {number} of {quoted(name)}"
        if isinstance(item, Document):
            document = item
        elif isinstance(item, str):
            document = Document(f"{name}-{number}", name, f"{name}, document {number}", item)
        elif isinstance(item, Mapping):
            if field not in item:
                raise ValueError(
                    f"{where} has the fields {quoted(list(item))}; expected its text in {quoted(field)}. "
                    "Name another with field=."
                )
            key = str(item.get("id", f"{name}-{number}"))
            document = Document(key, str(item.get("domain", name)), str(item.get("title", key)), item[field])
        else:
            raise TypeError(f"{where} is of type {type(item).__name__}; expected a text, a Document or a mapping with a text.")
        if not isinstance(document.text, str) or not document.text.strip():
            raise ValueError(f"{where} is {quoted(document.text)}; expected text that is not empty. Leave it out.")
        yield document
