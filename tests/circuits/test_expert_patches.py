"""Patches of experts and routers against a hooked forward for each, and TransformerLens's own loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_moe import ActivationCache, HookedMoE
from hooked_moe.circuits import (
    ExpertPatches,
    RouterAttribution,
    TokenPatches,
    expert_activations,
    get_act_patch_expert,
    get_act_patch_router,
    router_attribution,
)
from hooked_moe.circuits.pairs import expert_deltas, prompt_pair
from hooked_moe.counterfactuals import KL, After, At, LogitDifference, expert_effects
from tests.conftest import EVERY_ARCHITECTURE, expert_output, random_model, without_type_checks
from tests.support.hf_models import save, tiny
from tests.support.prompt_pairs import FIRST, MASKS, METRIC, SECOND, difference_at_end, random_pair

PADDED = pytest.mark.parametrize("padding", MASKS)
LOGITS = 2e-5  # of logits that go up to 10 here


@torch.no_grad()
def caches(model: HookedMoE, mask: Tensor | None) -> tuple[ActivationCache, ActivationCache]:
    clean, corrupt = (model.run_with_cache(tokens, attention_mask=mask)[1] for tokens in random_pair())
    return clean, corrupt


def by_forward(model: HookedMoE, mask: Tensor | None, hooks: list[Any]) -> Tensor:
    """`METRIC` of a hooked forward of the corrupted prompts, for each row."""
    with torch.no_grad(), without_type_checks():
        return difference_at_end(mask)(model.run_with_hooks(random_pair()[1], attention_mask=mask, fwd_hooks=hooks))


def added(layer: int, batch: int, pos: int, delta: Tensor, name: str = "mlp.hook_routed_out") -> Any:
    def add(x: Tensor, hook: Any) -> Tensor:
        x[batch, pos] += delta
        return x

    return f"blocks.{layer}.{name}", add


def part_by_definition(
    model: HookedMoE, clean: ActivationCache, corrupt: ActivationCache, where: tuple[int, int, int], expert: int, part: str
) -> Tensor:
    """From the caches and the expert's own weights."""
    layer, *at = where

    def run(cache: ActivationCache) -> tuple[float, Tensor]:
        prefix = f"blocks.{layer}."
        indices, weights = (cache[f"{prefix}mlp.hook_expert_{name}"][tuple(at)] for name in ("indices", "weights"))
        x = cache[prefix + "ln2.hook_normalized"][tuple(at)] * model.blocks[layer].ln2.w
        output = expert_output(model.blocks[layer].mlp.experts, expert, x)
        return (float(weights[indices == expert]) if expert in indices.tolist() else 0.0), output.detach()

    (w_clean, e_clean), (w_corrupt, e_corrupt) = run(clean), run(corrupt)
    return {
        "contribution": w_clean * e_clean - w_corrupt * e_corrupt,
        "content": w_clean * (e_clean - e_corrupt),
        "routing": (w_clean - w_corrupt) * e_corrupt,
    }[part]


@pytest.mark.usefixtures("unchecked")
@PADDED
@EVERY_ARCHITECTURE
def test_every_patch_equals_the_hook_that_makes_it(padding: str, model: HookedMoE) -> None:
    mask = MASKS[padding]
    clean_cache, corrupt_cache = caches(model, mask)
    clean, corrupt = random_pair()
    parts = {
        part: get_act_patch_expert(model, corrupt, clean_cache, METRIC, part=part, attention_mask=mask)
        for part in ("contribution", "content", "routing")
    }
    baseline = by_forward(model, mask, [])
    real = torch.ones_like(clean) if mask is None else mask
    seen = 0
    for index, layer in enumerate(model.cfg.moe_layers):
        for batch, pos in real.nonzero().tolist()[index::3]:
            active = {
                run: set(cache[f"blocks.{layer}.mlp.hook_expert_indices"][batch, pos].tolist())
                for run, cache in (("clean", clean_cache), ("corrupt", corrupt_cache))
            }
            experts = parts["content"].expert_index[index, batch, pos]
            found = experts[experts >= 0].tolist()
            assert sorted(found) == sorted(active["clean"] | active["corrupt"])
            for part, patches in parts.items():
                slot = (seen := seen + 1) % len(found)
                where = (index, batch, pos, slot)
                delta = part_by_definition(model, clean_cache, corrupt_cache, (layer, batch, pos), found[slot], part)
                forward = by_forward(model, mask, [added(layer, batch, pos, delta)])
                torch.testing.assert_close(patches.values[where], (forward - baseline)[batch], atol=LOGITS, rtol=1e-4)
                assert patches.clean_active[where] == (found[slot] in active["clean"])
                assert patches.corrupt_active[where] == (found[slot] in active["corrupt"])
    for patches in parts.values():
        assert torch.equal(patches.values.isnan(), (patches.expert_index < 0))
        assert ((patches.expert_index < 0).all(-1) == (real == 0)).all()
        total = difference_at_end(mask)(model(clean, attention_mask=mask)) - baseline
        torch.testing.assert_close(patches.total, total.detach()[:, None].expand(2, 7), atol=LOGITS, rtol=1e-4)


@PADDED
def test_a_function_of_the_logits_and_a_readout_are_one(padding: str) -> None:
    model, mask = random_model("qwen"), MASKS[padding]
    clean_cache, (_, corrupt) = caches(model, mask)[0], random_pair()
    by_readout, by_function = (
        get_act_patch_expert(model, corrupt, clean_cache, metric, positions=[2, 5, 6], attention_mask=mask)
        for metric in (METRIC, difference_at_end(mask))
    )
    torch.testing.assert_close(by_function.values, by_readout.values, atol=LOGITS, rtol=1e-4, equal_nan=True)
    torch.testing.assert_close(by_function.total, by_readout.total, atol=LOGITS, rtol=1e-4)
    assert (by_readout.metric, by_function.metric) == ("logit_difference@-1", "metric")
    assert by_readout.values[:, :, [0, 1, 3, 4]].isnan().all()


def test_a_readout_without_a_place_is_read_at_the_patched_token() -> None:
    model, mask = random_model(), MASKS["left"]
    clean_cache, (_, corrupt) = caches(model, mask)[0], random_pair()
    own = get_act_patch_expert(model, corrupt, clean_cache, LogitDifference(FIRST, SECOND), attention_mask=mask, dense=True)
    for pos in (3, 6):
        at = get_act_patch_expert(model, corrupt, clean_cache, At(pos, LogitDifference(FIRST, SECOND)), None, [pos],
                                  attention_mask=mask, dense=True)  # fmt: skip
        torch.testing.assert_close(own.values[:, :, pos], at.values[:, :, pos], atol=LOGITS, rtol=1e-4, equal_nan=True)
        torch.testing.assert_close(own.total[:, pos], at.total[:, pos], atol=LOGITS, rtol=1e-4)
    assert own.total[0, :3].isnan().all()


def test_whether_an_answer_is_right_is_a_metric() -> None:
    model, (clean, corrupt) = random_model(), random_pair()
    right = model(clean)[:, -1].argmax(-1)
    found = get_act_patch_expert(model, corrupt, clean, lambda logits: logits[:, -1].argmax(-1) == right, positions=[6])
    assert torch.equal(found.total, 1.0 - (model(corrupt)[:, -1].argmax(-1) == right).float()[:, None].expand(found.total.shape))


def test_the_total_of_a_later_readout_is_read_there_too() -> None:
    model, mask = random_model(), MASKS["left"]
    clean_cache, (_, corrupt) = caches(model, mask)[0], random_pair()
    readout = LogitDifference(FIRST, SECOND)
    own, after = (
        get_act_patch_expert(model, corrupt, clean_cache, metric, attention_mask=mask) for metric in (readout, After(2, readout))
    )
    torch.testing.assert_close(after.total[:, 3:-2], own.total[:, 5:], atol=LOGITS, rtol=1e-4)
    assert after.total[:, -2:].isnan().all()


def test_a_cache_made_in_inference_mode_serves_for_slopes() -> None:
    model, (clean, corrupt) = random_model(), random_pair()
    expected = router_attribution(model, clean, corrupt, METRIC)
    with torch.inference_mode():
        _, cache = model.run_with_cache(clean)
    assert torch.equal(router_attribution(model, cache, corrupt, METRIC).soft, expected.soft)


def test_transformer_lens_finds_the_same_patches() -> None:
    """Its loop over an index of layer, position and expert, with a setter for the block's output."""
    patching, pandas = pytest.importorskip("transformer_lens.patching"), pytest.importorskip("pandas")
    model = random_model()
    (clean_cache, corrupt_cache), (_, corrupt) = caches(model, None), random_pair()
    patches = get_act_patch_expert(model, corrupt, clean_cache, METRIC, dense=True)

    def contribution(cache: ActivationCache, layer: int, pos: int, expert: int) -> Tensor:
        prefix = f"blocks.{layer}.mlp.hook_expert_"
        own = cache[prefix + "indices"][:, pos] == expert
        return (own * cache[prefix + "weights"][:, pos]).unsqueeze(-1).mul(cache[prefix + "out"][:, pos]).sum(1)

    def setter(routed: Tensor, index: Any, clean_activation: Tensor) -> Tensor:
        layer, pos, expert = index
        routed[:, pos] += contribution(clean_cache, layer, pos, expert) - contribution(corrupt_cache, layer, pos, expert)
        return routed

    index = [(layer, pos, expert) for layer in range(3) for pos in (1, 4, 6) for expert in range(6)]
    with without_type_checks(), torch.no_grad():
        result = patching.generic_activation_patch(
            model,
            corrupt,
            clean_cache,
            difference_at_end(None),
            setter,
            "mlp_out",
            index_df=pandas.DataFrame(index, columns=["layer", "pos", "expert"]),
            reduce="none",
            baseline=True,
        )
    for (layer, pos, expert), effect in zip(index, result.effect(), strict=True):
        torch.testing.assert_close(patches.values[layer, :, pos, expert], effect, atol=LOGITS, rtol=1e-4)


@EVERY_ARCHITECTURE
def test_parts_and_experts_add_up(model: HookedMoE) -> None:
    clean_cache, corrupt_cache = caches(model, None)
    pair = prompt_pair(model, clean_cache, random_pair()[1])
    for layer in model.cfg.moe_layers:
        contribution, content, routing = (
            expert_deltas(pair, layer, part).delta for part in ("contribution", "content", "routing")
        )
        torch.testing.assert_close(content + routing, contribution, atol=1e-5, rtol=1e-4)
        name = f"blocks.{layer}.mlp.hook_routed_out"
        torch.testing.assert_close(contribution.sum(2), clean_cache[name] - corrupt_cache[name], atol=1e-5, rtol=1e-4)


@EVERY_ARCHITECTURE
def test_the_clean_run_in_itself_changes_no_bit(model: HookedMoE) -> None:
    clean, _ = random_pair()
    for metric in (METRIC, difference_at_end(None)):
        patches = get_act_patch_expert(model, clean, clean, metric)
        assert (patches.values[patches.expert_index >= 0] == 0).all()
        assert (patches.total == 0).all()
        assert torch.equal(patches.clean_active, patches.corrupt_active)


def test_patches_at_the_end_of_a_run_with_one_change_are_removals_of_what_was_added() -> None:
    """Against `expert_effects`: a clean run in which an expert writes nothing, by the model's own weights."""
    model, (tokens, _) = random_model(), random_pair()
    other = random_model()
    with torch.no_grad():
        other.blocks[2].mlp.experts.W_out[3] = 0
        silent = other.run_with_cache(tokens)[1]
    patches = get_act_patch_expert(model, tokens, silent, LogitDifference(5, 9), [2])
    removals = expert_effects(model, tokens, [2], readouts=[LogitDifference(5, 9)])
    own = (patches.expert_index == 3) & patches.values.isfinite()
    assert own.any()
    assert (patches.values[~own & (patches.expert_index >= 0)] == 0).all()
    torch.testing.assert_close(
        patches.values[own], removals.readouts["logit_difference"][removals.expert_index == 3], atol=LOGITS, rtol=1e-4
    )


@pytest.mark.parametrize("case", ["olmoe-all-at-once", "qwen2_moe-all-at-once", "qwen3_moe-all-at-once", "mixtral-all-at-once",
                                  "deepseek_v2-all-at-once"])  # fmt: skip
def test_every_family_is_patched(case: str, tmp_path: Path) -> None:
    model = HookedMoE.from_pretrained(save(tiny(case), tmp_path / "model"))
    _, corrupt = random_pair()
    mask = MASKS["left"]
    clean_cache, corrupt_cache = caches(model, mask)
    patches = get_act_patch_expert(model, corrupt, clean_cache, METRIC, attention_mask=mask)
    baseline = by_forward(model, mask, [])
    layer = model.cfg.moe_layers[-1]
    for batch, pos, slot in [(0, 6, 0), (0, 4, 1), (1, 0, 0), (1, 4, 2), (1, 6, 4)]:
        expert = int(patches.expert_index[-1, batch, pos, slot])
        delta = part_by_definition(model, clean_cache, corrupt_cache, (layer, batch, pos), expert, "contribution")
        forward = by_forward(model, mask, [added(layer, batch, pos, delta)])
        torch.testing.assert_close(patches.values[-1, batch, pos, slot], (forward - baseline)[batch], atol=LOGITS, rtol=1e-4)


# Routers


ROUTING = {"logits": ("router_logits",), "indices": ("expert_indices",), "weights": ("expert_weights",)}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("padding", ["none", "holes"])
@EVERY_ARCHITECTURE
def test_patches_of_routers_equal_the_hooks_that_make_them(padding: str, model: HookedMoE) -> None:
    mask, (_, corrupt) = MASKS[padding], random_pair()
    clean_cache, _ = caches(model, mask)
    baseline = by_forward(model, mask, [])
    real = torch.ones_like(corrupt) if mask is None else mask

    def patched(layer: int, batch: int, pos: int, names: tuple[str, ...]) -> Tensor:
        def put(x: Tensor, hook: Any) -> Tensor:
            x[batch, pos] = clean_cache[hook.name][batch, pos]
            return x

        return by_forward(model, mask, [(f"blocks.{layer}.mlp.hook_{name}", put) for name in names])

    for what, names in ROUTING.items():
        patches = get_act_patch_router(model, corrupt, clean_cache, METRIC, what, attention_mask=mask)
        for number, (batch, pos) in enumerate(real.nonzero().tolist()[::4]):
            index = number % len(patches.layers)
            forward = patched(patches.layers[index], batch, pos, names)
            torch.testing.assert_close(patches.values[index, batch, pos], (forward - baseline)[batch], atol=LOGITS, rtol=1e-4)
            if what == "logits":
                both = patched(patches.layers[index], batch, pos, ("expert_indices", "expert_weights"))
                torch.testing.assert_close(both[batch], forward[batch], atol=LOGITS, rtol=1e-4)
        assert torch.equal(patches.values.isnan(), (real == 0).expand_as(patches.values))
        assert (get_act_patch_router(model, corrupt, corrupt, METRIC, what).values == 0).all()


@pytest.mark.usefixtures("unchecked")
@EVERY_ARCHITECTURE
def test_slopes_of_router_logits_are_finite_differences_and_swaps_are_rerouted_removals(architecture: str) -> None:
    model, (clean, corrupt) = random_model(architecture, dtype=torch.float64), random_pair()
    clean_cache, corrupt_cache = caches(model, None)
    found = router_attribution(model, clean, corrupt, METRIC)
    layer, step = model.cfg.moe_layers[0], 1e-6
    name = f"blocks.{layer}.mlp.hook_router_logits"
    change = clean_cache[name] - corrupt_cache[name]
    baseline = by_forward(model, None, [])
    for batch, pos in [(0, 6), (1, 4)]:
        for expert in range(6):

            def nudge(x: Tensor, hook: Any, at: tuple[int, int, int] = (batch, pos, expert)) -> Tensor:
                return x + step * torch.zeros_like(x).index_put(tuple(map(torch.tensor, at)), torch.ones((), dtype=x.dtype))

            slope = (by_forward(model, None, [(name, nudge)]) - baseline)[batch] / step
            torch.testing.assert_close(
                found.soft[0, batch, pos, expert], slope * change[batch, pos, expert], atol=1e-5, rtol=1e-3
            )
    removed = expert_effects(model, corrupt, removal="reroute", readouts=[METRIC])
    last = torch.stack([last_of_selection(model, corrupt_cache, layer) for layer in model.cfg.moe_layers])
    assert (last == 2).all() != model.cfg.selection_bias  # else the last is that with the lowest weight
    by_slot = removed.readouts[METRIC.name]
    torch.testing.assert_close(found.hard, by_slot.gather(-1, last[..., None])[..., 0], atol=1e-9, rtol=1e-7)


def last_of_selection(model: HookedMoE, cache: ActivationCache, layer: int) -> Tensor:
    """The slot of each token's expert that the selection had nearest to leave out."""
    logits, indices = cache["router_logits", layer], cache["expert_indices", layer]
    choice = logits.sigmoid() if model.cfg.router_score == "sigmoid" else logits.softmax(-1)
    if model.cfg.selection_bias:
        choice = choice + model.blocks[layer].mlp.router.b_selection
    return choice.gather(-1, indices).argmin(-1)


# Results


def assert_same_table(found: Any, expected: Any) -> None:
    """nan where it has nan."""
    assert found.to_dataframe().equals(expected.to_dataframe())
    assert found.metadata() == expected.metadata()


def test_results_are_tables_files_and_pictures(tmp_path: Path) -> None:
    model, (clean, corrupt) = random_model("deepseek"), random_pair()
    patches = get_act_patch_expert(model, corrupt, clean, METRIC, positions=[4, 6])
    patches.save(tmp_path / "patches.parquet")
    again = ExpertPatches.load(tmp_path / "patches.parquet")
    assert_same_table(again, patches)
    assert torch.equal(again.dense().nan_to_num(9.0), patches.dense().nan_to_num(9.0))
    assert repr(patches) == (
        "ExpertPatches(exact, contribution, logit_difference@-1: 2 layer x 2 batch x 7 pos x "
        f"{patches.values.shape[-1]} slot: expert_index, values, clean_active, corrupt_active and 1 more)"
    )
    assert patches.plot() is not None
    table = patches.to_dataframe()
    assert {"layer", "batch", "pos", "slot", "expert_index", "values", "clean_active"} <= set(table.columns)
    torch.testing.assert_close(patches.restored()[..., 0], patches.values[..., 0] / patches.total, equal_nan=True)
    for result in (get_act_patch_router(model, corrupt, clean, METRIC), router_attribution(model, clean, corrupt, METRIC)):
        result.save(tmp_path / "result.parquet")
        assert_same_table(type(result).load(tmp_path / "result.parquet"), result)
        assert isinstance(result, TokenPatches | RouterAttribution)


def test_a_slot_for_every_expert_is_the_same_in_another_form() -> None:
    model, (clean, corrupt) = random_model(), random_pair()
    sparse, dense = (
        get_act_patch_expert(model, corrupt, clean, METRIC, positions=[1, 4], dense=dense) for dense in (False, True)
    )
    assert dense.values.shape == (3, 2, 7, 6)
    assert (dense.values[:, :, 0].isnan()).all()
    for where in (sparse.expert_index >= 0).nonzero().tolist():
        if where[2] in (1, 4):
            expert = sparse.expert_index[tuple(where)]
            assert dense.values[(*where[:3], expert)] == sparse.values[tuple(where)]
            assert dense.clean_active[(*where[:3], expert)] == sparse.clean_active[tuple(where)]
    inactive = ~(dense.clean_active | dense.corrupt_active)
    assert (dense.values[:, :, [1, 4]][inactive[:, :, [1, 4]]] == 0).all()
    low, high = sparse.bootstrap_ci(n_resamples=200)
    same = dense.bootstrap_ci(n_resamples=200)
    assert torch.equal(low.nan_to_num(9.0), same[0].nan_to_num(9.0))
    rows = dense.values[:, :, 4].sort(1).values
    assert torch.equal(low[:, 4], rows[:, 0])  # of two rows, a quarter of the resamples have the lower one twice
    assert torch.equal(high[:, 4], rows[:, 1])


Refused = Callable[[HookedMoE, Tensor, Tensor], Any]
REFUSALS: dict[str, tuple[Refused, str]] = {
    "other lengths": (lambda m, c, k: get_act_patch_expert(m, k, c[:, :5], METRIC), "must have the same lengths"),
    "a cache of other lengths": (
        lambda m, c, k: get_act_patch_expert(m, k, m.run_with_cache(c[:, :5])[1], METRIC),
        r"cache is of \[2, 5\] tokens, and the corrupted prompts are of \[2, 7\]",
    ),
    "a cache without experts": (
        lambda m, c, k: get_act_patch_expert(m, k, m.run_with_cache(c, names_filter=lambda n: "resid" in n)[1], METRIC),
        "unknown activation 'blocks.0.mlp.hook_expert_indices'",
    ),
    "unknown layer": (lambda m, c, k: get_act_patch_expert(m, k, c, METRIC, [3]), "layer 3 is out of range"),
    "unknown position": (lambda m, c, k: get_act_patch_expert(m, k, c, METRIC, None, [7]), "position 7 is out of range"),
    "unknown part": (lambda m, c, k: get_act_patch_expert(m, k, c, METRIC, part="output"), "part must be one of"),
    "unknown routing": (lambda m, c, k: get_act_patch_router(m, k, c, METRIC, "probs"), "what must be one of"),
    "no metric": (lambda m, c, k: get_act_patch_expert(m, k, c, "loss"), "metric must be a function of the logits, or a readout"),
    "a class": (lambda m, c, k: get_act_patch_expert(m, k, c, KL), "metric must be a function of the logits, or a readout"),
    "one number for two rows": (lambda m, c, k: get_act_patch_expert(m, k, c, lambda x: x.mean()), r"returned \[\] for 2 rows"),
    "unknown token": (lambda m, c, k: get_act_patch_expert(m, k, c, At(-1, LogitDifference(1, 99))), "99 is out of range"),
    "slopes of a divergence": (lambda m, c, k: router_attribution(m, c, k, At(-1, KL())), "slope at the corrupted run is zero"),
    "hooks": (lambda m, c, k: hooked(m, c, k), "has hooks"),
}


def hooked(model: HookedMoE, clean: Tensor, corrupt: Tensor) -> Any:
    with model.hooks([("blocks.1.attn.hook_z", lambda x, hook: 0 * x)]):
        return get_act_patch_expert(model, corrupt, clean, METRIC)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_cannot_be_patched_is_refused_by_name(refusal: str) -> None:
    run, message = REFUSALS[refusal]
    with pytest.raises(ValueError, match=message):
        run(random_model(), *random_pair())


def test_a_cache_may_hold_only_what_is_needed() -> None:
    model, (clean, corrupt) = random_model("qwen"), random_pair()
    _, cache = model.run_with_cache(clean, names_filter=expert_activations)
    found, expected = (get_act_patch_expert(model, corrupt, run, METRIC, part="content") for run in (cache, clean))
    assert torch.equal(found.values.nan_to_num(9.0), expected.values.nan_to_num(9.0))


@pytest.mark.usefixtures("unchecked")
def test_patches_of_a_streamed_model_within_a_budget_are_the_same() -> None:
    in_memory, streamed = (
        get_act_patch_expert(
            HookedMoE.from_pretrained("tiny-olmoe", stream=stream),
            "the history of",
            "the children of",
            At(-1, LogitDifference(" Israel", " the")),
            memory_budget=budget,
        )
        for stream, budget in ((False, None), (True, "200MB"))
    )
    torch.testing.assert_close(streamed.values, in_memory.values, atol=1e-5, rtol=1e-5, equal_nan=True)
    assert torch.equal(streamed.expert_index, in_memory.expert_index)
