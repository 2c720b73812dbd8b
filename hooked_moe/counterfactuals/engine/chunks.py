"""How many tokens of variants go through a block together."""

from __future__ import annotations

import torch

VARIANT_TOKENS_PER_CHUNK = 4096
"""On a CPU: some hundred for each expert, whose weights are packed again for every product."""
VARIANT_TOKENS_PER_CHUNK_ON_GPU = 32 * 1024
"""On a GPU: some thousand tokens for each of 64 experts."""


def chunk_size_on(device: torch.device) -> int:
    """Variant tokens that go through a block together."""
    return VARIANT_TOKENS_PER_CHUNK if device.type == "cpu" else VARIANT_TOKENS_PER_CHUNK_ON_GPU
