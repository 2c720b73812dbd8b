"""The loss change as more and more active experts are removed at a position, in each order: progressive.csv."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import scipy
from jaxtyping import Float, Int

from hooked_moe.analysis.accumulators.histogram import Histogram
from hooked_moe.analysis.accumulators.rows import row_batches
from hooked_moe.analysis.summaries import mean_intervals
from hooked_moe.statistics import MINIMUM_PAIRS
from hooked_moe.tables import REMOVAL_ORDERS

_LEVELS = np.array([0.5, 0.95])
_KEYS = ("document", "layer", "order", "removed")


def progressive_table(path: Path) -> pa.Table:
    """One row per layer, order and number removed: mean, median and 95th percentile of delta_loss, in nats.

    Intervals are 95% and let a document's positions be alike: of the mean by bootstrap over documents, of the quantiles by
    Woodruff (1952), that is the quantiles at the ends of a clustered interval for the share of values below. The file is read
    three times and never held. Rows without a delta_loss (no next token) are left out.

    Raises ValueError for an unknown order and for a file without a single measured row.
    """
    groups, documents = _survey(path)
    n_groups = len(groups)
    histogram = Histogram(n_groups)
    count, total = (np.zeros((len(documents), n_groups)) for _ in range(2))
    for group, document, delta in _rows(path, groups, documents):
        histogram.add(group, delta)
        key = document * n_groups + group
        count += np.bincount(key, minlength=count.size).reshape(count.shape)
        total += np.bincount(key, delta, count.size).reshape(count.shape)
    quantiles = np.stack([histogram.quantiles([number], _LEVELS) for number in range(n_groups)])
    below = np.zeros((len(_LEVELS), *count.shape))
    for group, document, delta in _rows(path, groups, documents):
        key = document * n_groups + group
        for level in range(len(_LEVELS)):
            under = (delta <= quantiles[group, level]).astype(np.float64)
            below[level] += np.bincount(key, under, count.size).reshape(count.shape)

    rows = []
    for number, (layer, order, removed) in enumerate(groups):
        mean, low, high = (bound[0] for bound in mean_intervals(total[:, number : number + 1], count[:, number]))
        row: dict[str, object] = {
            "layer": layer,
            "order": REMOVAL_ORDERS[order],
            "removed": removed,
            "n_positions": int(count[:, number].sum()),
            "n_documents": int((count[:, number] > 0).sum()),
            "mean": mean,
            "mean_low": low,
            "mean_high": high,
        }
        for level, name in enumerate(("median", "p95")):
            shares = _share_interval(below[level, :, number], count[:, number], _LEVELS[level])
            ends = [np.nan, np.nan] if np.isnan(shares).any() else histogram.quantiles([number], np.clip(shares, 0, 1))
            row |= {name: quantiles[number, level], f"{name}_low": ends[0], f"{name}_high": ends[1]}
        rows.append(row)
    return pa.Table.from_pylist(rows)


def _survey(path: Path) -> tuple[list[tuple[int, int, int]], Int[np.ndarray, " document"]]:
    """The (layer, order, removed) that the file has, sorted, and its documents."""
    groups: set[tuple[int, int, int]] = set()
    documents: list[np.ndarray] = []
    for rows in row_batches(path, (*_KEYS, "delta_loss")):
        measured = ~np.isnan(rows["delta_loss"])
        keys = np.stack([rows["layer"], _order(rows["order"]), rows["removed"]], axis=1)[measured]
        groups |= {(int(layer), int(order), int(removed)) for layer, order, removed in np.unique(keys, axis=0)}
        documents.append(np.unique(rows["document"][measured]))
    if not groups:
        raise ValueError(f"{path} has no measured row")
    return sorted(groups), np.unique(np.concatenate(documents))


def _rows(
    path: Path, groups: list[tuple[int, int, int]], documents: Int[np.ndarray, " document"]
) -> Iterator[tuple[Int[np.ndarray, " row"], Int[np.ndarray, " row"], Float[np.ndarray, " row"]]]:
    """Group, document (both counted from 0) and loss change of the measured rows."""
    codes = _code(np.array(groups))
    for rows in row_batches(path, (*_KEYS, "delta_loss")):
        measured = ~np.isnan(rows["delta_loss"])
        keys = np.stack([rows["layer"], _order(rows["order"]), rows["removed"]], axis=-1)[measured]
        group = np.searchsorted(codes, _code(keys))
        yield group, np.searchsorted(documents, rows["document"][measured]), rows["delta_loss"][measured].astype(np.float32)


def _code(keys: Int[np.ndarray, "row 3"]) -> Int[np.ndarray, " row"]:
    """A number that sorts as (layer, order, removed) does."""
    layer, order, removed = keys.astype(np.int64).T
    return (layer * len(REMOVAL_ORDERS) + order) * 1024 + removed


def _order(names: np.ndarray) -> Int[np.ndarray, " row"]:
    unknown = set(np.unique(names.astype(str)).tolist()) - set(REMOVAL_ORDERS)
    if unknown:
        raise ValueError(f"progressive.parquet has order {sorted(unknown)[0]!r}; there are {', '.join(REMOVAL_ORDERS)}")
    return np.select([names == name for name in REMOVAL_ORDERS], range(len(REMOVAL_ORDERS)))


def _share_interval(
    below: Float[np.ndarray, " document"], count: Float[np.ndarray, " document"], level: float
) -> tuple[float, float]:
    """95% interval of the share of values below a quantile, around its level; clustered by document."""
    kept = count > 0
    documents = int(kept.sum())
    if documents < MINIMUM_PAIRS:
        return float("nan"), float("nan")
    share = below.sum() / count.sum()
    residual = (below - share * count)[kept]
    se = float(np.sqrt(np.sum(residual**2) * documents / (documents - 1)) / count.sum())
    reach = se * float(scipy.special.stdtrit(documents - 1, 0.975))
    return level - reach, level + reach
