"""How surely a model gives the answers of fact records: -log p of the answer's first token, by subject."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_moe.corpus import FactRecord
from hooked_moe.tokenizer import Tokenizer
from hooked_moe.transformer import Transformer

ROWS_PER_BATCH = 64


class FactLosses:
    """Prompts, tokenized once, to be asked of any model with the same tokenizer.

    An answer counts by its first token after the prompt: answers of a relation that begin alike are not told apart. Records of
    one subject are alike, so that the subject is what intervals are over.
    """

    def __init__(self, tokenizer: Tokenizer, records: Sequence[FactRecord]) -> None:
        """Raises `ValueError` for records whose prompt and answer share a token."""
        if not records:
            raise ValueError("there are no facts to ask about")
        self.subjects = list(dict.fromkeys(record.subject for record in records))
        self.subject = np.array([self.subjects.index(record.subject) for record in records])
        self._relations = [record.relation for record in records]
        prompts = [tokenizer.encode(record.text) for record in records]
        self.answers = np.array(
            [_first_token(tokenizer, prompt, record) for prompt, record in zip(prompts, records, strict=True)]
        )
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, prompt in enumerate(prompts):
            by_length[len(prompt)].append(index)
        self._batches: list[tuple[np.ndarray, Tensor]] = []
        for indices in by_length.values():
            for start in range(0, len(indices), ROWS_PER_BATCH):
                chunk = np.array(indices[start : start + ROWS_PER_BATCH])
                self._batches.append((chunk, torch.tensor([prompts[index] for index in chunk], dtype=torch.int64, device="cpu")))

    @torch.inference_mode()
    def log_probabilities(self, model: Transformer) -> Float[np.ndarray, "record d_vocab"]:
        """Of the token after every prompt."""
        rows = np.empty((len(self.answers), model.cfg.d_vocab))
        for indices, tokens in self._batches:
            logits = model(tokens.to(model.cfg.device))[:, -1]
            rows[indices] = logits.double().log_softmax(-1).cpu().numpy()
        return rows

    def losses(self, model: Transformer) -> tuple[Float[np.ndarray, " subject"], Float[np.ndarray, " subject"]]:
        """-log p(answer) in nats, summed over each subject's facts, and how many these are."""
        loss = -self.log_probabilities(model)[np.arange(len(self.answers)), self.answers]
        n = len(self.subjects)
        return np.bincount(self.subject, loss, n), np.bincount(self.subject, minlength=n).astype(np.float64)

    def accuracy(self, model: Transformer) -> float:
        """Share of facts whose answer is the most probable among the answers of its relation."""
        log_p = self.log_probabilities(model)
        right = 0
        for relation in set(self._relations):
            own = np.array([index for index, name in enumerate(self._relations) if name == relation])
            candidates = np.unique(self.answers[own])
            right += int((candidates[log_p[np.ix_(own, candidates)].argmax(axis=1)] == self.answers[own]).sum())
        return right / len(self.answers)


def _first_token(tokenizer: Tokenizer, prompt: list[int], record: FactRecord) -> int:
    """The token after the prompt when the answer follows it."""
    whole = tokenizer.encode(f"{record.text} {record.true}")
    if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
        raise ValueError(f"case {record.case_id}: the last token of {record.text!r} also holds the beginning of {record.true!r}")
    return whole[len(prompt)]
