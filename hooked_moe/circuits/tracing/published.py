"""What was published of causal tracing with experts, beside a result of the same model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from hooked_moe.circuits.tracing.result import TracingResult
from hooked_moe.circuits.tracing.selection import Estimate
from hooked_moe.tables.schemas import schema_of, table_with_schema

COMPARISON = schema_of(
    ("source", pa.string(), "1", "whose number: the paper's, or its public reproduction's"),
    ("case_set", pa.string(), "1", "the model, and how its cases were chosen"),
    ("quantity", pa.string(), "1", "what is compared"),
    ("published", pa.string(), "1", "the published number, with its interval in logits where it has one"),
    ("measured", pa.string(), "1", "the same in this result"),
)


class PublishedCases(NamedTuple):
    discovery: frozenset[int]
    validation: frozenset[int]


def published_models() -> list[str]:
    """The models that numbers were published of."""
    data = _published()
    return sorted({name.partition(",")[0] for source in ("paper", "reproduction") for name in data[source]})


def published_cases(model: str) -> PublishedCases:
    """The CounterFact ids of the published cases: those that the expert was chosen on, and those that tested it.

    Raises `ValueError` for a model without any.
    """
    ids = json.loads(_data("causal_tracing_case_ids.json"))
    if model not in ids or model == "origin":
        known = ", ".join(name for name in ids if name != "origin")
        raise ValueError(f"no case ids were published for {model!r}: they are for {known}")
    return PublishedCases(frozenset(ids[model]["discovery"]), frozenset(ids[model]["validation"]))


def compare_published(result: TracingResult, model: str) -> pa.Table:
    """Published numbers of a model beside the result's, of patches at the last token.

    Raises `ValueError` for a model of which none were published, and for a result that has no such patches.
    """
    data = _published()
    sets = [
        (source, name, numbers)
        for source in ("paper", "reproduction")
        for name, numbers in data[source].items()
        if name.partition(",")[0] == model
    ]
    if not sets:
        raise ValueError(f"nothing was published of {model!r}; numbers are there of {', '.join(published_models())}")
    result = result.at("final")
    rows = [
        {
            "source": source,
            "case_set": name,
            "quantity": quantity,
            "published": published,
            "measured": _measured(result, numbers)[key],
        }
        for source, name, numbers in sets
        for key, quantity, published in _numbers(numbers)
    ]
    return table_with_schema(COMPARISON, {name: [row[name] for row in rows] for name in COMPARISON.names})


def _numbers(numbers: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(key, in words, published) of what a result can be compared in."""
    layer, expert = numbers["layer"], numbers["expert"]
    words = {
        "layer": "layer chosen",
        "expert": "expert chosen in it",
        "layer_rescue": f"MLP output of layer {layer}",
        "coalition": f"routed experts of layer {layer}",
        "union": f"experts of either run, layer {layer}",
        "expert_rescue": f"expert {expert} of layer {layer}",
        "spec": f"its specificity (expert {expert} of layer {layer})",
        "gate_matched": "its specificity against the nearest routing weight",
        "equal_own": "it at equal norm",
        "equal_matched": "the nearest weight's at equal norm",
        "equal_spec": "its specificity at equal norm",
    }
    values = {**numbers, "gate_matched": numbers.get("gate_matched", {}).get("spec"), **_at_equal_norm(numbers)}
    values["coalition"] = next((value for key, value in numbers.items() if key.startswith("coalition_top")), None)
    values["union"] = numbers.get("union", numbers.get("coalition_union"))
    return [(key, text, _text(values[key])) for key, text in words.items() if values.get(key) is not None]


def _at_equal_norm(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """As the source has it: of the expert and a control, or of the two experts that a token goes to."""
    equal, pair = numbers.get("equal_norm", {}), numbers.get("active_pair", {})
    return {
        "equal_own": equal.get("selected", pair.get("equal_norm_selected")),
        "equal_matched": equal.get("control", pair.get("equal_norm_other")),
        "equal_spec": equal.get("spec", pair.get("equal_norm_spec")),
    }


def _measured(result: TracingResult, numbers: Mapping[str, Any]) -> dict[str, str]:
    layer, expert = numbers["layer"], numbers["expert"]
    chosen, equal = result.selection, result.equal_norm(layer, expert)
    values = {
        "layer_rescue": result.site("moe_out")[:, layer],
        "coalition": result.site("routed_out")[:, layer],
        "union": result.site("union")[:, layer],
        "expert_rescue": result.expert(layer, expert),
        "spec": result.specificity(layer, expert),
        "gate_matched": result.grid.weight_matched(layer, expert),
        "equal_own": equal.own,
        "equal_matched": equal.matched,
        "equal_spec": equal.own - equal.matched,
    }
    return {
        "layer": str(result.layer),
        "expert": "none" if chosen is None else f"layer {chosen.layer}, expert {chosen.expert}",
        **{name: _estimated(result, own) for name, own in values.items()},
    }


def _estimated(result: TracingResult, values: Float[np.ndarray, " case"]) -> str:
    enough = np.isfinite(values[~result.discovery]).sum() > 1
    return str(result.validated(values)) if enough else "not active in two validation cases"


def _text(value: Any) -> str:
    if isinstance(value, list):
        mean, low, high = value
        return str(Estimate(mean, low, high, p=float("nan"), n=0))
    return str(value)


@cache
def _published() -> dict[str, Any]:
    contents: dict[str, Any] = json.loads(_data("causal_tracing_published.json"))
    return contents


def _data(file: str) -> bytes:
    return resources.files("hooked_moe.circuits").joinpath("data", file).read_bytes()
