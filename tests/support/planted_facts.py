"""A model in which one known expert writes the answer, and facts that it knows: causal tracing has to find that expert."""

from __future__ import annotations

import tokenizers
import torch

from hooked_moe import HookedMoE, HookedMoEConfig, Tokenizer
from hooked_moe.corpus import FactRecord

LAYER, EXPERT = 1, 4
N_SUBJECTS = 40
CLASS, SEEN, IS, ANSWER = (0, 1), (10, 11), 5, 12
"""Coordinates of the residual stream: the subject's class, the same where attention brings it at the last token, the mark of the
last token, and what the expert writes."""
WORDS = ["<pad>", "the", "is", "east", "west", *(f"s{n}" for n in range(N_SUBJECTS))]


def planted_tokenizer() -> Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend, bos_id=None, eos_id=None, pad_id=0)


def planted_records() -> list[FactRecord]:
    """Every subject is in the east or the west."""
    return [FactRecord(n, "side", "the {} is", f"s{n}", "east" if n % 2 == 0 else "west", None) for n in range(N_SUBJECTS)]


def planted_model(at_subject: bool = False) -> HookedMoE:
    """Attention of layer 0 brings the subject's class to the last token; one expert of layer 1 turns it into an answer.

    With `at_subject` the expert does so at the subject's own token, and attention of layer 2 brings the answer to the last one.
    All other experts write small noise.
    """
    torch.manual_seed(0)
    cfg = HookedMoEConfig(
        n_layers=3,
        d_model=32,
        d_vocab=len(WORDS),
        n_ctx=16,
        n_heads=2,
        n_key_value_heads=2,
        d_head=8,
        num_experts=6,
        experts_per_token=3,
        d_expert=4,
        model_type="olmoe",
        model_name="planted",
    )
    model = HookedMoE(cfg, planted_tokenizer()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(".w"):
                parameter.zero_()
        _embed(model)
        bring = [(2, ANSWER, ANSWER)] if at_subject else [(0, *pair) for pair in zip(CLASS, SEEN, strict=True)]
        for channel, (layer, source, target) in enumerate(bring):
            model.blocks[layer].attn.W_V[0, channel, source] = 1.0
            model.blocks[layer].attn.W_O[target, 0, channel] = 3.0
        for block in model.blocks:
            block.mlp.router.W.normal_(0.0, 0.3)
            block.mlp.experts.W_in.normal_(0.0, 0.2)
            block.mlp.experts.W_out.normal_(0.0, 0.02)
        moe = model.blocks[LAYER].mlp
        mark, reads = (list(CLASS), CLASS) if at_subject else ([IS], SEEN)
        moe.router.W[EXPERT, mark] = 5.0
        moe.experts.W_in[EXPERT] = 0.0
        moe.experts.W_in[EXPERT, 0, 0, mark] = 2.0
        moe.experts.W_in[EXPERT, 1, 0, list(reads)] = torch.tensor([1.0, -1.0])
        moe.experts.W_out[EXPERT] = 0.0
        moe.experts.W_out[EXPERT, ANSWER, 0] = 4.0
    return model


def _embed(model: HookedMoE) -> None:
    embedding, unembedding = model.embed.W_E, model.unembed.W_U
    embedding.normal_(0.0, 0.05)
    embedding[WORDS.index("is"), IS] = 1.0
    for n in range(N_SUBJECTS):
        embedding[WORDS.index(f"s{n}"), CLASS[n % 2]] = 1.0
    unembedding.normal_(0.0, 0.02)
    unembedding[WORDS.index("east"), ANSWER] = 2.0
    unembedding[WORDS.index("west"), ANSWER] = -2.0
