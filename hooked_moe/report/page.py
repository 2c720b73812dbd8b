"""From blocks to one HTML file: the templates filled in, the style sheet inside.

The page has no scripts and loads nothing; it fits a phone, and paper.
"""

from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined

from hooked_moe.report.blocks import Page


def render_page(page: Page) -> str:
    """The whole file."""
    return template_environment("hooked_moe.report").get_template("page.html").render(page=page, style=style_sheet())


def style_sheet() -> str:
    return (files("hooked_moe.report") / "style.css").read_text(encoding="utf-8")


@cache
def template_environment(package: str) -> Environment:
    """The templates of a package, which escape what they are given and know no name that they are not given."""
    return Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
