"""What a console shows of two runs side by side."""

from __future__ import annotations

import textwrap

from hooked_moe.analysis.run_comparison import Row, RunComparison
from hooked_moe.report.comparison_words import headline, name_of, random_cost_sentence, verdict_text
from hooked_moe.report.number_text import DASH, share, signed

WIDTH = 100


def terminal_comparison(found: RunComparison) -> str:
    """The comparison in 100 columns: the runs, what differs, and the savings of every criterion by the realised loss."""
    first, second = found.runs
    lines = [f"first:  {first.directory}", f"second: {second.directory}", ""]
    for text in (headline(found), *found.notes, found.pairing.note, random_cost_sentence(found)):
        lines += textwrap.wrap(text, WIDTH)
    lines += ["", f"They differ in {len(found.differing)} entries of their manifests:"]
    lines += [f"  {entry}: {one} | {other}"[:WIDTH] for entry, one, other in found.differing[:12]]
    if len(found.differing) > 12:
        lines.append(f"  and {len(found.differing) - 12} more, on the page")
    lines += ["", f"  {'saved, % of the random cost':<32} {'first':<16} {'second':<16} {'difference':<14} verdict"]
    lines += [_line(row) for row in found.savings if row["effect"] == "delta_loss"]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    sides = f"{_side(row, 'first'):<16} {_side(row, 'second'):<16}"
    line = f"  {name_of(row):<32} {sides} {_between(row):<14} {verdict_text(row['verdict'])}"
    if row["outcome_first"] == row["outcome_second"]:
        return line
    return f"{line} ({row['outcome_first']}, then {row['outcome_second']})"


def _between(row: Row) -> str:
    """ "+12 [+3, +20]", in points."""
    middle, low, high = (signed(100 * row[f"difference{end}"], 0) for end in ("", "_low_together", "_high_together"))
    return middle if low == DASH else f"{middle} [{low}, {high}]"


def _side(row: Row, side: str) -> str:
    low, high = (share(row[f"{side}_{end}"]).removesuffix("%") for end in ("low", "high"))
    return f"{share(row[side])} [{low}, {high}]"
