"""What a cache's activations add to the residual stream, as stacks of components: TransformerLens's methods, with experts.

A component is a term of the sum that the residual stream is: the embedding, an attention layer or a head of it, an MLP, or one
of the experts that it is made of. A stack is [component, batch, pos, d_model]; there is no batch axis where the cache has none,
and no axis of positions where `pos_slice` is a number. `pos_slice` is as in TransformerLens: -1, a range (start, stop), a list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_moe.checks import as_int_or_none
from hooked_moe.hooks.caching import index_of, take
from hooked_moe.hooks.logit_lens import LogitLens, read_logits
from hooked_moe.hooks.terms import Components, experts, heads, mlp, term

Stack = Float[Tensor, "component *batch_and_pos d_model"]
Part = Float[Tensor, "component *part_of_them d_model"]
Tokens = str | int | Sequence[Any] | Tensor


class ResidualStack(Mapping[Any, Tensor]):
    """The part of `ActivationCache` that decomposes the residual stream.

    With `return_labels`, methods return (stack, labels). `layer` is the layer whose input is meant: None or -1, as the number of
    layers, is the input of the unembedding. Errors: `UnknownNameError` for activations that were not cached, `ValueError` for a
    layer that does not exist and for a cache without its model.
    """

    model: Any
    has_batch_dim: bool

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Any = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Any:
        """The residual stream before each layer up to `layer`: what a logit lens reads.

        `incl_mid` adds the streams between attention and MLP, `mlp_input` that of `layer` itself. `apply_ln` normalises: each
        stream by its own root mean square before the unembedding, and by the cached one of `layer` before.
        """
        end = self._layer(layer, mlp_input)
        names: list[tuple[str, int, str]] = []
        for number in range(end + 1):
            if number == self._n_layers:
                names.append(("resid_post", number - 1, "final_post"))
                continue
            names.append(("resid_pre", number, f"{number}_pre"))
            if (incl_mid and number < end) or (mlp_input and number == end):
                names.append(("resid_mid", number, f"{number}_mid"))
        stack = torch.stack([take(self[name, number], pos_slice, -2) for name, number, _ in names])
        if apply_ln:
            recompute = end == self._n_layers
            stack = self.apply_ln_to_stack(stack, end, mlp_input, pos_slice, has_batch_dim=False, recompute_ln=recompute)
        return (stack, [label for *_, label in names]) if return_labels else stack

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: Any = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
        expand_experts: bool = False,
    ) -> Any:
        """The embedding and the outputs of attention and MLP before `layer`: with mode "all" their sum is its input.

        `mlp_input` adds the attention of `layer` itself. `expand_experts` has the experts of each layer in place of its MLP: one
        component for each routed one ("L3E5", zero at tokens that are not routed to it) and one for the shared ("L3shared").
        """
        if mode not in ("all", "mlp", "attn"):
            raise ValueError(f"mode must be 'all', 'mlp' or 'attn', not {mode!r}")
        end = self._layer(layer, mlp_input)
        parts = [term("embed", self["hook_embed"], pos_slice)] if incl_embeds else []
        for number in range(end + mlp_input):
            if mode != "mlp":
                parts.append(term(f"{number}_attn_out", self["attn_out", number], pos_slice))
            if mode != "attn" and number < end:
                parts.append((experts if expand_experts else mlp)(self, number, pos_slice))
        return self._stacked(parts, end, mlp_input, apply_ln, pos_slice, return_labels)

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Any = None,
        apply_ln: bool = False,
    ) -> Any:
        """What each head ("L3H5") before `layer` adds; `incl_remainder` appends the rest of the residual stream ("remainder").

        Taken from hook_result where that is cached, and otherwise made of hook_z.
        """
        return self._results(heads, layer, return_labels, incl_remainder, pos_slice, apply_ln)

    def stack_expert_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Any = None,
        apply_ln: bool = False,
    ) -> Any:
        """What each expert ("L3E5") before `layer` adds, weighted as it was; zero at tokens that are not routed to it.

        Where they are, shared experts ("L3shared") and dense MLPs ("L0mlp") are components too: those of a layer sum to its MLP
        output. Takes n_layers x experts x batch x pos x d_model numbers: choose positions with `pos_slice` in large models.

            stack, labels = cache.stack_expert_results(pos_slice=-1, return_labels=True)
            dict(zip(labels, cache.logit_attrs(stack, " Paris", pos_slice=-1)[:, 0].tolist()))
        """
        return self._results(experts, layer, return_labels, incl_remainder, pos_slice, apply_ln)

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_experts: bool = True,
        apply_ln: bool = False,
        pos_slice: Any = None,
        return_labels: bool = False,
    ) -> Any:
        """Heads, experts (or whole MLPs), the embedding and the biases ("bias") before `layer`: their sum is its input."""
        end = self._layer(layer, mlp_input)
        parts = [heads(self, number, pos_slice) for number in range(end + mlp_input)]
        parts += [(experts if expand_experts else mlp)(self, number, pos_slice) for number in range(end)]
        embed = term("embed", self["hook_embed"], pos_slice)
        bias = self.model.accumulated_bias(end, mlp_input).to(embed[0]).expand(embed[0].shape)
        return self._stacked([*parts, embed, (bias, ["bias"])], end, mlp_input, apply_ln, pos_slice, return_labels)

    def stack_activation(
        self, activation_name: str, layer: int | None = -1, sublayer_type: str | None = None
    ) -> Float[Tensor, "layer ..."]:
        """The activation of this short name in every layer before `layer`, which must all have it in the same shape."""
        return torch.stack([self[activation_name, number, sublayer_type] for number in range(self._layer(layer))])

    def apply_ln_to_stack(
        self,
        residual_stack: Stack,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Part:
        """The components as `layer`'s attention (or with `mlp_input` its MLP, or the unembedding) reads them.

        Each is divided by the root mean square of the whole residual stream, as cached, and multiplied by the norm's weight: the
        sum of all components is then what the norm gives out. TransformerLens leaves the weight to the matrix that follows, where
        it folds it in; nothing is folded here. `pos_slice` and `batch_slice` say which part of the cache the stack is of;
        `batch_slice` is still to be applied to the stack. `recompute_ln` takes each component's own root mean square, before the
        unembedding only: that of a logit lens.
        """
        layer = self._layer(layer, mlp_input)
        if has_batch_dim:
            residual_stack = take(residual_stack, batch_slice, 1)
        last = layer == self._n_layers
        norm = self.model.ln_final if last else getattr(self.model.blocks[layer], "ln2" if mlp_input else "ln1")
        if recompute_ln and last:
            return norm.normalize(residual_stack.to(torch.promote_types(residual_stack.dtype, torch.float32))) * norm.w
        scale = take(self["ln_final.hook_scale"] if last else self["scale", layer, "ln2" if mlp_input else "ln1"], pos_slice, -2)
        if self.has_batch_dim:
            scale = take(scale, batch_slice, 0)
        return residual_stack / scale * norm.w

    def logit_attrs(
        self,
        residual_stack: Stack,
        tokens: Tokens,
        incorrect_tokens: Tokens | None = None,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
    ) -> Float[Tensor, "component *part_of_them"]:
        """What each component adds to the logit of `tokens`, or to its difference from that of `incorrect_tokens`.

        Tokens are one for all (a text that is one token, or an id), [batch], [pos] or [batch, pos], as far as the stack has these
        axes. The final norm is held as it was; so the attributions of a whole decomposition sum to the logit.
        """
        directions = self.model.tokens_to_residual_directions(tokens)
        if incorrect_tokens is not None:
            incorrect = self.model.tokens_to_residual_directions(incorrect_tokens)
            if incorrect.shape != directions.shape:
                raise ValueError(
                    f"tokens and incorrect_tokens must have the same shape, not {list(directions.shape[:-1])} and "
                    f"{list(incorrect.shape[:-1])}"
                )
            directions = directions - incorrect
        stack = self.apply_ln_to_stack(residual_stack, -1, False, pos_slice, batch_slice, has_batch_dim)
        one_of_the_batch = as_int_or_none(index_of(batch_slice)) is not None
        whole = has_batch_dim and not one_of_the_batch and stack.dim() == 4
        if whole and directions.dim() == 2 and len(directions) == stack.shape[1]:
            directions = directions[:, None]  # a token for each row, not for each position
        return (stack * directions).sum(-1)

    def logit_lens(
        self, layers: Sequence[int] | None = None, incl_mid: bool = False, positions: Any = -1, **options: Any
    ) -> LogitLens:
        """What the model would predict from the residual stream before each layer (nostalgebraist 2020).

        `layers` are indices into `accumulated_resid`, -1 the last: its logits are the model's. `positions` is a `pos_slice`.
        Options: `batch_slice`; one of `targets` (tokens for all, or a tensor of one for each row), `vocab` (ids) and `top_k`;
        `return_type` "logits", "log_probs" or "probs"; `apply_ln=True`; `chunk_size=64` vectors at a time; `lens`, a function of
        (stream, index) that comes before the norm, as a tuned lens does.

            cache.logit_lens(targets=" Paris").rank_trajectory()  # [layer, batch]
        """
        stack, labels = self.accumulated_resid(None, incl_mid, pos_slice=positions, return_labels=True)
        every = range(len(labels))
        try:
            kept = [every[layer] for layer in (every if layers is None else layers)]
        except IndexError:
            raise ValueError(f"layers={layers} are out of range: there are {len(labels)} streams, {', '.join(labels)}") from None
        labels, stack = [labels[layer] for layer in kept], stack[kept]
        axes = ["batch"] * self.has_batch_dim + ["pos"] * (stack.dim() - 2 - self.has_batch_dim)
        rows = options.pop("batch_slice", None)
        if rows is not None and not self.has_batch_dim:
            raise ValueError("batch_slice takes rows of a batch, and this cache has no axis of one")
        if self.has_batch_dim:
            stack = take(stack, rows, 1)
            axes = axes[len(axes) + 2 - stack.dim() :]  # without the batch, where one row of it was taken
        if (lens := options.pop("lens", None)) is not None:
            stack = torch.stack([lens(stream, layer) for stream, layer in zip(stack, kept, strict=True)])
        if options.pop("apply_ln", True):
            stack = self.apply_ln_to_stack(stack, recompute_ln=True, has_batch_dim=False)
        return read_logits(self.model, stack, labels, axes=tuple(axes), **options)

    @property
    def _n_layers(self) -> int:
        if self.model is None:
            raise ValueError(
                "this cache does not know its model: make it with run_with_cache, or ActivationCache(activations, model)"
            )
        return int(self.model.cfg.n_layers)

    def _layer(self, layer: int | None, mlp_input: bool = False) -> int:
        last = self._n_layers
        number = last if layer is None else as_int_or_none(layer)
        number = last if number == -1 else number
        if number is None or not 0 <= number <= last - mlp_input:
            of = "the MLP of a layer" if mlp_input else f"a layer, or {last} for the unembedding"
            raise ValueError(f"layer must be {of}, from 0 to {last - mlp_input}, not {layer!r}")
        return number

    def _results(
        self,
        of_layer: Callable[[Any, int, Any], Components],
        layer: int | None,
        return_labels: bool,
        incl_remainder: bool,
        pos_slice: Any,
        apply_ln: bool,
    ) -> Tensor | tuple[Tensor, list[str]]:
        """The components of one kind of every layer before `layer`."""
        end = self._layer(layer)
        parts = [of_layer(self, number, pos_slice) for number in range(end)]
        parts = self._with_remainder(parts, end, incl_remainder, pos_slice)
        return self._stacked(parts, end, False, apply_ln, pos_slice, return_labels)

    def _with_remainder(self, parts: list[Components], layer: int, wanted: bool, pos_slice: Any) -> list[Components]:
        if not wanted:
            return parts
        rest = take(self["resid_post", layer - 1] if layer else self["resid_pre", 0], pos_slice, -2)
        return [*parts, ((rest - sum(stack.sum(0) for stack, _ in parts))[None], ["remainder"])]

    def _stacked(
        self, parts: list[Components], layer: int, mlp_input: bool, apply_ln: bool, pos_slice: Any, return_labels: bool
    ) -> Tensor | tuple[Tensor, list[str]]:
        if parts:
            stack = torch.cat([stack for stack, _ in parts])
        else:
            like = take(self["hook_embed"], pos_slice, -2)
            stack = like.new_zeros(0, *like.shape)
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, mlp_input, pos_slice, has_batch_dim=False)
        return (stack, [label for _, labels in parts for label in labels]) if return_labels else stack
