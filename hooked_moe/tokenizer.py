"""Text to token ids and back, by a checkpoint's own `tokenizer.json`."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Literal

import tokenizers
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_moe.checks import quoted
from hooked_moe.tokenizer_file import named_failures, read_backend


class Tokenizer:
    """A `tokenizers` tokenizer with the special ids of its model.

    Whether a text begins with a BOS token is the checkpoint's own choice: `adds_bos`, or where that is None the template in its
    tokenizer.json.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        bos_id: int | None,
        eos_id: int | None,
        pad_id: int | None,
        adds_bos: bool | None = None,
    ) -> None:
        self.backend = backend
        self.adds_bos = adds_bos
        self.bos_id, self.eos_id = bos_id, eos_id
        self.pad_id = next(id for id in (pad_id, eos_id, 0) if id is not None)

    @classmethod
    def from_file(
        cls,
        path: str | PathLike[str],
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        adds_bos: bool | None = None,
    ) -> Tokenizer:
        """Raises `ValueError` if the file is not a tokenizer, or one that cannot be used."""
        return cls(read_backend(Path(path)), bos_id, eos_id, pad_id, adds_bos)

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str, prepend_bos: bool | None = None) -> list[int]:
        """Token ids; `prepend_bos=None` does as the checkpoint does."""
        prepend_bos = self.adds_bos if prepend_bos is None else prepend_bos
        with named_failures(f"the tokenizer cannot encode {quoted(text)}"):
            ids: list[int] = self.backend.encode(text, add_special_tokens=prepend_bos is None).ids
        if prepend_bos:
            if self.bos_id is None:
                raise ValueError("this model has no BOS token; use prepend_bos=False or None")
            ids = [self.bos_id, *ids]
        return ids

    def decode(self, ids: list[int], special: bool = True) -> str:
        """The text of token ids, with or without special tokens."""
        with named_failures("the tokenizer cannot decode these tokens"):
            return self.backend.decode(ids, skip_special_tokens=not special)

    def pad(
        self, texts: list[str], device: torch.device, prepend_bos: bool | None = None, side: Literal["left", "right"] = "right"
    ) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
        """Token ids of several texts, padded on one side, and which of them are real."""
        rows = [self.encode(text, prepend_bos) for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if not row:
                raise ValueError(f"the text {text!r} has no tokens")
        longest = max(map(len, rows), default=0)
        if not longest:
            raise ValueError("no texts given")
        padding = [[self.pad_id] * (longest - len(row)) for row in rows]
        padded = [pad + row if side == "left" else row + pad for pad, row in zip(padding, rows, strict=True)]
        lengths = torch.tensor([len(row) for row in rows], device=device)
        real = torch.arange(longest, device=device) < lengths[:, None]
        return torch.tensor(padded, device=device), real.flip(1) if side == "left" else real

    def to_string(self, tokens: Int[Tensor, "..."] | list[int] | int) -> str | list[str]:
        ids = torch.as_tensor(tokens)
        if ids.dim() > 1:
            return [self.decode(row.tolist()) for row in ids]
        return self.decode(ids.flatten().tolist())

    def to_single_token(self, text: str) -> int:
        ids = self.encode(text, prepend_bos=False)
        if len(ids) != 1:
            raise ValueError(f"{text!r} is {len(ids)} tokens, not one: {[self.decode([i]) for i in ids]}")
        return ids[0]
