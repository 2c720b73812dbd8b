"""Corrupted runs in batches: prompts padded on the right, with what corrupts them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_moe.circuits.tracing.places import places_of
from hooked_moe.circuits.tracing.prompts import Prompt
from hooked_moe.circuits.tracing.protocol import Protocol
from hooked_moe.transformer import Transformer


@dataclass(frozen=True)
class CorruptedRun:
    """One corruption of one case: a draw of the noise, or a donor whose subject takes the place of the case's own."""

    case: int
    prompt: Prompt
    foil_id: int
    foil: str
    draw: int = 0
    donor: Prompt | None = None


@dataclass(frozen=True)
class Spots:
    """The tokens that are patched, one after another: a spot is one token of one row."""

    row: Int[Tensor, " spot"]
    pos: Int[Tensor, " spot"]
    places: Sequence[str]
    """What each is in its prompt: one of `places.PLACES`."""
    seeds: Sequence[int]
    """Of the random vectors that are put there as a control."""


@dataclass(frozen=True)
class Batch:
    """Corrupted runs side by side; a row is one of them."""

    runs: Sequence[CorruptedRun]
    clean: Int[Tensor, "row pos"]
    corrupted: Int[Tensor, "row pos"]
    embeddings: Float[Tensor, "row pos d_model"] | None
    """What the corrupted runs begin with; None: the embeddings of `corrupted`."""
    real: Bool[Tensor, "row pos"]
    final: Int[Tensor, " row"]
    """The position of each row's last token."""
    true: Int[Tensor, " row"]
    foil: Int[Tensor, " row"]
    spots: Spots

    @cached_property
    def spot_at(self) -> Int[Tensor, "row pos"]:
        """The number of the spot that each token is; -1 for tokens that are not patched."""
        numbers = torch.full(self.real.shape, -1, dtype=torch.int64, device=self.real.device)
        numbers[self.spots.row, self.spots.pos] = torch.arange(len(self.spots.row), device=self.real.device)
        return numbers


def batches(model: Transformer, runs: Sequence[CorruptedRun], protocol: Protocol, sigma: float, rows: int) -> Iterator[Batch]:
    """`sigma` is the standard deviation of the noise, in the embeddings' units."""
    device = model.cfg.device
    for start in range(0, len(runs), rows):
        chosen = runs[start : start + rows]
        clean, real = _padded([run.prompt.tokens for run in chosen], device)
        corrupted, _ = _padded([(run.donor or run.prompt).tokens for run in chosen], device)
        yield Batch(
            runs=chosen,
            clean=clean,
            corrupted=corrupted,
            embeddings=_noised(model, clean, chosen, sigma) if protocol.corruption == "noise" else None,
            real=real,
            final=real.sum(-1) - 1,
            true=torch.tensor([run.prompt.true_id for run in chosen], dtype=torch.int64, device=device),
            foil=torch.tensor([run.foil_id for run in chosen], dtype=torch.int64, device=device),
            spots=_spots(chosen, protocol, device),
        )


def _spots(runs: Sequence[CorruptedRun], protocol: Protocol, device: torch.device) -> Spots:
    found = [(row, *spot) for row, run in enumerate(runs) for spot in places_of(run.prompt, protocol.positions).items()]
    rows, positions, places = zip(*found, strict=True)
    return Spots(
        row=torch.tensor(rows, dtype=torch.int64, device=device),
        pos=torch.tensor(positions, dtype=torch.int64, device=device),
        places=places,
        seeds=[_seed(runs[row], position) for row, position in zip(rows, positions, strict=True)],
    )


def _seed(run: CorruptedRun, position: int) -> int:
    """The same for the same case, corruption and position, whatever else is traced."""
    corruption = run.draw if run.donor is None else f"donor {run.donor.record.case_id}"
    return random.Random(f"{run.prompt.record.case_id}, {corruption}, {position}").getrandbits(63)


def noise_scale(model: Transformer, prompts: Sequence[Prompt], protocol: Protocol) -> float:
    """The standard deviation of the noise."""
    rows: Tensor = model.embed.W_E
    if protocol.sigma_from == "subjects":
        tokens = [token for prompt in prompts for token in prompt.tokens[slice_of(prompt.subject)]]
        rows = rows[torch.tensor(tokens, dtype=torch.int64, device=rows.device)]
    return protocol.sigma * float(rows.float().std())


def slice_of(positions: range) -> slice:
    return slice(positions.start, positions.stop)


def _noised(
    model: Transformer, tokens: Int[Tensor, "row pos"], runs: Sequence[CorruptedRun], sigma: float
) -> Float[Tensor, "row pos d_model"]:
    """Embeddings with Gaussian noise on the subject's tokens, drawn in float32 on the CPU with the case's id as the seed."""
    with torch.no_grad():
        embeddings = model.embed(tokens).clone()
    for row, run in enumerate(runs):
        generator = torch.Generator().manual_seed(run.prompt.record.case_id)
        shape = (len(run.prompt.subject), model.cfg.d_model)
        for _ in range(run.draw + 1):  # a later draw is what the generator gives next
            noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        embeddings[row, slice_of(run.prompt.subject)] += (sigma * noise).to(embeddings)
    return embeddings


def _padded(rows: Sequence[tuple[int, ...]], device: torch.device) -> tuple[Int[Tensor, "row pos"], Bool[Tensor, "row pos"]]:
    longest = max(map(len, rows))
    tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.int64, device=device)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64, device=device)
    return tokens, torch.arange(longest, device=device) < lengths[:, None]
