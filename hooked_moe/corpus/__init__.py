"""The text that an audit reads, and the facts that causal tracing asks about."""

from hooked_moe.corpus.corpora import CORPUS_NAMES, Corpus, Document, Window, tokenize_documents
from hooked_moe.corpus.facts import FACT_SETS, FactRecord, load_facts, with_foils
from hooked_moe.corpus.sources import count_paragraphs, load_corpus

__all__ = [
    "CORPUS_NAMES",
    "FACT_SETS",
    "Corpus",
    "Document",
    "FactRecord",
    "Window",
    "count_paragraphs",
    "load_corpus",
    "load_facts",
    "tokenize_documents",
    "with_foils",
]
