"""The wheel: what is in it, and that its commands work where there is no repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from hooked_moe import __version__
from hooked_moe.loading.registry import SHIPPED

ROOT = Path(__file__).resolve().parents[2]
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")
DATA = [
    "hooked_moe/py.typed",
    "hooked_moe/corpus/data/held_out.jsonl",
    "hooked_moe/paper/data/published_tables.json",
    "hooked_moe/paper/data/released_results.json",
    "hooked_moe/paper/data/olmoe_audit_comparisons.parquet",
    "hooked_moe/paper/data/deepseek_audit_comparisons.parquet",
    *(f"hooked_moe/pretrained/{name}/{file}" for name in SHIPPED for file in MODEL_FILES),
]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(directory)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = directory.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs the console script of an installed wheel in an empty directory, as users do; packages come from this environment."""
    site, home = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("home")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-compile", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        program = [str(site / "bin" / command[0]), *command[1:]] if command[0] == "hooked-moe" else [sys.executable, *command]
        return subprocess.run(program, cwd=home, env=environment, capture_output=True, text=True)

    where = run("-c", "import hooked_moe; print(hooked_moe.__file__)").stdout
    assert Path(where.strip()).is_relative_to(site)
    return run


def test_the_wheel_has_every_module_and_every_file_that_modules_read(wheel: Path) -> None:
    assert wheel.name == f"hooked_moe-{__version__}-py3-none-any.whl"
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(path.relative_to(ROOT))
        for package in ("hooked_moe", "weights_conversion")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected - inside == set()
    assert set(DATA) <= inside
    assert any(name.endswith(".cu") for name in inside)
    assert any(name.endswith(".cuh") for name in inside)


def test_the_wheel_has_nothing_of_the_repository_but_the_packages(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {"hooked_moe", "weights_conversion", f"hooked_moe-{__version__}.dist-info"}


def test_the_installed_command_lists_its_commands(installed: Run) -> None:
    done = installed("hooked-moe", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: hooked-moe <command>")
    assert installed("-m", "hooked_moe", "--help").stdout == done.stdout
    assert installed("hooked-moe", "--version").stdout == f"hooked-moe {__version__}\n"


@pytest.mark.slow
def test_an_installed_wheel_audits(installed: Run) -> None:
    small = ["--model", "tiny-olmoe", "--documents", "12", "--layers", "1", "--tokens", "64"]
    for command in ("audit", "control", "redistribution"):
        done = installed("hooked-moe", command, *small, "--positions", "20")
        assert done.returncode == 0, done.stderr
    report = Path(installed("-c", "from pathlib import Path; print(*Path.cwd().rglob('report.html'))").stdout.strip())
    text = report.read_text(encoding="utf-8")
    assert "<code>hooked-moe progressive --model tiny-olmoe</code>" in text
    for arguments in (["progressive", *small, "--positions", "5"], ["compare", "--brief"]):
        done = installed("hooked-moe", *arguments)
        assert done.returncode == 0, done.stderr
