"""The wrong answer that a noised case is read against."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_moe.circuits.tracing.batches import CorruptedRun, batches
from hooked_moe.circuits.tracing.observed import observe
from hooked_moe.circuits.tracing.prompts import Prompt, answer_token
from hooked_moe.circuits.tracing.protocol import Protocol
from hooked_moe.corpus import with_foils
from hooked_moe.progress import progress_bar
from hooked_moe.transformer import Transformer

ROWS = 64
"""Prompts that are run together to see what the model knows."""
Foil = tuple[Prompt, int]
"""A prompt whose record has the foil, and the foil's token."""


def prompts_with_foils(
    model: Transformer, prompts: list[Prompt], protocol: Protocol, excluded: Counter[str], progress: bool = False
) -> list[Foil]:
    """The prompts that have a foil by the protocol's rule; the others are counted in `excluded`."""
    if protocol.foils == "prior":
        return _matched_by_prior(model, prompts, protocol, excluded, progress)
    answers: dict[str, set[str]] = defaultdict(set)
    for prompt in prompts:
        answers[prompt.record.relation].add(prompt.record.true)
    kept = [p for p in prompts if p.record.foil is not None or len(answers[p.record.relation]) > 1]
    if len(kept) < len(prompts):
        excluded[NO_OTHER_ANSWER] += len(prompts) - len(kept)
    found: list[Foil] = []
    for prompt, record in zip(kept, with_foils([prompt.record for prompt in kept]), strict=True):
        foil = answer_token(model.require_tokenizer(), str(record.foil), protocol)
        if foil is None or foil == prompt.true_id:
            excluded["the foil is not one token, or the same token as the true answer"] += 1
        else:
            found.append((replace(prompt, record=record), foil))
    return found


NO_OTHER_ANSWER = "the relation has no other answer that is a token"


def _matched_by_prior(
    model: Transformer, prompts: list[Prompt], protocol: Protocol, excluded: Counter[str], progress: bool
) -> list[Foil]:
    """What corruption leaves of a margin is what the relation alone suggests; against a foil that the model finds as likely as
    the true answer without knowing the subject, that is about nothing. How likely, the relation's other subjects say: their mean
    logit, not the case's own corrupted run, which would then be near zero by choice."""
    ids = sorted({prompt.true_id for prompt in prompts})
    column = {token: place for place, token in enumerate(ids)}
    logits = answer_logits(model, prompts, protocol, ids, progress)
    relations: dict[str, list[int]] = defaultdict(list)
    subjects: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        relations[prompt.record.relation].append(number)
        subjects[prompt.record.relation, prompt.record.subject].append(number)
    totals = {relation: logits[numbers].sum(0) for relation, numbers in relations.items()}
    texts = {
        relation: {prompts[number].true_id: prompts[number].record.true for number in numbers}
        for relation, numbers in relations.items()
    }
    found: list[Foil] = []
    for prompt in prompts:
        relation = prompt.record.relation
        own = subjects[relation, prompt.record.subject]
        answers = texts[relation].keys() - {prompts[number].true_id for number in own}
        if not answers:
            excluded[NO_OTHER_ANSWER] += 1
            continue
        prior = (totals[relation] - logits[own].sum(0)) / (len(relations[relation]) - len(own))
        distance = (prior - prior[column[prompt.true_id]]).abs()
        foil = min(sorted(answers), key=lambda token: float(distance[column[token]]))
        found.append((replace(prompt, record=replace(prompt.record, foil=texts[relation][foil])), foil))
    return found


@torch.no_grad()
def answer_logits(
    model: Transformer, prompts: Sequence[Prompt], protocol: Protocol, ids: list[int], progress: bool = False
) -> Float[Tensor, "prompt answer"]:
    """The logits of some tokens after every prompt."""
    runs = [CorruptedRun(number, prompt, prompt.true_id, prompt.record.true) for number, prompt in enumerate(prompts)]
    parts = [torch.empty(0, len(ids), dtype=torch.float32, device="cpu")]
    columns = torch.tensor(ids, dtype=torch.int64, device=model.cfg.device)
    plain = replace(protocol, corruption="replace", foils="given", positions="final")
    with progress_bar(len(runs), "what the model knows", "fact", shown=progress) as bar:
        for batch in batches(model, runs, plain, 0.0, ROWS):
            parts.append(observe(model, model.embed(batch.clean), batch).logits(model)[:, columns].cpu())
            bar.update(len(batch.runs))
    return torch.cat(parts)
