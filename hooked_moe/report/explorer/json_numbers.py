"""Numbers as a page keeps them: four digits, and null for what is not a number."""

from __future__ import annotations

import math

import numpy as np


def number(value: float | None) -> float | None:
    """Four significant digits; None for None, NaN and infinity."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def numbers(values: np.ndarray) -> list[float | None]:
    return [number(value) for value in values.tolist()]
