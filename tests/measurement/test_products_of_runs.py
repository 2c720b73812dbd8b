"""Runs by products of the change: checked, recorded, and never mixed with runs by others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

import hooked_moe
from hooked_moe import HookedMoE, measurement
from hooked_moe.cli import options
from hooked_moe.counterfactuals.engine import products
from hooked_moe.measurement import Run, open_measurement
from hooked_moe.measurement.budget import Budget
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.measurement.verification import verify
from tests.support.number_text import number_corpus, number_reader

CHECK = "products of the change"


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Opens the run of one model and corpus in a directory of results."""
    from tests.conftest import random_model

    model = number_reader(random_model, n_layers=3)
    corpus = number_corpus(tmp_path_factory.mktemp("corpus"), (30, 25, 12))

    def open_run(results: Path, **options: Any) -> Run:
        return open_measurement(model, TokenizedCorpus(model, corpus, 16), results=results, **options)

    return open_run


def table(run: Run, name: str) -> pd.DataFrame:
    return pq.read_table(run.directory / f"{name}.parquet").to_pandas()


def test_a_run_says_what_it_was_measured_by_and_is_near_one_in_float32(opened: Callable[..., Run], tmp_path: Path) -> None:
    tables = []
    for form in (None, "bfloat16"):
        with opened(tmp_path, products=form) as run:
            run.require("position", progress=False)
            run.require("progressive", [(0, 1)], progress=False)
        tables.append(table(run, "effects"))
        manifest = json.loads((run.directory / "manifest.json").read_text())
        assert manifest["measurement"].get("products") == form
        assert manifest["parts"]["position"].get("products") == form
        assert "products" not in manifest["parts"]["progressive"], "which is in float32"
        assert (CHECK in [check["name"] for check in manifest["verification"]]) == (form is not None)
    own, near = tables
    off = (near["delta_loss"] - own["delta_loss"]).abs()
    assert 0 < off.median() < 0.01 * own["delta_loss"].abs().median()
    unchanged = [name for name in own.columns if name not in ("delta_loss", "kl")]
    pd.testing.assert_frame_equal(near[unchanged], own[unchanged], atol=1e-5, rtol=1e-4)


def test_a_run_is_found_again_and_refused_by_other_products(opened: Callable[..., Run], tmp_path: Path) -> None:
    with opened(tmp_path, name="one", products="bfloat16") as run:
        run.require("position", progress=False)
    before = (run.directory / "effects.parquet").read_bytes()
    with opened(tmp_path, name="one", products="bfloat16") as run:
        assert run.has("position")
    (run.directory / "effects.parquet").unlink()
    with opened(tmp_path, name="one", products="bfloat16") as run:
        run.require("position", progress=False)
    assert (run.directory / "effects.parquet").read_bytes() == before
    with pytest.raises(ValueError, match="was begun with another measurement"):
        opened(tmp_path, name="one")


def test_a_budgeted_run_draws_the_same_removals_and_makes_them_by_products(
    opened: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurement.budget, "FEWEST_REMOVALS", 1)
    tables = []
    for form in (None, "bfloat16"):
        with opened(tmp_path, products=form, budget=Budget(share=0.3)) as run:
            run.require_sample(progress=False)
        tables.append(table(run, "sampled_effects"))
    own, near = tables
    assert (own["expert"] == near["expert"]).all()
    off = np.abs(near["delta_loss"] - own["delta_loss"])
    assert 0 < off.median() < 0.01 * own["delta_loss"].abs().median()


def test_products_that_are_off_fail_their_check_alone(model: HookedMoE, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = verify(model, tokens[:1], products="bfloat16")
    assert all(check.passed for check in sound)
    assert sound[-1].name == CHECK
    monkeypatch.setattr(products, "_plus_clean", lambda change, clean: change.float())
    assert [check.name for check in verify(model, tokens[:1], products="bfloat16") if not check.passed] == [CHECK]


def test_an_audit_in_python_takes_them(opened: Callable[..., Run], tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        model, corpus = run.model, run.tokenized.corpus
    found = hooked_moe.audit(model, corpus, context=16, products="bfloat16", results=tmp_path)
    assert json.loads((found.directory / "manifest.json").read_text())["measurement"]["products"] == "bfloat16"


@pytest.mark.parametrize(("units", "said"), [(False, True), (True, False)])
def test_a_cpu_without_units_for_them_is_noted(
    units: bool, said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(options, "has_units_for", lambda name: units)
    assert options.products_named("bfloat16", torch.device("cpu")) == "bfloat16"
    assert options.products_named(None, torch.device("cpu")) is None
    assert ("no units for products in bfloat16" in capsys.readouterr().out) == said
