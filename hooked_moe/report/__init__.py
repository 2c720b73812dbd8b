"""One self-contained page about an analysed run: report.html and figures/.

The page depends on the derived tables and the manifest alone, not on the clock, so a rerun gives the same bytes. It begins with
the verdict, a picture of it and what to do; figures come before tables. It ends with what was not measured, and with the commands
that measure it.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hooked_moe.progress import progress_bar
from hooked_moe.report import sections
from hooked_moe.report.blocks import Block, Figure, Page, Paragraph, Section
from hooked_moe.report.budgeted_sections import budget_section, is_budgeted
from hooked_moe.report.definitions import definitions
from hooked_moe.report.derived_files import DERIVED_FILES, SAMPLE_FILES
from hooked_moe.report.drawing_process import DrawingHelper, draw_figures
from hooked_moe.report.figures.drawing import FILES, Drawing, Pictures
from hooked_moe.report.inputs import Inputs, explorer_pages, left_out, read_inputs
from hooked_moe.report.links import expert_links, explorer_links
from hooked_moe.report.page import render_page
from hooked_moe.report.protocol import protocol_sections
from hooked_moe.report.pruning_sections import pruning_section
from hooked_moe.report.reread import reread_section
from hooked_moe.report.run_figures import run_drawings
from hooked_moe.report.saving_sections import savings_section
from hooked_moe.report.savings import read_savings
from hooked_moe.report.summary import opening
from hooked_moe.tables import FileRecord, Ledger, write_text_atomic

__all__ = ["DrawingHelper", "report_fault", "write_report"]


def write_report(run_dir: str | os.PathLike[str], *, progress: bool = False, helper: DrawingHelper | None = None) -> Path:
    """Write report.html and figures/ from the derived tables of a run; returns the page's path. `progress` counts the figures.

    `helper` draws with this process, and may have begun; None: one is started, where there are processors for it.

    Raises FileNotFoundError where the run has none of them, ValueError where one lacks columns.
    """
    run = Path(run_dir)
    inputs = read_inputs(run)
    drawings = run_drawings(inputs)
    with (
        DrawingHelper() if helper is None else nullcontext(helper) as helping,
        progress_bar(len(drawings), "drawing", " figures", shown=progress, delay=1.0) as bar,
    ):
        figures = _Figures(drawings, draw_figures(run, drawings, bar.update, helping))
    title = f"Removing one expert at one token: {inputs.model_name}"
    top = opening(inputs, figures.of("verdict"), tuple(explorer_links(inputs)))
    write_text_atomic(render_page(Page(title, top, tuple(_sections(inputs, figures)))), run / "report.html")
    made = ["report.html", *(f"figures/{drawing.name}.{kind}" for drawing in drawings for kind in FILES)]
    Ledger(run).record(_REPORT, _INPUTS, made, settings=_settings(inputs.reasons, inputs.explorer))
    return run / "report.html"


def report_fault(run: Path, known: Mapping[str, FileRecord | None] | None = None) -> str | None:
    """Why the report is not the one that `write_report` would write now; None where it is. `known` is as in `tables.Ledger`."""
    return Ledger(run, known).fault(_REPORT, _INPUTS, _settings(left_out(run, known), explorer_pages(run)))


_REPORT = "report"
_INPUTS = ("manifest.json", *DERIVED_FILES, *SAMPLE_FILES)


def _settings(reasons: Mapping[str, str], explorer: Sequence[str]) -> dict[str, Any]:
    """What the page says beside its inputs: why tables are not in it, and which pages it links to."""
    return {"left_out": {name: reason for name, reason in reasons.items() if name in DERIVED_FILES}, "explorer": list(explorer)}


@dataclass(frozen=True)
class _Figures:
    """The figures of the page, numbered in its order."""

    drawings: Sequence[Drawing]
    pictures: Mapping[str, Pictures]

    def of(self, *names: str) -> tuple[Figure, ...]:
        """Those of these names that the run has, as blocks."""
        numbered = {drawing.name: (number, drawing) for number, drawing in enumerate(self.drawings, start=1)}
        return tuple(sections.figure(*numbered[name], self.pictures[name]) for name in names if name in numbered)


def _sections(inputs: Inputs, figures: _Figures) -> Iterator[Section]:
    """The page from the verdict down. A section whose tables are absent is left out, and named at the end."""
    yield from _verdict_sections(inputs, figures)
    yield from _effect_sections(inputs, figures)
    yield from _protocol_sections(inputs, figures)
    yield from _table_sections(inputs)
    yield sections.verification(inputs)
    yield definitions()
    yield sections.manifest(inputs)
    absent = sections.not_measured(inputs)
    if absent:
        yield absent


def _verdict_sections(inputs: Inputs, figures: _Figures) -> Iterator[Section]:
    """What criteria save, what prunings cost, and how well rankings order."""
    savings = read_savings(inputs)
    if savings.rows:
        yield savings_section(savings, figures.of("savings"))
    prunings = inputs.rows("pruning.csv")
    if prunings:
        summary = inputs.rows("pruning_summary.csv")
        yield pruning_section(prunings, summary, figures.of("pruning"))
    yield from budget_section(inputs)
    if not is_budgeted(inputs):
        yield from _section("order", "How well a ranking orders experts", figures.of("rank_correlation"))


def _protocol_sections(inputs: Inputs, figures: _Figures) -> Iterator[Section]:
    """The protocol of arXiv 2606.10703 on this run, and its released data."""
    cells = inputs.rows("cells.csv")
    yield from _section("protocol", "The paper's protocol", figures.of("effect_size"))
    yield from protocol_sections(cells)
    reread = inputs.rows("reread.csv")
    if reread:
        yield reread_section(reread)


def _effect_sections(inputs: Inputs, figures: _Figures) -> Iterator[Section]:
    """Effects as such: their size, their variance, where they occur."""
    yield from _section("effects", "What one removal does", figures.of("removal_effect", "slots", "slot_distribution"))
    by_expert: tuple[Block, ...] = (*figures.of("experts"), *expert_links(inputs))
    yield from _section("experts", "Every expert", by_expert)
    yield from _section("ceiling", "How much of the variance lies between experts?", figures.of("ceiling", "ceiling_kl"))
    yield from _section("redistribution", "Redistribution", figures.of("redistribution"))
    yield from _section("progressive", "Several experts at one token", figures.of("progressive"))
    yield from _section("scopes", "One token or the whole sequence", figures.of("scopes"))


def _table_sections(inputs: Inputs) -> Iterator[Section]:
    """What has no picture."""
    bayes, domains = inputs.rows("bayes.csv"), inputs.rows("domains.csv")
    yield from _section("bayes", "Bayesian comparison of the criteria", sections.bayes_blocks(bayes) if bayes else ())
    by_domain = (Paragraph(DOMAIN_NOTE), sections.domain_table(domains)) if domains else ()
    yield from _section("domains", "By kind of text", by_domain)


def _section(anchor: str, title: str, blocks: tuple[Block, ...]) -> Iterator[Section]:
    """A section, where there is something in it."""
    if blocks:
        yield Section(anchor, title, blocks)


DOMAIN_NOTE = (
    "Top minus bottom is the loss change without the highest-weight expert minus that without the lowest-weight one, averaged "
    "over layers. d is its size in standard deviations over single positions, with a 95% interval clustered by document."
)
