"""Two runs side by side in sentences, alike on the page and on a console."""

from __future__ import annotations

import math

from hooked_moe.analysis.run_comparison import Row, RunComparison
from hooked_moe.report.figures.names import label
from hooked_moe.report.number_text import enumeration, interval, nats, share, signed

_VERDICTS = {
    "first more": "first saves more",
    "second more": "second saves more",
    "alike": "alike",
    "the same": "the same",
    "undecided": "undecided",
}


def verdict_text(verdict: str) -> str:
    return _VERDICTS[verdict]


def name_of(row: Row) -> str:
    return label(row["quantity"])


def realised(found: RunComparison) -> list[Row]:
    return [row for row in found.savings if row["effect"] == "delta_loss"]


def headline(found: RunComparison) -> str:
    """What the comparison establishes, in a sentence."""
    rows = realised(found)
    if rows and all(row["verdict"] == "the same" for row in rows):
        return "Every criterion saves exactly the same in both runs."
    parts = []
    for verdict, words in (("first more", "save more in the first run"), ("second more", "save more in the second")):
        own = [row for row in rows if row["verdict"] == verdict]
        if own:
            most = max(own, key=lambda row: abs(row["difference"]))
            parts.append(f"{len(own)} of {len(rows)} criteria {words} (most: {name_of(most)}, {_points(most)})")
    alike = sum(row["verdict"] == "alike" for row in rows)
    if alike:
        parts.append(f"{alike} save alike, within a tenth of the random cost")
    left = sum(row["verdict"] == "undecided" for row in rows)
    if not parts:
        return f"No criterion is shown to save more in one run than in the other; {left} of {len(rows)} are undecided."
    return f"{enumeration(parts)}; {left} are undecided." if left else f"{enumeration(parts)}."


def _points(row: Row) -> str:
    return f"{share(row['first'])} against {share(row['second'])}"


def random_cost_sentence(found: RunComparison) -> str:
    """How the cost of a random removal compares."""
    row = found.costs[0]
    costs = f"{nats(row['first'])} nats in the first run and {nats(row['second'])} in the second"
    if row["difference"] == 0:
        costs = f"{nats(row['first'])} nats in both runs"
    elif not math.isnan(row["difference_low"]):
        between = interval(row["difference_low"], row["difference_high"], 4)
        costs += f": a difference of {signed(row['difference'], 4)} {between}"
    text = f"Removing an active expert at random costs {costs}"
    vocabularies = {run.manifest["model"]["config"].get("d_vocab") for run in found.runs}
    return (
        f"{text}; their vocabularies differ, so a nat per token is not the same in both." if len(vocabularies) > 1 else f"{text}."
    )


def outcome_changes(found: RunComparison) -> list[str]:
    """ "REAP (helps, then undecided)"."""
    rows = [row for row in realised(found) if row["outcome_first"] != row["outcome_second"]]
    return [f"{name_of(row)} ({row['outcome_first']}, then {row['outcome_second']})" for row in rows]
