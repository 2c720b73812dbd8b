"""The page of a study of grafts: results/studies/grafts/report.html."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from hooked_moe.report.blocks import Block, Heading, Lead, Page, Paragraph, Section, Table, table_row
from hooked_moe.report.figures.grafts import graft_layers, graft_nulls, graft_parts
from hooked_moe.report.number_text import nats, share, share_interval
from hooked_moe.report.page import render_page
from hooked_moe.report.sections import figure
from hooked_moe.tables import COALITION_SHARES, GRAFTS, read_csv, required_file, write_text_atomic

_ENDS = ("a", "b")
_SWEEP_TITLES = {
    "ends": "Everything and nothing",
    "suffix": "Layers i to the last",
    "prefix": "Layers 0 to i",
    "single": "Single layers",
    "part": "Parts, in all layers",
    "layer_part": "Parts of single layers",
}


def write_graft_report(directory: Path) -> Path:
    """Write report.html and figures/ from a study's tables; returns the page's path. Raises FileNotFoundError without them."""
    grafts = read_csv(required_file(directory, "grafts.csv", "hooked-moe study grafts writes it"), GRAFTS)
    study = json.loads(required_file(directory, "study.json", "hooked-moe study grafts writes it").read_text(encoding="utf-8"))
    optional = {
        name: read_csv(directory / f"{name}.csv", COALITION_SHARES if "shapley" in name else GRAFTS)
        for name in ("shapley_layers", "shapley_parts", "reinitialised", "seeds")
        if (directory / f"{name}.csv").is_file()
    }
    (directory / "figures").mkdir(exist_ok=True)
    page = Page(
        f"Grafts: {study['models']['a']} against {study['models']['b']}",
        tuple(_opening(grafts, study)),
        tuple(_sections(grafts, optional, study, directory / "figures")),
    )
    write_text_atomic(render_page(page), directory / "report.html")
    return directory / "report.html"


def _opening(grafts: pa.Table, study: Mapping[str, Any]) -> Iterator[Block]:
    parts = [row for row in grafts.to_pylist() if row["sweep"] == "part"]
    sufficient, necessary = (_largest(parts, direction) for direction in ("a<-b", "b<-a"))
    if sufficient and necessary:
        yield Lead(
            f"{_named(sufficient)} carries most of the difference by itself, and {_named(necessary)} is lost most.",
            f"Taken alone from b, {_named(sufficient)} brings {_share(sufficient)} of the difference; without b's "
            f"{_named(necessary)}, {_share(necessary)} of it is gone. Intervals are over documents or subjects, for this pair of "
            "trainings: another pair from other seeds may differ by more.",
        )
        routers = {row["direction"]: row for row in parts if row["parts"] == "router"}
        if len(routers) == 2:
            yield Paragraph(f"Routers alone carry {_share(routers['a<-b'])}; without b's, {_share(routers['b<-a'])} is lost.")
    for end in _ENDS:
        if end in study["ends"]:
            yield Paragraph(f" {study['models'][end]}. {study['ends'][end]}.", strong=f"{end}:")


def _largest(rows: list[dict[str, Any]], direction: str) -> dict[str, Any] | None:
    own = [row for row in rows if row["direction"] == direction]
    return max(own, key=lambda row: row["share"], default=None)


def _named(row: Mapping[str, Any]) -> str:
    return str(row["parts"]).replace("_", " ")


def _share(row: Mapping[str, Any]) -> str:
    return f"{share(row['share'])} {share_interval(row['share_low'], row['share_high'])}"


def _sections(grafts: pa.Table, optional: Mapping[str, pa.Table], study: Mapping[str, Any], figures: Path) -> Iterator[Section]:
    sweeps = set(grafts["sweep"].to_pylist())
    if sweeps & {"suffix", "single"}:
        drawing = graft_layers(grafts, optional.get("shapley_layers"))
        yield Section("layers", "Layers", (figure(1, drawing, drawing.save(figures)),))
    if "part" in sweeps:
        drawing = graft_parts(grafts)
        yield Section("parts", "Parts", (figure(2, drawing, drawing.save(figures)),))
    if "shapley_layers" in optional:
        yield Section("shapley", "Exact shares", tuple(_shapley_blocks(optional)))
    tables = tuple(block for sweep in _SWEEP_TITLES if sweep in sweeps for block in _sweep_blocks(grafts, sweep))
    yield Section("grafts", "Every graft", (Paragraph(_READING), *tables))
    if any(name in optional for name in _NULLS):
        yield Section("nulls", "The same parts, bringing nothing", tuple(_null_blocks(grafts, optional, study, figures)))


_READING = (
    "a<-b is a with parts of b, and its share what of the difference they carry: (value - a) / (b - a). b<-a is b with parts of "
    "a, and its share what is lost: (b - value) / (b - a). The interaction is the first less the second: 0 where parts add up, "
    "above 0 where others can stand in for them, below 0 where they need others."
)
_NULLS = {"reinitialised": "new", "seeds": "seed"}
"""Tables of grafts that have nothing of the difference, and what their parts are from."""


def _null_blocks(grafts: pa.Table, optional: Mapping[str, pa.Table], study: Mapping[str, Any], figures: Path) -> Iterator[Block]:
    yield Paragraph(
        "Newly initialised (Zhang, Bengio & Singer 2019): what the part is worth to the model at all. Where that costs much and "
        "the graft little, the part matters, and is the same in both trainings."
    )
    if "seeds" in optional:
        yield Paragraph(
            f"From another seed ({study['models']['floor']}): what a graft costs without a common ancestor. A graft of the other "
            "training that costs as much would say nothing of where the difference is."
        )
    values = list(_values(grafts, optional))
    if any(row["sweep"] in ("suffix", "single") for row in values):
        drawing = graft_nulls(pa.Table.from_pylist([row for row in values if row["sweep"] in ("suffix", "single")]))
        yield figure(3, drawing, drawing.save(figures))
    for host, of in (("a", "b"), ("b", "a")):
        yield Heading(f"{host} with parts from elsewhere: readout")
        yield _null_table([row for row in values if row["host"] == host], of)


def _values(grafts: pa.Table, optional: Mapping[str, pa.Table]) -> Iterator[dict[str, Any]]:
    """The readout of each graft by host and source, where nulls were taken for it."""
    own = [row | {"source": "training"} for row in grafts.to_pylist()]
    others = [
        row | {"source": source} for name, source in _NULLS.items() if name in optional for row in optional[name].to_pylist()
    ]
    compared = {(row["sweep"], row["layers"], row["parts"]) for row in others}
    whole = {row["direction"][0]: row for row in own if row["sweep"] == "ends" and row["parts"] == "none"}
    for row in (*own, *others):
        if (row["sweep"], row["layers"], row["parts"]) in compared:
            host = row["direction"][0]
            yield {
                **{name: row[name] for name in ("sweep", "layers", "parts", "source", "value", "value_low", "value_high")},
                "layer": int(row["layers"].partition("-")[0]) if row["layers"][0].isdigit() else -1,
                "host": host,
                "host_value": whole[host]["value"] if host in whole else float("nan"),
            }


def _null_table(rows: list[dict[str, Any]], of: str) -> Table:
    sources = {"training": f"from {of}", "new": "newly initialised", "seed": "from another seed"}
    present = [source for source in sources if any(row["source"] == source for row in rows)]
    by_graft: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_graft.setdefault((row["layers"], row["parts"]), {})[row["source"]] = row
    body = [
        table_row(layers, parts.replace("_", " "), *(_value(ways.get(source)) for source in present))
        for (layers, parts), ways in by_graft.items()
    ]
    return Table(("layers", "parts", *(sources[source] for source in present)), tuple(body), "words")


def _value(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else f"{row['value']:.3f} [{row['value_low']:.3f}, {row['value_high']:.3f}]"


def _sweep_blocks(grafts: pa.Table, sweep: str) -> Iterator[Block]:
    rows = [row for row in grafts.to_pylist() if row["sweep"] == sweep]
    by_graft: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_graft.setdefault((row["layers"], row["parts"]), {})[row["direction"]] = row
    columns = ("layers", "parts", "a<-b", "carried", "95% interval", "b<-a", "lost", "95% interval", "interaction")
    body = []
    for (layers, parts), ways in by_graft.items():
        cells = [layers, parts.replace("_", " ")]
        for direction in ("a<-b", "b<-a"):
            row = ways.get(direction)
            ends = ("", "", "") if row is None else (nats(row["value"]), share(row["share"]), _interval(row))
            cells += ends
        both = len(ways) == 2
        cells.append(share(ways["a<-b"]["share"] - ways["b<-a"]["share"]) if both else "")
        body.append(table_row(*cells))
    yield Paragraph("", strong=_SWEEP_TITLES[sweep])
    yield Table(columns, tuple(body), "words")


def _interval(row: Mapping[str, Any]) -> str:
    return share_interval(row["share_low"], row["share_high"])


def _shapley_blocks(optional: Mapping[str, pa.Table]) -> Iterator[Block]:
    yield Paragraph(
        "The mean over all orders of what each adds when it is taken from b (Shapley; these sum to 100%), and over all "
        "coalitions of the others (Banzhaf). First and last: what it carries alone, and what is lost without it alone."
    )
    columns = ("player", "Shapley", "95% interval", "Banzhaf", "first", "last")
    for name in ("shapley_layers", "shapley_parts"):
        if name in optional:
            yield Table(columns, tuple(_shapley_row(row) for row in optional[name].to_pylist()), "words")


def _shapley_row(row: Mapping[str, Any]) -> Any:
    ends = share_interval(row["shapley_low"], row["shapley_high"])
    return table_row(row["player"], share(row["shapley"]), ends, share(row["banzhaf"]), share(row["first"]), share(row["last"]))
