"""KL(clean || changed) beside every change of the loss, against full softmaxes in float64 of the same residual streams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hooked_moe import ExpertMask, HookedMoE, load_corpus
from hooked_moe.counterfactuals import Mean, expert_effects, expert_means, mask_effects, progressive_effects, token_effects
from hooked_moe.counterfactuals.engine import padding
from hooked_moe.counterfactuals.engine.readout import Final
from tests.conftest import EVERY_ARCHITECTURE

NATS, RELATIVE = 2e-5, 1e-3
"""A value may be off by the larger of the two."""


@dataclass(frozen=True)
class FullKL:
    """The definition: both predictions, whole, in float64."""

    name: str = "full"
    width: int = 1

    def __call__(self, final: Final) -> Tensor:
        model = final.model

        def log_probabilities(resid: Tensor) -> Tensor:
            x = model.ln_final(resid.to(torch.promote_types(resid.dtype, torch.float32)))
            return (x.double() @ model.unembed.W_U.double().T).log_softmax(-1)

        clean = log_probabilities(final.at_window_starts(final.clean))
        changed = (log_probabilities(variant) for variant in final.at_window_starts(final.variants))
        return torch.stack([(clean.exp() * (clean - of_variant)).sum(-1) for of_variant in changed])


def assert_equal(kl: Tensor, full: Tensor, delta_loss: Tensor) -> None:
    measured = delta_loss.isfinite()
    assert torch.equal(kl.isfinite(), measured)
    assert bool((kl[measured] >= 0).all())
    torch.testing.assert_close(kl[measured].double(), full[measured], atol=NATS, rtol=RELATIVE)


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_it_is_that_of_the_full_predictions_in_every_mode(
    model: HookedMoE, architecture: str, tokens: Tensor, padded: bool
) -> None:
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, :3], mask[1, -4:] = 0, 0
    reference = torch.randint(61, (8, 32), generator=torch.Generator().manual_seed(9))
    ask = {"attention_mask": mask, "readouts": [FullKL()]}
    keep = torch.rand(2, *tokens.shape, 6, generator=torch.Generator().manual_seed(2)) < 0.5
    everywhere = [
        expert_effects(model, tokens, **ask),
        expert_effects(model, tokens, scope="from_position", positions=[4, 7], **ask),
        expert_effects(model, tokens, removal="renormalize", **ask),
        expert_effects(model, tokens, removal="reroute", **ask),
        expert_effects(model, tokens, removal=Mean(expert_means(model, reference)), **ask),
        progressive_effects(model, tokens, order="random", **ask),
        mask_effects(model, tokens, dict.fromkeys(model.cfg.moe_layers, keep), **ask),
        token_effects(model, tokens, lambda clean, queries: 1.1 * clean.resid_post[None], **ask),
    ]
    for effects in everywhere:
        assert_equal(effects.kl, effects.readouts["full"], effects.delta_loss)


@EVERY_ARCHITECTURE
def test_sequence_wide_it_is_that_of_full_forwards(model: HookedMoE, architecture: str, tokens: Tensor) -> None:
    effects = expert_effects(model, tokens, scope="sequence")
    with torch.no_grad():
        clean = model(tokens).double().log_softmax(-1)
        for layer in model.cfg.moe_layers:
            index = effects.layers.index(layer)
            for batch, pos, slot in ((0, 3, 0), (1, 8, 2)):
                expert = int(effects.expert_index[index, batch, pos, slot])
                mask = {layer: torch.ones(1, 1, model.cfg.experts_in(layer), dtype=torch.bool)}
                mask[layer][..., expert] = False
                changed = model(tokens, expert_mask=ExpertMask(mask)).double().log_softmax(-1)
                full = (clean.exp() * (clean - changed)).sum(-1)[batch, pos]
                torch.testing.assert_close(effects.kl[index, batch, pos, slot].double(), full, atol=NATS, rtol=RELATIVE)
    assert torch.equal(effects.kl.isfinite(), effects.delta_loss.isfinite())


@pytest.mark.parametrize("name", ["tiny-olmoe", "tiny-qwen-moe", "tiny-deepseek-moe"])
def test_on_the_shipped_models_it_is_within_3e_6_nats_or_a_thousandth(name: str) -> None:
    model = HookedMoE.from_pretrained(name)
    tokens = model.to_tokens(load_corpus().documents[5].text)[:, :24]
    effects = expert_effects(model, tokens, readouts=[FullKL()])
    measured = effects.delta_loss.isfinite()
    torch.testing.assert_close(effects.kl[measured].double(), effects.readouts["full"][measured], atol=3e-6, rtol=RELATIVE)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float16, 3e-5), (torch.bfloat16, 2e-3)])
def test_in_other_precisions(make_model: Callable[..., HookedMoE], tokens: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    effects = expert_effects(make_model(dtype=dtype), tokens, readouts=[FullKL()])
    measured = effects.delta_loss.isfinite()
    torch.testing.assert_close(effects.kl[measured].double(), effects.readouts["full"][measured], atol=tolerance, rtol=0.03)


def test_it_is_the_mean_change_of_the_loss_over_next_tokens_drawn_from_the_clean_run(model: HookedMoE, tokens: Tensor) -> None:
    """Every next token in turn, weighted by its probability: the change of the loss is that of a row with this token next."""
    pos, vocabulary = 6, model.cfg.d_vocab
    rows = tokens[:1, : pos + 2].repeat(vocabulary, 1)
    rows[:, -1] = torch.arange(vocabulary)
    effects = expert_effects(model, rows, positions=[pos])
    probability = (-effects.baseline_loss[:, pos].double()).exp()
    assert abs(float(probability.sum()) - 1) < 1e-5
    expected = (probability[:, None, None] * effects.delta_loss[:, :, pos].double().movedim(1, 0)).sum(0)
    torch.testing.assert_close(effects.kl[:, 0, pos].double(), expected, atol=NATS, rtol=RELATIVE)


def test_what_rounding_puts_below_zero_is_zero_and_counted() -> None:
    packed = padding.pack(torch.arange(4)[None], None)
    results = padding.Results([0], (1, 4))
    results.put_kl(torch.tensor([-1e-7, 2.0, -3e-7, 0.0]).view(1, 1, 4, 1), packed, [0])
    assert results.tables["kl"].flatten().tolist() == [0.0, 2.0, 0.0, 0.0]
    assert results.kl_clamped == 2


def test_a_change_of_nothing_moves_no_prediction(model: HookedMoE, tokens: Tensor) -> None:
    effects = token_effects(model, tokens, lambda clean, queries: clean.resid_post[None])
    assert float(effects.kl[effects.kl.isfinite()].max()) < 3e-6
