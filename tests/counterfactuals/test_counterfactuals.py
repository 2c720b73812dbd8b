"""Every fast counterfactual against full forward passes: transformers' for removals, our own masked ones for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hooked_moe.counterfactuals.engine.chunks as chunks
from hooked_moe import ExpertMask, HookedMoE
from hooked_moe.counterfactuals import expert_effects, expert_observations, mask_effects, progressive_effects
from hooked_moe.counterfactuals.engine.memory import demand_of
from hooked_moe.counterfactuals.first_order import first_order_effects
from hooked_moe.counterfactuals.means import expert_means
from hooked_moe.counterfactuals.readouts import KL
from hooked_moe.counterfactuals.results import ExpertEffects
from hooked_moe.kernels import prefix_attention
from hooked_moe.kernels.cpu import prefix_attention as on_cpu
from tests.conftest import ARCHITECTURES, EVERY_ARCHITECTURE, random_model, without_type_checks
from tests.support.hf_models import OPTIONS, random_tokens, save, tiny
from tests.support.number_text import number_reader

NATS = 1e-5

PADDING = {
    "none": None,
    "right": torch.tensor([[1] * 11, [1] * 7 + [0] * 4]),
    "left": torch.tensor([[0] * 3 + [1] * 8, [1] * 11]),
    "both": torch.tensor([[0] * 2 + [1] * 6 + [0] * 3, [1] * 9 + [0] * 2]),
    "holes": torch.tensor([[1] * 4 + [0] + [1] * 6, [0] + [1] * 2 + [0] * 2 + [1] * 6]),
}


@pytest.mark.parametrize(
    "case",
    [
        *(f"olmoe-{option}" for option in OPTIONS),
        "qwen2_moe-plain",
        "qwen2_moe-dense-layers-by-list",
        "qwen2_moe-all-at-once",
        "deepseek_v2-plain",
        "deepseek_v2-group-limited",
        "deepseek_v2-all-at-once",
        "qwen3_moe-all-at-once",
        "mixtral-all-at-once",
        "deepseek_v3-groups",
        "glm4_moe-all-at-once",
        "glm4_moe_lite-plain",
        "gpt_oss-plain",
        "gpt_oss-all-at-once",
    ],
)
def test_removals_equal_transformers_with_the_routing_weight_zeroed(case: str, tmp_path: Path) -> None:
    reference = tiny(case)
    model = HookedMoE.from_pretrained(save(reference, tmp_path / "model"))
    tokens = random_tokens(batch=2, pos=14)
    effects = expert_effects(model, tokens)
    clean = reference_loss(reference, tokens)
    torch.testing.assert_close(effects.baseline_loss[:, :-1], clean, atol=2e-6, rtol=0)
    for index, layer in enumerate(effects.layers):
        for batch, pos in [(0, 0), (1, 0), (0, 6), (1, 12), (0, 12)]:
            for slot in range(model.cfg.experts_per_token):
                expert = int(effects.expert_index[index, batch, pos, slot])
                with removed_in_transformers(reference, layer, batch * 14 + pos, expert):
                    delta = (reference_loss(reference, tokens) - clean)[batch, pos]
                assert abs(delta - effects.delta_loss[index, batch, pos, slot]) < NATS


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("scope", ["position", "sequence"])
@pytest.mark.parametrize("removal", ["zero", "renormalize", "reroute"])
@EVERY_ARCHITECTURE
def test_every_mode_equals_a_masked_forward_per_removal(removal: Any, scope: Any, padding: str, model: HookedMoE) -> None:
    tokens, mask = some_tokens(), PADDING[padding]
    effects = expert_effects(model, tokens, scope=scope, removal=removal, attention_mask=mask)
    assert_equals_masked_forwards(model, tokens, effects, scope, removal, mask)


@st.composite
def architectures(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `random_model`: any attention with any experts, and dense layers anywhere."""
    attention: dict[str, dict[str, list[Any]]] = {
        "olmoe": {"n_key_value_heads": [1, 2, 4], "qk_norm": ["full", None]},
        "qwen": {"n_key_value_heads": [1, 2, 4], "qkv_bias": [True, False]},
        "deepseek": {
            "d_value": [10, 14, 17],  # narrower than keys, as wide, wider
            "d_rotary": [2, 8],
            "q_lora_rank": [None, 5],
            "rotary_scaling": [None, ARCHITECTURES["deepseek"]["rotary_scaling"]],
        },
        "gpt-oss": {"n_key_value_heads": [1, 2, 4], "attention_sink": [True, False], "d_rotary": [None, 4]},
    }
    architecture = draw(st.sampled_from(list(attention)))
    options = {name: draw(st.sampled_from(values)) for name, values in attention[architecture].items()}
    groups, group_size = draw(st.sampled_from([(1, 1), (1, 4), (1, 9), (2, 2), (3, 3)]))
    groups_per_token = draw(st.integers(1, groups))
    n_layers = draw(st.integers(1, 4))
    dense_layers = tuple(sorted(draw(st.sets(st.integers(0, n_layers - 1), max_size=n_layers - 1))))
    d_shared = draw(st.sampled_from([None, 5]))
    windowed_layers = tuple(sorted(draw(st.sets(st.integers(0, n_layers - 1)))))
    return options | {
        "windowed_layers": windowed_layers,
        "sliding_window": draw(st.integers(1, 5)) if windowed_layers else None,
        "router_score": draw(st.sampled_from(["softmax", "sigmoid"])),
        "selection_bias": draw(st.booleans()),
        "group_score": draw(st.sampled_from(["max", "top2"])) if groups == 1 or group_size > 1 else "max",
        "architecture": architecture,
        "n_layers": n_layers,
        "dense_layers": dense_layers,
        "d_mlp": 7 if dense_layers else None,
        "num_experts": groups * group_size,
        "n_expert_groups": groups,
        "groups_per_token": groups_per_token,
        "experts_per_token": draw(st.integers(1, groups_per_token * group_size)),
        "d_expert": draw(st.sampled_from([3, 8])),
        "norm_topk_prob": draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 1.7])),
        "d_shared": d_shared,
        "shared_gate": d_shared is not None and draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
    }


@given(architecture=architectures(), length=st.integers(2, 9), seed=st.integers(0, 1000), data=st.data())
@settings(max_examples=50, deadline=None)
def test_random_models_lengths_and_padding(architecture: dict[str, Any], length: int, seed: int, data: st.DataObject) -> None:
    model = random_model(**architecture)
    tokens = torch.randint(0, 61, (2, length), generator=torch.Generator().manual_seed(seed))
    rows = [data.draw(st.tuples(st.integers(0, length - 1), st.integers(0, length - 1))) for _ in range(2)]
    mask = torch.tensor([[int(min(row) <= pos <= max(row)) for pos in range(length)] for row in rows])
    positions = sorted(data.draw(st.sets(st.integers(0, length - 1), min_size=1)))
    scope = data.draw(st.sampled_from(["position", "sequence"]))
    removal = data.draw(st.sampled_from(["zero", "renormalize", "reroute"]))
    asked = torch.zeros(2, length, dtype=torch.bool)
    asked[:, positions] = True
    if not (asked & mask.bool()).any():
        return
    effects = expert_effects(model, tokens, scope=scope, removal=removal, positions=positions, attention_mask=mask)
    assert_equals_masked_forwards(model, tokens, effects, scope, removal, mask, asked)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("starts", [None, torch.tensor([[0, 3], [4, 1]])], ids=["all", "some"])
@pytest.mark.parametrize("d_value", [3, 8, 11], ids=["narrow", "as wide", "wide"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "spelled out"])
def test_attention_of_variants_is_the_softmax_over_what_came_before_and_their_own(
    fused: bool, d_value: int, starts: Tensor | None, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = 5 if starts is None else 2
    q, own_k = (torch.randn(3, 2, queries * width, heads, 8, generator=generator) for heads in (4, 2))
    own_v = torch.randn(*own_k.shape[:-1], d_value, generator=generator)
    keys, values = (torch.randn(2, 5, 2, size, generator=generator) for size in (8, d_value))
    if not fused:
        monkeypatch.setattr(on_cpu, "_FUSED_DTYPES", ())
    mixed = prefix_attention.window_attention(q, own_k, own_v, keys, values, starts, width, scale=0.3)
    assert mixed.shape == (*q.shape[:-1], d_value)
    for variant, batch, token, head in torch.cartesian_prod(*map(torch.arange, q.shape[:-1])).tolist():
        query, kv_head = token // width, head // 2
        before = query if starts is None else int(starts[batch, query])
        window = slice(query * width, token + 1)
        k = torch.cat((keys[batch, :before, kv_head], own_k[variant, batch, window, kv_head]))
        v = torch.cat((values[batch, :before, kv_head], own_v[variant, batch, window, kv_head]))
        expected = (0.3 * k @ q[variant, batch, token, head]).softmax(0) @ v
        torch.testing.assert_close(mixed[variant, batch, token, head], expected, atol=1e-5, rtol=1e-5)


@EVERY_ARCHITECTURE
def test_chunks_of_memory_and_of_tokens_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch, model: HookedMoE) -> None:
    tokens = some_tokens()
    whole = expert_effects(model, tokens)
    monkeypatch.setattr(chunks, "VARIANT_TOKENS_PER_CHUNK", 3)
    demand = demand_of(model.cfg, 11)
    budget = demand.fixed + demand.row + 3 * 11 * demand.variant_token  # one layer of one row
    for scope in ("position", "sequence"):
        parts = expert_effects(model, tokens, scope=scope, memory_budget=budget)
        expected = whole if scope == "position" else expert_effects(model, tokens, scope=scope)
        assert torch.equal(parts.expert_index, expected.expert_index)
        torch.testing.assert_close(parts.delta_loss, expected.delta_loss, atol=2e-6, rtol=0, equal_nan=True)


@EVERY_ARCHITECTURE
def test_positions_are_measured_alone_or_with_all_others_alike(model: HookedMoE) -> None:
    tokens = some_tokens()
    everything = expert_effects(model, tokens)
    asked = torch.zeros(2, 11, dtype=torch.bool)
    asked[0, 4] = asked[1, 0] = asked[1, 9] = asked[1, 10] = True
    some = expert_effects(model, tokens, positions=asked)
    torch.testing.assert_close(some.delta_loss[:, asked], everything.delta_loss[:, asked], atol=2e-6, rtol=0, equal_nan=True)
    assert some.delta_loss[:, ~asked].isnan().all()
    torch.testing.assert_close(some.gap_norm, everything.gap_norm)
    by_number = expert_effects(model, tokens, positions=[4, 0])
    measured = torch.zeros(11, dtype=torch.bool)
    measured[[0, 4]] = True
    assert torch.equal(by_number.delta_loss.isnan().all(0).all(0).all(-1), ~measured)


@EVERY_ARCHITECTURE
def test_layers_are_measured_alone_or_with_all_others_alike(model: HookedMoE) -> None:
    tokens = some_tokens()
    everything = expert_effects(model, tokens)
    assert everything.layers == [layer for layer in range(3) if layer not in model.cfg.dense_layers]
    first, last = everything.layers[0], everything.layers[-1]
    some = expert_effects(model, tokens, layers=[last, first])
    assert some.layers == [first, last]
    torch.testing.assert_close(some.delta_loss, everything.delta_loss[[0, -1]], atol=2e-6, rtol=0, equal_nan=True)


@EVERY_ARCHITECTURE
def test_observations_are_those_of_the_clean_run(model: HookedMoE) -> None:
    tokens = some_tokens()
    _, cache = model.run_with_cache(tokens)
    for effects in (expert_effects(model, tokens), expert_observations(model, tokens)):
        for index, layer in enumerate(effects.layers):
            weights, outputs = cache["expert_weights", layer], cache["expert_out", layer]
            contributions = weights[..., None] * outputs
            assert torch.equal(effects.expert_index[index], cache["expert_indices", layer])
            torch.testing.assert_close(effects.routing_weight[index], weights)
            torch.testing.assert_close(effects.output_norm[index], outputs.norm(dim=-1))
            torch.testing.assert_close(effects.gap_norm[index], weights * outputs.norm(dim=-1))
            assert torch.equal(effects.max_activation[index], outputs.abs().amax(dim=-1))
            logits = cache["router_logits", layer]
            scores = logits.softmax(-1) if model.cfg.router_score == "softmax" else logits.sigmoid()
            torch.testing.assert_close(effects.router_probability[index], scores)
            for slot in range(model.cfg.experts_per_token):
                removed = contributions[:, :, slot]
                rest = cache["routed_out", layer] - removed
                cosine = (removed * rest).sum(-1) / (removed.norm(dim=-1) * rest.norm(dim=-1))
                torch.testing.assert_close(effects.rest_cosine[index, :, :, slot], cosine, atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(effects.rest_norm[index, :, :, slot], rest.norm(dim=-1), atol=1e-5, rtol=1e-4)


def test_router_probabilities_of_layers_with_fewer_experts_end_in_zeros(make_model: Callable[..., HookedMoE]) -> None:
    model = make_model()
    model.remove_experts({1: [0, 4]})
    probability = expert_observations(model, some_tokens()).router_probability
    assert probability.shape == (3, 2, 11, 6)
    assert (probability[1, ..., 4:] == 0).all()
    torch.testing.assert_close(probability.sum(-1), torch.ones(3, 2, 11))


@EVERY_ARCHITECTURE
def test_scopes_agree_in_the_last_layer_and_at_the_first_position(model: HookedMoE) -> None:
    position, sequence = (expert_effects(model, some_tokens(), scope=scope).delta_loss for scope in ("position", "sequence"))
    torch.testing.assert_close(position[-1, :, :-1], sequence[-1, :, :-1], atol=2e-6, rtol=0)
    torch.testing.assert_close(position[:, :, 0], sequence[:, :, 0], atol=2e-6, rtol=0)
    assert (position[0, :, 1:-1] - sequence[0, :, 1:-1]).abs().max() > 1e-3, "elsewhere they differ"


def test_the_last_token_of_a_row_has_no_effect_to_measure(model: HookedMoE) -> None:
    effects = expert_effects(model, some_tokens(), attention_mask=PADDING["both"])
    assert effects.delta_loss[:, 0, 7].isnan().all()
    assert effects.delta_loss[:, 0, 2:7].isfinite().all()
    assert (effects.expert_index[:, 0, 7] >= 0).all(), "but it is routed"
    assert (effects.expert_index[:, 0, [0, 1, 8]] == -1).all()
    assert effects.gap_norm[:, 1, 9:].isnan().all()
    assert effects.baseline_loss[0].isfinite().tolist() == [False] * 2 + [True] * 5 + [False] * 4


@pytest.mark.parametrize("order", ["descending", "ascending", "random"])
@pytest.mark.parametrize("removal", ["zero", "renormalize", "reroute"])
@EVERY_ARCHITECTURE
def test_progressive_removal_equals_masked_forwards(order: Any, removal: Any, model: HookedMoE) -> None:
    tokens, slots = some_tokens(), model.cfg.experts_per_token
    effects = progressive_effects(model, tokens, order=order, removal=removal, seed=3)
    removals, fast = [], []
    for index, layer in enumerate(effects.layers):
        ranks = torch.stack([random_ranks(layer, row, slots, seed=3) for row in range(2)])
        for batch, pos in [(0, 0), (1, 5), (0, 9)]:
            by_rank = {
                "descending": list(range(slots)),
                "ascending": list(range(slots))[::-1],
                "random": ranks[batch, pos].argsort().tolist(),
            }
            experts = effects.expert_index[index, batch, pos, by_rank[order]].tolist()
            removals += [Removed(layer, batch, pos, experts[: m + 1]) for m in range(slots)]
            fast.append(effects.delta_loss[index, batch, pos])
    by_forwards = effects_by_masked_forwards(model, tokens, removals, removal)
    torch.testing.assert_close(torch.cat(fast), by_forwards, atol=NATS, rtol=0)


def random_ranks(layer: int, row: int, slots: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + layer) * 1_000_003 + row)
    return torch.rand(11, slots, generator=generator).argsort(-1)


def test_random_orders_do_not_depend_on_what_is_measured_together(model: HookedMoE) -> None:
    tokens, mask = some_tokens(), PADDING["left"]
    whole = progressive_effects(model, tokens, order="random", attention_mask=mask).delta_loss
    some = progressive_effects(model, tokens, layers=[1], positions=[4, 7], order="random", attention_mask=mask).delta_loss
    torch.testing.assert_close(some[0, :, [4, 7]], whole[1, :, [4, 7]], atol=2e-6, rtol=0)


@EVERY_ARCHITECTURE
def test_removing_all_experts_is_the_block_without_its_routed_part(model: HookedMoE) -> None:
    tokens = some_tokens()
    everything = progressive_effects(model, tokens).delta_loss[..., -1]
    for index, layer in enumerate(model.cfg.moe_layers):
        for pos in (0, 4):

            def silence(activation: Tensor, hook: Any, pos: int = pos) -> Tensor:
                return activation.index_fill(1, torch.tensor(pos), 0.0)

            hooks = [(f"blocks.{layer}.mlp.hook_routed_out", silence)]
            silenced = model.run_with_hooks(tokens, return_type="loss", loss_per_token=True, fwd_hooks=hooks)
            torch.testing.assert_close(
                everything[index, :, pos], (silenced - losses_of(model, tokens))[:, pos], atol=NATS, rtol=0
            )


@EVERY_ARCHITECTURE
def test_half_precision_follows_its_own_masked_forward(architecture: str) -> None:
    model = random_model(architecture, d_expert=16, n_layers=2, dtype=torch.bfloat16)
    tokens = some_tokens()
    effects = expert_effects(model, tokens)
    assert effects.delta_loss.dtype == torch.float32
    measured, removals = every_removal(effects)
    by_forwards = effects_by_masked_forwards(model, tokens, removals)
    assert (effects.delta_loss[measured] - by_forwards).abs().median() < 2e-2


def test_a_lookup_by_expert_refuses_experts_that_are_not_routed(model: HookedMoE) -> None:
    effects = expert_effects(model, some_tokens(), layers=[1])
    expert = int(effects.expert_index[0, 1, 4, 2])
    found = effects.at(layer=1, batch=1, pos=4, expert=expert)
    assert found["slot"] == 2
    assert found["delta_loss"] == float(effects.delta_loss[0, 1, 4, 2])
    other = next(e for e in range(6) if e not in effects.expert_index[0, 1, 4].tolist())
    with pytest.raises(ValueError, match=rf"expert {other} is not routed at layer 1, batch 1, pos 4: the router chose"):
        effects.at(1, 1, 4, other)
    with pytest.raises(ValueError, match="expert 6 is out of range: layers have experts 0 to 5"):
        effects.at(1, 1, 4, 6)
    with pytest.raises(ValueError, match="layer 0 was not measured"):
        effects.at(0, 1, 4, expert)
    with pytest.raises(ValueError, match="out of range"):
        effects.at(1, 1, 11, expert)


@pytest.mark.parametrize("expert", [-1, 3])
def test_a_lookup_refuses_padding_and_what_was_not_asked_for(expert: int, model: HookedMoE) -> None:
    mask = torch.tensor([[1] * 11, [0] * 2 + [1] * 9])
    effects = expert_effects(model, some_tokens(), positions=[1, 4, 10], attention_mask=mask)
    with pytest.raises(ValueError, match=r"no token at batch 1, pos 1: it is padding|expert -1 is out of range"):
        effects.at(1, 1, 1, expert)
    routed = int(effects.expert_index[1, 1, 5, 0])
    for pos in (5, 10):
        with pytest.raises(ValueError, match=rf"not measured at layer 1, batch 1, pos {pos}: .*, or has no next token"):
            effects.at(1, 1, pos, int(effects.expert_index[1, 1, pos, 0]))
    with pytest.raises(ValueError, match="not measured"):
        expert_observations(model, some_tokens(), attention_mask=mask).at(1, 1, 5, routed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [3]}, "layer 3 is out of range: the model has layers 0 to 2"),
        ({"layers": []}, "no layers"),
        ({"scope": "token"}, "scope must be 'position', 'sequence' or 'from_position', not 'token'"),
        ({"removal": "median"}, "removal must be one of .* not 'median'"),
        ({"positions": [11]}, "position 11 is out of range: the rows have positions 0 to 10"),
        ({"positions": []}, "no positions"),
        ({"positions": torch.ones(2, 3, dtype=torch.bool)}, "a bool mask must be"),
        ({"positions": [True] * 11}, r"not True; .* or give a bool mask \[batch, pos\]"),
        ({"positions": torch.tensor([[3], [5]])}, "positions must be a list of whole numbers"),
        ({"positions": [0.5]}, r"positions must be whole numbers, not 0\.5; .* or give a bool mask"),
        ({"positions": slice(2)}, "positions must be a list of whole numbers, .* not slice"),
        ({"layers": 1}, r"layers must be a list of whole numbers, as in \[1\]"),
        ({"layers": np.int64(1)}, r"layers must be a list of whole numbers, as in \[1\]"),
        ({"layers": [1, 1.5]}, r"layers must be whole numbers, not 1\.5"),
        ({"layers": [1.0]}, r"layers must be whole numbers, not 1\.0"),
        ({"layers": [True]}, "layers must be whole numbers, not True"),
        ({"layers": "12"}, "layers must be a list of whole numbers, .* not '12'"),
        ({"layers": 1.5}, r"layers must be a list of whole numbers, .* not 1\.5"),
        ({"positions": "12"}, "positions must be a list of whole numbers, .* not '12'"),
        ({"attention_mask": torch.ones(2, 3)}, "attention_mask has shape"),
        ({"attention_mask": torch.tensor([[0] * 11, [1] * 11])}, "batch row 0 has no real tokens"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_requests_say_what_is_wrong(model: HookedMoE, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expert_effects(model, some_tokens(), **arguments)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "layers", [torch.tensor([1, 1]), torch.tensor([1]), np.array([1]), [np.int64(1), 1], {1}, range(1, 2), iter([1])]
)
def test_layers_may_be_any_whole_numbers(layers: Any, model: HookedMoE) -> None:
    expected, found = (expert_effects(model, some_tokens(), some) for some in ([1], layers))
    assert [(layer, type(layer)) for layer in found.layers] == [(1, int)]
    torch.testing.assert_close(found.delta_loss, expected.delta_loss, atol=0, rtol=0, equal_nan=True)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("positions", [{3, 5}, iter([3, 5]), np.array([3, 5]), range(3, 6, 2)], ids=lambda p: type(p).__name__)
def test_positions_may_be_any_whole_numbers(positions: Any, model: HookedMoE) -> None:
    effects = expert_effects(model, some_tokens(), positions=positions)
    assert effects.delta_loss[0, 0, :, 0].isfinite().nonzero().flatten().tolist() == [3, 5]


@pytest.mark.parametrize("architecture", ["deepseek"])
@pytest.mark.parametrize("measure", [expert_effects, progressive_effects, expert_observations])
def test_a_dense_layer_has_nothing_to_measure(measure: Any, model: HookedMoE) -> None:
    with pytest.raises(ValueError, match=r"layer 0 is dense: it has no experts; layers \[1, 2\] have"):
        measure(model, some_tokens(), layers=[0, 1])


RESULTS: dict[str, Callable[[HookedMoE, Tensor], Any]] = {
    "expert": lambda m, t: expert_effects(m, t, readouts=[KL()]),
    "sequence": lambda m, t: expert_effects(m, t, scope="sequence"),
    "progressive": progressive_effects,
    "observations": expert_observations,
    "masks": lambda m, t: mask_effects(m, t, {1: torch.ones(2, 1, 1, 6)}, readouts=[KL()]),
    "means": expert_means,
    "first order": first_order_effects,
}


def columns_of(found: Any) -> dict[Any, Tensor]:
    everything = dict(found if isinstance(found, dict) else vars(found))
    return {name: x for name, x in (everything | everything.pop("readouts", {})).items() if isinstance(x, Tensor)}


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside inference mode"])
@pytest.mark.parametrize("measured", RESULTS)
def test_results_may_be_written_to_and_enter_gradients(measured: str, inside: bool, model: HookedMoE) -> None:
    with torch.inference_mode(inside):
        found = RESULTS[measured](model, some_tokens())
    for tensor in columns_of(found).values():
        weight = torch.ones((), requires_grad=True)
        (weight * tensor).sum().backward()
        tensor.clamp_(min=0)


@pytest.mark.parametrize("measured", RESULTS)
def test_a_text_stands_for_its_tokens(measured: str) -> None:
    own = number_reader(random_model)
    of_tokens, of_text = (RESULTS[measured](own, of) for of in (torch.tensor([[7, 8, 9, 10]]), "7 8 9 10"))
    for name, column in columns_of(of_tokens).items():
        assert torch.equal(columns_of(of_text)[name].nan_to_num(9.0), column.nan_to_num(9.0)), name


@pytest.mark.parametrize("measured", RESULTS)
def test_what_is_measured_does_not_depend_on_autocast(measured: str, model: HookedMoE) -> None:
    expected = RESULTS[measured](model, some_tokens())
    with torch.autocast("cpu", torch.bfloat16):
        found = RESULTS[measured](model, some_tokens())
    for name, column in columns_of(expected).items():
        assert torch.equal(columns_of(found)[name].nan_to_num(9.0), column.nan_to_num(9.0)), name


def test_hooks_and_counterfactuals_do_not_mix(model: HookedMoE) -> None:
    with model.hooks([("hook_embed", lambda activation, hook: None)]), pytest.raises(ValueError, match="hook_embed has hooks"):
        expert_effects(model, some_tokens())


def test_token_ids_out_of_range_are_refused(model: HookedMoE) -> None:
    with pytest.raises(ValueError, match="token id 61 is out of range"):
        expert_effects(model, torch.tensor([[1, 61]]))


def some_tokens() -> Tensor:
    return torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@without_type_checks()
def losses_of(model: HookedMoE, tokens: Tensor, expert_mask: ExpertMask | None = None, mask: Tensor | None = None) -> Tensor:
    return model(tokens, return_type="loss", loss_per_token=True, expert_mask=expert_mask, attention_mask=mask)


class Removed(NamedTuple):
    """Experts to remove in one layer, and where: in one row, and at one of its tokens if the scope is "position"."""

    layer: int
    batch: int
    pos: int
    experts: list[int]


def effects_by_masked_forwards(
    model: HookedMoE,
    tokens: Tensor,
    removals: list[Removed],
    removal: Any = "zero",
    scope: str = "position",
    mask: Tensor | None = None,
) -> Tensor:
    """Each in a full forward of its own, a row of one batch: what it does to the loss at its position.

    Of a sequence, an expert is removed where it serves: where it does not, its group may still have been chosen for its sake.
    """
    served = {}
    if scope != "position":
        with torch.no_grad():
            _, cache = model.run_with_cache(
                tokens, attention_mask=mask, names_filter=lambda name: name.endswith("expert_indices")
            )
        served = {layer: cache["expert_indices", layer] for layer in model.cfg.moe_layers}
    rows, positions = ([getattr(r, axis) for r in removals] for axis in ("batch", "pos"))
    expert_mask = ExpertMask.ablate(
        (
            (r.layer, row, pos, expert)
            for row, r in enumerate(removals)
            for expert in r.experts
            for pos in ([r.pos] if scope == "position" else served_at(served[r.layer][r.batch], expert))
        ),
        removal,
    )
    ablated = losses_of(model, tokens[rows], expert_mask, None if mask is None else mask[rows])
    return ablated[range(len(rows)), positions] - losses_of(model, tokens, mask=mask)[rows, positions]


def served_at(indices: Tensor, expert: int) -> list[int]:
    """The positions of a row that go to an expert."""
    return (indices == expert).any(-1).nonzero().flatten().tolist()


def every_removal(effects: ExpertEffects) -> tuple[tuple[Tensor, ...], list[Removed]]:
    """Where in the table effects are, and the removals they are of."""
    measured = effects.delta_loss.isnan().logical_not().nonzero(as_tuple=True)
    indices = torch.stack((*measured[:3], effects.expert_index[measured])).T.tolist()
    return measured, [Removed(effects.layers[index], batch, pos, [expert]) for index, batch, pos, expert in indices]


def assert_equals_masked_forwards(
    model: HookedMoE,
    tokens: Tensor,
    effects: ExpertEffects,
    scope: str,
    removal: Any,
    mask: Tensor | None,
    asked: Tensor | None = None,
) -> None:
    """Every entry is that of a full forward with an `ExpertMask`, and nan just where there is no loss to read."""
    clean = losses_of(model, tokens, mask=mask)
    torch.testing.assert_close(effects.baseline_loss[:, :-1], clean, atol=2e-6, rtol=0, equal_nan=True)
    there = clean.isfinite() if asked is None else clean.isfinite() & asked[:, :-1]
    assert effects.layers == model.cfg.moe_layers
    assert (effects.delta_loss[:, :, :-1].isfinite() == there[None, :, :, None]).all()
    assert effects.delta_loss[:, :, -1].isnan().all()
    measured, removals = every_removal(effects)
    if removals:  # none where no position asked for has a next token
        by_forwards = effects_by_masked_forwards(model, tokens, removals, removal, scope, mask)
        torch.testing.assert_close(effects.delta_loss[measured], by_forwards, atol=NATS, rtol=0)


@torch.no_grad()
def reference_loss(reference: Any, tokens: Tensor) -> Tensor:
    logits = reference(tokens).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(
        len(tokens), -1
    )


@contextmanager
def removed_in_transformers(reference: Any, layer: int, token: int, expert: int) -> Iterator[None]:
    """Zero the routing weight of one expert at one token (row of the flattened batch), inside transformers' own model."""

    def zero(module: Any, arguments: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        hidden, indices, weights = arguments
        weights = weights.clone()
        weights[token, indices[token] == expert] = 0
        return hidden, indices, weights

    handle = reference.model.layers[layer].mlp.experts.register_forward_pre_hook(zero)
    try:
        yield
    finally:
        handle.remove()
