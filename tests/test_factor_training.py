"""The models of the factor study: what each point of the design is, and that a killed training resumes."""

from __future__ import annotations

from pathlib import Path

import filelock
import numpy as np
import pytest
import torch

from experiments import factor_study, train_tiny
from experiments.factor_study import planned_runs, run_name
from experiments.support import factor_training
from experiments.support.factor_training import ACTIVE_WIDTH, config_of, dense_config, is_trained, recipe_of, train_run, trained
from experiments.train_tiny import ARCHITECTURES, RESTART_STEPS, Recipe
from hooked_moe import HookedMoE
from hooked_moe.surgery import upcycle

PLAN = list(planned_runs([0]))
TOKENS = np.random.default_rng(0).integers(0, 50, 900).astype(np.uint16)
UPCYCLED = next(levels for _, _, levels in PLAN if levels["F6"] > 0 and levels["F5"] > 0)


def test_every_point_has_the_levels_that_it_says_and_the_same_active_width() -> None:
    for _, _, levels in PLAN:
        cfg = config_of(levels, "point")
        high = {name: level > 0 for name, level in levels.items()}
        assert cfg.experts_per_token * cfg.d_expert + (cfg.d_shared or 0) == ACTIVE_WIDTH
        assert cfg.experts_per_token / cfg.num_experts == (0.25 if high["F1"] else 0.125)
        assert cfg.experts_per_token == (8 if high["F2"] else 2)
        assert (cfg.norm_topk_prob, cfg.d_shared is not None, bool(cfg.dense_layers)) == (high["F3"], high["F5"], high["F7"])
        assert recipe_of(levels, 0).load_balancing == (0.02 if high["F4"] else 0.001)
        upcycle_of = dense_config(cfg)
        assert (upcycle_of.num_experts, upcycle_of.d_expert) == (1, ACTIVE_WIDTH)
    assert len({tuple(levels.values()) for _, _, levels in PLAN}) == 16
    assert [seed for seed, _, _ in planned_runs([1, 2])] == [1] * 16 + [2] * 16


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"n_layers": 2, "d_model": 16, "d_head": 8, "n_heads": 2, "n_key_value_heads": 2, "d_vocab": 50, "n_ctx": 12}
    changed = {"tiny-olmoe": ARCHITECTURES["tiny-olmoe"].replace(**sizes)}
    monkeypatch.setattr(factor_training, "ARCHITECTURES", changed)
    monkeypatch.setattr(factor_training, "SAVE_EVERY", 2)
    monkeypatch.setattr(
        factor_training, "recipe_of", lambda levels, seed, steps: Recipe(steps=steps, batch=2, n_ctx=12, seed=seed)
    )


class Killed(Exception):
    pass


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("last", [1, 5], ids=["dense half", "second half"])
def test_an_upcycled_run_resumes_to_the_same_weights(last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimiser's own count of steps begins anew in the second half, and has to be kept."""
    save = train_tiny.save_state

    def save_and_die(path: Path, model: HookedMoE, optim: torch.optim.AdamW, step: int) -> None:
        save(path, model, optim, step)
        if step > last:
            raise Killed

    train_run(UPCYCLED, 0, TOKENS, tmp_path / "whole", steps=8)
    monkeypatch.setattr(train_tiny, "save_state", save_and_die)
    with pytest.raises(Killed):
        train_run(UPCYCLED, 0, TOKENS, tmp_path / "killed", steps=8)
    monkeypatch.setattr(train_tiny, "save_state", save)
    assert not is_trained(tmp_path / "killed", 8)
    train_run(UPCYCLED, 0, TOKENS, tmp_path / "killed", steps=8)
    assert is_trained(tmp_path / "killed", 8)
    whole, killed = (trained(config_of(UPCYCLED, "x"), Recipe(), tmp_path / name) for name in ("whole", "killed"))
    assert all(torch.equal(x, y) for x, y in zip(whole.parameters(), killed.parameters(), strict=True))


@pytest.mark.usefixtures("small")
def test_the_second_half_starts_from_the_upcycled_model(tmp_path: Path) -> None:
    train_run(UPCYCLED, 0, TOKENS, tmp_path, steps=8)
    cfg = config_of(UPCYCLED, "x")
    dense = trained(dense_config(cfg), Recipe(), tmp_path / "dense")
    start, end = upcycle(dense, cfg), trained(cfg, Recipe(), tmp_path)
    moved = (start.embed.W_E - end.embed.W_E).abs().max()
    assert 0 < moved < 0.05  # a few steps of warm-up away


def test_a_restarted_schedule_warms_up_again_and_then_continues() -> None:
    whole, second = Recipe(steps=660), Recipe(steps=660, first_step=330)
    assert second.rate(330) == pytest.approx(whole.rate(330) / RESTART_STEPS)
    assert [second.rate(step) for step in (350, 500, 659)] == [whole.rate(step) for step in (350, 500, 659)]


def test_the_study_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert factor_study.main(["--stages", "plan", "audit", "--out", str(tmp_path), "--known", "none.csv"]) == 1
    assert "is trained yet" in capsys.readouterr().err
    plan = (tmp_path / "plan.csv").read_text(encoding="utf-8").splitlines()
    assert len(plan) == 17
    assert plan[0].replace('"', "") == "seed,run,F1,F2,F3,F4,F5,F6,F7"
    assert run_name(0, 3) == "run-03-seed-0"


def test_other_lengths_have_a_place_of_their_own_and_no_shipped_responses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert factor_study.main(["--stages", "plan", "audit", "--steps", "40"]) == 1
    assert f"no run in {Path('build/factors-40-steps')} is trained yet" in capsys.readouterr().err
    assert (tmp_path / "build/factors-40-steps/plan.csv").is_file()
    assert factor_study.main(["--steps", "1"]) == 1
    assert "--steps 1: half of the models" in capsys.readouterr().err


def test_several_processes_share_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(factor_study, "train_run", lambda levels, seed, tokens, out, steps: made.append(out.name))
    first, second, third = (run_name(seed, run) for seed, run, _ in PLAN[:3])
    with filelock.FileLock(tmp_path / first / "train.lock"):
        factor_study.train_missing(PLAN, TOKENS, tmp_path, at_most=1, steps=660)
    assert made == [second]
    factor_study.train_missing(PLAN, TOKENS, tmp_path, at_most=3, steps=660)
    assert made == [second, first, second, third]  # none is recorded as trained here
