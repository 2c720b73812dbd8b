"""The model that users hold: a transformer, and what is done with it as a whole.

What runs is in `hooked_moe/transformer.py`. Nothing in the package imports this module but the commands in `hooked_moe/cli/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_moe import generation, loading
from hooked_moe.chat import are_several, rendered
from hooked_moe.counterfactuals import hooked_variants
from hooked_moe.description import description
from hooked_moe.surgery import pruning
from hooked_moe.tokenizer import as_ids, as_texts, is_batch
from hooked_moe.transformer import ReturnType, Transformer
from hooked_moe.weight_views import WeightViews

Model = TypeVar("Model", bound="HookedMoE")


class HookedMoE(Transformer, WeightViews):
    """The model. `HookedMoE(cfg)` has random weights and trains; `HookedMoE.from_pretrained(name)` has trained ones."""

    def __repr__(self) -> str:
        known = "none" if self.tokenizer is None else f"{self.tokenizer.vocab_size} tokens"
        chat = "" if self.tokenizer is None or self.tokenizer.chat_template is None else ", with a chat template"
        return description(self.cfg, dict(self.named_parameters()), len(self.hook_dict), known + chat)

    def run_variants(
        self,
        tokens: Int[Tensor, "batch pos"] | str | list[str],
        edits: Iterable[Any],
        return_type: ReturnType = "logits",
        **options: Any,
    ) -> Any:
        """Many interventions as rows of one forward pass: what `run_with_hooks` gives for each, with a leading "variant" axis.

        Each edit is a hook, (name or predicate, function), or a list of hooks that act together; its functions see the rows of
        their own variant only, in the shapes of `tokens`. The pass starts at the first layer that any edit touches, from the
        clean residual stream. Returns logits [variant, batch, pos, d_vocab], or losses [variant] (`loss_per_token=True`:
        [variant, batch, pos-1]), or both; without gradients. Options: `loss_per_token`, `attention_mask`, `memory_budget`
        ("4GB"): edits go in as many groups as that takes. Equal to serial runs up to rounding. Raises `ValueError` for a budget
        too small for one variant, and while other hooks are attached.
        """
        return hooked_variants.run_variants(self, tokens, edits, return_type, **options)

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls: type[Model],
        name: str | PathLike[str],
        *,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str | None = None,
        revision: str | None = None,
        cache_dir: str | PathLike[str] | None = None,
        local_files_only: bool = False,
        stream: bool = False,
        store: torch.dtype | str | None = None,
        adapter: str | PathLike[str] | None = None,
        hf_model: Any = None,
    ) -> Model:
        """A trained model by short name ("olmoe", "tiny-olmoe"), hub id, or local directory in HuggingFace layout.

        `adapter` is the directory of a LoRA adapter to merge. With `hf_model`, a model of transformers, the weights are its own,
        in `dtype` and on `device`, and only tokenizer and name are those of `name`. See `hooked_moe.loading.from_pretrained` for
        what is read, and the errors raised.
        """
        if hf_model is not None:
            if stream or store is not None or adapter is not None:
                raise ValueError(
                    "with hf_model= the weights are in memory: leave out stream, store and adapter, and merge adapters in PEFT"
                )
            model = loading.from_hf_named(
                cls, hf_model, name, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
            )
            return model.to(device=loading.as_device(device), dtype=loading.as_dtype(dtype)).eval()
        return loading.from_pretrained(
            cls,
            name,
            dtype=dtype,
            device=device,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            stream=stream,
            store=store,
            adapter=adapter,
        )

    @classmethod
    def from_hf(cls: type[Model], hf_model: Any, tokenizer: Any = None) -> Model:
        """A model with the weights of a transformers model in memory, in its dtype and on its device; shared with it, not copied,
        where both lay them out alike. `tokenizer` is its fast tokenizer. See `hooked_moe.loading.from_hf`.
        """
        return loading.from_hf(cls, hf_model, tokenizer)

    def save_pretrained(self, path: str | PathLike[str]) -> None:
        """Write config, weights and tokenizer in HuggingFace layout: transformers loads them, and so does `from_pretrained`."""
        loading.save_pretrained(self, path)

    def remove_experts(self, experts: Mapping[int, Iterable[int]]) -> dict[int, list[int]]:
        """Remove routed experts, {layer: [expert, ...]}, and their router rows for good: for saving a pruned model.

        See `hooked_moe.surgery.pruning.remove_experts`. To remove experts for one forward pass, use an `ExpertMask`.
        """
        return pruning.remove_experts(self, experts)

    # Text

    def generate(
        self, input: Int[Tensor, "batch pos"] | str | list[str], max_new_tokens: int = 10, **options: Any
    ) -> Int[Tensor, "batch all_pos"] | str | list[str]:
        """Continue token ids or texts, one token at a time; returns the whole, of the kind of the input.

        Keyword options, with TransformerLens's meanings: `do_sample=True` (False, or `temperature=0`: the most probable token),
        `temperature=1.0`, `top_k`, `top_p`, `stop_at_eos=True` with `eos_token_id` (rows that have ended are filled up with it),
        `prepend_bos`, `use_past_kv_cache=True`, `return_type="input"` ("str", "tokens"), `verbose`. Besides: `generator` for
        repeatable samples, `attention_mask` for token ids padded on the left, and `expert_mask`, whose positions are those of the
        whole: prompt and `max_new_tokens`.

        Hooks are active. With the cache, they see the prompt at once and then each new token alone (pos = 1); without it, all
        tokens so far at every step. Raises `ValueError` for options out of range and rows that end in padding.
        """
        return generation.generate(self, input, max_new_tokens, **options)

    def to_tokens(self, text: Any, prepend_bos: bool | None = None, chat: bool = False) -> Int[Tensor, "batch pos"]:
        """Token ids; several texts are padded on the right. `prepend_bos=None` does as the model's family does.

        With `chat`, the text is what a user says (or there is a list of messages): the ids end where the assistant's answer
        begins, by the model's chat template. Padding is not marked: pass several texts to the model itself, which masks it, or
        `attention_mask` along with these ids.
        """
        if chat:
            if prepend_bos is not None:
                raise ValueError("with chat=True the chat template says whether there is a BOS token: leave out prepend_bos")
            return self.apply_chat_template(text, add_generation_prompt=True)
        return self.require_tokenizer().pad(as_texts(text), self.cfg.device, prepend_bos)[0]

    def apply_chat_template(
        self,
        messages: Any,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        chat_template: str | None = None,
        **variables: Any,
    ) -> Any:
        """Token ids [batch, pos] of a conversation, [{"role": "user", "content": "Hello"}], by the model's chat template; or its
        text without `tokenize`. Several conversations are padded on the right, and are a list of texts.

        `add_generation_prompt` ends it where the assistant's answer begins. `chat_template` is another template, or the name of
        one of the checkpoint's; `variables` are what else it reads, as `tools` or `enable_thinking`. Meanings are transformers'.
        Do not tokenize the text by `to_tokens`, which may put a second BOS token before it. Raises `ValueError` where there is no
        template and for messages that it refuses.

            tokens = model.apply_chat_template([{"role": "user", "content": "Where is Paris?"}], add_generation_prompt=True)
            model.generate(tokens, 20)
        """
        tokenizer = self.require_tokenizer()
        options = {"add_generation_prompt": add_generation_prompt, **variables}
        texts = rendered(tokenizer.chat_template, messages, chat_template, **options)
        if tokenize:
            return tokenizer.pad(texts, self.cfg.device, prepend_bos=False)[0]
        return texts[0] if len(texts) == 1 and not are_several(messages) else texts

    def to_string(self, tokens: Int[Tensor, "..."] | Sequence[Any] | int) -> str | list[str]:
        """The text of tokens [pos], or a list of texts for [batch, pos]."""
        return self.require_tokenizer().to_string(tokens)

    def to_str_tokens(self, text: Any, prepend_bos: bool | None = None) -> Any:
        """Each token of a text, or of token ids [pos], as a string; a list for each of several texts or rows [batch, pos]."""
        if is_batch(text):
            return [self.to_str_tokens(row, prepend_bos) for row in text]
        tokenizer = self.require_tokenizer()
        return tokenizer.to_str_tokens(tokenizer.encode(text, prepend_bos) if isinstance(text, str) else as_ids(text))

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token, on its own or after other text; `ValueError` shows its tokens if it is several."""
        return self.require_tokenizer().to_single_token(text)
