"""The documents of a corpus, in order: where each one's sums go."""

import numpy as np
from jaxtyping import Float, Int, Num


class Documents:
    def __init__(self, ids: Int[np.ndarray, " document"]) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def split(self, document: Int[np.ndarray, " P"]) -> tuple[Int[np.ndarray, " here"], Int[np.ndarray, " here"]]:
        """For the sorted documents of a chunk's positions: which documents these are, and where each one's positions start."""
        starts = np.flatnonzero(np.concatenate([np.ones(min(len(document), 1), bool), document[1:] != document[:-1]]))
        return np.searchsorted(self.ids, document[starts]), starts


def sums_from(values: Num[np.ndarray, "P *columns"], starts: Int[np.ndarray, " here"]) -> Float[np.ndarray, "here *columns"]:
    """Sums over the positions of each document of a chunk, which begin at `starts`."""
    return np.add.reduceat(values, starts, axis=0, dtype=np.float64)
