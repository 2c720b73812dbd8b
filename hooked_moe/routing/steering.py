"""Sending tokens to experts, or keeping them away, while a model runs or generates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeAlias, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_moe.checks import as_int_or_none, by_number, whole_numbers
from hooked_moe.components.key_value_cache import KeyValueCache
from hooked_moe.hooks.hook_point import HookPoint
from hooked_moe.kernels.routing import RoutingRule
from hooked_moe.routing.rule import rule_of
from hooked_moe.transformer import Transformer

STEP: Final = 0.01
"""How far above the highest logit of a token, or below its lowest, forced experts are put."""

Experts: TypeAlias = Mapping[int, Sequence[int]]
Positions: TypeAlias = slice | Sequence[int] | Bool[Tensor, "batch pos"] | None
Model = TypeVar("Model", bound=Transformer)


@contextmanager
def steer_routes(
    model: Model,
    prefer: Experts | None = None,
    avoid: Experts | None = None,
    strength: float = math.inf,
    positions: Positions = None,
) -> Iterator[Model]:
    """A `with` block in which the router prefers some experts and avoids others, given as {layer: experts}.

        with steer_routes(model, prefer={3: [7]}, avoid={4: [1, 2]}):
            model.generate("In the beginning")
        with steer_routes(model, prefer={3: [7]}, strength=2.0, positions=slice(5, None)):       # from position 5 on
            logits = model(tokens)                                                               # [batch, pos, d_vocab]

    A finite `strength` is added to the preferred experts' router logits and subtracted from those of the avoided ones; 0 changes
    no bit. Infinite strength, as in SteerMoE (arXiv 2509.09660), puts preferred experts just above the token's highest logit and
    avoided ones just below its lowest: all preferred ones are selected, no avoided one is, every token keeps k experts, and the
    weights of the others stay close to what they were. Probabilities and weights follow from the edited logits.

    `positions` are columns of the tokens, padding counted, in a generated text too: a slice, a list, or a bool mask [batch, pos]
    of the tokens of each forward pass; None means all.

    Raises `ValueError` for layers and experts that do not exist, for an expert that is both preferred and avoided, and where
    infinite strength cannot be had: more preferred experts than slots, too few others to fill these (in the groups that a token
    is limited to, in families that have groups), or a learned selection bias.
    """
    if math.isnan(strength) or strength < 0:
        raise ValueError(f"strength must be 0 or more, not {strength}: prefer and avoid say the direction")
    preferred, avoided = _by_layer(prefer), _by_layer(avoid)
    edits = {layer: _checked(model, layer, preferred, avoided, strength) for layer in sorted({*preferred, *avoided})}
    if not edits:
        raise ValueError("nothing to steer: give prefer={layer: experts} or avoid={layer: experts}")
    at = _Columns(positions)

    def edit_of(preferred: Tensor, avoided: Tensor) -> Callable[..., Tensor]:
        def edit(logits: Float[Tensor, "batch pos expert"], hook: HookPoint) -> Float[Tensor, "batch pos expert"]:
            steered = steer(logits, preferred, avoided, strength)
            chosen = at.chosen(logits)
            return steered if chosen is None else torch.where(chosen.unsqueeze(-1), steered, logits)

        return edit

    hooks = [(f"blocks.{layer}.mlp.hook_router_logits", edit_of(*tensors)) for layer, tensors in edits.items()]
    watch = model.register_forward_pre_hook(at.see, with_kwargs=True)
    try:
        with model.hooks(hooks):
            yield model
    finally:
        watch.remove()


def steer(
    logits: Float[Tensor, "*token expert"], preferred: Bool[Tensor, " expert"], avoided: Bool[Tensor, " expert"], strength: float
) -> Float[Tensor, "*token expert"]:
    """Router logits with some experts' raised and some lowered."""
    if math.isfinite(strength):
        return logits + strength * (preferred.to(logits) - avoided.to(logits))
    steered = torch.where(preferred, logits.amax(-1, keepdim=True) + STEP, logits)
    return torch.where(avoided, logits.amin(-1, keepdim=True) - STEP, steered)


class _Columns:
    """Which columns of the tokens to steer, known while a forward pass runs: it may see the last few only, over a cache."""

    def __init__(self, positions: Positions) -> None:
        self.before = 0
        self.positions = positions
        numbers: list[Any] = []
        if isinstance(positions, slice):
            numbers = [bound for bound in (positions.start, positions.stop, positions.step) if bound is not None]
        elif positions is not None and not isinstance(positions, Tensor):
            self.positions = numbers = whole_numbers(positions, "positions")
        if any(as_int_or_none(number) is None or number < 0 for number in numbers):
            raise ValueError(f"positions must be whole numbers from 0 (a text that grows has no last one), not {positions}")
        if isinstance(positions, Tensor) and (positions.dtype != torch.bool or positions.dim() != 2):
            raise ValueError(
                f"positions as a tensor must be a bool mask [batch, pos], not {positions.dtype} {list(positions.shape)}"
            )

    def see(self, module: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Before a forward pass: how many tokens came earlier."""
        cache = options.get("past_kv_cache")
        self.before = cache.length if isinstance(cache, KeyValueCache) else 0

    def chosen(self, logits: Float[Tensor, "batch pos expert"]) -> Bool[Tensor, "#batch pos"] | None:
        batch, length = logits.shape[:2]
        if self.positions is None:
            return None
        if isinstance(self.positions, Tensor):
            mask = self.positions[:, self.before : self.before + length]
            if mask.shape != (batch, length):
                raise ValueError(
                    f"positions has shape {list(self.positions.shape)}; this forward pass is of {batch} rows and of columns "
                    f"{self.before} to {self.before + length - 1}: use a slice where a text grows"
                )
            return mask.to(logits.device)
        columns = torch.zeros(self.before + length, dtype=torch.bool, device=logits.device)
        if isinstance(self.positions, slice):
            columns[self.positions] = True
        else:
            columns[[position for position in self.positions if position < len(columns)]] = True
        return columns[None, self.before :]


def _by_layer(experts: Experts | None) -> dict[int, list[int]]:
    of_layer = by_number({} if experts is None else experts, "layer")
    return {layer: whole_numbers(own, f"the experts of layer {layer}") for layer, own in of_layer.items()}


def _checked(
    model: Transformer, layer: int, prefer: dict[int, list[int]], avoid: dict[int, list[int]], strength: float
) -> tuple[Bool[Tensor, " expert"], Bool[Tensor, " expert"]]:
    """Which experts of a layer are preferred, and which avoided."""
    if layer not in model.cfg.moe_layers:
        raise ValueError(f"layer {layer} has no experts; layers {model.cfg.moe_layers} have")
    n = model.cfg.experts_in(layer)
    masks = []
    for experts in (prefer.get(layer, []), avoid.get(layer, [])):
        wrong = [expert for expert in experts if not 0 <= expert < n]
        if wrong:
            raise ValueError(f"expert {wrong[0]} is out of range: layer {layer} has experts 0 to {n - 1}")
        masks.append(torch.zeros(n, dtype=torch.bool, device=model.cfg.device))
        masks[-1][experts] = True
    preferred, avoided = masks
    both = (preferred & avoided).nonzero().flatten().tolist()
    if both:
        raise ValueError(f"expert {both[0]} of layer {layer} is both preferred and avoided")
    if math.isinf(strength):
        if model.cfg.selection_bias or model.cfg.group_score != "max":
            raise ValueError("this model selects experts by more than their own scores: give a finite strength")
        _check_possible(layer, preferred.cpu(), avoided.cpu(), rule_of(model))
    return preferred, avoided


def _check_possible(layer: int, preferred: Tensor, avoided: Tensor, rule: RoutingRule) -> None:
    """Raise `ValueError` unless every token can have all preferred experts and no avoided one."""
    wanted, groups = int(preferred.sum()), int(preferred.unflatten(0, (rule.groups, -1)).any(-1).sum())
    if wanted > rule.slots:
        raise ValueError(f"{wanted} experts of layer {layer} are preferred, and a token has {rule.slots}: give a finite strength")
    if groups > rule.groups_kept:
        raise ValueError(
            f"the preferred experts of layer {layer} are in {groups} groups, and a token goes to experts of {rule.groups_kept}: "
            "give a finite strength"
        )
    left = (~avoided).unflatten(0, (rule.groups, -1)).sum(-1).sort().values
    fewest = int(left[left > 0][: rule.groups_kept].sum())
    if fewest < rule.slots:
        where = f"layer {layer}" if rule.groups == 1 else f"{rule.groups_kept} groups of layer {layer}"
        few = f"only {fewest} experts of {where} are not avoided, and a token has {rule.slots}"
        raise ValueError(f"{few}: give a finite strength")
