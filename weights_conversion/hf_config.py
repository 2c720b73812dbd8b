"""Reading a config.json value by value, in the dialect of the hub and in that of transformers 5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
        return self._value((key, *aliases), default, "a whole number", lambda v: isinstance(v, int) and not isinstance(v, bool))

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self._value((key,), default, "a number", lambda v: isinstance(v, int | float) and not isinstance(v, bool))
        return None if value is None else float(value)

    def boolean(self, key: str, default: Any = _REQUIRED) -> bool:
        return bool(self._value((key,), default, "true or false", lambda v: isinstance(v, bool)))

    def token_id(self, key: str) -> int | None:
        """A special token; the first, where a config lists several that end a text."""
        value = self.values.get(key)
        if isinstance(value, list) and value:
            return HFConfig({**self.values, key: value[0]}, self.source).token_id(key)
        return self.integer(key, default=None)

    def _value(self, keys: tuple[str, ...], default: Any, kind: str, is_kind: Any) -> Any:
        for key in keys:
            value = self.values.get(key)
            if value is not None:
                if not is_kind(value):
                    raise self.error(f"{key} must be {kind}, not {value!r}")
                return value
        if default is _REQUIRED:
            raise self.error(f"{keys[0]} is missing; it must be {kind}")
        return default

    def refuse(self, key: str, unless: tuple[object, ...], why: str) -> None:
        """Raise unless the key is absent, null or one of the given values."""
        value = self.values.get(key)
        if value is not None and value not in unless:
            raise self.error(f"{key}={value!r} is not supported: {why}")

    def refuse_unsupported(self, sliding_window_switch: bool = True) -> None:
        """Refuse the options that no family here has.

        `sliding_window_switch` is what the family takes `use_sliding_window` to be where its config does not say.
        """
        self.refuse("hidden_act", ("silu", "swish"), "the experts are SwiGLU, which needs hidden_act 'silu'")
        self.refuse("quantization_config", ({},), "weights must be float64, float32, float16 or bfloat16; dequantise them first")
        if self.boolean("use_sliding_window", default=sliding_window_switch):
            self.refuse("sliding_window", (0,), "attention here always sees the whole context")
        if "sliding_attention" in (self.values.get("layer_types") or ()):
            raise self.error("'sliding_attention' in layer_types is not supported: attention here always sees the whole context")

    def rotary_base(self, default: float) -> float:
        """The base of plain rotary positions, from `rope_theta` (hub) or `rope_parameters` (transformers 5)."""
        stated: dict[str, float] = {}
        if self.values.get("rope_theta") is not None:
            stated["rope_theta"] = self.number("rope_theta")
        for key in ("rope_parameters", "rope_scaling"):
            section = self.values.get(key)
            if section is None:
                continue
            if not isinstance(section, dict):
                raise self.error(f"{key} must be an object or null, not {section!r}")
            inner = HFConfig(section, f"{self.source}: {key}")
            for kind in ("rope_type", "type"):
                inner.refuse(kind, ("default",), "rotary positions are not scaled here")
            inner.refuse("partial_rotary_factor", (1,), "all coordinates of a head are rotated here")
            if section.get("rope_theta") is not None:
                stated[f"{key}.rope_theta"] = inner.number("rope_theta")
        self.refuse("partial_rotary_factor", (1,), "all coordinates of a head are rotated here")
        if len(set(stated.values())) > 1:
            raise self.error(f"{' and '.join(f'{key}={base}' for key, base in stated.items())} contradict each other")
        return next(iter(stated.values()), default)


def rotary_base_entries(base: float) -> dict[str, object]:
    """The same base in both dialects."""
    return {"rope_theta": base, "rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": base}}
