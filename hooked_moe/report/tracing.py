"""The page about a causal tracing: report.html and figures/ in its directory."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from hooked_moe.report import sections
from hooked_moe.report.blocks import Block, Folded, Heading, Lead, Page, Paragraph, Section, Table, TableCell, TableRow, table_row
from hooked_moe.report.figures.drawing import distinct
from hooked_moe.report.figures.tracing import WORDS, tracing, tracing_places
from hooked_moe.report.number_text import MINUS, share
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
    findings = findings.filter(pc.is_valid(findings["mean"]))  # a place that hardly any case has, has no mean
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
    layers = [block for name, table in _layer_tables(others, several) for block in (Heading(name), table)]
    found: list[Section] = [
        Section(
            "experts",
            "The candidates",
            (
                Paragraph(note),
                _candidates(experts, several),
                Paragraph(CONTROLS_NOTE),
                Folded("Every number of the candidates", (_table(experts, several),), on_paper=False),
            ),
        ),
        Section(
            "layers",
            "Layers and ceilings",
            (
                *layers,
                Paragraph(CEILING_NOTE),
                Folded("Every number of the cases and layers", (_table(others, several),), on_paper=False),
            ),
        ),
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


CONTROLS_NOTE = (
    "Specificity: the expert's rescue less the mean of the other experts active in its layer. Less a random vector's: of one "
    "that is as long as the expert's patch. At equal length: less the rescue of the active expert with the nearest routing "
    "weight, both patches scaled to the length of the shorter one; what is above 0 there does not come from writing more. "
    "Removal: by how much the clean run's margin changes without the expert. Active in: share of the cases."
)
_CANDIDATE = {
    "rescue": "rescue",
    "specificity": "specificity",
    "rescue less that of the random vector": "less a random vector's",
    "specificity at equal norm": "at equal length",
    "removal from the clean run": "removal",
}
_SITES = ("MLP output", "routed experts", "shared experts", "attention output")
_SITES_AT_PLACES = ("MLP output", "attention output")


def _candidates(rows: list[dict[str, Any]], several_places: bool) -> Table:
    """One row per candidate: its rescue, beside what else it might be."""
    by_expert: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        name = f"L{row['layer']}E{row['expert']}" + (f", {WORDS[row['place']]}" if several_places else "")
        by_expert.setdefault(name, {})[row["quantity"]] = row
    body = [
        table_row(name, *(_estimate(own.get(quantity)) for quantity in _CANDIDATE), share(own["active"]["mean"]))
        for name, own in by_expert.items()
    ]
    return Table(("", *_CANDIDATE.values(), "active in"), tuple(body), "words")


def _layer_tables(rows: list[dict[str, Any]], several_places: bool) -> Iterator[tuple[str, Table]]:
    """What each layer restores, by site; where several tokens are patched, by the token's place, with a table for each site."""
    at = {(row["quantity"], row["place"], row["layer"]): row for row in rows}
    places = [place for place in WORDS if any(row["place"] == place for row in rows)]
    layers = sorted({row["layer"] for row in rows if row["layer"] is not None})

    def table(columns: Mapping[str, tuple[str, str]]) -> Table:
        body = [table_row(f"layer {n}", *(_estimate(at.get((*key, n))) for key in columns.values())) for n in layers]
        ends = [
            at.get(("all MLP outputs together", place, None)) if site == "MLP output" else None
            for site, place in columns.values()
        ]
        body += [table_row("all layers", *map(_estimate, ends))] if any(ends) else []
        return Table(("", *columns), tuple(body), "words")

    if several_places:
        for site in _SITES_AT_PLACES:
            yield f"Logits that the {site} restores, by the patched token", table({WORDS[p]: (site, p) for p in places})
    else:
        present = {row["quantity"] for row in rows}
        for place in places:
            yield f"Logits restored at the {WORDS[place]}", table({site: (site, place) for site in _SITES if site in present})


def _estimate(row: Mapping[str, Any] | None) -> str:
    """A mean with its interval, whose ends keep their sign where they round to zero; nothing where there is none."""
    if row is None:
        return ""
    mean, low, high = (f"{row[name]:+.2f}".replace("-", MINUS) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _settings(identity: Mapping[str, Any]) -> dict[str, Any]:
    plain = {name: value for name, value in identity.items() if name not in ("protocol", "excluded")}
    return plain | {f"protocol: {name}": value for name, value in identity["protocol"].items()}


def _table(rows: list[dict[str, Any]], several_places: bool) -> Table:
    """One row per quantity, under the name of its place, layer or expert."""
    cells: list[TableRow] = []
    heading = None
    for row in rows:
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
