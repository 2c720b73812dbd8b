"""Modules can be imported in any order, and no more than is needed is imported: each process here imports one thing first."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hooked_moe

PACKAGE = Path(__file__).resolve().parents[1] / "hooked_moe"


def run(program: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


MODULES = ["analysis", "analysis.criteria", "counterfactuals.engine", "loading", "measurement", "model", "paper", "surgery"]
IN_A_PROCESS_EACH = """
import importlib, os, sys
import matplotlib.figure, numpy, pyarrow.parquet, scipy.stats, torch  # once for all, for they take seconds
assert not [name for name in sys.modules if name.startswith("hooked_moe")]
for module in sys.argv[1:]:
    child = os.fork()
    if not child:
        importlib.import_module("hooked_moe." + module)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, module
"""


def test_any_module_can_be_the_first_to_be_imported() -> None:
    run(IN_A_PROCESS_EACH, *MODULES)


@pytest.mark.parametrize(
    "module", ["hooked_moe", "hooked_moe.report", "hooked_moe.analysis", "hooked_moe.statistics", "hooked_moe.tables"]
)
def test_what_needs_no_model_loads_no_torch(module: str) -> None:
    loaded = run(f"import sys, {module}; print(*sys.modules)").split()
    assert module in loaded
    assert [name for name in loaded if name.split(".")[0] in ("torch", "safetensors", "tokenizers")] == []


def test_importing_the_package_alone_loads_nothing_but_its_version() -> None:
    loaded = run("import sys; before = {*sys.modules}; import hooked_moe; print(*sys.modules.keys() - before)").split()
    others = {name for name in loaded if name.partition(".")[0] not in sys.stdlib_module_names}
    assert others == {"hooked_moe", "hooked_moe.version"}


def test_a_model_loads_neither_compiler_nor_statistics_before_they_are_used() -> None:
    """Both take longer than torch does without them."""
    loaded = run("import sys; from hooked_moe import HookedMoE; print(*sys.modules)").split()
    assert "torch" in loaded
    assert {"torch._dynamo", "sympy", "scipy.stats", "scipy.optimize", "matplotlib", "pandas", "ray"}.isdisjoint(loaded)


def test_public_names_are_there_when_they_are_used() -> None:
    printed = run(
        "import hooked_moe\n"
        "print(*[name for name in hooked_moe.__all__ if getattr(hooked_moe, name, None) is None])\n"
        "print(*[name for name in dir(hooked_moe) if not hasattr(hooked_moe, name)])\n"
    )
    assert printed.split() == []


def test_modules_of_the_package_import_each_other_where_they_are_defined() -> None:
    """Not through the lazy names of the package, which would hide who imports whom from the layers in pyproject.toml."""
    lazy = {*hooked_moe._HOMES}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "hooked_moe":
                assert lazy.isdisjoint(alias.name for alias in node.names), path
