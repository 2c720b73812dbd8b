"""The marks and words for verdicts, alike on the page and on a console."""

from dataclasses import dataclass

from hooked_moe.report.number_text import MINUS


@dataclass(frozen=True)
class VerdictWords:
    """How a verdict is marked in a map, said in a few words beside it, and called and explained in a text."""

    mark: str
    short: str
    name: str
    meaning: str


VERDICT_WORDS = {
    "valid": VerdictWords(
        "+", "high matters more", "valid", "the ranking points at the expert that matters more, by the agreement rule"
    ),
    "reversed": VerdictWords(MINUS, "high matters less", "reversed", "it points at the expert that matters less"),
    "equivalent": VerdictWords(
        "=", "equivalent to zero", "equivalent to zero", "the 90% interval of d lies within the equivalence bound"
    ),
    "undecided": VerdictWords("?", "undecided", "undecided", "neither is shown"),
    "refused": VerdictWords("x", "refused", "refused", "inference is not possible; the table says why"),
}
