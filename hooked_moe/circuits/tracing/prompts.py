"""Facts as token ids: the prompt, where its subject stands, and the token that its answer is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from hooked_moe.chat import rendered
from hooked_moe.circuits.tracing.protocol import Protocol
from hooked_moe.corpus import FactRecord
from hooked_moe.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A record as the model reads it."""

    record: FactRecord
    tokens: tuple[int, ...]
    subject: range
    """The positions of the subject's tokens."""
    true_id: int

    @property
    def shape(self) -> tuple[str, str, range, int]:
        """What two prompts must have in common for one to stand in for the other."""
        return self.record.relation, self.record.prompt, self.subject, len(self.tokens)


def as_prompts(tokenizer: Tokenizer, records: Iterable[FactRecord], protocol: Protocol, excluded: Counter[str]) -> list[Prompt]:
    """The records whose answer is a token by the protocol's rule; the others are counted in `excluded`.

    Raises `ValueError` for a record whose subject is not found in its prompt, and for a tokenizer that does not say whether a
    text begins with a BOS token.
    """
    if protocol.prepend_bos is None and protocol.instruction is None:
        _require_clear_bos(tokenizer)
    prompts = []
    for record in records:
        true_id = answer_token(tokenizer, record.true, protocol)
        if true_id is None:
            excluded["the true answer is not one token"] += 1
            continue
        tokens, subject = _tokens_and_subject(tokenizer, record, protocol)
        prompts.append(Prompt(record, tokens, subject, true_id))
    return prompts


def answer_token(tokenizer: Tokenizer, answer: str, protocol: Protocol) -> int | None:
    """The token that an answer is by the protocol's rule; None if there is none."""
    spaced = tokenizer.encode(f" {answer}", prepend_bos=False)
    if protocol.token_rule == "first_token":
        return spaced[0] if spaced else None
    bare = tokenizer.encode(answer, prepend_bos=False)
    if protocol.token_rule == "bare_first" and len(bare) == 1:
        return bare[0]
    return spaced[0] if len(spaced) == 1 else None


def _tokens_and_subject(tokenizer: Tokenizer, record: FactRecord, protocol: Protocol) -> tuple[tuple[int, ...], range]:
    before, marker, _ = record.prompt.partition("{}")
    if not marker or not record.subject.strip():
        raise ValueError(
            f"case {record.case_id}: the subject {record.subject!r} is not found in the prompt {record.prompt!r}; "
            "a prompt holds '{}' where its subject stands"
        )
    chat, prepend_bos = "", protocol.prepend_bos
    if protocol.instruction is not None:
        chat, prepend_bos = _before_the_answer(tokenizer, protocol.instruction, record.text), False
    ids = tokenizer.encode(chat + record.text, prepend_bos=prepend_bos)
    bare = tokenizer.backend.encode(chat + record.text, add_special_tokens=False)
    lead = next((n for n in range(len(ids)) if ids[n : n + len(bare.ids)] == bare.ids), None)
    if lead is None or len(ids) != lead + len(bare.ids):
        raise ValueError(
            f"case {record.case_id}: the tokenizer puts tokens after the text, or changes it, when it adds special tokens; "
            "give prepend_bos=True or False"
        )
    before = chat + before
    start, end = len(before), len(before) + len(record.subject)
    inside = [lead + n for n, (first, last) in enumerate(bare.offsets) if first < end and last > start]
    if not inside:
        raise ValueError(f"case {record.case_id}: no token of {record.text!r} belongs to the subject {record.subject!r}")
    return tuple(ids), range(inside[0], inside[-1] + 1)


def _before_the_answer(tokenizer: Tokenizer, instruction: str, text: str) -> str:
    """What the chat template puts before an assistant's message that begins with the text, when a user has asked this before."""
    conversation = [{"role": "user", "content": instruction}, {"role": "assistant", "content": text}]
    (said,) = rendered(tokenizer.chat_template, [conversation])
    start = said.rfind(text)
    if start < 0:
        raise ValueError(
            f"the chat template changes what the assistant says, so that the prompt {text!r} is not found in {said!r}"
        )
    return said[:start]


def _require_clear_bos(tokenizer: Tokenizer) -> None:
    """Raise `ValueError` where tokenizer.json's template and tokenizer_config.json say different things of BOS."""
    if tokenizer.bos_id is None or tokenizer.adds_bos is None:
        return
    by_template = tokenizer.backend.encode("a").ids[:1] == [tokenizer.bos_id]
    if by_template != tokenizer.adds_bos:
        says = {True: "begins a text with BOS", False: "does not"}
        raise ValueError(
            f"whether texts begin with BOS is ambiguous: the tokenizer's template {says[by_template]}, its add_bos_token "
            f"{says[tokenizer.adds_bos]}. Another expert can come out of it: give prepend_bos=True or False"
        )
