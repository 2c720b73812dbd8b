"""The two texts that are compared: the model's own, and pieces of the real one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experiments import self_generated
from experiments.self_generated import generated_text, real_text, summary
from hooked_moe import HookedMoE
from tests.conftest import random_config


def test_real_text_is_pieces_of_the_corpus_from_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_generated, "ROW_LENGTH", 10)
    tokens = np.arange(5000, dtype=np.uint16)
    text = real_text(tokens, 95, seed=0)
    starts = text[::10]
    assert len(text) == 95
    assert all(
        np.array_equal(text[10 * n : 10 * n + 10], np.arange(start, start + 10)[: 95 - 10 * n]) for n, start in enumerate(starts)
    )
    assert np.ptp(starts) > 2000
    assert np.array_equal(text, real_text(tokens, 95, seed=0))
    assert not np.array_equal(text, real_text(tokens, 95, seed=1))


def test_generated_text_begins_anew_in_every_row_and_repeats_for_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_generated, "ROWS", 3)
    monkeypatch.setattr(self_generated, "ROW_LENGTH", 8)
    torch.manual_seed(0)
    model = HookedMoE(random_config(eos_token_id=5)).eval()
    text = generated_text(model, 40, seed=1)
    assert len(text) == 40
    assert (text[::8] == 5).all()
    assert len(set(text.tolist())) > 10
    assert np.array_equal(text, generated_text(model, 40, seed=1))


def test_the_unit_of_the_comparison_is_the_seed() -> None:
    rows = [{"seed": -1, "text": "base", "held_out_loss": 3.0}]
    rows += [
        {"seed": s, "text": k, "held_out_loss": 3.1 + 0.1 * s + 0.2 * (k == "generated")}
        for s in (0, 1)
        for k in ("real", "generated")
    ]
    assert "(one seed: no interval)" in summary(rows[:3])
    assert "generated less real +0.200 nats" in summary(rows)
    assert "over 2 seeds, which would find 0.000 with 80% chance" in summary(rows)  # here the seeds agree
    rows[-1]["held_out_loss"] += 0.1  # type: ignore[operator]
    # Differences of .2 and .3: a standard error of .05, and t of one degree of freedom.
    assert "+0.250 nats [-0.385, +0.885] over 2 seeds" in summary(rows)
