"""Norms of each expert's weights, which need no text."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import torch

from hooked_moe.checks import whole_numbers
from hooked_moe.components.moe import MoE
from hooked_moe.counterfactuals.engine.steps import Steps, pausable
from hooked_moe.tables import EXPERT_WEIGHTS, table_with_schema
from hooked_moe.transformer import Transformer


@pausable
def expert_weights(model: Transformer, layers: Iterable[int]) -> Steps[pa.Table]:
    """Norms of every routed expert's router row and matrices, as in `tables.EXPERT_WEIGHTS`, in float64.

    An expert's three matrices (gate, up and down projection) count as one vector of weights.
    """
    layers = whole_numbers(layers, "layers", model.cfg.n_layers)
    layer_columns = []
    for layer in range(max(layers) + 1):
        if layer in layers:
            layer_columns.append(_of_layer(model.blocks[layer].mlp, layer))
        if layer < max(layers):
            yield
    joined = {name: np.concatenate([columns[name] for columns in layer_columns]) for name in EXPERT_WEIGHTS.names}
    return table_with_schema(EXPERT_WEIGHTS, joined)


def _of_layer(moe: torch.nn.Module, layer: int) -> dict[str, np.ndarray]:
    if not isinstance(moe, MoE):
        raise ValueError(f"layer {layer} is dense: it has no experts whose weights could be described")
    magnitudes, squares, count = [], [], 0
    for w_in, w_out in zip(moe.experts.W_in, moe.experts.W_out, strict=True):  # an expert at a time bounds the float64 copies
        weights = [w.double() for w in (w_in, w_out)]
        count = sum(w.numel() for w in weights)
        magnitudes.append(float(sum(w.abs().sum() for w in weights)))
        squares.append(float(sum(w.square().sum() for w in weights)))
    return {
        "layer": np.full(moe.num_experts, layer),
        "expert": np.arange(moe.num_experts),
        "router_row_norm": moe.router.W.double().norm(dim=1).cpu().numpy(),
        "weight_norm": np.sqrt(squares),
        "mean_abs_weight": np.asarray(magnitudes) / count,
        "rms_weight": np.sqrt(np.asarray(squares) / count),
    }
