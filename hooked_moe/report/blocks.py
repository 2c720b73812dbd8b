"""What the page is made of, as data: sections of blocks. `templates/blocks.html` has a macro for each kind of block.

Every text is plain text; the templates escape it.
"""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Paragraph:
    """A text, after a bold beginning where there is one."""

    kind: ClassVar[str] = "paragraph"
    text: str
    strong: str = ""


@dataclass(frozen=True)
class Lead:
    """The first words of the page: the verdict in a sentence, and how sure it is."""

    kind: ClassVar[str] = "lead"
    headline: str
    text: str


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Missing:
    """What stands in the place of something that the run does not have, and the command that measures it."""

    kind: ClassVar[str] = "missing"
    label: str
    text: str
    command: str = ""


@dataclass(frozen=True)
class Summary:
    """A titled list of sentences, set off from the text."""

    kind: ClassVar[str] = "summary"
    title: str
    items: tuple[Paragraph, ...]
    css: str = ""


@dataclass(frozen=True)
class KeyEntry:
    """A mark, the css class that colours it, and what it means."""

    mark: str
    css: str
    text: str


@dataclass(frozen=True)
class Key:
    """The meanings of the marks in a table."""

    kind: ClassVar[str] = "key"
    entries: tuple[KeyEntry, ...]


@dataclass(frozen=True)
class TableCell:
    """A cell of a table.

    `css` colours the cell, or its text alone where `badge` is set; `small` follows the text in small print; `title` is shown
    under the pointer; `bar` draws a bar of that share; `columns` is how many columns the cell spans.
    """

    text: str
    css: str = ""
    small: str = ""
    title: str = ""
    bar: float | None = None
    badge: bool = False
    columns: int = 1


@dataclass(frozen=True)
class TableRow:
    """Cells, or a heading for the rows that follow."""

    cells: tuple[TableCell, ...] = ()
    heading: str = ""


@dataclass(frozen=True)
class Table:
    """A table that scrolls sideways where the screen is narrow; without `columns` it has no head."""

    kind: ClassVar[str] = "table"
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    css: str = ""


@dataclass(frozen=True)
class Figure:
    """A picture for a page and one for a phone, as addresses that carry their data."""

    kind: ClassVar[str] = "figure"
    number: int
    name: str
    title: str
    caption: str
    wide: str
    narrow: str


@dataclass(frozen=True)
class Link:
    """A text that leads to an address."""

    text: str
    address: str


@dataclass(frozen=True)
class Links:
    """A text, and links after it."""

    kind: ClassVar[str] = "links"
    text: str
    links: tuple[Link, ...]


@dataclass(frozen=True)
class Folded:
    """Blocks that open on a click; printed open, or not at all."""

    kind: ClassVar[str] = "folded"
    title: str
    blocks: tuple["Block", ...]
    on_paper: bool


@dataclass(frozen=True)
class Action:
    """A thing to do, and the command that does it, where there is one."""

    text: str
    command: str = ""


@dataclass(frozen=True)
class Opening:
    """The first screen: the verdict in a sentence, a picture where there is one, what to do, and below that how sure it is."""

    kind: ClassVar[str] = "opening"
    headline: str
    picture: tuple[Figure, ...]
    actions: tuple[Action, ...]
    text: str


Block = Opening | Paragraph | Lead | Heading | Missing | Summary | Key | Table | Figure | Links | Folded


@dataclass(frozen=True)
class Section:
    """A part of the page: the anchor that the contents point to, a title, and its blocks."""

    anchor: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """The page: its title, what stands above the contents, and the sections below them."""

    title: str
    opening: tuple[Block, ...]
    sections: tuple[Section, ...]


def table_row(*cells: str | TableCell) -> TableRow:
    """A row of cells, of which plain ones may be given as texts."""
    return TableRow(tuple(TableCell(cell) if isinstance(cell, str) else cell for cell in cells))
