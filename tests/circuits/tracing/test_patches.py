"""Every patch equals a full forward with hooks, and the identities between patches hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_moe import HookedMoE
from hooked_moe.circuits.tracing.batches import Batch, Spots
from hooked_moe.circuits.tracing.controls import random_directions
from hooked_moe.circuits.tracing.measure import Measured, measure
from hooked_moe.circuits.tracing.patches import SITES, n_variants
from hooked_moe.circuits.tracing.readings import READINGS, answer_direction
from tests.conftest import EVERY_ARCHITECTURE

LENGTHS = (7, 5, 3)


def random_batch(model: HookedMoE, noise: bool, positions: str = "final") -> Batch:
    """Three prompts of different lengths, corrupted by another token in their middle or by noise there."""
    generator = torch.Generator().manual_seed(3)
    clean = torch.randint(1, 61, (3, max(LENGTHS)), generator=generator)
    real = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    corrupted = clean.clone()
    embeddings = None
    if noise:
        with torch.no_grad():
            embeddings = model.embed(clean).clone()
        embeddings[:, 1] += 0.5 * torch.randn(3, model.cfg.d_model, generator=generator)
    else:
        corrupted[:, 1] = torch.randint(1, 61, (3,), generator=generator)
    final = torch.tensor(LENGTHS) - 1
    wanted = {"final": lambda n: [n - 1], "subject_last": lambda n: [1], "all": lambda n: range(1, n)}[positions]
    row, pos = torch.tensor([(row, pos) for row, length in enumerate(LENGTHS) for pos in wanted(length)]).T
    spots = Spots(row, pos, places=["final"] * len(row), seeds=range(len(row)))
    return Batch([], clean, corrupted, embeddings, real, final, torch.tensor([4, 5, 6]), torch.tensor([7, 8, 9]), spots)


@pytest.fixture(params=["noise, final", "replace, all"])
def batch(request: pytest.FixtureRequest, model: HookedMoE) -> Batch:
    corruption, positions = request.param.split(", ")
    return random_batch(model, corruption == "noise", positions)


def start_of(model: HookedMoE, batch: Batch) -> Tensor:
    return model.embed(batch.corrupted) if batch.embeddings is None else batch.embeddings


def one_in_a_row(batch: Batch) -> list[Tensor]:
    """The spots in groups that a single forward can patch: those equally far from the ends of their rows."""
    distance = batch.final[batch.spots.row] - batch.spots.pos
    return [(distance == each).nonzero()[:, 0] for each in distance.unique()]


def patched_logits(model: HookedMoE, batch: Batch, edits: dict[str, Callable[[Tensor], Tensor]], spots: Tensor) -> Tensor:
    """The last token's logits of the spots' rows with some activations of the corrupted run changed at the spots, by a full
    forward with hooks."""
    rows, positions = batch.spots.row[spots], batch.spots.pos[spots]

    def hook_of(edit: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Any], Tensor]:
        def hook(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            x[rows, positions] = edit(x[rows, positions])
            return x

        return hook

    with torch.no_grad(), model.hooks([(name, hook_of(edit)) for name, edit in edits.items()]):
        resid = model(start_of(model, batch), start_at_layer=0, stop_at_layer=model.cfg.n_layers, attention_mask=batch.real)
        return model.logits(resid[rows, batch.final[rows]][None])[0]


def readings_of(logits: Tensor, clean: Tensor, true: Tensor, foil: Tensor) -> Tensor:
    """[row, reading], by their definitions, in float64."""
    log_probs, expected = logits.double().log_softmax(-1), clean.double().log_softmax(-1)
    of_true = log_probs.gather(1, true[:, None])[:, 0]
    of_foil = log_probs.gather(1, foil[:, None])[:, 0]
    rank = -(log_probs > of_true[:, None]).sum(1).double()
    kl = -(expected.exp() * (expected - log_probs)).sum(1)
    return torch.stack([of_true - of_foil, of_true, rank, kl], dim=1)


def clean_logits(model: HookedMoE, batch: Batch) -> Tensor:
    rows = torch.arange(len(batch.final))
    with torch.no_grad():
        resid = model(batch.clean, stop_at_layer=model.cfg.n_layers, attention_mask=batch.real)
        return model.logits(resid[rows, batch.final][None])[0]


def rescues(model: HookedMoE, batch: Batch, edits: dict[str, Callable[[Tensor], Tensor]], spots: Tensor) -> Tensor:
    """[spot, reading]: how far the edits bring the spots' rows back."""
    rows = batch.spots.row[spots]
    answers = clean_logits(model, batch)[rows], batch.true[rows], batch.foil[rows]
    before, after = (readings_of(patched_logits(model, batch, each, spots), *answers) for each in ({}, edits))
    return after - before


@EVERY_ARCHITECTURE
@pytest.mark.usefixtures("unchecked")  # of the same call over and over
def test_every_patch_is_a_full_forward_with_hooks(model: HookedMoE, batch: Batch) -> None:
    measured = measure(model, batch, READINGS)
    deltas = [patches.variants(model.cfg.experts_per_token) for patches in measured.patches]
    clean = clean_logits(model, batch)
    for spots in one_in_a_row(batch):
        rows = batch.spots.row[spots]
        answers = clean[rows], batch.true[rows], batch.foil[rows]
        before = readings_of(patched_logits(model, batch, {}, spots), *answers)
        for layer, of_layer in enumerate(deltas):
            assert len(of_layer) == n_variants(model.cfg.experts_per_token)
            for variant, delta in enumerate(of_layer[:, spots]):
                expected = torch.zeros_like(before)
                if delta.any():
                    edit = {f"blocks.{layer}.hook_resid_post": lambda x, delta=delta: x + delta}
                    expected = readings_of(patched_logits(model, batch, edit, spots), *answers) - before
                found = measured.rescue[layer, variant, spots].double()
                torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@EVERY_ARCHITECTURE
def test_an_expert_patch_is_the_difference_of_its_contributions(model: HookedMoE, batch: Batch) -> None:
    """c_e(clean) - c_e(corrupted), read off hook points, and 0 for what is not routed."""
    measured = measure(model, batch, ["logit_difference"], necessity=False)
    spots = (batch.spots.row, batch.spots.pos)
    dense = []
    for start in (model.embed(batch.clean), start_of(model, batch)):
        names = lambda name: "hook_expert_" in name  # noqa: E731
        _, cache = model.run_with_cache(start.detach(), start_at_layer=0, attention_mask=batch.real, names_filter=names)
        of_run = {}
        for layer in model.cfg.moe_layers:
            own = {key: cache[f"blocks.{layer}.mlp.hook_expert_{key}"][spots] for key in ("indices", "weights", "out")}
            table = torch.zeros(len(batch.spots.row), model.cfg.num_experts, model.cfg.d_model)
            index = own["indices"][..., None].expand(-1, -1, model.cfg.d_model)
            of_run[layer] = table.scatter(1, index, own["weights"][..., None] * own["out"])
        dense.append(of_run)
    for layer in model.cfg.moe_layers:
        experts = measured.patches[layer].experts
        assert experts is not None
        expected = dense[0][layer] - dense[1][layer]
        found = torch.zeros_like(expected)
        index = experts.indices.clamp(min=0)[..., None].expand_as(experts.whole)
        found.scatter_add_(1, index, experts.whole)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(experts.routing + experts.content, experts.whole, atol=1e-6, rtol=1e-5)


@EVERY_ARCHITECTURE
def test_patches_add_up(model: HookedMoE, batch: Batch) -> None:
    measured = measure(model, batch, ["logit_difference"], necessity=False)
    for layer, patches in enumerate(measured.patches):
        moe_out, _, _, union, shared = patches.sites
        if patches.experts is None:
            assert not union.any()
            continue
        torch.testing.assert_close(union + shared, moe_out, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(patches.experts.whole.sum(1), union)
        whole = measured.rescue[layer, SITES.index("moe_out")]
        if not shared.any():
            torch.testing.assert_close(measured.rescue[layer, SITES.index("union")], whole, atol=1e-5, rtol=1e-4)


@EVERY_ARCHITECTURE
def test_a_run_patched_with_itself_is_exactly_unchanged(model: HookedMoE) -> None:
    batch = random_batch(model, noise=False, positions="all")
    same = replace(batch, corrupted=batch.clean)
    measured = measure(model, same, READINGS, necessity=False)
    assert not measured.rescue.any()
    assert not measured.direct.any()


def test_without_noise_nothing_is_rescued(model: HookedMoE) -> None:
    batch = random_batch(model, noise=True, positions="all")
    with torch.no_grad():
        same = replace(batch, embeddings=model.embed(batch.clean))
    assert not measure(model, same, READINGS, necessity=False).rescue.any()


@EVERY_ARCHITECTURE
def test_in_the_last_layer_a_patch_is_its_direct_effect_through_the_final_norm(model: HookedMoE) -> None:
    batch = random_batch(model, noise=True)
    measured = measure(model, batch, ["logit_difference"], necessity=False)
    experts = measured.patches[-1].experts
    assert experts is not None
    width = experts.indices.shape[1]
    direction = answer_direction(model, batch.true, batch.foil)
    before = (model.ln_final(measured.corrupted.resid) * direction).sum(-1)
    for slot in range(width):
        after = (model.ln_final(measured.corrupted.resid + experts.whole[:, slot]) * direction).sum(-1)
        found = measured.rescue[-1, len(SITES) + slot, :, 0]
        torch.testing.assert_close(found, after - before, atol=1e-5, rtol=1e-4)
        scale = (measured.corrupted.resid.square().mean(-1) + model.ln_final.eps).sqrt()
        frozen = ((experts.whole[:, slot] * model.ln_final.w) * direction).sum(-1) / scale
        torch.testing.assert_close(measured.direct[-1, slot], frozen, atol=1e-6, rtol=1e-5)


def test_a_patch_before_the_last_token_in_the_last_layer_does_nothing(model: HookedMoE) -> None:
    measured = measure(model, random_batch(model, noise=False, positions="subject_last"), READINGS)
    assert not measured.rescue[-1].any()
    assert measured.rescue[0].any()
    assert not measured.direct.any()


@EVERY_ARCHITECTURE
def test_the_first_order_estimate_is_the_slope_of_the_patch(model: HookedMoE, batch: Batch) -> None:
    measured = measure(model, batch, ["logit_difference"], necessity=False)
    layer, small = model.cfg.moe_layers[0], 1e-3
    experts = measured.patches[layer].experts
    assert experts is not None
    for spots in one_in_a_row(batch):
        rows, whole = batch.spots.row[spots], experts.whole[spots]
        for slot in range(2):
            sides = []
            for sign in (1, -1):
                edit = {f"blocks.{layer}.hook_resid_post": lambda x, step=sign * small * whole[:, slot]: x + step}
                logits = patched_logits(model, batch, edit, spots)
                sides.append(logits.gather(1, batch.true[rows, None]) - logits.gather(1, batch.foil[rows, None]))
            slope = (sides[0] - sides[1])[:, 0] / (2 * small)
            torch.testing.assert_close(measured.first_order[layer, slot, spots], slope, atol=3e-3, rtol=2e-2)


@EVERY_ARCHITECTURE
def test_all_mlp_outputs_together_are_a_forward_with_all_of_them_replaced(model: HookedMoE, batch: Batch) -> None:
    measured = measure(model, batch, READINGS, necessity=False)
    for spots in one_in_a_row(batch):
        edits = {
            f"blocks.{layer}.hook_mlp_out": lambda x, out=measured.clean.layers[layer].mlp_out[spots]: out
            for layer in range(model.cfg.n_layers)
        }
        expected = rescues(model, batch, edits, spots)
        torch.testing.assert_close(measured.all_moe[spots].double(), expected, atol=2e-5, rtol=1e-4)


@EVERY_ARCHITECTURE
def test_what_an_expert_is_needed_for_is_a_forward_without_it(model: HookedMoE, batch: Batch) -> None:
    measured = measure(model, batch, ["logit_difference"])
    layer = model.cfg.moe_layers[-1] if (batch.spots.pos == batch.final[batch.spots.row]).all() else model.cfg.moe_layers[0]
    experts, run = measured.patches[layer].experts, measured.clean.layers[layer].experts
    assert experts is not None
    assert run is not None
    plain = replace(batch, corrupted=batch.clean, embeddings=None)
    for spots in one_in_a_row(batch):
        for slot in range(run.indices.shape[1]):
            lost = run.weights[spots, slot, None] * run.outputs[spots, slot]
            change = rescues(model, plain, {f"blocks.{layer}.hook_resid_post": lambda x, lost=lost: x - lost}, spots)[:, 0]
            torch.testing.assert_close(measured.necessity[layer, slot, spots].double(), change, atol=2e-5, rtol=1e-4)
    assert measured.necessity[layer, run.indices.shape[1] :].isnan().all()


@EVERY_ARCHITECTURE
def test_controls_are_as_long_as_what_they_are_compared_with(model: HookedMoE, batch: Batch) -> None:
    measured = measure(model, batch, ["logit_difference"], necessity=False)
    for patches in measured.patches:
        if patches.experts is None or patches.controls is None:
            continue
        k = model.cfg.experts_per_token
        weights, own = patches.experts.weight_clean[:, :k], patches.experts.whole[:, :k]
        torch.testing.assert_close(patches.controls.random.norm(dim=-1), own.norm(dim=-1))
        for spot in range(len(own)):
            for slot in range(k):
                other = min((n for n in range(k) if n != slot), key=lambda n: abs(weights[spot, n] - weights[spot, slot]))
                length = min(own[spot, slot].norm(), own[spot, other].norm())
                for found, patch in (
                    (patches.controls.equal_norm, own[spot, slot]),
                    (patches.controls.matched_equal_norm, own[spot, other]),
                ):
                    expected = patch / patch.norm() * length if length else torch.zeros_like(patch)
                    torch.testing.assert_close(found[spot, slot], expected, atol=1e-6, rtol=1e-4)


def test_random_vectors_are_those_of_their_seeds(model: HookedMoE) -> None:
    batch = random_batch(model, noise=False)
    first, last = (random_directions(seeds, 3, 2, 8, batch.final.device) for seeds in ([5, 6], [6]))
    assert first[:, 1].equal(last[:, 0])
    assert not first[:, 0].equal(first[:, 1])


def test_a_streamed_model_gives_the_same() -> None:
    whole, streamed = (HookedMoE.from_pretrained("tiny-olmoe", stream=stream) for stream in (False, True))
    batch = random_batch(whole, noise=False, positions="subject_last")
    expected, found = (measure(model, batch, ["logit_difference"]) for model in (whole, streamed))
    for name in ("rescue", "all_moe", "direct", "first_order", "necessity"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-6, rtol=1e-5, equal_nan=True)
    assert found.first_order.abs().max() > 0


def test_rows_do_not_know_of_each_other(model: HookedMoE) -> None:
    batch = random_batch(model, noise=False, positions="all")
    together = measure(model, batch, READINGS)
    alone: list[Measured] = []
    for row, length in enumerate(LENGTHS):
        part = slice(row, row + 1)
        own = {name: getattr(batch, name)[part] for name in ("final", "true", "foil")}
        tokens = {name: getattr(batch, name)[part, :length] for name in ("clean", "corrupted", "real")}
        mine = (batch.spots.row == row).nonzero()[:, 0].tolist()
        spots = Spots(torch.zeros(len(mine), dtype=torch.int64), batch.spots.pos[mine], ["final"] * len(mine), mine)
        alone.append(measure(model, Batch([], **tokens, embeddings=None, **own, spots=spots), READINGS))
    joined = torch.cat([part.rescue for part in alone], dim=2)
    torch.testing.assert_close(together.rescue, joined, atol=1e-5, rtol=1e-4)
