"""Products of the change: in the model's own dtype an identity, in bfloat16 near it, and whatever breaks them shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_moe import ExpertMask, HookedMoE
from hooked_moe.components.moe import MoE
from hooked_moe.counterfactuals import LossAfter, Mean, expert_effects, expert_means
from hooked_moe.counterfactuals.engine import products, requests
from hooked_moe.counterfactuals.results import ExpertEffects
from hooked_moe.kernels.cpu import expert_mlp
from tests.conftest import EVERY_ARCHITECTURE, random_model

NATS = 1e-5
SHARE = 0.01
"""Of the median effect, that the median difference of half precision may be; some thousandths are measured."""
SHARES = {"bfloat16": SHARE, "float16": SHARE / 8}
"""float16 has three more bits."""
HOLES = torch.tensor([[1] * 4 + [0] + [1] * 6, [0] + [1] * 2 + [0] * 2 + [1] * 6])
OPTIONS: dict[str, dict[str, Any]] = {
    "all removals": {},
    "renormalize": {"removal": "renormalize"},
    "reroute, padding": {"removal": "reroute", "attention_mask": HOLES},
    "some positions and layers": {"positions": [2, 7], "layers": [2]},
    "later tokens": {"scope": "from_position", "readouts": [LossAfter(3)]},
    "little memory": {"memory_budget": "70MB"},
}


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of the change in float32, which round as the model's own do."""
    monkeypatch.setattr(requests, "checked_products", lambda model, name: None if name is None else torch.float32)


@pytest.fixture(params=["experts one by one", "experts together"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two ways in which a CPU runs experts, whatever their sizes."""
    monkeypatch.setattr(expert_mlp, "MIN_FLOPS_PER_EXPERT", 0.0 if request.param == "experts one by one" else float("inf"))


@pytest.fixture
def newly_served(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many slots went to experts that did not serve the token in the clean run, every time that some did."""
    numbers: list[int] = []
    plain = MoE.run_experts

    def counting(self: MoE, x: Tensor, indices: Tensor, scratch: Any = None) -> Any:
        if indices.shape[-1] == 1:
            numbers.append(indices.numel())
        return plain(self, x, indices, scratch)

    monkeypatch.setattr(MoE, "run_experts", counting)
    return numbers


def differences(found: ExpertEffects, expected: ExpertEffects) -> Tensor:
    """Of the effects, in nats, as shares of the median one."""
    assert torch.equal(found.delta_loss.isfinite(), expected.delta_loss.isfinite())
    measured = expected.delta_loss.isfinite()
    off = (found.delta_loss - expected.delta_loss)[measured].abs()
    return off / expected.delta_loss[measured].abs().median()


@pytest.mark.usefixtures("in_float32", "either_way")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@EVERY_ARCHITECTURE
def test_in_the_dtype_of_the_model_they_are_an_identity(options: dict[str, Any], model: HookedMoE, tokens: Tensor) -> None:
    found, expected = (expert_effects(model, tokens, products=form, **options) for form in ("bfloat16", None))
    for name in ("delta_loss", "kl"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=NATS, rtol=0, equal_nan=True)
    for name, values in expected.readouts.items():
        torch.testing.assert_close(found.readouts[name], values, atol=NATS, rtol=0, equal_nan=True)


@pytest.mark.usefixtures("in_float32")
@EVERY_ARCHITECTURE
def test_picked_removals_and_means_are_too(model: HookedMoE, tokens: Tensor) -> None:
    removal = Mean(expert_means(model, [tokens]))
    dense = expert_effects(model, tokens, removal=removal)
    picks = torch.rand(dense.delta_loss.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    found = expert_effects(model, tokens, removal=removal, picks=picks, products="bfloat16").delta_loss
    expected = dense.delta_loss.where(picks, torch.nan)
    torch.testing.assert_close(found, expected, atol=NATS, rtol=0, equal_nan=True)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("form", SHARES)
@EVERY_ARCHITECTURE
def test_in_half_precision_effects_are_near_and_the_clean_run_is_the_same_to_the_bit(
    model: HookedMoE, tokens: Tensor, form: str
) -> None:
    expected = expert_effects(model, tokens)
    found = expert_effects(model, tokens, products=form)
    assert torch.equal(found.baseline_loss.nan_to_num(7.0), expected.baseline_loss.nan_to_num(7.0))
    assert torch.equal(found.expert_index, expected.expert_index)
    assert torch.equal(found.gap_norm, expected.gap_norm)
    off = differences(found, expected)
    assert 0 < off.median() < SHARES[form]
    assert off.quantile(0.99) < 30 * SHARES[form]


@EVERY_ARCHITECTURE
def test_they_are_near_full_forwards_without_the_expert(model: HookedMoE, tokens: Tensor, newly_served: list[int]) -> None:
    found = expert_effects(model, tokens, products="bfloat16")
    assert sum(newly_served) > 0, "some removal sends a token to an expert that did not serve it"
    clean = model(tokens, return_type="loss", loss_per_token=True)
    off, sizes = [], []
    layer = model.cfg.moe_layers[0]
    for pos in range(10):
        for slot in range(3):
            keep = torch.ones(2, 11, 6, dtype=torch.bool)
            keep[[0, 1], pos, found.expert_index[0, :, pos, slot]] = False
            without = model(tokens, return_type="loss", loss_per_token=True, expert_mask=ExpertMask({layer: keep}))
            effect = (without - clean)[:, pos]
            off.append(found.delta_loss[0, :, pos, slot] - effect)
            sizes.append(effect)
    assert torch.cat(off).abs().median() < SHARE * torch.cat(sizes).abs().median()


def test_experts_new_to_a_token_are_no_worse_than_others(newly_served: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many experts, whose logits are close, a removal sends many tokens elsewhere in later layers."""
    model = random_model("qwen", num_experts=48, experts_per_token=4, n_layers=5)
    tokens = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(2))
    expected = expert_effects(model, tokens)
    newly_served.clear()
    found = expert_effects(model, tokens, products="bfloat16")
    assert sum(newly_served) > 200
    assert differences(found, expected).median() < SHARE
    monkeypatch.setattr(requests, "checked_products", lambda model, name: torch.float32)
    same = expert_effects(model, tokens, products="bfloat16")
    torch.testing.assert_close(same.delta_loss, expected.delta_loss, atol=NATS, rtol=0, equal_nan=True)


BROKEN: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "without the clean product": lambda patch: patch.setattr(products, "_plus_clean", lambda change, clean: change.float()),
    "of the input, not its change": lambda patch: patch.setattr(
        products._ChangedProducts, "_shift_of", lambda self, x, clean_x: x.to(torch.bfloat16)
    ),
    "with the clean product of other positions": lambda patch: patch.setattr(
        products, "_plus_clean", lambda change, clean, right=products._plus_clean: right(change, clean.roll(1, dims=1))
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_what_breaks_them_shows(broken: str, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    expected = expert_effects(model, tokens)
    BROKEN[broken](monkeypatch)
    assert differences(expert_effects(model, tokens, products="bfloat16"), expected).median() > 10 * SHARE


@pytest.mark.parametrize(
    ("name", "form", "nats"),
    [
        ("tiny-olmoe", "bfloat16", 1e-4),
        ("tiny-deepseek-moe", "bfloat16", 1e-4),
        ("tiny-qwen-moe", "bfloat16", 1e-4),
        ("tiny-mixtral", "bfloat16", 5e-4),  # its experts matter five times as much
        ("tiny-olmoe", "float16", 1e-5),
        ("tiny-mixtral", "float16", 5e-5),
    ],
)
def test_a_shipped_model_is_off_by_less_than_the_stated_error(name: str, form: str, nats: float) -> None:
    model = HookedMoE.from_pretrained(name)
    tokens = model.to_tokens("The sea was calm that night, and nobody spoke of the ship.")
    expected, found = (expert_effects(model, tokens, products=products) for products in (None, form))
    off = (found.delta_loss - expected.delta_loss)[:, :, :-1].abs().flatten()
    assert 0 < off.median() < nats
    assert off.quantile(0.99) < 100 * nats
    half = expert_effects(HookedMoE.from_pretrained(name, dtype="bfloat16"), tokens)
    assert differences(half, expected).median() > 20 * differences(found, expected).median()


def test_streamed_and_stored_in_bfloat16_they_are_the_same_to_the_bit(tokens: Tensor, tmp_path: Path) -> None:
    random_model("deepseek", model_type="deepseek_v2", n_layers=4, d_shared=24).save_pretrained(tmp_path)
    in_memory, streamed = (HookedMoE.from_pretrained(tmp_path, store="bfloat16", stream=stream) for stream in (False, True))
    for options in ({}, {"memory_budget": "70MB"}):
        found, expected = (expert_effects(model, tokens, products="bfloat16", **options) for model in (streamed, in_memory))
        assert torch.equal(found.delta_loss.nan_to_num(7.0), expected.delta_loss.nan_to_num(7.0))
    assert differences(expected, expert_effects(in_memory, tokens)).median() < SHARE


@pytest.mark.parametrize("form", ["all", "picked", "later tokens"])
def test_a_change_beyond_the_range_of_float16_is_refused(tokens: Tensor, form: str) -> None:
    model = random_model()
    with torch.no_grad():
        model.get_parameter("blocks.1.attn.W_O").mul_(6e4)  # none is out of range, but sums of them are
    options: dict[str, Any] = {
        "all": {},
        "picked": {"picks": torch.ones(3, *tokens.shape, 3, dtype=torch.bool)},
        "later tokens": {"scope": "from_position", "readouts": [LossAfter(2)]},
    }[form]
    near = expert_effects(model, tokens, products="bfloat16", **options)
    assert near.delta_loss[:, :, :-1].isfinite().all()
    with pytest.raises(ValueError, match=r"predictions after a removal are not finite. float16 ends at 65,504"):
        expert_effects(model, tokens, products="float16", **options)


def test_a_later_token_out_of_range_is_refused_too() -> None:
    losses, targets, streams = torch.zeros(2, 1, 3), torch.tensor([[4, 2, -1]]), torch.zeros(2, 1, 6, 8)
    losses[:, :, 2] = float("nan")
    products.require_in_range(losses, targets, streams)
    streams[1, 0, 3, 5] = float("inf")
    products.require_in_range(losses, targets, None)
    with pytest.raises(ValueError, match="1 of the predictions"):
        products.require_in_range(losses, targets, streams)


def test_what_cannot_be_is_refused(model: HookedMoE, tokens: Tensor, unchecked: None) -> None:
    with pytest.raises(ValueError, match=r"products must be 'bfloat16', 'float16' or None, not 'float8'"):
        expert_effects(model, tokens, products="float8")
    strided = random_model()
    weight = strided.get_parameter("blocks.1.attn.W_K")
    weight.data = weight.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0)
    with pytest.raises(ValueError, match=r"products='bfloat16' takes contiguous weights, which blocks.1.attn.W_K is not"):
        expert_effects(strided, tokens, products="bfloat16")
    with pytest.raises(ValueError, match=r"in the model's own dtype: leave out products, or choose another scope"):
        expert_effects(model, tokens, scope="sequence", products="bfloat16")
    with pytest.raises(ValueError, match=r"rounds everything to torch.bfloat16: load it with dtype='float32'"):
        expert_effects(random_model().to(torch.bfloat16), tokens, products="bfloat16")
