"""Corpora of texts in memory, of directories, and of paragraphs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hooked_moe.corpus import Corpus, Document, load_corpus
from hooked_moe.loading.registry import locate

TEXTS = ["One fish.", "Two\n\nfish,  \n \t\nred fish.\n\n\n", "Blue fish."]
pytestmark = pytest.mark.usefixtures("unchecked")


def texts(corpus: Corpus) -> list[str]:
    return [document.text for document in corpus.documents]


def a_generator() -> Iterator[str]:
    yield from TEXTS


@pytest.mark.parametrize("make", [lambda: TEXTS, lambda: tuple(TEXTS), a_generator, lambda: dict.fromkeys(TEXTS).keys()])
def test_any_iterable_of_texts_is_a_corpus(make: Callable[[], Any]) -> None:
    corpus = load_corpus(make())
    assert texts(corpus) == TEXTS
    assert [document.id for document in corpus.documents] == ["documents-1", "documents-2", "documents-3"]
    assert corpus == load_corpus(TEXTS)
    assert load_corpus(make(), name="fish").documents[0] == Document("fish-1", "fish", "fish, document 1", "One fish.")


def test_documents_and_mappings_keep_what_they_say() -> None:
    one = Document("x", "poem", "Fish", "One fish.")
    row = {"id": 7, "domain": "prose", "title": "T", "text": "Two fish.", "other": None}
    corpus = load_corpus([one, row, {"text": "Red fish."}], name="mixed")
    assert corpus.documents == [
        one,
        Document("7", "prose", "T", "Two fish."),
        Document("mixed-3", "mixed", "mixed-3", "Red fish."),
    ]
    assert corpus.sha256 == load_corpus([document.text for document in corpus.documents]).sha256


def test_a_split_of_a_data_set_is_a_corpus() -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": TEXTS, "body": ["a b", "c d", "e f"]}, split="test")
    assert texts(load_corpus(data)) == TEXTS
    assert load_corpus(data).name == "test"
    assert texts(load_corpus(data, field="body")) == ["a b", "c d", "e f"]
    assert texts(load_corpus(data.to_iterable_dataset())) == TEXTS
    assert texts(load_corpus(data["text"])) == TEXTS
    with pytest.raises(TypeError, match=r"not a mapping of \['test'\]; give one of its values"):
        load_corpus(datasets.DatasetDict({"test": data}))
    with pytest.raises(ValueError, match=r"Document 1 of 'test' has the fields \['text', 'body'\]; expected its text in 'words'"):
        load_corpus(data, field="words")


def test_a_directory_gives_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_text("Second.\n\x1e\nThird.\n")
    (tmp_path / "a.txt").write_text("First.")
    (tmp_path / "c.jsonl").write_text('{"text": "Fourth.", "id": "own"}\n')
    (tmp_path / "notes.md").write_text("Not text of the corpus.")
    corpus = load_corpus(tmp_path)
    assert texts(corpus) == ["First.", "Second.", "Third.", "Fourth."]
    assert [document.id for document in corpus.documents] == ["a-1", "b/two-1", "b/two-2", "own"]
    assert load_corpus(str(tmp_path)) == corpus
    assert texts(load_corpus(tmp_path / "a.txt")) == ["First."]


def test_names_of_files_that_are_not_unicode_are_spelled_out(tmp_path: Path) -> None:
    """An old Latin-1 file system; Python keeps the byte as half of a surrogate pair, which no file of a run could hold."""
    for name, text in ((b"caf\xe9.txt", "One fish."), (b"na\xefve.jsonl", '{"text": "Two fish."}')):
        (tmp_path / os.fsdecode(name)).write_text(text)
    corpora = [load_corpus(tmp_path), *(load_corpus(path) for path in sorted(tmp_path.iterdir()))]
    assert [document.id for document in corpora[0].documents] == [r"caf\udce9-1", r"na\udcefve-1"]
    assert [corpus.name for corpus in corpora[1:]] == [rf"{tmp_path}/caf\udce9.txt", rf"{tmp_path}/na\udcefve.jsonl"]
    model = tmp_path / "models" / os.fsdecode(b"caf\xe9")
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    assert locate(model).model_name == r"caf\udce9"


def test_paragraphs_stand_between_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "fish.txt"
    file.write_text("One\nfish.\n\n  Two fish.\n \t \n\n\nRed fish.\n\x1e\nBlue fish.\n")
    corpus = load_corpus(file, unit="paragraph")
    assert texts(corpus) == ["One\nfish.", "  Two fish.", "Red fish.", "Blue fish."]
    assert [document.id for document in corpus.documents] == ["fish-1-001", "fish-1-002", "fish-1-003", "fish-2-001"]
    assert texts(load_corpus(file)) == ["One\nfish.\n\n  Two fish.\n \t \n\n\nRed fish.", "Blue fish."]
    assert texts(load_corpus(tmp_path, unit="paragraph")) == texts(corpus)
    assert texts(load_corpus(TEXTS, unit="paragraph")) == ["One fish.", "Two", "fish,  ", "red fish.", "Blue fish."]
    whole, parts = load_corpus("held-out"), load_corpus("held-out", unit="paragraph")
    assert len(parts.documents) > len(whole.documents)
    assert {part.domain for part in parts.documents} == {document.domain for document in whole.documents}


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ([], {}, ValueError, r"'documents' is empty"),
        (["a", " \n"], {}, ValueError, r"Document 2 of 'documents' is ' \\n'; expected text that is not empty"),
        ([{"text": None}], {}, ValueError, r"'text' of document 'documents-1': expected a text, not None"),
        (["a", 3], {}, TypeError, r"Document 2 of 'documents' is of type int; expected a text, a Document or a mapping"),
        ([[1, 2]], {}, TypeError, r"is of type list"),
        (3, {}, TypeError, r"a name, a path or an iterable of documents, not int"),
        (b"text", {}, TypeError, r"not bytes"),
        (Document("a", "b", "c", "d"), {}, TypeError, r"put it in a list"),
        ([{"id": 1, "text": "a"}, {"id": 1, "text": "b"}], {}, ValueError, r"the same id to several documents: '1'"),
        (["a"], {"unit": "row"}, ValueError, r"unit='row' and revision= are for 'wikitext-2', not for 'documents'"),
        (["a"], {"unit": "line"}, ValueError, r"unit is 'line'"),
        ("held-out", {"field": "body"}, ValueError, r"field and name are for documents in memory"),
        ("held-out", {"name": "mine"}, ValueError, r"field and name are for documents in memory"),
    ],
)
def test_wrong_sources_are_answered(source: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_corpus(source, **options)
