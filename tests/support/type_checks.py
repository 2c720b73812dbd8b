"""The shapes and types of annotations, checked at the first calls of every function in every test.

A check takes longer than most functions that it checks, and what a test calls a thousand times gets the same shapes all the time:
checked at every call, the tests take twice as long.
"""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import jaxtyping

_spec = spec_from_file_location("jaxtyping.checked_at_first", Path(__file__).with_name("checked_at_first.py"))
assert _spec is not None
assert _spec.loader is not None
_wrapper = module_from_spec(_spec)
sys.modules[_wrapper.__name__] = _wrapper
_spec.loader.exec_module(_wrapper)


def install(*packages: str) -> None:
    """Check the annotations of packages that are imported from now on."""
    jaxtyping.jaxtyped = _wrapper.checked_at_first
    jaxtyping.install_import_hook(packages, "beartype.beartype")


def begin_test() -> None:
    """All functions are checked anew."""
    _wrapper.test_number[0] += 1
