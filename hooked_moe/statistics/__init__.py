"""Inference for the audit: tests, effect sizes, corrections, equivalence, Bayes factors, and what rankings can explain.

Pure functions of numpy arrays. Where a statistic is undefined on well-formed data (too few pairs or documents, no
variance) they raise `DegenerateSample`, for malformed data ValueError. The unit of evidence is the document: positions
of one document are alike, so whatever has `document` or `cluster` among its arguments allows for that. How often each rule
errs on data whose truth is known is in benchmarks/CALIBRATION.md.
"""

from hooked_moe.statistics.bayes_factor import jzs_bf10, jzs_directional
from hooked_moe.statistics.choice_model import (
    ChoiceFit,
    DocumentScores,
    PlackettLuce,
    fit_choices,
    leave_one_document_out,
    plackett_luce,
    standardised,
)
from hooked_moe.statistics.decisions import (
    NEGLIGIBLE_SHARE,
    Outcome,
    SavingOutcome,
    Verdict,
    agreement,
    saving_outcome,
    verdict,
)
from hooked_moe.statistics.effect_size import (
    ClusteredEffect,
    EffectSize,
    clustered_dz,
    clustered_dz_from_sums,
    cohens_dz,
    dz_interval,
)
from hooked_moe.statistics.multiplicity import benjamini_hochberg, bonferroni, holm
from hooked_moe.statistics.paired import PairedT, SignedRank, paired_t, wilcoxon_signed_rank
from hooked_moe.statistics.permutation import PermutationTest, permutation_test
from hooked_moe.statistics.power import minimal_detectable_d, minimum_documents, power_paired_t
from hooked_moe.statistics.rank_correlation import (
    correlation_of_ranks,
    spearman_of_ranks,
    twice_centred_ranks,
    within_position_ranks,
    within_position_spearman,
)
from hooked_moe.statistics.resampling import (
    BootstrapInterval,
    RatioInterval,
    SignFlip,
    cluster_bootstrap,
    ratio_bootstrap,
    sign_flip_max_t,
)
from hooked_moe.statistics.samples import MINIMUM_PAIRS, DegenerateSample, paired_differences
from hooked_moe.statistics.shrinkage import ShrunkMeans, shrunk_means
from hooked_moe.statistics.stacking import Stacking, stacking_weights
from hooked_moe.statistics.static_ceiling import StaticCeiling, StaticShare
from hooked_moe.statistics.tost import Equivalence, equivalence, equivalence_dz, tost_paired

__all__ = [
    "MINIMUM_PAIRS",
    "NEGLIGIBLE_SHARE",
    "BootstrapInterval",
    "ChoiceFit",
    "ClusteredEffect",
    "DegenerateSample",
    "DocumentScores",
    "EffectSize",
    "Equivalence",
    "Outcome",
    "PairedT",
    "PermutationTest",
    "PlackettLuce",
    "RatioInterval",
    "SavingOutcome",
    "ShrunkMeans",
    "SignFlip",
    "SignedRank",
    "Stacking",
    "StaticCeiling",
    "StaticShare",
    "Verdict",
    "agreement",
    "benjamini_hochberg",
    "bonferroni",
    "cluster_bootstrap",
    "clustered_dz",
    "clustered_dz_from_sums",
    "cohens_dz",
    "correlation_of_ranks",
    "dz_interval",
    "equivalence",
    "equivalence_dz",
    "fit_choices",
    "holm",
    "jzs_bf10",
    "jzs_directional",
    "leave_one_document_out",
    "minimal_detectable_d",
    "minimum_documents",
    "paired_differences",
    "paired_t",
    "permutation_test",
    "plackett_luce",
    "power_paired_t",
    "ratio_bootstrap",
    "saving_outcome",
    "shrunk_means",
    "sign_flip_max_t",
    "spearman_of_ranks",
    "stacking_weights",
    "standardised",
    "tost_paired",
    "twice_centred_ranks",
    "verdict",
    "wilcoxon_signed_rank",
    "within_position_ranks",
    "within_position_spearman",
]
