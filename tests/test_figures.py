"""The heat map: what is drawn is what was given, at the right place, in colours that a colour-blind reader tells apart."""

from __future__ import annotations

import numpy as np
import pytest

from hooked_moe.figures import NotebookFigure, heat_map
from tests.conftest import without_type_checks


def test_every_value_is_at_its_place_and_nothing_is_grey() -> None:
    values = np.array([[0.5, -1.0, np.nan], [0.0, 2.0, 0.25]])
    figure = heat_map(values, rows=[3, 7], columns=["a$b$", "the", "\n"], value_label="nats", title="effects")
    axes, bar = figure.axes
    image = axes.images[0]
    np.testing.assert_array_equal(image.get_array().filled(np.nan), values)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["3", "7"]
    assert [text.get_text() for text in axes.get_xticklabels()] == [r"a\$b\$", "the", "↵"]
    assert (axes.get_ylabel(), axes.get_xlabel(), bar.get_ylabel(), axes.get_title(loc="left")) == (
        "layer",
        "expert",
        "nats",
        "effects",
    )
    assert image.norm.vmin == -2.0
    assert image.norm.vmax == 2.0
    white = image.cmap(image.norm(0.0))
    assert min(white[:3]) > 0.95, "zero is white where values have signs"


def test_values_without_a_sign_run_from_light_to_dark_and_a_limit_is_marked() -> None:
    figure = heat_map(np.array([[1.0, 3.0]]), rows=[0], columns=[0, 1], limit=2.0)
    image = figure.axes[0].images[0]
    assert (image.norm.vmin, image.norm.vmax) == (0.0, 2.0)
    assert sum(image.cmap(0.0)[:3]) > sum(image.cmap(1.0)[:3])
    assert heat_map(np.full((1, 2), np.nan), rows=[0], columns=[0, 1]).axes[0].images[0].norm.vmax == 1.0


def test_large_maps_have_few_ticks_and_fit_a_page() -> None:
    figure = heat_map(np.random.default_rng(0).normal(size=(64, 384)), rows=range(64), columns=range(384))
    assert len(figure.axes[0].get_xticks()) <= 40
    assert len(figure.axes[0].get_yticks()) <= 40
    assert figure.get_size_inches().max() <= 12


def test_a_notebook_shows_it_and_a_file_takes_it(tmp_path) -> None:
    figure = heat_map(np.eye(3), rows=range(3), columns=range(3))
    assert isinstance(figure, NotebookFigure)
    assert figure._repr_png_()[:4] == b"\x89PNG"
    figure.savefig(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"


def test_a_limit_must_be_above_zero() -> None:
    with pytest.raises(ValueError, match=r"limit must be above 0, not -1\.0"):
        heat_map(np.eye(2), rows=[0, 1], columns=[0, 1], limit=-1.0)


def test_labels_must_be_as_many_as_values() -> None:
    with (
        without_type_checks(),
        pytest.raises(ValueError, match=r"values have shape \[2, 3\]; there are 2 row and 2 column labels"),
    ):
        heat_map(np.zeros((2, 3)), rows=[0, 1], columns=[0, 1])
