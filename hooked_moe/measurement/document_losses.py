"""The loss of every document of a corpus under a model as it is, or under a mask."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import torch
from jaxtyping import Float, Int

from hooked_moe.expert_mask import ExpertMask
from hooked_moe.measurement.pruned_losses import TOKENS_PER_BATCH
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.transformer import Transformer


def predicted_tokens(tokenized: TokenizedCorpus) -> Int[np.ndarray, " document"]:
    """How many tokens of each document are predicted from tokens before them."""
    return np.array([sum(len(window.tokens) - 1 - tokenized.first for window in windows) for windows in tokenized.documents])


@torch.inference_mode()
def document_losses(
    model: Transformer, tokenized: TokenizedCorpus, mask: ExpertMask | None = None
) -> Float[np.ndarray, " document"]:
    """-log p(next token) in nats, summed over each document's tokens. The mask, if any, must fit windows of every length."""
    total = np.zeros(len(tokenized.documents))
    windows = sorted((window for windows in tokenized.documents for window in windows), key=lambda window: len(window.tokens))
    for length, group in groupby(windows, key=lambda window: len(window.tokens)):
        alike = list(group)
        rows = max(1, TOKENS_PER_BATCH // length)
        for start in range(0, len(alike), rows):
            batch = alike[start : start + rows]
            tokens = torch.from_numpy(np.stack([window.tokens for window in batch])).to(model.cfg.device)
            losses = model(tokens, return_type="loss", loss_per_token=True, expert_mask=mask)[:, tokenized.first :]
            for window, loss in zip(batch, losses.double().sum(dim=1).tolist(), strict=True):
                total[window.document] += loss
    return total
