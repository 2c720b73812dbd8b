"""Every patch equals a full forward with hooks, and the identities between patches hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_moe import HookedMoE
from hooked_moe.circuits.tracing.batches import Batch
from hooked_moe.circuits.tracing.measure import Measured, measure
from hooked_moe.circuits.tracing.patches import SITES
from hooked_moe.circuits.tracing.readings import READINGS, answer_direction
from tests.conftest import EVERY_ARCHITECTURE

LENGTHS = (7, 5, 3)


def random_batch(model: HookedMoE, noise: bool) -> Batch:
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
    return Batch([], clean, corrupted, embeddings, real, final, torch.tensor([4, 5, 6]), torch.tensor([7, 8, 9]))


@pytest.fixture(params=["noise", "replace"])
def batch(request: pytest.FixtureRequest, model: HookedMoE) -> Batch:
    return random_batch(model, request.param == "noise")


def start_of(model: HookedMoE, batch: Batch) -> Tensor:
    return model.embed(batch.corrupted) if batch.embeddings is None else batch.embeddings


def patched_logits(model: HookedMoE, batch: Batch, edits: dict[str, Callable[[Tensor], Tensor]]) -> Tensor:
    """The last token's logits of the corrupted run with some activations changed there, by a full forward with hooks."""
    rows = torch.arange(len(batch.final))

    def hook_of(edit: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Any], Tensor]:
        def hook(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            x[rows, batch.final] = edit(x[rows, batch.final])
            return x

        return hook

    with torch.no_grad(), model.hooks([(name, hook_of(edit)) for name, edit in edits.items()]):
        resid = model(start_of(model, batch), start_at_layer=0, stop_at_layer=model.cfg.n_layers, attention_mask=batch.real)
        return model.logits(resid[rows, batch.final][None])[0]


def readings_of(logits: Tensor, clean: Tensor, batch: Batch) -> Tensor:
    """[row, reading], by their definitions, in float64."""
    log_probs, expected = logits.double().log_softmax(-1), clean.double().log_softmax(-1)
    true = log_probs.gather(1, batch.true[:, None])[:, 0]
    foil = log_probs.gather(1, batch.foil[:, None])[:, 0]
    rank = -(log_probs > true[:, None]).sum(1).double()
    kl = -(expected.exp() * (expected - log_probs)).sum(1)
    return torch.stack([true - foil, true, rank, kl], dim=1)


def clean_logits(model: HookedMoE, batch: Batch) -> Tensor:
    rows = torch.arange(len(batch.final))
    with torch.no_grad():
        resid = model(batch.clean, stop_at_layer=model.cfg.n_layers, attention_mask=batch.real)
        return model.logits(resid[rows, batch.final][None])[0]


@EVERY_ARCHITECTURE
@pytest.mark.usefixtures("unchecked")  # of the same call over and over
def test_every_patch_is_a_full_forward_with_hooks(model: HookedMoE, batch: Batch) -> None:
    measured = measure(model, batch, READINGS)
    clean, nothing = clean_logits(model, batch), patched_logits(model, batch, {})
    before = readings_of(nothing, clean, batch)
    n_slots = measured.direct.shape[1]
    for layer, patches in enumerate(measured.patches):
        deltas = patches.variants(n_slots)
        for variant in range(len(deltas)):
            expected = before.clone()
            if deltas[variant].any():
                edit = {f"blocks.{layer}.hook_resid_post": lambda x, delta=deltas[variant]: x + delta}
                expected = readings_of(patched_logits(model, batch, edit), clean, batch)
            torch.testing.assert_close(measured.rescue[layer, variant].double(), expected - before, atol=2e-5, rtol=1e-4)


@EVERY_ARCHITECTURE
def test_an_expert_patch_is_the_difference_of_its_contributions(model: HookedMoE, batch: Batch) -> None:
    """c_e(clean) - c_e(corrupted), read off hook points, and 0 for what is not routed."""
    measured = measure(model, batch, ["logit_difference"], necessity=False)
    rows = torch.arange(len(batch.final))
    dense = []
    for start in (model.embed(batch.clean), start_of(model, batch)):
        names = lambda name: "hook_expert_" in name  # noqa: E731
        _, cache = model.run_with_cache(start.detach(), start_at_layer=0, attention_mask=batch.real, names_filter=names)
        of_run = {}
        for layer in model.cfg.moe_layers:
            own = {
                key: cache[f"blocks.{layer}.mlp.hook_expert_{key}"][rows, batch.final] for key in ("indices", "weights", "out")
            }
            table = torch.zeros(len(rows), model.cfg.num_experts, model.cfg.d_model)
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
    batch = random_batch(model, noise=False)
    same = replace(batch, corrupted=batch.clean)
    measured = measure(model, same, READINGS, necessity=False)
    assert not measured.rescue.any()
    assert not measured.direct.any()


def test_without_noise_nothing_is_rescued(model: HookedMoE) -> None:
    batch = random_batch(model, noise=True)
    with torch.no_grad():
        same = replace(batch, embeddings=model.embed(batch.clean))
    assert not measure(model, same, READINGS, necessity=False).rescue.any()


@EVERY_ARCHITECTURE
def test_in_the_last_layer_a_patch_is_its_direct_effect_through_the_final_norm(model: HookedMoE, batch: Batch) -> None:
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


@EVERY_ARCHITECTURE
def test_the_first_order_estimate_is_the_slope_of_the_patch(model: HookedMoE, batch: Batch) -> None:
    measured = measure(model, batch, ["logit_difference"], necessity=False)
    layer, small = model.cfg.moe_layers[0], 1e-3
    experts = measured.patches[layer].experts
    assert experts is not None
    for slot in range(2):
        sides = []
        for sign in (1, -1):
            edit = {f"blocks.{layer}.hook_resid_post": lambda x, sign=sign, s=slot: x + sign * small * experts.whole[:, s]}
            logits = patched_logits(model, batch, edit)
            sides.append(logits.gather(1, batch.true[:, None]) - logits.gather(1, batch.foil[:, None]))
        slope = (sides[0] - sides[1])[:, 0] / (2 * small)
        torch.testing.assert_close(measured.first_order[layer, slot], slope, atol=3e-3, rtol=2e-2)


@EVERY_ARCHITECTURE
def test_all_mlp_outputs_together_are_a_forward_with_all_of_them_replaced(model: HookedMoE, batch: Batch) -> None:
    measured = measure(model, batch, READINGS, necessity=False)
    clean = clean_logits(model, batch)
    edits = {
        f"blocks.{layer}.hook_mlp_out": lambda x, out=measured.clean.layers[layer].mlp_out: out
        for layer in range(model.cfg.n_layers)
    }
    before = readings_of(patched_logits(model, batch, {}), clean, batch)
    after = readings_of(patched_logits(model, batch, edits), clean, batch)
    torch.testing.assert_close(measured.all_moe.double(), after - before, atol=2e-5, rtol=1e-4)


@EVERY_ARCHITECTURE
def test_what_an_expert_is_needed_for_is_a_forward_without_it(model: HookedMoE, batch: Batch) -> None:
    measured = measure(model, batch, ["logit_difference"])
    rows = torch.arange(len(batch.final))
    clean = clean_logits(model, batch)
    margin = (clean.gather(1, batch.true[:, None]) - clean.gather(1, batch.foil[:, None]))[:, 0]
    layer = model.cfg.moe_layers[-1]
    experts, run = measured.patches[layer].experts, measured.clean.layers[layer].experts
    assert experts is not None
    assert run is not None
    plain = replace(batch, corrupted=batch.clean, embeddings=None)
    for slot in range(run.indices.shape[1]):
        lost = run.weights[rows, slot, None] * run.outputs[rows, slot]
        logits = patched_logits(model, plain, {f"blocks.{layer}.hook_resid_post": lambda x, lost=lost: x - lost})
        after = (logits.gather(1, batch.true[:, None]) - logits.gather(1, batch.foil[:, None]))[:, 0]
        torch.testing.assert_close(measured.necessity[layer, slot], after - margin, atol=2e-5, rtol=1e-4)
    assert measured.necessity[layer, run.indices.shape[1] :].isnan().all()


def test_rows_do_not_know_of_each_other(model: HookedMoE) -> None:
    batch = random_batch(model, noise=False)
    together = measure(model, batch, READINGS)
    alone: list[Measured] = []
    for row, length in enumerate(LENGTHS):
        part = slice(row, row + 1)
        own = {name: getattr(batch, name)[part] for name in ("final", "true", "foil")}
        tokens = {name: getattr(batch, name)[part, :length] for name in ("clean", "corrupted", "real")}
        alone.append(measure(model, Batch([], **tokens, embeddings=None, **own), READINGS))
    joined = torch.cat([part.rescue for part in alone], dim=2)
    torch.testing.assert_close(together.rescue, joined, atol=1e-5, rtol=1e-4)
