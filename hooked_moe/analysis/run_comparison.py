"""Two audits beside each other: what differs between them, and which differences their documents bear out.

Savings are compared as shares of each run's own random cost, which makes them comparable between models and vocabularies; the
cost itself is compared in nats. The unit is the document. Documents that both runs read are paired: of both runs only these
are taken then, and both are resampled together. Where the runs share too few, each is resampled by itself, and the intervals
are wider. Intervals say what other documents like these would give; they say nothing of other trainings of the models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import scipy
from jaxtyping import Int

from hooked_moe.analysis.compared_run import ComparedRun, what_differs
from hooked_moe.analysis.criteria import CRITERIA
from hooked_moe.analysis.document_savings import DocumentSavings, document_savings
from hooked_moe.analysis.saving_table import ALL_LAYERS, MINIMUM_DOCUMENTS
from hooked_moe.statistics import NEGLIGIBLE_SHARE, ratio_bootstrap
from hooked_moe.statistics.ratio_differences import RatioDifferences, Ratios, ratio_differences
from hooked_moe.tables import read_parquet

RANDOM_COST = "random cost"
Row = dict[str, Any]


@dataclass(frozen=True)
class Pairing:
    """Which documents of the two runs are the same one."""

    documents: tuple[Int[np.ndarray, " shared"], Int[np.ndarray, " shared"]] | None
    """Their numbers in either run; None where the runs are compared unpaired."""
    note: str
    """What was paired, or why nothing was."""


@dataclass(frozen=True)
class RunComparison:
    """What `compare_runs` finds; `first` less `second` throughout."""

    runs: tuple[ComparedRun, ComparedRun]
    differing: list[tuple[str, str, str]]
    """(entry of the manifest, first, second)."""
    layers: tuple[tuple[int, ...], tuple[int, ...]]
    pairing: Pairing
    notes: tuple[str, ...]
    savings: list[Row]
    """By effect and criterion: shares of both with intervals, their difference with two, and a verdict."""
    costs: list[Row]
    """By effect: the random cost of both in nats, likewise."""
    ranks: list[Row]
    """By criterion: Spearman's correlation over experts, mean and range over layers; empty where experts have no counterpart."""
    prunings: list[Row]
    """Rises in loss that both runs measured for the same ranking and share."""

    def table(self) -> pa.Table:
        """Savings and costs in one, as comparison.csv has them."""
        return pa.Table.from_pylist([*self.costs, *self.savings])


def compare_runs(one: ComparedRun, other: ComparedRun) -> RunComparison:
    """Raises ValueError for runs that have nothing to compare."""
    if one.directory.resolve() == other.directory.resolve():
        raise ValueError(f"{one.directory} and {other.directory} are one run; give two")
    runs, notes = (one, other), []
    layers = _layers(one, other)
    if one.shape != other.shape:
        notes.append(
            f"The models differ in shape ({_shape(one)} against {_shape(other)}): every run is taken over the layers that it "
            "audited, and no expert has a counterpart."
        )
    elif layers[0] != one.layers or layers[1] != other.layers:
        notes.append(f"Of both runs, layers {', '.join(map(str, layers[0]))} are taken, which both audited.")
    pairing = pair_documents(one, other)
    sums = [document_savings(run.directory, own, run.layers, run.seed) for run, own in zip(runs, layers, strict=True)]
    savings, costs = [], []
    for effect in (effect for effect in sums[0] if effect in sums[1]):
        sides = _sides(sums[0][effect], sums[1][effect], pairing)
        savings += _savings(effect, *sides, pairing.documents is not None, runs)
        costs.append(_cost(effect, *sides, pairing.documents is not None))
    ranks = _ranks(one, other, layers[0]) if one.shape == other.shape else []
    return RunComparison(
        runs, what_differs(one, other), layers, pairing, tuple(notes), savings, costs, ranks, _prunings(one, other)
    )


def _shape(run: ComparedRun) -> str:
    return "{} layers of {} experts".format(*run.shape)


def _layers(one: ComparedRun, other: ComparedRun) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The layers that are taken of each. Raises ValueError for two runs of models of one shape that share none."""
    if one.shape != other.shape:
        return one.layers, other.layers
    shared = tuple(layer for layer in one.layers if layer in other.layers)
    if not shared:
        raise ValueError(
            f"{one.name} audited layers {list(one.layers)} and {other.name} {list(other.layers)}: they share none. Audit one "
            "again with the --layers of the other"
        )
    return shared, shared


# --- pairing -------------------------------------------------------------------------------------------------------------


def pair_documents(one: ComparedRun, other: ComparedRun) -> Pairing:
    """Documents with the same id are the same text where the corpora have one checksum, or where their tokens agree."""
    numbers = [
        dict(zip(run.documents["id"].to_pylist(), run.documents["document"].to_pylist(), strict=True)) for run in (one, other)
    ]
    shared = [name for name in numbers[0] if name in numbers[1]]
    if not shared:
        return Pairing(None, "The runs share no document by name: they are compared unpaired, as two samples of text.")
    corpora = [run.manifest.get("corpus", {}) for run in (one, other)]
    same_text = corpora[0].get("sha256") is not None and corpora[0].get("sha256") == corpora[1].get("sha256")
    why = "whose corpora have the same checksum"
    if not same_text:
        shared, why = _with_equal_tokens(one, other, shared, numbers), "whose tokens agree as far as both runs read them"
    if len(shared) < MINIMUM_DOCUMENTS:
        return Pairing(
            None,
            f"{len(shared)} documents are the same in both runs, and pairing needs {MINIMUM_DOCUMENTS}: the runs are compared "
            "unpaired, as two samples of text.",
        )
    pairs = tuple(np.array([own[name] for name in shared]) for own in numbers)
    return Pairing((pairs[0], pairs[1]), f"Paired over {len(shared)} documents that both runs read, {why}.")


def _with_equal_tokens(one: ComparedRun, other: ComparedRun, shared: Sequence[str], numbers: list[dict[str, int]]) -> list[str]:
    paths = [run.directory / "tokens.parquet" for run in (one, other)]
    if not all(path.is_file() for path in paths):
        return []
    texts = []
    for path in paths:
        table = read_parquet(path, ["document", "token"])
        document, token = (table[name].to_numpy() for name in ("document", "token"))
        starts = np.flatnonzero(np.diff(document, prepend=-1))
        texts.append(dict(zip(document[starts].tolist(), np.split(token, starts[1:]), strict=True)))
    found = []
    for name in shared:
        own = [text.get(number[name], np.empty(0)) for text, number in zip(texts, numbers, strict=True)]
        common = min(map(len, own))
        if common and np.array_equal(own[0][:common], own[1][:common]):
            found.append(name)
    return found


# --- differences ------------------------------------------------------------------------------------------------------------


def _sides(one: DocumentSavings, other: DocumentSavings, pairing: Pairing) -> tuple[Row, Row]:
    """n, random and lowest of both, [document, criterion]; of paired runs the documents that both measured, in one order."""
    sides = [{"n": side.n, "random": side.random, "lowest": side.lowest} for side in (one, other)]
    if pairing.documents is None:
        return sides[0], sides[1]
    at = [{number: row for row, number in enumerate(side.documents.tolist())} for side in (one, other)]
    pairs = zip(*(own.tolist() for own in pairing.documents), strict=True)
    rows = np.array([(at[0][a], at[1][b]) for a, b in pairs if a in at[0] and b in at[1]]).reshape(-1, 2)
    return tuple({name: values[rows[:, i]] for name, values in side.items()} for i, side in enumerate(sides))  # type: ignore[return-value]


def _savings(effect: str, one: Row, other: Row, paired: bool, runs: tuple[ComparedRun, ComparedRun]) -> list[Row]:
    """A row for each criterion that both runs have, by falling saving of the first."""
    ratios = [Ratios(side["random"] - side["lowest"], side["random"]) for side in (one, other)]
    asked = np.flatnonzero((one["n"].sum(axis=0) > 0) & (other["n"].sum(axis=0) > 0))
    ratios = [Ratios(side.numerator[:, asked], side.denominator[:, asked]) for side in ratios]
    alone = [ratio_bootstrap(side.numerator, side.denominator) for side in ratios]
    between = ratio_differences(*ratios, paired=paired)
    outcomes = [_outcomes(run, effect) for run in runs]
    rows = []
    for number, index in enumerate(asked):
        name = tuple(CRITERIA)[index]
        row: Row = {"effect": effect, "quantity": name, "unit": "share of the random cost"}
        for side, interval in zip(("first", "second"), alone, strict=True):
            ends = (interval.estimate, interval.low, interval.high)
            row |= {f"{side}{end}": float(x[number]) for end, x in zip(("", "_low", "_high"), ends, strict=True)}
        row |= _difference(between, number)
        documents = min(len(one["n"]), len(other["n"]))
        row |= {f"outcome_{side}": own.get(name, "") for side, own in zip(("first", "second"), outcomes, strict=True)}
        rows.append(row | {"documents": documents, "verdict": _verdict(row, documents, NEGLIGIBLE_SHARE)})
    return sorted(rows, key=lambda row: -row["first"])


def _outcomes(run: ComparedRun, effect: str) -> dict[str, str]:
    rows = run.savings.to_pylist()
    return {row["ranking"]: row["outcome"] for row in rows if (row["effect"], row["layer"]) == (effect, ALL_LAYERS)}


def _cost(effect: str, one: Row, other: Row, paired: bool) -> Row:
    """The random cost of both, over the positions of the criterion that leaves out fewest."""
    ratios = []
    for run in (one, other):
        most = int(run["n"].sum(axis=0).argmax())
        ratios.append(Ratios(run["random"][:, [most]], run["n"][:, [most]]))
    row: Row = {"effect": effect, "quantity": RANDOM_COST, "unit": "nats"}
    for side, ratio in zip(("first", "second"), ratios, strict=True):
        interval = ratio_bootstrap(ratio.numerator, ratio.denominator)
        ends = (interval.estimate, interval.low, interval.high)
        row |= {f"{side}{end}": float(x[0]) for end, x in zip(("", "_low", "_high"), ends, strict=True)}
    row |= _difference(ratio_differences(*ratios, paired=paired), 0)
    documents = min(len(one["n"]), len(other["n"]))
    return row | {"outcome_first": "", "outcome_second": "", "documents": documents, "verdict": _verdict(row, documents, 0.0)}


def _difference(between: RatioDifferences, number: int) -> Row:
    columns = {
        "difference": between.estimate,
        "difference_low": between.low,
        "difference_high": between.high,
        "difference_low_together": between.low_together,
        "difference_high_together": between.high_together,
    }
    return {name: float(values[number]) for name, values in columns.items()}


def _verdict(row: Row, documents: int, bound: float) -> str:
    """By the intervals that hold for all rows of an effect at once: which is more, whether they are alike within `bound`."""
    low, high = row["difference_low_together"], row["difference_high_together"]
    if row["difference"] == 0 and np.isnan(low):
        return "the same"
    if documents < MINIMUM_DOCUMENTS or np.isnan(low):
        return "undecided"
    if low > 0 or high < 0:
        return "first more" if low > 0 else "second more"
    return "alike" if -bound <= low and high <= bound and bound > 0 else "undecided"


# --- experts and prunings ---------------------------------------------------------------------------------------------------


def _ranks(one: ComparedRun, other: ComparedRun, layers: Sequence[int]) -> list[Row]:
    """Spearman's correlation of each criterion, and of the mean effect, between the experts of the same number."""
    tables = [run.experts.sort_by([("layer", "ascending"), ("expert", "ascending")]) for run in (one, other)]
    rows = []
    for name in (*CRITERIA, "mean_delta"):
        by_layer = []
        for layer in layers:
            values = [table[name].to_numpy()[table["layer"].to_numpy() == layer].astype(float) for table in tables]
            known = ~np.isnan(values[0]) & ~np.isnan(values[1])
            pair = [x[known] for x in values]
            if known.sum() > 2 and all(np.ptp(x) > 0 for x in pair):
                by_layer.append(float(scipy.stats.spearmanr(*pair).statistic))
        if by_layer:
            ends = {"lowest": min(by_layer), "highest": max(by_layer), "layers": len(by_layer)}
            rows.append({"criterion": name, "mean": float(np.mean(by_layer)), **ends})
    return sorted(rows, key=lambda row: -row["mean"])


def _prunings(one: ComparedRun, other: ComparedRun) -> list[Row]:
    """Rankings and shares that both pruned, in the first run's order."""
    keys = ("ranking", "per", "share")
    others = {tuple(row[key] for key in keys): row for row in other.pruning()}
    rows = []
    for row in one.pruning():
        match = others.get(tuple(row[key] for key in keys))
        if match is not None and row.get("kind") != "random":
            sides = (("first", row), ("second", match))
            values = {
                f"{side}_{name}": x[name] for side, x in sides for name in ("rise", "rise_low", "rise_high", "share_of_random")
            }
            rows.append({key: row[key] for key in keys} | values)
    return rows
