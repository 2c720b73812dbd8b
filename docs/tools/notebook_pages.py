"""A notebook as a page: its Markdown as it stands, its code, and what that printed and drew.

python -m docs.tools.notebook_pages                 # run every notebook and keep what it shows
python -m docs.tools.notebook_pages first_look      # only this one
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
COLAB = "https://colab.research.google.com/github"


def page_of(notebook: Path, repository: str | None = None) -> tuple[str, dict[str, bytes]]:
    """A notebook's page in Markdown, and its pictures by their names; `repository` is "owner/name" on GitHub."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            picture = output.get("data", {}).get("image/png")
            if picture is not None:
                name = f"{notebook.stem}_{len(pictures)}.png"
                pictures[name] = base64.b64decode("".join(picture))
                parts.append(f"![What the cell above draws]({name})")
            else:
                parts.append(f"```text\n{text_of(output).rstrip()}\n```")
    links = f"[Download this notebook]({notebook.name}){{ download }}"
    if repository is not None:
        links += f" · [Open it in Colab]({COLAB}/{repository}/blob/main/docs/notebooks/{notebook.name})"
    return "\n\n".join([parts[0], links, *parts[1:]]) + "\n", pictures


def text_of(output: dict[str, Any]) -> str:
    """What an output says in words."""
    words = output["text"] if output["output_type"] == "stream" else output["data"]["text/plain"]
    return "".join(words)


def cells_of(notebook: Path) -> list[str]:
    """The code of a notebook as Python: without what only notebooks understand (`%matplotlib inline`)."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return ["".join(line for line in cell.splitlines(True) if not line.startswith("%")) for cell in code]


def run_and_keep(notebooks: list[Path]) -> None:
    """Run notebooks from their first cell to their last, and keep what they show. Raises `CellExecutionError`.

    One kernel runs them all, so that torch is loaded once; it forgets each one's names before the next.
    """
    import nbformat
    from jupyter_client.manager import KernelManager
    from nbclient import NotebookClient

    kernel = KernelManager(transport="ipc")
    kernel.start_kernel()
    try:
        for notebook in notebooks:
            print(notebook.name, flush=True)
            content = nbformat.read(notebook, as_version=4)
            content["cells"].append(nbformat.v4.new_code_cell("%reset -f"))
            resources = {"metadata": {"path": str(notebook.parent)}}
            NotebookClient(content, km=kernel, timeout=600, startup_timeout=600, resources=resources).execute()
            content["cells"].pop()
            nbformat.write(tidy(content), notebook)
    finally:
        kernel.shutdown_kernel(now=True)


def tidy(content: Any) -> Any:
    """Without what differs from run to run, so that a change of a notebook shows what changed."""
    content["metadata"] = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for number, cell in enumerate(content["cells"]):
        cell["id"], cell["metadata"] = f"cell-{number}", {}
        if cell["cell_type"] == "code":
            cell["execution_count"] = None
            cell["outputs"] = [tidy_output(output) for output in cell["outputs"] if output.get("name") != "stderr"]
    return content


def tidy_output(output: Any) -> Any:
    if output["output_type"] != "stream":
        kind = "image/png" if "image/png" in output["data"] else "text/plain"
        output["data"], output["metadata"] = {kind: output["data"][kind]}, {}
        if "execution_count" in output:
            output["execution_count"] = None
    return output


def main(names: list[str]) -> None:
    run_and_keep([path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if not names or path.stem in names])


if __name__ == "__main__":
    main(sys.argv[1:])
