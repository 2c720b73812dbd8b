"""What a patch is judged by: a readout of the engine, or any function of the logits.

At(-1, LogitDifference(" Mexico", " France"))                  # at the end of each prompt; the engine's own, and fast
lambda logits: logits[:, -1, 5] - logits[:, -1, 7]             # one number for each row; a forward from the patched layer on
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeGuard, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_moe.circuits.pairs import PromptPair
from hooked_moe.counterfactuals import At, LogitDifference, token_effects
from hooked_moe.counterfactuals.engine.clean_run import gather_positions
from hooked_moe.counterfactuals.engine.padding import Packed, pack
from hooked_moe.counterfactuals.engine.readout import Final, Readout, by_name
from hooked_moe.counterfactuals.engine.windows import Windows
from hooked_moe.progress import progress_bar

Metric = Callable[[Float[Tensor, "batch pos d_vocab"]], Float[Tensor, "*batch"]] | Readout
Deltas = dict[int, Float[Tensor, "batch pos variant d_model"]]
"""By layer: what each variant adds to the residual stream after the block, at one token at a time."""

LOGIT_BYTES = 1 << 28
"""Bytes of logits in memory together, where a metric asks for all of them."""


def is_readout(metric: Any) -> TypeGuard[Readout]:
    return not isinstance(metric, type) and isinstance(metric, Readout)


def check_metric(metric: Any, pair: PromptPair) -> None:
    """Raise `ValueError` for what is no metric, or does not fit these prompts."""
    if is_readout(metric):
        by_name([metric], pair.model, pack(pair.tokens, pair.attention_mask))
    elif isinstance(metric, type) or not callable(metric):
        raise ValueError(
            f"metric must be a function of the logits, or a readout such as At(-1, LogitDifference(5, 7)), not {metric!r}"
        )


def name_of(metric: Any) -> str:
    return metric.name if is_readout(metric) else getattr(metric, "__name__", type(metric).__name__)


def metric_of_rows(metric: Any, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, " batch"]:
    """The metric of every row. Raises `ValueError` for one number for several rows: nobody could tell whose it is."""
    value, rows = metric(logits), len(logits)
    if not isinstance(value, Tensor) or not (value.shape == (rows,) or (rows == 1 and value.numel() == 1)):
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"the metric returned {got} for {rows} rows; it must return one number for each, [{rows}]. "
            "Average over rows afterwards, as in result.values.mean(1)"
        )
    return (value if value.is_floating_point() else value.float()).reshape(rows)  # a count, or whether the answer is right


def total_effect(pair: PromptPair, metric: Any) -> Float[Tensor, "batch pos"]:
    """The metric of the clean run minus that of the corrupted one; of a readout at the token itself, for each token."""
    if not is_readout(metric) or isinstance(metric, At):
        return metric_changes(pair, metric, pair.resid_post("clean")[None])[0, :, None].expand(pair.tokens.shape).clone()
    packed = replace(pack(pair.tokens, pair.attention_mask), width=metric.width)
    values = metric(_final(pair, packed, pair.resid_post("clean")[None]))[0]
    total = values.new_full(pair.tokens.shape, float("nan"))
    row, position = packed.real
    total[row, packed.original_positions[row, position]] = values[row, position]
    return total


def metric_changes(
    pair: PromptPair, metric: Any, final: Float[Tensor, "variant batch pos d_model"]
) -> Float[Tensor, "variant batch"]:
    """The metric of other last residual streams minus that of the corrupted run. A readout must be one with `At`."""
    if not is_readout(metric):
        baseline = metric_of_rows(metric, pair.model.logits(pair.resid_post("corrupt")))
        return torch.stack([metric_of_rows(metric, pair.model.logits(variant)) for variant in final]) - baseline
    require_one_place(metric)
    place, packed = cast(At, metric), pack(pair.tokens, pair.attention_mask)
    there = replace(packed, query_positions=place.packed_positions(packed)[:, :1], width=place.readout.width)
    return place.readout(_final(pair, there, final))[..., 0]


def require_one_place(metric: Any) -> None:
    """Raise `ValueError` for a readout that is taken at the changed token, wherever that is."""
    if is_readout(metric) and not isinstance(metric, At):
        raise ValueError(f"{metric!r} is read at the changed token: say where to read, as in At(-1, {metric!r})")


def _final(pair: PromptPair, packed: Packed, final: Float[Tensor, "variant batch pos d_model"]) -> Final:
    """What readouts see, at the queries of `packed` and as many tokens after them as a window has."""
    windows = Windows(packed.query_positions, packed.width)
    batch, length = packed.tokens.shape
    tokens = windows.token_positions(batch, length, packed.tokens.device)
    at = gather_positions(packed.original_positions, tokens).clamp(min=0)
    targets = windows.targets(packed.targets)
    clean = gather_positions(pair.resid_post("corrupt"), at)
    return Final(pair.model, torch.stack([gather_positions(x, at) for x in final]), clean, targets, packed)


def effects_of_deltas(
    pair: PromptPair,
    deltas: Deltas,
    metric: Any,
    asked: Bool[Tensor, "batch pos"],
    memory_budget: int | str | None = None,
    progress: bool = False,
) -> Float[Tensor, "layer batch pos variant"]:
    """The metric with each variant minus that of the corrupted run, one token changed at a time; nan where not asked for.

    Exactly 0 where nothing is added.
    """
    if is_readout(metric):
        variants = next(iter(deltas.values())).shape[2]
        effects = token_effects(
            pair.model,
            pair.tokens,
            lambda clean, at: clean.resid_post + deltas[clean.layer][at.batch, at.pos].movedim(2, 0),
            variants,
            list(deltas),
            asked,
            pair.attention_mask,
            readouts=[metric],
            memory_budget=memory_budget,
            progress=progress,
        ).readouts[metric.name]
        if effects.dim() != 4:
            raise ValueError(f"the metric must be one number; {metric!r} has {list(effects.shape[4:])}")
        effects = effects.movedim(1, -1)
    else:
        with progress_bar(len(deltas) * int(asked.any(0).sum()), "patching", "token", shown=progress) as bar:
            effects = torch.stack([_by_forwards(pair, layer, delta, metric, asked, bar) for layer, delta in deltas.items()])
    nothing = torch.stack([(delta == 0).all(-1) for delta in deltas.values()])
    return torch.where(nothing, 0.0, effects).masked_fill(~asked[None, ..., None], float("nan"))


def _by_forwards(
    pair: PromptPair,
    layer: int,
    delta: Float[Tensor, "batch pos variant d_model"],
    metric: Any,
    asked: Bool[Tensor, "batch pos"],
    bar: Any,
) -> Float[Tensor, "batch pos variant"]:
    """All positions through the later layers, for each variant: what a function of all logits needs."""
    model, resid = pair.model, pair.resid_post("corrupt", layer)
    baseline = metric_of_rows(metric, model.logits(pair.resid_post("corrupt")))
    effects = torch.full(delta.shape[:3], float("nan"), dtype=baseline.dtype, device=resid.device)
    at_once = max(1, LOGIT_BYTES // (4 * pair.tokens.numel() * model.cfg.d_vocab))
    for pos in asked.any(0).nonzero()[:, 0].tolist():
        for first in range(0, delta.shape[2], at_once):
            changes = delta[:, pos, first : first + at_once].transpose(0, 1)
            changed = resid.repeat(len(changes), 1, 1, 1)
            changed[:, :, pos] += changes
            logits = logits_after(pair, changed, layer + 1)
            for number, variant in enumerate(logits):
                effects[:, pos, first + number] = metric_of_rows(metric, variant) - baseline
        bar.update()
    return effects


def logits_after(
    pair: PromptPair, resid: Float[Tensor, "variant batch pos d_model"], layer: int
) -> Float[Tensor, "variant batch pos d_vocab"]:
    """The logits of other residual streams before a layer."""
    mask = None if pair.attention_mask is None else pair.attention_mask.repeat(len(resid), 1)
    return pair.model(resid.flatten(0, 1), start_at_layer=layer, attention_mask=mask).unflatten(0, resid.shape[:2])


def require_slope(metric: Any) -> None:
    """Raise `ValueError` for a readout that has no gradient here."""
    if is_readout(metric) and not (isinstance(metric, At) and isinstance(metric.readout, LogitDifference)):
        raise ValueError(
            f"attribution takes a function of the logits, or At(position, LogitDifference(...)): {metric!r} is another readout, "
            "whose slope at the corrupted run is zero, or which is read at another place for each token"
        )


def differentiable_value(pair: PromptPair, metric: Any, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, ""]:
    """The sum over rows of the metric, from last residual streams, for gradients."""
    if not is_readout(metric):
        return metric_of_rows(metric, pair.model.logits(resid)).sum()
    place, packed = cast(At, metric), pack(pair.tokens, pair.attention_mask)
    positions, difference = place.original_positions(packed)[:, None], cast(LogitDifference, place.readout)
    x = pair.model.ln_final(gather_positions(resid, positions)[:, 0].to(torch.promote_types(resid.dtype, torch.float32)))
    return (x * difference.direction(pair.model, packed.rows)).sum()
