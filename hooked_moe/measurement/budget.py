"""How much of a measurement is paid for: a share of the removals, or a time from which a share follows."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch

from hooked_moe.checks import WrongTypeError, described, quoted
from hooked_moe.counterfactuals import expert_effects
from hooked_moe.expert_mask import RemovalName
from hooked_moe.measurement.part_spec import ProductsName
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.transformer import Transformer

SEED = 42
FEWEST_REMOVALS = 200
"""Fewer say nothing of a model."""
MOST_OF_A_BUDGET = 0.99
"""The largest share of the removals that a time is turned into: where it is enough for all, no budget is needed."""
_SECONDS = {"s": 1, "min": 60, "h": 3600}
_TIMED_SHARE = 0.05
"""Of the removals of one document, in the timing."""


@dataclass(frozen=True)
class Budget:
    """Either a share of the removals, or the seconds that making them may take."""

    share: float | None = None
    seconds: float | None = None
    seed: int = SEED

    def __post_init__(self) -> None:
        if (self.share is None) == (self.seconds is None):
            raise ValueError("a budget is either a share of the removals or a time")
        for name, value in (("share", self.share), ("seconds", self.seconds)):
            if isinstance(value, bool) or not isinstance(value, Real | None):
                raise WrongTypeError(f"{name} must be a number, not {described(value)}")
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(
                f"a budget is a share of the removals above 0 and below 1, not {self.share!r}; without one, all are made"
            )
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise ValueError(f"a budget is a number of seconds above 0, not {self.seconds!r}")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """The budget that "1%", "90s", "10min" or "2h" names. Raises `ValueError` for anything else."""
        match = re.fullmatch(r"\s*([0-9]{0,12}\.?[0-9]{1,12})\s*(%|s|min|h)\s*", text)
        if match is None:
            raise ValueError(f"{quoted(text)}: give a share of the removals, as in 1%, or a time, as in 90s, 10min or 2h")
        number = float(match[1])
        if not number or (match[2] == "%" and number >= 100):
            raise ValueError(
                f"{quoted(text)}: a share of the removals lies above 0% and below 100%, and a time above 0; without a budget, "
                "all are made"
            )
        return cls(share=number / 100) if match[2] == "%" else cls(seconds=number * _SECONDS[match[2]])

    def as_json(self) -> dict[str, Any]:
        """What the plan says of it."""
        return ({"share": self.share} if self.seconds is None else {"seconds": self.seconds}) | {"seed": self.seed}


def share_within(seconds: float, fixed: float, per_removal: float, removals: int) -> float | None:
    """The share of the removals that a time is enough for, `fixed` seconds of which are for all else; None where it is enough for
    fewer than `FEWEST_REMOVALS`."""
    share = min((seconds - fixed) / per_removal / removals, MOST_OF_A_BUDGET)
    return None if share * removals < FEWEST_REMOVALS else share


def share_of(
    budget: Budget,
    model: Transformer,
    corpus: TokenizedCorpus,
    layers: tuple[int, ...],
    removal: RemovalName,
    products: ProductsName | None = None,
) -> dict[str, float]:
    """The share of the removals that a budget pays for, as a manifest records it; and what was timed where it is in seconds.

    One window is run without removals and with some of them; the rest follows by the number of tokens and of removals. Weights
    that are streamed are read once for all documents: what that takes shows where two windows take less than twice the time of
    one. Raises `ValueError` where the budget is not enough for `FEWEST_REMOVALS`.
    """
    removals = len(corpus.valid_positions()) * len(layers) * model.cfg.experts_per_token
    if budget.share is not None:
        if budget.share * removals < FEWEST_REMOVALS:
            raise ValueError(
                f"{100 * budget.share:g}% of {removals:,} removals are fewer than {FEWEST_REMOVALS}, which say nothing of a "
                "model: give a larger share or more text, or leave out the budget"
            )
        return {"share": budget.share}
    assert budget.seconds is not None
    seconds = budget.seconds
    windows = sorted((window.tokens for windows in corpus.documents for window in windows), key=len)
    tokens = torch.from_numpy(windows[-1][None])
    shape = (len(layers), 1, tokens.shape[1], model.cfg.experts_per_token)
    chosen = np.random.default_rng(0).random(shape) < _TIMED_SHARE
    some = torch.from_numpy(chosen)
    none = torch.zeros_like(some)
    effects = partial(expert_effects, model, layers=layers, removal=removal, products=products)
    effects(tokens, picks=some)  # the first run prepares kernels

    def timed(tokens: torch.Tensor, picks: torch.Tensor) -> float:
        started = time.perf_counter()
        effects(tokens, picks=picks)
        return time.perf_counter() - started

    times = 1 if model.streams else 2  # each reads the whole model, where it is streamed
    without, with_some = (min(timed(tokens, picks) for _ in range(times)) for picks in (none, some))
    window, reading = without, 0.0
    if model.streams:
        both = timed(tokens.repeat(2, 1), none.repeat(1, 2, 1, 1))
        window = min(max(both - without, 0.0), without)
        reading = without - window
    per_removal = max(with_some - without, 1e-9) / int(chosen.sum())
    fixed = reading + window / tokens.shape[1] * sum(map(len, windows))
    share = share_within(seconds, fixed, per_removal, removals)
    if share is None:
        needed = fixed + FEWEST_REMOVALS * per_removal
        raise ValueError(
            f"{seconds:g} s are too few: the forward passes alone take {fixed:.1f} s here, and with {FEWEST_REMOVALS} removals "
            f"{needed:.1f} s; give more time, or fewer documents"
        )
    return {"share": float(f"{share:.3g}"), "seconds_of_forwards": fixed, "seconds_per_removal": per_removal}
