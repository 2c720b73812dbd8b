"""What the documents tell a reader to open or to run exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hooked_moe.cli.main import COMMANDS
from hooked_moe.report.derived_files import DERIVED_FILES
from tests.support.code_blocks import python_blocks, run_blocks

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {".venv", "results", "build", "node_modules"} & set(path.relative_to(ROOT).parts)
    and not any(part.startswith(".") for part in path.relative_to(ROOT).parts[:-1])
)
TEXTS = [*DOCUMENTS, *(path for room in ("hooked_moe", "experiments", "benchmarks") for path in (ROOT / room).rglob("*.py"))]
MAP = re.compile(r"^\| (?P<paths>`[^|]+) \|", flags=re.MULTILINE)


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("document", DOCUMENTS, ids=names(DOCUMENTS))
def test_links_lead_to_files(document: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert missing == []


def test_paths_in_the_map_of_the_code_exist() -> None:
    """Of CONTRIBUTING.md: the first column of its table, from the repository's root."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = [path for row in MAP.finditer(text) for path in re.findall(r"`([^`]+)`", row["paths"])]
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_room_is_on_the_map() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = {path.parent for path in (ROOT / "hooked_moe").glob("*/__init__.py")}
    modules = {path for path in (ROOT / "hooked_moe").glob("*.py") if not path.name.startswith("__")}
    assert [path.name for path in sorted(rooms | modules) if f"`{path.relative_to(ROOT)}" not in text] == []


def test_code_on_the_page_for_those_who_come_from_transformer_lens_runs() -> None:
    for library in ("transformer_lens", "transformers"):
        pytest.importorskip(library)
    page = ROOT / "docs" / "from_transformer_lens.md"
    assert len(python_blocks(page)) >= 5
    run_blocks(page)


def test_python_files_named_in_documents_exist() -> None:
    rooms = "hooked_moe|weights_conversion|experiments|benchmarks|tests|docs"
    named = re.compile(rf"(?<![\w/.])((?:{rooms})/[\w/.-]+\.(?:py|md|cu|h))\b")
    written = {"benchmarks/GPU.md"}  # by `make gpu`
    missing = {
        f"{path.relative_to(ROOT)}: {found}"
        for path in TEXTS
        for found in named.findall(path.read_text(encoding="utf-8"))
        if found not in written and not (ROOT / found).exists()
    }
    assert missing == set()


def test_commands_that_are_named_exist() -> None:
    unknown = set()
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        unknown |= {
            f"{path.relative_to(ROOT)}: hooked-moe {command}"
            for command in re.findall(r"(?:`|^    |^)hooked-moe ([a-z][\w-]*)", text, flags=re.MULTILINE)
            if command not in COMMANDS
        }
        for module in re.findall(r"python -m ((?:experiments|benchmarks|hooked_moe)[\w.]*)", text):
            file = ROOT.joinpath(*module.split("."))
            if not (file.with_suffix(".py").is_file() or (file / "__main__.py").is_file()):
                unknown.add(f"{path.relative_to(ROOT)}: python -m {module}")
    assert unknown == set()


def test_the_report_names_commands_that_exist() -> None:
    assert {source.command.split()[0] for source in DERIVED_FILES.values()} == {"hooked-moe"}
    assert {source.command.split()[1] for source in DERIVED_FILES.values()} <= set(COMMANDS)


@pytest.mark.parametrize("room", ["hooked_moe", "weights_conversion", "experiments", "benchmarks"])
def test_no_module_changes_the_import_path(room: str) -> None:
    assert [path for path in (ROOT / room).rglob("*.py") if "sys.path" in path.read_text(encoding="utf-8")] == []
