"""What the five published checkpoints hold, and logits that transformers' own tests state for them."""

from __future__ import annotations

from dataclasses import dataclass

GOLDEN_INPUT = (1, 306, 4658, 278, 6593, 310, 2834, 338)
"""Token ids of the golden logits."""


@dataclass(frozen=True)
class Published:
    """One checkpoint on the Hugging Face hub. Sizes were counted from the safetensors headers there."""

    hub_id: str
    parameters: int
    stored_bytes: int
    tensors: int
    golden_logits: tuple[float, ...] = ()
    """Mean over the vocabulary of the logits at every position of `GOLDEN_INPUT`, from transformers' slow tests of the family;
    empty where it has none."""


PUBLISHED = {
    "olmoe": Published(
        "allenai/OLMoE-1B-7B-0924",
        parameters=6_919_161_856,
        stored_bytes=13_838_323_712,
        tensors=3_219,
        golden_logits=(-1.3814, -3.4450, -2.2990, -1.9542, -2.4387, -2.7941, -2.9312, -2.8309),
    ),
    "qwen1.5-moe": Published(
        "Qwen/Qwen1.5-MoE-A2.7B",
        parameters=14_315_784_192,
        stored_bytes=28_631_568_384,
        tensors=4_659,
        golden_logits=(-4.2125, -3.6416, -4.9136, -4.3005, -4.9938, -3.4393, -3.5195, -4.1621),
    ),
    "deepseek-v2-lite": Published(
        "deepseek-ai/DeepSeek-V2-Lite", parameters=15_706_484_224, stored_bytes=31_412_968_448, tensors=5_291
    ),
    "qwen3-30b-a3b": Published("Qwen/Qwen3-30B-A3B-Base", parameters=30_532_122_624, stored_bytes=61_064_245_248, tensors=18_867),
    "mixtral-8x7b": Published("mistralai/Mixtral-8x7B-v0.1", parameters=46_702_792_704, stored_bytes=93_405_585_408, tensors=995),
}
"""By the names that `hooked-moe verify --expect` takes."""


def published(hub_id: str | None) -> Published | None:
    return next((entry for entry in PUBLISHED.values() if entry.hub_id == hub_id), None)
