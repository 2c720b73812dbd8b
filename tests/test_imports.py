"""Modules can be imported in any order: each here is the first of its process."""

from __future__ import annotations

import subprocess
import sys

MODULES = ["analysis", "criteria", "engine.fan_out", "measurement", "released", "report", "statistics"]
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
    done = subprocess.run([sys.executable, "-c", IN_A_PROCESS_EACH, *MODULES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
