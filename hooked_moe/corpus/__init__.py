"""The text that an audit reads."""

from hooked_moe.corpus.corpora import CORPUS_NAMES, Corpus, Document, Window, tokenize_documents
from hooked_moe.corpus.sources import load_corpus

__all__ = ["CORPUS_NAMES", "Corpus", "Document", "Window", "load_corpus", "tokenize_documents"]
