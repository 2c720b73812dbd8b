"""The largest removals of every expert and the shares of its effect at their tokens, however the table is cut into chunks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from hooked_moe.analysis.accumulators.effect_sums import ExpertEffectSums
from hooked_moe.analysis.accumulators.token_rows import TokenRows
from hooked_moe.analysis.expert_tokens import EXPERT_TOKENS, MOST_TOKENS, TOKEN_SHARES, TokenShares, TopEffects
from hooked_moe.tables import read_parquet, write_parquet_atomic
from hooked_moe.tables.effect_grid import EffectGrid, effect_chunks
from tests.support.synthetic_effects import synthetic_run

EXPERTS = 7


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "made-up"
    return synthetic_run(directory, EXPERTS, n_documents=9, n_tokens=31, layers=(2, 4), k=2, vocabulary=30)


def derived(run: Path, rows: int) -> tuple[pa.Table, pa.Table]:
    """Both tables, from chunks of so many rows."""

    def chunks() -> list[EffectGrid]:
        return list(effect_chunks(run / "effects.parquet", ("expert", "delta_loss", "kl"), rows=rows))

    top, sums = TopEffects((2, 4)), ExpertEffectSums((2, 4), EXPERTS)
    for chunk in chunks():
        top.update(chunk.measured())
        sums.update(chunk.measured())
    shares, tokens = TokenShares(top.tokens(run / "tokens.parquet"), sums), TokenRows(run / "tokens.parquet")
    for chunk in chunks():
        shares.update(chunk.measured(), tokens.of(chunk)[chunk.valid])
    return top.table(), shares.table()


def test_tables_are_the_same_however_chunks_are_cut(run: Path) -> None:
    whole = derived(run, 1 << 20)
    assert [table.schema.equals(schema) for table, schema in zip(whole, (EXPERT_TOKENS, TOKEN_SHARES), strict=True)] == [True] * 2
    for rows in (4, 28, 500):
        top, shares = derived(run, rows)
        assert top.equals(whole[0])
        for name in TOKEN_SHARES.names:
            np.testing.assert_allclose(shares[name].to_numpy(), whole[1][name].to_numpy(), rtol=1e-9)


def test_the_largest_removals_are_those_of_a_sorted_table(run: Path) -> None:
    top = derived(run, 100)[0].to_pandas()
    effects = read_parquet(run / "effects.parquet").to_pandas().dropna(subset=["delta_loss"])
    for (layer, expert), own in effects.groupby(["layer", "expert"]):
        for effect in ("delta_loss", "kl"):
            found = top[(top["layer"] == layer) & (top["expert"] == expert) & (top["effect"] == effect)]
            sizes = np.sort(np.abs(own[effect].to_numpy()))[::-1][:MOST_TOKENS]
            np.testing.assert_array_equal(np.abs(found["value"].to_numpy()), sizes)
            assert found["rank"].tolist() == list(range(len(sizes)))


def test_tokens_of_another_measurement_are_refused(run: Path, tmp_path: Path) -> None:
    tokens = read_parquet(run / "tokens.parquet")
    (chunk,) = effect_chunks(run / "effects.parquet")
    for name, table, fault in (
        ("fewer", tokens.slice(0, tokens.num_rows - 1), "has fewer positions"),
        ("other", tokens.take(np.arange(tokens.num_rows)[::-1]), "differ in document"),
    ):
        write_parquet_atomic(table, tmp_path / f"{name}.parquet")
        with pytest.raises(ValueError, match=f"{name}.parquet.*{fault}"):
            TokenRows(tmp_path / f"{name}.parquet").of(chunk)
