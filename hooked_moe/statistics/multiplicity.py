"""Adjusted p-values over a family of tests."""

import numpy as np
from jaxtyping import Float


def bonferroni(p: Float[np.ndarray, " test"], n_tests: int | None = None) -> Float[np.ndarray, " test"]:
    """Adjusted p-values min(1, m p), `m` the number of tests (default: those given). NaN stays NaN and still counts."""
    return np.minimum(1.0, np.asarray(p, np.float64) * _family_size(p, n_tests))


def holm(p: Float[np.ndarray, " test"], n_tests: int | None = None) -> Float[np.ndarray, " test"]:
    """Holm's step-down adjusted p-values. NaN stays NaN; it counts in `m` and takes the last ranks (as p = 1 would)."""
    values = np.asarray(p, np.float64)
    order = np.argsort(values, kind="stable")  # NaN last
    factors = _family_size(p, n_tests) - np.arange(len(values))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * values[order]))
    return adjusted


def benjamini_hochberg(p: Float[np.ndarray, " test"], n_tests: int | None = None) -> Float[np.ndarray, " test"]:
    """Step-up adjusted p-values of Benjamini and Hochberg (1995), which bound the false discovery rate.

    At level q the tests with adjusted p <= q are the rejected ones; the expected share of true nulls among them is at
    most q where the tests are independent or positively dependent. NaN stays NaN; it counts in `m` as p = 1 would.
    """
    values = np.asarray(p, np.float64)
    order = np.argsort(values, kind="stable")  # NaN last
    factors = _family_size(p, n_tests) / (1.0 + np.arange(len(values)))
    scaled = np.minimum(1.0, factors * values[order])
    adjusted = np.empty_like(values)
    adjusted[order] = np.fmin.accumulate(scaled[::-1])[::-1]  # fmin: what follows a NaN is not NaN
    return np.where(np.isnan(values), np.nan, adjusted)


def _family_size(p: Float[np.ndarray, " test"], n_tests: int | None) -> int:
    m = len(p) if n_tests is None else n_tests
    if m < len(p):
        raise ValueError(f"a family of {m} tests cannot hold {len(p)} p-values")
    return m
