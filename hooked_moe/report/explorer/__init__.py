"""The explorer pages of an analysed run, beside its report: what experts do, in words.

`documents.html` shows texts token by token, coloured by what removing experts there does; `experts.html` has a card for every
expert. Each is one file that loads nothing and needs a browser with scripts. They are made of tables alone, and a rerun gives the
same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from hooked_moe.report.explorer.cards import card_data
from hooked_moe.report.explorer.documents import MOST_BYTES, SEED, document_data, largest_effect
from hooked_moe.report.explorer.packing import packed
from hooked_moe.report.explorer.texts import Texts, read_texts
from hooked_moe.report.inputs import EXPLORER_PAGES
from hooked_moe.report.page import template_environment
from hooked_moe.tables import FileRecord, Ledger, read_checked_json, read_parquet, required_file, write_text_atomic

__all__ = ["explorer_fault", "write_explorer"]

_EXPLORER = "explorer"
_INPUTS = (
    *("manifest.json", "documents.parquet", "token_texts.parquet", "effects.parquet", "routing.parquet", "tokens.parquet"),
    *("experts.parquet", "expert_effect_sums.parquet", "expert_tokens.parquet", "token_shares.parquet"),
)
_SETTINGS = {"seed": SEED, "most_bytes": MOST_BYTES}


def write_explorer(run: Path) -> None:
    """Write both pages from the tables of an analysed run.

    Raises FileNotFoundError where it lacks one of them, ValueError where they are not of one measurement.
    """
    texts = read_texts(run)
    manifest = read_checked_json(run / "manifest.json") if (run / "manifest.json").is_file() else {}
    names = {"model": _name(manifest, "model"), "corpus": _name(manifest, "corpus")}
    cards = card_data(run, texts)
    documents = document_data(run, texts, largest_effect(read_parquet(run / "expert_tokens.parquet")), _baseline(run, texts))
    _write(run, "documents.html", {"facts": documents.facts, "about": documents.about, "payloads": documents.payloads}, names)
    shown = [entry["number"] for entry in documents.facts["documents"]]
    facts = cards.facts | {"shown": shown, "names": texts.names}
    payload = packed(_json({"cards": cards.cards, "contexts": cards.contexts}).encode())
    _write(run, "experts.html", {"facts": facts, "about": cards.facts, "payload": payload}, names)
    Ledger(run).record(_EXPLORER, _INPUTS, EXPLORER_PAGES, settings=_SETTINGS, command="hooked-moe audit")


def explorer_fault(run: Path, known: Mapping[str, FileRecord | None] | None = None) -> str | None:
    """Why the pages are not those that `write_explorer` would write now; None where they are. `known` is as in `Ledger`."""
    return Ledger(run, known).fault(_EXPLORER, _INPUTS, _SETTINGS)


def _write(run: Path, name: str, content: dict[str, Any], names: dict[str, str]) -> None:
    environment = template_environment("hooked_moe.report.explorer")
    facts = _json(content.pop("facts")).replace("<", "\\u003c")  # no text of a corpus ends the script that holds it
    script = _asset("common.js") + _asset(name.replace(".html", ".js"))
    page = environment.get_template(name).render(names, facts=facts, style=_asset("explorer.css"), script=script, **content)
    write_text_atomic(page, run / name)


def _asset(name: str) -> str:
    return (files("hooked_moe.report.explorer") / "assets" / name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _name(manifest: dict[str, Any], what: str) -> str:
    entry = manifest.get(what)
    return str(entry.get("name")) if isinstance(entry, dict) and entry.get("name") else f"unnamed {what}"


def _baseline(run: Path, texts: Texts) -> list[np.ndarray]:
    """The loss of the intact model at every token of each document."""
    losses = read_parquet(required_file(run, "tokens.parquet", "the measurement writes it"), ["baseline_loss"])["baseline_loss"]
    if len(losses) != texts.starts[-1]:
        raise ValueError(f"{run}: tokens.parquet and token_texts.parquet differ in length; they are of other runs")
    return np.split(losses.to_numpy(), texts.starts[1:-1])
