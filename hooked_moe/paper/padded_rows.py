"""What the experts of a model do at every row of padded batches, padding included: the released code's view of a corpus.

The project itself keeps padding out of everything (`counterfactuals.engine.padding`). The released code of arXiv 2606.10703 pads
all texts to the longest and takes its statistics over all rows, so what padding does has to be imitated:

    right padding   padding tokens stand after the text and see all of it, but not one another
    left padding    padding tokens stand before the text, where every key is masked. Attention that adds one finite number to
                    masked scores (as DeepSeek's released model does) then spreads evenly over the whole row, future included

Real tokens never see padding. Positions are counted from the start of the row; rotations depend on differences only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_moe.components.precision import at_least_float32, without_autocast
from hooked_moe.hooks.hook_point import HookPoint
from hooked_moe.progress import progress_bar
from hooked_moe.transformer import Transformer

COORDINATES = 32
"""How many coordinates of an expert's output, the first ones, the released code pools for Qwen's activation std."""
ROWS_PER_BATCH = 4


@dataclass(frozen=True)
class PaddedTexts:
    """Texts in rows of one length."""

    tokens: Int[Tensor, "text pos"]
    real: Bool[Tensor, "text pos"]
    padding: Literal["right", "left"]

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], pad_id: int, padding: Literal["right", "left"]) -> PaddedTexts:
        width = max(map(len, texts))
        tokens = torch.full((len(texts), width), pad_id, dtype=torch.long, device="cpu")
        real = torch.zeros(len(texts), width, dtype=torch.bool, device="cpu")
        for row, ids in enumerate(texts):
            span = slice(0, len(ids)) if padding == "right" else slice(width - len(ids), width)
            tokens[row, span] = torch.tensor(ids, dtype=torch.long, device="cpu")
            real[row, span] = True
        return cls(tokens, real, padding)

    def rows(self, part: slice) -> PaddedTexts:
        return PaddedTexts(self.tokens[part], self.real[part], self.padding)

    def hide_padding(self, scores: Float[Tensor, "batch head query key"], hook: HookPoint) -> Tensor:
        """A hook for `hook_attn_scores`: what attention makes of padding."""
        real = self.real.to(scores.device)
        hidden = scores.masked_fill(~real[:, None, None, :], float("-inf"))
        if self.padding == "right":
            return hidden
        return hidden.masked_fill(~real[:, None, :, None], 0.0)


@dataclass(frozen=True)
class LayerRows:
    """One block with experts, at every row. Slots are in order of routing weight, as everywhere."""

    real: Bool[np.ndarray, "text pos"]
    router_logits: Float[np.ndarray, "text pos expert"]
    expert: Int[np.ndarray, "text pos slot"]
    routing_weight: Float[np.ndarray, "text pos slot"]
    output_norm: Float[np.ndarray, "text pos slot"]
    gap_norm: Float[np.ndarray, "text pos slot"]
    """g ||E||."""
    rest_norm: Float[np.ndarray, "text pos slot"]
    """Norm of the block's output without the expert, shared experts included."""
    rest_cosine: Float[np.ndarray, "text pos slot"]
    """Cosine of the contribution and that rest."""
    coordinate_sum: Float[np.ndarray, "text pos slot"]
    """Sum of the first `COORDINATES` coordinates of the output."""
    coordinate_square: Float[np.ndarray, "text pos slot"]
    """Sum of their squares."""


class _LayerObserver:
    """Hooks of one layer that turn what the block computes into rows, one batch after another."""

    def __init__(self, model: Transformer, layer: int) -> None:
        self._seen: dict[str, Tensor] = {}
        self._batches: list[dict[str, np.ndarray]] = []
        mlp = f"blocks.{layer}.mlp"
        self.hooks = [
            *((f"{mlp}.hook_{name}", self._keep) for name in ("router_logits", "expert_indices", "expert_weights", "expert_out")),
            (f"blocks.{layer}.hook_mlp_out", self._finish),
        ]

    def _keep(self, activation: Tensor, hook: HookPoint) -> None:
        assert hook.name is not None
        self._seen[hook.name.rpartition(".hook_")[2]] = at_least_float32(activation)

    def _finish(self, block_out: Tensor, hook: HookPoint) -> None:
        weights, outputs = self._seen["expert_weights"], self._seen["expert_out"]
        contributions = weights.unsqueeze(-1) * outputs
        rest = at_least_float32(block_out).unsqueeze(-2) - contributions
        first = outputs[..., :COORDINATES]
        rows = {
            "router_logits": self._seen["router_logits"],
            "expert": self._seen["expert_indices"].long(),
            "routing_weight": weights,
            "output_norm": outputs.norm(dim=-1),
            "gap_norm": contributions.norm(dim=-1),
            "rest_norm": rest.norm(dim=-1),
            "rest_cosine": torch.cosine_similarity(contributions, rest, dim=-1),
            "coordinate_sum": first.sum(-1),
            "coordinate_square": first.square().sum(-1),
        }
        self._batches.append({name: values.cpu().numpy() for name, values in rows.items()})
        self._seen.clear()

    def table(self, real: Bool[np.ndarray, "text pos"]) -> LayerRows:
        columns = {name: np.concatenate([batch[name] for batch in self._batches]) for name in self._batches[0]}
        return LayerRows(real=real, **columns)


@torch.no_grad()
@without_autocast()
def observe_rows(model: Transformer, texts: PaddedTexts, layers: Sequence[int], progress: bool = True) -> dict[int, LayerRows]:
    """Run all rows and keep what the experts of `layers` did: about 4 (experts + 8 slots) bytes a row and layer.

    Raises `ValueError` for rows longer than the model's context.
    """
    width = texts.tokens.shape[1]
    if width > model.cfg.n_ctx:
        raise ValueError(f"texts of {width} tokens do not fit the context of {model.cfg.model_name}, {model.cfg.n_ctx} tokens")
    observers = {layer: _LayerObserver(model, layer) for layer in layers}
    hooks = [hook for observer in observers.values() for hook in observer.hooks]
    starts = range(0, len(texts.tokens), ROWS_PER_BATCH)
    with progress_bar(len(texts.tokens), "criteria, padding included", "text", shown=progress) as bar:
        for start in starts:
            part = texts.rows(slice(start, start + ROWS_PER_BATCH))
            attention = (lambda name: name.endswith("attn.hook_attn_scores"), part.hide_padding)
            model.run_with_hooks(part.tokens, stop_at_layer=max(layers) + 1, fwd_hooks=[attention, *hooks])
            bar.update(len(part.tokens))
    return {layer: observer.table(texts.real.numpy()) for layer, observer in observers.items()}
