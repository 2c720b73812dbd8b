"""How much variance of the effects could any number per expert explain, and how much do the criteria: ceiling.csv,
ceiling_kl.csv."""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from hooked_moe.analysis.criteria import CRITERIA
from hooked_moe.analysis.rankings import ORACLE, criterion_values, family_of, is_measured
from hooked_moe.statistics import DegenerateSample, StaticCeiling, StaticShare
from hooked_moe.tables.effect_grid import TableOrPath


def ceiling_table(layers: Sequence[int], ceilings: Sequence[StaticCeiling], criteria: TableOrPath) -> pa.Table:
    """One row per layer and list of scores: its share of the variance of the effect between a position's active experts.

    `ceiling` is the largest share that any number per expert could have, by least squares: a ceiling of explained variance. It
    is not what the best ranking saves, which savings.csv has: where tails are heavy, a few removals hold the variance. "oracle"
    is the least squares of other documents. All shares are cross-fitted over documents, with jackknife errors over the folds
    (`statistics.StaticCeiling`). Numbers are NaN, and `note` says why, where there are none.
    """
    values = criterion_values(criteria)
    rows = []
    for layer, sums in zip(layers, ceilings, strict=True):
        ceiling, why_no_ceiling = _share(sums.ceiling)
        for name in (*CRITERIA, ORACLE):
            score = None if name == ORACLE else values[name][layer]
            share, note = _share(sums.oracle if score is None else functools.partial(sums.share, score))
            if score is not None and not is_measured(name, score):
                note = f"not measured: this run has no {CRITERIA[name].measured_in}"
            rows.append(
                {
                    "layer": layer,
                    "family": family_of(name),
                    "criterion": name,
                    "share_of_variance": share.share,
                    "se": share.se,
                    "share_of_ceiling": share.of_ceiling,
                    "share_of_ceiling_se": share.of_ceiling_se,
                    "ceiling": ceiling.share,
                    "ceiling_se": ceiling.se,
                    "slope": share.slope,
                    "n_undefined": share.n_undefined,
                    "note": note or why_no_ceiling,
                }
            )
    return pa.Table.from_pylist(rows)


def _share(compute: Callable[[], StaticShare]) -> tuple[StaticShare, str]:
    try:
        return compute(), ""
    except DegenerateSample as reason:
        return StaticShare(*(np.nan,) * 5, n_undefined=0), str(reason)
