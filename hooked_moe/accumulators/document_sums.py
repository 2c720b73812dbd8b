"""Sums of a document's positions, and the effect size over single positions that follows from them, clustered by document."""

from dataclasses import dataclass

import numpy as np
import scipy.special
from jaxtyping import Float, Int

from hooked_moe.statistics import MINIMUM_PAIRS, DegenerateSample, EffectSize


class Documents:
    """The documents of a corpus, in order: where each one's sums go."""

    def __init__(self, ids: Int[np.ndarray, " document"]) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def split(self, document: Int[np.ndarray, " P"]) -> tuple[Int[np.ndarray, " here"], Int[np.ndarray, " here"]]:
        """For the sorted documents of a chunk's positions: which documents these are, and where each one's positions start."""
        starts = np.flatnonzero(np.concatenate([[True], document[1:] != document[:-1]])) if len(document) else np.zeros(0, int)
        return np.searchsorted(self.ids, document[starts]), starts


def document_sums(
    values: Float[np.ndarray, "P *columns"], starts: Int[np.ndarray, " here"]
) -> Float[np.ndarray, "here *columns"]:
    """Sums over the positions of each document of a chunk, which begin at `starts`."""
    return np.add.reduceat(values, starts, axis=0, dtype=np.float64)


@dataclass(frozen=True)
class DifferenceSums:
    """Of each document: positions, sum and sum of squares of a difference over them."""

    count: Float[np.ndarray, " document"]
    total: Float[np.ndarray, " document"]
    squares: Float[np.ndarray, " document"]

    def means(self) -> Float[np.ndarray, " document"]:
        """Of the documents that have positions."""
        kept = self.count > 0
        return self.total[kept] / self.count[kept]


def clustered_effect_size(sums: DifferenceSums, confidence: float = 0.95) -> EffectSize:
    """Mean over standard deviation (ddof=1) of the differences over single positions, with a clustered interval.

    The same numbers as `statistics.clustered_dz` from each document's sums alone: delete-one-document jackknife, t interval
    with documents - 1 degrees of freedom; `n` counts the documents that have positions.

    Raises DegenerateSample with fewer than three documents, no variance, or one document that holds all but one position.
    """
    kept = sums.count > 0
    count = sums.count[kept]
    documents = len(count)
    if documents < MINIMUM_PAIRS:
        raise DegenerateSample(f"{documents} documents; a clustered interval needs at least {MINIMUM_PAIRS}")
    if (count.sum() - count).min() < 2:
        raise DegenerateSample("leaving one document out leaves fewer than two positions; there is no jackknife")
    centre = sums.total.sum() / count.sum()
    first = sums.total[kept] - centre * count  # about the mean: leaving a document out then subtracts small numbers
    second = sums.squares[kept] - 2 * centre * sums.total[kept] + centre**2 * count
    sd = np.sqrt(second.sum() / (count.sum() - 1))
    if not sd > 1e-12 * abs(centre):
        raise DegenerateSample(f"all {count.sum():.0f} differences equal {centre:g}; without variance there is no test")
    n = count.sum() - count
    mean = (first.sum() - first) / n
    variance = ((second.sum() - second) - n * mean**2) / (n - 1)
    left_out = (mean + centre) / np.sqrt(variance)
    d = float(centre / sd)
    error = np.sqrt((documents - 1) / documents * np.sum((left_out - left_out.mean()) ** 2))
    reach = float(error * scipy.special.stdtrit(documents - 1, (1 + confidence) / 2))
    return EffectSize(d, d - reach, d + reach, documents)
