"""A circuit: the few heads and experts of the clean run that, patched together, restore the metric.

found = circuit(model, clean_tokens, corrupted_tokens, At(-1, LogitDifference(answer, foil)), k=20)
found.nodes, found.share()              # in the order they were taken, and the share of the metric restored by then
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_moe.circuits.expert_patches import asked_positions
from hooked_moe.circuits.joint_patches import HeadOrExpert, all_nodes, joint_effects, scores_of_nodes
from hooked_moe.circuits.metrics import Metric, check_metric, metric_changes, name_of, require_one_place, require_slope
from hooked_moe.circuits.pairs import Clean, prompt_pair
from hooked_moe.circuits.paths import label
from hooked_moe.components.precision import without_autocast
from hooked_moe.counterfactuals.engine.requests import Mask, Positions, Tokens
from hooked_moe.counterfactuals.results import BATCH, TensorResult
from hooked_moe.progress import progress_bar
from hooked_moe.tables import Axis, Column
from hooked_moe.transformer import Transformer

Search = Literal["greedy", "atp", "dla"]
Kinds = Literal["heads", "experts", "heads+experts"]


@dataclass(frozen=True, repr=False)
class Circuit(TensorResult):
    """Heads and experts in the order they were taken, and what they restore together."""

    nodes: list[str]
    values: Float[Tensor, "node batch"]
    """The metric with this and all earlier nodes patched together, minus that of the corrupted run."""
    ceiling: Float[Tensor, "batch ceiling"]
    """The same with all heads, with all experts, and with all of both."""
    total: Float[Tensor, " batch"]
    """The metric of the clean run minus that of the corrupted one."""
    metric: str
    method: str

    AXES: ClassVar = {"node": Axis("head or expert, in the order they were taken", "name", "nodes"), "batch": BATCH}
    COLUMNS: ClassVar = {
        "values": Column(
            "node batch", "metric", "metric with this and all earlier nodes patched, minus that of the corrupted run"
        ),
        "total": Column("batch", "metric", "metric of the clean run minus that of the corrupted run"),
        "ceiling": Column("batch ceiling", "metric", "the same with all heads, all experts, all of both"),
    }

    def attributes(self) -> dict[str, Any]:
        return super().attributes() | {"metric": self.metric, "method": self.method}

    def share(self) -> Float[Tensor, " node"]:
        """The share of the metric's mean difference that is restored by then."""
        return self.values.mean(1) / self.total.mean()


@torch.no_grad()
@without_autocast()
def circuit(
    model: Transformer,
    clean: Clean,
    corrupt: Tokens,
    metric: Metric,
    nodes: Kinds = "heads+experts",
    method: Search = "greedy",
    k: int = 20,
    positions: Positions | None = None,
    attention_mask: Mask | None = None,
    *,
    candidates: int | None = None,
    progress: bool = False,
) -> Circuit:
    """Choose `k` heads and experts and patch them together: the first, the first two, and so on.

    A patched head or expert has its contribution of the clean run, at every token (or at `positions`), whatever reaches it; later
    nodes see what earlier ones make. "greedy" takes at every step the node that brings the metric nearest to the clean run's, by
    exact joint patches of all that are left (Conmy et al. 2023 go the other way, arXiv 2304.14997); with `candidates`, of the
    best ones of the first step. "atp" and "dla" rank nodes once, by first order or by direct effect, and measure the ranking's
    joint patches: k forwards. `metric` as in `attribution_patch_experts`; "greedy" takes any readout with `At`.

    Joint patches of all nodes restore the clean run at the positions whose token is the same in both.
    """
    if method not in get_args(Search):
        raise ValueError(f"method must be one of {', '.join(map(repr, get_args(Search)))}, not {method!r}")
    if nodes not in get_args(Kinds):
        raise ValueError(f"nodes must be one of {', '.join(map(repr, get_args(Kinds)))}, not {nodes!r}")
    if k < 1 or (candidates is not None and candidates < 1):
        raise ValueError(f"k and candidates must be whole numbers from 1, not {k!r} and {candidates!r}")
    require_one_place(metric)
    if method != "greedy":
        require_slope(metric)
    pair = prompt_pair(model, clean, corrupt, attention_mask)
    check_metric(metric, pair)
    asked = asked_positions(pair, positions)
    everything = all_nodes(pair, asked)
    pool = [node for node in everything if node[0] + "s" in nodes.split("+")]
    total = metric_changes(pair, metric, pair.resid_post("clean")[None])[0]

    def effects(sets: Sequence[Sequence[HeadOrExpert]]) -> Float[Tensor, "set batch"]:
        return joint_effects(pair, sets, metric, asked)

    if method == "greedy":
        with progress_bar(min(k, len(pool)), "choosing", "node", shown=progress) as bar:
            chosen = _greedy(effects, pool, k, total, candidates, bar)
    else:
        scores = scores_of_nodes(pair, pool, metric, asked, direct=method == "dla") * total.mean().sign()
        chosen = [pool[number] for number in scores.argsort(descending=True)[:k].tolist()]
    values = effects([chosen[: n + 1] for n in range(len(chosen))])
    ceilings = effects(
        [[node for node in everything if node[0] in kinds] for kinds in (("head",), ("expert",), ("head", "expert"))]
    )
    return Circuit(list(map(label, chosen)), values, ceilings.T.contiguous(), total, name_of(metric), method)


def _greedy(
    effects: Any, pool: list[HeadOrExpert], k: int, total: Tensor, candidates: int | None, bar: Any
) -> list[HeadOrExpert]:
    chosen: list[HeadOrExpert] = []
    left = list(pool)
    for _ in range(min(k, len(pool))):
        distance = (effects([[*chosen, node] for node in left]) - total).mean(1).abs()
        order = distance.argsort().tolist()
        if not chosen and candidates is not None:
            left = [left[number] for number in order[:candidates]]
            order = list(range(len(left)))
        chosen.append(left.pop(order[0]))
        bar.update()
        if not left:
            break
    return chosen
