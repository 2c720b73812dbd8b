"""From a measured run to its tables and one self-contained page.

    analyse_run(run_dir, n_experts=...)   effects.parquet -> experts.parquet, cells.csv, layers.csv, positions.csv, ...
    write_report(run_dir)                 those files and manifest.json -> report.html and figures/
    terminal_table(cells)                 the same cells for a console

Everything is a function of the files in the run directory: nothing depends on the clock, so a rerun gives the same
bytes. What a run lacks (a manifest, documents, the sequence scope) the page names as absent.
"""

import base64
import functools
import html
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hooked_moe import figures, tables
from hooked_moe.cells import (
    CONTROL,
    LAYER_COLUMNS,
    POPULATIONS,
    Cell,
    audit_cells,
    cells_from_table,
    cells_table,
    frozen_positions,
    layer_summary,
)
from hooked_moe.criteria import CRITERIA, expert_criteria
from hooked_moe.statistics import DegenerateSample, clustered_dz
from hooked_moe.tables import EffectGrid, read_effects, write_csv_atomic, write_parquet_atomic

Directory = str | os.PathLike[str]

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
OUTCOMES = {
    "positive": ("+", "high matters more"),
    "negative": (MINUS, "high matters less"),
    "tests_disagree": ("?", "tests disagree"),
    "not_detected": ("·", "not detected"),
    "refused": ("x", "refused"),
}


# --- analysis --------------------------------------------------------------------------------------------------------


def analyse_run(
    run_dir: Directory,
    *,
    n_experts: int,
    layers: Sequence[int] | None = None,
    n_positions: int = 200,
    seed: int = 42,
) -> list[Cell]:
    """Derive every table of a run from its effects.parquet and return the cells.

    Writes experts.parquet, cells.csv, layers.csv and positions.csv (the frozen sample), and domains.csv and scopes.csv
    where documents.parquet and effects_sequence.parquet are there. `n_experts` counts the routed experts of a layer, so
    that those never selected have their row. `layers` restricts the cells, not the other tables.

    Raises FileNotFoundError without effects.parquet, ValueError for whatever `audit_cells` refuses.
    """
    run = Path(run_dir)
    path = _required(run, "effects.parquet", "the measurement writes it")
    grid = read_effects(path)
    if grid.expert.max() >= n_experts:
        raise ValueError(f"{path} has expert {grid.expert.max()}, but the model has {n_experts} experts")
    experts = expert_criteria(path, n_experts=n_experts, layers=grid.layers)
    cells = audit_cells(grid, experts, layers, n_positions, seed)
    sequence = _sequence_grid(run, grid)
    if sequence is not None:
        cells += audit_cells(sequence, experts, layers, n_positions, seed, scope="sequence")
        write_csv_atomic(scope_summary(grid, sequence), run / "scopes.csv")
    write_parquet_atomic(experts, run / "experts.parquet")
    write_csv_atomic(cells_table(cells), run / "cells.csv")
    write_csv_atomic(layer_summary(grid), run / "layers.csv")
    write_csv_atomic(frozen_positions(grid, n_positions, seed), run / "positions.csv")
    if (run / "documents.parquet").exists():
        write_csv_atomic(domain_summary(grid, run), run / "domains.csv")
    return cells


def _required(run: Path, name: str, origin: str) -> Path:
    if not (run / name).is_file():
        raise FileNotFoundError(f"{run / name} does not exist; {origin}")
    return run / name


def _sequence_grid(run: Path, grid: EffectGrid) -> EffectGrid | None:
    path = run / "effects_sequence.parquet"
    return grid.with_effects_of(read_effects(path, columns=("expert", "delta_loss"))) if path.is_file() else None


def scope_summary(position: EffectGrid, sequence: EffectGrid) -> pa.Table:
    """Per layer: removal at the token alone against removal at every token of the sequence, over the same rows (nats)."""
    rows = []
    for axis, layer in enumerate(position.layers):
        alone = position.delta_loss[position.valid, axis].ravel().astype(np.float64)
        everywhere = sequence.delta_loss[sequence.valid, axis].ravel().astype(np.float64)
        rows.append(
            {
                "layer": layer,
                "mean_abs_position": np.abs(alone).mean(),
                "mean_abs_sequence": np.abs(everywhere).mean(),
                "mean_abs_gap": np.abs(everywhere - alone).mean(),
                "correlation": np.corrcoef(alone, everywhere)[0, 1] if np.ptp(alone) and np.ptp(everywhere) else np.nan,
                "same_sign": np.mean(np.sign(alone) == np.sign(everywhere)),
            }
        )
    return pa.Table.from_pylist(rows)


def domain_summary(grid: EffectGrid, run: Path) -> pa.Table:
    """Per domain: documents, positions, baseline loss, effect of a removal, and the routing-weight contrast.

    `top_minus_bottom` is delta_loss of slot 0 minus that of the last slot, averaged over layers at each position, in
    nats; `d_position` its ratio to the standard deviation over positions, with a 95% interval clustered by document.
    """
    documents = pq.read_table(run / "documents.parquet", use_threads=False).to_pylist()
    names = {row["document"]: row["domain"] for row in documents}
    unknown = sorted(set(np.unique(grid.document).tolist()) - set(names))
    if unknown:
        raise ValueError(f"documents.parquet lacks document {unknown[0]} of the effect table ({len(unknown)} lacking)")
    loss = _baseline_loss(run / "tokens.parquet", names)
    document = grid.document[grid.valid]
    delta = grid.delta_loss[grid.valid]
    domain = np.array([names[int(one)] for one in document])
    rows = []
    for name in sorted(set(domain.tolist())):
        here = domain == name
        values = delta[here].astype(np.float64)
        contrast = (values[..., 0] - values[..., -1]).mean(axis=1)
        try:
            size = clustered_dz(contrast, document[here])
            d, low, high = size.d, size.low, size.high
        except DegenerateSample:
            d = low = high = np.nan
        rows.append(
            {
                "domain": name,
                "n_documents": len(np.unique(document[here])),
                "n_positions": int(here.sum()),
                "baseline_loss": loss.get(name, np.nan),
                "mean_delta": values.mean(),
                "mean_abs_delta": np.abs(values).mean(),
                "top_minus_bottom": contrast.mean(),
                "d_position": d,
                "d_position_low": low,
                "d_position_high": high,
            }
        )
    return pa.Table.from_pylist(rows)


def _baseline_loss(path: Path, domains: dict[int, str]) -> dict[str, float]:
    """Mean loss of the intact model per domain, in nats, over every token with a next one; empty without tokens.parquet."""
    if not path.is_file():
        return {}
    table = pq.read_table(path, columns=["document", "target", "baseline_loss"], use_threads=False)
    document, target, loss = (column.to_numpy() for column in table.columns)
    kept = target >= 0
    found, index = np.unique(document[kept], return_inverse=True)
    count, total = np.bincount(index), np.bincount(index, loss[kept])
    named = np.array([domains.get(int(one), "") for one in found])
    return {name: float(total[named == name].sum() / count[named == name].sum()) for name in set(named.tolist())}


# --- console -----------------------------------------------------------------------------------------------------------


def terminal_table(cells: Sequence[Cell]) -> str:
    """The cells for a console of 100 columns: one line per ranking and layer, the populations side by side."""
    lines = []
    for scope in dict.fromkeys(cell.scope for cell in cells):
        here = [cell for cell in cells if cell.scope == scope]
        shown = [name for name in POPULATIONS if any(cell.population == name for cell in here)]
        found = {(cell.population, cell.ranking, cell.layer): cell for cell in here}
        titles = {name: _population_title([cell for cell in here if cell.population == name]) for name in shown}
        lines.append(f"Removing the highest- against the lowest-ranked active expert (scope {scope})")
        lines.append("        " + " | ".join(f"{titles[name]:<42}" for name in shown).rstrip())
        columns = f"{'d':>6} {'95% interval':<16} {'p_t':>7} {'p_W':>7}   "
        lines.append("  layer " + " | ".join(columns for _ in shown).rstrip())
        for ranking in (*CRITERIA, CONTROL):
            layers = sorted({cell.layer for cell in here if cell.ranking == ranking})
            lines.append(ranking + (" (control: the token's own)" if ranking == CONTROL else ""))
            for layer in layers:
                parts = " | ".join(_terminal_cell(found[name, ranking, layer]) for name in shown)
                lines.append(f"  {layer:>5} {parts}".rstrip())
    lines.append(" ".join(f"{mark} {text};" for mark, text in OUTCOMES.values()).rstrip(";"))
    return "\n".join(lines) + "\n"


def _terminal_cell(cell: Cell) -> str:
    mark = OUTCOMES[cell.outcome][0]
    if cell.outcome == "refused":
        return f"{'refused, see cells.csv':<40} {mark}"
    interval = f"[{cell.d_position_low:+.3f},{cell.d_position_high:+.3f}]"
    return f"{cell.d_position:+6.3f} {interval:<16} {_p(cell.p_t):>7} {_p(cell.p_wilcoxon):>7} {mark}"


def _population_title(cells: Sequence[Cell]) -> str:
    n = max((cell.n for cell in cells), default=0)
    return f"{n} sampled positions" if cells[0].population == "sample" else f"all positions, by document (n={n})"


def _p(p: float) -> str:
    if np.isnan(p):
        return DASH
    return f"{p:.3f}" if p >= 0.001 else (f"{p:.0e}" if p >= 1e-99 else "<1e-99")


# --- page --------------------------------------------------------------------------------------------------------------


def write_report(run_dir: Directory) -> Path:
    """Write report.html and figures/ from the files of an analysed run; returns the page's path.

    Raises FileNotFoundError that names the step to run where effects.parquet, experts.parquet, cells.csv or layers.csv
    is missing.
    """
    run = Path(run_dir)
    grid = read_effects(_required(run, "effects.parquet", "the measurement writes it"))
    origin = "analyse_run writes it from effects.parquet"
    experts = pq.read_table(_required(run, "experts.parquet", origin), use_threads=False)
    cells = cells_from_table(tables.read_csv(_required(run, "cells.csv", origin), cells_table([]).schema))
    layers = tables.read_csv(_required(run, "layers.csv", origin))
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8")) if (run / "manifest.json").is_file() else None

    drawings = _drawings(grid, experts, cells, layers, _noise_floor(manifest))
    (run / "figures").mkdir(exist_ok=True)
    pictures = [drawing.save(run / "figures") for drawing in drawings]
    sections = [
        _headline(grid, cells, layers, manifest),
        *(_figure(i + 1, *pair) for i, pair in enumerate(zip(drawings, pictures, strict=True))),
        *_cell_sections(cells),
        _optional_section("By domain", run / "domains.csv", DOMAIN_NOTE, "documents.parquet"),
        _optional_section("One token or the whole sequence", run / "scopes.csv", SCOPE_NOTE, "effects_sequence.parquet"),
        _verification(manifest),
        _manifest(manifest),
        _definitions(experts.schema),
    ]
    title = html.escape(f"Removing one expert at one token: {_model_name(manifest)}")
    page = PAGE.format(title=title, style=STYLE, body="\n".join(sections))
    tables.write_text_atomic(page, run / "report.html")
    return run / "report.html"


def _drawings(
    grid: EffectGrid, experts: pa.Table, cells: Sequence[Cell], layers: pa.Table, noise_floor: float | None
) -> list[figures.Drawing]:
    n_experts = int(experts.column("expert").to_numpy().max()) + 1
    position = [cell for cell in cells if cell.scope == "position"]
    few = f"grey: fewer than {figures.MINIMUM_REMOVALS} removals"
    return [
        figures.Drawing(
            "effect_size",
            "Does the ranking point at the expert that matters?",
            "Standardised difference in loss change between removing the active expert that a ranking puts highest and the "
            "one it puts lowest, over single positions, by layer. Grey: criteria fixed for the whole corpus; vermillion: "
            "the routing weight of the very token. Bands are 95% intervals: for the sample exact if positions were "
            "independent, for all positions by jackknife over documents. Dashed: the size that the sample detects with 80% "
            "power after correction.",
            figures.effect_size_numbers(position),
            figures.draw_effect_size,
        ),
        figures.Drawing(
            "removal_effect",
            "What removing one expert does, by layer",
            "First the change of the next token's loss, absolute and signed; then how far the removal moves the block's "
            "output. Thin lines are the slots, thick ones all slots together.",
            layers,
            figures.draw_removal_effect,
        ),
        figures.Drawing(
            "slots",
            "Distribution of the loss change by slot",
            "All layers together. Boxes run from the 25th to the 75th percentile with the median in white, whiskers to "
            "the 5th and 95th, diamonds at the mean. Tails: share of removals that change the loss by more than x, either way.",
            figures.slot_numbers(grid),
            functools.partial(figures.draw_slots, noise_floor=noise_floor),
        ),
        figures.Drawing(
            "experts",
            "Mean effect of every expert",
            "Mean loss change from removing an expert, over the tokens that select it. Orange: the model is worse without "
            f"it; purple: better; {few}. The scale is clipped at the 98th percentile.",
            figures.expert_numbers(grid, n_experts),
            figures.draw_experts,
        ),
    ]


def _noise_floor(manifest: dict[str, Any] | None) -> float | None:
    value = ((manifest or {}).get("noise_floor") or {}).get("max_abs_nats")
    return float(value) if isinstance(value, int | float) and value > 0 else None


def _model_name(manifest: dict[str, Any] | None) -> str:
    return str(((manifest or {}).get("model") or {}).get("name") or "unnamed model")


TITLES = {"sample": "The sampled positions", "all": "Every position, documents as the unit"}


def _headline(grid: EffectGrid, cells: Sequence[Cell], layers: pa.Table, manifest: dict[str, Any] | None) -> str:
    """What was measured and found, in words."""
    rows = [row for row in layers.to_pylist() if row["slot"] == -1]
    removals = sum(row["n_removals"] for row in rows)
    mean, size, share = (
        sum(row[name] * row["n_removals"] for row in rows) / removals
        for name in ("mean_delta", "mean_abs_delta", "share_positive")
    )
    measured = (
        f"At {int(grid.valid.sum()):,} positions of {len(np.unique(grid.document)):,} documents, each of the {grid.n_slots} "
        f"active experts was removed at that token alone, in {len(rows)} layers of <b>{html.escape(_model_name(manifest))}</b>: "
        f"{removals:,} removals. One changes the loss of the next token by {size:.4f} nats on average; "
        f"{share:.0%} of them make it worse (mean {_signed(mean, 4)})."
    )
    floor = _noise_floor(manifest)
    if floor:
        above = np.mean(np.abs(grid.delta_loss[grid.valid]) > floor)
        measured += f" The average is {size / floor:,.0f} times the noise floor, and {above:.1%} of the removals exceed it."
    found = []
    position = [cell for cell in cells if cell.scope == "position"]
    for population in POPULATIONS:
        here = [cell for cell in position if cell.population == population]
        if not here:
            continue
        if all(cell.outcome == "refused" for cell in here):
            found.append(f"<li>{TITLES[population]}: every cell was refused ({html.escape(here[0].note)}).</li>")
            continue
        fixed, control = ([cell for cell in here if (cell.ranking == CONTROL) is wanted] for wanted in (False, True))
        name = (
            f"On {max(cell.n for cell in here)} sampled positions"
            if population == "sample"
            else f"Over all positions, with {max(cell.n for cell in here)} documents as the unit"
        )
        text = (
            f"{name}, a fixed criterion picks the expert that matters more in <b>{_passed(fixed)}</b> criterion &times; "
            f"layer cells; the token's own routing weight does in <b>{_passed(control)}</b> layers{_against(here)}."
        )
        tested = [cell for cell in fixed if cell.outcome != "refused"]
        if population == "sample" and tested:
            text += (
                f" Such a cell detects an effect of d = 0.2 with probability {tested[0].power_at_d02:.2f} and needs "
                f"d = {tested[0].minimal_detectable_d:.3f} for 0.8: its silence is no evidence of absence."
            )
        found.append(f"<li>{text}</li>")
    return f'<div class="headline"><p>{measured}</p><ul>{"".join(found)}</ul></div>'


def _passed(cells: Sequence[Cell]) -> str:
    return f"{sum(cell.outcome == 'positive' for cell in cells)} of {len(cells)}"


def _against(cells: Sequence[Cell]) -> str:
    """The remaining outcomes, where there are any: they are part of the finding."""
    counts = {name: sum(cell.outcome == name for cell in cells) for name in ("negative", "tests_disagree", "refused")}
    words = {"negative": "point the wrong way", "tests_disagree": "split the two tests", "refused": "were refused"}
    said = [f"{count} {words[name]}" for name, count in counts.items() if count]
    return f" (of all {len(cells)} cells, {', '.join(said)})" if said else ""


def _figure(number: int, drawing: figures.Drawing, picture: bytes) -> str:
    wide, narrow = (base64.b64encode(svg).decode() for svg in (picture, drawing.render("svg", narrow=True)["svg"]))
    kind = "data:image/svg+xml;base64,"
    return (
        f'<figure id="{drawing.name}"><h2>{html.escape(drawing.title)}</h2><picture>'
        f'<source media="(max-width: 600px)" srcset="{kind}{narrow}"><img src="{kind}{wide}" '
        f'alt="{html.escape(drawing.caption)}"></picture>'
        f"<figcaption><b>Figure {number}.</b> {html.escape(drawing.caption)} "
        f"Numbers: <code>figures/{drawing.name}.csv</code>.</figcaption></figure>"
    )


CELL_COLUMNS = ("layer", "d", "95% interval", "p_t", "p_W", "outcome", "high", "low", "high \N{MINUS SIGN} low", "t", "n")


def _cell_sections(cells: Sequence[Cell]) -> Iterable[str]:
    for scope in dict.fromkeys(cell.scope for cell in cells):
        for population in POPULATIONS:
            here = [cell for cell in cells if (cell.scope, cell.population) == (scope, population)]
            if here:
                title = f"Cells: {TITLES[population].lower()}" + (
                    "" if scope == "position" else f" (removed in the whole {scope})"
                )
                yield f"<section><h2>{title}</h2><p>{_cell_note(here)}</p>{_cell_table(here)}</section>"


def _cell_note(cells: Sequence[Cell]) -> str:
    families = " and ".join(
        f"{alpha:g}/{tests} for {name}"
        for name, alpha, tests in dict.fromkeys(
            ("the control" if cell.ranking == CONTROL else "the criteria", cell.alpha, cell.n_tests) for cell in cells
        )
    )
    undefined = sum(cell.n_undefined for cell in cells)
    left_out = f" {undefined} positions were left out for an undefined criterion (column n_undefined)." if undefined else ""
    unit = (
        "A pair is one position."
        if cells[0].population == "sample"
        else "A pair is one document (differences averaged within it); d is over single positions, its interval clustered."
    )
    return (
        f"Loss change (nats) with the highest- and with the lowest-ranked active expert removed. {unit} The outcome needs the "
        f"t-test and Wilcoxon's test to pass at the Bonferroni level ({families}) with one sign.{left_out} More columns, "
        "Holm's correction and power: <code>cells.csv</code>."
    )


def _cell_table(cells: Sequence[Cell]) -> str:
    rows = []
    for i, cell in enumerate(cells):
        if i == 0 or cells[i - 1].ranking != cell.ranking:
            name = ("control: the token's own " if cell.ranking == CONTROL else "") + cell.ranking.replace("_", " ")
            rows.append(f'<tr class="group"><th colspan="{len(CELL_COLUMNS)}">{name}</th></tr>')
        if cell.outcome == "refused":
            reason = f'<td colspan="{len(CELL_COLUMNS) - 2}" class="word">refused: {html.escape(cell.note)}</td>'
            rows.append(f"<tr><td>{cell.layer}</td>{reason}<td>{cell.n}</td></tr>")
            continue
        first = [
            str(cell.layer),
            _signed(cell.d_position, 3),
            f"[{_signed(cell.d_position_low, 3)}, {_signed(cell.d_position_high, 3)}]",
            _p(cell.p_t),
            _p(cell.p_wilcoxon),
        ]
        outcome = f'<td class="word"><span class="{cell.outcome}">{OUTCOMES[cell.outcome][1]}</span></td>'
        last = [_signed(value, 4) for value in (cell.mean_high, cell.mean_low, cell.mean_difference)]
        last += [_signed(cell.t, 2), str(cell.n)]
        before, after = ("".join(f"<td>{value}</td>" for value in values) for values in (first, last))
        rows.append(f"<tr>{before}{outcome}{after}</tr>")
    return _table(CELL_COLUMNS, rows, "cells")


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", MINUS)


def _table(columns: Iterable[str], rows: Iterable[str], kind: str = "") -> str:
    head = "".join(f"<th>{name}</th>" for name in columns)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


DOMAIN_NOTE = (
    "Top minus bottom: loss change without the highest-weight expert minus without the lowest-weight one, averaged over "
    "layers (nats); d position: its size over single positions, with a 95% interval clustered by document."
)
SCOPE_NOTE = (
    "The same removals, made at the token alone and at every token of the sequence; both read at the same position (nats)."
)


def _optional_section(title: str, path: Path, note: str, source: str) -> str:
    if not path.is_file():
        return f'<section><h2>{title}</h2><p class="absent">Absent: this run has no {source}.</p></section>'
    table = tables.read_csv(path)
    rows = ["<tr>" + "".join(f"<td>{_value(value)}</td>" for value in row.values()) + "</tr>" for row in table.to_pylist()]
    columns = (name.replace("_", " ") for name in table.column_names)
    return f"<section><h2>{title}</h2><p>{note}</p>{_table(columns, rows, 'plain')}</section>"


def _value(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return html.escape(str(value))
    if isinstance(value, int):
        return f"{value:,}"
    if np.isnan(value):
        return DASH
    return f"{value:.4f}" if value == 0 or 0.001 <= abs(value) < 1000 else f"{value:.2e}"


def _verification(manifest: dict[str, Any] | None) -> str:
    checks = (manifest or {}).get("verification")
    floor = (manifest or {}).get("noise_floor")
    parts = ["<section><h2>Verification and noise floor</h2>"]
    if checks:
        rows = []
        for check in checks:
            passed = check.get("passed")
            word = "not run" if passed is None else ("passed" if passed else "FAILED")
            cells = (check.get("name", ""), word, check.get("value"), check.get("threshold"), check.get("detail", ""))
            rows.append("<tr>" + "".join(f"<td>{_value(DASH if x is None else x)}</td>" for x in cells) + "</tr>")
        parts.append(_table(("check", "result", "value", "threshold", "detail"), rows))
    else:
        parts.append('<p class="absent">Absent: the manifest records no verification.</p>')
    if floor:
        parts.append("<p>Noise floor: the loss change of a removal that removes nothing, under another batch composition.</p>")
        parts.append(_pairs(floor))
    else:
        parts.append('<p class="absent">Absent: the manifest records no noise floor.</p>')
    return "".join(parts) + "</section>"


def _manifest(manifest: dict[str, Any] | None) -> str:
    body = (
        '<p class="absent">Absent: this run has no manifest.json.</p>'
        if manifest is None
        else _pairs({key: value for key, value in manifest.items() if key not in ("verification", "noise_floor")})
    )
    return f"<section><h2>Manifest</h2>{body}</section>"


def _pairs(value: dict[str, Any]) -> str:
    """A nested dictionary as dotted names and values."""
    rows = []

    def walk(prefix: str, node: Any) -> None:
        if isinstance(node, dict) and node:
            for key, inner in node.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            text = node if isinstance(node, str) else json.dumps(node, ensure_ascii=False)
            rows.append(f"<tr><td>{html.escape(prefix)}</td><td>{html.escape(text)}</td></tr>")

    walk("", value)
    return f'<div class="scroll"><table class="pairs"><tbody>{"".join(rows)}</tbody></table></div>'


def _definitions(experts: pa.Schema) -> str:
    """Every column of every file, from the schemas that the files are written with."""
    layers = [pa.field(name, pa.null(), metadata={"unit": u, "meaning": m}) for name, (u, m) in LAYER_COLUMNS.items()]
    files = {
        "effects.parquet": list(tables.EFFECTS),
        "effects_sequence.parquet": list(tables.EFFECTS_SEQUENCE),
        "tokens.parquet": list(tables.TOKENS),
        "documents.parquet": list(tables.DOCUMENTS),
        "experts.parquet": list(experts),
        "cells.csv": list(cells_table([]).schema),
        "layers.csv": layers,
    }
    parts = ["<section><h2>What the columns mean</h2>"]
    for name, columns in files.items():
        rows = []
        for column in columns:
            metadata = {key.decode(): text.decode() for key, text in (column.metadata or {}).items()}
            cells = (column.name, metadata.get("unit", ""), metadata.get("meaning", ""))
            rows.append("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in cells) + "</tr>")
        parts.append(f"<h3>{name}</h3>" + _table(("column", "unit", "meaning"), rows, "words"))
    return "".join(parts) + "</section>"


STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: #fff; color: #1a1a1a;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
h3 { font-size: .95rem; margin: 1.2rem 0 .3rem; font-family: ui-monospace, Menlo, Consolas, monospace; }
p { max-width: 46rem; }
section, figure { margin: 2.6rem 0 0; }
.headline { font-size: 1.1rem; border-left: .25rem solid #D55E00; padding-left: .9rem; }
.headline p { margin: 0; } .headline ul { margin: .7rem 0 0; padding-left: 1.2rem; max-width: 45rem; }
.absent { color: #666; font-style: italic; }
picture, img { display: block; width: 100%; height: auto; }
figcaption { font-size: .88rem; color: #444; margin-top: .4rem; max-width: 52rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .18rem .55rem; text-align: right; white-space: nowrap; }
th { border-bottom: 1.5px solid #333; font-weight: 600; }
tbody tr:last-child td { border-bottom: 1px solid #999; }
th:first-child, td:first-child, .word, .cells th:nth-child(6), .words th, .words td, .pairs td { text-align: left; }
.group th { text-align: left; border-bottom: 0; border-top: 1px solid #ccc; padding-top: .5rem; }
.plain th { white-space: normal; vertical-align: bottom; }
.words td:last-child, .pairs td:last-child { white-space: normal; overflow-wrap: anywhere; min-width: 14rem; }
.words td, .pairs td { vertical-align: top; }
.positive, .negative, .tests_disagree { font-weight: 600; }
.positive { color: #00543f; } .negative { color: #8a3c00; } .tests_disagree { color: #00497a; } .not_detected { color: #666; }
@media (max-width: 600px) { body { padding: 1rem .8rem 3rem; } h1 { font-size: 1.3rem; } .headline { font-size: 1rem; } }
@media print {
  body { max-width: none; padding: 0; font-size: 9.5pt; }
  .scroll { overflow: visible; } table { font-size: 7.2pt; } th, td { padding: .1rem .3rem; }
  figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } thead { display: table-header-group; }
}
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
