"""Changes at one token read at another, runs from given embeddings, and changes in several layers: against hooked forwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hooked_moe import HookedMoE
from hooked_moe.components.moe import combine_onto
from hooked_moe.counterfactuals import (
    KL,
    After,
    At,
    Displacement,
    LogitDifference,
    Loss,
    LossAfter,
    Queries,
    VariantQueries,
    expert_effects,
    first_order_effects,
    mask_effects,
    progressive_effects,
    token_effects,
)
from hooked_moe.counterfactuals.engine.clean_run import CleanBlock, as_expert_block
from hooked_moe.counterfactuals.engine.memory import demand_of
from tests.conftest import EVERY_ARCHITECTURE, random_model, without_type_checks
from tests.support.hf_models import save, tiny

NATS = 1e-5
MASKS = {
    "none": None,
    "right": torch.tensor([[1] * 8, [1] * 5 + [0] * 3]),
    "left": torch.tensor([[0] * 3 + [1] * 5, [1] * 8]),
    "holes": torch.tensor([[1] * 3 + [0] + [1] * 4, [0, 1, 1, 0, 1, 1, 1, 1]]),
}
PADDED = pytest.mark.parametrize("padding", MASKS)
FIRST, SECOND = torch.tensor([3, 40]), torch.tensor([17, 5])
Edit = Callable[[Tensor], Tensor]


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 61, (2, 8), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def noise() -> Tensor:
    return 0.3 * torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(5))


def real_tokens(tokens: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()


class Forward:
    """Logits, losses and the last residual stream of a full forward pass."""

    def __init__(self, model: HookedMoE, tokens: Tensor, mask: Tensor | None, hooks: Any = ()) -> None:
        final = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
        with torch.no_grad(), without_type_checks(), model.hooks(list(hooks)):
            (self.logits, loss), cache = model.run_with_cache(
                tokens, return_type="both", loss_per_token=True, attention_mask=mask, names_filter=final
            )
        self.losses = torch.cat((loss, torch.full_like(loss[:, :1], float("nan"))), dim=1)
        self.final = cache[final]

    def readout(self, name: str, clean: Forward, batch: int, pos: int) -> Tensor:
        """A readout by its definition."""
        at = (batch, pos)
        if name == "loss":
            return (self.losses - clean.losses)[at]
        if name == "displacement":
            return (self.final - clean.final)[at].norm()
        if name == "kl":
            expected, changed = clean.logits[at].log_softmax(-1), self.logits[at].log_softmax(-1)
            return (expected.exp() * (expected - changed)).sum()
        difference = (self.logits - clean.logits)[at]
        return difference[FIRST[batch]] - difference[SECOND[batch]]


def embedded(value: Tensor) -> tuple[str, Callable[..., Tensor]]:
    return "hook_embed", lambda x, hook: value.to(x)


def put_at(layer: int, batch: int, pos: int, edit: Edit) -> tuple[str, Callable[..., Tensor]]:
    """A hook that changes the residual stream after a block at one token."""

    def put(x: Tensor, hook: Any) -> Tensor:
        x[batch, pos] = edit(x[batch, pos])
        return x

    return f"blocks.{layer}.hook_resid_post", put


INNER = {"loss": Loss(), "displacement": Displacement(), "kl": KL(), "logit_difference": LogitDifference(FIRST, SECOND)}
LATE = (2, (6, 2))
"""Positions that are read, which no mask but those with holes has as padding."""


@PADDED
@EVERY_ARCHITECTURE
def test_readouts_at_other_positions_equal_full_forwards(padding: str, model: HookedMoE, tokens: Tensor, noise: Tensor) -> None:
    mask, direction = MASKS[padding], torch.randn(32, generator=torch.Generator().manual_seed(2))
    real = real_tokens(tokens, mask)
    rows = [row.nonzero()[:, 0].tolist() for row in real]
    later = tuple(row[-2] for row in rows)  # the last but one of each row, as an original position
    last = [At(-1, inner, f"{name} last") for name, inner in INNER.items() if name != "loss"]
    by_row = [At(later, inner, f"{name} by row") for name, inner in INNER.items()]
    after = [After(2, inner, f"{name} after") for name, inner in INNER.items()]
    readouts = [*last, *by_row, *after, LossAfter(1), KL()]
    embeddings = model.embed(tokens) + noise
    effects = token_effects(
        model,
        tokens,
        lambda clean, queries: torch.stack((clean.resid_post + direction, 0.5 * clean.resid_post)),
        2,
        attention_mask=mask,
        readouts=readouts,
        embeddings=embeddings,
    )
    clean = Forward(model, tokens, mask, [embedded(embeddings)])
    for batch, row in enumerate(rows):
        for number, pos in list(enumerate(row))[batch::2]:
            layer, variant = pos % 3, (number + batch) % 3 % 2
            edit: Edit = (lambda x: x + direction) if variant == 0 else (lambda x: 0.5 * x)
            forward = Forward(model, tokens, mask, [embedded(embeddings), put_at(layer, batch, pos, edit)])
            where = (layer, variant, batch, pos)
            for name in INNER:
                read = {"last": row[-1], "by row": later[batch], "after": row[number + 2] if number + 2 < len(row) else None}
                for kind, place in read.items():
                    if f"{name} {kind}" in effects.readouts:
                        value = effects.readouts[f"{name} {kind}"][where]
                        expected = torch.tensor(torch.nan) if place is None else forward.readout(name, clean, batch, place)
                        assert_close(value, expected, f"{name} {kind} of {where}")
            assert_close(effects.delta_loss[where], forward.readout("loss", clean, batch, pos), f"loss of {where}")
            assert_close(effects.readouts["kl"][where], forward.readout("kl", clean, batch, pos), f"kl of {where}")
            assert_close(
                effects.readouts["loss_after"][(*where, 0)], forward.readout("loss", clean, batch, pos), f"loss after {where}"
            )


def assert_close(value: Tensor, expected: Tensor, what: str) -> None:
    """In nats; logits and residual streams, which are larger, relative to their size."""
    torch.testing.assert_close(value, expected, atol=NATS, rtol=1e-4, equal_nan=True, msg=lambda m: f"{what}: {m}")


def test_a_change_after_the_position_that_is_read_has_no_effect(tokens: Tensor) -> None:
    model = random_model()
    effects = token_effects(
        model,
        tokens,
        lambda clean, queries: 2 * clean.resid_post[None],
        layers=[0],
        readouts=[At(3, KL()), At(-3, Displacement())],
    )
    assert (effects.readouts["kl@3"][..., 4:] == 0).all()
    assert (effects.readouts["kl@3"][..., :4] > 0).all()
    assert (effects.readouts["displacement@-3"][..., 6:] == 0).all()
    assert (effects.readouts["displacement@-3"][..., :6] > 0).all()


@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=3), latent=st.booleans(), variants=st.integers(1, 3), data=st.data()
)
@settings(max_examples=8, deadline=None)
def test_any_lengths_positions_and_budgets(lengths: list[int], latent: bool, variants: int, data: Any) -> None:
    model = random_model("deepseek" if latent else "qwen")
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens = torch.randint(0, 61, (len(lengths), 7), generator=generator)
    starts = [data.draw(st.integers(0, 7 - length)) for length in lengths]
    mask = torch.tensor([[int(start <= pos < start + n) for pos in range(7)] for start, n in zip(starts, lengths, strict=True)])
    reads = tuple(start + data.draw(st.integers(0, n - 1)) for start, n in zip(starts, lengths, strict=True))
    shift = torch.randn(variants, 1, 1, 32, generator=generator)
    demand = demand_of(model.cfg, max(lengths))
    budget = data.draw(st.sampled_from([None, demand.fixed + demand.row + 30 * demand.variant_token]))
    effects = token_effects(
        model,
        tokens,
        lambda clean, queries: clean.resid_post + shift,
        variants,
        [1],
        attention_mask=mask,
        readouts=[At(reads, Displacement(), "displacement")],
        memory_budget=budget,
    )
    clean = Forward(model, tokens, mask)
    for batch, (start, n) in enumerate(zip(starts, lengths, strict=True)):
        pos, variant = start + data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, variants - 1))
        forward = Forward(model, tokens, mask, [put_at(1, batch, pos, lambda x, v=variant: x + shift[v, 0, 0])])
        expected = forward.readout("displacement", clean, batch, reads[batch])
        assert_close(effects.readouts["displacement"][0, variant, batch, pos], expected, f"batch {batch}, pos {pos}")


@pytest.mark.parametrize("scope", ["position", "sequence"])
def test_every_question_can_be_asked_of_given_embeddings(scope: Any, tokens: Tensor, noise: Tensor) -> None:
    model, mask = random_model("qwen"), MASKS["left"]
    embeddings = model.embed(tokens) + noise
    other = random_model("qwen")
    with torch.no_grad():  # a model whose token embeddings are the given ones: an id of its own for each place
        other.embed.W_E = torch.nn.Parameter(torch.cat((embeddings.flatten(0, 1), torch.zeros(45, 32))))
    ids = torch.arange(16).view(2, 8)
    options = {"attention_mask": mask}
    found = expert_effects(model, tokens, scope=scope, embeddings=embeddings, **options)
    expected = expert_effects(other, ids, scope=scope, **options)
    assert torch.equal(found.expert_index, expected.expert_index)
    torch.testing.assert_close(found.gap_norm, expected.gap_norm, equal_nan=True)
    clean = Forward(model, tokens, mask, [embedded(embeddings)])
    torch.testing.assert_close(found.baseline_loss[mask > 0], clean.losses[mask > 0], atol=NATS, rtol=0, equal_nan=True)
    if scope == "sequence":
        return
    for ask in (
        lambda m, t, **more: expert_effects(m, t, readouts=[At(-1, KL())], **more).readouts["kl@-1"],
        lambda m, t, **more: mask_effects(m, t, {2: torch.zeros(1, 1, 1, 6) > 0}, readouts=[At(-1, KL())], **more).readouts[
            "kl@-1"
        ],
        lambda m, t, **more: progressive_effects(m, t, readouts=[Displacement()], **more).readouts["displacement"],
        lambda m, t, **more: first_order_effects(m, t, **more).expert_index,
    ):
        torch.testing.assert_close(
            ask(model, tokens, embeddings=embeddings, **options), ask(other, ids, **options), atol=NATS, rtol=1e-5, equal_nan=True
        )


def test_the_embeddings_of_the_tokens_change_no_bit(tokens: Tensor) -> None:
    model = random_model()
    plain, given = expert_effects(model, tokens), expert_effects(model, tokens, embeddings=model.embed(tokens))
    assert torch.equal(plain.delta_loss.nan_to_num(9.0), given.delta_loss.nan_to_num(9.0))


# Several layers in one variant


@PADDED
@EVERY_ARCHITECTURE
@pytest.mark.parametrize("readouts", [(), (At(-1, Displacement(), "displacement"),)], ids=["tokens", "windows"])
def test_changes_in_several_layers_equal_the_hooks_that_make_them(
    padding: str, readouts: Any, model: HookedMoE, tokens: Tensor
) -> None:
    mask, strengths = MASKS[padding], torch.tensor([0.5, 1.0, 2.0])
    direction = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(2))

    def steer(own: CleanBlock, queries: VariantQueries) -> Tensor:
        return own.resid_post + strengths[queries.variant, None] * direction[queries.batch, queries.pos]

    def halve_experts(own: CleanBlock, queries: VariantQueries) -> Tensor:
        """What the variants' own experts write counts half; in later layers the experts are those that they go to then."""
        experts = as_expert_block(own)
        halved = combine_onto(experts.resid_mid, experts.expert_outputs, 0.5 * experts.routing.weights[None], experts.shared_out)
        return torch.where((queries.variant == 1)[..., None], halved[0], experts.resid_post)

    effects = token_effects(model, tokens, {0: steer, 2: halve_experts}, 3, attention_mask=mask, readouts=readouts)
    assert effects.layers == [0]
    clean = Forward(model, tokens, mask)
    for batch, row in enumerate(real_tokens(tokens, mask)):
        for pos in row.nonzero()[:, 0].tolist()[batch::2]:
            variant = pos % 3

            def halve(x: Tensor, hook: Any, batch: int = batch, pos: int = pos) -> Tensor:
                x[batch, pos] *= 0.5
                return x

            hooks = [put_at(0, batch, pos, lambda x, at=(batch, pos), v=variant: x + strengths[v] * direction[at])]
            if variant == 1:
                hooks.append(("blocks.2.mlp.hook_routed_out", halve))
            forward = Forward(model, tokens, mask, hooks)
            assert_close(
                effects.delta_loss[0, variant, batch, pos], forward.readout("loss", clean, batch, pos), f"{batch}, {pos}"
            )
            if readouts:
                expected = forward.readout("displacement", clean, batch, row.nonzero()[-1, 0])
                assert_close(effects.readouts["displacement"][0, variant, batch, pos], expected, f"{batch}, {pos}")


def test_variants_beyond_one_chunk_keep_their_numbers(tokens: Tensor) -> None:
    """More variants than go through a block together."""
    model, count = random_model(), 700
    strengths = torch.linspace(0, 2, count)

    def steer(own: CleanBlock, queries: VariantQueries) -> Tensor:
        return own.resid_post * (1 + strengths[queries.variant, None])

    many = token_effects(model, tokens, {0: steer, 1: steer, 2: steer}, count)
    for chosen in (0, 256, 511, 699):
        strengths = torch.linspace(0, 2, 700)[chosen : chosen + 1]
        one = token_effects(model, tokens, {0: steer, 1: steer, 2: steer}, 1)
        torch.testing.assert_close(many.delta_loss[:, chosen], one.delta_loss[:, 0], atol=NATS, rtol=1e-5, equal_nan=True)


# All families


@pytest.mark.parametrize("case", ["olmoe-all-at-once", "qwen2_moe-all-at-once", "qwen3_moe-all-at-once", "mixtral-all-at-once",
                                  "deepseek_v2-all-at-once"])  # fmt: skip
def test_every_family_reads_later_from_given_embeddings(case: str, tmp_path: Path) -> None:
    model = HookedMoE.from_pretrained(save(tiny(case), tmp_path / "model"))
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 97, (2, 7), generator=generator)
    mask = torch.tensor([[1] * 7, [0] * 2 + [1] * 5])
    embeddings = model.embed(tokens) + 0.02 * torch.randn(2, 7, 64, generator=generator)
    direction = 0.1 * torch.randn(64, generator=generator)

    def steer(own: CleanBlock, queries: VariantQueries) -> Tensor:
        return own.resid_post + direction

    readouts = [At(-1, LogitDifference(FIRST, SECOND)), At(-1, KL())]
    effects = token_effects(model, tokens, {0: steer, 1: steer}, attention_mask=mask, readouts=readouts, embeddings=embeddings)
    clean = Forward(model, tokens, mask, [embedded(embeddings)])
    for batch, pos in [(0, 0), (0, 6), (1, 2), (1, 4)]:
        hooks = [put_at(layer, batch, pos, lambda x: x + direction) for layer in (0, 1)]
        forward = Forward(model, tokens, mask, [embedded(embeddings), *hooks])
        for name in ("logit_difference", "kl"):
            assert_close(effects.readouts[f"{name}@-1"][0, 0, batch, pos], forward.readout(name, clean, batch, 6), name)


# What is refused

REFUSALS: dict[str, tuple[Callable[[HookedMoE, Tensor], Any], str]] = {
    "padding": (lambda m, t: read(m, t, At(1, KL()), MASKS["left"]), "position 1 cannot be read in batch row 0: it is padding"),
    "past the end": (lambda m, t: read(m, t, At(8, KL())), "position 8 cannot be read in batch row 0"),
    "before the start": (lambda m, t: read(m, t, At((-9, 0), KL())), "position -9 cannot be read in batch row 0"),
    "too few rows": (lambda m, t: read(m, t, At((1,), KL())), "At has 1 positions for 2 batch rows"),
    "half a position": (lambda m, t: At(1.5, KL()), "At takes a position, or one for each batch row, not 1.5"),
    "words": (lambda m, t: At("last", KL()), "At takes a position"),
    "no readout": (lambda m, t: At(1, "kl"), "At takes a readout, as in At"),
    "a readout of several tokens": (lambda m, t: At(1, LossAfter(2)), "At takes a readout of a single token"),
    "one within another": (lambda m, t: After(1, At(1, KL())), "After takes a readout of a single token"),
    "backwards": (lambda m, t: After(-1, KL()), "After takes a number of tokens from 0, not -1"),
    "unknown token inside": (lambda m, t: read(m, t, At(-1, LogitDifference(1, 99))), "token id 99 is out of range"),
    "pairs for other rows": (lambda m, t: read(m, t, LogitDifference([1, 2, 3], 4)), "has 3 tokens for 2 batch rows"),
    "embeddings of other tokens": (lambda m, t: expert_effects(m, t, embeddings=torch.zeros(2, 7, 32)), r"\[2, 8, 32\]"),
    "embeddings of whole numbers": (lambda m, t: expert_effects(m, t, embeddings=t), "embeddings must be a float tensor"),
    "layers twice": (lambda m, t: token_effects(m, t, {0: keep}, layers=[1]), "layers= goes with one edit for all layers"),
    "no layers": (lambda m, t: token_effects(m, t, {}), "no layers to measure"),
    "a later layer that is not there": (lambda m, t: token_effects(m, t, {0: keep, 5: keep}), "layer 5 is out of range"),
    "an edit of another shape": (
        lambda m, t: token_effects(m, t, {0: keep, 1: lambda own, queries: own.resid_post[None]}),
        r"\[row, query, d_model\]",
    ),
}


def read(model: HookedMoE, tokens: Tensor, readout: Any, mask: Tensor | None = None) -> Any:
    def same(clean: CleanBlock, queries: Queries) -> Tensor:
        return clean.resid_post[None]

    return token_effects(model, tokens, same, attention_mask=mask, readouts=[readout])


def keep(own: CleanBlock, queries: VariantQueries) -> Tensor:
    return own.resid_post


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_cannot_be_read_is_refused_by_name(refusal: str, tokens: Tensor) -> None:
    run, message = REFUSALS[refusal]
    with pytest.raises(ValueError, match=message):
        run(random_model(), tokens)


def test_names_say_where_a_readout_is_taken() -> None:
    readouts = [At(-1, KL()), At([1, 2], KL()), After(3, Loss()), At(2, KL(), "mine")]
    assert [readout.name for readout in readouts] == ["kl@-1", "kl@rows", "loss+3", "mine"]
    assert LogitDifference([1, 2], 3) == LogitDifference(torch.tensor([1, 2]), 3)
