"""Loading and saving models in HuggingFace layout: names, the hub, safetensors files, and the copies between them."""

from hooked_moe.loading.from_transformers import from_hf, from_hf_named
from hooked_moe.loading.hub_errors import HubError
from hooked_moe.loading.placement import as_device, as_dtype
from hooked_moe.loading.pretrained import from_pretrained
from hooked_moe.loading.registry import PRETRAINED, SHIPPED
from hooked_moe.loading.saving import save_pretrained
from weights_conversion.errors import CheckpointError

__all__ = [
    "PRETRAINED",
    "SHIPPED",
    "CheckpointError",
    "HubError",
    "as_device",
    "as_dtype",
    "from_hf",
    "from_hf_named",
    "from_pretrained",
    "save_pretrained",
]
