"""The calibration of budgets on a small audit: which intervals it looks at, and that its sums are those of the table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import budget_calibration
from benchmarks.budget_calibration import Audit, GroupSums
from hooked_moe.measurement import TokenizedCorpus, open_measurement
from tests.support.number_text import number_corpus, number_reader


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.conftest import random_model

    directory = tmp_path_factory.mktemp("audit")
    model = number_reader(random_model, n_layers=2)
    corpus = TokenizedCorpus(model, number_corpus(directory, (40, 25, 30, 22, 18, 33, 27, 20, 24, 31, 17, 29)), 16)
    with open_measurement(model, corpus, results=directory) as measured:
        measured.require("position", progress=False)
    return measured.directory


def test_sums_of_groups_are_those_of_the_table(run: Path) -> None:
    audit = Audit.read(run)
    sums, y = GroupSums(audit), audit.effects["delta_loss"]
    for index, rows in enumerate([np.ones(len(y), bool), *audit.first.values()]):
        for document in range(12):
            for layer in range(2):
                own = rows & (audit.document == document) & (audit.axis == layer)
                assert sums.of(y)[index, document, layer] == pytest.approx(y[own].sum())
                assert sums.count[index, document, layer] == own.sum()
    # Where all removals are drawn with certainty, what estimates miss is added, whatever these are.
    beta = np.random.default_rng(0).normal(size=(2, 2, 2))
    weights = np.concatenate([np.ones((2, 2, 1)), beta], axis=2)
    fold = budget_calibration.fold_of(audit.document)
    missed = y - audit.base["delta_loss"] - (audit.features * beta[audit.axis, fold]).sum(axis=1)
    np.testing.assert_allclose(sums.estimated(weights, np.arange(len(y)), missed), sums.of(y), atol=1e-9)


def test_it_looks_at_savings_over_documents_too(run: Path) -> None:
    tables = budget_calibration.main([str(run), "--draws", "3", "--document-draws", "6", "--shares", "0.3", "--show"])
    [documents] = [table for table in tables if "over documents" in table.title and "buys" not in table.title]
    kinds = {row[0] for row in documents.rows}
    for how in ("", ", all removals made"):
        for where in ("in a layer", "over all layers"):
            assert {f"realised loss: {kind} {where}{how}" for kind in ("savings", "shares saved")} <= kinds
    held = {row[0]: float(row[2].split()[0]) for row in documents.rows}
    assert held["realised loss: savings over all layers, all removals made"] > 50
