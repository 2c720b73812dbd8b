"""A logit lens in long form. Apart from the lens itself, for pyarrow is not for everyone who runs a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from hooked_moe.tables import Axis, Column, GridResult

_PLACES = ("batch", "pos")


@dataclass(frozen=True, repr=False)
class LensRows(GridResult):
    """A row for every stream, row, position and selected token."""

    streams: list[str]
    token: Int[np.ndarray, "stream batch pos choice"]
    value: Float[np.ndarray, "stream batch pos choice"]
    entropy: Float[np.ndarray, "stream batch pos"]
    rank: Int[np.ndarray, "stream batch pos choice"] | None
    absent: tuple[str, ...]
    """The axes that the lens does not have: they have one place here, and no column in `table()`."""
    unit: str

    AXES: ClassVar = {
        "stream": Axis("residual stream that is read", "name", "streams"),
        "batch": Axis("row"),
        "pos": Axis("position, from the first that was asked for"),
        "choice": Axis("place among the selected tokens"),
    }

    def columns(self) -> Mapping[str, Column]:
        everywhere = "stream batch pos choice"
        columns = {
            "token": Column(everywhere, "id", "the token that is looked at"),
            "value": Column(everywhere, self.unit, "what the stream says of it"),
            "entropy": Column("stream batch pos", "nats", "entropy of what the stream predicts, over the whole vocabulary"),
        }
        rank = {"rank": Column(everywhere, "rank", "how many tokens the stream puts before it")}
        return columns if self.rank is None else columns | rank

    def table(self) -> pa.Table:
        return super().table().drop_columns(list(self.absent))


def lens_rows(lens: Any) -> LensRows:
    """The rows of a `LogitLens`."""
    absent = tuple(axis for axis in _PLACES if axis not in lens.axes)

    def whole(x: Any, last: int) -> np.ndarray:
        """With all axes, those that the lens lacks of one place each; `last` axes come after them."""
        values = x.detach().cpu().numpy()
        shape = iter(values.shape[1 : values.ndim - last])
        places = [1 if axis in absent else next(shape) for axis in _PLACES]
        return values.reshape(len(lens.labels), *places, *values.shape[values.ndim - last :])

    value = whole(lens.values, 1)
    token = whole(lens.token_ids, 1)
    rank = None if lens.target_ranks is None else whole(lens.target_ranks, 1)
    unit = {"logits": "logits", "log_probs": "nats", "probs": "1"}[lens.return_type]
    return LensRows(list(lens.labels), token, value, whole(lens.entropy, 0), rank, absent, unit)
