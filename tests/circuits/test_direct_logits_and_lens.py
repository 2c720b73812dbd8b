"""Direct attribution and lenses by their definitions, from caches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_moe import HookedMoE
from hooked_moe.circuits import (
    ExpertLens,
    ExpertVocabulary,
    LogitAttribution,
    attribution_patch_experts,
    direct_logit_attribution,
    expert_lens,
    expert_vocabulary,
    get_act_patch_expert,
)
from hooked_moe.counterfactuals import At, LogitDifference
from hooked_moe.counterfactuals.means import expert_means
from tests.conftest import EVERY_ARCHITECTURE, random_model
from tests.support.prompt_pairs import FIRST, MASKS, METRIC, SECOND, difference_at_end, last_tokens, random_pair, word_pairs

PADDED = pytest.mark.parametrize("padding", MASKS)


@PADDED
@EVERY_ARCHITECTURE
def test_components_add_up_to_the_logit_difference(padding: str, model: HookedMoE) -> None:
    mask, (tokens, _) = MASKS[padding], random_pair()
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens, attention_mask=mask)
    found = direct_logit_attribution(model, cache, FIRST, SECOND, mask)
    of_tokens = direct_logit_attribution(model, tokens, FIRST, SECOND, mask)
    assert torch.equal(found.values.nan_to_num(9.0), of_tokens.values.nan_to_num(9.0))
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    rows = torch.arange(2)[:, None]
    expected = logits[rows, torch.arange(7), FIRST[:, None]] - logits[rows, torch.arange(7), SECOND[:, None]]
    torch.testing.assert_close(found.values.sum(0)[real], expected[real], atol=1e-5, rtol=1e-5)
    assert found.values[:, ~real].isnan().all()
    single = direct_logit_attribution(model, cache, 3, attention_mask=mask)
    torch.testing.assert_close(single.values.sum(0)[real], logits[real][:, 3], atol=1e-5, rtol=1e-5)


@EVERY_ARCHITECTURE
def test_each_component_is_what_it_writes_through_the_frozen_norm(model: HookedMoE) -> None:
    """Block sums too, which are TransformerLens's components."""
    tokens, _ = random_pair()
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        found = direct_logit_attribution(model, cache, 3, 17)
        direction = (model.unembed.W_U[3] - model.unembed.W_U[17]) * model.ln_final.w / cache["ln_final.hook_scale"]

        def along(x: Tensor) -> Tensor:
            return (x * direction).sum(-1)

        by_name = dict(zip(found.components, found.values, strict=True))
        torch.testing.assert_close(by_name["embed"], along(cache["hook_embed"]), atol=1e-5, rtol=1e-4)
        for layer in range(3):
            heads = [by_name[f"L{layer}H{head}"] for head in range(4)]
            for head in range(4):
                written = cache[f"blocks.{layer}.attn.hook_z"][..., head, :] @ model.blocks[layer].attn.W_O[:, head].T
                torch.testing.assert_close(heads[head], along(written), atol=1e-5, rtol=1e-4)
            bias = by_name.get(f"L{layer}bias", torch.zeros(()))
            attention = along(cache[f"blocks.{layer}.hook_attn_out"])
            torch.testing.assert_close(sum(heads, bias), attention, atol=1e-5, rtol=1e-4)
            kinds = (found.layer == layer) & (found.kind >= 2) & (found.kind <= 4)
            torch.testing.assert_close(
                found.values[kinds].sum(0), along(cache[f"blocks.{layer}.hook_mlp_out"]), atol=1e-5, rtol=1e-4
            )
        layer = model.cfg.moe_layers[-1]
        prefix = f"blocks.{layer}.mlp.hook_expert_"
        for slot in range(3):
            expert = int(cache[prefix + "indices"][1, 5, slot])
            written = cache[prefix + "weights"][1, 5, slot] * cache[prefix + "out"][1, 5, slot]
            expected = (written * direction[1, 5]).sum()
            torch.testing.assert_close(by_name[f"L{layer}E{expert}"][1, 5], expected, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found.experts()[-1, 1, 5, expert], expected, atol=1e-5, rtol=1e-4)
        inactive = set(range(6)) - set(cache[prefix + "indices"][1, 5].tolist())
        assert all(by_name[f"L{layer}E{expert}"][1, 5] == 0 for expert in inactive)
    assert found.heads().shape == (3, 2, 7, 4)


def test_the_largest_components_come_first_and_files_keep_them(tmp_path: Path) -> None:
    model, (tokens, _) = random_model("qwen"), random_pair()
    found = direct_logit_attribution(model, tokens, 3, 17)
    top = found.top(4)
    means = found.values[:, :, -1].mean(-1)
    assert [abs(value) for _, value in top] == sorted((abs(value) for _, value in top), reverse=True)
    assert abs(top[0][1]) == means.abs().max()
    found.save(tmp_path / "found.parquet")
    again = LogitAttribution.load(tmp_path / "found.parquet")
    assert again.components == found.components
    assert torch.equal(again.values, found.values)
    assert found.plot() is not None
    assert found.plot(across="head") is not None


def test_the_direct_part_of_a_patch_is_the_attribution_of_its_difference() -> None:
    """In the last layer, where nothing else follows, it is the patch but for the final norm's scale."""
    model, (clean, corrupt) = random_model(), random_pair()
    direct = attribution_patch_experts(model, clean, corrupt, METRIC, "direct")
    by_run = [direct_logit_attribution(model, tokens, FIRST, SECOND).experts()[..., -1, :] for tokens in (clean, corrupt)]
    dense = direct.dense()
    assert (dense[:, :, :-1] == 0).all()
    scales = [model.run_with_cache(tokens)[1]["ln_final.hook_scale"][None, :, -1] for tokens in (clean, corrupt)]
    expected = by_run[0] * scales[0] / scales[1] - by_run[1]  # both through the corrupted run's norm
    torch.testing.assert_close(dense[:, :, -1], expected.detach(), atol=1e-5, rtol=1e-4)
    exact = get_act_patch_expert(model, corrupt, clean, METRIC, [2], [6])
    own = exact.values[0, :, 6].isfinite()
    torch.testing.assert_close(direct.values[2, :, 6, : own.shape[-1]][own], exact.values[0, :, 6][own], atol=0.25, rtol=0.25)


@pytest.mark.usefixtures("unchecked")
def test_direct_effects_of_a_trained_model_are_close_to_patches_in_late_layers_only() -> None:
    pairs = word_pairs()
    where = {"positions": [pairs.clean.shape[1] - 1]}
    exact = get_act_patch_expert(pairs.model, pairs.corrupt, pairs.clean, pairs.metric, **where)
    found = attribution_patch_experts(pairs.model, pairs.clean, pairs.corrupt, pairs.metric, "direct", **where)
    own = exact.values.isfinite()
    r = [float(torch.corrcoef(torch.stack((found.values[i][own[i]], exact.values[i][own[i]])))[0, 1]) for i in range(6)]
    assert min(r[4:]) > 0.9
    assert min(r) < 0.8


# Lenses


@PADDED
@EVERY_ARCHITECTURE
def test_the_lens_follows_the_stream_through_a_block(padding: str, model: HookedMoE) -> None:
    mask, (tokens, _) = MASKS[padding], random_pair()
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens, attention_mask=mask)
    last = last_tokens(mask)
    for layer in model.cfg.moe_layers:
        found = expert_lens(model, cache, layer, attention_mask=mask)
        prefix = f"blocks.{layer}."
        for batch, pos in enumerate(last):
            stream = cache[prefix + "hook_resid_mid"][batch, pos]
            with torch.no_grad():
                for step in range(5):
                    if 0 < step < 4:
                        slot = (batch, pos, step - 1)
                        written = cache[prefix + "mlp.hook_expert_weights"][slot] * cache[prefix + "mlp.hook_expert_out"][slot]
                        stream = stream + written
                        assert found.expert_index[batch, step] == cache[prefix + "mlp.hook_expert_indices"][slot]
                        torch.testing.assert_close(found.own[batch, step], model.logits(written[None, None])[0, 0])
                    if step == 4:
                        stream = cache[prefix + "hook_resid_post"][batch, pos]
                    torch.testing.assert_close(
                        found.logits[batch, step], model.logits(stream[None, None])[0, 0], atol=1e-5, rtol=1e-4
                    )
        if layer == model.cfg.n_layers - 1:
            expected = torch.stack([logits[batch, pos] for batch, pos in enumerate(last)])
            torch.testing.assert_close(found.logits[:, -1], expected, atol=1e-6, rtol=1e-6)
            assert torch.equal(found.top(3)[:, -1], expected.topk(3).indices)
    assert found.steps == ["before", "slot 0", "slot 1", "slot 2", "after"]
    assert found.own[:, [0, -1]].isnan().all()


def test_the_vocabulary_of_an_expert_is_that_of_its_neurons(tmp_path: Path) -> None:
    model, reference = random_model("deepseek"), torch.randint(0, 61, (4, 20), generator=torch.Generator().manual_seed(1))
    found = expert_vocabulary(model, 2, 4, 7, reference)
    assert found.rows == ["mean", *(f"neuron {neuron}" for neuron in range(12))]
    mean = expert_means(model, reference)[2][4]
    with torch.no_grad():
        columns = [mean, *model.blocks[2].mlp.experts.W_out[4].T]
        for row, column in enumerate(columns):
            logits = model.unembed(column[None, None] * model.ln_final.w)[0, 0]
            torch.testing.assert_close(found.logit[row], logits.topk(7).values, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(logits[found.token[row]], found.logit[row], atol=1e-5, rtol=1e-5)
    found.save(tmp_path / "vocabulary.parquet")
    assert ExpertVocabulary.load(tmp_path / "vocabulary.parquet").rows == found.rows
    lens = expert_lens(model, reference[:2], 2)
    lens.save(tmp_path / "lens.parquet")
    assert torch.equal(ExpertLens.load(tmp_path / "lens.parquet").logits, lens.logits)


def test_a_planted_writer_is_found_by_every_tool() -> None:
    """An expert that writes the difference of two rows of the unembedding: its direct effect, its vocabulary, its patch."""
    model, (clean, _) = random_model(), random_pair()
    layer, pos = 2, 6
    others = clean[:1].repeat(61, 1)
    others[:, pos] = torch.arange(61)
    _, cache = model.run_with_cache(torch.cat((clean[:1], others)))
    experts = cache[f"blocks.{layer}.mlp.hook_expert_indices"][:, pos]
    elsewhere = (experts[1:, None] != experts[0][:, None]).all(-1)  # which last tokens do not go to each of the clean run's
    slot = int(elsewhere.any(0).nonzero()[0, 0])
    expert, corrupt = int(experts[0, slot]), others[elsewhere[:, slot]][:1]
    direction = (model.unembed.W_U[3] - model.unembed.W_U[17]) / model.ln_final.w
    with torch.no_grad():
        model.blocks[layer].mlp.experts.W_out[expert] += (
            3 * direction[:, None] * torch.sign(cache[f"blocks.{layer}.mlp.hook_expert_post"][0, pos, slot])
        )
    found = direct_logit_attribution(model, clean[:1], 3, 17)
    assert found.top(1)[0][0] == f"L{layer}E{expert}"
    vocabulary = expert_vocabulary(model, layer, expert, 1, clean[:1])
    assert int(vocabulary.token[0, 0]) == 3
    patches = get_act_patch_expert(model, corrupt, clean[:1], At(-1, LogitDifference(3, 17)))
    values = patches.values[:, 0].nan_to_num(-9.0)
    index, at, slot = (int(x) for x in torch.unravel_index(values.argmax(), values.shape))
    assert (patches.layers[index], at, int(patches.expert_index[index, 0, at, slot])) == (layer, pos, expert)
    for method in ("atp", "ig", "direct"):
        estimate = attribution_patch_experts(model, clean[:1], corrupt, At(-1, LogitDifference(3, 17)), method)
        assert int(estimate.values.nan_to_num(-9.0).argmax()) == int(values.argmax())


REFUSALS: dict[str, tuple[Callable[[HookedMoE, Tensor], Any], str]] = {
    "unknown token": (lambda m, t: direct_logit_attribution(m, t, 99), "token id 99 is out of range"),
    "tokens of other rows": (lambda m, t: direct_logit_attribution(m, t, [1, 2, 3]), "has 3 tokens for 2 batch rows"),
    "mask of another run": (
        lambda m, t: direct_logit_attribution(m, m.run_with_cache(t)[1], 3, attention_mask=torch.ones(2, 6)),
        r"attention_mask has shape \[2, 6\]",
    ),
    "a model with hooks": (lambda m, t: hooked_attribution(m, t), "hook_shared_out has hooks"),
    "a dense layer": (lambda m, t: expert_lens(m, t, 0), "layer 0 is dense"),
    "no such layer": (lambda m, t: expert_vocabulary(m, 3, 0), "layer 3 is out of range"),
    "no such expert": (lambda m, t: expert_vocabulary(m, 1, 6), "expert 6 is out of range: layer 1 has experts 0 to 5"),
    "no such position": (lambda m, t: expert_lens(m, t, 1, 7), "position 7 cannot be read"),
    "half a layer": (lambda m, t: expert_lens(m, t, 1.5), "layers must be whole numbers"),
    "an expert without tokens": (lambda m, t: unused_expert(m, t), "no token of the reference goes to expert"),
    "direct effects of a function": (
        lambda m, t: attribution_patch_experts(m, t, t, difference_at_end(None), "direct"),
        "method='direct' takes At",
    ),
}


def unused_expert(model: HookedMoE, tokens: Tensor) -> Any:
    _, cache = model.run_with_cache(tokens[:1, :1])
    unused = set(range(6)) - set(cache["blocks.1.mlp.hook_expert_indices"].flatten().tolist())
    return expert_vocabulary(model, 1, unused.pop(), reference=tokens[:1, :1])


def hooked_attribution(model: HookedMoE, tokens: Tensor) -> Any:
    _, cache = model.run_with_cache(tokens)
    with model.hooks(fwd_hooks=[("blocks.1.mlp.hook_shared_out", lambda x, hook: 2 * x)]):
        return direct_logit_attribution(model, cache, 3)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_cannot_be_read_is_refused_by_name(refusal: str) -> None:
    run, message = REFUSALS[refusal]
    with pytest.raises(ValueError, match=message):
        run(random_model("deepseek"), random_pair()[0])
