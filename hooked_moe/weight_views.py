"""A model's weights by TransformerLens's names and in its orientation, [in, out], with an axis of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_moe.checks import as_int_or_none, unknown_name

if TYPE_CHECKING:
    from hooked_moe.transformer import Embed, Unembed

NAMES = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out", "W_router")


class WeightViews:
    """The part of `HookedMoE` that shows weights. `W_E`, `W_U` and `weight(name, layer)` are views; the others are copies.

    `W_Q` and the like stack all layers, [layer, ...], which copies them, as it does in TransformerLens: gradients reach the
    parameters, but writing to a stack changes nothing. Experts are large: take one layer's by `weight("W_in", 3)`.
    """

    cfg: Any
    embed: Embed
    unembed: Unembed
    blocks: Any

    def weight(self, name: str, layer: int) -> Tensor:
        """A view of one layer's weight: W_Q [head, d_model, d_head], W_K and W_V [kv_head, d_model, d_head], W_O [head, d_head,
        d_model], W_in (up) and W_gate [expert, d_model, d_expert], W_out [expert, d_expert, d_model], W_router [d_model, expert].

        A dense layer's MLP has no axis of experts. Raises `UnknownNameError` for other names and `ValueError` for a layer that
        does not exist or has no such weight: a dense one no router, latent attention no matrix that makes keys of the stream.
        """
        if name not in NAMES:
            raise unknown_name("weight", name, NAMES)
        number, n_layers = as_int_or_none(layer), self.cfg.n_layers
        if number is None or not -n_layers <= number < n_layers:
            raise ValueError(f"layer must be a whole number from 0 to {n_layers - 1}, not {layer!r}")
        number %= n_layers
        block, dense = self.blocks[number], not self.cfg.experts_in(number)
        if name in ("W_Q", "W_K", "W_V", "W_O"):
            return self._attention_weight(name, block.attn)
        if name == "W_router":
            if dense:
                raise ValueError(f"layer {number} is dense: it has no router; layers {self.cfg.moe_layers} have")
            return block.mlp.router.W.T
        if dense:
            return getattr(block.mlp, name).T
        if name == "W_out":
            return block.mlp.experts.W_out.mT
        return block.mlp.experts.W_in[:, ("W_gate", "W_in").index(name)].mT

    def _attention_weight(self, name: str, attn: Any) -> Tensor:
        if name == "W_O":
            return attn.W_O.permute(1, 2, 0)
        latent = "W_Q" if name == "W_Q" and self.cfg.q_lora_rank else "W_UKV" if name != "W_Q" and self.cfg.kv_lora_rank else None
        if latent is not None:
            raise ValueError(
                f"latent attention has no {name} from the residual stream: a norm stands between its two factors; see "
                f"model.blocks[layer].attn.{'W_DQ' if name == 'W_Q' else 'W_DKV'} and .{latent}"
            )
        return getattr(attn, name).mT

    def _stacked(self, name: str) -> Tensor:
        self.require_weights(f"the stack {name} of all layers")
        layers = [self.weight(name, layer) for layer in range(self.cfg.n_layers)]
        if len({weight.shape for weight in layers}) > 1:
            raise ValueError(
                f"the layers' {name} have different shapes, {[list(weight.shape) for weight in layers]}, and cannot be stacked: "
                f"take one by model.weight({name!r}, layer)"
            )
        return torch.stack(layers)

    def require_weights(self, purpose: str) -> None:
        """Raise `ValueError` if weights are streamed."""
        raise NotImplementedError

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The embedding."""
        return self.embed.W_E

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding. The final norm's weight is not folded into it."""
        return self.unembed.W_U.T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """Zeros: no family here has a bias of the unembedding."""
        return self.unembed.W_U.new_zeros(self.cfg.d_vocab)

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Query projections."""
        return self._stacked("W_Q")

    @property
    def W_K(self) -> Float[Tensor, "layer kv_head d_model d_head"]:
        """Key projections; `kv_head` is smaller than `head` in grouped-query attention, and nothing is repeated."""
        return self._stacked("W_K")

    @property
    def W_V(self) -> Float[Tensor, "layer kv_head d_model d_value"]:
        """Value projections."""
        return self._stacked("W_V")

    @property
    def W_O(self) -> Float[Tensor, "layer head d_value d_model"]:
        """Output projections."""
        return self._stacked("W_O")

    @property
    def W_in(self) -> Float[Tensor, "layer expert d_model d_expert"]:
        """Up projections of the routed experts."""
        return self._stacked("W_in")

    @property
    def W_gate(self) -> Float[Tensor, "layer expert d_model d_expert"]:
        """Gate projections of the routed experts: not the router, which is `W_router`."""
        return self._stacked("W_gate")

    @property
    def W_out(self) -> Float[Tensor, "layer expert d_expert d_model"]:
        """Down projections of the routed experts."""
        return self._stacked("W_out")

    @property
    def W_router(self) -> Float[Tensor, "layer d_model expert"]:
        """The routers."""
        return self._stacked("W_router")

    def tokens_to_residual_directions(self, tokens: str | int | Sequence[Any] | Tensor) -> Float[Tensor, "*tokens d_model"]:
        """The vectors whose products with the final norm's output are the tokens' logits: columns of `W_U`.

        Tokens are texts that are one token each, or ids, of any shape; one alone gives [d_model].
        """
        if isinstance(tokens, Tensor):
            ids = tokens.reshape(()) if tokens.numel() == 1 else tokens
        elif isinstance(tokens, str) or as_int_or_none(tokens) is not None:
            ids = torch.tensor(self._token_id(tokens), dtype=torch.int64, device="cpu")
        else:
            several: Any = tokens
            ids = torch.tensor([self._token_id(token) for token in several], dtype=torch.int64, device="cpu")
        if ids.is_floating_point() or not ids.numel() or int(ids.min()) < 0 or int(ids.max()) >= self.cfg.d_vocab:
            raise ValueError(f"tokens must be ids from 0 to {self.cfg.d_vocab - 1}, or texts of one token, not {tokens!r}")
        return self.unembed.W_U[ids.to(self.unembed.W_U.device)]

    def _token_id(self, token: Any) -> int:
        return self.to_single_token(token) if isinstance(token, str) else int(token)

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token."""
        raise NotImplementedError

    def accumulated_bias(self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True) -> Float[Tensor, " d_model"]:
        """The sum of the output biases of attention before `layer`, and with `mlp_input` of its own.

        Dense MLPs have none here, and those of experts, which routing weighs, belong to what the experts write.
        """
        biases = [self.blocks[before].attn.b_O for before in range(layer + mlp_input)]
        return sum((bias for bias in biases if bias is not None), start=self.embed.W_E.new_zeros(self.cfg.d_model))
