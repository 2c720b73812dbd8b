"""Numbers and texts as a page keeps them: rounded to steps, packed into bytes, compressed, in base64."""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int8

NOT_MEASURED = -128
"""The code of NaN."""
_MOST = 127


@dataclass(frozen=True)
class LogScale:
    """Signed numbers as whole codes: 0 is nothing, and each code after that is `step` times the one before, from `floor` on.

    What is read back is off by a factor of at most sqrt(step); what is smaller than floor / sqrt(step) reads as 0.

    >>> scale = LogScale(floor=0.001, step=1.1)
    >>> scale.codes(np.array([0.0, 0.001, -0.0011, np.nan])).tolist()
    [0, 1, -2, -128]
    """

    floor: float
    step: float

    @classmethod
    def up_to(cls, largest: float, range: float, step: float) -> LogScale:
        """A scale whose floor is the `range`-th part of the largest size. Raises ValueError where that takes too many steps."""
        if np.log(range) / np.log(step) > _MOST - 2:
            raise ValueError(f"steps of {step} do not reach from 1 to {range} in {_MOST - 2}")
        return cls((largest if largest > 0 else 1.0) / range, step)

    def codes(self, values: Float[np.ndarray, "*shape"]) -> Int8[np.ndarray, "*shape"]:
        size = np.abs(values)
        with np.errstate(divide="ignore", invalid="ignore"):
            steps = np.round(np.log(size / self.floor) / np.log(self.step)) + 1
        codes = np.sign(values) * np.clip(np.nan_to_num(steps, neginf=0), 0, _MOST)
        return np.where(np.isnan(values), NOT_MEASURED, codes).astype(np.int8)

    def values(self, codes: Int8[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        """What the page makes of codes."""
        whole = codes.astype(np.int64)
        values = np.where(whole == 0, 0.0, np.sign(whole) * self.floor * self.step ** (np.abs(whole) - 1.0))
        return np.where(whole == NOT_MEASURED, np.nan, values)


def packed(content: bytes) -> str:
    """Bytes, compressed as zlib does ("deflate" to a browser), in base64."""
    return base64.b64encode(zlib.compress(content, 6)).decode("ascii")


def unpacked(text: str) -> bytes:
    """The inverse of `packed`."""
    return zlib.decompress(base64.b64decode(text, validate=True))
