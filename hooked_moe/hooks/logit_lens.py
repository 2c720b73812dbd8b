"""Vectors of the residual stream, read through the final norm's output and the unembedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

ReturnType = Literal["logits", "log_probs", "probs"]


@dataclass(frozen=True)
class LogitLens:
    """What is predicted from the residual stream, layer by layer; leading axes are [layer, *batch_and_pos].

    The names are those of TransformerLens's `logit_lens`. Entropy, in nats, and ranks, from 0, are over the whole vocabulary.
    """

    labels: list[str]
    """The stream of every layer: "0_pre", "0_mid", "final_post"."""
    return_type: ReturnType
    values: Float[Tensor, "layer *batch_and_pos selected"]
    """Logits, log-probabilities or probabilities of the selected tokens: targets, `vocab`, the `top_k`, or all."""
    entropy: Float[Tensor, "layer *batch_and_pos"]
    token_ids: Int[Tensor, "layer *batch_and_pos selected"]
    """Which token each value is of."""
    top_ids: Int[Tensor, "layer *batch_and_pos k"] | None = None
    target_ids: Int[Tensor, "*targets"] | None = None
    target_ranks: Int[Tensor, "layer *batch_and_pos targets"] | None = None
    axes: tuple[str, ...] = ("batch", "pos")
    """Which of "batch" and "pos" there are."""

    def rank_trajectory(self, target: int = 0) -> Int[Tensor, "layer *batch_and_pos"]:
        """The rank of the n-th target at every layer; 0 is the most probable token."""
        if self.target_ranks is None:
            raise ValueError("ranks are those of targets: call logit_lens(targets=...)")
        return self.target_ranks[..., target]

    def top_tokens(self, tokenizer: Any) -> dict[str, Any]:
        """The most probable tokens as text, {label: lists as the axes of batch and pos are}."""
        if self.top_ids is None:
            raise ValueError("top tokens are those of a top_k: call logit_lens(top_k=5)")
        return {label: _decoded(ids, tokenizer) for label, ids in zip(self.labels, self.top_ids, strict=True)}

    def table(self) -> Any:
        """A pyarrow table in long form: a row for every stream, row, position and selected token."""
        return self._rows().table()

    def to_dataframe(self) -> Any:
        """`table()` as a pandas DataFrame. Raises `ImportError` where pandas is not installed."""
        return self._rows().to_dataframe()

    def plot(self, **options: Any) -> Any:
        """A heat map of streams by positions, or by rows where there is one position; see `hooked_moe.tables.GridResult.plot`."""
        across = next(axis for axis in ("pos", "batch", "choice") if axis in (*self.axes, "choice"))
        return self._rows().plot(**({"across": across} | options))

    def _repr_html_(self) -> str:
        return str(self._rows()._repr_html_())

    def _rows(self) -> Any:
        from hooked_moe.hooks.lens_rows import lens_rows  # pyarrow is not for everyone who runs a model

        return lens_rows(self)

    def __repr__(self) -> str:
        return f"LogitLens({self.return_type} {list(self.values.shape)} of {', '.join(self.labels)})"


def _decoded(ids: Tensor, tokenizer: Any) -> Any:
    return [_decoded(row, tokenizer) for row in ids] if ids.dim() else tokenizer.decode([int(ids)])


def read_logits(
    model: Any,
    stack: Float[Tensor, "layer *batch_and_pos d_model"],
    labels: list[str],
    *,
    targets: Any = None,
    vocab: Sequence[int] | Tensor | None = None,
    top_k: int | None = None,
    return_type: ReturnType = "logits",
    chunk_size: int = 64,
    axes: tuple[str, ...] = ("batch", "pos"),
) -> LogitLens:
    """Unembed normalised vectors, `chunk_size` at a time, and keep what is selected. See `ActivationCache.logit_lens`."""
    if return_type not in get_args(ReturnType):
        raise ValueError(f"return_type must be one of {', '.join(map(repr, get_args(ReturnType)))}, not {return_type!r}")
    if sum(selector is not None for selector in (targets, vocab, top_k)) > 1:
        raise ValueError("targets, vocab and top_k select in different ways: pass one of them")
    if chunk_size < 1 or (top_k is not None and not 1 <= top_k <= model.cfg.d_vocab):
        raise ValueError(f"chunk_size must be at least 1 and top_k from 1 to {model.cfg.d_vocab}, not {chunk_size} and {top_k}")
    lead, device = stack.shape[:-1], stack.device
    by_row = isinstance(targets, Tensor) and targets.dim() > 0
    target_ids = None if targets is None else targets.long() if by_row else _ids(model, targets)
    shown = None if vocab is None else _ids(model, vocab).to(device)
    wanted = None
    if target_ids is not None:
        _check_ids(model, target_ids)
        try:
            wanted = (
                (target_ids[..., None].expand(*lead, 1) if by_row else target_ids.expand(*lead, -1)).flatten(0, -2).to(device)
            )
        except RuntimeError as error:
            raise ValueError(
                f"targets {list(target_ids.shape)} do not fit the vectors {list(lead)}, aligned at their ends"
            ) from error
    values, entropies, tops, ranks = [], [], [], []
    for start in range(0, stack[..., 0].numel(), chunk_size):
        chunk = slice(start, start + chunk_size)
        logits = model.unembed(stack.flatten(0, -2)[None, chunk])[0]
        log_probs = logits.log_softmax(-1)
        entropies.append(-(log_probs.exp() * log_probs).sum(-1))
        quantity = logits if return_type == "logits" else log_probs if return_type == "log_probs" else log_probs.exp()
        if wanted is not None:
            own = wanted[chunk]
            ranks.append(torch.stack([(logits > logits.gather(-1, one)).sum(-1) for one in own.split(1, -1)], -1))
            values.append(quantity.gather(-1, own))
        elif top_k is not None:
            tops.append(logits.topk(top_k, dim=-1).indices)
            values.append(quantity.gather(-1, tops[-1]))
        else:
            values.append(quantity if shown is None else quantity[:, shown])
    if wanted is not None:
        token_ids = wanted.unflatten(0, lead)
    elif tops:
        token_ids = torch.cat(tops).unflatten(0, lead)
    else:
        token_ids = (torch.arange(model.cfg.d_vocab, device=device) if shown is None else shown).expand(*lead, -1)
    return LogitLens(
        labels=labels,
        return_type=return_type,
        values=torch.cat(values).unflatten(0, lead),
        entropy=torch.cat(entropies).unflatten(0, lead),
        top_ids=token_ids if tops else None,
        target_ids=target_ids,
        target_ranks=torch.cat(ranks).unflatten(0, lead) if ranks else None,
        token_ids=token_ids,
        axes=axes,
    )


def _ids(model: Any, tokens: Any) -> Tensor:
    """Token ids of texts that are one token each, or of ids."""
    several = [tokens] if isinstance(tokens, str | int) or getattr(tokens, "ndim", 1) == 0 else tokens
    numbers = [model.to_single_token(token) if isinstance(token, str) else int(token) for token in several]
    ids = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    _check_ids(model, ids)
    return ids


def _check_ids(model: Any, ids: Tensor) -> None:
    if not ids.numel() or int(ids.min()) < 0 or int(ids.max()) >= model.cfg.d_vocab:
        raise ValueError(f"tokens must be ids from 0 to {model.cfg.d_vocab - 1}, not {ids.tolist()}")
