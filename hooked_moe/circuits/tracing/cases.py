"""Which facts become cases: those that the model knows and that the corruption takes from it."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_moe.circuits.tracing.batches import CorruptedRun, batches, noise_scale
from hooked_moe.circuits.tracing.foils import ROWS, answer_logits, prompts_with_foils
from hooked_moe.circuits.tracing.observed import observe
from hooked_moe.circuits.tracing.prompts import Prompt, as_prompts
from hooked_moe.circuits.tracing.protocol import Protocol
from hooked_moe.corpus import FactRecord
from hooked_moe.corpus.facts import answers_by_subject
from hooked_moe.progress import progress_bar
from hooked_moe.transformer import Transformer


@dataclass(frozen=True)
class Cases:
    """The corrupted runs of all cases, and what became of the records that are none."""

    runs: list[CorruptedRun]
    sigma: float
    """Standard deviation of the noise in the embeddings' units; 0 without noise."""
    excluded: Counter[str]

    @property
    def n_cases(self) -> int:
        return len({run.case for run in self.runs})


def find_cases(model: Transformer, records: Iterable[FactRecord], protocol: Protocol, progress: bool = False) -> Cases:
    """The facts that are usable. `progress` shows bars.

    Raises `ValueError` where fewer cases are usable than the protocol's least number, and says what excluded the others."""
    excluded: Counter[str] = Counter()
    records = list(records)
    random.Random(protocol.seed).shuffle(records)
    prompts = as_prompts(model.require_tokenizer(), records, protocol, excluded)
    sigma = 0.0
    if protocol.corruption == "noise":
        sigma = noise_scale(model, prompts, protocol) if prompts else 0.0
        runs = _noised(model, prompts, protocol, sigma, excluded, progress)
    else:
        runs = _replaced(model, prompts, protocol, excluded, progress)
    cases = Cases(runs, sigma, excluded)
    least = min(protocol.min_cases, protocol.n_cases)
    if cases.n_cases < least:
        why = "; ".join(f"{count} where {reason}" for reason, count in excluded.most_common()) or "none was excluded"
        raise ValueError(
            f"only {cases.n_cases} of {len(records)} facts are usable cases, and at least {least} are needed to choose an "
            f"expert on one half and test it on the other. Excluded: {why}. Give more facts, others that the model knows, or a "
            "protocol that asks for less (min_margin, min_drop, min_cases)"
        )
    return cases


def _noised(
    model: Transformer, prompts: list[Prompt], protocol: Protocol, sigma: float, excluded: Counter[str], progress: bool
) -> list[CorruptedRun]:
    """Cases in the records' order, up to as many as are asked for."""
    found = prompts_with_foils(model, prompts, protocol, excluded, progress)
    kept: list[CorruptedRun] = []
    n_cases = 0
    with progress_bar(min(len(found), protocol.n_cases), "finding cases", "case", shown=progress) as bar:
        for start in range(0, len(found), ROWS):
            if n_cases == protocol.n_cases:
                break
            candidates = [
                CorruptedRun(number, prompt, foil, str(prompt.record.foil))
                for number, (prompt, foil) in enumerate(found[start : start + ROWS])
            ]
            clean = _margins(model, candidates, protocol, None)
            drawn = [replace(run, draw=draw) for run in candidates for draw in range(protocol.draws)]
            corrupted = _margins(model, drawn, protocol, sigma).view(len(candidates), protocol.draws).mean(1)
            for run, margin, after in zip(candidates, clean.tolist(), corrupted.tolist(), strict=True):
                reason = _reason_against(margin, margin - after, protocol)
                if reason:
                    excluded[reason] += 1
                elif n_cases < protocol.n_cases:
                    kept += [replace(run, case=n_cases, draw=draw) for draw in range(protocol.draws)]
                    n_cases += 1
            bar.update(n_cases - bar.n)
        bar.total = n_cases  # which facts that ran out may leave below what was asked for
    return kept


def _reason_against(margin: float, drop: float, protocol: Protocol) -> str | None:
    if protocol.min_margin is not None and margin < protocol.min_margin:
        return f"the clean run prefers the true answer by less than {protocol.min_margin:g} logits"
    if protocol.min_drop is not None and drop < protocol.min_drop:
        return f"the corruption takes less than {protocol.min_drop:g} logits of that"
    if protocol.min_relative_drop is not None and drop < protocol.min_relative_drop * margin:
        return f"the corruption takes less than {protocol.min_relative_drop:.0%} of that"
    return None


def _margins(model: Transformer, runs: Sequence[CorruptedRun], protocol: Protocol, sigma: float | None) -> Float[Tensor, " run"]:
    """Logit of the true answer minus the foil's: of the corrupted runs or, without a sigma, of their clean prompts."""
    parts = [torch.empty(0, dtype=torch.float32, device="cpu")]
    for batch in batches(model, runs, protocol, sigma or 0.0, ROWS):
        start = batch.embeddings if sigma is not None and batch.embeddings is not None else model.embed(batch.clean)
        logits = observe(model, start, batch).logits(model)
        picked = logits.gather(1, torch.stack([batch.true, batch.foil], dim=1))
        parts.append((picked[:, 0] - picked[:, 1]).cpu())
    return torch.cat(parts)


def _replaced(
    model: Transformer, prompts: list[Prompt], protocol: Protocol, excluded: Counter[str], progress: bool
) -> list[CorruptedRun]:
    """Cases whose subject can be replaced by one with another answer, the model preferring each subject's own."""
    same_shape: dict[object, list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        same_shape[prompt.shape].append(number)
    ids = sorted({prompt.true_id for prompt in prompts})
    column = {token: place for place, token in enumerate(ids)}
    logits = answer_logits(model, prompts, protocol, ids, progress)
    true_of = answers_by_subject(prompt.record for prompt in prompts)

    def replaces(other: int, number: int) -> bool:
        """Whether the subject of one prompt can take the place of another's: whose answers are others, and known."""
        donor, record = prompts[other].record, prompts[number].record
        own, foil = column[prompts[number].true_id], column[prompts[other].true_id]
        if own == foil or record.foil not in (None, donor.true):
            return False
        if donor.true in true_of[record.relation, record.subject] or record.true in true_of[donor.relation, donor.subject]:
            return False
        before, after = (float(row[own] - row[foil]) for row in (logits[number], logits[other]))
        knows_its_own = protocol.min_margin is None or -after >= protocol.min_margin
        return knows_its_own and _reason_against(before, before - after, protocol) is None

    kept: list[CorruptedRun] = []
    n_cases = 0
    for number, prompt in enumerate(prompts):
        if n_cases == protocol.n_cases:
            break
        others = [other for other in same_shape[prompt.shape] if replaces(other, number)]
        if not others:
            excluded["no other subject of the relation has as many tokens and another answer that the model knows"] += 1
            continue
        chosen = random.Random(prompt.record.case_id).sample(others, min(len(others), protocol.max_donors))
        for donor in chosen:
            foil = prompts[donor]
            kept.append(CorruptedRun(n_cases, prompt, foil.true_id, foil.record.true, donor=foil))
        n_cases += 1
    return kept
