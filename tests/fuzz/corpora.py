"""Fuzzing of corpus files, jsonl and txt."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

from hooked_moe.corpus import load_corpus, tokenize_documents
from tests.fuzz.byte_mutations import mutate_bytes
from tests.fuzz.json_mutations import STRINGS, dumps, mutate

_LINES = [
    {"id": f"d{i}", "domain": "sea", "title": f"Title {i}", "text": f"The whale, number {i}, swam past the ship \u2014 twice."}
    for i in range(4)
]
_TEXTS = "\n\x1e\n".join(str(line["text"]) for line in _LINES)
_WORDS = (*STRINGS, {"text": "a"}, {"text": " "}, [{"text": "b"}], "whale " * 2000, "\u2028", "\r", "\x1e", "a\n\x1e\nb")


class Corpora:
    name = "corpora"
    shown_by_console = False
    seconds = 10

    def prepare(self) -> None:
        pass

    def write(self, rng: random.Random, directory: Path) -> str:
        if rng.random() < 0.25:
            data, what = mutate_bytes(_TEXTS.encode(), rng)
            (directory / "corpus.txt").write_bytes(data)
            return what
        lines = [dumps(line) for line in _LINES]
        done = []
        for _ in range(rng.choice((1, 1, 2))):
            place = rng.randrange(len(lines))
            try:
                value, what = mutate(json.loads(lines[place]), rng, _WORDS)
                lines[place] = dumps(value)
            except (ValueError, RecursionError):
                lines[place], what = mutate_bytes(lines[place], rng)
            done.append(f"line {place + 1}: {what}")
        if rng.random() < 0.2:
            lines[-1], what = mutate_bytes(lines[-1], rng)
            done.append(what)
        (directory / "corpus.jsonl").write_bytes(rng.choice((b"\n", b"\n", b"\r\n", b"\n\n")).join(lines))
        return "; ".join(done)

    def run(self, directory: Path) -> str:
        (file,) = directory.iterdir()
        corpus = load_corpus(str(file))
        text = "\n\x1e\n".join(document.text for document in corpus.documents)
        if hashlib.sha256(text.encode()).hexdigest() != corpus.sha256:
            return "the checksum is not that of the texts"
        fields = [getattr(document, name) for document in corpus.documents for name in ("id", "domain", "title", "text")]
        if not all(isinstance(field, str) for field in fields) or not all(document.text.strip() for document in corpus.documents):
            return "a document is not text"
        tokenize_documents(corpus.documents, lambda text: list(text.encode()), 16)
        return ""
