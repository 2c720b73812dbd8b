"""Results in long form, in files, in notebooks and as pictures: what goes in comes out to the bit, and damage is seen."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hooked_moe import tables
from hooked_moe.checks import UnknownNameError
from hooked_moe.tables import Axis, Column, GridResult, Result


@dataclass(frozen=True, repr=False)
class Grid(GridResult):
    layers: list[int]
    names: list[str]
    which: np.ndarray
    value: np.ndarray
    by_layer: np.ndarray
    sure: np.ndarray
    vectors: np.ndarray
    rest: np.ndarray
    notes: list[Any] = field(default_factory=list)

    AXES: ClassVar = {
        "layer": Axis("block", labels="layers"),
        "text": Axis("text", "name", labels="names"),
        "slot": Axis("rank"),
    }
    PRESENT: ClassVar = "which"
    COLUMNS: ClassVar = {
        "which": Column("layer text slot", "index", "expert; -1: none"),
        "value": Column("layer text slot", "nats", "effect"),
        "by_layer": Column("layer", "1", "repeats"),
        "sure": Column("text", "1", "yes or no"),
        "vectors": Column("layer slot expert", "1", "stored only: it would repeat"),
        "rest": Column("layer text slot lag coordinate", "nats", "a list of every row"),
    }

    def attributes(self) -> dict[str, Any]:
        return super().attributes() | {"notes": self.notes}


@pytest.fixture
def grid() -> Grid:
    random = np.random.default_rng(0)
    value = random.normal(size=(3, 2, 4)).astype(np.float32)
    value[1, 0, 2] = np.nan
    which = random.integers(0, 9, (3, 2, 4))
    which[2, 1, 3] = -1
    return Grid(
        [0, 2, 5],
        ["<b>one</b>", "two"],
        which,
        value,
        random.normal(size=3),
        np.array([True, False]),
        random.normal(size=(3, 4, 5)),
        random.normal(size=(3, 2, 4, 2, 3)),
        [{"a": 1}],
    )


def equal(one: Grid, other: Grid) -> bool:
    same = [np.array_equal(one.array(n), other.array(n), equal_nan=one.array(n).dtype.kind == "f") for n in one.columns()]
    types = [one.array(n).dtype == other.array(n).dtype for n in one.columns()]
    return all(same) and all(types) and one.attributes() == other.attributes()


def test_the_long_form_has_a_row_for_every_place_that_there_is(grid: Grid) -> None:
    table = grid.table()
    assert table.column_names == ["layer", "text", "slot", "which", "value", "by_layer", "sure", "rest"]
    assert table.num_rows == 3 * 2 * 4 - 1
    expected = [
        (layer, text, slot, grid.which[i, j, slot], grid.value[i, j, slot], grid.by_layer[i], grid.sure[j], grid.rest[i, j, slot])
        for i, layer in enumerate([0, 2, 5])
        for j, text in enumerate(["<b>one</b>", "two"])
        for slot in range(4)
        if grid.which[i, j, slot] >= 0
    ]
    for row, (layer, text, slot, which, value, by_layer, sure, rest) in zip(table.to_pylist(), expected, strict=True):
        assert (row["layer"], row["text"], row["slot"], row["which"]) == (layer, text, slot, which)
        assert row["sure"] == sure
        np.testing.assert_equal([row["value"], row["by_layer"]], [value, by_layer])
        assert row["rest"] == rest.ravel().tolist()
    for column in table.schema:
        assert {b"meaning", b"unit"} <= column.metadata.keys()


def test_a_file_gives_the_result_again_to_the_bit(grid: Grid, tmp_path: Path) -> None:
    grid.save(tmp_path / "grid.parquet")
    again = Grid.load(tmp_path / "grid.parquet")
    assert equal(grid, again)
    assert again.table().schema.equals(grid.table().schema, check_metadata=True)
    first = (tmp_path / "grid.parquet").read_bytes()
    again.save(tmp_path / "grid.parquet")
    assert (tmp_path / "grid.parquet").read_bytes() == first
    assert pq.read_table(tmp_path / "grid.parquet", columns=["layer", "value"]).num_rows == 24, "any reader of parquet reads it"


def test_a_write_that_fails_leaves_the_old_file(grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid.save(tmp_path / "grid.parquet")
    before = (tmp_path / "grid.parquet").read_bytes()

    def interrupted(writer: pq.ParquetWriter, table: pa.Table, *options: Any) -> None:
        raise KeyboardInterrupt  # with the first bytes of the file written

    monkeypatch.setattr(pq.ParquetWriter, "write_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        grid.save(tmp_path / "grid.parquet")
    assert (tmp_path / "grid.parquet").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["grid.parquet"]


@dataclass(frozen=True, repr=False)
class Other(Grid):
    pass


def test_a_file_of_another_class_is_refused(grid: Grid, tmp_path: Path) -> None:
    Other(**vars(grid)).save(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"holds a result of class Other, no Grid: use Other\.load"):
        Grid.load(tmp_path / "other.parquet")
    tables.write_parquet_atomic(pa.table({"a": [1]}), tmp_path / "plain.parquet")
    with pytest.raises(ValueError, match=r"holds another table, no Grid: it was not written by save\(\)"):
        Grid.load(tmp_path / "plain.parquet")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.parquet: Grid\.load reads"):
        Grid.load(tmp_path / "none.parquet")


def test_damage_anywhere_in_a_file_is_seen(grid: Grid, tmp_path: Path) -> None:
    """One bit of any byte turned: either the file is refused, or what it gives is the same (bytes that nothing depends on)."""
    grid.save(tmp_path / "grid.parquet")
    content = (tmp_path / "grid.parquet").read_bytes()
    refused = 0
    footer = int.from_bytes(content[-8:-4], "little")
    places = np.random.default_rng(1).choice(len(content) - footer - 8, 150, replace=False)  # of the data; the footer is thrift
    for place in places.tolist():
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        (tmp_path / "damaged.parquet").write_bytes(damaged)
        with contextlib.suppress(ValueError):
            assert equal(grid, Grid.load(tmp_path / "damaged.parquet")), f"byte {place} changes what is read, and nothing is said"
            refused -= 1
        refused += 1
    assert refused > 100
    table = pq.read_table(tmp_path / "grid.parquet")
    labels = {name: value.replace(b'"two"', b'"twp"') for name, value in table.schema.metadata.items()}
    pq.write_table(table.replace_schema_metadata(labels), tmp_path / "damaged.parquet")
    with pytest.raises(ValueError, match="is damaged: what it says of its rows has another checksum"):
        Grid.load(tmp_path / "damaged.parquet")
    (tmp_path / "damaged.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is damaged, or no parquet file"):
        Grid.load(tmp_path / "damaged.parquet")


def test_nothing_but_json_is_stored_beside_the_rows(grid: Grid, tmp_path: Path) -> None:
    grid.save(tmp_path / "grid.parquet")
    labels = pq.read_schema(tmp_path / "grid.parquet").metadata
    assert json.loads(labels[b"hooked_moe.metadata"])["attributes"]["names"] == ["<b>one</b>", "two"]
    grid.notes.append(float("nan"))
    with pytest.raises(ValueError, match="JSON"):
        grid.save(tmp_path / "grid.parquet")


def test_repr_and_html_are_short_and_escaped(grid: Grid) -> None:
    assert repr(grid) == "Grid(3 layer x 2 text x 4 slot: which, value, by_layer, sure and 2 more)"
    page = grid._repr_html_()
    assert "<b>" not in page
    assert "&lt;b&gt;one&lt;/b&gt;" in page
    assert page.count("<tr>") == 1 + 8
    assert "15 more rows" in page
    assert max(map(len, re.findall(r"<td>(.*?)</td>", page))) <= 60


def test_a_dataframe_is_the_table(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = grid.to_dataframe()
    assert list(frame.columns) == grid.table().column_names
    assert len(frame) == 23
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"needs pandas: pip install pandas\. Without it, table\(\)"):
        grid.to_dataframe()


def test_columns_that_disagree_about_an_axis_are_refused(grid: Grid) -> None:
    wrong = Grid(**vars(grid) | {"by_layer": np.zeros(4)})
    with pytest.raises(ValueError, match="by_layer has 4 along layer, where columns before it have 3"):
        wrong.table()


def test_a_plot_shows_means_over_the_other_axes(grid: Grid) -> None:
    axes = grid.plot().axes[0]
    drawn = axes.images[0].get_array().filled(np.nan)
    assert drawn.shape == (3, 9)
    for i in range(3):
        for expert in range(9):
            values = grid.value[i][(grid.which[i] == expert) & np.isfinite(grid.value[i])]
            np.testing.assert_allclose(drawn[i, expert], values.mean() if len(values) else np.nan, rtol=1e-6)
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("layer", "which")
    drawn = grid.plot("value", "text").axes[0].images[0].get_array()
    np.testing.assert_allclose(drawn[0, 1], grid.value[0, 1].mean(), rtol=1e-6)
    with pytest.raises(UnknownNameError, match="did you mean 'value'"):
        grid.plot("valu")
    with pytest.raises(UnknownNameError, match="This result has text, slot, which"):
        grid.plot(across="head")


def test_a_class_must_say_what_its_rows_are() -> None:
    with pytest.raises(NotImplementedError, match=r"Result must define table\(\)"):
        Result().table()
    with pytest.raises(NotImplementedError, match=r"Result has no picture of its own: draw from its \.table\(\)"):
        Result().plot()
    with pytest.raises(NotImplementedError, match="from_table"):
        Result.from_table(pa.table({}), {})
