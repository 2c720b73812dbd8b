"""The cells as a table for a console."""

from collections.abc import Sequence

from hooked_moe.analysis.cells import CONTROL, POPULATIONS, Cell
from hooked_moe.analysis.criteria import PAPER_CRITERIA
from hooked_moe.analysis.rankings import RANKINGS
from hooked_moe.report.number_text import p_value
from hooked_moe.report.outcome_words import PROTOCOL_WORDS

WIDTH = 100


def terminal_table(cells: Sequence[Cell]) -> str:
    """The cells in 100 columns: the paper's criteria and the control in numbers by layer, the other rankings in marks."""
    lines = []
    for scope in dict.fromkeys(cell.scope for cell in cells):
        lines += _scope_lines(scope, [cell for cell in cells if cell.scope == scope])
    lines.append(" ".join(f"{words.mark} {words.name};" for words in PROTOCOL_WORDS.values()).rstrip(";"))
    return "\n".join(lines) + "\n"


def _scope_lines(scope: str, cells: Sequence[Cell]) -> list[str]:
    populations = [name for name in POPULATIONS if any(cell.population == name for cell in cells)]
    by_key = {(cell.population, cell.ranking, cell.layer): cell for cell in cells}
    titles = {name: _population_title([cell for cell in cells if cell.population == name]) for name in populations}
    layers = sorted({cell.layer for cell in cells})
    columns = f"{'d':>6} {'95% interval':<16} {'p_t':>7} {'p_W':>7}   "
    lines = [
        f"Removing the highest- against the lowest-ranked active expert (scope {scope})",
        "        " + " | ".join(f"{titles[name]:<42}" for name in populations).rstrip(),
        "  layer " + " | ".join(columns for _ in populations).rstrip(),
    ]
    for ranking in (*PAPER_CRITERIA, CONTROL):
        lines.append(ranking + (" (control: the token's own)" if ranking == CONTROL else ""))
        for layer in layers:
            parts = " | ".join(_terminal_cell(by_key[name, ranking, layer]) for name in populations)
            lines.append(f"  {layer:>5} {parts}".rstrip())
    lines.append(f"other rankings, a mark for each layer ({titles[populations[-1]]})")
    for ranking in RANKINGS:
        if ranking not in (*PAPER_CRITERIA, CONTROL):
            marks = " ".join(PROTOCOL_WORDS[by_key[populations[-1], ranking, layer].outcome].mark for layer in layers)
            lines.append(f"  {ranking:<24} {marks}"[:WIDTH])
    return lines


def _terminal_cell(cell: Cell) -> str:
    mark = PROTOCOL_WORDS[cell.outcome].mark
    if cell.outcome == "refused":
        return f"{'refused, see cells.csv':<40} {mark}"
    interval = f"[{cell.d_position_low:+.3f},{cell.d_position_high:+.3f}]"
    return f"{cell.d_position:+6.3f} {interval:<16} {p_value(cell.p_t):>7} {p_value(cell.p_wilcoxon):>7} {mark}"


def _population_title(cells: Sequence[Cell]) -> str:
    n = max((cell.n for cell in cells), default=0)
    return f"{n} sampled positions" if cells[0].population == "sample" else f"all positions, by document (n={n})"
