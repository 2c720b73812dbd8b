"""HuggingFace checkpoints to and from `hooked_moe`: one module per family, each a table of weights and two config functions.

A new family adds its module and one entry here.
"""

from hooked_moe.checks import quoted
from weights_conversion.conversion import Conversion
from weights_conversion.deepseek_v2 import DEEPSEEK_V2
from weights_conversion.deepseek_v3 import DEEPSEEK_V3
from weights_conversion.errors import CheckpointError, abbreviated
from weights_conversion.glm4_moe import GLM4_MOE
from weights_conversion.glm4_moe_lite import GLM4_MOE_LITE
from weights_conversion.gpt_oss import GPT_OSS
from weights_conversion.hf_config import HFConfig
from weights_conversion.mixtral import MIXTRAL
from weights_conversion.olmoe import OLMOE
from weights_conversion.qwen2_moe import QWEN2_MOE
from weights_conversion.qwen3_moe import QWEN3_MOE

_FAMILIES = (OLMOE, QWEN2_MOE, DEEPSEEK_V2, QWEN3_MOE, MIXTRAL, DEEPSEEK_V3, GLM4_MOE, GLM4_MOE_LITE, GPT_OSS)
CONVERSIONS: dict[str, Conversion] = {
    model_type: conversion for conversion in _FAMILIES for model_type in (conversion.model_type, *conversion.aliases)
}
"""By the `model_type` of config.json."""


def conversion_for(model_type: str, source: str) -> Conversion:
    """The conversion of a family; `CheckpointError` names the families there are. `source` is what named this one."""
    if model_type not in CONVERSIONS:
        raise CheckpointError(
            f"{source}: model_type {quoted(model_type)} is not supported; supported are: {', '.join(CONVERSIONS)}"
        )
    return CONVERSIONS[model_type]


__all__ = ["CONVERSIONS", "CheckpointError", "Conversion", "HFConfig", "abbreviated", "conversion_for"]
