"""Running a model along the routes of another run: what of a change is routing, and what is content."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_moe.checks import whole_numbers
from hooked_moe.counterfactuals.results import BATCH, LAYER, POS, SLOT, TensorResult
from hooked_moe.hooks.hook_point import HookPoint
from hooked_moe.tables import Axis, Column
from hooked_moe.transformer import ReturnType, Transformer

Tokens = Int[Tensor, "batch pos"] | str | list[str]
Mask = Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"]


@dataclass(frozen=True, repr=False)
class Routes(TensorResult):
    """Where every token of a run went, in every layer with experts. At padding is what the router chose there."""

    layers: list[int]
    expert_index: Int[Tensor, "layer batch pos slot"]
    weight: Float[Tensor, "layer batch pos slot"]
    """As applied."""
    real: Bool[Tensor, "batch pos"]
    """Which tokens are no padding."""

    AXES: ClassVar = {"layer": LAYER, "batch": BATCH, "pos": POS, "slot": SLOT}
    COLUMNS: ClassVar = {
        "expert_index": Column("layer batch pos slot", "index", "selected expert"),
        "weight": Column("layer batch pos slot", "1", "its routing weight as applied"),
        "real": Column("batch pos", "yes or no", "whether there is a token, and no padding"),
    }


@torch.no_grad()
def record_routes(model: Transformer, tokens: Tokens, attention_mask: Mask | None = None) -> Routes:
    """The routes of a run, to be replayed; hooks on the model act.

        routes = record_routes(model, tokens)
        routes.expert_index, routes.weight       # [layer batch pos slot]

    Raises `ValueError` for tokens that the model cannot run.
    """
    tokens, real = model.as_tokens(tokens, attention_mask)
    layers = model.cfg.moe_layers
    points = [f"blocks.{layer}.mlp.hook_expert_{what}" for layer in layers for what in ("indices", "weights")]
    _, cache = model.run_with_cache(tokens, attention_mask=real, names_filter=points, stop_at_layer=max(layers) + 1)
    with torch.inference_mode(False):  # to be replayed in any mode
        index, weight = (
            torch.stack([cache[f"blocks.{layer}.mlp.hook_expert_{what}"].clone() for layer in layers])
            for what in ("indices", "weights")
        )
    return Routes(layers, index, weight, torch.ones_like(tokens, dtype=torch.bool) if real is None else real)


def replay_routes(
    model: Transformer,
    tokens: Tokens,
    routes: Routes,
    *,
    attention_mask: Mask | None = None,
    layers: Sequence[int] | None = None,
    weights: bool = True,
    return_type: ReturnType = "logits",
) -> Any:
    """Run a model with the experts that another run chose: another model, precision, or text of the same length.

        routes = record_routes(base, tokens)
        logits = replay_routes(instruct, tokens, routes)              # instruct's content along base's routes

    The experts of `routes` are selected in `layers` (default: all of them), with their recorded weights, or with `weights=False`
    with those that this run's own router gives them. Own routes change no bit. Returns what a forward pass does: logits
    [batch, pos, d_vocab], a loss in nats, or both. Reinforcement learning replays routes likewise (R3, arXiv 2510.11370).

    Raises `ValueError` where the routes do not fit: other layers, experts, experts per token, or tokens of another shape.
    """
    tokens, real = model.as_tokens(tokens, attention_mask)
    chosen = _check_fit(model, tokens, real, routes, layers)
    hooks: list[tuple[str, Callable[..., Tensor]]] = []
    for layer in chosen:
        place = routes.layers.index(layer)
        hooks.append((f"blocks.{layer}.mlp.hook_expert_indices", _in_place_of(routes.expert_index[place])))
        if weights:
            hooks.append((f"blocks.{layer}.mlp.hook_expert_weights", _in_place_of(routes.weight[place])))
    return model.run_with_hooks(tokens, return_type, attention_mask=real, fwd_hooks=hooks)


def _in_place_of(recorded: Tensor) -> Callable[..., Tensor]:
    def replace(activation: Tensor, hook: HookPoint) -> Tensor:
        return recorded.to(activation)

    return replace


def _check_fit(
    model: Transformer, tokens: Tensor, real: Tensor | None, routes: Routes, layers: Sequence[int] | None
) -> list[int]:
    """The layers to replay."""
    chosen = routes.layers if layers is None else whole_numbers(layers, "layers")
    missing = [layer for layer in chosen if layer not in routes.layers or layer not in model.cfg.moe_layers]
    if missing or not chosen:
        raise ValueError(
            f"layers {missing} cannot be replayed: the routes are of layers {routes.layers}, and the model has experts in "
            f"{model.cfg.moe_layers}"
        )
    slots, shape = routes.expert_index.shape[-1], tuple(routes.expert_index.shape[1:3])
    if shape != tokens.shape:
        raise ValueError(f"the routes are of tokens {list(shape)}, these tokens are {list(tokens.shape)}: they must be as many")
    if slots != model.cfg.experts_per_token:
        raise ValueError(f"the routes have {slots} experts a token, and this model {model.cfg.experts_per_token}")
    if not torch.equal(routes.real.to(tokens.device), torch.ones_like(tokens, dtype=torch.bool) if real is None else real):
        raise ValueError("the routes have padding in other places than these tokens: pad both alike")
    for layer in chosen:
        highest, n = int(routes.expert_index[routes.layers.index(layer)].max()), model.cfg.experts_in(layer)
        if highest >= n:
            raise ValueError(f"the routes go to expert {highest} of layer {layer}, which has experts 0 to {n - 1} in this model")
    return chosen


class Condition(NamedTuple):
    """A model and what it reads."""

    model: Transformer
    tokens: Tokens
    attention_mask: Mask | None = None


@dataclass(frozen=True, repr=False)
class RoutingAgainstContent(TensorResult):
    """A metric in four runs: the content of either condition along the routes of either. Effects are second minus first."""

    value: Float[Tensor, "content routes row"]

    AXES: ClassVar = {
        "content": Axis("condition that the model and the tokens are of: 0 the first, 1 the second"),
        "routes": Axis("condition that the experts and their weights are of"),
        "row": Axis("batch row; one where the metric is a single number"),
    }
    COLUMNS: ClassVar = {"value": Column("content routes row", "metric", "the metric of the run")}

    @property
    def total(self) -> Float[Tensor, " row"]:
        """Both changed: the sum of `routing_effect` and `content_effect`."""
        return self.value[1, 1] - self.value[0, 0]

    @property
    def routing_effect(self) -> Float[Tensor, " row"]:
        """Changing the routes alone, averaged over both contents."""
        return (self.value[:, 1] - self.value[:, 0]).mean(0)

    @property
    def content_effect(self) -> Float[Tensor, " row"]:
        """Changing the content alone, averaged over both routes."""
        return (self.value[1] - self.value[0]).mean(0)

    @property
    def interaction(self) -> Float[Tensor, " row"]:
        """How much more changing the routes does under the second content than under the first."""
        return (self.value[1, 1] - self.value[1, 0]) - (self.value[0, 1] - self.value[0, 0])


@torch.no_grad()
def routing_against_content(
    first: Condition,
    second: Condition,
    metric: Callable[[Float[Tensor, "batch pos d_vocab"]], Tensor],
    *,
    layers: Sequence[int] | None = None,
    weights: bool = True,
) -> RoutingAgainstContent:
    """The 2x2 of routing and content: how much of a change of `metric` is that tokens go to other experts, and how much the rest.

        effects = routing_against_content(Condition(model, clean), Condition(model, corrupted), metric)
        effects.total, effects.routing_effect, effects.content_effect, effects.interaction      # [row] each

    Conditions may differ in the text (of the same length), the model (base and instruct), or its precision. `metric` takes logits
    [batch, pos, d_vocab] and gives one number, or one per batch row. `layers` and `weights` are those of `replay_routes`, and so
    are the errors. A factorial design of two levels each: routing_effect + content_effect = total, but for rounding.
    """
    values = []
    routes = [record_routes(*condition) for condition in (first, second)]
    for condition in (first, second):
        for recorded in routes:
            model, tokens, mask = condition
            logits = replay_routes(model, tokens, recorded, attention_mask=mask, layers=layers, weights=weights)
            values.append(torch.atleast_1d(torch.as_tensor(metric(logits), device="cpu")).float())
            if values[-1].dim() != 1:
                raise ValueError(f"the metric gave a tensor {list(values[-1].shape)}; expected one number, or one per batch row")
    return RoutingAgainstContent(torch.stack(values).unflatten(0, (2, 2)))
