"""Whatever a user makes torch's defaults (device, dtype, autocast, inference mode), the package computes the same."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FACTORIES = {
    "arange",
    "as_tensor",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "tensor",
    "zeros",
}
DTYPE_FROM_VALUES = {"arange", "as_tensor", "randint", "randperm"}
"""Whole numbers are int64 whatever the default; the values given say the rest."""


def made_without_saying(source: str) -> list[tuple[int, str]]:
    """Line and name of every call that makes a tensor without its device, or a dtype where that is torch's default."""
    tree = ast.parse(source)
    parameters = {
        id(made)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "Parameter"
        for made in node.args
    }
    found = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES):
            continue
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch") or id(node) in parameters:
            continue
        given = {keyword.arg for keyword in node.keywords}
        if "device" not in given or not ("dtype" in given or node.func.attr in DTYPE_FROM_VALUES):
            found.append((node.lineno, f"torch.{node.func.attr}"))
    return found


def test_every_tensor_that_is_made_says_its_dtype_and_device() -> None:
    """But for parameters, which `Transformer` makes on its config's device, and converts to its config's dtype."""
    assert made_without_saying("torch.zeros(2)\ntorch.zeros(2, dtype=a, device=b)\ntorch.arange(3, device=b)") == [
        (1, "torch.zeros")
    ]
    found = {
        f"{path.relative_to(ROOT)}:{line}": name
        for room in ("hooked_moe", "weights_conversion")
        for path in (ROOT / room).rglob("*.py")
        for line, name in made_without_saying(path.read_text(encoding="utf-8"))
    }
    assert found == {}
