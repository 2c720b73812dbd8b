"""Masks remove what they say and nothing else.

Two oracles: transformers with the routing weights of single (token, expert) pairs zeroed before its experts run, and a loop
over tokens written from the definitions of the three removals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import OlmoeForCausalLM

from hooked_moe import ActivationCache, ExpertMask, HookedMoE, HookedMoEConfig
from hooked_moe.expert_mask import LayerMask
from tests.conftest import EVERY_ARCHITECTURE, swiglu
from tests.support.hf_models import random_tokens, save, tiny_olmoe

N_EXPERTS, K, POS = 10, 3, 12
EVERY_REMOVAL = pytest.mark.parametrize("removal", ["zero", "renormalize", "reroute"])
EVERY_MASK = pytest.mark.parametrize(
    ("removal", "scaled"),
    [("zero", False), ("zero", True), ("renormalize", False), ("renormalize", True), ("reroute", False)],
)
NEW_ARCHITECTURES = pytest.mark.parametrize("architecture", ["qwen", "deepseek"])


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "norm_topk_prob"])
def hf(request: pytest.FixtureRequest) -> OlmoeForCausalLM:
    return tiny_olmoe(norm_topk_prob=request.param, num_key_value_heads=2)


@pytest.fixture(scope="module")
def ours(hf: OlmoeForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> HookedMoE:
    return HookedMoE.from_pretrained(save(hf, tmp_path_factory.mktemp("hf")))


@pytest.fixture(scope="module")
def batch() -> Tensor:
    return random_tokens(2, POS)


@contextmanager
def zeroed(hf: OlmoeForCausalLM, entries: list[tuple[int, int, int, int]], pos: int = POS) -> Iterator[None]:
    """transformers without these (layer, batch, pos, expert) contributions."""

    def remove(layer: int) -> Callable[..., tuple[Tensor, ...]]:
        def hook(module: torch.nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
            x, indices, weights = args
            weights = weights.clone()
            for at, b, p, expert in entries:
                if at == layer:
                    weights[b * pos + p, indices[b * pos + p] == expert] = 0.0
            return x, indices, weights

        return hook

    handles = [layer.mlp.experts.register_forward_pre_hook(remove(i)) for i, layer in enumerate(hf.model.layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def active_experts(model: HookedMoE, tokens: Tensor) -> list[Tensor]:
    """[batch, pos, slot] for every layer with experts."""
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_expert_indices"))
    return list(cache.values())


@torch.no_grad()
def test_every_single_removal_in_a_row_of_positions_is_that_of_transformers(
    hf: OlmoeForCausalLM, ours: HookedMoE, batch: Tensor
) -> None:
    active = active_experts(ours, batch)
    for layer in range(3):
        for pos in (0, 5, POS - 1):
            for slot in range(K):
                entry = (layer, 1, pos, int(active[layer][1, pos, slot]))
                with zeroed(hf, [entry]):
                    expected = hf(batch).logits
                logits = ours(batch, expert_mask=ExpertMask.ablate([entry]))
                torch.testing.assert_close(logits, expected, atol=5e-5, rtol=0)
                assert not torch.equal(logits, ours(batch)), entry


@torch.no_grad()
def test_sets_of_removals_across_layers_are_those_of_transformers(hf: OlmoeForCausalLM, ours: HookedMoE, batch: Tensor) -> None:
    generator = torch.Generator().manual_seed(3)
    keep = {layer: torch.rand(2, POS, N_EXPERTS, generator=generator) < 0.6 for layer in (0, 2)}
    entries = [(layer, *where) for layer in keep for where in (~keep[layer]).nonzero().tolist()]
    with zeroed(hf, entries):
        expected = hf(batch).logits
    for mask in (ExpertMask(keep), ExpertMask.ablate(entries)):
        torch.testing.assert_close(ours(batch, expert_mask=mask), expected, atol=5e-5, rtol=0)


@torch.no_grad()
def test_each_row_of_a_batch_can_have_its_own_counterfactual(ours: HookedMoE, batch: Tensor) -> None:
    active = active_experts(ours, batch)
    entries = [(1, 4, slot) for slot in range(K)] + [(0, 0, 0), (2, POS - 1, 1)]
    rows = batch[:1].expand(len(entries), -1)
    mask = ExpertMask.ablate(
        (layer, row, pos, int(active[layer][0, pos, slot])) for row, (layer, pos, slot) in enumerate(entries)
    )
    together = ours(rows, expert_mask=mask)
    for row, (layer, pos, slot) in enumerate(entries):
        alone = ours(batch[:1], expert_mask=ExpertMask.ablate([(layer, 0, pos, int(active[layer][0, pos, slot]))]))
        torch.testing.assert_close(together[row], alone[0], atol=5e-5, rtol=0)
    differ = (together[:, None] - together[None]).abs().amax((-1, -2))
    assert (differ + torch.eye(len(entries)) > 1e-4).all()


@torch.no_grad()
def test_none_stands_for_every_row_or_position(ours: HookedMoE, batch: Tensor) -> None:
    expert = int(active_experts(ours, batch)[1][1].flatten().mode().values)
    everywhere, row = torch.ones(2, 2, POS, N_EXPERTS, dtype=torch.bool)
    everywhere[:, :, expert] = False
    row[1, :, expert] = False
    for entry, keep in [((1, None, None, expert), everywhere), ((1, 1, None, expert), row)]:
        by_entry = ours(batch, expert_mask=ExpertMask.ablate([entry]))
        assert torch.equal(by_entry, ours(batch, expert_mask=ExpertMask({1: keep})))
        assert not torch.equal(by_entry, ours(batch))


# The definitions, one token at a time


def defined_routing(probabilities: Tensor, keep: Tensor, removal: str, cfg: HookedMoEConfig) -> tuple[list[int], list[float]]:
    """Experts and routing weights of one token, from router probabilities and a mask, both [expert]."""
    rank = probabilities * keep if removal == "reroute" else probabilities
    groups = [range(*group) for group in pairwise(range(0, len(rank) + 1, len(rank) // cfg.n_expert_groups))]
    groups.sort(key=lambda group: -max(rank[e].item() for e in group))
    reachable = [e for group in groups[: cfg.groups_per_token] for e in group if rank[e] > 0]
    chosen = sorted(reachable, key=lambda e: -rank[e].item())[: cfg.experts_per_token]
    weights = [probabilities[e].item() for e in chosen]
    if cfg.norm_topk_prob:
        weights = [w / sum(weights) for w in weights]
    weights = [w * cfg.routed_scaling_factor for w in weights]
    if removal == "reroute":
        return chosen, weights
    kept = [w * float(keep[e]) for w, e in zip(weights, chosen, strict=True)]
    if removal == "renormalize":
        kept = [w * sum(weights) / sum(kept) if sum(kept) else 0.0 for w in kept]
    return chosen, kept


def random_mask(*shape: int, scaled: bool) -> Tensor:
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(4))
    return keep * 2 if scaled else keep < 0.5


def assert_routed_as_defined(
    model: HookedMoE, tokens: Tensor, layer: int, keep: Tensor, removal: Any, expert: Callable[[int, Tensor], Tensor]
) -> ActivationCache:
    """Under a mask [batch, pos, expert] of one layer; `expert(e, x)` is what expert e makes of a token."""
    _, cache = model.run_with_cache(tokens, expert_mask=ExpertMask({layer: keep}, removal=removal))
    x = cache["normalized", layer, "ln2"] * model.blocks[layer].ln2.w
    expected = torch.zeros_like(x)
    for b in range(tokens.shape[0]):
        for p in range(tokens.shape[1]):
            probabilities = cache["router_logits", layer][b, p].softmax(-1)
            chosen, weights = defined_routing(probabilities, keep[b, p], removal, model.cfg)
            assert cache["expert_indices", layer][b, p].tolist()[: len(chosen)] == chosen  # now and then fewer than slots
            for e, weight in zip(chosen, weights, strict=True):
                expected[b, p] += weight * expert(e, x[b, p])
    torch.testing.assert_close(cache["routed_out", layer], expected, atol=1e-5, rtol=1e-4)
    return cache


@EVERY_MASK
@torch.no_grad()
def test_each_removal_is_what_its_definition_says(
    removal: Any, scaled: bool, hf: OlmoeForCausalLM, ours: HookedMoE, batch: Tensor
) -> None:
    def experts_of_transformers(e: int, x: Tensor) -> Tensor:
        return hf.model.layers[1].mlp.experts(x[None], torch.tensor([[e]]), torch.ones(1, 1))[0]

    keep = random_mask(2, POS, N_EXPERTS, scaled=scaled)
    assert_routed_as_defined(ours, batch, 1, keep, removal, experts_of_transformers)


@EVERY_MASK
@NEW_ARCHITECTURES
@torch.no_grad()
def test_each_removal_is_what_its_definition_says_beside_shared_experts_in_groups_and_scaled(
    removal: Any, scaled: bool, model: HookedMoE, tokens: Tensor
) -> None:
    experts = model.blocks[2].mlp.experts
    keep = random_mask(*tokens.shape, model.cfg.num_experts, scaled=scaled)
    cache = assert_routed_as_defined(model, tokens, 2, keep, removal, lambda e, x: swiglu(x, *experts.W_in[e], experts.W_out[e]))
    assert torch.equal(cache["mlp_out", 2], cache["routed_out", 2] + cache["shared_out", 2])


@EVERY_REMOVAL
@NEW_ARCHITECTURES
@torch.no_grad()
def test_shared_experts_and_dense_layers_are_never_masked(removal: Any, model: HookedMoE, tokens: Tensor) -> None:
    nothing = {layer: torch.zeros(1, 1, 1, dtype=torch.bool) for layer in model.cfg.moe_layers}
    silence = (lambda name: name.endswith("hook_routed_out"), lambda routed, hook: torch.zeros_like(routed))
    without_routed = model.run_with_hooks(tokens, fwd_hooks=[silence])
    logits, cache = model.run_with_cache(tokens, expert_mask=ExpertMask(nothing, removal))
    assert torch.equal(logits, without_routed)
    for layer in model.cfg.moe_layers:
        assert torch.equal(cache["mlp_out", layer], cache["shared_out", layer])
        assert cache["shared_out", layer].abs().amax(-1).min() > 1e-3


@EVERY_REMOVAL
@EVERY_ARCHITECTURE
@torch.no_grad()
def test_removing_an_expert_that_is_not_active_changes_no_bit(removal: Any, model: HookedMoE, tokens: Tensor) -> None:
    none = torch.zeros(*tokens.shape, model.cfg.num_experts, dtype=torch.bool)
    active = zip(model.cfg.moe_layers, active_experts(model, tokens), strict=True)
    mask = ExpertMask({layer: none.scatter(-1, experts, True) for layer, experts in active}, removal)
    assert torch.equal(model(tokens, expert_mask=mask), model(tokens))


@pytest.mark.parametrize("layer", [0, 2])
@EVERY_REMOVAL
@torch.no_grad()
def test_earlier_positions_are_left_alone(removal: Any, layer: int, ours: HookedMoE, batch: Tensor) -> None:
    keep = torch.ones(2, POS, N_EXPERTS, dtype=torch.bool)
    keep[:, 6].scatter_(-1, active_experts(ours, batch)[layer][:, 6, :2], False)
    removed, expected = ours(batch, expert_mask=ExpertMask({layer: keep}, removal=removal)), ours(batch)
    if layer == 2 and removal != "reroute":
        assert torch.equal(removed[:, :6], expected[:, :6])
    else:  # later tokens go to other experts, so products run over groups of other sizes, which may round otherwise
        torch.testing.assert_close(removed[:, :6], expected[:, :6], atol=2e-5, rtol=0)
    changed = (removed - expected).abs().amax(-1) > 1e-4
    assert changed[:, 6].all()
    assert changed[:, 7:].all() if layer == 0 else not changed[:, 7:].any()


@EVERY_REMOVAL
@torch.no_grad()
def test_removing_every_expert_leaves_the_block_without_its_routed_part(
    removal: Any, hf: OlmoeForCausalLM, ours: HookedMoE, batch: Tensor
) -> None:
    nothing = torch.zeros(1, 1, N_EXPERTS, dtype=torch.bool)
    logits, cache = ours.run_with_cache(batch, expert_mask=ExpertMask({1: nothing}, removal=removal))
    assert not cache["mlp_out", 1].any()
    assert torch.equal(cache["resid_post", 1], cache["resid_mid", 1])
    handle = hf.model.layers[1].mlp.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    try:
        torch.testing.assert_close(logits, hf(batch).logits, atol=5e-5, rtol=0)
    finally:
        handle.remove()


@torch.no_grad()
def test_rerouting_steps_down_the_ranking(ours: HookedMoE, batch: Tensor) -> None:
    _, cache = ours.run_with_cache(batch, names_filter="blocks.0.mlp.hook_router_logits")
    ranking = cache["router_logits", 0].argsort(-1, descending=True)
    for removed in range(N_EXPERTS - K + 1):
        keep = torch.ones(2, POS, N_EXPERTS, dtype=torch.bool).scatter(-1, ranking[..., :removed], False)
        _, cache = ours.run_with_cache(batch, expert_mask=ExpertMask({0: keep}, removal="reroute"))
        assert torch.equal(cache["expert_indices", 0], ranking[..., removed : removed + K])


@torch.no_grad()
def test_rerouting_stays_in_the_groups_of_a_token(make_model: Callable[..., HookedMoE], tokens: Tensor) -> None:
    """Also where they have fewer experts left than there are slots."""
    model = make_model(n_layers=1, num_experts=8, n_expert_groups=4, groups_per_token=2, d_shared=4)
    (active,) = active_experts(model, tokens)
    keep = torch.ones(*tokens.shape, 8, dtype=torch.bool).scatter(-1, active[..., :2], False)
    _, cache = model.run_with_cache(tokens, expert_mask=ExpertMask({0: keep}, removal="reroute"))
    indices, weights = cache["expert_indices", 0], cache["expert_weights", 0]
    used = torch.zeros(*tokens.shape, 4).scatter_reduce(-1, indices // 2, weights, "amax") > 0
    assert (used.sum(-1) <= 2).all()
    assert ((weights > 0).sum(-1) < 3).any(), "or else this tests nothing"


@pytest.mark.parametrize("removed", [8, 9])
@torch.no_grad()
def test_rerouting_with_fewer_experts_left_than_slots_leaves_slots_empty(removed: int, ours: HookedMoE, batch: Tensor) -> None:
    keep = torch.ones(1, 1, N_EXPERTS, dtype=torch.bool)
    keep[..., :removed] = False
    logits, cache = ours.run_with_cache(batch, expert_mask=ExpertMask({0: keep}, removal="reroute"))
    assert logits.isfinite().all()
    indices, weights = cache["expert_indices", 0], cache["expert_weights", 0]
    assert (weights[indices < removed] == 0).all()
    assert ((weights > 0).sum(-1) == N_EXPERTS - removed).all()


@torch.no_grad()
def test_float_masks_scale_contributions(ours: HookedMoE, batch: Tensor) -> None:
    half = torch.full((1, 1, N_EXPERTS), 0.5)
    _, cache = ours.run_with_cache(batch)
    _, halved = ours.run_with_cache(batch, expert_mask=ExpertMask({0: half}))
    torch.testing.assert_close(halved["routed_out", 0], 0.5 * cache["routed_out", 0])
    _, same = ours.run_with_cache(batch, expert_mask=ExpertMask({0: half}, removal="renormalize"))
    torch.testing.assert_close(same["routed_out", 0], cache["routed_out", 0])
    ones = ExpertMask({layer: torch.ones(1, 1, N_EXPERTS) for layer in range(3)})
    assert torch.equal(ours(batch, expert_mask=ones), ours(batch))


@torch.no_grad()
def test_masks_broadcast_over_rows_and_positions(ours: HookedMoE, batch: Tensor) -> None:
    keep = torch.rand(2, POS, N_EXPERTS, generator=torch.Generator().manual_seed(6)) < 0.5
    for smaller in (keep[:1], keep[:, :1], keep[:1, :1], keep[0, 0], keep[0]):
        full = smaller.expand(2, POS, N_EXPERTS)
        assert torch.equal(
            ours(batch, expert_mask=ExpertMask({1: smaller})), ours(batch, expert_mask=ExpertMask({1: full.clone()}))
        )


def test_gradients_flow_into_a_float_mask(ours: HookedMoE, batch: Tensor) -> None:
    """The derivative by the mask is the first-order effect of a removal."""
    keep = torch.ones(2, POS, N_EXPERTS, requires_grad=True)
    loss = ours(batch, expert_mask=ExpertMask({1: keep}), return_type="loss")
    (gradient,) = torch.autograd.grad(loss, keep)
    active = torch.zeros_like(gradient).scatter(-1, active_experts(ours, batch)[1], 1.0).bool()
    assert not gradient[~active].any()
    where = tuple((gradient.abs() == gradient.abs().max()).nonzero()[0].tolist())
    with torch.no_grad():
        losses = []
        for step in (0.05, -0.05):
            nudged = keep.detach().clone()
            nudged[where] += step
            losses.append(ours(batch, expert_mask=ExpertMask({1: nudged}), return_type="loss").item())
    assert gradient[where].item() == pytest.approx((losses[0] - losses[1]) / 0.1, rel=0.02)


@torch.no_grad()
def test_entries_can_come_from_arrays(ours: HookedMoE, batch: Tensor) -> None:
    expert = int(active_experts(ours, batch)[0][0, 3, 0])
    expected = ours(batch, expert_mask=ExpertMask.ablate([(0, 0, 3, expert)]))
    for entry in (np.array([0, 0, 3, expert]), torch.tensor([0, 0, 3, expert])):
        assert torch.equal(ours(batch, expert_mask=ExpertMask.ablate([tuple(entry)])), expected)


@torch.no_grad()
def test_a_mapping_removes_experts_everywhere(ours: HookedMoE, batch: Tensor) -> None:
    experts = {0: [1, 3], 2: (4,)}
    entries = [(layer, None, None, expert) for layer, several in experts.items() for expert in several]
    expected = ours(batch, expert_mask=ExpertMask.ablate(entries))
    assert not torch.equal(expected, ours(batch))
    for given in (experts, {0: np.array([1, 3]), 2: torch.tensor([4])}, {np.int64(0): {1, 3}, 2: iter([4]), 1: []}):
        assert torch.equal(ours(batch, expert_mask=ExpertMask.ablate(given)), expected)
    with pytest.raises(ValueError, match=r"expert 10 in \(2, None, None, 10\) is out of range"):
        ours(batch, expert_mask=ExpertMask.ablate({2: [10]}))


def test_a_mask_knows_the_layers_it_touches(ours: HookedMoE, batch: Tensor) -> None:
    mask = ExpertMask.ablate([(2, 0, 0, 0), (0, 0, 0, 0), (2, 1, 1, 1)])
    assert mask.layers == [0, 2]
    assert mask.for_layer(1, (2, POS, N_EXPERTS), torch.device("cpu")) is None
    layer = mask.for_layer(2, (2, POS, N_EXPERTS), torch.device("cpu"))
    assert isinstance(layer, LayerMask)
    assert (~layer.keep).nonzero().tolist() == [[0, 0, 0], [1, 1, 1]]
    assert ExpertMask.ablate([]).layers == []
    with torch.no_grad():
        assert torch.equal(ours(batch, expert_mask=ExpertMask.ablate([])), ours(batch))


Build = Callable[[], ExpertMask]
REFUSALS: dict[str, tuple[Build, type[Exception], str]] = {
    "removal": (
        lambda: ExpertMask({}, removal="drop"),
        ValueError,
        r"removal must be one of 'zero', 'renormalize', 'reroute', not 'drop'",
    ),
    "integers": (
        lambda: ExpertMask({1: torch.ones(10, dtype=torch.long)}),
        TypeError,
        r"mask of layer 1 must be a bool or float tensor, not torch.int64",
    ),
    "arrays": (lambda: ExpertMask({1: np.ones(10, bool)}), TypeError, r"must be a bool or float tensor, not ndarray"),
    "lists": (lambda: ExpertMask({1: [True] * 10}), TypeError, r"mask of layer 1 must be .*, not list"),
    "floats and reroute": (
        lambda: ExpertMask({1: torch.ones(10)}, removal="reroute"),
        TypeError,
        r"takes bool masks.*layer 1 has floats",
    ),
    "negative": (lambda: ExpertMask.ablate([(0, 0, -1, 0)]), ValueError, r"must be whole numbers from 0 .*not \(0, 0, -1, 0\)"),
    "fractions": (lambda: ExpertMask.ablate([(0, 0, 1.5, 0)]), ValueError, r"must be whole numbers from 0"),
    "no expert": (lambda: ExpertMask.ablate([(0, 0, 0, None)]), ValueError, r"must be whole numbers from 0"),
    "one expert": (
        lambda: ExpertMask.ablate({1: 3}),
        TypeError,
        r"experts of layer 1 must be a list of whole numbers, as in \[3\], not the number 3",
    ),
    "half an expert": (
        lambda: ExpertMask.ablate({1: [0.5]}),
        TypeError,
        r"experts of layer 1 must be whole numbers, not 0.5",
    ),
    "a mask of experts": (lambda: ExpertMask.ablate({1: torch.tensor([True])}), TypeError, r"must be whole numbers"),
    "half a layer": (lambda: ExpertMask.ablate({0.5: [1]}), ValueError, r"a layer must be a whole number, not 0.5"),
    "three numbers": (lambda: ExpertMask.ablate([(0, 0, 1)]), ValueError, r"must be whole numbers from 0 .*not \(0, 0, 1\)"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_is_no_mask_is_refused(refusal: str, unchecked: None) -> None:
    build, error, message = REFUSALS[refusal]
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (ExpertMask.ablate([(3, 0, 0, 0)]), r"expert mask for layer 3: the model has layers 0 to 2"),
        (ExpertMask({-1: torch.ones(10)}), r"expert mask for layer -1"),
        (ExpertMask.ablate([(0, 2, 0, 0)]), r"batch 2 in \(0, 2, 0, 0\) is out of range: this input has batch 0 to 1"),
        (ExpertMask.ablate([(0, 0, 12, 0)]), r"pos 12 in .* this input has pos 0 to 11"),
        (ExpertMask.ablate([(0, None, None, 10)]), r"expert 10 in .* has expert 0 to 9"),
        (
            ExpertMask({0: torch.ones(2, 5, 10)}),
            r"layer 0 has shape \[2, 5, 10\]; it must broadcast to \[batch, pos, expert\] = \[2, 12, 10\]",
        ),
        (ExpertMask({0: torch.ones(9)}), r"layer 0 has shape \[9\]"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask: ExpertMask, message: str, ours: HookedMoE, batch: Tensor) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        ours(batch, expert_mask=mask)


@pytest.mark.parametrize("architecture", ["deepseek"])
def test_a_mask_of_a_dense_layer_is_refused(model: HookedMoE, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match=r"layer 0, which is dense: it has no experts; layers \[1, 2\] have"):
        model(tokens, expert_mask=ExpertMask.ablate([(1, 0, 0, 0), (0, 0, 0, 0)]))


def test_the_gradient_of_a_mask_at_one_is_that_of_its_definition(make_model: Any) -> None:
    own = make_model(n_layers=1, num_experts=4, experts_per_token=4).double()
    tokens = torch.tensor([[3, 7, 11, 2]])
    for removal in ("zero", "renormalize"):

        def loss(keep: Tensor, removal: Any = removal) -> Tensor:
            return own(tokens, return_type="loss", expert_mask=ExpertMask({0: keep}, removal=removal))

        keep = torch.ones(1, 1, 4, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(keep), keep)
        for expert in range(4):
            step = torch.zeros(1, 1, 4, dtype=torch.float64)
            step[..., expert] = 1e-6
            slope = (loss(keep.detach() + step) - loss(keep.detach() - step)) / 2e-6
            torch.testing.assert_close(gradient[0, 0, expert], slope.detach(), atol=1e-6, rtol=1e-4)
