"""What mkdocs does beside Markdown (`hooks` in mkdocs.yml): pages from outside `docs/`, links between them, and notebooks.

Nothing in the site is fetched when it is read. On GitHub, whose workflows set GITHUB_REPOSITORY, pages of notebooks get a link
to Colab.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs.tools import commands
from docs.tools.notebook_pages import page_of

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY_PAGES = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks").glob("*.md")),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "hooked_moe").rglob("README.md")),
)
"""Documents that stand elsewhere in the repository, and are pages of the site under the same path."""
LINK = re.compile(r"(?<=\]\()(?P<target>[^)#\s]+)(?P<rest>[^)]*)(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is not in `docs/`, and a page for each notebook."""
    for path in REPOSITORY_PAGES:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, "commands.md", content=commands.page()))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        page, pictures = page_of(Path(str(notebook.abs_src_path)), os.environ.get("GITHUB_REPOSITORY"))
        stem = notebook.src_uri.removesuffix(".ipynb")
        files.append(File.generated(config, f"{stem}.md", content=page))
        for name, picture in pictures.items():
            files.append(File.generated(config, f"{posixpath.dirname(stem)}/{name}", content=picture))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links as they are in the repository, turned into links of the site."""
    return LINK.sub(lambda link: link_in_site(link["target"], page.file.src_uri) + link["rest"], markdown)


def link_in_site(target: str, page: str) -> str:
    """Where a link of a page leads in the site."""
    if "://" in target or target.startswith("mailto:"):
        return target
    here = page if page in REPOSITORY_PAGES else f"docs/{page}"
    path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
    if path.startswith("docs/"):
        path = path.removeprefix("docs/").replace(".ipynb", ".md")
    elif path not in REPOSITORY_PAGES:
        raise PluginError(f"{here} links to {target}, which is no page of the site")  # mkdocs passes over what is outside docs/
    return posixpath.relpath(path, posixpath.dirname(page) or ".")
