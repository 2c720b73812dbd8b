"""The page about a causal tracing: report.html and figures/ in its directory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from hooked_moe.report import sections
from hooked_moe.report.blocks import Block, Folded, Lead, Page, Paragraph, Section, Table, TableCell, TableRow
from hooked_moe.report.figures.drawing import distinct
from hooked_moe.report.figures.tracing import WORDS, tracing, tracing_places
from hooked_moe.report.page import render_page
from hooked_moe.tables import write_text_atomic


def write_tracing_report(
    directory: Path,
    identity: Mapping[str, Any],
    findings: pa.Table,
    conclusion: str,
    stability: Mapping[str, int],
    published: pa.Table | None = None,
) -> Path:
    """Write the page and its figure from the table of findings; returns the page's path."""
    (directory / "figures").mkdir(exist_ok=True)
    drawing = tracing(findings) if len(_places(findings)) == 1 else tracing_places(findings)
    figure = sections.figure(1, drawing, drawing.save(directory / "figures"))
    protocol = identity["protocol"]
    cases = findings["n"][0].as_py()
    text = (
        f"An expert was chosen on one half of the cases; every number here is of the other half ({cases} cases), with a 95% "
        f"interval over cases. Corruption: {_corruption(protocol)}."
    )
    page = Page(
        f"Which expert carries the facts: {identity['model']}",
        (Lead(conclusion, text), figure),
        tuple(_sections(identity, findings, stability, published)),
    )
    write_text_atomic(render_page(page), directory / "report.html")
    return directory / "report.html"


def _places(findings: pa.Table) -> list[str]:
    """What the patched tokens are in their prompts."""
    return [place for place in distinct(findings, "place") if place is not None]


def _corruption(protocol: Mapping[str, Any]) -> str:
    if protocol["corruption"] == "noise":
        foils = {"given": "", "prior": "; foils as likely as the true answer without the subject"}[protocol["foils"]]
        return f"noise of {protocol['sigma']:g} standard deviations on the embeddings of the subject's tokens{foils}"
    return "another subject of the relation in the place of the prompt's own"


def _sections(
    identity: Mapping[str, Any], findings: pa.Table, stability: Mapping[str, int], published: pa.Table | None
) -> list[Section]:
    rows = findings.to_pylist()
    experts = [row for row in rows if row["expert"] is not None]
    others = [row for row in rows if row["expert"] is None]
    several = len(_places(findings)) > 1
    note = (
        f"The same expert is chosen in {stability['same']} of {stability['settings']} settings (splits and recurrences), and in "
        f"{stability['relation_folds_same']} of {stability['relation_folds']} with a part of the relations left out."
    )
    found: list[Section] = [
        Section("experts", "The candidates", (Paragraph(note), _table(experts, several))),
        Section("layers", "Layers and ceilings", (Paragraph(CEILING_NOTE), _table(others, several))),
    ]
    if published is not None:
        found.append(Section("published", "Beside the published numbers", (_published_table(published),)))
    excluded = identity["excluded"]
    left_out = tuple(Paragraph(f"{count:,}: {reason}") for reason, count in sorted(excluded.items(), key=lambda item: -item[1]))
    found.append(Section("left-out", "Facts that were left out", left_out or (Paragraph("None."),)))
    settings = tuple(TableRow((TableCell(name), TableCell(str(value)))) for name, value in _settings(identity).items())
    blocks: tuple[Block, ...] = (Folded("Model, protocol and seeds", (Table((), settings),), on_paper=True),)
    found.append(Section("settings", "What this is a result of", blocks))
    return found


CEILING_NOTE = (
    "Patching the MLP outputs of all layers together bounds what experts can restore. That all attention outputs together "
    "restore everything at the last token is no finding: it is the same in both runs, and all else reaches it by attention."
)


def _settings(identity: Mapping[str, Any]) -> dict[str, Any]:
    plain = {name: value for name, value in identity.items() if name not in ("protocol", "excluded")}
    return plain | {f"protocol: {name}": value for name, value in identity["protocol"].items()}


def _table(rows: list[dict[str, Any]], several_places: bool) -> Table:
    """One row per quantity, under the name of its place, layer or expert."""
    cells: list[TableRow] = []
    heading = None
    for row in rows:
        if row["mean"] is None:
            continue
        if _where(row, several_places) != heading:
            heading = _where(row, several_places)
            cells.append(TableRow(heading=heading))
        p = "" if row["p"] is None else f"{row['p']:.2g}"
        mean, low, high = (_number(row[name], row["unit"]) for name in ("mean", "low", "high"))
        texts = (row["quantity"], mean, f"[{low}, {high}]", row["unit"], p, str(row["n"]))
        cells.append(TableRow(tuple(TableCell(text) for text in texts)))
    return Table(("", "mean", "95% interval", "unit", "p (sign flips)", "cases"), tuple(cells))


def _where(row: dict[str, Any], several_places: bool) -> str:
    if row["place"] is None:
        return "The cases"
    of_layer = "All layers" if row["layer"] is None else f"Layer {row['layer']}"
    of_expert = "" if row["expert"] is None else f", expert {row['expert']}"
    return (f"{WORDS[row['place']]}: {of_layer.lower()}" if several_places else of_layer) + of_expert


def _number(value: float, unit: str) -> str:
    return f"{value:+.2f}" if unit in ("logits", "nats") else f"{value:.2f}"


def _published_table(published: pa.Table) -> Table:
    names = ("source", "case_set", "quantity", "published", "measured")
    rows = tuple(TableRow(tuple(TableCell(str(row[name])) for name in names)) for row in published.to_pylist())
    return Table(("source", "cases", "quantity", "published", "here"), rows)
