"""One self-contained page about an analysed run: report.html and figures/.

The page depends on the derived tables and the manifest alone, not on the clock, so a rerun gives the same bytes. It names
what was not measured, with the command that measures it.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from hooked_moe.report import sections
from hooked_moe.report.blocks import Block, Page, Paragraph, Section
from hooked_moe.report.definitions import definitions
from hooked_moe.report.figures.ceiling import static_ceiling
from hooked_moe.report.figures.drawing import Drawing
from hooked_moe.report.figures.effect_size import effect_size
from hooked_moe.report.figures.experts import experts
from hooked_moe.report.figures.progressive import progressive
from hooked_moe.report.figures.rank_correlation import rank_correlation
from hooked_moe.report.figures.redistribution import redistribution
from hooked_moe.report.figures.removal_effect import removal_effect, slot_distribution, slots
from hooked_moe.report.figures.scopes import scopes
from hooked_moe.report.inputs import Inputs, read_inputs
from hooked_moe.report.page import render_page
from hooked_moe.report.summary import opening
from hooked_moe.report.verdicts import verdict_sections
from hooked_moe.tables import write_text_atomic

__all__ = ["write_report"]


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write report.html and figures/ from the derived tables of a run; returns the page's path.

    Raises FileNotFoundError where the run has none of them, ValueError where one lacks columns.
    """
    run = Path(run_dir)
    inputs = read_inputs(run)
    (run / "figures").mkdir(exist_ok=True)
    title = f"Removing one expert at one token: {inputs.model_name}"
    page = Page(title, opening(inputs), tuple(_sections(inputs, run / "figures")))
    write_text_atomic(render_page(page), run / "report.html")
    return run / "report.html"


def _sections(inputs: Inputs, directory: Path) -> Iterator[Section]:
    """The page from top to bottom. Drawings are saved in `directory` as they come, and numbered."""
    numbers = iter(range(1, 100))

    def drawn(name: str, draw: Callable[..., Drawing], *extra: object) -> Block:
        if name not in inputs.tables:
            return sections.not_measured(inputs, name)
        drawing = draw(inputs.tables[name], *extra)
        return sections.figure(next(numbers), drawing, drawing.save(directory))

    cells = inputs.rows("cells.csv")
    n_layers = inputs.n_layers
    criteria = [drawn("cells.csv", effect_size, n_layers)]
    if cells:
        criteria.append(drawn("cells.csv", rank_correlation))
    yield Section("criteria", "Do rankings predict the effect of a removal?", tuple(criteria))
    yield from verdict_sections([row for row in cells if row["scope"] == "position"])
    yield Section("ceiling", "How much could any fixed ranking explain?", (drawn("ceiling.csv", static_ceiling),))
    bayes = inputs.rows("bayes.csv")
    blocks = sections.bayes_blocks(bayes) if bayes else (sections.not_measured(inputs, "bayes.csv"),)
    yield Section("bayes", "Bayesian comparison of the criteria", blocks)
    effects = (
        drawn("layers.csv", removal_effect),
        drawn("slots.csv", slots),
        drawn("slot_distribution.csv", slot_distribution, inputs.noise_floor),
    )
    yield Section("effects", "What one removal does", effects)
    yield Section("experts", "Every expert", (drawn("experts.parquet", experts),))
    yield Section("redistribution", "Redistribution", (drawn("redistribution.csv", redistribution, n_layers),))
    yield Section("progressive", "Several experts at one token", (drawn("progressive.csv", progressive),))
    yield Section("scopes", "One token or the whole sequence", (drawn("scopes.csv", scopes),))
    yield from verdict_sections([row for row in cells if row["scope"] != "position"])
    domains = inputs.rows("domains.csv")
    by_domain = (Paragraph(DOMAIN_NOTE), sections.plain_table(domains)) if domains else None
    yield Section("domains", "By kind of text", by_domain or (sections.not_measured(inputs, "domains.csv"),))
    yield sections.verification(inputs)
    yield sections.manifest(inputs)
    yield definitions()


DOMAIN_NOTE = (
    "Top minus bottom is the loss change without the highest-weight expert minus that without the lowest-weight one, averaged "
    "over layers (nats). d position is its size over single positions, with a 95% interval clustered by document."
)
