"""The marks and words for outcomes, alike on the page and on a console."""

from dataclasses import dataclass

from hooked_moe.report.number_text import MINUS


@dataclass(frozen=True)
class OutcomeWords:
    """How an outcome is marked, called and explained, and the css class that colours it."""

    mark: str
    name: str
    meaning: str
    css: str


SAVING_WORDS = {
    "helps": OutcomeWords(
        "+",
        "helps",
        "the interval of the saving lies above a tenth of the random cost, and permuted criteria do not reach it",
        "good",
    ),
    "harms": OutcomeWords(
        MINUS,
        "harms",
        "the interval lies below minus a tenth, and permuted criteria do not reach it: the wrong experts go first",
        "bad",
    ),
    "negligible": OutcomeWords("=", "negligible", "the whole interval lies within a tenth of the random cost", "neutral"),
    "undecided": OutcomeWords("?", "undecided", "these data show none of the above", "open"),
    "refused": OutcomeWords("x", "refused", "the saving is not defined; the note says why", "absent"),
}
"""Outcomes of a saving, in savings.csv."""

PROTOCOL_WORDS = {
    "positive": OutcomeWords("+", "detected", "both tests pass with one sign: the expert ranked highest matters more", "good"),
    "negative": OutcomeWords(MINUS, "reversed", "both tests pass with one sign: the expert ranked highest matters less", "bad"),
    "tests_disagree": OutcomeWords("!", "tests disagree", "one test passes alone, or both pass with opposite signs", "open"),
    "not_detected": OutcomeWords("?", "not detected", "neither test passes; that is no evidence of absence", "open"),
    "refused": OutcomeWords("x", "refused", "inference is not possible; the table says why", "absent"),
}
"""Outcomes of the paper's agreement rule, in cells.csv."""
