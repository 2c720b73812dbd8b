"""Reading the effect table: rows become a grid, in pieces or whole, and malformed tables are refused by row."""

import numpy as np
import pyarrow as pa
import pytest

from hooked_moe import tables
from hooked_moe.tables.effect_grid import EFFECT_VALUES, EffectGrid, effect_chunks
from tests.support.synthetic_effects import synthetic_effects
from tests.support.whole_tables import read_effects

EFFECTS = synthetic_effects()


def changed(row: int, **values: object) -> pa.Table:
    columns = EFFECTS.to_pydict()
    for name, value in values.items():
        columns[name][row] = value
    return pa.table(columns, schema=EFFECTS.schema)


def test_the_grid_holds_the_rows_and_files_read_as_tables_do(tmp_path):
    tables.write_parquet_atomic(EFFECTS, tmp_path / "effects.parquet", row_group_size=777)
    for source in (EFFECTS, tmp_path / "effects.parquet"):
        grid = read_effects(source)
        assert grid.expert.shape == (960, 3, 4)
        assert grid.layers == (0, 1, 2)
        assert grid.valid.sum() == 936
        row = 4321
        p, layer, slot = np.unravel_index(row, grid.expert.shape)
        one = EFFECTS.slice(row, 1).to_pylist()[0]
        assert (grid.document[p], grid.position[p], grid.layers[layer], slot) == tuple(
            one[name] for name in ("document", "position", "layer", "slot")
        )
        for name in EFFECT_VALUES:
            assert getattr(grid, name)[p, layer, slot] == pytest.approx(one[name], nan_ok=True)


MALFORMED = {
    "rows 0 and 1 swapped": (EFFECTS.take([1, 0, *range(2, 240)]), "row 0 of the effect table"),
    "slot repeated": (changed(13, slot=0), "row 13 of the effect table is document 0, position 1, layer 0, slot 0 where"),
    "layer wrong": (changed(16, layer=0), "row 16 .* layer 1, slot 0 was due"),
    "row missing": (pa.concat_tables([EFFECTS.slice(0, 100), EFFECTS.slice(101, 119)]), "incomplete: 219 rows"),
    "position out of order": (EFFECTS.take([*range(12, 24), *range(12), *range(24, 60)]), "position 0 comes after document 0"),
    "position twice": (EFFECTS.take([*range(24), *range(12, 24), *range(24, 60)]), "each must occur once"),
    "position torn": (changed(14, position=2), "row 14 of the effect table is document 0, position 2"),
    "delta partly missing": (changed(14, delta_loss=float("nan")), "NaN for some removals but not for all at document 0, pos"),
    "delta infinite": (changed(14, delta_loss=float("inf")), "infinite at document 0, position 1"),
    "weights rising": (changed(14, routing_weight=9.0), "slots are not in falling order of routing weight at document 0"),
    "null": (changed(14, delta_loss=None), "column delta_loss of the effect table has 1 nulls"),
    "no column": (EFFECTS.drop_columns(["expert"]), "not an effect table: column expert missing"),
    "empty": (EFFECTS.slice(0, 0), "no rows"),
    "slots from one": (EFFECTS.filter(pa.compute.greater(EFFECTS["slot"], 0)), "counted from 0"),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_effect_table_is_refused_by_row(fault):
    table, message = MALFORMED[fault]
    with pytest.raises(ValueError, match=message):
        read_effects(table)


@pytest.mark.parametrize("rows", [1, 12, 500, 2_399, 1 << 20])
@pytest.mark.parametrize("row_group_size", [7, 777, 1 << 20])
def test_chunks_joined_are_the_table_and_hold_whole_positions(rows, row_group_size, tmp_path):
    table = EFFECTS.slice(0, 2_400)
    tables.write_parquet_atomic(table, tmp_path / "effects.parquet", row_group_size=row_group_size)
    chunks = list(effect_chunks(tmp_path / "effects.parquet", rows=rows))
    whole = read_effects(table)
    assert {len(chunk.document) for chunk in chunks[:-1]} <= {max(1, rows // 12)}
    for name in ("document", "position", "valid", *EFFECT_VALUES):
        np.testing.assert_array_equal(np.concatenate([getattr(chunk, name) for chunk in chunks]), getattr(whole, name))


@pytest.mark.parametrize("fault", sorted(set(MALFORMED) - {"row missing", "empty", "slots from one"}))
def test_faults_are_found_in_whichever_chunk_they_are(fault):
    """As above, after whole documents of other chunks; what is said of rows counts from the start of the table."""
    table, message = MALFORMED[fault]
    if "document" in table.column_names and fault != "no column":
        shifted = pa.array((table["document"].to_numpy() + 1).astype(np.int32))
        table = table.set_column(0, EFFECTS.schema.field(0), shifted)
        table = pa.concat_tables([EFFECTS.slice(0, 480), table])
        message = message.replace("document 0", "document 1")
        for row in (0, 13, 14, 16):
            message = message.replace(f"row {row} ", f"row {row + 480} ")
    with pytest.raises(ValueError, match=message):
        list(effect_chunks(table, rows=24))


def test_another_scope_takes_the_place_of_the_loss_changes():
    grid = read_effects(EFFECTS)
    with pytest.raises(ValueError, match="differ in expert"):
        grid.with_effects_of(read_effects(synthetic_effects(seed=5)))
    some = EFFECTS.filter(pa.compute.not_equal(EFFECTS["layer"], 1))
    fewer = grid.with_effects_of(read_effects(some))
    assert isinstance(fewer, EffectGrid)
    assert fewer.layers == (0, 2)
    np.testing.assert_array_equal(fewer.gap_norm, grid.gap_norm[:, [0, 2]])


def test_what_was_read_does_not_stay_in_memory(tmp_path):
    tables.write_parquet_atomic(EFFECTS, tmp_path / "effects.parquet", row_group_size=480)
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in effect_chunks(tmp_path / "effects.parquet", rows=480)]
    assert len(held) == 24
    assert max(held) < 150_000  # the file has 470,000 bytes
