"""What follows from a run: about fixed criteria, about fixed rankings in general, and about per-token scores."""

import math

from hooked_moe.report.figures.names import label
from hooked_moe.report.inputs import Inputs
from hooked_moe.report.number_text import share, signed
from hooked_moe.report.readings import FIXED, best_fixed, ceiling_reading, known_mean, verdict_cells


def conclude(inputs: Inputs) -> list[str]:
    """A sentence on each, where the tables allow one."""
    return [sentence for sentence in (_on_criteria(inputs), _on_rankings(inputs), _on_tokens(inputs)) if sentence]


def _on_criteria(inputs: Inputs) -> str:
    cells = verdict_cells(inputs, FIXED)
    decided = [row for row in cells if row["verdict"] != "refused"]
    if not decided:
        return "Inference over the fixed criteria was refused: measure more documents before concluding." if cells else ""
    counts = {name: sum(row["verdict"] == name for row in decided) for name in ("valid", "reversed", "equivalent", "undecided")}
    bound = f"d = {decided[0]['equivalence_bound']:g}"
    if counts["undecided"] > len(decided) / 2:
        return (
            f"Most cells ({counts['undecided']} of {len(decided)}) are undecided: these data neither show that the criteria "
            f"predict nor that their effect lies within {bound}. More documents would decide."
        )
    if not counts["valid"]:
        text = (
            "No statistic fixed for the corpus tells which active expert matters at a token: "
            f"in {counts['equivalent']} of {len(decided)} cells the effect is shown to lie within {bound}"
        )
        return text + (f", {counts['reversed']} point the wrong way." if counts["reversed"] else ".")
    best = max(decided, key=lambda row: -math.inf if math.isnan(row["d_position"]) else row["d_position"])
    text = (
        f"Fixed statistics predict in {counts['valid']} of {len(decided)} cells, strongest in layer {best['layer']} "
        f"({label(best['ranking'])}, d = {signed(best['d_position'], 2)}); in {counts['equivalent']} the effect is shown to lie "
        f"within {bound}"
    )
    return text + (f", and {counts['reversed']} point the wrong way." if counts["reversed"] else ".")


def _on_rankings(inputs: Inputs) -> str:
    reading = ceiling_reading(inputs)
    if reading is None:
        return ""
    near = not math.isnan(reading.oracle_share) and reading.best_share >= 0.5 * reading.oracle_share
    misses = (
        f"{label(reading.best)} already takes much of what a fixed ranking can give"
        if near
        else "the criteria miss most of what a fixed ranking can give, so a better fixed ranking is possible"
    )
    if reading.ceiling < 0.05:
        return (
            f"A fixed ranking can say little here: at most {share(reading.ceiling)} of the variance within a position is between "
            f"experts. Of that, {misses}."
        )
    return f"A fixed ranking could explain {share(reading.ceiling)} of the variance within a position; {misses}."


def _on_tokens(inputs: Inputs) -> str:
    best = best_fixed(inputs)
    scores: dict[str, list[float]] = {}
    for row in verdict_cells(inputs, ("token",)):
        scores.setdefault(row["ranking"], []).append(row["spearman"])
    means = {name: known_mean(values) for name, values in scores.items()}
    means = {name: value for name, value in means.items() if not math.isnan(value)}
    if not best or not means:
        return ""
    top = max(means, key=means.__getitem__)
    if means[top] <= best[1]:
        return f"Per-token scores order the active experts no better than {label(best[0])} does."
    return (
        f"To tell which expert matters at a token, ask the token: its {label(top)} orders the active experts best "
        f"({signed(means[top], 3)} against {signed(best[1], 3)} for the best fixed criterion)."
    )
