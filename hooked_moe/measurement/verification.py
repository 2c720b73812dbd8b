"""The checks that gate a measurement (arXiv 2606.10703, appendix B), each in a form that can fail.

The paper's four checks, as stated rather than as released (there the fourth was always true), and a fifth that the paper
could not make: that the fast counterfactuals equal full forward passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.components.precision import without_autocast
from hooked_moe.counterfactuals import LossAfter, Scope, expert_effects
from hooked_moe.counterfactuals.engine.clean_run import CleanBlock, as_expert_block
from hooked_moe.counterfactuals.engine.fan_out import FanOut, fan_out
from hooked_moe.counterfactuals.engine.lanes import Lanes
from hooked_moe.counterfactuals.engine.padding import Packed, pack
from hooked_moe.counterfactuals.engine.steps import run_to_end
from hooked_moe.counterfactuals.removals import Zero
from hooked_moe.counterfactuals.results import ExpertEffects
from hooked_moe.expert_mask import ExpertMask, RemovalName
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


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    value: float
    threshold: float
    detail: str


@without_autocast()
def verify(
    model: Transformer,
    tokens: Int[Tensor, "1 pos"],
    removal: RemovalName = "zero",
    scopes: Sequence[Scope] = ("position",),
    seed: int = 0,
) -> list[Check]:
    """Run every check on one sequence of at least 8 tokens, the last with the removal and in each of the scopes to be measured.

    Never raises for a failed check: look at `passed`.
    """
    if tokens.shape[0] != 1 or tokens.shape[1] < MINIMUM_TOKENS:
        raise ValueError(f"verification takes one sequence [1, pos] of {MINIMUM_TOKENS} tokens or more, not {list(tokens.shape)}")
    tokens = tokens.to(model.cfg.device)
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.inference_mode():
        return [
            _loss_matches_logits(model, tokens),
            _no_stale_state(model, tokens),
            _losses_differ(model, tokens),
            _inactive_expert_has_no_effect(model, tokens, generator),
            *(_effects_equal_full_forwards(model, tokens, generator, removal, scope) for scope in scopes),
        ]


@without_autocast()
def noise_floor(model: Transformer, tokens: Int[Tensor, "batch pos"]) -> float:
    """Largest "effect", in nats, of removing nothing: through the counterfactuals of every layer, in a batch, against the
    baseline of each sequence alone.

    Effects below it are rounding. Zero is possible: the same operations in the same order.
    """

    def nothing_removed(clean: CleanBlock) -> Float[Tensor, "1 batch pos d_model"]:
        experts = as_expert_block(clean)
        return Zero().without(experts, torch.ones_like(experts.routing.weights, dtype=torch.bool)[None])

    def run(packed: Packed, layers: list[int]) -> FanOut:
        return run_to_end(fan_out(model, packed, Lanes.of_variants(layers, 1), nothing_removed))

    with torch.inference_mode():
        packed = pack(tokens.to(model.cfg.device), None)
        together = run(packed, model.cfg.moe_layers).losses
        alone = torch.cat([run(row, []).baseline for row in packed.split(1)])
    return float((together - alone)[..., :-1].abs().max())


def _losses(model: Transformer, tokens: Tensor, mask: ExpertMask | None = None) -> Tensor:
    return model(tokens, return_type="loss", loss_per_token=True, expert_mask=mask)


def _loss_matches_logits(model: Transformer, tokens: Tensor) -> Check:
    """1. The loss in use is the cross-entropy of the logits at the right token: recomputed in float64, by its definition."""
    log_probabilities = model(tokens)[0, :-1].double().log_softmax(-1)
    by_definition = -log_probabilities[torch.arange(tokens.shape[1] - 1, device=tokens.device), tokens[0, 1:]]
    engine = expert_effects(model, tokens, layers=model.cfg.moe_layers[-1:]).baseline_loss[0, :-1]
    used = torch.stack([engine, _losses(model, tokens)[0]])
    difference = float((used.double() - by_definition).abs().max())
    threshold = LOSS_TOLERANCE[model.cfg.dtype]
    return Check(
        "loss", difference <= threshold, difference, threshold, "largest |losses used - cross-entropy of the logits|, nats"
    )


def _no_stale_state(model: Transformer, tokens: Tensor) -> Check:
    """2. A removal leaves nothing behind: the loss before and after it is the same to the bit."""
    before = _losses(model, tokens)
    nothing = torch.zeros(1, 1, 1, dtype=torch.bool, device=model.cfg.device)
    everything = ExpertMask(dict.fromkeys(model.cfg.moe_layers, nothing))
    removed = _losses(model, tokens, everything)
    after = _losses(model, tokens)
    moved = float((removed - before).abs().max())
    left = float((after - before).abs().max())
    passed = left == 0 and moved > 0
    return Check(
        "no stale state", passed, left, 0.0, f"largest change after a removal that moved the loss by up to {moved:.3g} nats"
    )


def _losses_differ(model: Transformer, tokens: Tensor) -> Check:
    """3. Different positions have different losses: a loss read at the wrong position would repeat."""
    losses = _losses(model, tokens)[0]
    share = len(losses[~losses.isnan()].unique()) / len(losses)
    return Check("losses differ", share > 0.5, share, 0.5, "share of positions whose loss no other position has")


def _inactive_expert_has_no_effect(model: Transformer, tokens: Tensor, generator: torch.Generator) -> Check:
    """4. Removing an expert where it is not active changes no loss, to the bit; where it is, none before that position.

    Before that position, up to rounding: later tokens may be routed otherwise, and products over groups of other sizes round
    otherwise.
    """
    layer, pos = _random_place(model, tokens, generator)
    effects = expert_effects(model, tokens, layers=[layer], positions=[pos])
    active = effects.expert_index[0, 0, pos].tolist()
    experts = model.cfg.experts_in(layer)
    inactive = next(e for e in range(experts + 1) if e not in active)
    clean = _losses(model, tokens)[0]
    if inactive == experts:
        of_inactive = 0.0  # every expert is active everywhere: there is no inactive one to remove
    else:
        of_inactive = float((_losses(model, tokens, ExpertMask.ablate([(layer, 0, pos, inactive)]))[0] - clean).abs().max())
    of_active = (_losses(model, tokens, ExpertMask.ablate([(layer, 0, pos, active[0])]))[0] - clean).abs()
    before = float(of_active[:pos].max()) if pos else 0.0
    passed = of_inactive == 0 and before <= LOSS_TOLERANCE[model.cfg.dtype] and float(of_active[pos:].max()) > 0
    others = "every expert active" if inactive == experts else f"expert {inactive} inactive"
    detail = f"layer {layer}, position {pos}: {others}; expert {active[0]} removed moves earlier losses by {before:.1g} nats"
    return Check("inactive expert", passed, of_inactive, 0.0, detail)


def _effects_equal_full_forwards(
    model: Transformer, tokens: Tensor, generator: torch.Generator, removal: RemovalName, scope: Scope, samples: int = 12
) -> Check:
    """5. The fast counterfactuals equal one full forward pass per removal; from the position on, at later tokens too."""
    layers = None
    if scope == "sequence":
        tokens = tokens[:, :SEQUENCE_TOKENS]
        layers = [_random_place(model, tokens, generator)[0]]
    readouts = [LossAfter(LATER_TOKENS)] if scope == "from_position" else []
    effects = expert_effects(model, tokens, layers, scope, removal, readouts=readouts)
    clean = _losses(model, tokens)[0]
    differences = []
    for _ in range(samples):
        layer, pos = _random_place(model, tokens, generator)
        layer = layer if layers is None else layers[0]
        slot = _random_below(model.cfg.experts_per_token, generator)
        entry = (effects.layers.index(layer), 0, pos, slot)
        full = _losses(model, tokens, _removed(model, effects, entry, removal, scope))[0] - clean
        differences.append(float((full[pos] - effects.delta_loss[entry]).abs()))
        if readouts:
            expected = full[pos : pos + LATER_TOKENS + 1]  # fewer at the end of the sequence
            later = effects.readouts[readouts[0].name][entry][: len(expected)]
            differences[-1] = _largest([differences[-1], float((expected - later).abs().max())])
    # In half precision single removals differ by the rounding of every activation; their median must still be small.
    half = model.cfg.dtype.itemsize < 4
    value = float(torch.tensor(differences, dtype=torch.float64, device="cpu").median()) if half else _largest(differences)
    threshold = LOSS_TOLERANCE[model.cfg.dtype]
    detail = f"{'median' if half else 'largest'} |fast - full forward| over {len(differences)} random removals, nats"
    return Check(EXACTNESS[scope], value <= threshold, value, threshold, detail)


def _removed(
    model: Transformer, effects: ExpertEffects, entry: tuple[int, int, int, int], removal: RemovalName, scope: Scope
) -> ExpertMask:
    """The removal of one entry of the effects, for a full forward: of its expert, at the tokens in the scope that go to it."""
    index, batch, pos, _ = entry
    layer, expert = effects.layers[index], int(effects.expert_index[entry])
    served = (effects.expert_index[index, batch] == expert).any(-1)
    if scope == "position":
        served[pos + 1 :] = False
    if scope != "sequence":
        served[:pos] = False
    keep = torch.ones(1, len(served), model.cfg.experts_in(layer), dtype=torch.bool, device=served.device)
    keep[0, served, expert] = False
    return ExpertMask({layer: keep}, removal)


def _largest(values: Sequence[float]) -> float:
    """The largest value; nan if one is nan, which Python's max would pass over."""
    return float(torch.tensor(values, dtype=torch.float64, device="cpu").max())


def _random_place(model: Transformer, tokens: Tensor, generator: torch.Generator) -> tuple[int, int]:
    """A layer with experts, and a position that has a next token."""
    layer = model.cfg.moe_layers[_random_below(len(model.cfg.moe_layers), generator)]
    return layer, _random_below(tokens.shape[1] - 1, generator)


def _random_below(stop: int, generator: torch.Generator) -> int:
    return int(torch.randint(stop, (1,), generator=generator, device="cpu"))
