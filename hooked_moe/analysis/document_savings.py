"""What following each criterion saves in every document of a run: the sums behind savings.csv, to be paired with another's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from hooked_moe.analysis.accumulators.documents import Documents, sums_from
from hooked_moe.analysis.accumulators.effect_sums import EFFECTS, effect_columns
from hooked_moe.analysis.accumulators.savings import at_slot, extremes
from hooked_moe.analysis.criteria import CRITERIA
from hooked_moe.analysis.orders import UNDEFINED, oriented, pruning_ranks
from hooked_moe.analysis.rankings import criterion_values
from hooked_moe.tables import read_parquet
from hooked_moe.tables.effect_grid import EffectGrid, effect_chunks


@dataclass(frozen=True)
class DocumentSavings:
    """Sums over the positions of a document, in the layers asked for together. Arrays are [document, criterion]."""

    effect: str
    documents: Int[np.ndarray, " document"]
    """Their numbers in the run."""
    criteria: tuple[str, ...]
    n: Float[np.ndarray, "document criterion"]
    """Positions, those of every layer counted, where the criterion ranks all active experts."""
    random: Float[np.ndarray, "document criterion"]
    """Effects of removing one of them at random, nats."""
    lowest: Float[np.ndarray, "document criterion"]
    """Effects of removing the one that the criterion prunes first."""


def document_savings(run: Path, layers: tuple[int, ...], audited: tuple[int, ...], seed: int) -> dict[str, DocumentSavings]:
    """By effect, as far as the run has it. `audited` are the layers of savings.csv and `seed` is its seed: both decide ties."""
    documents = Documents(np.unique(read_parquet(run / "documents.parquet", ["document"])["document"].to_numpy()))
    sums: dict[str, np.ndarray] = {}  # [n, random, lowest; document; criterion]
    names = tuple(CRITERIA)
    ranks: dict[tuple[str, int], np.ndarray] | None = None
    for chunk in effect_chunks(run / "effects.parquet", ("expert", "delta_loss", "kl")):
        measured = chunk.measured()
        if ranks is None:
            ranks = _ranks(run, audited, seed)
            sums = {effect: np.zeros((3, len(documents), len(names))) for effect in effect_columns(measured)}
        _add(sums, measured, documents, layers, names, ranks)
    here = {effect: np.flatnonzero(values[0].any(axis=1)) for effect, values in sums.items()}
    return {
        effect: DocumentSavings(effect, documents.ids[here[effect]], names, *sums[effect][:, here[effect]])
        for effect in EFFECTS
        if effect in sums
    }


def _ranks(run: Path, audited: tuple[int, ...], seed: int) -> dict[tuple[str, int], Int[np.ndarray, " expert"]]:
    """Pruning ranks by (criterion, layer), as the audit has them: drawn ties are those of the layer's place in it.

    UNDEFINED throughout a layer whose removed experts the criterion does not tell apart.
    """
    table = read_parquet(run / "experts.parquet")
    order = np.lexsort((table["expert"].to_numpy(), table["layer"].to_numpy()))
    layer_of, removals = (table[name].to_numpy()[order] for name in ("layer", "n_removals"))
    ranks = {}
    for name, by_layer in criterion_values(table).items():
        turned = oriented(by_layer, CRITERIA[name].direction == "prune highest")
        for axis, layer in enumerate(audited):
            score = turned[layer]
            known = score[(removals[layer_of == layer] > 0) & ~np.isnan(score)]
            tells = len(known) > 0 and np.ptp(known) > 0
            ranks[name, layer] = pruning_ranks(score, (seed, axis)) if tells else np.full(len(score), UNDEFINED)
    return ranks


def _add(
    sums: dict[str, np.ndarray],
    measured: EffectGrid,
    documents: Documents,
    layers: tuple[int, ...],
    names: tuple[str, ...],
    ranks: dict[tuple[str, int], Int[np.ndarray, " expert"]],
) -> None:
    """A chunk's measured positions."""
    if not len(measured.document):
        return
    here, starts = documents.split(measured.document)
    columns = effect_columns(measured)
    for layer in layers:
        at = measured.layer_axis(layer)
        expert = np.ascontiguousarray(measured.expert[:, at].T)
        effects = {name: np.ascontiguousarray(columns[name][:, at].T) for name in sums}
        means = {name: effect.mean(axis=0, dtype=np.float64) for name, effect in effects.items()}
        for number, name in enumerate(names):
            keys = ranks[name, layer][expert]
            first, _, kept = extremes(keys)
            for effect, values in effects.items():
                parts = np.stack([np.ones(len(kept)), means[effect], at_slot(values, first).astype(np.float64)]) * kept
                sums[effect][:, here, number] += sums_from(parts.T, starts).T
