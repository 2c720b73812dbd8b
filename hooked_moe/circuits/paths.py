"""Path patching: what one component of the clean run does to a metric through one later component's input alone.

    path_patch(model, corrupted, clean_cache, ("expert", 2, 17), [("router", 4), ("head", 5, 1), "logits"], metric).values

The sender's output changes from the corrupted run's to the clean run's in the receiver's input only; everything else that reads
it stays as it is in the corrupted run, and what the receiver then does reaches the metric by all ways (Goldowsky-Dill et al.
2023, arXiv 2304.05969).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_moe.checks import as_int_or_none
from hooked_moe.circuits.expert_patches import aligned, asked_positions
from hooked_moe.circuits.metrics import Metric, check_metric, metric_changes, name_of, require_one_place
from hooked_moe.circuits.pairs import Clean, PromptPair, expert_deltas, prompt_pair
from hooked_moe.circuits.receivers import RECEIVERS, received
from hooked_moe.components.precision import without_autocast
from hooked_moe.counterfactuals.engine.requests import Mask, Positions, Tokens, checked_layers
from hooked_moe.counterfactuals.results import BATCH, LAYER, POS, TensorResult
from hooked_moe.progress import progress_bar
from hooked_moe.tables import Axis, Column
from hooked_moe.transformer import Transformer

Node = tuple[str, int] | tuple[str, int, int] | str
"""("expert", layer, expert), ("head", layer, head), and as receivers also ("router", layer), ("head_q", layer, head), "head_k",
"head_v" and "logits"."""


@dataclass(frozen=True, repr=False)
class PathPatches(TensorResult):
    """What each sender does to the metric through each receiver's input."""

    senders: list[str]
    receivers: list[str]
    values: Float[Tensor, "sender receiver batch"]
    """The metric with the path patched minus that of the corrupted run."""
    total: Float[Tensor, " batch"]
    """The metric of the clean run minus that of the corrupted one."""
    metric: str

    AXES: ClassVar = {
        "sender": Axis("component whose output is that of the clean run", "name", "senders"),
        "receiver": Axis("component that alone sees it", "name", "receivers"),
        "batch": BATCH,
    }
    COLUMNS: ClassVar = {
        "values": Column("sender receiver batch", "metric", "metric with the path patched minus that of the corrupted run"),
        "total": Column("batch", "metric", "metric of the clean run minus that of the corrupted run"),
    }

    def attributes(self) -> dict[str, Any]:
        return super().attributes() | {"metric": self.metric}


@torch.no_grad()
@without_autocast()
def path_patch(
    model: Transformer,
    corrupted_tokens: Tokens,
    clean_cache: Clean,
    sender: Node | Sequence[Node],
    receiver: Node | Sequence[Node],
    metric: Metric,
    positions: Positions | None = None,
    attention_mask: Mask | None = None,
    *,
    progress: bool = False,
) -> PathPatches:
    """Patch the path from each sender to each receiver, one at a time, and measure the metric.

    Senders are ("expert", layer, expert) and ("head", layer, head). Receivers are ("router", layer): the token is routed by the
    changed stream, and its experts read the old one; ("expert", layer, expert): what it reads; ("head", layer, head): its
    queries, keys and values, or one of them with "head_q", "head_k", "head_v"; and "logits": the direct path, through the final
    norm as it then is. `positions` says where the sender's output is changed (default: everywhere). `metric` as in
    `get_act_patch_expert`, a readout with `At`. Raises `ValueError` for nodes that are not there, and receivers that are not
    after their senders.
    """
    senders = [_checked(model, node, ("expert", "head")) for node in _listed(sender)]
    receivers = [_checked(model, node, RECEIVERS) for node in _listed(receiver)]
    for early in senders:
        for late in receivers:
            _check_order(early, late)
    require_one_place(metric)
    pair = prompt_pair(model, clean_cache, corrupted_tokens, attention_mask)
    check_metric(metric, pair)
    asked = asked_positions(pair, positions)
    with progress_bar(len(senders) * len(receivers), "paths", "path", shown=progress) as bar:
        values = [_effects(pair, sent(pair, node) * asked[..., None], receivers, metric, bar) for node in senders]
    total = metric_changes(pair, metric, pair.resid_post("clean")[None])[0]
    return PathPatches(list(map(label, senders)), list(map(label, receivers)), torch.stack(values), total, name_of(metric))


def _effects(
    pair: PromptPair, delta: Float[Tensor, "batch pos d_model"], receivers: list[Any], metric: Any, bar: Any
) -> Float[Tensor, "receiver batch"]:
    finals = []
    for node in receivers:
        finals.append(received(pair, node, delta))
        bar.update()
    return metric_changes(pair, metric, torch.stack(finals))


def sent(pair: PromptPair, node: Any) -> Float[Tensor, "batch pos d_model"]:
    """What a sender's clean output adds to the corrupted run's residual stream; 0 for an expert that neither run goes to."""
    kind, layer, number = node
    if kind == "head":
        change = pair.z("clean", layer)[..., number, :] - pair.z("corrupt", layer)[..., number, :]
        return change @ pair.model.blocks[layer].attn.W_O[:, number].T
    deltas = expert_deltas(pair, layer)
    return (deltas.delta * (deltas.experts == number)[..., None]).sum(2)


@dataclass(frozen=True, repr=False)
class RouterFlips(TensorResult):
    """Which later routing every expert of the clean run would change by its direct path alone."""

    layers: list[int]
    flipped: Int[Tensor, "layer batch pos slot receiver"]
    """How many of the token's experts change in the receiving layer; -1 in layers that are not later."""
    expert_index: Int[Tensor, "layer batch pos slot"]

    AXES: ClassVar = {"layer": LAYER, "batch": BATCH, "pos": POS, "slot": Axis("place among both runs' experts"),
                      "receiver": Axis("layer whose router reads the change", labels="layers")}  # fmt: skip
    PRESENT: ClassVar = "expert_index"
    COLUMNS: ClassVar = {
        "expert_index": Column("layer batch pos slot", "index", "expert; -1 where there is none"),
        "flipped": Column("layer batch pos slot receiver", "experts", "experts that change there; -1 in layers not later"),
    }


@torch.no_grad()
@without_autocast()
def router_flips(
    model: Transformer,
    corrupted_tokens: Tokens,
    clean_cache: Clean,
    layers: Sequence[int] | None = None,
    attention_mask: Mask | None = None,
    progress: bool = False,
) -> RouterFlips:
    """All (expert -> router) edges exactly: each expert's clean contribution in the input of each later router at its token.

    The cost is a product with the router for every pair of layers. `progress` shows a bar that counts them.
    """
    chosen = checked_layers(model, layers)
    pair = prompt_pair(model, clean_cache, corrupted_tokens, attention_mask)
    by_layer = aligned({layer: expert_deltas(pair, layer) for layer in chosen})
    tables = []
    with progress_bar(len(chosen) * (len(chosen) - 1) // 2, "routers", "pair", shown=progress) as bar:
        for layer, deltas in by_layer.items():
            flipped = deltas.experts.new_full((*deltas.experts.shape, len(chosen)), -1)
            for axis, later in enumerate(chosen):
                if later > layer:
                    flipped[..., axis] = _flipped(pair, later, deltas.delta)
                    bar.update()
            tables.append(flipped)
    experts = torch.stack([deltas.experts for deltas in by_layer.values()])
    return RouterFlips(chosen, torch.stack(tables), experts)


def _flipped(pair: PromptPair, layer: int, delta: Float[Tensor, "batch pos slot d_model"]) -> Int[Tensor, "batch pos slot"]:
    changed = pair.resid_mid("corrupt", layer).unsqueeze(2) + delta
    block, old = pair.model.blocks[layer], pair.experts("corrupt", layer).indices
    new = pair.moe(layer).route(block.ln2(changed.flatten(1, 2))).indices.unflatten(1, changed.shape[1:3])
    kept: Bool[Tensor, "batch pos slot k"] = (new[..., None] == old[:, :, None, None, :]).any(-1)
    return (~kept).sum(-1)


def _listed(nodes: Any) -> list[Any]:
    return [nodes] if _is_node(nodes) else list(nodes)


def _is_node(node: Any) -> bool:
    if not isinstance(node, tuple):
        return isinstance(node, str)
    return len(node) in (2, 3) and isinstance(node[0], str) and all(as_int_or_none(number) is not None for number in node[1:])


def label(node: Any) -> str:
    """A node's name in tables: "expert 2.17"."""
    return node if isinstance(node, str) else f"{node[0]} {'.'.join(map(str, node[1:]))}"


def _checked(model: Transformer, node: Any, kinds: Sequence[str]) -> Any:
    """The node with plain numbers. Raises `ValueError` for one that the model does not have."""
    kind: str = "" if not _is_node(node) else node if isinstance(node, str) else node[0]
    if kind not in kinds:
        raise ValueError(f"{node!r} is not one of {', '.join(map(_example, kinds))}")
    if isinstance(node, str) != (kind == "logits") or (not isinstance(node, str) and len(node) != (2 if kind == "router" else 3)):
        raise ValueError(f"{node!r} must have the form {_example(kind)}")
    if kind == "logits":
        return "logits"
    layer, *rest = (int(number) for number in node[1:])
    (layer,) = checked_layers(model, [layer], dense=kind.startswith("head"))
    if not rest:
        return kind, layer
    count = model.cfg.n_heads if kind.startswith("head") else model.cfg.experts_in(layer)
    if not 0 <= rest[0] < count:
        raise ValueError(f"{node!r} is not there: layer {layer} has {kind.split('_')[0]}s 0 to {count - 1}")
    return kind, layer, rest[0]


def _example(kind: str) -> str:
    if kind == "logits":
        return "'logits'"
    return f"('{kind}', layer)" if kind == "router" else f"('{kind}', layer, number)"


def _check_order(sender: Any, receiver: Any) -> None:
    """Raise `ValueError` unless the receiver reads what the sender writes: heads of a block come before its experts."""

    def place(node: Any) -> int:
        return 1 << 30 if isinstance(node, str) else 2 * node[1] + (not str(node[0]).startswith("head"))

    if place(receiver) <= place(sender):
        raise ValueError(f"{receiver!r} does not read what {sender!r} writes: it is not after it")
