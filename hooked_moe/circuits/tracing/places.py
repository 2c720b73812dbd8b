"""Which tokens of a prompt are patched, and what they are in it."""

from __future__ import annotations

from hooked_moe.circuits.tracing.prompts import Prompt
from hooked_moe.circuits.tracing.protocol import Positions

PLACES = {
    "subject_first": "the first token of the subject",
    "subject_middle": "the tokens in the middle of the subject",
    "subject_last": "the last token of the subject",
    "after_subject": "the tokens between the subject and the last token",
    "final": "the last token",
}
"""Every token from the subject on is one of these, in words. The prompt's last token is "final" even where it is the subject's,
and a subject of one token is "subject_last"."""


def places_of(prompt: Prompt, positions: Positions) -> dict[int, str]:
    """The positions to patch, and what is there. Tokens before the subject are the same in both runs, and so are left out."""
    final, last = len(prompt.tokens) - 1, prompt.subject[-1]
    if positions == "final":
        return {final: "final"}
    if positions == "subject_last":
        return {last: "subject_last"}
    return {position: _place(position, prompt.subject, final) for position in range(prompt.subject[0], final + 1)}


def _place(position: int, subject: range, final: int) -> str:
    if position == final:
        return "final"
    if position > subject[-1]:
        return "after_subject"
    if position == subject[-1]:
        return "subject_last"
    return "subject_first" if position == subject[0] else "subject_middle"
