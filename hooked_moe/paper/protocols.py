"""The two protocols: the audit as arXiv 2606.10703 states it ("defined"), and as its released code runs it ("as_released").

`DEFINED` is what `experiments/` do unless told otherwise. `RELEASED` tabulates, family by family, what the released code does
instead: which texts, which positions in which order, what its metrics compute, whether padding counts, at what precision, and
with which divisor d is taken. Everything here is data and draws of random numbers; the package `hooked_moe.paper` runs it.

    expert removed   at the measured token       from every token of the sequence that it serves
    statistics over  real tokens                 all rows, padding too (OLMoE right, DeepSeek left); Qwen runs texts singly
    positions        one sample for all cells    a new draw per metric (OLMoE, DeepSeek) or per metric and layer (Qwen, controls)
    decision         t-test and Wilcoxon agree   the t-test alone
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from hooked_moe.paper.published import CONTROL_RANKING, METRICS, published_model

ProtocolName = Literal["defined", "as_released"]
SEED = 42
Draw = Int[np.ndarray, "draw 2"]
"""(text, position) pairs in the order drawn; positions count a text's tokens from 0."""


@dataclass(frozen=True)
class TextRule:
    """Which texts are read: the first `first` paragraphs longer than `longer_than` characters, cut to `tokens` tokens."""

    longer_than: int
    first: int | None
    tokens: int

    def select(self, documents: Iterable[str]) -> list[str]:
        """The paragraphs of the documents, parted by blank lines. Raises `ValueError` where none is that long."""
        paragraphs = (part for text in documents for part in re.split(r"\n\s*\n", text))
        chosen = [part for part in paragraphs if len(part.strip()) > self.longer_than]
        if not chosen:
            raise ValueError(f"the corpus has no paragraph of more than {self.longer_than} characters; give another corpus")
        return chosen[: self.first]


@dataclass(frozen=True)
class ReleasedProgressive:
    """One position per text, texts shuffled; the most heavily weighted experts go first."""

    texts: TextRule
    positions: int
    fewest_before: int
    """The least number of tokens before the one whose loss is measured."""


@dataclass(frozen=True)
class ReleasedRedistribution:
    """Output gaps by expert. Router rows keep padding, block outputs drop it: they are paired by number, not by token."""

    texts: TextRule
    special_tokens: bool


@dataclass(frozen=True)
class Released:
    """What the released code does for one family."""

    model_type: str
    dtype: Literal["float32", "float16", "bfloat16"]
    """The dtype of the audit. OLMoE's other experiments ran in float16."""
    texts: TextRule
    padding: Literal["right", "left"] | None
    """Where padding stands. All texts are padded to the longest, and padding rows enter every metric; None: no padding."""
    sampling: Literal["per_metric", "per_metric_and_layer"]
    """A permutation's beginning for each metric, the same in all layers; or pairs (text, position) drawn with replacement."""
    utilization_rate: Literal["mean_logit", "share_of_rows", "share_of_selections"]
    mean_routing_weight_when_active: Literal["mean_logit_above_threshold", "mean_weight", "mean_probability"]
    activation_std: Literal["of_norms", "of_coordinates"]
    texts_for_norms: int | None
    """How many texts activation norm and std read; None: all."""
    ddof: int
    """The divisor of the audit's d is n - ddof; the control's ddof is 1 everywhere."""
    skips_equal_weights: bool
    """The control passes over positions whose highest and lowest weight are within 1e-6."""
    progressive: ReleasedProgressive | None
    redistribution: ReleasedRedistribution | None


_AUDIT_TEXTS = TextRule(longer_than=50, first=100, tokens=512)
_REDISTRIBUTION_TEXTS = TextRule(longer_than=100, first=200, tokens=256)

RELEASED: dict[str, Released] = {
    "olmoe": Released(
        model_type="olmoe",
        dtype="float32",
        texts=_AUDIT_TEXTS,
        padding="right",
        sampling="per_metric",
        utilization_rate="mean_logit",
        mean_routing_weight_when_active="mean_logit_above_threshold",
        activation_std="of_norms",
        texts_for_norms=None,
        ddof=0,
        skips_equal_weights=False,
        progressive=ReleasedProgressive(TextRule(longer_than=100, first=None, tokens=256), positions=500, fewest_before=32),
        redistribution=ReleasedRedistribution(_REDISTRIBUTION_TEXTS, special_tokens=True),
    ),
    "qwen2_moe": Released(
        model_type="qwen2_moe",
        dtype="bfloat16",
        texts=_AUDIT_TEXTS,
        padding=None,
        sampling="per_metric_and_layer",
        utilization_rate="share_of_selections",
        mean_routing_weight_when_active="mean_probability",
        activation_std="of_coordinates",
        texts_for_norms=30,
        ddof=1,
        skips_equal_weights=False,
        progressive=None,
        redistribution=ReleasedRedistribution(_REDISTRIBUTION_TEXTS, special_tokens=False),
    ),
    "deepseek_v2": Released(
        model_type="deepseek_v2",
        dtype="float16",
        texts=_AUDIT_TEXTS,
        padding="left",
        sampling="per_metric",
        utilization_rate="share_of_rows",
        mean_routing_weight_when_active="mean_weight",
        activation_std="of_norms",
        texts_for_norms=None,
        ddof=0,
        skips_equal_weights=True,
        progressive=None,
        redistribution=None,
    ),
}

DEFINED: dict[str, Any] = {
    "name": "defined",
    "scope": "position",
    "removal": "zero",
    "padding": None,
    "positions": "one sample for all metrics, layers and controls; and every position",
    "ddof": 1,
    "decision": "t-test and Wilcoxon agree",
    "precision": "router, final norm, unembedding and loss in float32",
}


def released_protocol(model_type: str) -> Released:
    """Raises `ValueError` for a family that the paper did not audit."""
    if model_type not in RELEASED:
        raise ValueError(
            f"there is no released protocol for {model_type!r}: the paper audited {', '.join(RELEASED)}; use --protocol defined"
        )
    return RELEASED[model_type]


def describe(released: Released) -> dict[str, Any]:
    """The protocol for a manifest."""
    return {"name": "as_released", "scope": "sequence", "removal": "zero", "decision": "t-test alone", **asdict(released)}


# --- draws ------------------------------------------------------------------------------------------------------------


def draws_per_metric(lengths: Sequence[int], n: int, metrics: Sequence[str] = METRICS) -> dict[str, Draw]:
    """OLMoE and DeepSeek: `n` distinct positions for each metric, the first of successive permutations of all valid ones.

    `lengths` are the tokens of each text; all but a text's last token are valid. Raises `ValueError` where fewer than three are.
    """
    valid = np.concatenate([np.stack([np.full(m - 1, j), np.arange(m - 1)], axis=1) for j, m in enumerate(lengths) if m > 1])
    _require(len(valid))
    generator = np.random.RandomState(SEED)
    return {metric: valid[generator.permutation(len(valid))[:n]] for metric in metrics}


def draws_per_metric_and_layer(
    lengths: Sequence[int],
    n: int,
    layers: Sequence[int],
    rankings: Sequence[str],
    accept: Callable[[int, int, int], bool] | None = None,
) -> dict[tuple[str, int], Draw]:
    """Qwen and all controls: a text of at least four tokens, then a position in [1, tokens - 2], with replacement.

    One generator goes through all layers, and in each through all rankings, so the draws depend on the layers asked for. A draw
    for which `accept(layer, text, position)` is false is replaced by the next; after 10 n tries a cell stays short, as released.
    Returns (ranking, layer) -> draws. Raises `ValueError` where no text is that long.
    """
    usable = [j for j, m in enumerate(lengths) if m >= 4]
    _require(sum(lengths[j] - 2 for j in usable))
    generator = np.random.default_rng(SEED)
    result: dict[tuple[str, int], Draw] = {}
    for layer in layers:
        for ranking in rankings:
            drawn: list[tuple[int, int]] = []
            for _ in range(10 * n):
                if len(drawn) == n:
                    break
                text = usable[int(generator.integers(0, len(usable)))]
                position = int(generator.integers(1, lengths[text] - 1))
                if accept is None or accept(layer, text, position):
                    drawn.append((text, position))
            result[ranking, layer] = np.array(drawn, dtype=np.int64).reshape(-1, 2)
    return result


def audit_draws(released: Released, lengths: Sequence[int], n: int, layers: Sequence[int]) -> dict[tuple[str, int], Draw]:
    """(metric, layer) -> positions, as the family's released audit draws them."""
    if released.sampling == "per_metric":
        by_metric = draws_per_metric(lengths, n)
        return {(metric, layer): draws for metric, draws in by_metric.items() for layer in layers}
    drawn = draws_per_metric_and_layer(lengths, n, layers, (*METRICS, CONTROL_RANKING))
    return {cell: draws for cell, draws in drawn.items() if cell[0] != CONTROL_RANKING}


def control_draws(
    released: Released,
    lengths: Sequence[int],
    n: int,
    layers: Sequence[int],
    weight_range: Callable[[int, int, int], float],
) -> dict[tuple[str, int], Draw]:
    """(routing_weight, layer) -> positions. `weight_range(layer, text, position)` is the highest weight minus the lowest."""
    rankings = (CONTROL_RANKING,) if released.sampling == "per_metric" else (*METRICS, CONTROL_RANKING)
    accept = (lambda layer, text, pos: weight_range(layer, text, pos) >= 1e-6) if released.skips_equal_weights else None
    drawn = draws_per_metric_and_layer(lengths, n, layers, rankings, accept)
    return {cell: draws for cell, draws in drawn.items() if cell[0] == CONTROL_RANKING}


def progressive_draw(protocol: ReleasedProgressive, lengths: Callable[[int], int], n_texts: int, n: int) -> Draw:
    """Texts in shuffled order, one position each, until there are `n`; `lengths(text)` counts tokens, cut to the rule's.

    The position is that of the token before the one drawn: removing experts there changes the prediction of the drawn token.
    """
    generator = random.Random(SEED)
    order = list(range(n_texts))
    generator.shuffle(order)
    drawn: list[tuple[int, int]] = []
    for text in order:
        if len(drawn) == n:
            break
        length = lengths(text)
        if length > protocol.fewest_before:
            drawn.append((text, generator.randint(protocol.fewest_before, length - 1) - 1))
    _require(len(drawn))
    return np.array(drawn, dtype=np.int64)


def protocol_layers(model_type: str, n_layers: int, moe_layers: Sequence[int]) -> tuple[int, ...]:
    """The published layers where this is the published model, else every layer with experts."""
    published = published_model(model_type)
    return published.layers if published is not None and published.n_layers == n_layers else tuple(moe_layers)


def _require(positions: int) -> None:
    if positions < 3:
        raise ValueError(f"the texts have {positions} positions to measure; paired tests need 3: give a longer corpus")
