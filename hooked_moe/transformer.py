"""A mixture-of-experts transformer with a hook point at every step.

Architecture: token embedding; pre-norm blocks of causal attention (rotary positions; grouped key/value heads, or latent
attention) and a mixture of experts (softmax or sigmoid router, top-k SwiGLU experts, in some families shared ones) or one dense
MLP; a final RMSNorm and an unembedding. Router, final norm, unembedding and loss are computed in float32 whatever the dtype of
the weights, under `torch.autocast` too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hooked_moe import inputs
from hooked_moe.components.block import Block
from hooked_moe.components.experts import Experts
from hooked_moe.components.key_value_cache import KeyValueCache
from hooked_moe.components.losses import loss_of
from hooked_moe.components.moe import MoE
from hooked_moe.components.norm import HookedRMSNorm
from hooked_moe.components.precision import at_least_float32, without_autocast
from hooked_moe.components.rotary import rotation
from hooked_moe.config import HookedMoEConfig
from hooked_moe.expert_mask import ExpertMask
from hooked_moe.hooks.hook_point import HookPoint
from hooked_moe.hooks.hooked_module import HookedModule
from hooked_moe.kernels.cpu.few_rows import linear
from hooked_moe.tokenizer import Tokenizer
from hooked_moe.warn_user import warn_user

ReturnType = Literal["logits", "loss", "both"]
_RETURN_TYPES = ("logits", "loss", "both", None)


Visible = Bool[Tensor, "batch 1 query key"] | None
"""Which keys every query may see."""


class LogitsAndLoss(NamedTuple):
    logits: Float[Tensor, "batch pos d_vocab"]
    loss: Float[Tensor, ""] | Float[Tensor, "batch pos-1"]


class Embed(nn.Module):
    def __init__(self, cfg: HookedMoEConfig) -> None:
        super().__init__()
        self.W_E = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_model))

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        return F.embedding(tokens, self.W_E)


class Unembed(nn.Module):
    """`W_U` is [d_vocab, d_model], as checkpoints store it."""

    def __init__(self, cfg: HookedMoEConfig) -> None:
        super().__init__()
        self.W_U = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_model))

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        if self.W_U.dtype == x.dtype:
            return linear(x, self.W_U)
        pieces = self.W_U.split(8192)  # widen half-precision weights a piece at a time, never the whole matrix
        return torch.cat([linear(x, w.to(x.dtype)) for w in pieces], dim=-1)


class Transformer(HookedModule):
    """What runs. `HookedMoE`, which users hold, is this with loading, saving, text and whole experiments on top."""

    @torch.inference_mode(False)
    def __init__(self, cfg: HookedMoEConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.generation_config: dict[str, Any] = {}
        """The checkpoint's generation_config.json, which is saved along. Of it, only the end tokens are used here."""
        self.loaded_from: dict[str, Any] | None = None
        """The arguments of `from_pretrained` that load this model again, in any process; None for one made in memory."""
        self._noted_length = False
        with torch.device(cfg.device):
            self.embed = Embed(cfg)
            self.hook_embed = HookPoint()
            self.blocks = cast(Sequence[Block], nn.ModuleList([Block(cfg, layer) for layer in range(cfg.n_layers)]))
            self.ln_final = HookedRMSNorm(cfg.d_model, cfg.eps)
            self.unembed = Unembed(cfg)
        if cfg.tie_word_embeddings:
            self.unembed.W_U = self.embed.W_E
        self.to(cfg.dtype)
        if cfg.store is not None:
            for experts in self._experts():
                experts.to(cfg.store)
            self.cfg = cfg
        self.name_hook_points()
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal matrices of standard deviation `initializer_range`, norms at one, biases at zero, as transformers has them."""
        for name, parameter in self.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            if leaf == "w":
                parameter.fill_(1.0)
            elif leaf.startswith("b_"):
                parameter.zero_()
            elif parameter.device.type != "meta":
                parameter.normal_(0.0, self.cfg.initializer_range)

    def forward(
        self,
        input: Int[Tensor, "batch pos"] | Float[Tensor, "batch pos d_model"] | str | list[str],
        return_type: ReturnType | None = "logits",
        *,
        loss_per_token: bool = False,
        attention_mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None = None,
        expert_mask: ExpertMask | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        tokens: Int[Tensor, "batch pos"] | None = None,
        past_kv_cache: KeyValueCache | None = None,
    ) -> Any:
        """Logits [batch, pos, d_vocab], the next-token loss, both, or None.

        `attention_mask` is 1 at real tokens and 0 at padding, on either side. `start_at_layer=l` takes the residual stream
        before block l instead of tokens (then a loss needs `tokens` too); `stop_at_layer=l` returns the residual stream before
        block l. The loss is the mean over all real next tokens, or [batch, pos-1] with `loss_per_token` (nan at padding).
        With a `past_kv_cache`, the tokens continue those it has seen, and are added to it: `pos` counts the new ones only, in
        hooks too. A pass that fails, or is refused, leaves it as it was.
        Raises `ValueError` for what cannot be run: token ids outside the vocabulary, layers that do not exist, wrong shapes.
        """
        if return_type not in _RETURN_TYPES:
            raise ValueError(f"return_type must be one of {_RETURN_TYPES}, not {return_type!r}")
        start = inputs.layer_bound("start_at_layer", start_at_layer, 0, self.cfg)
        stop = inputs.layer_bound("stop_at_layer", stop_at_layer, self.cfg.n_layers, self.cfg)
        if start > stop:
            raise ValueError(f"start_at_layer={start_at_layer} is after stop_at_layer={stop_at_layer}: there is no block to run")
        if start_at_layer is None:
            if tokens is not None:
                raise ValueError("tokens= goes with start_at_layer, where the input is a residual stream")
            tokens, attention_mask = self.as_tokens(input, attention_mask)
            resid = self.hook_embed(self.embed(tokens))
        else:
            resid = inputs.as_residual(input, self.cfg)
            attention_mask = inputs.as_mask(attention_mask, len(resid), resid.shape[1], self.cfg)
            if tokens is not None:
                if tokens.shape != resid.shape[:2]:
                    raise ValueError(f"tokens has shape {list(tokens.shape)}; the residual stream is of {list(resid.shape[:2])}")
                tokens, _ = self.as_tokens(tokens, attention_mask)
        batch, pos = resid.shape[:2]
        before, cache = 0, None
        if past_kv_cache is not None:
            before, cache = past_kv_cache.length, past_kv_cache.draft()
            inputs.check_continues(past_kv_cache, batch, pos, range(start, stop), self.cfg)
            new = torch.ones(batch, pos, dtype=torch.bool, device=resid.device) if attention_mask is None else attention_mask
            attention_mask = cache.extend_mask(new)
        self._note_length(before + pos)
        positions, visible, visible_near = self.positions_and_keys(batch, pos, before, attention_mask)
        rotate = rotation(positions, self.cfg)
        if expert_mask is not None:
            inputs.check_expert_mask(expert_mask, self.cfg)
        width = (past_kv_cache and past_kv_cache.width) or before + pos

        for layer in range(start, stop):
            shape = batch, width, self.cfg.experts_in(layer)
            mask = expert_mask and expert_mask.for_layer(layer, shape, resid.device, slice(before, before + pos))
            past = None if cache is None else cache.layers[layer]
            seen = visible if self.cfg.window_of(layer) is None else visible_near
            resid = self.blocks[layer](resid, rotate, seen, mask, past)

        if stop_at_layer is None:
            real = None if attention_mask is None else attention_mask[:, before:]
            output = self._read_out(resid, return_type, tokens, real, loss_per_token)
        else:
            output = resid
        if past_kv_cache is not None and cache is not None:
            past_kv_cache.adopt(cache)  # now that nothing can fail any more
        return output

    def _read_out(self, resid: Tensor, return_type: Any, tokens: Tensor | None, real: Tensor | None, per_token: bool) -> Any:
        """What `forward` returns of the last residual stream."""
        logits = self.logits(resid)
        if return_type == "logits" or return_type is None:
            return logits if return_type else None
        if tokens is None:
            raise ValueError("a loss from a residual stream needs the tokens too: pass tokens=[batch, pos]")
        loss = loss_of(logits, tokens, real, per_token)
        return LogitsAndLoss(logits, loss) if return_type == "both" else loss

    def _note_length(self, length: int) -> None:
        """Warn, once for each model, of a context longer than those that it was trained for."""
        if length > self.cfg.n_ctx and not self._noted_length:
            self._noted_length = True
            warn_user(
                f"a context of {length} tokens exceeds the {self.cfg.n_ctx} that {self.cfg.model_name} was trained for "
                "(cfg.n_ctx): its predictions may be poor from there on. Noted once"
            )

    @without_autocast()
    def logits(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Final norm and unembedding of a residual stream, in float32 or wider."""
        return self.unembed(self.ln_final(at_least_float32(resid)))

    def positions_and_keys(
        self, batch: int, pos: int, before: int, attention_mask: Tensor | None
    ) -> tuple[Int[Tensor, "#batch pos"], Visible, Visible]:
        """The position of every token, counted from the first real one, and the keys that every query may see: in layers without
        a window, and in those with one.

        `attention_mask` is of all tokens: `before` earlier ones and `pos` new ones. None for the keys means all up to its own, in
        the window if there is one.
        """
        everything = attention_mask is None or bool(attention_mask.all())
        if everything and not before:
            return torch.arange(pos, device=self.cfg.device)[None], None, None
        length = before + pos
        keys = torch.arange(length, device=self.cfg.device)
        queries = keys[before:, None]
        if everything or attention_mask is None:
            positions, visible = keys[None], (keys <= queries).expand(batch, 1, pos, length)
        else:
            own = keys == queries  # padding sees itself, so that no row is empty
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            visible = ((keys <= queries) & attention_mask[:, None, None, :]) | own
        new, near = positions[:, before:], visible
        if self.cfg.sliding_window is not None:  # counted in real tokens, as positions are
            near = visible & (new[:, None, :, None] - positions[:, None, None, :] < self.cfg.sliding_window)
        return new, visible, near

    def as_tokens(
        self, input: Any, attention_mask: Any = None
    ) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"] | None]:
        """Token ids and attention mask of what `forward` accepts; `ValueError` says what is wrong with anything else."""
        return inputs.as_tokens(input, attention_mask, self.cfg, self.tokenizer)

    @property
    def streams(self) -> bool:
        """Whether only one block's weights are in memory at a time, as `from_pretrained(stream=True)` has it."""
        return hasattr(self.blocks, "spill")

    def require_weights(self, purpose: str) -> None:
        """Raise `ValueError` if weights are streamed: then only one block's are in memory."""
        if self.streams:
            raise ValueError(f"{purpose} needs all weights in memory, and this model streams them: load it without stream=True")

    def _apply(self, fn: Any, recurse: bool = True) -> Transformer:
        self.require_weights("changing dtype or device")
        super()._apply(fn, recurse)
        weight, store = self.embed.W_E, self.cfg.store
        for experts in self._experts():
            store = None if experts.W_in.dtype == weight.dtype else experts.W_in.dtype
        if (weight.device, weight.dtype, store) != (self.cfg.device, self.cfg.dtype, self.cfg.store):
            self.cfg = self.cfg.replace(device=weight.device, dtype=weight.dtype, store=store)
        return self

    def _experts(self) -> Iterator[Experts]:
        """The routed experts of every layer that has any."""
        return (block.mlp.experts for block in self.blocks if isinstance(block.mlp, MoE))

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer; `ValueError` if there is none."""
        return inputs.require_tokenizer(self.tokenizer)
