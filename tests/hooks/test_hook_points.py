"""Every row of the hook table does what it says: the table is walked, row by row and point by point."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hooked_moe import ActivationCache, HookedMoE, HookPoint
from hooked_moe.components.experts import ExpertGroups
from hooked_moe.components.losses import next_token_loss
from hooked_moe.hooks.hook_table import HOOK_TABLE, HookSpec, declared_names, hook_table_markdown
from tests.conftest import ARCHITECTURES, EVERY_ARCHITECTURE, random_config, swiglu

ROWS = [(name, spec) for name in ARCHITECTURES for spec in HOOK_TABLE if any(spec.names(random_config(name)))]


def each_row(rows: list[tuple[str, HookSpec]]) -> pytest.MarkDecorator:
    """Of the table, in each architecture that has it."""
    return pytest.mark.parametrize(("architecture", "spec"), rows, ids=lambda value: getattr(value, "name", value))


EACH_ROW = each_row(ROWS)
EACH_FLOAT_ROW = each_row([(name, spec) for name, spec in ROWS if "indices" not in spec.name])
MANY_FORWARDS = pytest.mark.usefixtures("unchecked")  # the types of which other tests check
DOCS = Path(__file__).parents[2] / "docs" / "hook_points.md"

Hook = Callable[..., Tensor | None]


def axes(model: HookedMoE, tokens: Tensor) -> dict[str, int]:
    """The sizes that the letters of the hook table stand for."""
    cfg, (batch, pos) = model.cfg, tokens.shape
    return {
        "batch": batch,
        "pos": pos,
        "query": pos,
        "key": pos,
        "d_model": cfg.d_model,
        "head": cfg.n_heads,
        "kv_head": cfg.n_key_value_heads,
        "d_head": cfg.d_head,
        "d_value": cfg.value_width,
        "expert": cfg.num_experts,
        "slot": cfg.experts_per_token,
        "d_expert": cfg.d_expert,
    } | {name: getattr(cfg, name) for name in ("kv_lora_rank", "d_shared", "d_mlp")}


def perturbed(x: Tensor) -> Tensor:
    """A random edit of the same kind of values."""
    generator = torch.Generator().manual_seed(5)
    if not x.is_floating_point():
        return (x + 1) % (int(x.max()) + 1)
    return x * (1 + 0.5 * torch.rand(x.shape, generator=generator, dtype=x.dtype)) + 0.1


# The table


def test_the_architectures_here_have_every_row() -> None:
    assert {spec for _, spec in ROWS} == set(HOOK_TABLE)


@EVERY_ARCHITECTURE
def test_the_table_declares_exactly_the_hook_points_of_the_model(model: HookedMoE) -> None:
    names = declared_names(model.cfg)
    assert len(names) == len(set(names))
    assert set(names) == set(model.hook_dict)
    assert all(point.name == name for name, point in model.hook_dict.items())


def test_the_documentation_holds_the_table_as_it_is() -> None:
    assert hook_table_markdown() in DOCS.read_text(encoding="utf-8")


@EACH_ROW
def test_each_hook_point_fires_once_with_the_declared_shape(spec: HookSpec, model: HookedMoE, tokens: Tensor) -> None:
    fired: list[tuple[str, torch.Size]] = []
    names = list(spec.names(model.cfg))
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[(lambda name: name in names, lambda x, hook: fired.append((hook.name, x.shape)))])
    assert sorted(name for name, _ in fired) == sorted(names)
    sizes = axes(model, tokens)
    for name, shape in fired:
        expected = [sizes.get(axis, shape[0] if axis == "n" else None) for axis in spec.shape.split() if axis != "1"]
        expected += [1] * spec.shape.split().count("1")
        assert list(shape) == expected, name


@EVERY_ARCHITECTURE
@MANY_FORWARDS
def test_torchs_own_hooks_fire_at_every_point_too(model: HookedMoE, tokens: Tensor) -> None:
    """As nnsight attaches them; those of gradients where there is one."""
    plain = model(tokens)
    for way in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        fired: set[str] = set()

        def note(*_: object, name: str, fired: set[str] = fired) -> None:
            fired.add(name)

        points = model.hook_dict.items()
        handles = [getattr(point, f"register_{way}")(functools.partial(note, name=name)) for name, point in points]
        out = model(tokens)
        if "backward" in way:
            out.sum().backward()
        for handle in handles:
            handle.remove()
        silent = set(model.hook_dict) - fired
        selection = ("hook_expert_indices", "hook_selection_bias")  # which has no gradient
        assert all("backward" in way and name.endswith(selection) for name in silent), (way, silent)
        torch.testing.assert_close(out, plain, atol=1e-5, rtol=1e-5)
    assert not any(point.active for point in model.hook_dict.values())


@MANY_FORWARDS
def test_torchs_own_hooks_may_edit_a_single_expert(model: HookedMoE, tokens: Tensor) -> None:
    site = model.blocks[0].mlp.experts.hook_points[2]
    with model.hooks(fwd_hooks=[(site.name, lambda x, hook: 0 * x)]):
        expected = model(tokens)
    handle = site.register_forward_hook(lambda module, args, out: 0 * out)
    assert torch.equal(model(tokens), expected)
    handle.remove()
    assert not torch.equal(model(tokens), expected)


def test_hooks_fire_in_the_order_of_the_computation(model: HookedMoE, tokens: Tensor) -> None:
    order: list[str] = []
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[(lambda name: True, lambda x, hook: order.append(hook.name))])
    for layer in range(model.cfg.n_layers):
        fired, declared = (
            [name for name in names if name.startswith(f"blocks.{layer}.") and ".experts." not in name]
            for names in (order, declared_names(model.cfg))
        )
        assert fired == declared
    layers = [int(name.split(".")[1]) for name in order if name.startswith("blocks.")]
    assert layers == sorted(layers)
    assert (order[0], order[-1]) == ("hook_embed", "ln_final.hook_normalized")


# Edits


@EACH_ROW
@MANY_FORWARDS
def test_an_edit_that_changes_nothing_changes_no_bit(spec: HookSpec, model: HookedMoE, tokens: Tensor) -> None:
    edits: dict[str, Hook] = {
        "none": lambda x, hook: None,
        "same": lambda x, hook: x,
        "clone": lambda x, hook: x.clone(),
        "in place": lambda x, hook: x.mul_(1),
        "transposed in memory": lambda x, hook: x.mT.contiguous().mT,
        "from the middle of a tensor": lambda x, hook: torch.cat((x.flatten()[:1], x.flatten()))[1:].view_as(x),
    }
    names = list(spec.names(model.cfg))
    with torch.no_grad():
        expected = model(tokens)
        for kind, edit in edits.items():
            edited = model.run_with_hooks(tokens, fwd_hooks=[(lambda name: name in names, edit)])
            assert torch.equal(edited, expected), kind


@EVERY_ARCHITECTURE
def test_looking_at_everything_at_once_changes_no_bit(model: HookedMoE, tokens: Tensor) -> None:
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    with torch.no_grad():
        for options in ({}, {"attention_mask": mask}):
            logits, cache = model.run_with_cache(tokens, **options)
            assert torch.equal(logits, model(tokens, **options))
            assert set(cache) == set(model.hook_dict)


@EACH_ROW
@MANY_FORWARDS
def test_a_random_edit_matters(spec: HookSpec, model: HookedMoE, tokens: Tensor) -> None:
    edited_values = 0

    def edit(x: Tensor, hook: HookPoint) -> Tensor:
        nonlocal edited_values
        edited_values = x.numel()
        return perturbed(x) if x.numel() else x  # an expert that no token goes to

    sites, mattered = set(), set()
    with torch.no_grad():
        expected = model(tokens)
        for name in spec.names(model.cfg):
            edited = model.run_with_hooks(tokens, fwd_hooks=[(name, edit)])
            assert edited.isfinite().all(), name
            assert torch.allclose(edited, expected, atol=1e-4) == (edited_values == 0), name
            site, *_ = name.split(".experts.")
            sites.add(site)
            if edited_values:
                mattered.add(site)
    assert mattered == sites


@EACH_ROW
@MANY_FORWARDS
def test_an_edit_in_place_is_an_edit(spec: HookSpec, model: HookedMoE, tokens: Tensor) -> None:
    """As TransformerLens's patching does it: write into the activation and return it."""
    name = next(iter(spec.names(model.cfg)))
    with torch.no_grad():
        expected = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: perturbed(x))])
        edited = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: x.copy_(perturbed(x)))])
    assert torch.equal(edited, expected)


@pytest.mark.parametrize("routing", ["free", "kept"])
def test_an_edit_of_one_token_leaves_earlier_logits_alone(routing: str, model: HookedMoE, tokens: Tensor) -> None:
    def edit(x: Tensor, hook: HookPoint) -> Tensor:
        x = x.clone()
        x[:, 5] += 1.0
        return x

    def keep(indices: Tensor, hook: HookPoint) -> Tensor:
        return clean[hook.name]

    with torch.no_grad():
        expected, clean = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_expert_indices"))
        hooks: list[tuple[str, Hook]] = [("blocks.1.hook_resid_mid", edit)]
        if routing == "kept":
            hooks += [(name, keep) for name in clean]
        edited = model.run_with_hooks(tokens, fwd_hooks=hooks)
    if routing == "kept":
        assert torch.equal(edited[:, :5], expected[:, :5])
    else:  # the token goes to other experts, so products run over groups of other sizes, which may round otherwise
        torch.testing.assert_close(edited[:, :5], expected[:, :5], atol=2e-5, rtol=0)
    assert not torch.isclose(edited[:, 5], expected[:, 5]).all()


def test_later_hooks_see_earlier_edits_and_the_cache_holds_the_last(model: HookedMoE, tokens: Tensor) -> None:
    name = "blocks.0.hook_attn_out"
    with torch.no_grad():
        (_, plain) = model.run_with_cache(tokens, names_filter=name)
        with model.hooks(fwd_hooks=[(name, lambda x, hook: x + 1), (name, lambda x, hook: 2 * x)]):
            _, cache = model.run_with_cache(tokens, names_filter=name)
    assert torch.equal(cache[name], 2 * (plain[name] + 1))


# What the routing hooks mean


def test_edited_router_logits_re_route_with_the_probabilities_they_imply(model: HookedMoE, tokens: Tensor) -> None:
    pre = "blocks.1.mlp."
    wanted = torch.randn(*tokens.shape, model.cfg.num_experts, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), model.hooks(fwd_hooks=[(pre + "hook_router_logits", lambda x, hook: wanted)]):
        _, cache = model.run_with_cache(tokens)
    probabilities, indices = wanted.softmax(-1).sort(dim=-1, descending=True)
    k = model.cfg.experts_per_token
    assert torch.equal(cache[pre + "hook_expert_indices"], indices[..., :k])
    torch.testing.assert_close(cache[pre + "hook_expert_weights"], probabilities[..., :k])


@pytest.mark.parametrize(
    ("architecture", "norm_topk_prob"), [("olmoe", False), ("olmoe", True), ("deepseek", False), ("deepseek", True)]
)
def test_edited_indices_take_their_weights_anew(
    architecture: str, norm_topk_prob: bool, make_model: Callable[..., HookedMoE], tokens: Tensor
) -> None:
    """Of any experts, whatever groups they stand in."""
    model, pre = make_model(architecture, norm_topk_prob=norm_topk_prob), "blocks.1.mlp."
    generator = torch.Generator().manual_seed(2)
    experts = torch.rand(*tokens.shape, model.cfg.num_experts, generator=generator).argsort(dim=-1)
    wanted = experts[..., : model.cfg.experts_per_token]
    with torch.no_grad(), model.hooks(fwd_hooks=[(pre + "hook_expert_indices", lambda x, hook: wanted)]):
        _, cache = model.run_with_cache(tokens)
    weights = cache[pre + "hook_router_logits"].softmax(-1).gather(-1, wanted)
    if norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    weights = weights * model.cfg.routed_scaling_factor
    torch.testing.assert_close(cache[pre + "hook_expert_weights"], weights)
    torch.testing.assert_close(cache[pre + "hook_routed_out"], routed_by_hand(model, cache, 1, wanted, weights))


def test_edited_weights_scale_contributions(model: HookedMoE, tokens: Tensor) -> None:
    pre = "blocks.1.mlp."
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        with model.hooks(fwd_hooks=[(pre + "hook_expert_weights", lambda x, hook: 2 * x)]):
            _, doubled = model.run_with_cache(tokens)
    torch.testing.assert_close(doubled[pre + "hook_routed_out"], 2 * cache[pre + "hook_routed_out"])


def routed_by_hand(model: HookedMoE, cache: ActivationCache, layer: int, indices: Tensor, weights: Tensor) -> Tensor:
    """The mixture one token and one expert at a time."""
    x, experts = mlp_input(model, cache, layer), model.blocks[layer].mlp.experts
    out = torch.zeros_like(x)
    for b, p in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])).tolist():
        for e, weight in zip(indices[b, p].tolist(), weights[b, p], strict=True):
            out[b, p] += weight * swiglu(x[b, p], *experts.W_in[e], experts.W_out[e])
    return out


def mlp_input(model: HookedMoE, cache: ActivationCache, layer: int) -> Tensor:
    return cache["normalized", layer, "ln2"] * model.blocks[layer].ln2.w


def test_the_inside_of_each_expert_is_what_the_slots_show(model: HookedMoE, tokens: Tensor) -> None:
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        experts, mlp = model.blocks[1].mlp.experts, "blocks.1.mlp."
        x = mlp_input(model, cache, 1)
        indices = cache[mlp + "hook_expert_indices"]
        pre, pre_linear = (torch.einsum("bpkfd,bpd->bpkf", experts.W_in[indices, i], x) for i in (0, 1))
        post = torch.nn.functional.silu(pre) * pre_linear
        out = torch.einsum("bpkdf,bpkf->bpkd", experts.W_out[indices], post)
    for name, expected in [("pre", pre), ("pre_linear", pre_linear), ("post", post), ("out", out)]:
        torch.testing.assert_close(cache[f"{mlp}hook_expert_{name}"], expected)


def test_each_expert_sees_its_own_tokens_in_order(model: HookedMoE, tokens: Tensor) -> None:
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def look(x: Tensor, hook: HookPoint) -> None:
        seen[int(hook.name.split(".")[4])] = (x, hook.ctx["tokens"])

    with torch.no_grad(), model.hooks(fwd_hooks=[(lambda name: name.startswith("blocks.2.mlp.experts."), look)]):
        _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.startswith("blocks.2.mlp.hook"))
    indices, outputs = cache["blocks.2.mlp.hook_expert_indices"], cache["blocks.2.mlp.hook_expert_out"]
    for expert in range(model.cfg.num_experts):
        batch, pos, slot = (indices == expert).nonzero(as_tuple=True)  # in the order of (batch, pos)
        rows, where = seen[expert]
        assert torch.equal(where, torch.stack((batch, pos), dim=-1))
        assert torch.equal(rows, outputs[batch, pos, slot])


def test_an_expert_that_no_token_goes_to_sees_none(model: HookedMoE, tokens: Tensor) -> None:
    seen = {}

    def look(x: Tensor, hook: HookPoint) -> None:
        seen[hook.name] = (list(x.shape), list(hook.ctx["tokens"].shape))

    with torch.no_grad():
        model.run_with_hooks(
            tokens,
            fwd_hooks=[
                ("blocks.0.mlp.hook_expert_indices", lambda x, hook: torch.zeros_like(x)),
                ("blocks.0.mlp.experts.0.hook_out", look),
                ("blocks.0.mlp.experts.5.hook_out", look),
            ],
        )
    n, d = 3 * tokens.numel(), model.cfg.d_model
    assert seen == {
        "blocks.0.mlp.experts.0.hook_out": ([n, d], [n, 2]),
        "blocks.0.mlp.experts.5.hook_out": ([0, d], [0, 2]),
    }


def test_editing_one_expert_equals_editing_its_slots(model: HookedMoE, tokens: Tensor) -> None:
    def edit_slots(x: Tensor, hook: HookPoint) -> Tensor:
        return torch.where((chosen == 4)[..., None], 3 * x, x)

    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter="blocks.1.mlp.hook_expert_indices")
        chosen = cache["blocks.1.mlp.hook_expert_indices"]
        by_expert = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.mlp.experts.4.hook_out", lambda x, hook: 3 * x)])
        by_slot = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.mlp.hook_expert_out", edit_slots)])
    assert torch.equal(by_expert, by_slot)


@pytest.mark.parametrize("architecture", ["qwen", "deepseek"])
def test_shared_experts_and_dense_layers_are_what_their_hooks_show(model: HookedMoE, tokens: Tensor) -> None:
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        for layer, block in enumerate(model.blocks):
            x, out = mlp_input(model, cache, layer), cache["mlp_out", layer]
            part, mlp = ("mlp", block.mlp) if layer in model.cfg.dense_layers else ("shared", block.mlp.shared)
            pre, pre_linear, post = (cache[name, layer, part] for name in ("pre", "pre_linear", "post"))
            torch.testing.assert_close(pre, x @ mlp.W_gate.T)
            torch.testing.assert_close(pre_linear, x @ mlp.W_in.T)
            torch.testing.assert_close(post, torch.nn.functional.silu(pre) * pre_linear)
            if layer in model.cfg.dense_layers:
                torch.testing.assert_close(out, post @ mlp.W_out.T)
                continue
            gate = 1.0
            if model.cfg.shared_gate:
                gate = cache["shared_gate", layer]
                torch.testing.assert_close(gate, (x @ block.mlp.W_shared_gate.T).sigmoid())
            torch.testing.assert_close(cache["shared_out", layer], gate * (post @ mlp.W_out.T))
            torch.testing.assert_close(out, cache["routed_out", layer] + cache["shared_out", layer])


# What the attention hooks mean


@EVERY_ARCHITECTURE
def test_edited_scores_make_the_pattern_and_edited_patterns_mix_the_values(model: HookedMoE, tokens: Tensor) -> None:
    attn = "blocks.1.attn."

    def look_only_at_yourself(scores: Tensor, hook: HookPoint) -> Tensor:
        own = torch.eye(scores.shape[-1], dtype=torch.bool)
        return scores.masked_fill(~own, float("-inf"))

    with torch.no_grad(), model.hooks(fwd_hooks=[(attn + "hook_attn_scores", look_only_at_yourself)]):
        _, cache = model.run_with_cache(tokens)
    pattern, z = cache[attn + "hook_pattern"], cache[attn + "hook_z"]
    share = torch.ones(*pattern.shape[:-1])
    if model.cfg.attention_sink:
        own_scores = cache[attn + "hook_attn_scores"].diagonal(dim1=-2, dim2=-1)
        share = (own_scores - model.blocks[1].attn.sink[:, None]).sigmoid()
    torch.testing.assert_close(pattern, torch.eye(tokens.shape[1]) * share[..., None])
    values = cache[attn + "hook_v"]
    if model.cfg.clip_qkv is not None:
        values = values.clamp(-model.cfg.clip_qkv, model.cfg.clip_qkv)
    values = values.repeat_interleave(model.cfg.n_heads // model.cfg.n_key_value_heads, dim=2)
    torch.testing.assert_close(z, values * share.transpose(1, 2)[..., None])


@pytest.mark.parametrize("architecture", ["deepseek"])
def test_latent_attention_is_what_its_hooks_show(model: HookedMoE, tokens: Tensor) -> None:
    """Keys are [content | position]: content and values from the latent vector alone, and positions the same in all heads."""
    attn, content = model.blocks[1].attn, model.cfg.d_head - model.cfg.d_rotary
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        made = torch.einsum("bpl,hwl->bphw", cache["kv_latent", 1], attn.W_UKV)
    q, k, v, rot_q, rot_k = (cache[name, 1] for name in ("q", "k", "v", "rot_q", "rot_k"))
    torch.testing.assert_close(k[..., :content], made[..., :content])
    torch.testing.assert_close(v, made[..., content:])
    for used, projected in [(rot_q, q), (rot_k, k)]:
        assert torch.equal(used[..., :content], projected[..., :content])
        assert not torch.isclose(used[:, 1:, :, content:], projected[:, 1:, :, content:]).all(-1).any()
    for keys in (k, rot_k):
        assert torch.equal(keys[..., content:], keys[:, :, :1, content:].expand_as(keys[..., content:]))


@EVERY_ARCHITECTURE
def test_the_attention_output_is_the_sum_of_the_heads_results(model: HookedMoE, tokens: Tensor) -> None:
    attn = "blocks.1.attn."

    def drop_head_2(x: Tensor, hook: HookPoint) -> Tensor:
        return x.index_fill(2, torch.tensor([2]), 0.0)

    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        whole, bias = cache[attn + "hook_result"].sum(2), model.blocks[1].attn.b_O
        torch.testing.assert_close(cache["blocks.1.hook_attn_out"], whole if bias is None else whole + bias)
        by_result = model.run_with_hooks(tokens, fwd_hooks=[(attn + "hook_result", drop_head_2)])
        by_z = model.run_with_hooks(tokens, fwd_hooks=[(attn + "hook_z", drop_head_2)])
    torch.testing.assert_close(by_result, by_z)


@EVERY_ARCHITECTURE
def test_the_residual_stream_adds_up(model: HookedMoE, tokens: Tensor) -> None:
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    for layer in range(model.cfg.n_layers):
        pre, mid, post, attn, mlp = (
            cache[f"blocks.{layer}.hook_{name}"] for name in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
        )
        assert torch.equal(pre + attn, mid)
        assert torch.equal(mid + mlp, post)


# Attaching and detaching


def test_hooks_are_detached_after_an_exception(model: HookedMoE, tokens: Tensor) -> None:
    def fail(x: Tensor, hook: HookPoint) -> None:
        raise RuntimeError("on purpose")

    for run in (
        lambda: model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", fail)]),
        lambda: model.run_with_cache(tokens.clone().fill_(-1)),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            run()
        assert not any(point.active for point in model.hook_dict.values())


def test_a_with_block_removes_only_its_own_hooks(model: HookedMoE, tokens: Tensor) -> None:
    calls: list[str] = []
    model.add_hook("hook_embed", lambda x, hook: calls.append("outer"))
    with torch.no_grad():
        with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: calls.append("inner"))]):
            model(tokens)
        model(tokens)
        assert calls == ["outer", "inner", "outer"]
        model.reset_hooks()
        model(tokens)
    assert len(calls) == 3


def test_one_function_attached_twice_runs_twice(model: HookedMoE, tokens: Tensor) -> None:
    calls: list[str] = []

    def count(x: Tensor, hook: HookPoint) -> None:
        calls.append(hook.name)

    with torch.no_grad(), model.hooks(fwd_hooks=[("hook_embed", count)]):
        model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", count)])
        model(tokens)
    assert len(calls) == 3


def test_permanent_hooks_outlast_a_reset(model: HookedMoE, tokens: Tensor) -> None:
    calls: list[str] = []
    model.add_hook("hook_embed", lambda x, hook: calls.append("permanent"), is_permanent=True)
    model.add_hook("hook_embed", lambda x, hook: calls.append("usual"))
    model.reset_hooks()
    with torch.no_grad():
        model(tokens)
        model.reset_hooks(including_permanent=True)
        model(tokens)
    assert calls == ["permanent"]


def test_a_reset_forgets_what_hooks_kept(model: HookedMoE) -> None:
    point = model.hook_dict["hook_embed"]
    point.ctx["mine"] = 1
    model.reset_hooks()
    assert not point.ctx


def test_a_point_knows_its_layer(model: HookedMoE) -> None:
    assert model.hook_dict["blocks.2.mlp.experts.1.hook_out"].layer() == 2
    with pytest.raises(ValueError, match="hook_embed is not in a block"):
        model.hook_dict["hook_embed"].layer()


def test_unknown_names_are_refused_with_the_nearest(model: HookedMoE, tokens: Tensor) -> None:
    for attach in (
        lambda: model.add_hook("blocks.1.hook_resid_pred", lambda x, hook: None),
        lambda: model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_pred", lambda x, hook: None)]),
        lambda: model.run_with_cache(tokens, names_filter=["hook_embed", "blocks.1.hook_resid_pred"]),
    ):
        with pytest.raises(ValueError, match=r"unknown hook point 'blocks.1.hook_resid_pred'.*'blocks.1.hook_resid_pre'"):
            attach()
    with pytest.raises(KeyError, match=r"See model\.hook_dict"):
        model.add_hook("nothing of the kind", lambda x, hook: None)


def test_one_wrong_name_attaches_none_of_the_hooks(model: HookedMoE) -> None:
    hooks = [("hook_embed", lambda x, hook: None), ("hook_embd", lambda x, hook: None)]
    with pytest.raises(ValueError, match="hook_embd"), model.hooks(fwd_hooks=hooks):
        pass
    assert not model.hook_dict["hook_embed"].active


def test_a_predicate_that_accepts_nothing_is_refused(model: HookedMoE, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="accepts no hook point"):
        model.run_with_hooks(tokens, fwd_hooks=[(lambda name: "hook_resid_pst" in name, lambda x, hook: None)])


def test_a_direction_is_fwd_or_bwd(model: HookedMoE) -> None:
    with pytest.raises(ValueError, match="'fwd' or 'bwd', not 'sideways'"):
        model.add_hook("hook_embed", lambda x, hook: None, dir="sideways")


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (
            lambda x, hook: x[:, :3],
            ValueError,
            r"hook on blocks.0.hook_mlp_out returned shape \[2, 3, 32\]; expected \[2, 11, 32\]",
        ),
        (lambda x, hook: x[:, :1], ValueError, r"expected \[2, 11, 32\]"),  # would broadcast
        (lambda x, hook: x.double(), TypeError, r"returned torch.float64; expected torch.float32"),
        (lambda x, hook: x.tolist(), TypeError, r"returned a list; return a tensor or None"),
        (lambda x, hook: (x,), TypeError, r"returned a tuple"),
    ],
)
def test_an_edit_of_the_wrong_kind_is_refused(
    edit: Hook, error: type[Exception], message: str, model: HookedMoE, tokens: Tensor
) -> None:
    with pytest.raises(error, match=message):
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_mlp_out", edit)])


@pytest.mark.parametrize("index", [-1, 6])
def test_an_edit_that_routes_to_no_expert_is_refused(index: int, model: HookedMoE, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match=r"hook_expert_indices returned experts from .*has experts 0 to 5"):
        model.run_with_hooks(
            tokens, fwd_hooks=[("blocks.0.mlp.hook_expert_indices", lambda x, hook: x.index_fill(1, torch.tensor([3]), index))]
        )


# Gradients

WITHOUT_GRADIENT = ("hook_expert_indices", "hook_selection_bias")
"""What only chooses."""


@pytest.mark.parametrize("architecture", ["glm"])
def test_no_gradient_flows_through_the_selection_bias(model: HookedMoE, tokens: Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"a backward hook on .*hook_selection_bias cannot fire: no gradient flows here"):
        model.run_with_hooks(tokens, bwd_hooks=[("blocks.1.mlp.hook_selection_bias", lambda gradient, hook: None)])


@pytest.mark.parametrize("architecture", ["glm"])
def test_scores_weigh_and_select_and_the_bias_only_selects(model: HookedMoE, tokens: Tensor) -> None:
    moe = "blocks.1.mlp."
    with torch.no_grad():
        _, clean = model.run_with_cache(tokens)

        def most_wanted(bias: Tensor, hook: HookPoint) -> Tensor:
            return bias.index_fill(-1, torch.tensor(3), 1.0e3)

        with model.hooks([(moe + "hook_selection_bias", most_wanted)]):
            _, biased = model.run_with_cache(tokens)
        with model.hooks([(moe + "hook_router_scores", lambda scores, hook: 1e-3 * scores)]):
            _, scaled = model.run_with_cache(tokens)
    assert (biased[moe + "hook_expert_indices"] == 3).any(-1).all()
    scores = clean[moe + "hook_router_scores"].gather(-1, biased[moe + "hook_expert_indices"])
    torch.testing.assert_close(biased[moe + "hook_expert_weights"], scores / scores.sum(-1, keepdim=True))
    bias = model.blocks[1].mlp.router.b_selection
    assert torch.equal(clean[moe + "hook_selection_bias"], bias.expand_as(clean[moe + "hook_selection_bias"]))
    chosen = scaled[moe + "hook_expert_indices"]
    groups = bias.view(3, 2).sum(-1).topk(2).indices
    within = bias.masked_fill(~torch.isin(torch.arange(6) // 2, groups), -torch.inf)
    assert (chosen.sort().values == within.topk(3).indices.sort().values).all(), "next to nothing is left of the scores"


@EACH_FLOAT_ROW
@MANY_FORWARDS
def test_backward_hooks_give_the_gradient_that_autograd_gives(spec: HookSpec, model: HookedMoE, tokens: Tensor) -> None:
    """Autograd's answer: the derivative by a variable that stands in for the activation."""
    for name in [name for name in spec.names(model.cfg) if not name.endswith(WITHOUT_GRADIENT)][:4]:
        gradients: list[Tensor] = []
        leaves: list[Tensor] = []

        def replace(x: Tensor, hook: HookPoint, leaves: list[Tensor] = leaves) -> Tensor:
            leaves.append(x.detach().clone().requires_grad_())
            return leaves[-1]

        def keep(gradient: Tensor, hook: HookPoint, gradients: list[Tensor] = gradients) -> None:
            gradients.append(gradient.clone())

        model.run_with_hooks(tokens, return_type="loss", bwd_hooks=[(name, keep)]).backward()
        loss = model.run_with_hooks(tokens, return_type="loss", fwd_hooks=[(name, replace)])
        (expected,) = torch.autograd.grad(loss, leaves)
        assert len(gradients) == 1, name
        torch.testing.assert_close(gradients[0], expected, atol=1e-7, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
        assert expected.numel() == 0 or expected.abs().sum() > 0, name


@EVERY_ARCHITECTURE
def test_a_backward_hook_changes_no_bit_of_the_output_and_no_gradient(model: HookedMoE, tokens: Tensor) -> None:
    def gradients(bwd_hooks: list) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        logits = model.run_with_hooks(tokens, bwd_hooks=bwd_hooks)
        next_token_loss(logits, tokens).mean().backward()
        return logits, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    logits, expected = gradients([])
    names = [name for name in model.hook_dict if not name.endswith(WITHOUT_GRADIENT)]
    hooked_logits, hooked = gradients([(name, lambda gradient, hook: None) for name in names])
    assert torch.equal(hooked_logits, logits)
    for name, gradient in expected.items():
        # Through other operations, in part; float32 rounds these gradients by up to 1e-6 either way.
        torch.testing.assert_close(hooked[name], gradient, atol=1e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_each_backward_hook_sees_the_gradient_of_its_own_place(model: HookedMoE, tokens: Tensor) -> None:
    """Also where one tensor stands in for several activations."""
    names = ["blocks.0.hook_attn_out", "blocks.1.hook_attn_out", "blocks.2.hook_mlp_out"]
    steering = torch.randn(*tokens.shape, model.cfg.d_model, requires_grad=True)
    seen: dict[str, Tensor] = {}

    def keep(gradient: Tensor, hook: HookPoint) -> None:
        seen[hook.name] = gradient.clone()

    loss = model.run_with_hooks(
        tokens,
        return_type="loss",
        fwd_hooks=[(name, lambda x, hook: steering) for name in names],
        bwd_hooks=[(name, keep) for name in names],
    )
    (total,) = torch.autograd.grad(loss, steering)
    assert not torch.allclose(seen[names[0]], seen[names[1]])
    torch.testing.assert_close(sum(seen.values()), total, atol=1e-7, rtol=1e-4)


def test_a_backward_hook_can_replace_the_gradient(model: HookedMoE, tokens: Tensor) -> None:
    model.run_with_hooks(
        tokens, return_type="loss", bwd_hooks=[("blocks.0.hook_resid_post", lambda g, hook: torch.zeros_like(g))]
    ).backward()
    assert not model.blocks[0].mlp.router.W.grad.any()
    assert model.blocks[1].mlp.router.W.grad.any()


def test_a_replaced_gradient_has_to_fit(model: HookedMoE, tokens: Tensor) -> None:
    loss = model.run_with_hooks(tokens, return_type="loss", bwd_hooks=[("hook_embed", lambda g, hook: g[:1])])
    with pytest.raises(ValueError, match=r"hook on hook_embed returned shape \[1, 11, 32\]; expected \[2, 11, 32\]"):
        loss.backward()


def test_a_backward_hook_where_no_gradient_flows_is_refused(model: HookedMoE, tokens: Tensor) -> None:
    hooks = [("blocks.0.hook_resid_pre", lambda gradient, hook: None)]
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"backward hook on blocks.0.hook_resid_pre cannot fire"):
        model.run_with_hooks(tokens, bwd_hooks=hooks)
    with pytest.raises(RuntimeError, match="cannot fire"):
        model.run_with_hooks(tokens, bwd_hooks=[("blocks.0.mlp.hook_expert_indices", lambda gradient, hook: None)])


@pytest.mark.parametrize("architecture", ["olmoe", "deepseek"])
@pytest.mark.parametrize("name", ["attn_scores", "pattern", "result"])
def test_gradients_flow_through_an_edited_activation(
    name: str, architecture: str, make_model: Callable[..., HookedMoE], tokens: Tensor
) -> None:
    """A steering vector can be trained, also where the plain forward takes another path than the hooked one."""
    model = make_model(architecture, dtype=torch.float64)

    def loss(scale: Tensor | float) -> Tensor:
        def steer(x: Tensor, hook: HookPoint) -> Tensor:
            return x + (scale - 1) * x.detach().masked_fill(x.isinf(), 0.0)

        return model.run_with_hooks(tokens, return_type="loss", fwd_hooks=[(f"blocks.0.attn.hook_{name}", steer)])

    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(scale), scale)
    with torch.no_grad():
        slope = (loss(1.001) - loss(0.999)).item() / 0.002
    assert slope != 0
    assert gradient.item() == pytest.approx(slope, rel=1e-3)


# Hooks that nobody uses


def test_without_hooks_no_layout_that_only_a_hook_would_see_is_built(
    model: HookedMoE, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    to_slots = ExpertGroups.to_slots

    def counted(self: ExpertGroups, x: Tensor) -> Tensor:
        widths.append(x.shape[-1])
        return to_slots(self, x)

    def never(*args: object, **options: object) -> None:
        raise AssertionError("built without a hook that would see it")

    monkeypatch.setattr(ExpertGroups, "to_slots", counted)
    monkeypatch.setattr(ExpertGroups, "tokens", never)
    monkeypatch.setattr(type(model.blocks[0].attn), "_attend_by_pattern", never)
    with torch.no_grad():
        model(tokens)
        assert model.cfg.d_expert not in widths
        with pytest.raises(AssertionError):
            model.run_with_cache(tokens, names_filter="blocks.0.attn.hook_pattern")
        model.run_with_cache(tokens, names_filter="blocks.0.mlp.hook_expert_post")
        assert widths.count(model.cfg.d_expert) == 1


def test_without_hooks_no_hook_point_allocates(model: HookedMoE) -> None:
    x = torch.zeros(3)
    assert all(point(x) is x for point in model.hook_dict.values())


@pytest.mark.parametrize(
    ("architecture", "dtype"), [("olmoe", torch.float32), ("qwen", torch.bfloat16), ("deepseek", torch.bfloat16)]
)
@MANY_FORWARDS
def test_edits_in_place_count_at_every_hook_point(
    architecture: str, dtype: torch.dtype, make_model: Callable[..., HookedMoE], tokens: Tensor
) -> None:
    def edit_in_place(activation: Tensor, hook: HookPoint) -> Tensor:
        return activation.mul_(0) if activation.is_floating_point() else activation.fill_(0)

    def return_a_clone(activation: Tensor, hook: HookPoint) -> Tensor:
        return activation.clone()

    own = make_model(architecture, n_layers=2, d_expert=16, dtype=dtype)
    with torch.inference_mode():
        clean, routed = own(tokens), routed_experts(own, tokens)
        for name in own.hook_dict:
            edited = own.run_with_hooks(tokens, fwd_hooks=[(name, edit_in_place)])
            # scores of -inf times zero are nan; where an expert has no tokens, nothing can change
            unused = "experts." in name and name not in routed
            assert unused or not torch.equal(clean, edited), name
            assert torch.equal(clean, own.run_with_hooks(tokens, fwd_hooks=[(name, return_a_clone)])), name


def routed_experts(model: HookedMoE, tokens: Tensor) -> set[str]:
    """The hook points of the experts that some token goes to."""
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_expert_indices"))
    return {
        f"{name.removesuffix('hook_expert_indices')}experts.{expert}.hook_out"
        for name, indices in cache.items()
        for expert in indices.unique().tolist()
    }


@EVERY_ARCHITECTURE
@MANY_FORWARDS
def test_an_edit_in_place_reaches_nothing_but_what_follows(
    architecture: str, make_model: Callable[..., HookedMoE], tokens: Tensor
) -> None:
    own = make_model(architecture, n_layers=2, dtype=torch.float64)
    _, clean = own.run_with_cache(tokens)
    for name in own.hook_dict:
        if "experts." in name or name.endswith("indices"):
            continue
        with torch.no_grad(), own.hooks([(name, lambda activation, hook: activation.mul_(0.9))]):
            _, edited = own.run_with_cache(tokens)
        for earlier in list(clean)[: list(clean).index(name)]:
            assert torch.equal(clean[earlier], edited[earlier]), (name, earlier)
        gradients = []
        for edit in (lambda activation, hook: activation.mul_(0.9), lambda activation, hook: activation * 0.9):
            own.zero_grad()
            own.run_with_hooks(tokens, return_type="loss", fwd_hooks=[(name, edit)]).backward()
            gradients.append(own.embed.W_E.grad.clone())
        torch.testing.assert_close(*gradients)


def test_an_edit_in_place_leaves_the_callers_residual_stream_alone(model: HookedMoE, tokens: Tensor) -> None:
    resid = model(tokens, stop_at_layer=1).detach()
    before = resid.clone()
    hooks = [("blocks.1.hook_resid_pre", lambda activation, hook: activation.mul_(2))]
    model.run_with_hooks(resid, start_at_layer=1, fwd_hooks=hooks)
    assert torch.equal(resid, before)
    resid.requires_grad_()
    model.run_with_hooks(resid, start_at_layer=1, fwd_hooks=hooks).sum().backward()
    assert resid.grad is not None
