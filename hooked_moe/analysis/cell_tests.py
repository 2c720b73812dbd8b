"""From sums over positions to the statistics of a cell."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float

from hooked_moe import statistics
from hooked_moe.analysis.accumulators.contrasts import ContrastSums, Picked
from hooked_moe.analysis.cell import Cell
from hooked_moe.analysis.rankings import corrected_together


def sample_cell(blank: Cell, picked: Picked) -> Cell:
    """Each sampled position is a pair, taken for independent of the others."""
    kept = ~picked.undefined
    cell = replace(
        blank,
        n_positions=int(kept.sum()),
        n_undefined=int(picked.undefined.sum()),
        n_ties=int((picked.tied & kept).sum()),
    )
    cell = _tested(cell, picked.high[kept], picked.low[kept])
    if cell.outcome == "refused":
        return cell
    return replace(cell, d_position=cell.d_z, d_position_low=cell.d_z_low, d_position_high=cell.d_z_high)


def document_cell(blank: Cell, sums: ContrastSums) -> Cell:
    """Pairs are averaged within a document, and the documents are tested."""
    kept = sums.n > 0
    n = sums.n[kept]
    cell = replace(
        blank,
        n=len(n),
        n_positions=int(n.sum()),
        n_undefined=int(sums.n_undefined.sum()),
        n_ties=int(sums.n_tied.sum()),
    )
    needed = statistics.minimum_documents(cell.n_tests, cell.alpha)
    if len(n) < needed:
        left_out = f" ({cell.n_undefined} positions left out for an undefined score)" if cell.n_undefined else ""
        note = f"{len(n)} documents{left_out}; tests over documents at {cell.alpha:g}/{cell.n_tests} need at least {needed}"
        return replace(cell, note=note)
    cell = _tested(cell, sums.high[kept] / n, sums.low[kept] / n)
    if cell.outcome == "refused":
        return cell
    try:
        single = statistics.clustered_dz_from_sums(n, (sums.high - sums.low)[kept], sums.square[kept])
    except statistics.DegenerateSample as reason:
        return replace(blank, n=cell.n, n_positions=cell.n_positions, n_undefined=cell.n_undefined, note=str(reason))
    cell = replace(
        cell,
        d_position=single.d,
        d_position_low=single.low,
        d_position_high=single.high,
        # they are of a d over documents, and would be read as of the d over positions that stands beside them
        power_at_d02=np.nan,
        minimal_detectable_d=np.nan,
    )
    return _with_slopes(cell, sums)


def _tested(cell: Cell, high: Float[np.ndarray, " unit"], low: Float[np.ndarray, " unit"]) -> Cell:
    """Fill in everything that one cell's pairs determine; outcome "refused" where they determine nothing."""
    cell = replace(cell, n=len(high))
    try:
        t_test, ranks = statistics.paired_t(high, low), statistics.wilcoxon_signed_rank(high, low)
        size = statistics.cohens_dz(high, low)
    except statistics.DegenerateSample as reason:
        return replace(cell, note=str(reason))
    level = cell.alpha / cell.n_tests
    return replace(
        cell,
        mean_high=float(high.mean()),
        mean_low=float(low.mean()),
        mean_difference=t_test.mean_difference,
        sd_difference=t_test.sd_difference,
        d_z=size.d,
        d_z_low=size.low,
        d_z_high=size.high,
        t=t_test.t,
        p_t=t_test.p,
        p_wilcoxon=ranks.p,
        n_zero=ranks.n_zero,
        outcome=statistics.agreement(t_test, ranks, cell.n_tests, cell.alpha),
        power_at_d02=statistics.power_paired_t(0.2, t_test.n, level),
        minimal_detectable_d=statistics.minimal_detectable_d(t_test.n, level),
    )


def _with_slopes(cell: Cell, sums: ContrastSums) -> Cell:
    """Bayes factors of the documents' least-squares slopes of loss change on score, both centred at each position."""
    sloped = sums.score_square > 0
    slope = sums.cross[sloped] / sums.score_square[sloped]
    try:
        t_test = statistics.paired_t(slope, np.zeros_like(slope))
    except statistics.DegenerateSample:
        return cell
    return replace(
        cell,
        bf10=statistics.jzs_bf10(t_test.t, t_test.n),
        bf_directional=statistics.jzs_directional(t_test.t, t_test.n),
    )


# --- what takes all cells of a family together -----------------------------------------------------------------------


def with_corrections(cells: Sequence[Cell]) -> list[Cell]:
    """Adjusted p-values within each population and family of tests, over all layers."""
    result = list(cells)
    for members in _grouped(cells, lambda cell: (cell.population, corrected_together(cell.ranking))).values():
        for test in ("p_t", "p_wilcoxon"):
            raw = np.array([getattr(cells[i], test) for i in members])
            adjusted = {
                f"{test}_bonferroni": statistics.bonferroni(raw, len(members)),
                f"{test}_holm": statistics.holm(raw, len(members)),
            }
            if test == "p_t":
                adjusted["p_t_bh"] = statistics.benjamini_hochberg(raw, len(members))
            for number, i in enumerate(members):
                values: dict[str, Any] = {name: float(p[number]) for name, p in adjusted.items()}
                result[i] = replace(result[i], **values)
    return result


def with_sign_flips(cells: Sequence[Cell], sums: Sequence[ContrastSums], seed: int) -> list[Cell]:
    """p_max_t of the cells that were not refused; `sums` are theirs, one for one."""
    result = list(cells)
    for members in _grouped(cells, lambda cell: corrected_together(cell.ranking)).values():
        tested = [i for i in members if cells[i].outcome != "refused"]
        if not tested:
            continue
        with np.errstate(invalid="ignore"):  # NaN where a document has no pair
            difference = np.stack([(sums[i].high - sums[i].low) / sums[i].n for i in tested], axis=1)
        flips = statistics.sign_flip_max_t(difference, seed=seed)
        for i, p in zip(tested, flips.p_max, strict=True):
            result[i] = replace(result[i], p_max_t=float(p))
    return result


def with_spearman(cells: Sequence[Cell], sums: Sequence[ContrastSums], seed: int) -> list[Cell]:
    """Within-position rank correlations with bootstrap intervals, of the cells that were not refused."""
    result = list(cells)
    present = [one.n_spearman > 0 for one in sums]
    tested = [i for i, cell in enumerate(cells) if cell.outcome != "refused" and present[i].any()]
    for members in _grouped(tested, lambda i: present[i].tobytes()).values():  # resampled together: the same documents
        here = [tested[number] for number in members]
        kept = present[here[0]]
        means = np.stack([sums[i].spearman[kept] / sums[i].n_spearman[kept] for i in here], axis=1)
        varied = np.ptp(means, axis=0) > 1e-9
        if kept.sum() < statistics.MINIMUM_PAIRS or not varied.any():
            continue
        interval = statistics.cluster_bootstrap(means[:, varied], seed=seed)
        for number, i in enumerate(np.array(here)[varied]):
            values = (float(bound[number]) for bound in (interval.estimate, interval.low, interval.high))
            mean, low, high = values
            result[i] = replace(result[i], spearman=mean, spearman_low=low, spearman_high=high)
    return result


def _grouped(items: Sequence[Any], key: Callable[[Any], Hashable]) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i, item in enumerate(items):
        groups[key(item)].append(i)
    return groups
