"""What experts.html shows: a card for every expert, with the tokens at which its removal changes most, in context.

An expert is worth a look where its effect lies on a token to which few of its own tokens belong. The cards begin with those:
their focus is the share of the expert's expected effect at one token, less the share of its removals there.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import scipy

from hooked_moe.analysis.criteria import CRITERIA
from hooked_moe.report.explorer.json_numbers import number
from hooked_moe.report.explorer.kinds import Kinds
from hooked_moe.report.explorer.texts import Texts
from hooked_moe.tables import read_parquet, required_file

MOST_CONTEXTS, FEWEST_CONTEXTS = 12, 3
"""Tokens on a card for each effect, where there are few experts and where there are many."""
CONTEXTS_IN_ALL = 12_000
"""On the page, for each effect."""
BEFORE, AFTER = 16, 10
"""Tokens around the one at which the expert is removed."""
MINIMUM_REMOVALS, MINIMUM_DOCUMENTS = 5, 3
"""Of a token that an expert can be said to focus on."""
SMALL = 0.1
"""An expert with less expected effect than this share of the mean expert's comes after all others by focus."""

Row = dict[str, Any]
_ORIGIN = "the analysis of a run writes it"


@dataclass(frozen=True)
class CardData:
    """Cards by layer and expert, the contexts that they refer to by number, and the facts that the page begins with."""

    cards: list[Row]
    contexts: list[list[Any]]
    facts: dict[str, Any]


def card_data(run: Path, texts: Texts) -> CardData:
    """The cards of an analysed run. Raises FileNotFoundError where it lacks one of the tables."""
    experts = read_parquet(required_file(run, "experts.parquet", _ORIGIN))
    sums = read_parquet(required_file(run, "expert_effect_sums.parquet", _ORIGIN))
    top = read_parquet(required_file(run, "expert_tokens.parquet", _ORIGIN))
    rows = experts.to_pylist()
    layers = sorted({row["layer"] for row in rows})
    routing = read_parquet(run / "routing.parquet") if (run / "routing.parquet").is_file() else None
    kinds = Kinds(texts, layers, 1 + max(row["expert"] for row in rows), routing, sums)
    focus = _focus(run, texts, layers, kinds)
    n = min(MOST_CONTEXTS, max(FEWEST_CONTEXTS, CONTEXTS_IN_ALL // len(rows)))
    contexts = _Contexts(texts)
    effects = _effects(top, contexts, n)
    criteria = [name for name in CRITERIA if name in experts.column_names and np.isfinite(experts[name].to_numpy()).any()]
    ranks = _ranks(experts, criteria)
    documents = _n_documents(sums)
    cards = []
    for index, row in enumerate(rows):
        key = row["layer"], row["expert"]
        cards.append(
            {
                "layer": row["layer"],
                "expert": row["expert"],
                "usage": number(row["utilization_rate"]),
                "removals": row["n_removals"],
                "mean": _interval(row, documents.get(key, 0)),
                "kl": kinds.mean_kl(*key),
                "focus": focus.get(key),
                "kinds": kinds.of(*key),
                "ranks": [rank[index] for rank in ranks.values()],
                "effects": effects.get(key, {}),
            }
        )
    facts = {
        "criteria": [CRITERIA[name].label for name in criteria],
        "kinds": kinds.names,
        "layers": layers,
        "n_contexts": n,
        "effects": sorted({effect for card in cards for effect in card["effects"]}),
        "minimum_removals": MINIMUM_REMOVALS,
        "minimum_documents": MINIMUM_DOCUMENTS,
        "small": SMALL,
    }
    return CardData(cards, contexts.kept, facts)


class _Contexts:
    """Tokens in context, each kept once: document, position, what comes before, the token, what comes after."""

    def __init__(self, texts: Texts) -> None:
        self._texts = texts
        self._numbers: dict[tuple[int, int], int] = {}
        self.kept: list[list[Any]] = []

    def number(self, document: int, position: int) -> int:
        """The number of the context of a token."""
        key = document, position
        if key not in self._numbers:
            window = self._texts.of(document, position - BEFORE, position + 1 + AFTER)
            at = min(position, BEFORE)
            before, token, after = "".join(window[:at]), window[at], "".join(window[at + 1 :])
            self._numbers[key] = len(self.kept)
            self.kept.append([document, position, before, token, after])
        return self._numbers[key]


def _effects(top: pa.Table, contexts: _Contexts, n: int) -> dict[tuple[int, int], dict[str, list[list[Any]]]]:
    """The n largest removals of every expert, by effect: pairs of a context's number and a value."""
    found: dict[tuple[int, int], dict[str, list[list[Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in top.to_pylist():
        if row["rank"] < n:
            entry = [contexts.number(row["document"], row["position"]), number(row["value"])]
            found[row["layer"], row["expert"]][row["effect"]].append(entry)
    return found


def _focus(run: Path, texts: Texts, layers: list[int], kinds: Kinds) -> dict[tuple[int, int], Row]:
    """The token that most exceeds its share of an expert's removals with its share of the effect; for experts that have one."""
    path, totals = run / "token_shares.parquet", kinds.totals
    if not path.is_file() or totals is None:
        return {}
    text_of = _texts_by_id(run, texts)
    smallest = SMALL * totals.sum() / max(np.count_nonzero(kinds.n_removals.sum(axis=2)), 1)
    best: dict[tuple[int, int], Row] = {}
    for row in read_parquet(path).to_pylist():
        key = row["layer"], row["expert"]
        excess = row["share_of_effect"] - row["share_of_removals"]
        if row["n_removals"] < MINIMUM_REMOVALS or row["n_documents"] < MINIMUM_DOCUMENTS or not np.isfinite(excess):
            continue
        if key not in best or excess > best[key]["excess"]:
            best[key] = {
                "token": text_of[row["token"]],
                "excess": number(excess),
                "effect": number(row["share_of_effect"]),
                "served": number(row["share_of_removals"]),
                "removals": row["n_removals"],
                "documents": row["n_documents"],
                "mean": number(row["sum_kl"] / row["n_removals"]),
                "small": bool(totals[layers.index(row["layer"]), row["expert"]] < smallest),
            }
    return best


def _texts_by_id(run: Path, texts: Texts) -> dict[int, str]:
    """The text of every token id of the corpus, as it stands where it first occurs after another token."""
    tokens = read_parquet(run / "tokens.parquet", ["document", "position", "token"])
    ids, position = tokens["token"].to_numpy(), tokens["position"].to_numpy()
    inside = np.flatnonzero(position > 0)
    order = np.concatenate([inside, np.flatnonzero(position == 0)])  # a decoder may take the space off a document's first token
    found, first = np.unique(ids[order], return_index=True)
    return {int(token): texts.at(int(order[place])) for token, place in zip(found, first, strict=True)}


def _interval(row: Row, n_documents: int) -> list[float | None]:
    """Mean realised effect, and the ends of its 95% interval over documents."""
    mean, error = row["mean_delta"], row["mean_delta_se"]
    half = error * float(scipy.stats.t.ppf(0.975, n_documents - 1)) if n_documents > 1 else np.nan
    return [number(mean), number(mean - half), number(mean + half)]


def _n_documents(sums: pa.Table) -> dict[tuple[int, int], int]:
    """In how many documents each expert was removed."""
    counted = sums.group_by(["layer", "expert"]).aggregate([("document", "count")]).to_pylist()
    return {(row["layer"], row["expert"]): row["document_count"] for row in counted}


def _ranks(experts: pa.Table, criteria: list[str]) -> dict[str, list[int | None]]:
    """The rank of every expert in its layer under each criterion: 1 would be pruned last."""
    layer = experts["layer"].to_numpy()
    found: dict[str, list[int | None]] = {}
    for name in criteria:
        sign = 1.0 if CRITERIA[name].direction == "prune highest" else -1.0
        values = sign * experts[name].to_numpy()
        ranks: list[int | None] = [None] * len(values)
        for one in np.unique(layer):
            own = np.flatnonzero((layer == one) & np.isfinite(values))
            for place, rank in zip(own, scipy.stats.rankdata(values[own], method="min"), strict=True):
                ranks[place] = int(rank)
        found[name] = ranks
    return found
