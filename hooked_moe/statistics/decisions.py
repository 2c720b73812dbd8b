"""The rules that turn statistics into words, each one function applied to every cell alike."""

from typing import Literal

import numpy as np

from hooked_moe.statistics.multiplicity import bonferroni
from hooked_moe.statistics.paired import PairedT, SignedRank

Outcome = Literal["positive", "negative", "tests_disagree", "not_detected"]
Verdict = Literal["valid", "undecided", "reversed"]
SavingOutcome = Literal["helps", "harms", "negligible", "undecided"]

NEGLIGIBLE_SHARE = 0.1
"""A tenth of what removing an active expert at random costs: a criterion that saves less is not worth following."""


def agreement(t_test: PairedT, wilcoxon: SignedRank, n_tests: int, alpha: float = 0.05) -> Outcome:
    """The one decision rule, for every cell alike: both tests pass at alpha / n_tests, and point the same way.

    "positive": the expert ranked high matters more when removed. "negative": it matters less. "tests_disagree": one
    test passes alone, or both pass with opposite signs. "not_detected": neither passes, which is no evidence of absence
    (see `minimal_detectable_d`).
    """
    passes = [bool(bonferroni(np.array([p]), n_tests)[0] <= alpha) for p in (t_test.p, wilcoxon.p)]
    if not any(passes):
        return "not_detected"
    if not all(passes) or t_test.sign != wilcoxon.sign:
        return "tests_disagree"
    return "positive" if t_test.sign > 0 else "negative"


def verdict(outcome: Outcome) -> Verdict:
    """The paper's protocol in a word: "valid" where the agreement rule finds the ranking right, "reversed" where it finds it
    the wrong way round, and "undecided" where it finds neither, which is no evidence of absence."""
    if outcome == "positive":
        return "valid"
    return "reversed" if outcome == "negative" else "undecided"


def saving_outcome(low: float, high: float, p: float, bound: float = NEGLIGIBLE_SHARE, alpha: float = 0.05) -> SavingOutcome:
    """What a criterion may be said to do, by its saving as a share of the cost of removing an active expert at random.

    `low` and `high` are the ends of the saving's 95% interval over documents, `p` that of the permutation over experts, corrected
    for the criteria shown; NaN where a ranking has none (per-token scores), and then the interval decides alone.

    "helps": the whole interval lies above `bound`, and scores dealt at random would not do as well. "harms": the same below minus
    the bound. "negligible": the whole interval lies within the bound on either side, so that following the criterion
    changes the cost by less than that share. "undecided": the rest. More documents of one kind narrow the interval around one
    number: they can turn "undecided" into any of the others, but "helps" into "negligible" only if it was wrong.
    """
    if np.isnan(low) or np.isnan(high):
        return "undecided"
    shown = np.isnan(p) or p <= alpha
    if low > bound and shown:
        return "helps"
    if high < -bound and shown:
        return "harms"
    return "negligible" if -bound <= low and high <= bound else "undecided"
