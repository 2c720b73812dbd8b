"""Counterfactuals beyond single removals (sets and shares of experts, means, any edit, other readouts) against full forwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hooked_moe.counterfactuals.engine.answer as answer
import hooked_moe.counterfactuals.engine.requests as requests
from hooked_moe import ExpertMask, HookedMoE
from hooked_moe.counterfactuals import Mean, Queries, expert_effects, mask_effects, progressive_effects, token_effects
from hooked_moe.counterfactuals.engine.clean_run import CleanBlock, CleanExperts
from hooked_moe.counterfactuals.engine.memory import Demand, demand_of, divide, parse_bytes
from hooked_moe.counterfactuals.engine.padding import pack
from hooked_moe.counterfactuals.means import expert_means
from hooked_moe.counterfactuals.readouts import KL, Displacement, LogitDifference, LossAfter
from tests.conftest import random_model, without_type_checks
from tests.support.number_text import number_reader

NATS = 1e-5
MODELS = {architecture: random_model(architecture) for architecture in ("olmoe", "deepseek")}
MASKS = {"none": None, "both sides": torch.tensor([[0] * 2 + [1] * 5 + [0], [1] * 6 + [0] * 2])}
ALL_READOUTS = (KL(), LogitDifference(3, 17), Displacement(), LossAfter(2))


@pytest.fixture(scope="module", params=MODELS)
def own(request: pytest.FixtureRequest) -> HookedMoE:
    return MODELS[request.param]


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 61, (2, 8), generator=torch.Generator().manual_seed(3))


class Forward:
    """Logits, losses and the last residual stream of a full forward pass."""

    def __init__(self, model: HookedMoE, tokens: Tensor, mask: Tensor | None, **options: Any) -> None:
        hooks = options.pop("hooks", [])
        final = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
        with torch.no_grad(), without_type_checks(), model.hooks(hooks):
            (self.logits, loss), cache = model.run_with_cache(
                tokens, return_type="both", loss_per_token=True, attention_mask=mask, names_filter=final, **options
            )
        self.losses = torch.cat((loss, torch.full_like(loss[:, :1], float("nan"))), dim=1)
        self.final = cache[final]

    def readouts(self, clean: Forward, batch: int, pos: int, real: Tensor) -> dict[str, Tensor]:
        """What `ALL_READOUTS` stand for, by their definitions."""
        at = (batch, pos)
        expected, changed = clean.logits[at].log_softmax(-1), self.logits[at].log_softmax(-1)
        after = torch.full((3,), float("nan"))
        places = real[batch].nonzero()[:, 0].tolist()
        for offset, place in enumerate(places[places.index(pos) :][:3]):
            after[offset] = (self.losses - clean.losses)[batch, place]
        return {
            "kl": (expected.exp() * (expected - changed)).sum(),
            "logit_difference": (self.logits - clean.logits)[at][3] - (self.logits - clean.logits)[at][17],
            "displacement": (self.final - clean.final)[at].norm(),
            "loss_after": after,
        }


def assert_equal(
    effects: Any, where: tuple[int, ...], forward: Forward, clean: Forward, at: tuple[int, int], real: Tensor
) -> None:
    batch, pos = at
    torch.testing.assert_close(effects.delta_loss[where], (forward.losses - clean.losses)[at], atol=NATS, rtol=0, equal_nan=True)
    for name, expected in forward.readouts(clean, batch, pos, real).items():
        tolerance = 1e-4 if name in ("logit_difference", "displacement") else NATS
        torch.testing.assert_close(
            effects.readouts[name][where], expected, atol=tolerance, rtol=1e-4, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def sample(real: Tensor) -> list[tuple[int, int]]:
    return [(b, int(p)) for b, row in enumerate(real) for p in row.nonzero()[:, 0][::2]]


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("scope", ["position", "from_position"])
@pytest.mark.parametrize("removal", ["zero", "renormalize", "reroute"])
def test_readouts_equal_their_definitions_on_full_forwards(
    removal: Any, scope: Any, padding: str, own: HookedMoE, tokens: Tensor
) -> None:
    mask = MASKS[padding]
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    effects = expert_effects(own, tokens, None, scope, removal, attention_mask=mask, readouts=ALL_READOUTS)
    plain = expert_effects(own, tokens, None, "position", removal, attention_mask=mask)
    torch.testing.assert_close(effects.delta_loss, plain.delta_loss, atol=NATS, rtol=0, equal_nan=True)
    clean = Forward(own, tokens, mask)
    for batch, pos in sample(real):
        layer = own.cfg.moe_layers[pos % len(own.cfg.moe_layers)]
        where = (effects.layers.index(layer), batch, pos, pos % 3)
        expert = int(effects.expert_index[where])
        keep = torch.ones(2, 8, 6, dtype=torch.bool)
        keep[batch, pos if scope == "position" else slice(pos, None), expert] = False
        forward = Forward(own, tokens, mask, expert_mask=ExpertMask({layer: keep}, removal))
        assert_equal(effects, where, forward, clean, (batch, pos), real)


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("kind", ["sets", "shares"])
@pytest.mark.parametrize("removal", ["zero", "renormalize", "reroute"])
def test_sets_and_shares_of_experts_equal_masked_forwards(
    removal: Any, kind: str, padding: str, own: HookedMoE, tokens: Tensor
) -> None:
    if (kind, removal) == ("shares", "reroute"):
        return
    mask, generator = MASKS[padding], torch.Generator().manual_seed(1)
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    layers = own.cfg.moe_layers[-2:]
    drawn = {layer: torch.rand(3, 2, 8, 6, generator=generator) for layer in layers}
    masks = {layer: x > 0.4 if kind == "sets" else x * 1.5 for layer, x in drawn.items()}
    effects = mask_effects(own, tokens, masks, removal, attention_mask=mask, readouts=ALL_READOUTS)
    clean = Forward(own, tokens, mask)
    for batch, pos in sample(real):
        layer, variant = layers[pos % 2], pos % 3
        keep = torch.ones_like(masks[layer][0])
        keep[batch, pos] = masks[layer][variant, batch, pos]
        forward = Forward(own, tokens, mask, expert_mask=ExpertMask({layer: keep}, removal))
        assert_equal(effects, (effects.layers.index(layer), variant, batch, pos), forward, clean, (batch, pos), real)


@pytest.mark.parametrize("removal", ["zero", "renormalize"])
@pytest.mark.parametrize(
    ("model_dtype", "mask_dtype"),
    [
        (torch.float32, torch.float64),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
    ],
    ids=str,
)
def test_shares_may_have_another_dtype_than_the_model(
    model_dtype: torch.dtype, mask_dtype: torch.dtype, removal: Any, tokens: Tensor
) -> None:
    own = random_model(dtype=model_dtype)
    shares = torch.tensor([0.0, 0.25, 0.5, 1.0, 1.5, 2.0]).expand(1, 1, 1, 6)  # exact in every type
    found, same = (mask_effects(own, tokens, {1: shares.to(dtype)}, removal) for dtype in (mask_dtype, model_dtype))
    tolerance = NATS if model_dtype == torch.float32 else 0.1  # where a weight is rounded once or twice, losses differ
    torch.testing.assert_close(found.delta_loss, same.delta_loss, atol=tolerance, rtol=0, equal_nan=True)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("layer", [np.int64(2), torch.tensor(2)])
def test_masks_find_their_layer_by_any_whole_number(layer: Any, own: HookedMoE, tokens: Tensor) -> None:
    assert mask_effects(own, tokens, {layer: torch.ones(1, 1, 1, 6) > 0}).layers == [2]


def test_masks_broadcast_and_single_experts_are_single_removals(own: HookedMoE, tokens: Tensor) -> None:
    layer = own.cfg.moe_layers[-1]
    single = ~torch.eye(6, dtype=torch.bool)[:, None, None]  # variant e removes expert e everywhere it is active
    sets = mask_effects(own, tokens, {layer: single}, positions=[2, 5])
    effects = expert_effects(own, tokens, [layer], positions=[2, 5])
    for pos in (2, 5):
        by_expert = sets.delta_loss[0, :, :, pos].T.gather(1, effects.expert_index[0, :, pos])
        torch.testing.assert_close(by_expert, effects.delta_loss[0, :, pos], atol=NATS, rtol=0)
    inactive = torch.ones(2, 6, dtype=torch.bool).scatter(1, effects.expert_index[0, :, 2], False)
    assert (sets.delta_loss[0, :, :, 2].T[inactive].abs() < 1e-6).all()
    assert sets.delta_loss[0, :, :, 3].isnan().all()


def test_a_mean_takes_the_place_of_the_output(own: HookedMoE, tokens: Tensor) -> None:
    reference = torch.randint(0, 61, (4, 16), generator=torch.Generator().manual_seed(9))
    means = expert_means(own, reference)
    with torch.no_grad():
        _, cache = own.run_with_cache(reference)
    for layer in own.cfg.moe_layers:
        outputs, experts = cache["expert_out", layer], cache["expert_indices", layer]
        for expert in range(6):
            torch.testing.assert_close(means[layer][expert], outputs[experts == expert].mean(0), atol=1e-5, rtol=1e-4)
    streamed = expert_means(own, iter(reference.split(1)))
    effects = expert_effects(own, tokens, removal=Mean(means), readouts=ALL_READOUTS)
    clean, real = Forward(own, tokens, None), torch.ones_like(tokens, dtype=torch.bool)
    for batch, pos in sample(real):
        layer, slot = own.cfg.moe_layers[pos % len(own.cfg.moe_layers)], pos % 3
        torch.testing.assert_close(streamed[layer], means[layer], atol=1e-5, rtol=1e-4)
        where = (effects.layers.index(layer), batch, pos, slot)

        def replace(
            out: Tensor,
            hook: Any,
            at: tuple[int, ...] = (batch, pos, slot),
            mean: Tensor = means[layer][effects.expert_index[where]],
        ) -> Tensor:
            out[at] = mean
            return out

        hooks = [(f"blocks.{layer}.mlp.hook_expert_out", replace)]
        assert_equal(effects, where, Forward(own, tokens, None, hooks=hooks), clean, (batch, pos), real)


def test_means_over_texts_count_no_padding() -> None:
    own, texts = number_reader(random_model), ["11 12 13 14 15 16 17", "21 22 23"]
    expected = expert_means(own, [own.to_tokens(text) for text in texts])
    for reference in (texts, [texts], iter(texts)):
        for layer, means in expert_means(own, reference).items():
            torch.testing.assert_close(means, expected[layer], atol=1e-5, rtol=1e-4, equal_nan=True)
    of_one, of_tokens = (expert_means(own, each)[1] for each in (texts[0], own.to_tokens(texts[0])))
    assert torch.equal(of_one.nan_to_num(9.0), of_tokens.nan_to_num(9.0))


@pytest.mark.parametrize("padding", MASKS)
def test_any_edit_of_the_residual_stream_equals_the_hook_that_makes_it(padding: str, own: HookedMoE, tokens: Tensor) -> None:
    mask = MASKS[padding]
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    generator = torch.Generator().manual_seed(2)
    direction, other = torch.randn(32, generator=generator), torch.randn(2, 8, 32, generator=generator)

    def edit(clean: CleanBlock, where: Queries) -> Tensor:
        steered = clean.resid_post + direction
        patched = other[where.batch, where.pos]
        scaled = clean.resid_mid + 2 * (clean.resid_post - clean.resid_mid)
        return torch.stack((steered, patched, scaled))

    effects = token_effects(own, tokens, edit, 3, attention_mask=mask, readouts=ALL_READOUTS)
    assert effects.layers == [0, 1, 2]
    with torch.no_grad():
        _, cache = own.run_with_cache(tokens, attention_mask=mask)
    clean = Forward(own, tokens, mask)
    for batch, pos in sample(real):
        layer, variant = pos % 3, (pos + batch) % 3
        post, mid = cache["resid_post", layer][batch, pos], cache["resid_mid", layer][batch, pos]
        new = (post + direction, other[batch, pos], mid + 2 * (post - mid))[variant]

        def put(x: Tensor, hook: Any, at: tuple[int, int] = (batch, pos), value: Tensor = new) -> Tensor:
            x[at] = value
            return x

        forward = Forward(own, tokens, mask, hooks=[(f"blocks.{layer}.hook_resid_post", put)])
        assert_equal(effects, (layer, variant, batch, pos), forward, clean, (batch, pos), real)


@pytest.mark.parametrize("readouts", [(), (LossAfter(2),)], ids=["tokens", "windows"])
@pytest.mark.parametrize("positions", [None, [2, 3]])
def test_an_edit_may_write_to_what_it_is_given(positions: Any, readouts: Any, own: HookedMoE, tokens: Tensor) -> None:
    def edit(clean: CleanBlock, where: Queries) -> Tensor:
        return 0.5 * clean.resid_post[None]

    def scribble(clean: CleanBlock, where: Queries) -> Tensor:
        edited = edit(clean, where)
        tensors = [clean.resid_mid, clean.mlp_input, clean.resid_post, *where]
        if isinstance(clean, CleanExperts):
            tensors += [*clean.routing, *clean.expert_outputs, *([] if clean.shared_out is None else [clean.shared_out])]
        for tensor in tensors:
            tensor.fill_(7)
        return edited

    expected, found = (token_effects(own, tokens, each, positions=positions, readouts=readouts) for each in (edit, scribble))
    assert torch.equal(found.delta_loss.nan_to_num(9.0), expected.delta_loss.nan_to_num(9.0))
    assert torch.equal(found.baseline_loss.nan_to_num(9.0), expected.baseline_loss.nan_to_num(9.0))


def test_swapping_experts_is_such_an_edit(own: HookedMoE, tokens: Tensor) -> None:
    """Every token's top expert gives way to expert 4, at the top expert's weight."""

    def swap(clean: CleanBlock, where: Queries) -> Tensor:
        assert isinstance(clean, CleanExperts)
        indices = clean.routing.indices.clone()
        indices[..., 0] = 4
        routed = clean.moe.combine(clean.moe.run_experts(clean.mlp_input, indices), clean.routing.weights)
        return (clean.resid_mid + routed + (0 if clean.shared_out is None else clean.shared_out))[None]

    layer = own.cfg.moe_layers[0]
    effects = token_effects(own, tokens, swap, layers=[layer])
    clean = Forward(own, tokens, None)
    with torch.no_grad():
        _, cache = own.run_with_cache(tokens)
    for batch, pos in [(0, 0), (1, 3), (0, 6)]:

        def edit(indices: Tensor, hook: Any, at: tuple[int, int] = (batch, pos)) -> Tensor:
            indices[(*at, 0)] = 4
            return indices

        def keep_weights(weights: Tensor, hook: Any) -> Tensor:
            return cache[hook.name]

        name = f"blocks.{layer}.mlp.hook_expert_"
        forward = Forward(own, tokens, None, hooks=[(name + "indices", edit), (name + "weights", keep_weights)])
        torch.testing.assert_close(
            effects.delta_loss[0, 0, batch, pos], (forward.losses - clean.losses)[batch, pos], atol=NATS, rtol=0
        )


@given(width=st.integers(0, 4), length=st.integers(2, 7), latent=st.booleans(), data=st.data())
@settings(max_examples=12, deadline=None)
def test_windows_of_any_width_equal_full_forwards(width: int, length: int, latent: bool, data: Any) -> None:
    own = MODELS["deepseek" if latent else "olmoe"]
    tokens = torch.randint(0, 61, (1, length), generator=torch.Generator().manual_seed(length))
    pos = data.draw(st.integers(0, length - 1))
    order = data.draw(st.sampled_from(["descending", "ascending"]))
    effects = progressive_effects(own, tokens, [2], order, positions=[pos], readouts=[LossAfter(width)])
    clean = Forward(own, tokens, None)
    count = data.draw(st.integers(1, 3))
    slots = list(range(3))[:count] if order == "descending" else list(range(3))[-count:]
    entries = [(2, 0, pos, int(effects.expert_index[0, 0, pos, slot])) for slot in slots]
    forward = Forward(own, tokens, None, expert_mask=ExpertMask.ablate(entries))
    expected = (forward.losses - clean.losses)[0, pos : pos + width + 1]
    found = effects.readouts["loss_after"][0, 0, pos, count - 1]
    torch.testing.assert_close(found[: len(expected)], expected, atol=NATS, rtol=0, equal_nan=True)
    assert found[len(expected) :].isnan().all()


# Memory


@pytest.mark.usefixtures("unchecked")
def test_budgets_are_numbers_or_texts() -> None:
    assert [parse_bytes(x) for x in (5, np.int64(5), "7", "2KB", "1.5 MiB", "4GB", "1 gib")] == [
        5,
        5,
        7,
        2000,
        1572864,
        4 * 10**9,
        2**30,
    ]
    for wrong in ("4 apples", "", "-1GB", 0, -3, True, 1.5):
        with pytest.raises(ValueError, match="memory budget is a number of bytes"):
            parse_bytes(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("positions", [None, [1, 3, 4, 6]])
def test_work_is_divided_by_rows_then_layers_then_queries(positions: list[int] | None, tokens: Tensor) -> None:
    packed = pack(tokens, None, positions)
    demand = Demand(fixed=100, row=50, variant_token=1)
    queries, seen = packed.queries, []
    for room in (3 * queries * 3 * 2 + 50, 3 * queries * 3, 3 * queries * 2, 3 * queries, 3 * 2, 3):
        parts = list(divide(packed, [0, 1, 2], demand, 3, 150 + room))
        seen.append(len(parts))
        covered = {
            (int(row), layer, int(place))
            for part, layers in parts
            for row, positions_of_row in zip(part.rows, part.asked_positions(), strict=True)
            for place in positions_of_row
            for layer in layers
        }
        assert len(covered) == 2 * 3 * queries
        assert all(len(part.rows) * part.queries * len(layers) * 3 <= max(room, 3) for part, layers in parts)
    assert seen == [1, 2, 4, 6, 2 * 3 * -(-queries // 2), 2 * 3 * queries]
    with pytest.raises(ValueError, match=r"memory_budget is 152 bytes, and rows of 8 tokens take 153 at least"):
        list(divide(packed, [0, 1, 2], demand, 3, 152))


def test_readouts_that_the_model_lacks_are_refused_before_anything_is_measured(
    own: HookedMoE, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer, "fan_out", None)
    with pytest.raises(ValueError, match="token id 999 is out of range: the model has ids 0 to 60"):
        expert_effects(own, tokens, readouts=[LogitDifference(0, 999)])


def test_a_small_budget_changes_nothing_but_rounding(own: HookedMoE, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = expert_effects(own, tokens, readouts=ALL_READOUTS)
    demand = demand_of(own.cfg, 8)
    parts: list[int] = []
    original = requests.divide

    def counted(*args: Any) -> Any:
        for part in original(*args):
            parts.append(1)
            yield part

    monkeypatch.setattr(requests, "divide", counted)
    budget = demand.fixed + demand.row + 3 * 3 * 3 * demand.variant_token  # three queries of one layer
    small = expert_effects(own, tokens, readouts=ALL_READOUTS, memory_budget=budget)
    assert len(parts) == 2 * len(own.cfg.moe_layers) * 3
    for name in ("delta_loss", "routing_weight", "rest_cosine", "baseline_loss"):
        torch.testing.assert_close(getattr(small, name), getattr(whole, name), atol=NATS, rtol=1e-5, equal_nan=True)
    assert torch.equal(small.expert_index, whole.expert_index)
    for name, table in whole.readouts.items():
        torch.testing.assert_close(small.readouts[name], table, atol=1e-4, rtol=1e-4, equal_nan=True)


# What is refused


def post(clean: CleanBlock, where: Queries) -> Tensor:
    return clean.resid_post[None]


def hooked(model: HookedMoE, run: Callable[[], Any]) -> Any:
    with model.hooks([("blocks.1.attn.hook_z", lambda x, hook: 0 * x)]):
        return run()


Refused = Callable[[HookedMoE, Tensor], Any]
REFUSALS: dict[str, tuple[Refused, str]] = {
    "mean without means": (
        lambda m, t: expert_effects(m, t, removal="mean"),
        r"Mean\(expert_means\(model, reference\)\)",
    ),
    "a class for an object": (lambda m, t: expert_effects(m, t, removal=Mean), "removal must be one of"),
    "no means at all": (lambda m, t: expert_effects(m, t, removal=Mean({})), "no layers"),
    "means of other layers": (lambda m, t: expert_effects(m, t, [2], removal=Mean({1: torch.ones(6, 32)})), "no layers"),
    "means of another shape": (
        lambda m, t: expert_effects(m, t, [2], removal=Mean({2: torch.ones(5, 32)})),
        r"\[6, 32\]",
    ),
    "means of experts never seen": (
        lambda m, t: expert_effects(m, t, [2], removal=Mean({2: torch.full((6, 32), float("nan"))})),
        "no reference token went to them",
    ),
    "means of nothing": (lambda m, t: expert_means(m, []), "no reference to take means over"),
    "means of a hooked model": (lambda m, t: hooked(m, lambda: expert_means(m, t)), "hook_z has hooks"),
    "unknown removal": (lambda m, t: expert_effects(m, t, removal="drop"), "removal must be one of"),
    "unknown scope": (lambda m, t: expert_effects(m, t, scope="all"), "scope must be"),
    "readouts of a sequence": (lambda m, t: expert_effects(m, t, scope="sequence", readouts=[KL()]), "single tokens"),
    "one name twice": (lambda m, t: expert_effects(m, t, readouts=[LossAfter(1), LossAfter(2)]), "different names"),
    "no list of readouts": (
        lambda m, t: expert_effects(m, t, readouts=KL()),
        r"a list of readouts, as in \[KL\(\)\], not KL\(\)",
    ),
    "names of readouts": (lambda m, t: expert_effects(m, t, readouts=["kl"]), "a list of readouts, .* 'kl' is none"),
    "readouts not made": (lambda m, t: expert_effects(m, t, readouts=[KL]), "a list of readouts, .* is none"),
    "half a token": (lambda m, t: expert_effects(m, t, readouts=[LogitDifference(3, 1.5)]), r"takes token ids .* not 1\.5"),
    "token that is not there": (lambda m, t: expert_effects(m, t, readouts=[LogitDifference(3, 99)]), "99 is out of range"),
    "too little memory": (lambda m, t: expert_effects(m, t, memory_budget="1KB"), r"memory_budget is 1,000 bytes, and rows of 8"),
    "mask of another shape": (lambda m, t: mask_effects(m, t, {2: torch.ones(2, 2, 8, 5) > 0}), r"\[any, 2, 8, 6\]"),
    "mask of whole numbers": (lambda m, t: mask_effects(m, t, {2: torch.ones(1, 1, 1, 6).long()}), "bool or float"),
    "mask that is an array": (
        lambda m, t: mask_effects(m, t, {2: np.ones((1, 1, 1, 6), bool)}),
        "bool or float tensor, not ndarray",
    ),
    "mask that is a list": (lambda m, t: mask_effects(m, t, {2: [True] * 6}), "bool or float tensor, not list"),
    "negative shares": (
        lambda m, t: mask_effects(m, t, {2: -torch.ones(1, 1, 1, 6)}, "renormalize"),
        "no rest could be rescaled",
    ),
    "no masks": (lambda m, t: mask_effects(m, t, {2: torch.zeros(0, 1, 1, 6) > 0}), "must be a whole number from 1, not 0"),
    "no edits": (lambda m, t: token_effects(m, t, post, 0), "must be a whole number from 1, not 0"),
    "fewer than no edits": (lambda m, t: token_effects(m, t, post, -1), "must be a whole number from 1, not -1"),
    "a fraction of edits": (lambda m, t: token_effects(m, t, post, 1.0), r"must be a whole number from 1, not 1\.0"),
    "edit of nothing": (lambda m, t: token_effects(m, t, lambda clean, where: None), "edit returned NoneType"),
    "edit of a tuple": (lambda m, t: token_effects(m, t, lambda *given: (post(*given),)), "edit returned tuple"),
    "edit of whole numbers": (lambda m, t: token_effects(m, t, lambda *given: post(*given).long()), "edit returned torch.int64"),
    "rerouted floats": (lambda m, t: mask_effects(m, t, {2: torch.ones(1, 1, 1, 6)}, "reroute"), "takes bool masks"),
    "unequal numbers": (
        lambda m, t: mask_effects(m, t, {1: torch.ones(2, 1, 1, 6), 2: torch.ones(3, 1, 1, 6)}),
        "as many masks as the others",
    ),
    "edit of another shape": (lambda m, t: token_effects(m, t, lambda clean, where: clean.resid_post), "edit returned shape"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_cannot_be_measured_is_refused_by_name(refusal: str, tokens: Tensor) -> None:
    run, message = REFUSALS[refusal]
    with pytest.raises(ValueError, match=message):
        run(MODELS["olmoe"], tokens)


def test_a_dense_layer_can_be_edited_but_has_no_experts_to_remove(tokens: Tensor) -> None:
    own = MODELS["deepseek"]
    with pytest.raises(ValueError, match=r"layer 0 is dense: it has no experts; layers \[1, 2\] have"):
        mask_effects(own, tokens, {0: torch.ones(1, 1, 1, 6)})
    effects = token_effects(own, tokens, lambda clean, where: 2 * clean.resid_post[None], layers=[0])
    assert effects.delta_loss[0, 0, :, :-1].isfinite().all()
