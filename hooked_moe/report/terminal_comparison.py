"""What a console shows of two runs side by side."""

from __future__ import annotations

import textwrap

from hooked_moe.analysis.run_comparison import Row, RunComparison
from hooked_moe.report.comparison_words import headline, name_of, random_cost_sentence, verdict_text
from hooked_moe.report.number_text import share, signed

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
    lines += ["", f"  {'saved, % of the random cost':<34} {'first':<16} {'second':<16} difference [together]   outcome"]
    lines += [_line(row) for row in found.savings if row["effect"] == "delta_loss"]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    ends = [f"{row[f'difference_{end}_together']:+.0%}".rstrip("%") for end in ("low", "high")]
    between = f"{signed(100 * row['difference'], 0)} [{', '.join(ends)}]".replace("-", "\N{MINUS SIGN}").replace("[nan, nan]", "")
    outcomes = row["outcome_first"] if row["outcome_first"] == row["outcome_second"] else ""
    changed = outcomes or f"{row['outcome_first']} -> {row['outcome_second']}"
    line = (
        f"  {name_of(row):<34} {_side(row, 'first'):<16} {_side(row, 'second'):<16} {between:<19} {verdict_text(row['verdict'])}"
    )
    return f"{line}; {changed}" if outcomes == "" else line


def _side(row: Row, side: str) -> str:
    low, high = (share(row[f"{side}_{end}"]).removesuffix("%") for end in ("low", "high"))
    return f"{share(row[side])} [{low}, {high}]"
