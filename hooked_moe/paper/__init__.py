"""The experiments of arXiv 2606.10703 as its released code runs them, beside those that the project defines.

    run                 the four experiments, measured into a directory   metrics           its metrics and its redistribution
    texts, padded_rows  what experts do at every row, padding included    ranked_removals   which experts are removed, and where
    sequence_removals   experts removed from whole texts                  cells             its tests, effect sizes, decisions
    published           the printed numbers                               comparison        a run of ours beside them

`hooked_moe.paper.protocols` tabulates what the released code does in place of the stated protocol.
"""

from hooked_moe.paper.cells import ReleasedCell, released_cells, released_cells_table
from hooked_moe.paper.run import ReleasedRun, open_released

__all__ = ["ReleasedCell", "ReleasedRun", "open_released", "released_cells", "released_cells_table"]
