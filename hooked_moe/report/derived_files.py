"""The derived tables that the report reads: what each answers, its columns, and the command that measures it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DerivedFile:
    """What a derived table answers, the columns that the report reads, and the command that measures it."""

    about: str
    columns: tuple[str, ...]
    command: str


def _interval(*names: str) -> tuple[str, ...]:
    """The columns of estimates and of the ends of their intervals."""
    return tuple(f"{name}{end}" for name in names for end in ("", "_low", "_high"))


_AUDIT = "hooked-moe audit --model {model}"
_PRUNE = "hooked-moe prune --model {model}"

DERIVED_FILES = {
    "savings.csv": DerivedFile(
        "what one saves by removing the expert that a criterion ranks for pruning first",
        (
            *("effect", "layer", "ranking", "family", "direction", "n_documents", "n_positions"),
            *("random_cost", "lowest_cost", "highest_cost"),
            *_interval("saving", "saving_share"),
            *("mean_layer_share", "contrast_share", "share_of_best", "z", "p", "p_family", "outcome"),
            *_interval("within_slot_contrast"),
            "slot_share",
            *_interval("spearman"),
            "note",
        ),
        _AUDIT,
    ),
    "pruning.csv": DerivedFile(
        "what pruning for good costs, beside what the effect table predicts",
        (
            *("ranking", "per", "share", "n_documents"),
            *_interval("rise"),
            *("random_rise", "share_of_random"),
            *_interval("predicted"),
            "kind",
        ),
        _PRUNE,
    ),
    "pruning_summary.csv": DerivedFile(
        "how well the effect table predicts what a pruning costs",
        ("share", "population", "spearman", "ratio", "coverage"),
        _PRUNE,
    ),
    "cells.csv": DerivedFile(
        "what the paper's protocol says of each ranking of experts",
        (
            *("scope", "population", "family", "ranking", "layer", "n", "n_positions", "n_undefined", "n_tests", "alpha"),
            *_interval("d_position"),
            *("p_t", "p_wilcoxon", "p_max_t", "outcome", "power_at_d02", "minimal_detectable_d", "note"),
        ),
        _AUDIT,
    ),
    "reread.csv": DerivedFile(
        "what the paper's released raw data say when they are read in nats",
        (
            *("model", "metric", "n_paragraphs", "high", "low"),
            *_interval("difference"),
            *("p_sign_flip", "p_t"),
        ),
        "hooked-moe compare --reread",
    ),
    "layers.csv": DerivedFile(
        "how large the effect of one removal is",
        ("layer", "slot", "n_removals", "mean_delta", "mean_abs_delta", "share_positive", "mean_gap_norm"),
        _AUDIT,
    ),
    "slots.csv": DerivedFile(
        "how the effect falls with the expert's rank by routing weight",
        ("layer", "slot", "n_removals", *_interval("mean_delta")),
        _AUDIT,
    ),
    "slot_distribution.csv": DerivedFile(
        "how the effects of a rank are distributed", ("slot", "statistic", "level", "nats"), _AUDIT
    ),
    "experts.parquet": DerivedFile("the mean effect of every expert", ("layer", "expert", "n_removals", "mean_delta"), _AUDIT),
    "domains.csv": DerivedFile("how the effect differs between kinds of text", ("domain",), _AUDIT),
    "ceiling.csv": DerivedFile(
        "how much any fixed ranking of experts could explain",
        ("layer", "family", "criterion", "share_of_variance", "se", "share_of_ceiling", "ceiling", "ceiling_se"),
        _AUDIT,
    ),
    "ceiling_kl.csv": DerivedFile(
        "how much of the variance of expected effects any fixed ranking could explain",
        ("layer", "family", "criterion", "share_of_variance", "se", "share_of_ceiling", "ceiling", "ceiling_se"),
        _AUDIT,
    ),
    "bayes.csv": DerivedFile(
        "which criterion best predicts the order of effects in documents left out",
        (
            *("family", "criterion", "pl_beta", "pl_sd", "pl_log_bf10", "lodo_score", "stacking_weight", "note"),
            *("n_positions_used", "n_positions_available"),
        ),
        _AUDIT,
    ),
    "scopes.csv": DerivedFile(
        "what changes when the expert is removed from the whole sequence",
        ("layer", "mean_abs_position", "mean_abs_sequence", "mean_abs_gap", "correlation", "same_sign"),
        f"{_AUDIT} --scope both",
    ),
    "progressive.csv": DerivedFile(
        "what removing several experts at one token does",
        ("layer", "order", "removed", "n_positions", *_interval("mean", "median", "p95")),
        "hooked-moe progressive --model {model}",
    ),
    "redistribution.csv": DerivedFile(
        "whether the remaining experts make up for the removed one",
        (
            *("layer", "n_experts", "mean_gap_norm", "mean_compensation"),
            *_interval("rho_weight_gap", "rho_weight_norm", "rho_gap_compensation", "rho_gap_alignment"),
        ),
        "hooked-moe redistribution --model {model}",
    ),
}

SAMPLE_FILES = {
    "budgeted.csv": DerivedFile(
        "what is estimated from a sample of the removals, and how surely",
        (
            *("effect", "kind", "layer", "name", "estimate", "sampling_low", "sampling_high", "low", "high"),
            "n_drawn",
        ),
        f"{_AUDIT} --budget 1%",
    ),
}
"""What budgeted runs alone have: no other run lacks it."""
