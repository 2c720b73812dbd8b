"""Stacks of components: TransformerLens's methods give the same from the same activations, and experts sum to their layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_moe import ActivationCache, HookedMoE
from tests.conftest import EVERY_ARCHITECTURE

transformer_lens = pytest.importorskip("transformer_lens")
TheirCache = transformer_lens.ActivationCache

ATTENTION_MASK = torch.tensor([[0, 0] + [1] * 9, [1] * 11])


@pytest.fixture(params=["plain", "padded", "one row"])
def cache(request: pytest.FixtureRequest, model: HookedMoE, tokens: Tensor) -> ActivationCache:
    """Both rows, the same with padding before the first, or the second one without the axis of the batch."""
    if request.param == "one row":
        return model.run_with_cache(tokens[1:], remove_batch_dim=True)[1]
    return model.run_with_cache(tokens, attention_mask=ATTENTION_MASK if request.param == "padded" else None)[1]


def theirs(cache: ActivationCache) -> Any:
    return TheirCache(dict(cache), cache.model, has_batch_dim=cache.has_batch_dim)


CALLS: dict[str, list[dict[str, Any]]] = {
    "accumulated_resid": [
        {},
        {"incl_mid": True},
        {"layer": 2, "mlp_input": True, "pos_slice": (1, 4)},
        {"layer": 3, "apply_ln": True, "incl_mid": True},
        {"layer": 0},
        {"pos_slice": -1, "apply_ln": True},
    ],
    "decompose_resid": [
        {},
        {"layer": 1, "mlp_input": True},
        {"mode": "attn", "pos_slice": -1},
        {"mode": "mlp", "incl_embeds": False},
        {"layer": -1, "pos_slice": [0, 5]},
        {"layer": 0},
    ],
    "stack_head_results": [{}, {"layer": 2, "incl_remainder": True}, {"incl_remainder": True, "pos_slice": -1}, {"layer": 0}],
}


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("method", CALLS)
def test_a_stack_is_that_of_transformer_lens(method: str, cache: ActivationCache) -> None:
    for call in CALLS[method]:
        ours, labels = getattr(cache, method)(**call, return_labels=True)
        expected, their_labels = getattr(theirs(cache), method)(**call, return_labels=True)
        assert labels == their_labels
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(getattr(cache, method)(**call), ours)


@EVERY_ARCHITECTURE
def test_a_norm_has_its_weight(cache: ActivationCache) -> None:
    """TransformerLens folds it into the matrix that follows."""
    model = cache.model
    norms = {(0, False): model.blocks[0].ln1, (2, True): model.blocks[2].ln2, (3, False): model.ln_final}
    for (layer, mlp_input), norm in norms.items():
        for pos_slice in (None, -1, (2, 6)):
            stack = cache.decompose_resid(pos_slice=pos_slice)
            call = {"layer": layer, "mlp_input": mlp_input, "pos_slice": pos_slice, "has_batch_dim": cache.has_batch_dim}
            ours, expected = cache.apply_ln_to_stack(stack, **call), theirs(cache).apply_ln_to_stack(stack, **call)
            torch.testing.assert_close(ours, expected * norm.w)
        whole, _ = cache.decompose_resid(layer, mlp_input, apply_ln=True, return_labels=True)
        name = f"blocks.{layer}.ln{1 + mlp_input}" if layer < 3 else "ln_final"
        torch.testing.assert_close(whole.sum(0), cache[f"{name}.hook_normalized"] * norm.w, atol=1e-5, rtol=1e-5)
    for stream in cache.accumulated_resid():
        ours = cache.apply_ln_to_stack(stream[None], recompute_ln=True, has_batch_dim=cache.has_batch_dim)[0]
        torch.testing.assert_close(ours, model.ln_final(stream))


def by_scatter(cache: ActivationCache, layer: int) -> Tensor:
    """What each expert adds, [expert, ..., d_model], token by token."""
    outputs, weights, indices = (cache[name, layer] for name in ("expert_out", "expert_weights", "expert_indices"))
    added = torch.zeros(cache.model.cfg.experts_in(layer), *outputs.shape[:-2], outputs.shape[-1])
    for place in torch.cartesian_prod(*(torch.arange(n) for n in indices.shape)).tolist():
        added[(indices[tuple(place)], *place[:-1])] += weights[tuple(place)] * outputs[tuple(place)]
    return added


@EVERY_ARCHITECTURE
def test_experts_sum_to_their_layer(cache: ActivationCache) -> None:
    model = cache.model
    stack, labels = cache.stack_expert_results(return_labels=True)
    for layer in range(3):
        rows = [row for row, label in enumerate(labels) if label.startswith(f"L{layer}")]
        experts = model.cfg.experts_in(layer)
        kinds = [f"E{e}" for e in range(experts)] + (["shared"] if model.cfg.d_shared else []) if experts else ["mlp"]
        assert [labels[row] for row in rows] == [f"L{layer}{kind}" for kind in kinds]
        torch.testing.assert_close(stack[rows].sum(0), cache["mlp_out", layer], atol=1e-5, rtol=1e-5)
        if experts:
            torch.testing.assert_close(stack[rows[:experts]], by_scatter(cache, layer))


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("pos_slice", [None, -1, (1, 4), [3, 2]])
def test_every_decomposition_is_of_the_whole_stream(pos_slice: Any, cache: ActivationCache) -> None:
    last = cache.accumulated_resid(pos_slice=pos_slice)[-1]
    before_mlp = cache.accumulated_resid(1, mlp_input=True, pos_slice=pos_slice)[-1]
    options = {"pos_slice": pos_slice}
    stacks = {
        "experts": cache.stack_expert_results(incl_remainder=True, **options),
        "experts of two layers": cache.stack_expert_results(2, incl_remainder=True, **options),
        "components": cache.decompose_resid(expand_experts=True, **options),
        "full": cache.get_full_resid_decomposition(**options),
        "blocks": cache.get_full_resid_decomposition(expand_experts=False, **options),
    }
    for name, stack in stacks.items():
        expected = cache.accumulated_resid(2, pos_slice=pos_slice)[-1] if "two" in name else last
        torch.testing.assert_close(stack.sum(0), expected, atol=2e-5, rtol=1e-5, msg=name)
    full = cache.get_full_resid_decomposition(1, mlp_input=True, **options)
    torch.testing.assert_close(full.sum(0), before_mlp, atol=2e-5, rtol=1e-5)


def test_heads_come_from_their_values_where_results_are_not_cached(model: HookedMoE, tokens: Tensor) -> None:
    _, whole = model.run_with_cache(tokens)
    _, part = model.run_with_cache(tokens, names_filter=["z", "resid_post", "embed"])
    torch.testing.assert_close(part.stack_head_results(incl_remainder=True), whole.stack_head_results(incl_remainder=True))


PAIRS: list[tuple[Any, Any]] = [
    (3, None),
    (torch.tensor(3), 5),
    (torch.tensor([3, 4]), torch.tensor([5, 6])),
    (torch.arange(11), torch.arange(11).flip(0)),
    (torch.arange(22).view(2, 11), None),
]


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("pair", PAIRS)
def test_attributions_sum_to_the_logit(pair: tuple[Any, Any], model: HookedMoE, tokens: Tensor) -> None:
    logits, cache = model.run_with_cache(tokens)
    ids = [torch.as_tensor(x) for x in pair if x is not None]
    places = [x[:, None] if x.shape == (2,) else x for x in ids]
    values = [logits.gather(-1, x.expand(2, 11)[..., None])[..., 0] for x in places]
    expected = values[0] - values[1] if len(values) > 1 else values[0]
    for stack in (cache.decompose_resid(), cache.get_full_resid_decomposition()):
        torch.testing.assert_close(cache.logit_attrs(stack, *pair).sum(0), expected, atol=2e-5, rtol=1e-4)


def test_attributions_of_a_part_are_those_of_transformer_lens(
    model: HookedMoE, make_model: Callable[..., HookedMoE], tokens: Tensor
) -> None:
    """With a norm of weights 1, as if folded."""
    model = make_model()
    torch.nn.init.ones_(model.ln_final.w)
    _, cache = model.run_with_cache(tokens)
    for tokens_of, pos_slice, batch_slice in (
        (torch.tensor([3, 4]), -1, None),
        (torch.tensor([3, 4]), (2, 5), None),
        (7, None, 1),
        (torch.tensor([3, 4, 5]), (2, 5), 0),
        (torch.tensor([[3, 4, 5]]), (2, 5), [1]),
    ):
        stack = cache.decompose_resid(pos_slice=pos_slice)
        call = {"tokens": tokens_of, "pos_slice": pos_slice, "batch_slice": batch_slice}
        torch.testing.assert_close(cache.logit_attrs(stack, **call), theirs(cache).logit_attrs(stack, **call))


@EVERY_ARCHITECTURE
def test_a_logit_lens_ends_in_the_logits(model: HookedMoE, tokens: Tensor) -> None:
    logits, cache = model.run_with_cache(tokens)
    lens = cache.logit_lens(positions=None, incl_mid=True)
    assert lens.labels == ["0_pre", "0_mid", "1_pre", "1_mid", "2_pre", "2_mid", "final_post"]
    torch.testing.assert_close(lens.values[-1], logits)
    torch.testing.assert_close(lens.values[2], model.logits(cache["resid_pre", 1]))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"positions": (1, 5), "incl_mid": True, "layers": [0, -1]},
    {"targets": [3, 8, 60], "return_type": "probs"},
    {"targets": torch.tensor([3, 8])},
    {"targets": torch.arange(22).view(2, 11), "positions": None, "chunk_size": 5},
    {"top_k": 4, "return_type": "log_probs", "positions": [0, 3]},
    {"vocab": [7, 7, 0]},
    {"batch_slice": 1, "positions": (2, 4), "targets": 5},
    {"apply_ln": False},
    {"lens": lambda stream, index: stream * (index + 1) + 0.5, "layers": [0, -1]},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_logit_lens_is_that_of_transformer_lens(options: dict[str, Any], model: HookedMoE, tokens: Tensor) -> None:
    _, cache = model.run_with_cache(tokens)
    lens, expected = cache.logit_lens(**options), transformer_lens.tools.analysis.logit_lens(model, cache=cache, **options)
    assert lens.labels == expected.labels
    torch.testing.assert_close(lens.values, expected.values)
    torch.testing.assert_close(lens.entropy, expected.readout.entropy)
    for ours, theirs in ((lens.top_ids, expected.readout.top_ids), (lens.target_ranks, expected.readout.target_ranks)):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    if lens.target_ranks is not None and lens.target_ranks.shape[-1] == 1:
        assert torch.equal(lens.rank_trajectory(), expected.rank_trajectory())


@pytest.mark.parametrize("options", [*OPTIONS, {"positions": None}])
def test_a_logit_lens_in_long_form_has_every_value(options: dict[str, Any], model: HookedMoE, tokens: Tensor) -> None:
    _, cache = model.run_with_cache(tokens)
    lens = cache.logit_lens(**options)
    axes = [axis for axis in ("batch", "pos") if axis in lens.axes]
    table = lens.table()
    more = [] if lens.target_ranks is None else ["rank"]
    assert table.column_names == ["stream", *axes, "choice", "token", "value", "entropy", *more]
    assert table.num_rows == lens.values.numel() == lens.to_dataframe().shape[0]
    for row in table.to_pylist()[:: max(1, table.num_rows // 50)]:
        place = (lens.labels.index(row["stream"]), *(row[axis] for axis in axes))
        assert row["value"] == float(lens.values[place][row["choice"]])
        assert row["entropy"] == float(lens.entropy[place])
        assert lens.target_ranks is None or row["rank"] == int(lens.target_ranks[place][row["choice"]])
    tokens_there = table["token"].to_numpy().reshape(lens.values.shape)
    if "top_k" in options:
        assert (tokens_there == lens.top_ids.numpy()).all()
    elif "vocab" in options:
        assert (tokens_there == options["vocab"]).all()
    elif "targets" not in options:
        assert (tokens_there == range(model.cfg.d_vocab)).all()
    elif isinstance(options["targets"], Tensor):
        assert (tokens_there[..., 0] == options["targets"].numpy()).all()
    else:
        assert (tokens_there == options["targets"]).all()
    assert all(field.metadata[b"meaning"] for field in table.schema)


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_are_answered(model: HookedMoE, tokens: Tensor) -> None:
    _, cache = model.run_with_cache(tokens)
    _, part = model.run_with_cache(tokens, names_filter=["resid_pre", "expert_out"])
    alone = ActivationCache(dict(cache))
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: cache.accumulated_resid(4), r"layer must be a layer, or 3 for the unembedding, from 0 to 3, not 4"),
        (lambda: cache.decompose_resid(3, mlp_input=True), r"layer must be the MLP of a layer, from 0 to 2, not 3"),
        (lambda: cache.decompose_resid(mode="experts"), r"mode must be 'all', 'mlp' or 'attn', not 'experts'"),
        (lambda: part.stack_expert_results(), r"unknown activation 'blocks.0.hook_expert_weights'"),
        (lambda: part.accumulated_resid(), r"unknown activation 'blocks.2.hook_resid_post'"),
        (lambda: alone.decompose_resid(), r"does not know its model"),
        (lambda: cache.logit_attrs(cache.decompose_resid(), 61), r"ids from 0 to 60, or texts of one token, not 61"),
        (lambda: cache.logit_attrs(cache.decompose_resid(), torch.tensor([1, 2]), 3), r"same shape, not \[2\] and \[\]"),
        (lambda: cache.logit_lens(layers=[4]), r"layers=\[4\] are out of range: there are 4 streams, 0_pre"),
        (lambda: cache.logit_lens(targets=3, top_k=2), r"pass one of them"),
        (lambda: cache.logit_lens(targets=61), r"ids from 0 to 60, not \[61\]"),
        (lambda: cache.logit_lens(targets=torch.tensor([1, 2, 3])), r"targets \[3\] do not fit the vectors \[4, 2\]"),
        (lambda: cache.logit_lens(return_type="entropy"), r"return_type must be one of 'logits', 'log_probs', 'probs'"),
        (lambda: cache.logit_lens(top_k=62), r"top_k from 1 to 61, not 64 and 62"),
        (lambda: cache.logit_lens().rank_trajectory(), r"call logit_lens\(targets=...\)"),
        (lambda: cache.stack_activation("router_logit"), r"unknown activation 'blocks.0.hook_router_logit'"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()


def test_an_activation_is_stacked_over_layers(model: HookedMoE, tokens: Tensor) -> None:
    _, cache = model.run_with_cache(tokens)
    assert torch.equal(cache.stack_activation("router_logits"), torch.stack([cache["router_logits", i] for i in range(3)]))
    assert torch.equal(cache.stack_activation("scale", 2, "ln2"), theirs(cache).stack_activation("scale", 2, "ln2"))


@pytest.mark.parametrize(
    ("options", "axes"),
    [
        ({}, ("batch",)),
        ({"positions": None}, ("batch", "pos")),
        ({"batch_slice": 0}, ()),
        ({"positions": None, "batch_slice": 0}, ("pos",)),
    ],
)
def test_a_logit_lens_is_drawn_whatever_its_axes(
    options: dict[str, Any], axes: tuple[str, ...], model: HookedMoE, tokens: Tensor
) -> None:
    lens = model.run_with_cache(tokens)[1].logit_lens(top_k=3, **options)
    assert lens.axes == axes
    assert lens.plot().get_axes()


def test_rows_of_no_batch_are_refused(model: HookedMoE, tokens: Tensor) -> None:
    cache = model.run_with_cache(tokens[:1], remove_batch_dim=True)[1]
    with pytest.raises(ValueError, match="has no axis of one"):
        cache.logit_lens(batch_slice=0)
