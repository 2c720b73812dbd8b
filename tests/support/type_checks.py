"""The shapes and types of annotations, checked at the first calls of every function in every test.

A check takes longer than most functions that it checks, and what a test calls a thousand times gets the same shapes all the time:
checked at every call, the tests take twice as long.
"""

from __future__ import annotations

import builtins
import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import jaxtyping

CALLS = 10
"""Of each function in each test that are checked."""
_test = [0]
_jaxtyped = jaxtyping.jaxtyped
_AS_JAXTYPING = {"__name__": "jaxtyping", "__builtins__": builtins, "_test": _test, "CALLS": CALLS}
"""What a warning's search for the user's line takes for jaxtyping's own frame."""


def install(*packages: str) -> None:
    """Check the annotations of packages that are imported from now on."""
    jaxtyping.jaxtyped = _checked_at_first
    jaxtyping.install_import_hook(packages, "beartype.beartype")


def begin_test() -> None:
    """All functions are checked anew."""
    _test[0] += 1


def _checked_at_first(fn: Any = None, *, typechecker: Any = None) -> Any:
    """In place of `jaxtyping.jaxtyped`."""
    if fn is None:
        return functools.partial(_checked_at_first, typechecker=typechecker)
    if isinstance(fn, property):
        return property(
            *(None if f is None else _checked_at_first(f, typechecker=typechecker) for f in (fn.fget, fn.fset, fn.fdel))
        )
    if isinstance(fn, classmethod | staticmethod):
        return type(fn)(_checked_at_first(fn.__func__, typechecker=typechecker))
    checked: Callable[..., Any] = _jaxtyped(fn, typechecker=typechecker)
    if isinstance(fn, type):
        return checked
    test = calls = 0

    def checked_at_first(*args: Any, **kwargs: Any) -> Any:
        nonlocal test, calls
        if test != _test[0]:
            test, calls = _test[0], 0
        if calls == CALLS:
            return fn(*args, **kwargs)
        calls += 1
        return checked(*args, **kwargs)

    return functools.wraps(fn)(FunctionType(checked_at_first.__code__, _AS_JAXTYPING, closure=checked_at_first.__closure__))
