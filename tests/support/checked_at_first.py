"""What `type_checks` wraps functions in, loaded under a name of jaxtyping's: warnings look past it for the line of a user."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jaxtyping

CALLS = 10
"""Of each function in each test that are checked."""
jaxtyped = jaxtyping.jaxtyped
test_number = [0]


def checked_at_first(fn: Any = None, *, typechecker: Any = None) -> Any:
    """In place of `jaxtyping.jaxtyped`."""
    if fn is None:
        return functools.partial(checked_at_first, typechecker=typechecker)
    if isinstance(fn, property):
        return property(
            *(None if f is None else checked_at_first(f, typechecker=typechecker) for f in (fn.fget, fn.fset, fn.fdel))
        )
    if isinstance(fn, classmethod | staticmethod):
        return type(fn)(checked_at_first(fn.__func__, typechecker=typechecker))
    checked: Callable[..., Any] = jaxtyped(fn, typechecker=typechecker)
    if isinstance(fn, type):
        return checked
    test = calls = 0

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal test, calls
        if test != test_number[0]:
            test, calls = test_number[0], 0
        if calls == CALLS:
            return fn(*args, **kwargs)
        calls += 1
        return checked(*args, **kwargs)

    return call
