"""How numbers are spelt for people."""

import math

import pytest

from hooked_moe.report.number_text import (
    DASH,
    MINUS,
    bayes_factor,
    enumeration,
    interval,
    layer_list,
    log_bayes_factor,
    p_value,
    share,
    signed,
    value_text,
)

NAN = math.nan


@pytest.mark.parametrize(
    ("spelt", "text"),
    [
        (signed(0.1234, 2), "+0.12"),
        (signed(-0.1234, 2), f"{MINUS}0.12"),
        (signed(-0.0004, 2), "0.00"),
        (signed(NAN, 2), DASH),
        (interval(-0.1, 0.25, 2), f"[{MINUS}0.10, +0.25]"),
        (interval(NAN, 0.25, 2), DASH),
        (p_value(0.04), "0.040"),
        (p_value(3e-7), "3e-07"),
        (p_value(0.0), "<1e-10"),
        (p_value(1e-67), "<1e-10"),
        (p_value(0.0006), "0.0006"),
        (p_value(NAN), DASH),
        (share(0.021), "2.1%"),
        (share(0.81), "81%"),
        (share(-0.02), f"{MINUS}2.0%"),
        (bayes_factor(13.3), "13"),
        (bayes_factor(163.2), "163"),
        (bayes_factor(0.079), "0.079"),
        (bayes_factor(2.5e6), "1e6"),
        (bayes_factor(math.inf), ">1e10"),
        (log_bayes_factor(-2000.0), "<1e-10"),
        (bayes_factor(0.0), "<1e-10"),
        (layer_list([3]), "layer 3"),
        (layer_list([4, 5]), "layers 4, 5"),
        (layer_list([0, 1, 2, 5]), f"layers 0{DASH}2 and 5"),
        (enumeration(["a"]), "a"),
        (enumeration(["a", "b", "c"]), "a, b and c"),
        (value_text(12345), "12,345"),
        (value_text(0.25), "0.2500"),
        (value_text(2.1e-6), "2.10e-06"),
        (value_text(NAN), DASH),
        (value_text(True), "True"),
        (value_text("address"), "address"),
    ],
)
def test_numbers_are_spelt_for_people(spelt, text):
    assert spelt == text
