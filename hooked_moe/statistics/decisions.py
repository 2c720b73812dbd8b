"""The rules that turn statistics into words, each one function applied to every cell alike."""

from typing import Literal

import numpy as np

from hooked_moe.statistics.multiplicity import bonferroni
from hooked_moe.statistics.paired import PairedT, SignedRank
from hooked_moe.statistics.tost import Equivalence

Outcome = Literal["positive", "negative", "tests_disagree", "not_detected"]
Verdict = Literal["valid", "equivalent", "undecided", "reversed"]


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


def verdict(outcome: Outcome, equivalence: Equivalence) -> Verdict:
    """What a cell may be said to show.

    "equivalent": the 90% interval of the effect lies inside the bound, so the ranking is as good as none, however small
    the p of a test against exactly 0. Otherwise the agreement rule speaks: "valid" where it finds the ranking right,
    "reversed" where it finds it the wrong way round, and "undecided" where the data allow neither conclusion.
    """
    if equivalence.equivalent:
        return "equivalent"
    if outcome == "positive":
        return "valid"
    return "reversed" if outcome == "negative" else "undecided"
