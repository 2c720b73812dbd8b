"""Cells as text: the marks and words for verdicts, shared with the page, and a console's table."""

from collections.abc import Sequence

from hooked_moe.analysis.cells import CONTROL, POPULATIONS, Cell
from hooked_moe.analysis.criteria import PAPER_CRITERIA
from hooked_moe.analysis.rankings import RANKINGS
from hooked_moe.report.number_text import MINUS, p_value

VERDICTS = {
    "valid": ("+", "high matters more"),
    "reversed": (MINUS, "high matters less"),
    "equivalent": ("=", "as good as none"),
    "undecided": ("?", "undecided"),
    "refused": ("x", "refused"),
}
WIDTH = 100


def terminal_table(cells: Sequence[Cell]) -> str:
    """The cells for a console of 100 columns: the paper's criteria and the control line by line, the other rankings in marks."""
    lines = []
    for scope in dict.fromkeys(cell.scope for cell in cells):
        here = [cell for cell in cells if cell.scope == scope]
        shown = [name for name in POPULATIONS if any(cell.population == name for cell in here)]
        found = {(cell.population, cell.ranking, cell.layer): cell for cell in here}
        titles = {name: _population_title([cell for cell in here if cell.population == name]) for name in shown}
        layers = sorted({cell.layer for cell in here})
        lines.append(f"Removing the highest- against the lowest-ranked active expert (scope {scope})")
        lines.append("        " + " | ".join(f"{titles[name]:<42}" for name in shown).rstrip())
        columns = f"{'d':>6} {'95% interval':<16} {'p_t':>7} {'p_W':>7}   "
        lines.append("  layer " + " | ".join(columns for _ in shown).rstrip())
        for ranking in (*PAPER_CRITERIA, CONTROL):
            lines.append(ranking + (" (control: the token's own)" if ranking == CONTROL else ""))
            for layer in layers:
                parts = " | ".join(_terminal_cell(found[name, ranking, layer]) for name in shown)
                lines.append(f"  {layer:>5} {parts}".rstrip())
        lines.append(f"other rankings, a mark for each layer ({titles[shown[-1]]})")
        for ranking in RANKINGS:
            if ranking not in (*PAPER_CRITERIA, CONTROL):
                marks = " ".join(VERDICTS[found[shown[-1], ranking, layer].verdict][0] for layer in layers)
                lines.append(f"  {ranking:<24} {marks}"[:WIDTH])
    lines.append(" ".join(f"{mark} {text};" for mark, text in VERDICTS.values()).rstrip(";"))
    return "\n".join(lines) + "\n"


def _terminal_cell(cell: Cell) -> str:
    mark = VERDICTS[cell.verdict][0]
    if cell.verdict == "refused":
        return f"{'refused, see cells.csv':<40} {mark}"
    interval = f"[{cell.d_position_low:+.3f},{cell.d_position_high:+.3f}]"
    return f"{cell.d_position:+6.3f} {interval:<16} {p_value(cell.p_t):>7} {p_value(cell.p_wilcoxon):>7} {mark}"


def _population_title(cells: Sequence[Cell]) -> str:
    n = max((cell.n for cell in cells), default=0)
    return f"{n} sampled positions" if cells[0].population == "sample" else f"all positions, by document (n={n})"
