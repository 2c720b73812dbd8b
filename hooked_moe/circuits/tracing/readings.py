"""How far a patched run has come back: all readings are differences to the corrupted run, positive towards the clean one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.components.precision import at_least_float32
from hooked_moe.counterfactuals import LogitDifference
from hooked_moe.counterfactuals.engine.readout import Final
from hooked_moe.transformer import Transformer

READINGS = ("logit_difference", "log_prob", "rank", "kl")
"""`log p(true) - log p(foil)`, which is the difference of their logits; `log p(true)`; how many places the true answer rises; and
how much nearer, in KL(clean || run), the prediction comes to the clean run's. The first is in logits, the second and the last are
in nats."""
CHUNK_BYTES = 32 << 20


@dataclass(frozen=True, eq=False)
class Answers:
    """A readout of the engine: the readings of every variant, [variant, batch, query, reading]."""

    true: Int[Tensor, " row"]
    foil: Int[Tensor, " row"]
    clean_log_probs: Float[Tensor, "row d_vocab"]
    """The clean run's prediction at the last token."""
    readings: Sequence[str]
    name: ClassVar[str] = "answers"
    width: ClassVar[int] = 1

    def __call__(self, final: Final) -> Float[Tensor, "variant batch query reading"]:
        rows = final.packed.rows
        corrupted = self.absolute(final.model, final.clean, rows)
        return torch.stack([self.absolute(final.model, variant, rows) for variant in final.variants]) - corrupted

    def absolute(
        self, model: Transformer, resid: Float[Tensor, "batch query d_model"], rows: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch query reading"]:
        """The readings themselves; rank and KL with a minus sign, so that more is nearer to the clean run."""
        if set(self.readings) == {"logit_difference"}:
            return self._by_direction(model, resid, rows)
        chunk = max(1, CHUNK_BYTES // (4 * model.cfg.d_vocab * resid.shape[1]))
        parts = [self._by_logits(model, x, r) for x, r in zip(resid.split(chunk), rows.split(chunk), strict=True)]
        return torch.cat(parts)

    def _by_direction(self, model: Transformer, resid: Tensor, rows: Tensor) -> Tensor:
        direction = answer_direction(model, self.true[rows], self.foil[rows])
        normalised = model.ln_final(at_least_float32(resid))
        return (normalised * direction[:, None]).sum(-1, keepdim=True)

    def _by_logits(self, model: Transformer, resid: Tensor, rows: Tensor) -> Tensor:
        log_probs = model.logits(resid).log_softmax(-1)
        true, foil = (
            log_probs.gather(-1, ids[rows][:, None, None].expand(*resid.shape[:2], 1)) for ids in (self.true, self.foil)
        )
        values = {"logit_difference": true - foil, "log_prob": true}
        if "rank" in self.readings:
            values["rank"] = -(log_probs > true).sum(-1, keepdim=True).to(true.dtype)
        if "kl" in self.readings:
            clean = self.clean_log_probs[rows][:, None]
            values["kl"] = -(clean.exp() * (clean - log_probs)).sum(-1, keepdim=True)
        return torch.cat([values[name] for name in self.readings], dim=-1)


def answer_direction(model: Transformer, true: Int[Tensor, " row"], foil: Int[Tensor, " row"]) -> Float[Tensor, "row d_model"]:
    """What the normalised last residual stream is multiplied by to give the logit of the true answer minus the foil's."""
    return LogitDifference(true, foil).direction(model, torch.arange(len(true), device=true.device))


def check_readings(readings: Sequence[str]) -> tuple[str, ...]:
    """The readings in their fixed order. Raises `ValueError` for unknown ones, and where the logit difference is missing."""
    unknown = [name for name in readings if name not in READINGS]
    if unknown or "logit_difference" not in readings:
        raise ValueError(f"readouts are {', '.join(map(repr, READINGS))}, the first of them always, not {list(readings)}")
    return tuple(name for name in READINGS if name in readings)
