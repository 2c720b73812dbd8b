"""Corpora and windows. Nothing here needs a network: the hub is replaced by a file on disk; `test_downloads.py` has downloads."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hooked_moe.corpus import Corpus, Document, corpora, load_corpus, tokenize_documents

HELD_OUT_SHA256 = "53a6de2a24931c85a1269ad78ff00cbaa335abfc6fbc81c64d7d5bf68807edad"
DOMAINS = {"address", "commentary", "novel", "reference", "scripture", "whaling"}


@pytest.fixture(scope="module")
def held_out() -> Corpus:
    return load_corpus("held-out")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], str]:
    """Write a file and return its path."""

    def write_file(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return str(path)

    return write_file


def document(text: str, key: str = "d") -> Document:
    return Document(key, "test", key, text)


# --- the shipped corpus -----------------------------------------------------------------------------------------------


def test_held_out_is_the_default_and_its_text_is_the_published_one(held_out: Corpus) -> None:
    assert load_corpus() == held_out
    assert held_out.name == "held-out"
    assert held_out.sha256 == HELD_OUT_SHA256


def test_held_out_has_enough_documents_in_every_domain(held_out: Corpus) -> None:
    counts = Counter(d.domain for d in held_out.documents)
    assert set(counts) == DOMAINS
    assert min(counts.values()) >= 10
    assert len(held_out.documents) >= 60


def test_held_out_documents_have_distinct_ids_and_texts(held_out: Corpus) -> None:
    assert len({d.id for d in held_out.documents}) == len(held_out.documents)
    assert len({d.text for d in held_out.documents}) == len(held_out.documents)
    assert all(d.id.startswith(d.domain + "-") for d in held_out.documents)


def test_held_out_text_is_clean(held_out: Corpus) -> None:
    for d in held_out.documents:
        assert d.title, d.id
        assert len(d.text) > 2000, d.id
        assert d.text == d.text.strip(), d.id
        for trace in ("\x1e", "\r", "\t", "  ", "\n\n\n", "Gutenberg", "</", "&amp;", "[Applause]", "\u2019"):
            assert trace not in d.text, (d.id, trace)


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_jsonl_file_gives_its_fields_and_fills_in_missing_ones(write: Callable[..., str]) -> None:
    lines = [
        json.dumps({"id": "x", "domain": "law", "title": "X", "text": "One."}),
        "",
        json.dumps({"text": "Tw\u00f6."}),
    ]
    corpus = load_corpus(write("mine.jsonl", "\n".join(lines)))
    assert corpus.documents == [
        Document("x", "law", "X", "One."),
        Document("mine-3", "mine", "mine-3", "Tw\u00f6."),
    ]
    assert corpus.sha256 == hashlib.sha256("One.\n\x1e\nTw\u00f6.".encode()).hexdigest()


def test_a_txt_file_is_split_at_record_separators(write: Callable[..., str]) -> None:
    texts = [d.text for d in load_corpus(write("a.txt", "One\n\nstill one.\n\x1e\nTwo.\n\x1e\n")).documents]
    assert texts == ["One\n\nstill one.", "Two."]


def test_a_txt_file_without_separators_is_one_document(write: Callable[..., str]) -> None:
    (only,) = load_corpus(write("a.txt", "A separator \x1e inside a line\r\nseparates nothing.\n")).documents
    assert only == Document("a-1", "a", "a, document 1", "A separator \x1e inside a line\nseparates nothing.")


def test_the_same_texts_have_the_same_checksum_in_either_format(write: Callable[..., str]) -> None:
    jsonl = write("a.jsonl", '{"text": "One."}\n{"text": "Two."}\n')
    txt = write("b.txt", "One.\n\x1e\nTwo.\n")
    assert load_corpus(jsonl).sha256 == load_corpus(txt).sha256


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "ok"}\n{"text": oops}\n', r"line 2 is not JSON: .* at column 10"),
        ("a.jsonl", '{"text": "ok"}\n{"body": "x"}\n', r"line 2 has the fields \['body'\]; expected .* field 'text'"),
        ("a.jsonl", '["text"]\n', r"line 1 holds '\[\"text\"\]'; expected an object"),
        ("a.jsonl", '{"text": " "}\n', r"line 1: 'text' is ' '; expected text that is not empty"),
        ("a.jsonl", '{"text": 3}\n', r"line 1: 'text' is 3; expected text"),
        ("a.jsonl", '{"text": "a", "id": 1}\n{"text": "b", "id": 1}\n', r"same id to several documents: '1'"),
        ("a.jsonl", "\n\n", r"is empty"),
        ("a.txt", "", r"is empty"),
        ("a.txt", "\n\x1e\n \n", r"is empty"),
        ("a.txt", b"fine\ncaf\xe9", r"not UTF-8: byte 0xe9 on line 2 \(offset 8\).*iconv"),
        ("a.csv", "text\n", r"ends in '\.csv'; expected \.jsonl .* or \.txt"),
    ],
)
def test_malformed_files_are_refused_with_the_place(
    write: Callable[..., str], name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_corpus(write(name, content))


def test_an_unknown_name_lists_the_names_and_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no corpus 'wikitext2'; expected 'held-out', 'wikitext-2', .* mean 'wikitext-2'"):
        load_corpus("wikitext2")
    with pytest.raises(ValueError, match=r"no corpus 'zzz'.*or a path"):
        load_corpus("zzz")


def test_a_missing_file_and_a_directory_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no corpus file .*missing\.jsonl"):
        load_corpus(str(tmp_path / "missing.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"is a directory without text: it has no .txt or .jsonl file"):
        load_corpus(str(tmp_path))


def test_arguments_that_would_do_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="unit='row' is for 'wikitext-2'"):
        load_corpus("held-out", unit="row")
    with pytest.raises(ValueError, match="revision='main' is for 'wikitext-2'"):
        load_corpus("held-out", revision="main")
    with pytest.raises(ValueError, match="unit is 'page'"):
        load_corpus("wikitext-2", unit="page")


# --- WikiText-2 -------------------------------------------------------------------------------------------------------

WIKITEXT_ROWS = [
    "",
    " = Robert Boulter = \n",
    "",
    " Robert Boulter is an English actor . \n",
    " A second line . \n",
    " = 5 = not a heading \n",
    "",
    " = = Career = = \n",
    "",
    " He had a role in 2000 . \n",
    "",
    " = Du Fu = \n",
    "",
    " Du Fu was a poet . \n",
]


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[object, ...]]:
    """A hub with one parquet file; the fixture's value lists what was asked of it."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "test.parquet"
    parquet.write_table(pyarrow.table({"text": WIKITEXT_ROWS}), path)
    requests: list[tuple[object, ...]] = []

    def download_file(*request: object) -> Path:
        requests.append(request)
        return path

    monkeypatch.setattr(corpora, "download_file", download_file)
    return requests


def test_wikitext_is_split_at_level_1_headings(requests: list[tuple[object, ...]]) -> None:
    corpus = load_corpus("wikitext-2", revision="abc", local_files_only=True)
    assert [(d.id, d.title) for d in corpus.documents] == [
        ("wikitext-2-001", "Robert Boulter"),
        ("wikitext-2-002", "Du Fu"),
    ]
    assert corpus.documents[0].text == "".join(WIKITEXT_ROWS[:11]).strip()
    (request,) = requests
    assert request[:5] == ("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet", "abc", None, True)


@pytest.mark.usefixtures("requests")
def test_wikitext_paragraphs_leave_out_headings() -> None:
    documents = load_corpus("wikitext-2", unit="paragraph").documents
    assert [d.text for d in documents] == [
        "Robert Boulter is an English actor .",
        "A second line .",
        "= 5 = not a heading",
        "He had a role in 2000 .",
        "Du Fu was a poet .",
    ]
    assert documents[3].id == "wikitext-2-001-004"
    assert documents[3].title == "Robert Boulter"


@pytest.mark.usefixtures("requests")
def test_wikitext_rows_are_the_lines_of_the_file_as_they_stand() -> None:
    documents = load_corpus("wikitext-2", unit="row").documents
    assert [d.text for d in documents] == [row for row in WIKITEXT_ROWS if row and row.strip()]
    assert documents[0].text == " = Robert Boulter = \n"


# --- windows ----------------------------------------------------------------------------------------------------------


def code_points(text: str) -> list[int]:
    return [ord(c) for c in text]


@pytest.mark.parametrize("bos", [None, 0])
@pytest.mark.parametrize("n_ctx", [3, 4, 7, 100])
@pytest.mark.parametrize("length", [2, 3, 4, 5, 6, 7, 8, 13, 14, 15])
def test_every_token_but_the_first_is_a_target_exactly_once(length: int, n_ctx: int, bos: int | None) -> None:
    text = "abcdefghijklmnopqrstuvwxyz"[:length]
    skip = 0 if bos is None else 1
    targets: list[int] = []
    for window in tokenize_documents([document(text)], code_points, n_ctx, bos):
        own = window.tokens[skip:]
        assert len(window.tokens) <= n_ctx
        assert own.tolist() == code_points(text)[window.start : window.start + len(own)]
        assert bos is None or window.tokens[0] == bos
        targets += range(window.start + 1, window.start + len(own))
    assert targets == list(range(1, length))


def test_windows_overlap_by_one_token_and_never_cross_documents() -> None:
    windows = tokenize_documents([document("abcdef", "x"), document("uvw", "y")], code_points, n_ctx=4)
    assert [(w.document, w.start, bytes(w.tokens.tolist()).decode()) for w in windows] == [
        (0, 0, "abcd"),
        (0, 3, "def"),
        (1, 0, "uvw"),
    ]
    assert all(w.tokens.dtype == np.int64 for w in windows)


def test_a_document_without_a_target_is_named() -> None:
    with pytest.raises(ValueError, match=r"fewer than two tokens .*'short' \(1\), 'none' \(0\)"):
        tokenize_documents([document("ab"), document("a", "short"), document("", "none")], code_points, n_ctx=8)


@pytest.mark.parametrize(("n_ctx", "bos"), [(1, None), (2, 7), (0, None)])
def test_a_context_without_room_for_a_prediction_is_refused(n_ctx: int, bos: int | None) -> None:
    with pytest.raises(ValueError, match=f"n_ctx is {n_ctx}"):
        tokenize_documents([document("ab")], code_points, n_ctx, bos)


# Text that is none


def jsonl(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("field", ["text", "id", "domain", "title"])
def test_half_a_surrogate_pair_is_named_by_file_line_and_field(field: str, tmp_path: Path) -> None:
    bad = json.dumps({"text": "the sea", "id": "b"} | {field: "the \ud83d sea"})
    file = jsonl(tmp_path / "texts.jsonl", '{"text": "the land", "id": "a"}', "", bad)
    message = rf"texts.jsonl, line 3: '{field}' of document .*half of a surrogate pair, '\\ud83d', is at character 4"
    with pytest.raises(ValueError, match=message):
        load_corpus(file)


def test_whole_pairs_are_characters_like_others(tmp_path: Path) -> None:
    corpus = load_corpus(jsonl(tmp_path / "texts.jsonl", '{"text": "a \\ud83d\\udc33 whale"}'))
    assert corpus.documents[0].text == "a 🐳 whale"


@pytest.mark.parametrize("value", ["null", "3", "3.5", "true", '["the sea"]', '{"a": 1}', '""', '" \\n"'])
def test_a_text_that_is_none_is_named_by_file_and_line(value: str, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "texts.jsonl", '{"text": "the land"}', f'{{"text": {value}}}')
    with pytest.raises(ValueError, match=r"texts.jsonl, line 2: 'text' is .*; expected text that is not empty. Remove the line"):
        load_corpus(file)


def test_labels_that_are_null_are_filled_in_and_numbers_are_text(tmp_path: Path) -> None:
    first, second = load_corpus(
        jsonl(tmp_path / "texts.jsonl", '{"text": "a", "id": null, "domain": null, "title": null}', '{"text": "b", "id": 7}')
    ).documents
    assert (first.id, first.domain, first.title) == ("texts-1", "texts", "texts-1")
    assert (second.id, second.title) == ("7", "7")


@pytest.mark.parametrize("field", ["id", "domain", "title"])
@pytest.mark.parametrize("value", ["true", "1.5", '["a"]', '{"a": 1}'])
def test_labels_that_are_neither_text_nor_numbers_are_refused(field: str, value: str, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "texts.jsonl", f'{{"text": "the land", "{field}": {value}}}')
    with pytest.raises(ValueError, match=rf"texts.jsonl, line 1: '{field}' is .*; expected text, a whole number, or nothing"):
        load_corpus(file)


@pytest.mark.parametrize("line", ['{"text": ' + "9" * 5000 + "}", "[" * 100_000], ids=["digits", "brackets"])
def test_json_that_python_does_not_read_is_named_by_file_and_line(line: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"texts.jsonl, line 2 (cannot be read as|is not) JSON") as caught:
        load_corpus(jsonl(tmp_path / "texts.jsonl", '{"text": "the land"}', line))
    assert len(str(caught.value)) < 500


@pytest.mark.usefixtures("unchecked")
def test_a_document_of_ones_own_is_checked_and_named() -> None:
    with pytest.raises(ValueError, match=r"'text' of document 'mine': this is no Unicode text"):
        Document("mine", "a", "b", "\udc00")
    with pytest.raises(ValueError, match=r"'title' of document 'mine': expected a text, not None"):
        Document("mine", "a", None, "text")  # type: ignore[arg-type]

    def encode(text: str) -> list[int]:
        raise ValueError("no such word")

    with pytest.raises(ValueError, match="document 'mine' cannot be tokenized: no such word"):
        tokenize_documents((Document("mine", "a", "b", text) for text in ["the sea"]), encode, 16)
    documents = (Document(str(number), "a", "b", "the sea") for number in range(2))
    assert len(tokenize_documents(documents, lambda text: [1, 2, 3], 16)) == 2  # from a generator, walked twice


def test_a_parquet_file_without_text_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"texts": ["a"]}), tmp_path / "wiki.parquet")
    with pytest.raises(ValueError, match=r"wiki.parquet has no column 'text' of text; it has texts. Download it again"):
        corpora._parquet_rows(tmp_path / "wiki.parquet")
