"""The reduced audit that studies make of each model, and what is read off it, against the effect table itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from hooked_moe import ExpertMask, HookedMoE
from hooked_moe.analysis.negative_control import shuffle_experts
from hooked_moe.analysis.responses import STUDIED, Response, audit_responses, ranking_responses, wide_rows
from hooked_moe.analysis.run import analyse_run
from hooked_moe.cli.reduced_audit import AuditForm, reduced_audit
from hooked_moe.corpus import load_corpus

FORM = AuditForm(layers=(1, 2, 5), documents=14, tokens=20, progressive_positions=30, random_prunings=2)


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reduced_audit(HookedMoE.from_pretrained("tiny-olmoe"), FORM, tmp_path_factory.mktemp("audits"), "one")


@pytest.fixture(scope="module")
def values(audit: Path) -> dict[tuple[str, str], Response]:
    return {(response.layer, response.name): response for response in audit_responses(audit)}


def test_sizes_are_means_over_the_removals(audit: Path, values: dict[tuple[str, str], Response]) -> None:
    effects = pq.read_table(audit / "effects.parquet").to_pandas().dropna(subset=["delta_loss"])
    by_layer = effects.groupby("layer")
    for layer in (1, 2, 5):
        own = by_layer.get_group(layer)
        assert values[str(layer), "mean_kl"].value == pytest.approx(own["kl"].mean(), rel=1e-5)
        assert values[str(layer), "log_mean_abs_delta"].value == pytest.approx(np.log(own["delta_loss"].abs().mean()), abs=1e-5)
        top = (
            own[own["slot"] == 0]["delta_loss"].abs().mean()
            / own.groupby("slot")["delta_loss"].apply(lambda x: x.abs().mean()).sum()
        )
        assert values[str(layer), "top_slot_share"].value == pytest.approx(top, rel=1e-4)
    assert values["all", "mean_delta"].value == pytest.approx(effects["delta_loss"].mean(), rel=1e-4)
    assert values["all", "rest_cosine"].value == pytest.approx(effects["rest_cosine"].mean(), rel=1e-4)
    contrast = values["5", "log_mean_kl"].value - np.mean([values[layer, "log_mean_kl"].value for layer in ("1", "2")])
    assert values["all", "last_layer_log_kl"].value == pytest.approx(contrast)
    control = np.mean([values[layer, "d_control"].value for layer in ("1", "2", "5")])
    assert values["all", "d_control"].value == pytest.approx(control)


@torch.no_grad()
def test_the_routed_part_is_the_rise_without_a_layers_experts(values: dict[tuple[str, str], Response]) -> None:
    model = HookedMoE.from_pretrained("tiny-olmoe")
    texts = [model.to_tokens(document.text)[:, :20] for document in load_corpus().documents[:14]]
    tokens = torch.cat(texts)
    intact = float(model(tokens, return_type="loss"))
    for layer in (1, 5):
        mask = ExpertMask({layer: torch.zeros(64, dtype=torch.bool)})
        rise = float(model(tokens, return_type="loss", expert_mask=mask)) - intact
        assert values[str(layer), "routed_part"].value == pytest.approx(rise, abs=1e-4)
    assert values["all", "held_out_loss"].value == pytest.approx(intact, abs=1e-4)


def test_every_response_is_there_and_intervals_hold_their_values(values: dict[tuple[str, str], Response]) -> None:
    names = {name for _, name in values}
    expected = {f"{kind}_{name}{effect}" for kind in ("saving", "spearman", "z") for name in STUDIED for effect in ("", "_kl")}
    expected |= {
        "log_kl_ceiling",
        "loss_ceiling",
        "first_order_rho",
        "first_order_curved_rho",
        "half_removed",
        "all_removed",
        "best_share_of_oracle",
    }
    expected |= {"prune_reap_over_random", "last_layer_control_d", "helps_reap", "d_reap", "p_control"}
    assert expected <= names
    for response in values.values():
        if not np.isnan([response.low, response.high]).any():
            assert response.low <= response.value <= response.high, response


def test_an_audit_is_made_once(audit: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in audit.iterdir() if path.suffix in (".csv", ".parquet")}
    reduced_audit(HookedMoE.from_pretrained("tiny-olmoe"), FORM, audit.parents[1], "one")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_a_changed_table_is_no_response_and_is_made_again(audit: Path, tmp_path: Path) -> None:
    copy = tmp_path / audit.parent.name / audit.name
    shutil.copytree(audit, copy)
    content = (copy / "pruning.csv").read_text()
    (copy / "pruning.csv").write_text(content.replace("reap", "none"))
    with pytest.raises(ValueError, match=r"pruning\.csv is not what the run would give now"):
        audit_responses(copy)
    assert reduced_audit(HookedMoE.from_pretrained("tiny-olmoe"), FORM, tmp_path, "one") == copy
    assert (copy / "pruning.csv").read_text() == content


def test_shuffled_experts_leave_every_ranking_at_chance(
    audit: Path, values: dict[tuple[str, str], Response], tmp_path: Path
) -> None:
    shuffle_experts(audit, tmp_path)
    intact, shuffled = (pq.read_table(path / "effects.parquet").to_pandas() for path in (audit, tmp_path))
    for column in ("delta_loss", "kl"):
        before, after = (table[column].to_numpy().reshape(-1, 8) for table in (intact, shuffled))
        np.testing.assert_array_equal(np.sort(before, axis=1), np.sort(after, axis=1))
        assert not np.array_equal(before, after, equal_nan=True)
    assert intact.drop(columns=["delta_loss", "kl"]).equals(shuffled.drop(columns=["delta_loss", "kl"]))
    analyse_run(tmp_path, n_experts=64, n_positions=100)
    chance = {(response.layer, response.name): response.value for response in ranking_responses(tmp_path)}
    assert values["all", "spearman_reap_kl"].value > 0.2
    assert abs(chance["all", "spearman_reap_kl"]) < 0.06
    assert abs(chance["all", "first_order_rho"]) < 0.06
    assert values["all", "first_order_rho"].value > 0.7
    assert values["all", "first_order_curved_rho"].value > 0.7
    assert values["all", "d_control"].value > 0.1 > abs(chance["all", "d_control"])
    assert chance["all", "top_slot_share"] == pytest.approx(1 / 8, abs=0.03)
    assert not any(name.startswith("last_layer") for _, name in chance)


def test_rows_have_a_layer_each_and_their_identity(values: dict[tuple[str, str], Response]) -> None:
    rows = wide_rows(list(values.values()), run=3)
    assert [row["layer"] for row in rows] == ["all", "1", "2", "5"]
    assert all(row["run"] == 3 for row in rows)
    assert np.isnan(rows[1]["prune_reap"])
    assert rows[2]["mean_kl"] == values["2", "mean_kl"].value
