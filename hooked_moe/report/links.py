"""From the report to the explorer pages beside it."""

from collections.abc import Iterator

from hooked_moe.report.blocks import Link, Links
from hooked_moe.report.figures.experts import strongest
from hooked_moe.report.inputs import Inputs

_ABOUT = {"experts.html": "what every expert does", "documents.html": "documents, token by token"}


def explorer_links(inputs: Inputs) -> Iterator[Links]:
    """The explorer pages that the run has."""
    links = tuple(Link(text, page) for page, text in _ABOUT.items() if page in inputs.explorer)
    if links:
        yield Links("In words, beside this file:", links)


def expert_links(inputs: Inputs) -> Iterator[Links]:
    """The cards of the experts that the figure of all experts labels."""
    if "experts.html" in inputs.explorer and "experts.parquet" in inputs.tables:
        named = [f"L{layer}E{expert}" for layer, expert in strongest(inputs.tables["experts.parquet"])]
        if named:
            yield Links("What the labelled experts do:", tuple(Link(name, f"experts.html#{name}") for name in named))
