"""One request for counterfactuals: checked, divided into parts that fit into memory, run, and its results put in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_moe.checks import as_int_or_none
from hooked_moe.components.precision import without_autocast
from hooked_moe.counterfactuals.engine.fan_out import (
    Branch,
    CleanBlock,
    Done,
    Steps,
    Windows,
    fan_out,
    finish,
    side_by_side,
    tokens_at_once,
)
from hooked_moe.counterfactuals.engine.memory import Demand, demand_of, demand_within, divide, parse_bytes, variant_bytes
from hooked_moe.counterfactuals.engine.padding import Packed, Results, pack
from hooked_moe.counterfactuals.readouts import NamedReadout, by_name
from hooked_moe.loading.spill import Waiting, spill_of
from hooked_moe.transformer import Transformer

WAITING_BYTES = 1 << 30
"""Where no budget is given: of variants in flight, beside what one row of the clean run takes anyway."""

Tokens = Int[Tensor, "batch pos"] | str | list[str]
Mask = Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"]
Positions = Sequence[int] | Bool[Tensor, "batch pos"]
Work = Callable[[Packed, list[int], Results], Steps[None]]
"""Measures some layers at some rows and queries, and puts what it finds into the results."""


@dataclass(frozen=True)
class Request:
    model: Transformer
    layers: list[int]
    packed: Packed
    readouts: dict[str, NamedReadout]
    budget: int | None
    """Bytes beside the model's weights and the results; None: what it takes, and `WAITING_BYTES` for variants."""

    @property
    def width(self) -> int:
        """How many tokens from the changed one on have to be run."""
        return max((readout.width for readout in self.readouts.values()), default=1)

    def run(self, work: Work, n_variants: int) -> Steps[Results]:
        """All parts one after another; or, where weights are streamed, side by side through the layers."""
        results = Results(self.layers, (len(self.packed.tokens), self.packed.width))
        demand, _ = self.demand(n_variants)
        budget = demand.fixed + demand.row + WAITING_BYTES if self.budget is None else self.budget
        parts = divide(self.packed, self.layers, demand, n_variants * self.width, budget)
        works = (work(packed, layers, results) for packed, layers in parts)
        if self.model.streams:
            yield from side_by_side(works)
        else:
            for one in works:
                yield from one
        return results

    def demand(self, n_variants: int) -> tuple[Demand, int]:
        """What it takes, and how many tokens of variants go through a block together."""
        cfg, length = self.model.cfg, self.packed.tokens.shape[1]
        if self.budget is None:
            return demand_of(cfg, length), tokens_at_once(cfg.device)
        return demand_within(cfg, length, n_variants * self.width, self.budget)

    def fan_out(
        self,
        packed: Packed,
        layers: list[int],
        results: Results,
        n_variants: int,
        branch: Branch,
        visit: Callable[[CleanBlock], None] | None = None,
    ) -> Steps[None]:
        """Fan out, and put losses and readouts into the results as `delta_loss`, `baseline_loss` and `readouts/<name>`."""
        windows = Windows(packed.positions, self.width)
        streams = n_variants * len(layers) * packed.queries * self.width + packed.tokens.shape[1]  # of a row, the clean run's too
        nbytes = streams * len(packed.tokens) * variant_bytes(self.model.cfg)
        with self.waiting_room(nbytes) as waiting:
            out = yield from fan_out(
                self.model,
                packed.tokens,
                packed.targets,
                layers,
                n_variants,
                branch,
                windows,
                self.readouts,
                waiting,
                visit,
                self.demand(n_variants)[1],
            )
        baseline = out.baseline if packed.positions is None else out.baseline.gather(1, packed.positions)
        results.put("delta_loss", (out.losses - baseline).movedim(1, 3), packed, layers)
        results.put_baseline(out.baseline, packed)
        for name, values in out.readouts.items():
            results.put(f"readouts/{name}", values.movedim(1, 3), packed, layers)

    @contextmanager
    def waiting_room(self, nbytes: int) -> Iterator[Waiting | None]:
        """Where residual streams wait between layers: a file, or None for memory."""
        spill = spill_of(self.model)
        if spill is None:
            yield None
            return
        waiting = spill.claim(nbytes, in_file=self.budget is not None)
        try:
            yield waiting
        finally:
            if waiting is None:
                spill.release(nbytes)
            else:
                waiting.close()


@without_autocast()
def complete(steps: Steps[Done]) -> Done:
    """Run a measurement to its end, without gradients. Inference mode takes a sixth less time than `no_grad` for small models."""
    with torch.inference_mode():
        return finish(steps)


def make_request(
    model: Transformer,
    tokens: Tokens,
    layers: Sequence[int] | None,
    positions: Positions | None,
    attention_mask: Mask | None,
    readouts: Sequence[NamedReadout],
    memory_budget: int | str | None,
    dense: bool = False,
) -> Request:
    """Check what is asked for. `dense` allows layers without experts. Raises `ValueError` for what cannot be measured."""
    tokens, attention_mask = model.as_tokens(tokens, attention_mask)
    require_unhooked(model)
    named = by_name(readouts, model)
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    return Request(model, _checked_layers(model, layers, dense), pack(tokens, attention_mask, positions), named, budget)


def require_unhooked(model: Transformer) -> None:
    """Raise `ValueError` if hooks are attached: they would act on batches of variants."""
    hooked = [name for name, point in model.hook_dict.items() if point.active]
    if hooked:
        raise ValueError(
            f"counterfactuals measure the unhooked model, and {hooked[0]} has hooks: call model.reset_hooks() first "
            "(including_permanent=True for permanent hooks)"
        )


def _checked_layers(model: Transformer, layers: Sequence[int] | None, dense: bool) -> list[int]:
    cfg = model.cfg
    if layers is None:
        return list(range(cfg.n_layers)) if dense else cfg.moe_layers
    if as_int_or_none(layers) is not None:
        raise ValueError(f"layers must be a list of layers, as in [{layers}], not the number {layers}")
    try:
        numbers = [(layer, as_int_or_none(layer)) for layer in layers]
    except TypeError as error:
        raise ValueError(f"layers must be a list of whole numbers, as in {cfg.moe_layers}, not {layers!r}") from error
    wrong = [layer for layer, number in numbers if number is None]
    if wrong:
        raise ValueError(f"layers must be whole numbers, as in {cfg.moe_layers}, not {wrong[0]!r}")
    chosen = sorted({number for _, number in numbers if number is not None})
    for layer in chosen:
        if not 0 <= layer < cfg.n_layers:
            raise ValueError(f"layer {layer} is out of range: the model has layers 0 to {cfg.n_layers - 1}")
        if not dense and not cfg.experts_in(layer):
            raise ValueError(f"layer {layer} is dense: it has no experts; layers {cfg.moe_layers} have")
    if not chosen:
        raise ValueError("no layers to measure: layers is empty")
    return chosen
