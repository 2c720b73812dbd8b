"""The checks that gate a measurement (arXiv 2606.10703, appendix B), each in a form that can fail.

The paper's four checks, as stated rather than as released (there the fourth was always true), and a fifth that the paper
could not make: that the fast counterfactuals equal full forward passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_moe.counterfactuals import LossAfter, Scope, expert_effects
from hooked_moe.counterfactuals.engine.steps import Steps, in_turn, pausable
from hooked_moe.expert_mask import RemovalName
from hooked_moe.measurement.full_forwards import Everything, Removed, forward_by_layer, losses_of_rows, losses_without
from hooked_moe.measurement.part_spec import ProductsName
from hooked_moe.transformer import Transformer

MINIMUM_TOKENS = 8
SEQUENCE_TOKENS = 64
"""How many tokens scope "sequence" is checked on, the first of the sequence: it costs a forward per expert."""
LATER_TOKENS = 4
"""How many tokens after the measured one are compared in scope "from_position", which differs from "position" only there."""

EXACTNESS: dict[Scope, str] = {
    "position": "effects are exact",
    "sequence": "effects are exact, sequence-wide",
    "from_position": "effects are exact, from the position on",
}
"""The last check's name in each scope."""

LOSS_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Nats between two computations of the same loss. Half precision rounds every activation, so its tolerances are that loose."""

TOKENS_TOGETHER = 2048
"""Of full forward passes, each without another expert, which are rows of one."""

PRODUCTS_TOLERANCE = 1e-2
"""Of the median effect: what products of the change in bfloat16 may be off by in the median. Measured are .0025 to .004."""
PICKED_FOR_PRODUCTS = 200
"""How many removals are compared where all are not made."""


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    value: float
    threshold: float
    detail: str


class Clean(NamedTuple):
    """The losses of a sequence before anything is removed."""

    used: Float[Tensor, "1 pos-1"]
    by_definition: Float[Tensor, " pos-1"]
    """The cross-entropy of the logits at the right token, in float64."""


@pausable
def clean_losses(model: Transformer, tokens: Int[Tensor, "1 pos"]) -> Steps[Clean]:
    """What verification compares with: an ordinary forward, made before all that it is compared with."""
    tokens = tokens.to(model.cfg.device)
    logits, loss = yield from forward_by_layer(model, tokens)
    log_probabilities = logits[0, :-1].double().log_softmax(-1)
    targets = tokens[0, 1:]
    return Clean(loss, -log_probabilities[torch.arange(len(targets), device=tokens.device), targets])


@pausable
def verify(
    model: Transformer,
    tokens: Int[Tensor, "1 pos"],
    removal: RemovalName = "zero",
    scopes: Sequence[Scope] = ("position",),
    seed: int = 0,
    products: ProductsName | None = None,
    picked: bool = False,
    clean: Clean | None = None,
) -> Steps[list[Check]]:
    """Run every check on one sequence of at least 8 tokens, the last with the removal and in each of the scopes to be measured;
    with `products`, a further one that says how far effects by them are from those by the model's own.

    With `picked`, the effects that are compared are made alone (`expert_effects(picks=)`), as a budgeted run makes them, and not
    among those of all removals, which cost more than such a run. Never raises for a failed check: look at `passed`. Where weights
    are streamed, they are read twice: for the losses before anything is removed, unless `clean` has them of an earlier reading,
    and for all that comes after it, side by side.
    """
    if tokens.shape[0] != 1 or tokens.shape[1] < MINIMUM_TOKENS:
        raise ValueError(f"verification takes one sequence [1, pos] of {MINIMUM_TOKENS} tokens or more, not {list(tokens.shape)}")
    tokens = tokens.to(model.cfg.device)
    generator = torch.Generator("cpu").manual_seed(seed)
    if clean is None:
        clean = yield from clean_losses.steps(model, tokens)
        yield  # what goes beside it ends with the last block, before this begins again with the first
    checks = [
        _loss_matches_logits(model, tokens, clean),
        _no_stale_state(model, tokens, clean.used),
        _inactive_expert_has_no_effect(model, tokens, generator),
        *(_effects_equal_full_forwards(model, tokens, generator, removal, scope, picked) for scope in scopes),
    ]
    if products is not None:
        checks.append(_products_are_near(model, tokens, generator, removal, products, picked))
    loss, stale, inactive, *exact = yield from in_turn(checks, model.streams)
    return [loss, stale, _losses_differ(clean.used[0]), inactive, *exact]


def _loss_matches_logits(model: Transformer, tokens: Tensor, clean: Clean) -> Steps[Check]:
    """1. The loss in use is the cross-entropy of the logits at the right token: recomputed in float64, by its definition."""
    engine = yield from expert_effects.steps(model, tokens, layers=model.cfg.moe_layers[-1:])
    losses = torch.stack([engine.baseline_loss[0, :-1], clean.used[0]])
    difference = float((losses.double() - clean.by_definition).abs().max())
    threshold = LOSS_TOLERANCE[model.cfg.dtype]
    return Check(
        "loss", difference <= threshold, difference, threshold, "largest |losses used - cross-entropy of the logits|, nats"
    )


def _no_stale_state(model: Transformer, tokens: Tensor, before: Tensor) -> Steps[Check]:
    """2. A removal leaves nothing behind: the loss before and after it is the same to the bit."""
    everything = {layer: {0: Everything()} for layer in model.cfg.moe_layers}
    removed, after = yield from in_turn([losses_without(model, tokens, everything), losses_without(model, tokens)], model.streams)
    moved = float((removed - before).abs().max())
    left = float((after - before).abs().max())
    passed = left == 0 and moved > 0
    return Check(
        "no stale state", passed, left, 0.0, f"largest change after a removal that moved the loss by up to {moved:.3g} nats"
    )


def _losses_differ(losses: Float[Tensor, " predicted"]) -> Check:
    """3. Different positions have different losses: a loss read at the wrong position would repeat."""
    share = len(losses[~losses.isnan()].unique()) / len(losses)
    return Check("losses differ", share > 0.5, share, 0.5, "share of positions whose loss no other position has")


def _inactive_expert_has_no_effect(model: Transformer, tokens: Tensor, generator: torch.Generator) -> Steps[Check]:
    """4. Removing an expert where it is not active changes no loss, to the bit; where it is, none before that position.

    Before that position, up to rounding: later tokens may be routed otherwise, and products over groups of other sizes round
    otherwise.
    """
    layer, pos = _random_place(model, tokens, generator)
    active, inactive = Removed(pos, slot=0), Removed(pos, slot=None)
    every = model.cfg.experts_in(layer) <= model.cfg.experts_per_token  # is active everywhere: there is no inactive one
    removals = [active] if every else [active, inactive]
    forwards = [losses_without(model, tokens), *(losses_without(model, tokens, {layer: {0: removed}}) for removed in removals)]
    clean, without_active, *without_inactive = torch.cat((yield from in_turn(forwards, model.streams)))
    of_inactive = max((float((losses - clean).abs().max()) for losses in without_inactive), default=0.0)
    of_active = (without_active - clean).abs()
    before = float(of_active[:pos].max()) if pos else 0.0
    passed = of_inactive == 0 and before <= LOSS_TOLERANCE[model.cfg.dtype] and float(of_active[pos:].max()) > 0
    others = "every expert active" if every else f"expert {inactive.expert} inactive"
    detail = f"layer {layer}, position {pos}: {others}; expert {active.expert} removed moves earlier losses by {before:.1g} nats"
    return Check("inactive expert", passed, of_inactive, 0.0, detail)


def _effects_equal_full_forwards(
    model: Transformer,
    tokens: Tensor,
    generator: torch.Generator,
    removal: RemovalName,
    scope: Scope,
    picked: bool,
    samples: int = 12,
) -> Steps[Check]:
    """5. The fast counterfactuals equal one full forward pass per removal; from the position on, at later tokens too."""
    layers = None
    if scope == "sequence":
        tokens = tokens[:, :SEQUENCE_TOKENS]
        layers = [_random_place(model, tokens, generator)[0]]
    readouts = [LossAfter(LATER_TOKENS)] if scope == "from_position" else []
    places: list[tuple[int, Removed]] = []
    for _ in range(samples):
        layer, pos = _random_place(model, tokens, generator)
        slot = _random_below(model.cfg.experts_per_token, generator)
        places.append((layer if layers is None else layers[0], Removed(pos, slot, removal, scope)))
    if picked:
        picks = _no_picks(model, tokens)
        for layer, removed in places:
            picks[model.cfg.moe_layers.index(layer), 0, removed.pos, removed.slot] = True
        tasks: list[Steps[Any]] = [expert_effects.steps(model, tokens, removal=removal, picks=picks)]
    else:
        tasks = [expert_effects.steps(model, tokens, layers, scope, removal, readouts=readouts)]
    rows = [None, *places]
    together = max(1, TOKENS_TOGETHER // tokens.shape[1])
    tasks += [losses_of_rows(model, tokens, rows[start : start + together]) for start in range(0, len(rows), together)]
    effects, *losses = yield from in_turn(tasks, model.streams)
    clean, *without = torch.cat(losses)
    differences = []
    for (layer, removed), own in zip(places, without, strict=True):
        full, pos, index = own - clean, removed.pos, effects.layers.index(layer)
        here = effects.expert_index[index, 0, pos] == removed.expert
        fast = effects.delta_loss[index, 0, pos, here]
        differences.append(float((full[pos] - fast).abs()) if len(fast) else math.inf)
        if readouts:
            expected = full[pos : pos + LATER_TOKENS + 1]  # fewer at the end of the sequence
            later = effects.readouts[readouts[0].name][index, 0, pos, here, : len(expected)]
            differences[-1] = _largest([differences[-1], float((expected - later).abs().max())])
    # In half precision single removals differ by the rounding of every activation; their median must still be small.
    half = model.cfg.dtype.itemsize < 4
    value = float(torch.tensor(differences, dtype=torch.float64, device="cpu").median()) if half else _largest(differences)
    threshold = LOSS_TOLERANCE[model.cfg.dtype]
    detail = f"{'median' if half else 'largest'} |fast - full forward| over {len(differences)} random removals, nats"
    return Check(EXACTNESS[scope], value <= threshold, value, threshold, detail)


def _products_are_near(
    model: Transformer, tokens: Tensor, generator: torch.Generator, removal: RemovalName, products: ProductsName, picked: bool
) -> Steps[Check]:
    """6. Effects by products of the change, in a narrower dtype, are those by the model's own up to a share of a typical one."""
    picks = None
    if picked:
        picks = _no_picks(model, tokens)
        some = torch.randperm(picks.numel(), generator=generator, device="cpu")[:PICKED_FOR_PRODUCTS]
        picks.view(-1)[some.to(picks.device)] = True
    forms = [expert_effects.steps(model, tokens, removal=removal, picks=picks, products=form) for form in (None, products)]
    own, near = (effects.delta_loss[..., :-1, :].double() for effects in (yield from in_turn(forms, model.streams)))
    made = ~own.isnan()
    off = (near - own)[made].abs()
    median, worst = float(off.median()), float(off.sort().values[int(0.99 * (len(off) - 1))])
    share = median / float(own[made].abs().median())
    return Check(
        "products of the change",
        share <= PRODUCTS_TOLERANCE,
        share,
        PRODUCTS_TOLERANCE,
        f"median |effect by {products} - by {str(model.cfg.dtype).removeprefix('torch.')}| as a share of the median |effect|; "
        f"{median:.2g} nats, and below {worst:.2g} for 99% of {len(off):,} removals",
    )


def _no_picks(model: Transformer, tokens: Tensor) -> Bool[Tensor, "layer 1 pos slot"]:
    shape = (len(model.cfg.moe_layers), *tokens.shape, model.cfg.experts_per_token)
    return torch.zeros(shape, dtype=torch.bool, device=tokens.device)


def _largest(values: Sequence[float]) -> float:
    """The largest value; nan if one is nan, which Python's max would pass over."""
    return float(torch.tensor(values, dtype=torch.float64, device="cpu").max())


def _random_place(model: Transformer, tokens: Tensor, generator: torch.Generator) -> tuple[int, int]:
    """A layer with experts, and a position that has a next token."""
    layer = model.cfg.moe_layers[_random_below(len(model.cfg.moe_layers), generator)]
    return layer, _random_below(tokens.shape[1] - 1, generator)


def _random_below(stop: int, generator: torch.Generator) -> int:
    return int(torch.randint(stop, (1,), generator=generator, device="cpu"))
