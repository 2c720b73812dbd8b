"""Text to token ids and back, by a checkpoint's own `tokenizer.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import tokenizers
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_moe.chat import ChatTemplate
from hooked_moe.checks import WrongTypeError, as_int_or_none, check_text, described, in_list, quoted, whole_number, whole_numbers
from hooked_moe.tokenizer_file import named_failures, read_backend
from hooked_moe.warn_user import warn_user

AFTER = "a"
"""What a text is put after where only a tokenizer can say what it is in the middle of another."""


def as_texts(texts: Any) -> list[str]:
    """One text, or several in any iterable, as a list. Raises `WrongTypeError` for what is no text: token ids, say."""
    if isinstance(texts, str):
        return [texts]
    items = in_list(texts, "texts", "['one text', 'another']")
    for item in items:
        if not isinstance(item, str):
            raise WrongTypeError(f"expected a text, or a list of texts, not one that holds {described(item)}")
    return items


@dataclass(frozen=True)
class TokenizerFiles:
    """What lay beside a tokenizer.json and is not read here, for whoever saves the model: text by the name of the file."""

    config: Mapping[str, Any] = field(default_factory=dict)
    """tokenizer_config.json: a chat template, special tokens, what other loaders read."""
    others: Mapping[str, str] = field(default_factory=dict)
    """Files as they are: special_tokens_map.json, chat templates."""
    directory: Path | None = None
    """Where they were."""


class Tokenizer:
    """A `tokenizers` tokenizer with the special ids of its model.

    Whether a text begins with a BOS token is the checkpoint's own choice: `adds_bos`, or where that is None the template in its
    tokenizer.json. Truncation, padding and sampled segmentations are a trainer's settings, which a tokenizer.json may hold: they
    are switched off, so that a text is always all of its tokens, and always the same.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        bos_id: int | None,
        eos_id: int | None,
        pad_id: int | None,
        adds_bos: bool | None = None,
        files: TokenizerFiles | None = None,
    ) -> None:
        if not isinstance(backend, tokenizers.Tokenizer):
            raise WrongTypeError(
                f"a tokenizer is made of a tokenizers.Tokenizer, which transformers' fast ones have as backend_tokenizer, not "
                f"{type(backend).__name__}"
            )
        self.backend = backend
        self.adds_bos = adds_bos
        self.bos_id, self.eos_id = _id(bos_id, "bos_id"), _id(eos_id, "eos_id")
        self.pad_id: int = next(id for id in (_id(pad_id, "pad_id"), self.eos_id, 0) if id is not None)
        self.files = files or TokenizerFiles()
        self.chat_template: ChatTemplate | None = None
        _without_sampling(backend)

    @classmethod
    def from_file(
        cls,
        path: str | PathLike[str],
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        adds_bos: bool | None = None,
        files: TokenizerFiles | None = None,
    ) -> Tokenizer:
        """Raises `ValueError` if the file is not a tokenizer, or one that cannot be used."""
        return cls(read_backend(Path(path)), bos_id, eos_id, pad_id, adds_bos, files)

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str, prepend_bos: bool | None = None) -> list[int]:
        """Token ids; `prepend_bos=None` does as the checkpoint does.

        Raises `ValueError` for a text that is no Unicode, and for a BOS token that the model does not have.
        """
        prepend_bos = self.adds_bos if prepend_bos is None else prepend_bos
        if self.backend.truncation is not None or self.backend.padding is not None:  # from the file, or set by who shares it
            self.backend.no_truncation()
            self.backend.no_padding()
        text = check_text(text)
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
                raise ValueError(f"the text {quoted(text)} has no tokens")
        longest = max(map(len, rows), default=0)
        if not longest:
            raise ValueError("no texts given")
        padding = [[self.pad_id] * (longest - len(row)) for row in rows]
        padded = [pad + row if side == "left" else row + pad for pad, row in zip(padding, rows, strict=True)]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.long, device=device)
        real = torch.arange(longest, device=device) < lengths[:, None]
        return torch.tensor(padded, dtype=torch.long, device=device), real.flip(1) if side == "left" else real

    def to_string(self, tokens: Any) -> str | list[str]:
        """The text of tokens [pos], or a list of texts for [batch, pos]."""
        return [self.decode(as_ids(row)) for row in tokens] if is_batch(tokens) else self.decode(as_ids(tokens))

    def to_str_tokens(self, ids: list[int]) -> list[str]:
        """Each token as a string. Together they are the text of all, as far as tokens are whole characters.

        A SentencePiece-like decoder takes the space off the first token that it is given: so each is decoded after the last one.
        """
        pieces = []
        for before, token in zip([None, *ids], ids, strict=False):
            alone = "" if before is None else self.decode([before])
            together = self.decode([token] if before is None else [before, token])
            pieces.append(together[len(alone) :] if together.startswith(alone) else self.decode([token]))
        return pieces

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token: on its own, or else after other text, as a word with its space is in vocabularies
        where a space also begins every text (SentencePiece's). Raises `ValueError`, which shows its tokens, if it is several."""
        ids = self.encode(text, prepend_bos=False)
        if len(ids) != 1:
            before, after = self.encode(AFTER, prepend_bos=False), self.encode(AFTER + text, prepend_bos=False)
            if after[:-1] != before:
                raise ValueError(f"{quoted(text)} is {len(ids)} tokens, not one: {quoted([self.decode([i]) for i in ids])}")
            ids = after[-1:]
        if not self._stands_for(ids[0], text):
            raise ValueError(
                f"{quoted(text)} is no token of this vocabulary, which reads it as {quoted(self.backend.id_to_token(ids[0]))}"
            )
        return ids[0]

    def _stands_for(self, token: int, text: str) -> bool:
        """Whether a token is the text, and not what the vocabulary puts in the place of what it does not know."""
        unknown = getattr(self.backend.model, "unk_token", None)
        name = self.backend.id_to_token(token)
        return text == name or name != ("<unk>" if unknown is None else unknown)


def is_batch(tokens: Any) -> bool:
    """Whether these are rows of token ids or of texts, rather than one of them."""
    if isinstance(tokens, list | tuple):
        return bool(tokens) and isinstance(tokens[0], list | tuple | str)
    return getattr(tokens, "ndim", 0) > 1


def as_ids(tokens: Any) -> list[int]:
    """The token ids of one row, or one token id, as a list. Raises `WrongTypeError` for anything else."""
    number = as_int_or_none(tokens)
    return whole_numbers(tokens, "token ids") if number is None else [number]


def _id(value: Any, what: str) -> int | None:
    return None if value is None else whole_number(value, what)


def _without_sampling(backend: tokenizers.Tokenizer) -> None:
    """Switch off segmentations that are drawn at random (BPE-dropout, subword regularisation), which are for training."""
    for name in ("dropout", "alpha", "nbest_size"):
        if getattr(backend.model, name, None):
            warn_user(f"this tokenizer segments at random ({name}), which is for training: it is switched off")
            setattr(backend.model, name, None)
