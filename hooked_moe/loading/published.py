"""The sizes of published models, known without a download: config.json of the models that have short names.

`published_configs.json` holds them as their makers published them (without what only training reads), one for each architecture
and size; models of the same sizes refer to one of them.
"""

from __future__ import annotations

import importlib.resources
from functools import cache
from typing import Any

from hooked_moe.config import HookedMoEConfig
from hooked_moe.json_text import parse_json
from weights_conversion import HFConfig, conversion_for

FILE = "published_configs.json"


@cache
def _published() -> dict[str, Any]:
    text = importlib.resources.files("hooked_moe").joinpath("loading", FILE).read_bytes()
    values: dict[str, Any] = parse_json(text)
    return values


def published_names() -> list[str]:
    """Hub ids of the models whose sizes are known."""
    values = _published()
    return [*values["configs"], *values["same_sizes"]]


def published_values(hub_id: str) -> dict[str, Any]:
    """The config.json of a published model, or of one of the same sizes. Raises `KeyError` for a model that is not known."""
    values = _published()
    config: dict[str, Any] = values["configs"][values["same_sizes"].get(hub_id, hub_id)]
    return config


def published_config(hub_id: str) -> HookedMoEConfig:
    """The sizes of a published model. Raises `KeyError` for a model that is not known."""
    values = published_values(hub_id)
    conversion = conversion_for(values["model_type"], FILE)
    return conversion.from_hf(HFConfig(values, FILE)).replace(model_name=hub_id)
