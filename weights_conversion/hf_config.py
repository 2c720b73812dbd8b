"""Reading a config.json value by value, in the dialect of the hub and in that of transformers 5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hooked_moe.checks import printable, quoted
from hooked_moe.config import MOST, YarnScaling
from weights_conversion.errors import CheckpointError

_REQUIRED: Any = object()


@dataclass(frozen=True)
class HFConfig:
    """The values of a config.json; `source` names it in errors. Every error is a `CheckpointError`.

    An option that the model does not have is refused by its name: a checkpoint is never run as something it is not.
    """

    values: Mapping[str, Any]
    source: str

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {message}")

    def integer(self, key: str, *aliases: str, default: Any = _REQUIRED) -> Any:
        """A whole number. Names after the first are other names of the same key."""
        value = self._value((key, *aliases), default, "a whole number", lambda v: type(v) is int)
        if isinstance(value, int) and not _is_integer(value):
            raise self.error(f"{key} must be a whole number below 2^63, not {quoted(value)}")
        return value

    def layers(self) -> int:
        """How many layers there are: no more than can be counted before the checkpoint is seen."""
        n_layers: int = self.integer("num_hidden_layers")
        if n_layers > MOST["n_layers"]:
            raise self.error(f"num_hidden_layers is {n_layers:,}, and {MOST['n_layers']:,} are the most here")
        return n_layers

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self._value((key,), default, "a finite number", _is_number)
        return None if value is None else float(value)

    def boolean_or_none(self, key: str) -> bool | None:
        """None where it is not stated."""
        return None if self.values.get(key) is None else self.boolean(key)

    def boolean(self, key: str, default: Any = _REQUIRED) -> bool:
        return bool(self._value((key,), default, "true or false", lambda v: isinstance(v, bool)))

    def integers(self, key: str, default: Any = _REQUIRED) -> Any:
        """A list of whole numbers."""
        return self._value(
            (key,), default, "a list of whole numbers", lambda v: isinstance(v, list) and all(_is_integer(i) for i in v)
        )

    def states_null(self, key: str) -> bool:
        """Whether the key is there and null, as where a family's default is something else."""
        return key in self.values and self.values[key] is None

    def end_tokens(self, key: str) -> int | tuple[int, ...] | None:
        """The token that ends a text, or the tokens any of which does."""
        if not isinstance(self.values.get(key), list):
            return self.integer(key, default=None)
        ends = tuple(self.integers(key))
        return ends if len(ends) > 1 else ends[0] if ends else None

    def _value(self, keys: tuple[str, ...], default: Any, kind: str, is_kind: Any) -> Any:
        for key in keys:
            value = self.values.get(key)
            if value is not None:
                if not is_kind(value):
                    raise self.error(f"{key} must be {kind}, not {quoted(value)}")
                return value
        if default is _REQUIRED:
            raise self.error(f"{keys[0]} is missing; it must be {kind}")
        return default

    def refuse(self, key: str, unless: tuple[object, ...], why: str) -> None:
        """Raise unless the key is absent, null or one of the given values."""
        value = self.values.get(key)
        if value is not None and value not in unless:
            raise self.error(f"{key}={quoted(value)} is not supported: {why}")

    def refuse_unsupported(self) -> None:
        """Refuse the options that no family here has."""
        self.refuse("hidden_act", ("silu", "swish"), "the experts are SwiGLU, which needs hidden_act 'silu'")
        kinds = self._value(("layer_types",), [], "a list", lambda v: isinstance(v, list))
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                raise self.error(f"{quoted(kind)} in layer_types is not supported: 'full_attention' and 'sliding_attention' are")
        section = self.values.get("quantization_config") or {}
        if not isinstance(section, dict):
            raise self.error(f"quantization_config must be an object or null, not {quoted(section)}")
        inner = HFConfig(section, f"{self.source}: quantization_config")
        inner.refuse(
            "quant_method", ("fp8", "mxfp4"), "weights must be stored in blocks of 'fp8' or of 'mxfp4', or in 16 bits or more"
        )
        if section.get("quant_method") == "fp8":
            blocks = section.get("weight_block_size")
            if blocks != [128, 128]:
                raise inner.error(f"weight_block_size={quoted(blocks)} is not supported: blocks of fp8 are [128, 128]")
            inner.refuse("fmt", ("e4m3",), "fp8 is e4m3 here")
        elif section and "quant_method" not in section:
            raise inner.error("quant_method is missing")

    def refuse_windows(self) -> None:
        """For families whose attention always sees the whole context."""
        whole = "attention in this family always sees the whole context"
        if self.boolean("use_sliding_window", default=True):
            self.refuse("sliding_window", (0,), whole)
        if "sliding_attention" in (self.values.get("layer_types") or ()):
            raise self.error(f"'sliding_attention' in layer_types is not supported: {whole}")

    def rotary(self, base: float, split_temperature: bool = False, rotated_part: float | None = None) -> dict[str, Any]:
        """`rotary_base` and `rotary_scaling`, from the hub's keys (`rope_theta`, `rope_scaling`) or those of transformers 5
        (`rope_parameters`).

        Scaling is none or YaRN. `split_temperature` says whether the family takes `mscale_all_dim` out of the rotations and into
        the attention scores, as DeepSeek-V2 does. `rotated_part` is the part of a head that is rotated by default, in families
        where that need not be all of it: the result has `partial_rotary_factor` then.
        """
        parts = {} if self.values.get("partial_rotary_factor") is None else {"": self.number("partial_rotary_factor")}
        bases: dict[str, float] = {}
        scalings: dict[str, YarnScaling | None] = {}
        if self.values.get("rope_theta") is not None:
            bases["rope_theta"] = self.number("rope_theta")
        for key in ("rope_parameters", "rope_scaling"):
            section = self.values.get(key)
            if section is None:
                continue
            if not isinstance(section, dict):
                raise self.error(f"{key} must be an object or null, not {quoted(section)}")
            inner = HFConfig(section, f"{self.source}: {key}")
            if section.get("partial_rotary_factor") is not None:
                parts[f"{key}."] = inner.number("partial_rotary_factor")
            scalings[key] = inner.yarn(split_temperature)
            if section.get("rope_theta") is not None:
                bases[f"{key}.rope_theta"] = inner.number("rope_theta")
        self._agree(bases)
        self._agree(scalings)
        parts = {f"{key}partial_rotary_factor": part for key, part in parts.items()}
        self._agree(parts)
        for key, part in parts.items():
            if rotated_part is None and part != 1:
                raise self.error(f"{key}={part} is not supported: all coordinates of a head are rotated in this family")
        rotated = {} if rotated_part is None else {"partial_rotary_factor": next(iter(parts.values()), rotated_part)}
        return rotated | {
            "rotary_base": next(iter(bases.values()), base),
            "rotary_scaling": next(iter(scalings.values()), None),
        }

    def _agree(self, stated: Mapping[str, object]) -> None:
        first, *others = stated.values() or (None,)
        if any(other != first for other in others):  # compared, not hashed: a file may state lists
            raise self.error(f"{' and '.join(f'{key}={_plain(value)}' for key, value in stated.items())} contradict each other")

    def yarn(self, split_temperature: bool) -> YarnScaling | None:
        """The scaling that a section on rotary positions describes; None for plain positions."""
        kinds = {key: self.values[key] for key in ("rope_type", "type") if self.values.get(key) is not None}
        self._agree(kinds)
        kind = next(iter(kinds.values()), "default")
        if kind == "default":
            return None
        if kind != "yarn":
            raise self.error(f"rope_type={quoted(kind)} is not supported: 'default' and 'yarn' are")
        self.refuse("attention_factor", (), "YaRN's temperature follows from its factor here")
        mscale, all_dim = self.number("mscale", default=None), self.number("mscale_all_dim", default=None)
        if (mscale is None) != (all_dim is None) or mscale == 0 or (all_dim == 0 and mscale != 1):
            raise self.error(f"mscale={mscale} with mscale_all_dim={all_dim} is not supported: state both, above 0, or neither")
        if all_dim and not split_temperature:
            raise self.error("mscale_all_dim is not supported in this family: its attention scores are not rescaled")
        return YarnScaling(
            factor=self.number("factor"),
            original_ctx=self.integer("original_max_position_embeddings"),
            beta_fast=self.number("beta_fast", default=32.0),
            beta_slow=self.number("beta_slow", default=1.0),
            mscale=1.0 if mscale is None else mscale,
            mscale_all_dim=all_dim or 0.0,
            truncate=self.boolean("truncate", default=True),
        )


def _is_integer(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def _is_number(value: Any) -> bool:
    return (isinstance(value, float) and math.isfinite(value)) or _is_integer(value)


def _plain(value: Any) -> str:
    return printable(value) if isinstance(value, str) else quoted(value)


def rotary_entries(base: float, scaling: YarnScaling | None) -> dict[str, object]:
    """The same in both dialects."""
    if scaling is None:
        return {"rope_theta": base, "rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": base}}
    section: dict[str, object] = {
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_ctx,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
    }
    if not scaling.truncate:
        section["truncate"] = False
    if scaling.mscale_all_dim:
        section |= {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
    return {
        "rope_theta": base,
        "rope_scaling": {"type": "yarn", **section},
        "rope_parameters": {"rope_type": "yarn", "rope_theta": base, **section},
    }
