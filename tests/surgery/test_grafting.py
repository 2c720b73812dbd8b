"""Grafts of two trainings, against their definition: a state dict with some of its entries replaced."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_moe import HookedMoE
from hooked_moe.checks import UnknownNameError
from hooked_moe.surgery import (
    PARTS,
    CheckpointGrafts,
    DocumentValues,
    Grafts,
    align_experts,
    coalition_shares,
    graft,
    graft_checkpoints,
    graft_sweep,
    match_experts,
    null_sweep,
    renumber_experts,
    untrained,
)
from hooked_moe.surgery.parts import BLOCK_PARTS, chosen_places, place_of, places
from tests.conftest import EVERY_ARCHITECTURE, random_model

OLMOE_PARTS = ("attention", "router", "experts", "ln2")


def other_training(architecture: str = "olmoe", seed: int = 7, **changes: object) -> HookedMoE:
    model = random_model(architecture, **changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def same(a: HookedMoE, b: HookedMoE) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@EVERY_ARCHITECTURE
def test_every_parameter_belongs_to_one_part(model: HookedMoE) -> None:
    by_place = places(model)
    names = [name for own in by_place.values() for name in own]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert {part for _, part in by_place} <= set(PARTS)
    assert all(place_of(name) == place for place, own in by_place.items() for name in own)


@EVERY_ARCHITECTURE
@torch.no_grad()
def test_a_graft_of_everything_is_the_other_and_of_nothing_the_first(model: HookedMoE, architecture: str, tokens: Tensor) -> None:
    b = other_training(architecture)
    assert torch.equal(graft(model, b, "all", "all")(tokens), b(tokens))
    assert torch.equal(graft(model, b, {})(tokens), model(tokens))
    assert not torch.equal(graft(model, b)(tokens), b(tokens))  # what is outside of the blocks stays


@EVERY_ARCHITECTURE
@torch.no_grad()
def test_a_graft_is_a_state_dict_with_entries_replaced(model: HookedMoE, architecture: str, tokens: Tensor) -> None:
    b = other_training(architecture)
    layers, parts = [0, 2], [part for part in ("attention", "router", "embedding") if part in {p for _, p in places(model)}]
    expected = random_model(architecture)
    state, donors = expected.state_dict(), b.state_dict()
    for name in state:
        inside = name.startswith(("blocks.0.", "blocks.2."))
        if name == "embed.W_E" or (inside and (".attn." in name or ".ln1." in name or ".mlp.router." in name)):
            state[name] = donors[name]
    expected.load_state_dict(state)
    grafted = graft(model, b, layers, parts)
    assert same(grafted, expected)
    assert torch.equal(Grafts(model, b).model(chosen_places(places(model), layers, parts))(tokens), grafted(tokens))


def test_a_graft_can_be_taken_back_and_disjoint_grafts_commute(model: HookedMoE) -> None:
    b = other_training()
    assert same(graft(graft(model, b, {1}, ["experts"]), model, {1}, ["experts"]), model)
    first, second = ({0, 1}, ("attention", "router")), ({1, 2}, ("experts",))
    assert same(graft(graft(model, b, *first), b, *second), graft(graft(model, b, *second), b, *first))


def test_a_graft_owns_its_weights(model: HookedMoE) -> None:
    b = other_training()
    grafted, before = graft(model, b, {0}, ["experts"]), [p.clone() for p in (*model.parameters(), *b.parameters())]
    with torch.no_grad():
        for parameter in grafted.parameters():
            parameter.zero_()
    assert all(torch.equal(old, new) for old, new in zip(before, (*model.parameters(), *b.parameters()), strict=True))


def test_tied_weights_stay_tied() -> None:
    a, b = random_model(tie_word_embeddings=True), other_training(tie_word_embeddings=True)
    grafted = graft(a, b, {}, ["embedding"])
    assert grafted.unembed.W_U is grafted.embed.W_E
    assert torch.equal(grafted.unembed.W_U, b.embed.W_E)
    with pytest.raises(ValueError, match=r"unembedding.*those of the embedding"):
        graft(a, b, "all", ["unembedding"])


def test_names_that_do_not_exist_are_refused(model: HookedMoE) -> None:
    b = other_training()
    with pytest.raises(UnknownNameError, match="unknown part 'expert'; did you mean 'experts'"):
        graft(model, b, "all", ["expert"])
    with pytest.raises(ValueError, match="layers=3: the model has layers 0 to 2"):
        graft(model, b, {3})
    with pytest.raises(ValueError, match="no part 'shared' to graft: it has none"):
        graft(model, b, "all", ["shared"])
    with pytest.raises(UnknownNameError, match="unknown sweep 'sufix'; did you mean 'suffix'"):
        graft_sweep(model, b, lambda model: 0.0, ["sufix"])
    with pytest.raises(UnknownNameError, match="unknown direction"):
        graft_sweep(model, b, lambda model: 0.0, ["part"], ["b->a"])


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"norm_topk_prob": True}, "norm_topk_prob"), ({"num_experts": 5}, "num_experts"), ({"n_heads": 8}, "n_heads")],
)
def test_other_architectures_are_refused_by_name(model: HookedMoE, changes: dict[str, object], field: str) -> None:
    with pytest.raises(ValueError, match=f"differ in {field}"):
        graft(model, random_model(**changes))


def test_other_tokenizers_and_dtypes_are_refused(model: HookedMoE) -> None:
    a, b = (HookedMoE.from_pretrained(name) for name in ("tiny-olmoe", "tiny-olmoe"))
    assert a.tokenizer is not None
    assert b.tokenizer is not None
    b.tokenizer.backend.add_tokens(["<new>"])
    with pytest.raises(ValueError, match="different tokenizers"):
        graft(a, b)
    with pytest.raises(ValueError, match=r"float32 and torch\.float64"):
        graft(model, random_model().to(dtype=torch.float64))


# --- sweeps -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def document_losses(tokens: Tensor, model: HookedMoE) -> DocumentValues:
    loss = model(tokens, return_type="loss", loss_per_token=True).double().sum(dim=1)
    return DocumentValues(loss.numpy(), np.full(len(tokens), tokens.shape[1] - 1.0))


@pytest.fixture
def text() -> Tensor:
    return torch.randint(0, 61, (5, 9), generator=torch.Generator().manual_seed(3))


def test_shares_are_those_of_their_definition(model: HookedMoE, text: Tensor) -> None:
    b = other_training()

    def loss(model: HookedMoE) -> float:
        with torch.no_grad():
            return float(model(text, return_type="loss"))

    rows = graft_sweep(model, b, lambda model: document_losses(text, model)).to_pylist()
    low, high = loss(model), loss(b)
    parts = {"blocks": OLMOE_PARTS, "outer": ("embedding", "final_norm", "unembedding"), "everything": "all", "none": ()}
    for row in rows:
        first, _, last = row["layers"].partition("-")
        layers = "all" if first == "all" else () if first == "none" else range(int(first), int(last or first) + 1)
        chosen = parts.get(row["parts"], (row["parts"],))
        host, donor = (model, b) if row["direction"] == "a<-b" else (b, model)
        value = loss(graft(host, donor, layers, chosen))
        share = (value - low) / (high - low)
        assert row["value"] == pytest.approx(value, abs=1e-5)
        assert row["share"] == pytest.approx(share if row["direction"] == "a<-b" else 1 - share, abs=1e-3)
    assert [row["sweep"] for row in rows].count("layer_part") == 2 * 3 * 4
    assert [row["layers"] for row in rows if row["sweep"] == "suffix"][::2] == ["2", "1-2", "0-2"]
    assert all(row["value_low"] <= row["value"] <= row["value_high"] for row in rows)


def test_a_readout_without_documents_has_no_interval(model: HookedMoE) -> None:
    rows = graft_sweep(model, other_training(), lambda model: float(model.embed.W_E.sum()), ["ends"], ["a<-b"]).to_pylist()
    assert [row["share"] for row in rows] == pytest.approx([0, 1, 0, 1])
    assert all(np.isnan(row["share_low"]) for row in rows)


@pytest.mark.parametrize("players", ["layers", "parts"])
def test_exact_shares_are_efficient_and_those_of_all_orders(model: HookedMoE, text: Tensor, players: str) -> None:
    b = other_training()
    table = coalition_shares(model, b, lambda model: document_losses(text, model), players)  # type: ignore[arg-type]
    assert sum(table["shapley"].to_pylist()) == pytest.approx(1, abs=1e-9)
    names = table["player"].to_pylist()
    assert names == (["layer 0", "layer 1", "layer 2", "outer"] if players == "layers" else [*OLMOE_PARTS, "outer"])

    known = places(model)

    def value(coalition: frozenset[str]) -> float:
        taken = {
            place
            for place in known
            if ("outer" if place[0] is None else f"layer {place[0]}" if players == "layers" else place[1]) in coalition
        }
        return float(document_losses(text, Grafts(model, b).model(taken)).total.sum())

    everyone = frozenset(names)
    whole = value(everyone) - value(frozenset())
    gains = [
        [value(frozenset(others) | {name}) - value(frozenset(others)) for others in combinations(sorted(everyone - {name}), size)]
        for name in names[:1]
        for size in range(len(names))
    ]
    assert table["shapley"][0].as_py() == pytest.approx(float(np.mean([np.mean(own) for own in gains])) / whole, abs=1e-9)
    assert table["banzhaf"][0].as_py() == pytest.approx(float(np.mean([gain for own in gains for gain in own])) / whole, abs=1e-9)


def test_too_many_players_are_refused(model: HookedMoE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hooked_moe.surgery.graft_sweeps.MAXIMUM_PLAYERS", 3)
    with pytest.raises(ValueError, match=r"4 layers have 2\^4 coalitions"):
        coalition_shares(model, other_training(), lambda model: 0.0)


# --- checkpoints ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@torch.no_grad()
def test_grafts_of_checkpoints_are_those_of_the_models(tmp_path: Path, tokens: Tensor, stream: bool) -> None:
    a, b = random_model(d_head=8), other_training(d_head=8)
    a.save_pretrained(tmp_path / "a")
    b.save_pretrained(tmp_path / "b")
    chosen = ({0, 2}, ("experts", "attention", "final_norm"))
    grafted = graft_checkpoints(HookedMoE, tmp_path / "a", tmp_path / "b", *chosen, stream=stream)
    assert grafted.streams == stream
    assert torch.equal(grafted(tokens), graft(a, b, *chosen)(tokens))
    if not stream:
        grafts = CheckpointGrafts(HookedMoE, tmp_path / "a", tmp_path / "b")
        table = graft_sweep(grafts, None, lambda model: document_losses(tokens, model), ["part"])
        expected = graft_sweep(a, b, lambda model: document_losses(tokens, model), ["part"])
        assert str(table.to_pylist()) == str(expected.to_pylist())  # as texts, where NaN equals NaN
    else:
        with pytest.raises(ValueError, match="graft_checkpoints"):
            graft(grafted, b)


def test_checkpoints_of_other_shapes_are_refused(tmp_path: Path) -> None:
    for name, changes in (("a", {}), ("b", {"num_experts": 5})):
        random_model(d_head=8, **changes).save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="differ in num_experts: 6 and 5"):
        CheckpointGrafts(HookedMoE, tmp_path / "a", tmp_path / "b")


# --- nulls and alignment ----------------------------------------------------------------------------------------------------


def test_an_untrained_model_is_new_and_the_same_for_a_seed(model: HookedMoE) -> None:
    before = torch.random.get_rng_state()
    assert same(untrained(model, 1), untrained(model, 1))
    assert not same(untrained(model, 1), untrained(model, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert untrained(model).cfg == model.cfg


def test_nulls_are_grafts_of_a_third_model_onto_either_in_shares_of_the_difference(model: HookedMoE, text: Tensor) -> None:
    b, new = other_training(), untrained(model)
    rows = null_sweep(model, b, new, lambda own: document_losses(text, own)).to_pylist()

    def loss(own: HookedMoE) -> float:
        with torch.no_grad():
            return float(own(text, return_type="loss"))

    low, high = loss(model), loss(b)
    for row in rows:
        first, _, last = row["layers"].partition("-")
        layers = "all" if first in ("all", "none") else range(int(first), int(last or first) + 1)
        chosen = OLMOE_PARTS if row["parts"] == "blocks" else (row["parts"],)
        value = loss(graft(model if row["direction"] == "a<-other" else b, new, layers, chosen))
        assert row["value"] == pytest.approx(value, abs=1e-5)
        share = (value - low) / (high - low) if row["direction"] == "a<-other" else (high - value) / (high - low)
        assert row["share"] == pytest.approx(share, abs=1e-3)
    assert {row["sweep"] for row in rows} == {"suffix", "single", "part"}
    with pytest.raises(UnknownNameError, match="did you mean 'suffix'"):
        null_sweep(model, b, new, lambda own: document_losses(text, own), ["sufix"])


def test_the_null_of_the_other_training_itself_is_its_graft(model: HookedMoE, text: Tensor) -> None:
    b = other_training()
    nulls = null_sweep(model, b, b, lambda own: document_losses(text, own), ["single"]).to_pylist()
    grafts = graft_sweep(model, b, lambda own: document_losses(text, own), ["single"]).to_pylist()
    carried, expected = ([row["share"] for row in rows if row["direction"][0] == "a"] for rows in (nulls, grafts))
    np.testing.assert_allclose(carried, expected, atol=1e-9)
    assert all(row["share"] == 0 for row in nulls if row["direction"] == "b<-other")


@pytest.mark.parametrize("architecture", ["olmoe", "qwen"])
@torch.no_grad()
def test_renumbered_experts_are_found_again_and_compute_the_same(model: HookedMoE, tokens: Tensor) -> None:
    generator = torch.Generator().manual_seed(5)
    order = {layer: torch.randperm(6, generator=generator).tolist() for layer in model.cfg.moe_layers}
    shuffled = renumber_experts(model, order)
    torch.testing.assert_close(shuffled(tokens), model(tokens), atol=1e-5, rtol=1e-5)
    found = match_experts(model, shuffled)
    assert all([order[layer][expert] for expert in found[layer]] == list(range(6)) for layer in order)
    assert same(align_experts(model, shuffled), model)
    # a graft of shuffled experts alone is a wreck; aligned, it is the model itself
    assert not torch.allclose(graft(model, shuffled, "all", ["experts"])(tokens), model(tokens), atol=1e-2)
    assert torch.equal(graft(model, align_experts(model, shuffled), "all", ["experts"])(tokens), model(tokens))


@pytest.mark.parametrize(("architecture", "changes"), [("gpt-oss", {}), ("glm", {"n_expert_groups": 1, "groups_per_token": 1})])
@torch.no_grad()
def test_biases_of_routers_and_experts_go_with_their_experts(architecture: str, changes: dict[str, Any], tokens: Tensor) -> None:
    model = random_model(architecture, **changes)
    order = {layer: [3, 1, 4, 0, 5, 2] for layer in model.cfg.moe_layers}
    shuffled = renumber_experts(model, order)
    torch.testing.assert_close(shuffled(tokens), model(tokens), atol=1e-5, rtol=1e-5)
    assert same(align_experts(model, shuffled), model)


def test_alignment_does_not_depend_on_torch_modes(model: HookedMoE) -> None:
    b = other_training()
    expected = match_experts(model, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert match_experts(model, b) == expected
    with torch.inference_mode():
        copies = [align_experts(model, b), graft(model, b), Grafts(model, b).model([])]
    assert not any(parameter.is_inference() for copy in copies for parameter in copy.parameters())


def test_hooks_stay_with_the_model_that_has_them(model: HookedMoE, tokens: Tensor) -> None:
    b = other_training()
    plain = graft(model, b, layers={1})(tokens)
    model.add_hook("blocks.0.hook_resid_post", lambda x, hook: x * 2, is_permanent=True)
    assert torch.equal(graft(model, b, layers={1})(tokens), plain)
    assert not Grafts(model, b).model([]).has_hooks
    assert model.has_hooks
    model.reset_hooks(including_permanent=True)


def test_experts_in_groups_are_not_renumbered() -> None:
    with pytest.raises(ValueError, match="3 groups"):
        match_experts(random_model("deepseek"), other_training("deepseek"))
    with pytest.raises(ValueError, match="3 groups"):
        renumber_experts(random_model("deepseek"), {0: [1, 0, 2, 3, 4, 5]})
    with pytest.raises(ValueError, match="each of its experts once"):
        renumber_experts(random_model(), {0: [0, 0, 1, 2, 3, 4]})


def test_parts_of_blocks_cover_what_a_default_graft_takes(model: HookedMoE) -> None:
    assert chosen_places(places(model), "all", OLMOE_PARTS) == {place for place in places(model) if place[1] in BLOCK_PARTS}
