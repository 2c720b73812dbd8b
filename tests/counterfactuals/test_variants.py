"""Batched interventions equal serial ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_moe import HookedMoE, HookPoint
from hooked_moe.counterfactuals.engine.memory import demand_of
from tests.conftest import random_model

MASK = torch.tensor([[1] * 11, [0] * 4 + [1] * 7])


def scaled(factor: float) -> Callable[..., Tensor]:
    return lambda x, hook: x * factor


def in_place(x: Tensor, hook: HookPoint) -> None:
    x[:, 3] += 0.5


def only_of_row_1(x: Tensor, hook: HookPoint) -> Tensor:
    """An edit that looks at where an expert's rows come from."""
    batch = hook.ctx["tokens"][:, 0]
    assert ((batch == 0) | (batch == 1)).all()
    x[batch == 1] *= -2
    return x


EDITS: dict[str, Any] = {
    "embedding": ("hook_embed", scaled(1.5)),
    "late": ("blocks.2.hook_resid_pre", scaled(0.5)),
    "in place": ("blocks.1.attn.hook_v", in_place),
    "pattern": ("blocks.1.attn.hook_pattern", scaled(0.9)),
    "routing": ("blocks.0.mlp.hook_router_logits", lambda x, hook: x.flip(-1)),
    "one expert": ("blocks.1.mlp.experts.2.hook_out", only_of_row_1),
    "same point again": ("blocks.2.hook_resid_pre", scaled(2.0)),
    "several": [("blocks.2.mlp.hook_expert_out", scaled(0.0)), ("blocks.1.hook_mlp_out", scaled(-1.0))],
    "predicate": (lambda name: name.endswith("hook_routed_out"), scaled(0.7)),
    "last norm": ("ln_final.hook_normalized", scaled(1.2)),
    "nothing": ("blocks.0.hook_resid_pre", lambda x, hook: None),
}


def serial(model: HookedMoE, tokens: Tensor, edit: Any, **options: Any) -> Any:
    with torch.no_grad():
        return model.run_with_hooks(tokens, fwd_hooks=edit if isinstance(edit, list) else [edit], **options)


def least_budget(model: HookedMoE, n_variants: int = 1) -> int:
    """For so many variants of the two rows of 11 tokens at once."""
    demand = demand_of(model.cfg, 11, chunk_size=11)
    return demand.fixed + n_variants * 2 * (demand.row + 11 * (61 * 8 + demand.variant_token))


@pytest.mark.parametrize("mask", [None, MASK], ids=["plain", "padded"])
@pytest.mark.parametrize("small", [False, True], ids=["one group", "groups"])
def test_batched_equals_serial(mask: Tensor | None, small: bool, model: HookedMoE, tokens: Tensor) -> None:
    budget = least_budget(model, n_variants=3) if small else "1GB"
    options = {"attention_mask": mask, "return_type": "both"}
    batched = model.run_variants(tokens, list(EDITS.values()), loss_per_token=True, memory_budget=budget, **options)
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    for row, (name, edit) in enumerate(EDITS.items()):
        expected = serial(model, tokens, edit, loss_per_token=True, **options)
        torch.testing.assert_close(
            batched.logits[row][real], expected.logits[real], atol=1e-4, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
        torch.testing.assert_close(batched.loss[row], expected.loss, atol=1e-5, rtol=1e-5, equal_nan=True)
    assert not any(point.active for point in model.hook_dict.values())


def test_losses_alone_are_one_number_a_variant(model: HookedMoE, tokens: Tensor) -> None:
    losses = model.run_variants(tokens, list(EDITS.values()), "loss", attention_mask=MASK)
    assert losses.shape == (len(EDITS),)
    expected = [serial(model, tokens, edit, return_type="loss", attention_mask=MASK) for edit in EDITS.values()]
    torch.testing.assert_close(losses, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_only_the_layers_from_the_first_edit_on_are_run(
    model: HookedMoE, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[tuple[int, int]] = []
    for number, block in enumerate(model.blocks):
        original = block.forward

        def counted(resid: Tensor, *args: Any, number: int = number, original: Any = original, **kwargs: Any) -> Tensor:
            runs.append((number, len(resid)))
            return original(resid, *args, **kwargs)

        monkeypatch.setattr(block, "forward", counted)
    model.run_variants(tokens, [EDITS["late"], EDITS["same point again"], EDITS["late"]])
    assert runs == [(0, 2), (1, 2), (2, 6)]
    runs.clear()
    model.run_variants(tokens, [EDITS["last norm"]])
    assert runs == [(0, 2), (1, 2), (2, 2)]


def test_it_works_in_latent_attention_with_shared_experts(tokens: Tensor) -> None:
    own = random_model("deepseek")
    edits = [
        ("blocks.1.attn.hook_kv_latent", scaled(0.5)),
        ("blocks.2.mlp.hook_shared_out", scaled(0.0)),
        ("blocks.0.mlp.hook_post", in_place),
    ]
    batched = own.run_variants(tokens, edits)
    for row, edit in enumerate(edits):
        torch.testing.assert_close(batched[row], serial(own, tokens, edit), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "mask"),
    [(torch.tensor([[3], [5]]), None), (torch.tensor([[3, 4, 5]]), torch.tensor([[1, 0, 1]]))],
    ids=["one token", "no neighbours"],
)
def test_where_a_serial_run_has_no_loss_there_is_none(tokens: Tensor, mask: Tensor | None, model: HookedMoE) -> None:
    with pytest.raises(ValueError, match="loss") as expected:
        serial(model, tokens, EDITS["late"], return_type="loss", attention_mask=mask)
    with pytest.raises(ValueError, match=str(expected.value)):
        model.run_variants(tokens, [EDITS["late"]], "loss", attention_mask=mask)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "edits",
    [EDITS["late"], ["hook_embed"], [(*EDITS["late"], "fwd")], [[EDITS["late"], "hook_embed"]], [("hook_embed", None)]],
    ids=["a pair", "a name", "a triple", "a name among pairs", "no function"],
)
def test_what_is_no_edit_is_told_what_one_is(edits: Any, model: HookedMoE, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match=r"edit 0 must be a \(name, function\) pair or a list of them"):
        model.run_variants(tokens, edits)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_run_is_refused_by_name(model: HookedMoE, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="no edits"):
        model.run_variants(tokens, [])
    with pytest.raises(ValueError, match="edit 1 must be a"):
        model.run_variants(tokens, [EDITS["late"], 7])
    with pytest.raises(ValueError, match="edit 0 has no hooks"):
        model.run_variants(tokens, [[]])
    with pytest.raises(ValueError, match=r"unknown hook point .*did you mean"):
        model.run_variants(tokens, [("blocks.1.hook_resid_pst", scaled(1.0))])
    with pytest.raises(ValueError, match=r"returned shape \[1, 11, 32\]; expected \[2, 11, 32\]"):
        model.run_variants(tokens, [("blocks.1.hook_resid_pre", lambda x, hook: x[:1])])
    with pytest.raises(ValueError, match="return_type must be"):
        model.run_variants(tokens, [EDITS["late"]], None)
    with model.hooks([EDITS["late"]]), pytest.raises(ValueError, match="has hooks"):
        model.run_variants(tokens, [EDITS["late"]])
    for budget in (1, least_budget(model) - 1):
        with pytest.raises(ValueError, match=f"memory_budget is {budget:,} bytes, and one variant of 2 rows of 11 tokens takes"):
            model.run_variants(tokens, [EDITS["late"]], memory_budget=budget)
    model.run_variants(tokens, [EDITS["late"]], memory_budget=least_budget(model))
