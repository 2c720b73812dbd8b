"""Clean and corrupted prompts of the same length: random ones, and ones on which a shipped model prefers different next words."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from hooked_moe import HookedMoE
from hooked_moe.counterfactuals import At, LogitDifference

MASKS = {
    "none": None,
    "right": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
    "left": torch.tensor([[0] * 3 + [1] * 4, [1] * 7]),
    "holes": torch.tensor([[1, 1, 1, 0, 1, 1, 1], [0, 1, 1, 0, 0, 1, 1]]),
}
FIRST, SECOND = torch.tensor([3, 40]), torch.tensor([17, 5])
METRIC = At(-1, LogitDifference(FIRST, SECOND))


def random_pair() -> tuple[Tensor, Tensor]:
    """Two rows of seven tokens, of which the corrupted prompt changes the second and the fifth."""
    clean = torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(4))
    corrupt = clean.clone()
    corrupt[:, [1, 4]] = (corrupt[:, [1, 4]] + 13) % 61
    return clean, corrupt


def last_tokens(mask: Tensor | None) -> list[int]:
    """The position of each row's last token."""
    return [6, 6] if mask is None else [int(row.nonzero()[-1]) for row in mask]


def difference_at_end(mask: Tensor | None) -> object:
    """`METRIC` as a function of the logits."""
    rows, last = torch.arange(2), torch.tensor(last_tokens(mask))

    def metric(logits: Tensor) -> Tensor:
        return logits[rows, last, FIRST] - logits[rows, last, SECOND]

    return metric


@dataclass(frozen=True)
class WordPairs:
    """Prompts "the X of" and "the Y of" whose most likely next words differ, each by a logit or more from the other's."""

    model: HookedMoE
    clean: Tensor
    corrupt: Tensor
    metric: At


CONNECTIVES = ("of", "and", "in", "to", "for", "with", "from", "by", "that", "on", "is")
WORDS = re.findall(
    r"\w+",
    """house king people church history law son power name state work form land day word government city time nature body
head earth end book life spirit children country war school language author world kingdom order river line court sea priest
army father light value character use part origin number system rest cause glory knowledge voice science hand death place
study kind ground blood works age subject truth sons love case mother face wife service common great""",
)


@functools.cache
def word_pairs(name: str = "tiny-olmoe", count: int = 128) -> WordPairs:
    model = HookedMoE.from_pretrained(name).eval()
    prompts = {connective: [model.to_tokens(f"the {word} {connective}")[0] for word in WORDS] for connective in CONNECTIVES}
    length = len(prompts["of"][0])
    pairs: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for rows in prompts.values():
        rows = [row for row in rows if len(row) == length]
        with torch.no_grad():
            logits = model(torch.stack(rows))[:, -1]
        top = logits.argmax(-1)
        for step in (1, 5, 11):
            for i, j in ((i, (i + step) % len(rows)) for i in range(len(rows))):
                clean_prefers, corrupt_prefers = (logits[row, top[i]] - logits[row, top[j]] for row in (i, j))
                if clean_prefers > 1 and corrupt_prefers < -1:
                    pairs.append((rows[i], rows[j], top[i], top[j]))
    if len(pairs) < count:
        raise ValueError(f"only {len(pairs)} pairs of prompts are told apart by {name}")
    clean, corrupt, first, second = (torch.stack(column[:count]) for column in zip(*pairs, strict=True))
    return WordPairs(model, clean, corrupt, At(-1, LogitDifference(first, second)))
