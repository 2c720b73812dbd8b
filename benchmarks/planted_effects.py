"""Synthetic effect tables whose truth is known: heavy tails, documents that are alike within, rankings that see or do not.

Loss changes are made of
    hardness      t with 5 degrees of freedom, what raises the loss twice as large as what lowers it, less the mean of that, times
                  exp(0.8 N) per position (most tokens barely move), times exp(0.25 N) per
                  document and layer (some texts move more);
    favours       what a document adds to an expert, whatever the token: positions of a document are alike by it. Its mean over
                  documents is 0, so no ranking is right about it;
    experts       what an expert adds everywhere, if anything: what a fixed ranking could know;
    the planted   effect x (rank within the position, -1/2 to 1/2), for the first ranking of a layer.
Rankings are fixed scores per expert, all blind but for what is planted. The three constants put tails and clustering where
the shipped models have them: kurtosis of the paired differences around 100, and a variance of document means that is up to
1.8 times that of independent positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import gamma

TAIL, HARDNESS, MOOD, SKEW = 5, 0.8, 0.25, 2.0
_MEAN_SIZE = 2 * np.sqrt(TAIL) * gamma((TAIL + 1) / 2) / (np.sqrt(np.pi) * (TAIL - 1) * gamma(TAIL / 2))  # of |t|
SKEW_MEAN = (SKEW - 1) / 2 * _MEAN_SIZE
NOISE_VARIANCE = ((SKEW**2 + 1) / 2 * TAIL / (TAIL - 2) - SKEW_MEAN**2) * np.exp(2 * HARDNESS**2) * np.exp(2 * MOOD**2)
FAVOUR_VARIANCE = 0.07 * NOISE_VARIANCE
SLOTS, EXPERTS = 4, 16


@dataclass(frozen=True)
class PlantedTable:
    document: np.ndarray  # [position]
    expert: np.ndarray  # [layer, position, slot]
    score: np.ndarray  # [layer, ranking, expert]
    delta: np.ndarray  # [layer, position, slot]
    effect: (
        np.ndarray
    )  # [layer, ranking]: true d over positions of highest against lowest; NaN where neither planted nor blind for sure
    static_share: np.ndarray  # [layer]: true share of the centred variance that experts explain

    def scores(self, layer: int, ranking: int) -> np.ndarray:
        """[position, slot]"""
        return self.score[layer, ranking][self.expert[layer]]


def planted_table(
    random: np.random.Generator,
    documents: int,
    effects: Sequence[float],
    *,
    tokens: int = 40,
    rankings: int = 4,
    static_spread: float = 0.0,
) -> PlantedTable:
    """One layer per effect. `static_spread` is the standard deviation of what experts add everywhere, noise being 1."""
    layers, positions = len(effects), documents * tokens
    document = np.repeat(np.arange(documents), tokens)
    popularity = np.linspace(1.5, -1.5, EXPERTS)
    liking = popularity + random.gumbel(size=(layers, positions, EXPERTS))
    expert = np.argpartition(-liking, SLOTS, axis=2)[..., :SLOTS]
    score = random.permuted(np.tile(np.arange(EXPERTS, dtype=float), (layers, rankings, 1)), axis=2)

    noise = random.standard_t(TAIL, (layers, positions, SLOTS))
    noise = np.where(noise > 0, SKEW * noise, noise) - SKEW_MEAN
    noise *= np.exp(HARDNESS * random.normal(size=(layers, positions, 1)))
    noise *= np.exp(MOOD * random.normal(size=(layers, documents, 1)))[:, document]
    favour = np.sqrt(FAVOUR_VARIANCE) * random.normal(size=(layers, documents, EXPERTS))
    static = static_spread * np.sqrt(NOISE_VARIANCE) * random.normal(size=(layers, EXPERTS))
    layer = np.arange(layers)[:, None, None]
    delta = noise + favour[layer, document[:, None], expert] + static[layer, expert]

    # the highest and the lowest of k are 1 apart in rank, so the effect is their mean difference
    own = score[layer, 0, expert]
    rank = own.argsort(axis=2).argsort(axis=2) / (SLOTS - 1) - 0.5
    variance = FAVOUR_VARIANCE + NOISE_VARIANCE
    size = np.asarray(effects, float) * np.sqrt(2 * variance)
    delta += size[:, None, None] * rank

    truth = np.full((layers, rankings), np.nan)
    if static_spread == 0:
        truth[:, 0] = effects
        truth[np.asarray(effects) == 0] = 0.0
    seen = static[layer, expert]
    between = np.square(seen - seen.mean(axis=2, keepdims=True)).mean(axis=(1, 2))
    return PlantedTable(document, expert, score, delta, truth, between / (between + variance * (SLOTS - 1) / SLOTS))
