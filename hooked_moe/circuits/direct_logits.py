"""Direct logit attribution with experts: what every component of the residual stream writes along the direction of an answer.

found = direct_logit_attribution(model, cache, " Mexico", " France")
found.top(5)                            # at the last position, [("L5E45", 1.2), ...]
found.experts()[layer, batch, pos, expert]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.circuits.pairs import Clean, PromptPair, single_run
from hooked_moe.components.moe import MoE
from hooked_moe.components.precision import at_least_float32, without_autocast
from hooked_moe.counterfactuals import LogitDifference
from hooked_moe.counterfactuals.engine.padding import pack
from hooked_moe.counterfactuals.engine.requests import Mask
from hooked_moe.counterfactuals.results import BATCH, POS, TensorResult
from hooked_moe.tables import Axis, Column
from hooked_moe.transformer import Transformer

AnyTokens = int | str | Tensor | list[int] | list[str] | tuple[int | str, ...]
KINDS = ("embed", "head", "expert", "shared", "mlp", "bias")


@dataclass(frozen=True, repr=False)
class LogitAttribution(TensorResult):
    """What each component adds to a logit difference, the final norm's scale held at that of the run.

    The values of a token add up to its logit difference.
    """

    components: list[str]
    """"embed", "L3H1" (a head), "L3E17" (an expert), "L3shared", "L3mlp" (a dense layer), "L3bias" (of the attention output)."""
    values: Float[Tensor, "component batch pos"]
    kind: Int[Tensor, " component"]
    """Place in `KINDS`."""
    layer: Int[Tensor, " component"]
    """-1 for the embedding."""
    index: Int[Tensor, " component"]
    """Which head or expert; -1 for the others."""

    AXES: ClassVar = {"component": Axis("component of the residual stream", "name", "components"), "batch": BATCH, "pos": POS}
    COLUMNS: ClassVar = {
        "values": Column("component batch pos", "logits", "what the component adds to the logit difference; NaN for padding"),
        "kind": Column("component", "index", f"kind of component: {', '.join(f'{i} {kind}' for i, kind in enumerate(KINDS))}"),
        "layer": Column("component", "index", "transformer block; -1 for the embedding"),
        "index": Column("component", "index", "head or expert; -1 for others"),
    }

    def experts(self) -> Float[Tensor, "layer batch pos expert"]:
        """Those of experts, by layers that have experts; 0 where a token is not routed to one."""
        return self._by_layer("expert")

    def heads(self) -> Float[Tensor, "layer batch pos head"]:
        """Those of heads."""
        return self._by_layer("head")

    def _by_layer(self, kind: str) -> Tensor:
        own = self.kind == KINDS.index(kind)
        layers, numbers = self.layer[own].unique(return_inverse=True)
        width = int(self.index[own].max()) + 1
        table = self.values.new_zeros(len(layers), width, *self.values.shape[1:])
        table[numbers, self.index[own]] = self.values[own]
        return table.movedim(1, -1)

    def top(self, k: int = 5, pos: int = -1) -> list[tuple[str, float]]:
        """The components with the largest means over batch rows at a position, of either sign."""
        means = self.values[:, :, pos].nanmean(-1)
        chosen = means.abs().nan_to_num().topk(min(k, len(means))).indices.tolist()
        return [(self.components[number], float(means[number])) for number in chosen]

    def plot(self, value: str | None = None, across: str | None = None, **options: Any) -> Any:
        """A heat map of layer by expert: means over batch rows and positions; or of another kind, with `across="head"`."""
        from hooked_moe.figures import heat_map  # matplotlib takes a while to load

        if value not in (None, "values") or across not in (None, "expert", "head"):
            return super().plot(value, across, **options)
        kind = across or "expert"
        means = self._by_layer(kind).nanmean((1, 2)).cpu().numpy()
        layers = self.layer[self.kind == KINDS.index(kind)].unique().tolist()
        words = {"column_label": kind, "value_label": "mean direct effect (logits)"}
        return heat_map(means, **({"rows": layers, "columns": range(means.shape[1])} | words | options))


@torch.no_grad()
@without_autocast()
def direct_logit_attribution(
    model: Transformer,
    cache: Clean,
    tokens: AnyTokens,
    other: AnyTokens | None = None,
    attention_mask: Mask | None = None,
) -> LogitAttribution:
    """What every head, expert, shared expert and dense layer writes along W_U[tokens] - W_U[other], at every position.

    `cache` is a run's cache, or the tokens or text to run (`attention_mask` is of those). `tokens` and `other` are ids or
    one-token texts, or a row of them, one for each batch row; without `other` the attribution is of the logit itself. An expert
    that a token is not routed to has 0. The final norm's scale is that of the run, so that all values add up to the logit
    difference (Elhage et al. 2021). The expert-axis form of TransformerLens's `direct_logit_attribution`.
    """
    run = single_run(model, cache, attention_mask)
    direction = _direction(run, tokens, other)
    final = at_least_float32(run.resid_post("clean"))
    scale = (final.square().mean(-1, keepdim=True) + model.ln_final.eps).sqrt()
    along = direction[:, None] * at_least_float32(model.ln_final.w) / scale
    parts = list(_components(run, along))
    labels, values = [label for label, _ in parts], torch.stack([value for _, value in parts])
    kinds, layers, indices = (
        torch.tensor(x, dtype=torch.int64, device="cpu")
        for x in zip(*[(KINDS.index(kind), layer, i) for kind, layer, i in labels], strict=True)
    )
    names = [_name(*label) for label in labels]
    return LogitAttribution(names, values.masked_fill(~run.real(), float("nan")), kinds, layers, indices)


def _direction(run: PromptPair, tokens: AnyTokens, other: AnyTokens | None) -> Float[Tensor, "#batch d_model"]:
    packed = pack(run.tokens, run.attention_mask)
    readout = LogitDifference(tokens, tokens if other is None else other)
    readout.check(run.model, packed)
    return readout.direction(run.model, packed.rows) if other is not None else readout.directions(run.model, packed.rows)[0]


def _components(run: PromptPair, along: Float[Tensor, "batch pos d_model"]) -> Iterator[tuple[tuple[str, int, int], Tensor]]:
    """(kind, layer, index) and values of every component, in the order of the residual stream."""

    def written(x: Tensor) -> Float[Tensor, "batch pos"]:
        return (at_least_float32(x) * along).sum(-1)

    yield ("embed", -1, -1), written(run.activations("clean")["hook_embed"])
    for layer, block in enumerate(run.model.blocks):
        by_value = torch.einsum("bpd,dhv->bphv", along, at_least_float32(block.attn.W_O))
        heads = (at_least_float32(run.z("clean", layer)) * by_value).sum(-1)
        for head, values in enumerate(heads.unbind(-1)):
            yield ("head", layer, head), values
        if block.attn.b_O is not None:
            yield ("bias", layer, -1), written(block.attn.b_O)
        if not isinstance(block.mlp, MoE):
            yield ("mlp", layer, -1), written(block.mlp(run.mlp_input("clean", layer)))
            continue
        own = run.experts("clean", layer)
        slots = (at_least_float32(own.outputs) * along.unsqueeze(2)).sum(-1) * at_least_float32(own.weights)
        experts = slots.new_zeros(*slots.shape[:2], block.mlp.num_experts).scatter_add(-1, own.indices, slots)
        for expert, values in enumerate(experts.unbind(-1)):
            yield ("expert", layer, expert), values
        shared = block.mlp.run_shared(run.mlp_input("clean", layer))
        if shared is not None:
            yield ("shared", layer, -1), written(shared)


def _name(kind: str, layer: int, index: int) -> str:
    letter = {"head": "H", "expert": "E"}.get(kind)
    return kind if layer < 0 else f"L{layer}{kind}" if letter is None else f"L{layer}{letter}{index}"
