"""Paths, joint patches and interactions against forwards in which hooks make the same change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_moe import ExpertMask, HookedMoE
from hooked_moe.circuits import (
    Circuit,
    PairInteractions,
    PathPatches,
    RouterFlips,
    circuit,
    direct_logit_attribution,
    get_act_patch_expert,
    pair_interactions,
    path_patch,
    router_flips,
)
from hooked_moe.circuits.joint_patches import all_nodes, joint_effects
from hooked_moe.circuits.pairs import PromptPair, prompt_pair
from hooked_moe.circuits.paths import sent
from hooked_moe.counterfactuals import KL, At, LogitDifference, expert_effects
from tests.conftest import EVERY_ARCHITECTURE, random_model, without_type_checks
from tests.support.prompt_pairs import FIRST, MASKS, METRIC, SECOND, difference_at_end, random_pair

LOGITS = 2e-5
SOME_PADDED = pytest.mark.parametrize("padding", ["none", "left", "holes"])


def run(model: HookedMoE, mask: Tensor | None, hooks: list[Any], tokens: Tensor | None = None) -> Tensor:
    """The metric of a hooked forward of the corrupted prompts."""
    with torch.no_grad(), without_type_checks():
        tokens = random_pair()[1] if tokens is None else tokens
        return difference_at_end(mask)(model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=hooks))


def put(value: Tensor) -> Callable[..., Tensor]:
    return lambda x, hook: value.clone()


def plus(delta: Tensor) -> Callable[..., Tensor]:
    return lambda x, hook: x + delta


def by_two_forwards(model: HookedMoE, pair: PromptPair, receiver: Any, delta: Tensor, mask: Tensor | None) -> Tensor:
    """Goldowsky-Dill et al.: what the receiver computes with the changed input, put into a second forward."""
    kind, layer = receiver[:2]
    prefix = f"blocks.{layer}."
    where = "hook_resid_pre" if kind.startswith("head") else "hook_resid_mid"
    with torch.no_grad(), without_type_checks(), model.hooks([(prefix + where, plus(delta))]):
        _, changed = model.run_with_cache(pair.tokens, attention_mask=mask)
    if kind == "router":
        name = prefix + "mlp.hook_router_logits"
        return run(model, mask, [(name, put(changed[name]))])
    if kind == "expert":
        own = pair.corrupt[prefix + "mlp.hook_expert_indices"]
        mlp, x = model.blocks[layer].mlp, changed[prefix + "ln2.hook_normalized"] * model.blocks[layer].ln2.w
        with torch.no_grad(), without_type_checks():
            fresh = mlp.run_experts(x, own).in_slots()

        def exchange(x: Tensor, hook: Any) -> Tensor:
            """The expert's own output, wherever the corrupted run goes to it."""
            return torch.where((own == receiver[2])[..., None], fresh, x)

        return run(model, mask, [(prefix + "mlp.hook_expert_out", exchange)])
    letters = {"head": "qkv", "head_q": "q", "head_k": "k", "head_v": "v"}[kind]
    if letters == "qkv":
        z = changed[prefix + "attn.hook_z"]
    else:
        name = prefix + f"attn.hook_{letters}"
        with torch.no_grad(), without_type_checks(), model.hooks([(name, put(changed[name]))]):
            _, partly = model.run_with_cache(pair.tokens, attention_mask=mask)
        z = partly[prefix + "attn.hook_z"]

    def one_head(x: Tensor, hook: Any) -> Tensor:
        x[..., receiver[2], :] = z[..., receiver[2], :]
        return x

    return run(model, mask, [(prefix + "attn.hook_z", one_head)])


@pytest.mark.usefixtures("unchecked")
@SOME_PADDED
@EVERY_ARCHITECTURE
def test_paths_equal_two_forwards(padding: str, model: HookedMoE) -> None:
    mask, (clean, corrupt) = MASKS[padding], random_pair()
    pair = prompt_pair(model, clean, corrupt, mask)
    layer = model.cfg.moe_layers[0]
    expert = int(pair.experts("clean", layer).indices[1, 6, 0])
    senders = [("expert", layer, expert), ("head", 0, 2)]
    received_by = int(pair.experts("corrupt", 2).indices[0, 6, 0])
    receivers = [("router", 2), ("expert", 2, received_by), ("head", 2, 1), ("head_q", 2, 0), ("head_k", 2, 3), ("head_v", 2, 3)]
    found = path_patch(model, corrupt, clean, senders, receivers, METRIC, attention_mask=mask)
    baseline = run(model, mask, [])
    real = pair.real()[..., None]
    for i, sender in enumerate(senders):
        delta = sent(pair, sender) * real
        for j, receiver in enumerate(receivers):
            expected = by_two_forwards(model, pair, receiver, delta, mask) - baseline
            torch.testing.assert_close(
                found.values[i, j], expected, atol=LOGITS, rtol=1e-4, msg=lambda m, r=receiver: f"{r}: {m}"
            )
    torch.testing.assert_close(found.total, run(model, mask, [], clean) - baseline, atol=LOGITS, rtol=1e-4)


@EVERY_ARCHITECTURE
def test_what_is_sent_is_the_difference_of_outputs(model: HookedMoE) -> None:
    clean, corrupt = random_pair()
    pair = prompt_pair(model, clean, corrupt)
    with torch.no_grad():
        outputs = [model.run_with_cache(tokens)[1]["blocks.1.hook_attn_out"] for tokens in (clean, corrupt)]
    heads = sum(sent(pair, ("head", 1, head)) for head in range(4))
    torch.testing.assert_close(heads, outputs[0] - outputs[1], atol=1e-5, rtol=1e-4)


def test_the_direct_path_of_the_last_layer_is_the_whole_patch_and_direct_attribution_nearly() -> None:
    model, (clean, corrupt) = random_model(), random_pair()
    patches = get_act_patch_expert(model, corrupt, clean, METRIC, [2], [6])
    for slot in range(3):
        expert = int(patches.expert_index[0, 0, 6, slot])
        found = path_patch(model, corrupt, clean, ("expert", 2, expert), "logits", METRIC, positions=[6])
        torch.testing.assert_close(found.values[0, 0, 0], patches.values[0, 0, 6, slot], atol=LOGITS, rtol=1e-4)
    by_direction = direct_logit_attribution(model, corrupt, FIRST, SECOND)
    assert by_direction.components[0] == "embed"


def test_all_paths_together_are_the_patch_where_everything_is_linear() -> None:
    """In a small change, and with every reader of the stream as a receiver: the total derivative."""
    model, (clean, corrupt) = random_model(dtype=torch.float64), random_pair()
    _, corrupt_cache = model.run_with_cache(corrupt)
    _, clean_cache = model.run_with_cache(clean)
    near = {name: corrupt_cache[name].detach() for name in corrupt_cache}
    expert, name = int(corrupt_cache["blocks.1.mlp.hook_expert_indices"][0, 4, 0]), "blocks.1.mlp.hook_expert_out"
    near[name] = near[name] + 1e-5 * clean_cache[name].detach()
    readers: list[Any] = [("head", 2, head) for head in range(4)] + [("expert", 2, number) for number in range(6)]
    found = path_patch(model, corrupt, near, ("expert", 1, expert), [*readers, ("router", 2), "logits"], METRIC, positions=[4])
    patches = get_act_patch_expert(model, corrupt, near, METRIC, [1], [4])
    slot = (patches.expert_index[0, 0, 4] == expert).nonzero()[0, 0]
    torch.testing.assert_close(found.values[0, :, 0].sum(), patches.values[0, 0, 4, slot], atol=1e-9, rtol=1e-3)


@pytest.mark.usefixtures("unchecked")
@EVERY_ARCHITECTURE
def test_flips_of_routers_are_those_of_routing_again(model: HookedMoE) -> None:
    mask, (clean, corrupt) = MASKS["left"], random_pair()
    found = router_flips(model, corrupt, clean, attention_mask=mask)
    pair = prompt_pair(model, clean, corrupt, mask)
    checked = 0
    for i, layer in enumerate(found.layers):
        for j, later in enumerate(found.layers):
            if later <= layer:
                assert (found.flipped[i, ..., j] == -1).all()
                continue
            for batch, pos, slot in (found.expert_index[i] >= 0).nonzero().tolist()[::3]:
                expert = int(found.expert_index[i, batch, pos, slot])
                delta = torch.zeros(2, 7, 32)
                delta[batch, pos] = sent(pair, ("expert", layer, expert))[batch, pos]
                with torch.no_grad(), without_type_checks(), model.hooks([(f"blocks.{later}.hook_resid_mid", plus(delta))]):
                    _, cache = model.run_with_cache(corrupt, attention_mask=mask)
                new = set(cache[f"blocks.{later}.mlp.hook_expert_indices"][batch, pos].tolist())
                old = set(pair.experts("corrupt", later).indices[batch, pos].tolist())
                assert found.flipped[i, batch, pos, slot, j] == len(new - old)
                checked += 1
    assert checked
    assert found.flipped.max() > 0


# Circuits


@pytest.mark.usefixtures("unchecked")
@SOME_PADDED
@EVERY_ARCHITECTURE
def test_joint_patches_equal_a_forward_with_the_same_components_exchanged(padding: str, model: HookedMoE) -> None:
    mask, (clean, corrupt) = MASKS[padding], random_pair()
    pair = prompt_pair(model, clean, corrupt, mask)
    asked = pair.real().clone()
    asked[0, 5] = False  # a token that stays as it is, while what it sees changes
    nodes = all_nodes(pair, asked)
    sets = [nodes[1::4], nodes[::3], [node for node in nodes if node[0] == "expert"], nodes[2:3], nodes]
    with torch.no_grad():
        found = joint_effects(pair, sets, METRIC, asked)
    baseline = run(model, mask, [])
    for values, chosen in zip(found, sets, strict=True):
        expected = run(model, mask, exchanged(model, pair, chosen, asked)) - baseline
        torch.testing.assert_close(values, expected, atol=5e-5, rtol=1e-4)
    assert not any(point.active for point in model.hook_dict.values())


def exchanged(model: HookedMoE, pair: PromptPair, chosen: list[Any], asked: Tensor) -> list[Any]:
    """One hook for each node, in the order in which they run; an expert's comes out of what the model then computes."""
    hooks: list[Any] = []
    own: dict[str, Tensor] = {}

    def head(x: Tensor, hook: Any, layer: int, number: int) -> Tensor:
        x[asked, number] = pair.z("clean", layer)[asked, number]
        return x

    def keep(x: Tensor, hook: Any) -> None:
        own[hook.name] = x.clone()

    def expert(x: Tensor, hook: Any, layer: int, number: int) -> Tensor:
        clean = pair.experts("clean", layer)
        prefix = f"blocks.{layer}.mlp.hook_expert_"
        for batch, pos in asked.nonzero().tolist():
            at = (batch, pos)
            for slot in range(clean.indices.shape[-1]):
                if own[prefix + "indices"][(*at, slot)] == number:
                    x[at] = x[at] - own[prefix + "weights"][(*at, slot)] * own[prefix + "out"][(*at, slot)]
                if clean.indices[(*at, slot)] == number:
                    x[at] = x[at] + clean.weights[(*at, slot)] * clean.outputs[(*at, slot)]
        return x

    for kind, layer, number in chosen:
        if kind == "head":
            hooks.append((f"blocks.{layer}.attn.hook_z", lambda x, hook, at=(layer, number): head(x, hook, *at)))
        else:
            hooks += [(f"blocks.{layer}.mlp.hook_expert_{name}", keep) for name in ("indices", "weights", "out")]
            hooks.append((f"blocks.{layer}.mlp.hook_routed_out", lambda x, hook, at=(layer, number): expert(x, hook, *at)))
    return hooks


@EVERY_ARCHITECTURE
def test_everything_patched_is_the_clean_run_and_the_first_node_is_the_best(model: HookedMoE) -> None:
    clean, corrupt = random_pair()
    found = circuit(model, clean, corrupt, METRIC, k=3)
    torch.testing.assert_close(found.ceiling[:, 2], found.total, atol=1e-4, rtol=1e-4)
    pair = prompt_pair(model, clean, corrupt)
    nodes = all_nodes(pair, pair.real())
    with torch.no_grad():
        single = joint_effects(pair, [[node] for node in nodes], METRIC, pair.real())
    distance = (single - found.total).mean(1).abs()
    kind, layer, number = nodes[int(distance.argmin())]
    assert found.nodes[0] == f"{kind} {layer}.{number}"
    torch.testing.assert_close(found.values[0], single[distance.argmin()], atol=1e-5, rtol=1e-4)
    assert (found.values - found.total).mean(1).abs().diff().le(1e-6).all()


@pytest.mark.parametrize("method", ["greedy", "atp", "dla"])
def test_a_planted_circuit_is_found(method: Any) -> None:
    """A model whose attention does nothing, so that each token stands alone, and in which one expert of the last layer reads the
    difference of both prompts' last tokens and writes the answer; what other experts write is made small."""
    model, (clean, corrupt) = random_model(), random_pair()
    clean, corrupt = clean.clone(), corrupt.clone()
    corrupt[:, -1] = (clean[:, -1] + 7) % 61
    with torch.no_grad():
        for block in model.blocks:
            block.attn.W_O *= 0.0
            block.mlp.experts.W_out *= 1e-3
        pair = prompt_pair(model, clean, corrupt)
        layer, pos = 2, 6
        only_clean = [int(number) for number in pair.experts("clean", layer).indices[0, pos]
                      if number not in pair.experts("corrupt", layer).indices[0, pos]]  # fmt: skip
        assert only_clean
        expert = only_clean[0]
        direction = (model.unembed.W_U[3] - model.unembed.W_U[17]) / model.ln_final.w
        _, cache = model.run_with_cache(clean[:1])
        slot = int((cache[f"blocks.{layer}.mlp.hook_expert_indices"][0, pos] == expert).nonzero()[0, 0])
        sign = torch.sign(cache[f"blocks.{layer}.mlp.hook_expert_post"][0, pos, slot])
        model.blocks[layer].mlp.experts.W_out[expert] += direction[:, None] * sign
    found = circuit(model, clean[:1], corrupt[:1], At(-1, LogitDifference(3, 17)), "experts", method, 3, positions=[pos])
    assert found.nodes[0] == f"expert {layer}.{expert}"


def test_rankings_are_measured_as_they_are_taken(tmp_path: Path) -> None:
    model, (clean, corrupt) = random_model("qwen"), random_pair()
    for options in (
        {"method": "atp"},
        {"method": "dla", "nodes": "heads"},
        {"nodes": "experts", "candidates": 4, "positions": [4, 6]},
    ):
        found = circuit(model, clean, corrupt, METRIC, k=4, **options)
        assert len(found.nodes) == len(set(found.nodes)) == 4
        assert found.values.shape == (4, 2)
        kinds = {name.split()[0] for name in found.nodes}
        assert kinds <= ({"head"} if options.get("nodes") == "heads" else {"head", "expert"})
        torch.testing.assert_close(found.share(), found.values.mean(1) / found.total.mean())
    found.save(tmp_path / "circuit.parquet")
    assert Circuit.load(tmp_path / "circuit.parquet").nodes == found.nodes


# Interactions


@pytest.mark.usefixtures("unchecked")
@SOME_PADDED
@EVERY_ARCHITECTURE
def test_pairs_of_removals_equal_masked_forwards(padding: str, model: HookedMoE) -> None:
    mask, (tokens, _) = MASKS[padding], random_pair()
    found = pair_interactions(model, tokens, LogitDifference(FIRST, SECOND), attention_mask=mask)
    last = [6, 6] if mask is None else [int(row.nonzero()[-1]) for row in mask]
    baseline = run(model, mask, [], tokens)
    n = len(found.nodes)

    def removed(batch: int, nodes: set[int]) -> Tensor:
        entries = [(int(found.layer[node]), batch, last[batch], int(found.expert_index[batch, node])) for node in nodes]
        with torch.no_grad(), without_type_checks():
            logits = model(tokens, attention_mask=mask, expert_mask=ExpertMask.ablate(entries))
        return (difference_at_end(mask)(logits) - baseline)[batch]

    for batch, i, j in [(0, 0, 1), (0, 1, n - 1), (1, 2, n - 2), (1, 0, n - 1), (0, n - 3, n - 1)]:
        single, other, both = removed(batch, {i}), removed(batch, {j}), removed(batch, {i, j})
        torch.testing.assert_close(found.joint[batch, i, j], both, atol=LOGITS, rtol=1e-4)
        torch.testing.assert_close(found.single[batch, i], single, atol=LOGITS, rtol=1e-4)
        torch.testing.assert_close(found.interaction[batch, i, j], both - single - other, atol=4e-5, rtol=1e-3)
        assert found.interaction[batch, i, j] == found.interaction[batch, j, i]
    assert found.interaction.diagonal(dim1=1, dim2=2).isnan().all()


def test_single_removals_are_those_of_expert_effects_and_files_keep_pairs(tmp_path: Path) -> None:
    model, (tokens, _) = random_model("deepseek"), random_pair()
    found = pair_interactions(model, tokens, KL(), 3)
    effects = expert_effects(model, tokens, positions=[3])
    torch.testing.assert_close(found.single, effects.kl[:, :, 3].movedim(0, 1).flatten(1), atol=1e-5, rtol=1e-4)
    found.save(tmp_path / "pairs.parquet")
    again = PairInteractions.load(tmp_path / "pairs.parquet")
    assert torch.equal(again.joint, found.joint)
    assert found.plot() is not None


def test_results_of_paths_are_tables_and_files(tmp_path: Path) -> None:
    model, (clean, corrupt) = random_model(), random_pair()
    found = path_patch(model, corrupt, clean, ("head", 0, 1), [("router", 1), "logits"], METRIC)
    assert (found.senders, found.receivers) == (["head 0.1"], ["router 1", "logits"])
    found.save(tmp_path / "paths.parquet")
    assert torch.equal(PathPatches.load(tmp_path / "paths.parquet").values, found.values)
    flips = router_flips(model, corrupt, clean)
    flips.save(tmp_path / "flips.parquet")
    assert torch.equal(RouterFlips.load(tmp_path / "flips.parquet").flipped, flips.flipped)


REFUSALS: dict[str, tuple[Callable[[HookedMoE, Tensor, Tensor], Any], str]] = {
    "a receiver before its sender": (
        lambda m, c, k: path_patch(m, k, c, ("expert", 2, 1), ("router", 1), METRIC),
        r"\('router', 1\) does not read what \('expert', 2, 1\) writes",
    ),
    "an expert of the same layer": (
        lambda m, c, k: path_patch(m, k, c, ("expert", 1, 1), ("router", 1), METRIC),
        "it is not after it",
    ),
    "a sender that is a router": (
        lambda m, c, k: path_patch(m, k, c, ("router", 1), "logits", METRIC),
        r"is not one of \('expert', layer, number\), \('head', layer, number\)",
    ),
    "a number too few": (lambda m, c, k: path_patch(m, k, c, ("head", 1), "logits", METRIC), "must have the form"),
    "no such head": (lambda m, c, k: path_patch(m, k, c, ("head", 1, 4), "logits", METRIC), "layer 1 has heads 0 to 3"),
    "no such expert": (lambda m, c, k: path_patch(m, k, c, ("expert", 1, 9), "logits", METRIC), "layer 1 has experts 0 to 5"),
    "no such layer": (lambda m, c, k: path_patch(m, k, c, ("head", 3, 0), "logits", METRIC), "layer 3 is out of range"),
    "unknown nodes": (lambda m, c, k: path_patch(m, k, c, "embed", "logits", METRIC), "'embed' is not one of"),
    "no place": (lambda m, c, k: path_patch(m, k, c, ("head", 0, 0), "logits", KL()), "say where to read"),
    "unknown search": (lambda m, c, k: circuit(m, c, k, METRIC, method="acdc"), "method must be one of"),
    "unknown kinds": (lambda m, c, k: circuit(m, c, k, METRIC, "mlps"), "nodes must be one of"),
    "no nodes": (lambda m, c, k: circuit(m, c, k, METRIC, k=0), "whole numbers from 1"),
    "interactions of a function": (lambda m, c, k: pair_interactions(m, c, difference_at_end(None)), "metric must be a readout"),
    "interactions elsewhere": (lambda m, c, k: pair_interactions(m, c, METRIC), "metric must be a readout of the token itself"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_cannot_be_asked_is_refused_by_name(refusal: str) -> None:
    ask, message = REFUSALS[refusal]
    with pytest.raises(ValueError, match=message):
        ask(random_model(), *random_pair())
