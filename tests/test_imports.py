"""Modules can be imported in any order: each here is the first of its process."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["analysis", "criteria", "engine.fan_out", "measurement", "released", "report", "statistics"])
def test_a_module_can_be_the_first_to_be_imported(module: str) -> None:
    subprocess.run([sys.executable, "-c", f"import hooked_moe.{module}"], check=True)
