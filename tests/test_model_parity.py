"""The model is the one that transformers runs: logits, losses, routing, named activations and gradients.

The oracle is a fresh transformers model in float32 with eager attention and eager experts. transformers agrees with itself
(other attention and expert kernels) to 2e-5 in logits and 1e-6 in loss; the tolerances here leave little more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import OlmoeForCausalLM

from hooked_moe import ActivationCache, ExpertMask, HookedMoE
from tests.hf_models import OPTIONS, random_tokens, save, tiny_olmoe

LOGITS, LOSS, GRADIENT = 5e-5, 2e-6, 1e-5
CONFIGS: dict[str, dict[str, Any]] = OPTIONS | {
    "one-key-value-head": {"num_key_value_heads": 1},
    "rope-base-1e6": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}
PADDING = ("none", "right", "left")


def attention_mask(padding: str, batch: int = 3, pos: int = 20) -> Tensor | None:
    """Rows of 20, 15 and 11 real tokens."""
    if padding == "none":
        return None
    real = torch.arange(pos) < torch.tensor([pos, pos - 5, pos - 9])[:batch, None]
    return (real if padding == "right" else real.flip(1)).long()


@dataclass
class Pair:
    """The same weights in transformers and here."""

    hf: OlmoeForCausalLM
    ours: HookedMoE

    def reference(self, tokens: Tensor, mask: Tensor | None, **options: Any) -> Any:
        """transformers' output; positions follow the mask, as its `generate` has them."""
        positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
        return self.hf(tokens, attention_mask=mask, position_ids=positions, use_cache=False, **options)


def labels_of(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Next tokens to score: no padding, and not the first real token, which only padding could predict."""
    if mask is None:
        return tokens
    predicted_from = F.pad(mask[:, :-1], (1, 0))
    return tokens.masked_fill(~(mask.bool() & predicted_from.bool()), -100)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    hf = tiny_olmoe(**CONFIGS[request.param])
    return Pair(hf, HookedMoE.from_pretrained(save(hf, tmp_path_factory.mktemp("hf"))))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    hf = tiny_olmoe()
    return Pair(hf, HookedMoE.from_pretrained(save(hf, tmp_path_factory.mktemp("hf"))))


@pytest.fixture
def batch() -> Tensor:
    return random_tokens(3, 20)


@pytest.mark.parametrize("padding", PADDING)
def test_logits_loss_and_routing_are_those_of_transformers(pair: Pair, padding: str, batch: Tensor) -> None:
    mask = attention_mask(padding)
    real = torch.ones_like(batch, dtype=torch.bool) if mask is None else mask.bool()
    routed: list[Tensor] = []
    handles = [
        layer.mlp.gate.register_forward_hook(lambda module, args, out: routed.append(out[2].view(*batch.shape, -1)))
        for layer in pair.hf.model.layers
    ]
    with torch.no_grad():
        expected = pair.reference(batch, mask, labels=labels_of(batch, mask))
        (logits, loss), cache = pair.ours.run_with_cache(batch, return_type="both", attention_mask=mask)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(logits[real], expected.logits[real], atol=LOGITS, rtol=0)
    assert loss.item() == pytest.approx(expected.loss.item(), abs=LOSS)
    for layer, indices in enumerate(routed):
        ours = cache["expert_indices", layer]
        assert torch.equal(ours[real].sort(-1).values, indices[real].sort(-1).values)


# Named activations


def hf_activations(pair: Pair, tokens: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """What transformers' own modules take in and give out, under the names of our hook points."""
    found: dict[str, Tensor] = {}
    cfg = pair.ours.cfg
    heads = {"q": cfg.n_heads, "k": cfg.n_key_value_heads, "v": cfg.n_key_value_heads}

    def keep(name: str, pick: Callable[[Any, Any], Tensor]) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            found[name] = pick(args[0] if args else kwargs["hidden_states"], output).clone()

        return hook

    def keep_experts(layer: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Tensor, Tensor, Tensor], kwargs: Any, output: Tensor) -> None:
            """transformers' arithmetic for one expert, at every slot that goes to it."""
            x, indices, weights = args
            pre, post = torch.empty(2, *indices.shape, cfg.d_expert), torch.empty(*indices.shape, cfg.d_expert)
            out = torch.empty(*indices.shape, cfg.d_model)
            for expert in range(cfg.num_experts):
                token, slot = torch.where(indices == expert)
                pre[0, token, slot], pre[1, token, slot] = F.linear(x[token], module.gate_up_proj[expert]).chunk(2, dim=-1)
                post[token, slot] = module.act_fn(pre[0, token, slot]) * pre[1, token, slot]
                out[token, slot] = F.linear(post[token, slot], module.down_proj[expert])
            name = f"blocks.{layer}.mlp.hook_expert_"
            parts = {"pre": pre[0], "pre_linear": pre[1], "post": post, "out": out, "weights": weights}
            found.update({name + part: value.unflatten(0, tokens.shape) for part, value in parts.items()})
            found[f"blocks.{layer}.mlp.hook_routed_out"] = output.view(*tokens.shape, -1)

        return hook

    modules: list[tuple[torch.nn.Module, Callable[..., None]]] = [
        (pair.hf.model.embed_tokens, keep("hook_embed", lambda x, out: out)),
        (pair.hf.model.norm, keep("ln_final", lambda x, out: out)),
    ]
    for i, layer in enumerate(pair.hf.model.layers):
        b, attn = f"blocks.{i}.", layer.self_attn
        modules += [
            (layer, keep(b + "hook_resid_pre", lambda x, out: x)),
            (layer, keep(b + "hook_resid_post", lambda x, out: out)),
            (layer.input_layernorm, keep(b + "ln1", lambda x, out: out)),
            (layer.post_attention_layernorm, keep(b + "hook_resid_mid", lambda x, out: x)),
            (layer.post_attention_layernorm, keep(b + "ln2", lambda x, out: out)),
            (attn, keep(b + "attn.hook_pattern", lambda x, out: out[1])),
            (attn, keep(b + "hook_attn_out", lambda x, out: out[0])),
            (attn.o_proj, keep(b + "attn.hook_z", lambda x, out: x.unflatten(-1, (cfg.n_heads, cfg.d_head)))),
            (layer.mlp.gate, keep(b + "mlp.hook_router_logits", lambda x, out: out[0].view(*tokens.shape, -1))),
            (layer.mlp, keep(b + "hook_mlp_out", lambda x, out: out)),
            (layer.mlp.experts, keep_experts(i)),
        ]
        modules += [
            (getattr(attn, f"{x}_proj"), keep(f"{b}attn.hook_{x}", lambda _, out, n=n: out.unflatten(-1, (n, cfg.d_head))))
            for x, n in heads.items()
        ]
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in modules]
    with torch.no_grad():
        pair.reference(tokens, mask)
    for handle in handles:
        handle.remove()
    return found


def our_activations(model: HookedMoE, cache: ActivationCache) -> dict[str, Tensor]:
    """The cache, and what the norms give out."""
    norms = {f"blocks.{i}.{norm}": getattr(block, norm).w for i, block in enumerate(model.blocks) for norm in ("ln1", "ln2")}
    norms["ln_final"] = model.ln_final.w
    return {**cache, **{name: (cache[name + ".hook_normalized"] * w).detach() for name, w in norms.items()}}


@pytest.mark.parametrize("padding", PADDING)
def test_named_activations_are_those_of_the_modules_they_are_named_after(pair: Pair, padding: str, batch: Tensor) -> None:
    mask = attention_mask(padding)
    real = torch.ones_like(batch, dtype=torch.bool) if mask is None else mask.bool()
    with torch.no_grad():
        _, cache = pair.ours.run_with_cache(batch, attention_mask=mask)
    ours, theirs = our_activations(pair.ours, cache), hf_activations(pair, batch, mask)
    assert len(theirs) == 2 + 19 * pair.ours.cfg.n_layers
    for name, expected in theirs.items():
        actual = ours[name]
        if "pattern" in name:  # head before query
            actual, expected = actual.transpose(1, 2), expected.transpose(1, 2)
        torch.testing.assert_close(actual[real], expected[real], atol=2e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for layer in range(pair.ours.cfg.n_layers):
        scores, pattern = ours[f"blocks.{layer}.attn.hook_attn_scores"], ours[f"blocks.{layer}.attn.hook_pattern"]
        torch.testing.assert_close(scores.softmax(-1), pattern)
        summed, bias = ours[f"blocks.{layer}.attn.hook_result"].sum(2), pair.ours.blocks[layer].attn.b_O
        whole = (summed if bias is None else summed + bias).detach()
        torch.testing.assert_close(whole, ours[f"blocks.{layer}.hook_attn_out"], atol=2e-5, rtol=1e-5)


# Gradients and training


def matched_gradients(pair: Pair) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every gradient of ours, in the shape of transformers'."""
    hf = dict(pair.hf.named_parameters())
    parts = {
        "ln1.w": "input_layernorm.weight",
        "ln2.w": "post_attention_layernorm.weight",
        "mlp.router.W": "mlp.gate.weight",
        "mlp.experts.W_in": "mlp.experts.gate_up_proj",
        "mlp.experts.W_out": "mlp.experts.down_proj",
        **{f"attn.{x}_norm.w": f"self_attn.{x}_norm.weight" for x in "qk"},
        **{f"attn.W_{x.upper()}": f"self_attn.{x}_proj.weight" for x in "qkvo"},
        **{f"attn.b_{x.upper()}": f"self_attn.{x}_proj.bias" for x in "qkvo"},
    }
    outside = {"embed.W_E": "model.embed_tokens.weight", "unembed.W_U": "lm_head.weight", "ln_final.w": "model.norm.weight"}
    for name, parameter in pair.ours.named_parameters():
        if name in outside:
            theirs = hf[outside[name]]
        else:
            _, layer, part = name.split(".", 2)
            theirs = hf[f"model.layers.{layer}.{parts[part]}"]
        yield name, parameter.grad.reshape(theirs.shape), theirs.grad


@pytest.mark.parametrize("padding", PADDING)
def test_gradients_are_those_of_transformers(pair: Pair, padding: str, batch: Tensor) -> None:
    mask = attention_mask(padding)
    pair.hf.zero_grad()
    pair.ours.zero_grad()
    pair.reference(batch, mask, labels=labels_of(batch, mask)).loss.backward()
    pair.ours(batch, return_type="loss", attention_mask=mask).backward()
    names = set()
    for name, ours, theirs in matched_gradients(pair):
        names.add(name)
        assert theirs.norm() > 0, name
        assert (ours - theirs).norm() <= GRADIENT * theirs.norm(), name
    assert len(names) == len(list(pair.hf.parameters()))


def test_training_on_one_batch_lowers_the_loss(plain: Pair, batch: Tensor) -> None:
    model = HookedMoE(plain.ours.cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(batch, return_type="loss")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.tensor(97.0).log().item(), abs=0.2)  # knows nothing at first
    assert losses[-1] < losses[0] / 2


# Other dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_routes_as_full_precision_does(plain: Pair, dtype: torch.dtype) -> None:
    tokens = random_tokens(8, 40)
    half = HookedMoE(plain.ours.cfg.replace(dtype=dtype))
    half.load_state_dict(plain.ours.state_dict())
    rounded = HookedMoE(plain.ours.cfg)  # the same weights in float32
    rounded.load_state_dict(half.state_dict())
    with torch.no_grad():
        (logits, loss), cache = half.run_with_cache(tokens, return_type="both")
        expected, reference = rounded.run_with_cache(tokens, return_type="loss")
    assert logits.dtype == torch.float32
    assert cache["resid_mid", 1].dtype == dtype
    assert cache["router_logits", 1].dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), abs=0.02)
    for layer in range(half.cfg.n_layers):
        chosen = [F.one_hot(run["expert_indices", layer], half.cfg.num_experts).sum(2) for run in (cache, reference)]
        agreement = (chosen[0] * chosen[1]).sum() / chosen[0].sum()
        assert agreement >= 0.98, f"layer {layer}: {agreement:.4f}"


def test_float64_runs_in_float64(plain: Pair, batch: Tensor) -> None:
    wide = HookedMoE(plain.ours.cfg.replace(dtype=torch.float64))
    wide.load_state_dict(plain.ours.state_dict())
    with torch.no_grad():
        logits, cache = wide.run_with_cache(batch)
        torch.testing.assert_close(logits.float(), plain.ours(batch), atol=LOGITS, rtol=0)
    assert {cache[name].dtype for name in cache if "indices" not in name} | {logits.dtype} == {torch.float64}


# Running a part of the layers


@pytest.mark.parametrize("layer", [0, 1, 2, 3, -1, -3])
@pytest.mark.parametrize("padding", PADDING)
def test_two_parts_of_the_model_compose_to_the_bit(plain: Pair, layer: int, padding: str, batch: Tensor) -> None:
    model, mask = plain.ours, attention_mask(padding)
    expert_mask = ExpertMask.ablate([(0, 1, 4, 2), (2, None, 7, 5), (1, 0, None, 3)])
    for options in ({}, {"expert_mask": expert_mask}):
        with torch.no_grad():
            whole, cache = model.run_with_cache(batch, attention_mask=mask, return_type="both", loss_per_token=True, **options)
            resid = model(batch, stop_at_layer=layer, attention_mask=mask, **options)
            rest = model(
                resid,
                start_at_layer=layer,
                attention_mask=mask,
                tokens=batch,
                return_type="both",
                loss_per_token=True,
                **options,
            )
        at = layer % 3 if layer != 3 else 3
        before = cache[f"blocks.{at}.hook_resid_pre"] if at < 3 else cache["blocks.2.hook_resid_post"]
        assert torch.equal(resid, before)
        assert torch.equal(rest.logits, whole.logits)
        assert torch.equal(rest.loss.nan_to_num(), whole.loss.nan_to_num())


def test_three_parts_compose_too(plain: Pair, batch: Tensor) -> None:
    model = plain.ours
    with torch.no_grad():
        resid = model(batch, stop_at_layer=1)
        resid = model(resid, start_at_layer=1, stop_at_layer=-1)
        assert torch.equal(model(resid, start_at_layer=-1), model(batch))


# What a forward returns


def test_each_return_type_gives_its_part(plain: Pair, batch: Tensor) -> None:
    model = plain.ours
    with torch.no_grad():
        logits = model(batch)
        assert torch.equal(model(batch, return_type="logits"), logits)
        both = model(batch, return_type="both")
        assert torch.equal(both.logits, logits)
        assert torch.equal(both.loss, model(batch, return_type="loss"))
        assert both.loss.shape == ()
        assert model(batch, return_type=None) is None
        per_token = model(batch, return_type="loss", loss_per_token=True)
        assert per_token.shape == (3, 19)
        torch.testing.assert_close(per_token.mean(), both.loss)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
def test_losses_at_padding_are_nan(plain: Pair, padding: str, dtype: torch.dtype, batch: Tensor) -> None:
    mask = attention_mask(padding)
    assert mask is not None
    with torch.no_grad():
        losses = plain.ours(batch, return_type="loss", loss_per_token=True, attention_mask=mask.to(dtype))
        mean = plain.ours(batch, return_type="loss", attention_mask=mask.to(dtype))
        expected = F.cross_entropy(
            plain.ours(batch, attention_mask=mask)[:, :-1].transpose(1, 2), labels_of(batch, mask)[:, 1:], reduction="none"
        )
    scored = labels_of(batch, mask)[:, 1:] != -100
    assert torch.equal(losses.isnan(), ~scored)
    torch.testing.assert_close(losses[scored], expected[scored])
    torch.testing.assert_close(mean, losses[scored].mean())


def test_padding_does_not_matter_to_real_tokens(plain: Pair, batch: Tensor) -> None:
    for padding in ("left", "right"):
        mask = attention_mask(padding)
        assert mask is not None
        with torch.no_grad():
            padded = plain.ours(batch, attention_mask=mask)
            other = plain.ours(torch.where(mask.bool(), batch, 3), attention_mask=mask)
            alone = plain.ours(batch[1:2, mask[1].bool()])
        torch.testing.assert_close(padded[mask.bool()], other[mask.bool()], atol=LOGITS, rtol=0)
        torch.testing.assert_close(padded[1, mask[1].bool()], alone[0], atol=LOGITS, rtol=0)


def test_a_mask_of_ones_changes_no_bit(plain: Pair, batch: Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(plain.ours(batch, attention_mask=torch.ones_like(batch)), plain.ours(batch))


# What a forward refuses

Refused = Callable[[HookedMoE, Tensor], Any]
REFUSALS: dict[str, tuple[Refused, str]] = {
    "return type": (lambda m, t: m(t, return_type="logit"), r"return_type must be one of .*'both'.*, not 'logit'"),
    "id too large": (lambda m, t: m(t + 90), r"token id 1\d\d is out of range: .* has ids 0 to 96"),
    "id negative": (lambda m, t: m(t - 97), r"token id -\d+ is out of range"),
    "one dimension": (
        lambda m, t: m(t[0]),
        r"expected token ids as an integer tensor \[batch, pos\], or text, not torch.int64 \[20\]",
    ),
    "floats": (lambda m, t: m(t.float()), r"not torch.float32 \[3, 20\]"),
    "bools": (lambda m, t: m(t.bool()), r"not torch.bool \[3, 20\]"),
    "a number": (lambda m, t: m(3), r"or text, not int"),
    "no positions": (lambda m, t: m(t[:, :0]), r"no tokens: the input has shape \[3, 0\]"),
    "no rows": (lambda m, t: m(t[:0]), r"no tokens: the input has shape \[0, 20\]"),
    "layer too large": (lambda m, t: m(t, stop_at_layer=4), r"stop_at_layer=4 is out of range: the model has layers 0 to 2"),
    "layer too small": (lambda m, t: m(t, stop_at_layer=-4), r"stop_at_layer=-4 is out of range"),
    "start too large": (lambda m, t: m(torch.zeros(3, 20, 64), start_at_layer=9), r"start_at_layer=9 is out of range"),
    "tokens for a residual stream": (lambda m, t: m(t, start_at_layer=1), r"residual stream"),
    "a residual stream of another width": (lambda m, t: m(torch.zeros(3, 20, 63), start_at_layer=1), r"64.*63|63.*64"),
    "loss without tokens": (
        lambda m, t: m(torch.zeros(3, 20, 64), start_at_layer=1, return_type="loss"),
        r"a loss from a residual stream needs the tokens too",
    ),
    "mask of another shape": (
        lambda m, t: m(t, attention_mask=torch.zeros(3, 19, dtype=torch.long)),
        r"attention_mask has shape \[3, 19\]; expected \[3, 20\]",
    ),
    "mask of ones of another shape": (
        lambda m, t: m(t, attention_mask=torch.ones(3, 19, dtype=torch.long)),
        r"attention_mask has shape \[3, 19\]; expected \[3, 20\]",
    ),
    "expert mask of a layer that is not there": (
        lambda m, t: m(t, expert_mask=ExpertMask.ablate([(3, 0, 0, 0)])),
        r"expert mask for layer 3: the model has layers 0 to 2",
    ),
    "start after stop": (
        lambda m, t: m(torch.zeros(3, 20, 64), start_at_layer=2, stop_at_layer=1),
        r"start_at_layer.*stop_at_layer",
    ),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_cannot_be_run_is_refused_by_name(refusal: str, plain: Pair, batch: Tensor, unchecked: None) -> None:
    run, message = REFUSALS[refusal]
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        run(plain.ours, batch)


def test_a_loss_of_one_token_is_refused(make_model: Callable[..., HookedMoE]) -> None:
    with pytest.raises(ValueError, match="at least two tokens"):
        make_model()(torch.tensor([[1]]), return_type="loss")


def test_tokens_of_any_integer_type_are_tokens(make_model: Callable[..., HookedMoE]) -> None:
    own, tokens = make_model(), torch.tensor([[1, 2, 3]])
    for dtype in (torch.int32, torch.int16):
        assert torch.equal(own(tokens.to(dtype), return_type="loss"), own(tokens, return_type="loss"))


@pytest.mark.usefixtures("unchecked")
def test_what_goes_with_the_input_has_to_fit_it(make_model: Callable[..., HookedMoE]) -> None:
    own, tokens = make_model(), torch.tensor([[1, 2, 3]])
    resid = own(tokens, stop_at_layer=1)
    with pytest.raises(ValueError, match="the residual stream is of"):
        own(resid, start_at_layer=1, tokens=torch.tensor([[1, 2]]), return_type="loss")
    with pytest.raises(ValueError, match="goes with start_at_layer"):
        own(tokens, tokens=tokens)
    with pytest.raises(ValueError, match="expected token ids as an integer tensor"):
        own([[1, 2, 3]])
    with pytest.raises(TypeError, match="must be an ExpertMask"):
        own(tokens, expert_mask={0: torch.ones(1, 1, 6)})
    with pytest.raises(ValueError, match="no two neighbouring tokens"):
        own(tokens, return_type="loss", attention_mask=torch.tensor([[1, 0, 1]]))
