"""How each CUDA kernel is launched: shapes in, grid and compile-time constants out.

One function per kernel. Everything that runs a kernel, on a GPU or in the tests on a CPU, asks here: so the tests run what a
GPU runs. A kernel's arguments stand in its source: tensors as pointers (None as null), whole numbers as `long long`, others as
`float`, in that order of its signature.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

SOURCES = Path(__file__).parent
SCALARS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
"""The types of `common.cuh`."""
MASKS = SCALARS | {torch.bool: "bool"}

THREADS = 256
ACCESS_BYTES = 16
"""The most that one instruction reads or writes."""
SHARED_BYTES = 48 << 10
"""What a block gets without asking for more."""


MOST_PARTS = 512
"""Into how many parts the rows to sort are divided at most: a few for each multiprocessor."""


class Unsupported(ValueError):
    """There is no kernel for these sizes or types; torch's operations have to run."""


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel."""

    name: str
    source: str
    """A file of `cuda/`."""
    defines: tuple[tuple[str, str | int], ...]
    """Compile-time constants; with name and source, what identifies a compiled kernel."""
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int = 0
    """Dynamic shared memory."""

    @property
    def is_empty(self) -> bool:
        """Nothing to do: CUDA takes no grid of no blocks."""
        return prod(self.grid) == 0

    @property
    def path(self) -> Path:
        return SOURCES / self.source


def scalar(dtype: torch.dtype) -> str:
    """The type's name in the sources. Raises `Unsupported` if kernels do not take it."""
    return _named(dtype, SCALARS)


def rows_are_aligned(*tensors: Tensor | None) -> bool:
    """Whether every row of these starts at a multiple of 16 bytes, so that it can be read 16 bytes at a time."""
    return all(
        x is None
        or all(n % ACCESS_BYTES == 0 for n in (x.data_ptr(), *(x.itemsize * step for step in (x.shape[-1], *x.stride()[:-1]))))
        for x in tensors
    )


def masked_combine(
    *, variants: int, tokens: int, slots: int, width: int, dtype: torch.dtype, mask: torch.dtype, aligned: bool
) -> Launch:
    """`mask` is its type: bool, or a float type. `aligned`: `rows_are_aligned` of rows, base and out.

    Raises `Unsupported` where a token's rows would not fit a thread's registers.
    """
    if slots > _HELD:
        raise Unsupported(f"masked_combine takes up to {_HELD} slots, not {slots}")
    most = 1 << (_HELD // slots).bit_length() - 1
    vector = min(ACCESS_BYTES // dtype.itemsize, most) if aligned else 1
    grid, block = _over_rows(tokens, width, vector)
    tile = max(1, min(32, _FACTORS // (slots * block[1])))
    defines = (("SCALAR", scalar(dtype)), ("MASK", _named(mask, MASKS)), ("SLOTS", slots), ("VECTOR", vector), ("TILE", tile))
    grid = grid if variants else (0, 0, 0)
    return Launch("masked_combine", "masked_combine.cu", defines, grid, block, 4 * block[1] * tile * slots)


def route(*, tokens: int, experts: int, slots: int, groups: int, weights: torch.dtype, aligned: bool) -> Launch:
    """`weights` is the type of the weights to write; `groups` 1 is none. `aligned`: `rows_are_aligned` of the logits."""
    if not slots <= experts <= _ROUTED_EXPERTS:
        raise Unsupported(f"route takes from {slots} (one for each slot) to {_ROUTED_EXPERTS} experts, not {experts}")
    vector = ACCESS_BYTES // 4 if aligned else 1
    lanes = min(32, _power_of_two(_ceil_div(experts, 8)))
    per_lane = _ceil_div(experts, lanes * vector) * vector
    shared_bytes = 12 * slots + 16 * groups  # of a token
    together = THREADS // lanes
    while together * shared_bytes > SHARED_BYTES and together * lanes > 32:
        together //= 2
    defines = (("SCALAR", scalar(weights)), ("LANES", lanes), ("PER_LANE", per_lane), ("VECTOR", vector))
    grid = (_ceil_div(tokens, together), 1, 1)
    return Launch("route", "route.cu", defines, grid, (lanes, together, 1), together * shared_bytes)


def group_count(*, entries: int, experts: int) -> Launch:
    """The first of three kernels that sort by expert. Its `grid[0]` is the number of parts: `counts` is int32 [experts, parts].

    Raises `Unsupported` where counters could overflow or would not fit shared memory.
    """
    if entries >= 2**31:
        raise Unsupported(f"rows are counted in 32 bits: sort fewer than {2**31} at once, not {entries}")
    if not 0 < experts <= SHARED_BYTES // 8:
        raise Unsupported(f"sorting takes from 1 to {SHARED_BYTES // 8} experts, not {experts}")
    parts = min(MOST_PARTS, max(1, _ceil_div(entries, THREADS)))  # one of no entries, so that `ends` is written for none
    return Launch("group_count", "group.cu", (), (parts, 1, 1), (THREADS, 1, 1), 4 * experts)


def group_scan(*, experts: int) -> Launch:
    """The second: one warp for each expert."""
    return Launch("group_scan", "group.cu", (), (experts, 1, 1), (32, 1, 1))


def group_scatter(*, entries: int, experts: int) -> Launch:
    """The third, over the parts of the first."""
    parts = group_count(entries=entries, experts=experts).grid
    warps = THREADS // 32
    while (warps + 1) * 4 * experts > SHARED_BYTES:
        warps //= 2
    return Launch("group_scatter", "group.cu", (), parts, (32 * warps, 1, 1), (warps + 1) * 4 * experts)


def gather_rows(*, tokens: int, width: int, dtype: torch.dtype, aligned: bool) -> Launch:
    """`aligned`: `rows_are_aligned` of x and out."""
    vector = ACCESS_BYTES // dtype.itemsize if aligned else 1
    grid, block = _over_rows(tokens, width, vector)
    return Launch("gather_rows", "gather_rows.cu", (("SCALAR", scalar(dtype)), ("VECTOR", vector)), grid, block)


def swiglu(*, rows: int, width: int, dtype: torch.dtype, aligned: bool, clamped: bool = False) -> Launch:
    """`width` is that of out, half of what is read. `aligned`: `rows_are_aligned` of both and out."""
    vector = ACCESS_BYTES // dtype.itemsize if aligned else 1
    grid, block = _over_rows(rows, width, vector)
    name = "clamped_swiglu" if clamped else "swiglu"
    return Launch(name, "swiglu.cu", (("SCALAR", scalar(dtype)), ("VECTOR", vector)), grid, block)


_HELD = 128  # floats of a thread, half of its registers
_FACTORS = 4096  # 16 KiB, so that several blocks fit a multiprocessor
_ROUTED_EXPERTS = 1024  # 32 in a lane, all in registers


def prefix_attention(
    *,
    variants: int,
    batch: int,
    queries: int,
    width: int,
    kv_heads: int,
    group: int,
    head_width: int,
    value_width: int,
    dtype: torch.dtype,
) -> Launch:
    """Windows of `width` tokens (1: single ones); `group` query heads to a key/value head.

    Raises `Unsupported` where values do not fit into registers, or heads into shared memory.
    """
    half = dtype.itemsize == 2
    rows = 128 if half and value_width <= 128 else 64
    head_pitch, value_pitch = (_tile_pitch(16 * _ceil_div(columns, 16), dtype) for columns in (head_width, value_width))
    shared_of = {
        keys: ((rows + keys) * head_pitch + keys * value_pitch) * dtype.itemsize + rows * _ROW_BYTES
        for keys in ((64, 32) if half and head_width <= 128 else (32, 16))  # wider heads leave no registers for 64
    }
    keys = next((keys for keys, size in shared_of.items() if size <= _SHARED_BYTES), None)
    if keys is None or value_width > _VALUE_WIDTH:
        raise Unsupported(f"prefix_attention does not take heads of {head_width} with values of {value_width} in {dtype}")
    shared = shared_of[keys]
    widths = (("HEAD_WIDTH", head_width), ("VALUE_WIDTH", value_width))
    tiles = (("ROWS", rows), ("KEYS", keys), ("SHARED_BYTES", shared))
    grid = (_ceil_div(queries * variants * width * group, rows), kv_heads, batch)
    defines = (("SCALAR", scalar(dtype)), *widths, *tiles)
    return Launch("prefix_attention", "prefix_attention.cu", defines, grid, (_TILE_THREADS, 1, 1), shared)


def target_logprob(*, rows: int, vocabulary: int, span: int, parts: int, dtype: torch.dtype) -> Launch:
    """`span`: tokens of the vocabulary to a block, see `vocabulary_span`. `dtype`: of the weights, and of hidden's `parts`."""
    tile_rows, columns, step = _target_tiles(dtype)
    stages = 3  # one in use, two on their way
    shared = stages * (parts * tile_rows + columns) * _tile_pitch(step, dtype) * dtype.itemsize
    tiles = (("ROWS", tile_rows), ("COLUMNS", columns), ("STEP", step), ("STAGES", stages), ("SHARED_BYTES", shared))
    grid = (_ceil_div(rows, tile_rows), _ceil_div(vocabulary, span), 1)
    defines = (("SCALAR", scalar(dtype)), ("PARTS", parts), *tiles)
    return Launch("target_logprob", "target_logprob.cu", defines, grid, (_TILE_THREADS, 1, 1), shared)


def vocabulary_span(*, rows: int, vocabulary: int, dtype: torch.dtype) -> int:
    """How many tokens of the vocabulary to give to a block so that few rows keep a large GPU busy."""
    tile_rows, columns, _ = _target_tiles(dtype)
    spans = _ceil_div(_BUSY_BLOCKS, max(1, _ceil_div(rows, tile_rows)))
    return columns * _ceil_div(_ceil_div(vocabulary, columns), spans)


_TILE_THREADS = 128
_SHARED_BYTES = 99 << 10
"""The most that a block can have, on compute capability 8.6; beyond 48 KiB the launcher must ask for it."""
_ROW_BYTES = 24  # Row in prefix_attention.cu
_VALUE_WIDTH = 256  # half of a thread's registers
_BUSY_BLOCKS = 1024  # a few waves


def _target_tiles(dtype: torch.dtype) -> tuple[int, int, int]:
    """Rows, columns and depths of a tile."""
    return (128, 128, 32) if dtype.itemsize == 2 else (64, 64, 16)


def _tile_pitch(columns: int, dtype: torch.dtype) -> int:
    return columns + ACCESS_BYTES // dtype.itemsize  # pitch_of in tiles.cuh


def _over_rows(rows: int, width: int, vector: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Grid and block where a thread takes `vector` columns of a row: x is columns in the block and rows in the grid.

    Wide rows are cut into equal parts, narrow ones share a block.
    """
    columns = _ceil_div(width, vector)
    parts = _ceil_div(columns, THREADS)
    if not parts:
        return (0, 0, 0), (THREADS, 1, 1)
    part = _ceil_div(columns, parts)
    x = _power_of_two(part) if part < 32 else 32 * _ceil_div(part, 32)
    y = THREADS // x
    return (_ceil_div(rows, y), parts, 1), (x, y, 1)


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _named(dtype: torch.dtype, names: dict[torch.dtype, str]) -> str:
    if dtype not in names:
        raise Unsupported(f"CUDA kernels take {', '.join(map(str, names))}; not {dtype}")
    return names[dtype]
