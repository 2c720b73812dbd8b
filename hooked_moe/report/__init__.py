"""One self-contained page about an analysed run: report.html and figures/.

The page is a function of the files in the run directory: nothing depends on the clock, so a rerun gives the same
bytes. What a run lacks (a manifest, documents, the sequence scope) the page names as absent.
"""

import base64
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
from hooked_moe.cell_text import DASH, OUTCOMES, p_value, signed
from hooked_moe.cells import CONTROL, POPULATIONS, Cell, cells_from_table, cells_table
from hooked_moe.drawing import Drawing
from hooked_moe.effect_grid import EffectGrid, read_effects
from hooked_moe.page import html_page, html_pairs, html_table, html_value
from hooked_moe.summaries import LAYER_COLUMNS


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write report.html and figures/ from the files of an analysed run; returns the page's path.

    Raises FileNotFoundError that names the step to run where effects.parquet, experts.parquet, cells.csv or layers.csv
    is missing.
    """
    run = Path(run_dir)
    grid = read_effects(tables.required_file(run, "effects.parquet", "the measurement writes it"))
    origin = "analyse_run writes it from effects.parquet"
    experts = pq.read_table(tables.required_file(run, "experts.parquet", origin), use_threads=False)
    cells = cells_from_table(tables.read_csv(tables.required_file(run, "cells.csv", origin), cells_table([]).schema))
    layers = tables.read_csv(tables.required_file(run, "layers.csv", origin))
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8")) if (run / "manifest.json").is_file() else None

    drawings = figures.run_drawings(grid, experts, cells, layers, _noise_floor(manifest))
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
    tables.write_text_atomic(html_page(title, sections), run / "report.html")
    return run / "report.html"


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
        f"{share:.0%} of them make it worse (mean {signed(mean, 4)})."
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


def _figure(number: int, drawing: Drawing, picture: bytes) -> str:
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
            signed(cell.d_position, 3),
            f"[{signed(cell.d_position_low, 3)}, {signed(cell.d_position_high, 3)}]",
            p_value(cell.p_t),
            p_value(cell.p_wilcoxon),
        ]
        outcome = f'<td class="word"><span class="{cell.outcome}">{OUTCOMES[cell.outcome][1]}</span></td>'
        last = [signed(value, 4) for value in (cell.mean_high, cell.mean_low, cell.mean_difference)]
        last += [signed(cell.t, 2), str(cell.n)]
        before, after = ("".join(f"<td>{value}</td>" for value in values) for values in (first, last))
        rows.append(f"<tr>{before}{outcome}{after}</tr>")
    return html_table(CELL_COLUMNS, rows, "cells")


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
    rows = ["<tr>" + "".join(f"<td>{html_value(value)}</td>" for value in row.values()) + "</tr>" for row in table.to_pylist()]
    columns = (name.replace("_", " ") for name in table.column_names)
    return f"<section><h2>{title}</h2><p>{note}</p>{html_table(columns, rows, 'plain')}</section>"


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
            rows.append("<tr>" + "".join(f"<td>{html_value(DASH if x is None else x)}</td>" for x in cells) + "</tr>")
        parts.append(html_table(("check", "result", "value", "threshold", "detail"), rows, "words"))
    else:
        parts.append('<p class="absent">Absent: the manifest records no verification.</p>')
    if floor:
        parts.append("<p>Noise floor: the loss change of a removal that removes nothing, under another batch composition.</p>")
        parts.append(html_pairs(floor))
    else:
        parts.append('<p class="absent">Absent: the manifest records no noise floor.</p>')
    return "".join(parts) + "</section>"


def _manifest(manifest: dict[str, Any] | None) -> str:
    body = (
        '<p class="absent">Absent: this run has no manifest.json.</p>'
        if manifest is None
        else html_pairs({key: value for key, value in manifest.items() if key not in ("verification", "noise_floor")})
    )
    return f"<section><h2>Manifest</h2>{body}</section>"


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
        parts.append(f"<h3>{name}</h3>" + html_table(("column", "unit", "meaning"), rows, "words"))
    return "".join(parts) + "</section>"
