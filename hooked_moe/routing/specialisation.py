"""What experts are for: the domains and the tokens that they serve, and those that serve everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float

from hooked_moe.routing.route_table import RoutingTable
from hooked_moe.statistics.resampling import ratio_bootstrap
from hooked_moe.tables import Axis, Column, GridResult, Result, schema_of, table_with_schema

_LAYER, _EXPERT, _DOMAIN = (
    Axis("transformer block", labels="layers"),
    Axis("routed expert"),
    Axis("kind of text", "name", labels="domains"),
)


@dataclass(frozen=True, repr=False)
class DomainSpecialisation(GridResult):
    """The share of each domain's tokens that each expert serves."""

    layers: list[int]
    domains: list[str]
    uniform: float
    """k/E: what every share would be if all experts served as many tokens (of the layer with most experts)."""
    share: Float[np.ndarray, "layer expert domain"]
    low: Float[np.ndarray, "layer expert domain"]
    high: Float[np.ndarray, "layer expert domain"]

    AXES: ClassVar = {"layer": _LAYER, "expert": _EXPERT, "domain": _DOMAIN}
    COLUMNS: ClassVar = {
        "share": Column("layer expert domain", "1", "of the domain's tokens, how many the expert serves"),
        "low": Column("layer expert domain", "1", "lower end of the 95% interval, over documents; NaN with fewer than three"),
        "high": Column("layer expert domain", "1", "upper end"),
    }

    def attributes(self) -> dict[str, Any]:
        return super().attributes() | {"uniform": self.uniform}

    def plot(self, value: str | None = None, across: str | None = None, *, layer: int | None = None, **options: Any) -> Any:
        """Domain by expert of one layer (default: the last): how far the shares are from `uniform`."""
        if value is not None or across is not None:
            return super().plot(value, across, **options)
        from hooked_moe.figures import heat_map  # matplotlib takes a while to load

        layer = self.layers[-1] if layer is None else layer
        excess = self.share[self.layers.index(layer)].T - self.uniform
        label = f"share of the domain's tokens, less {self.uniform:.3g}"
        words = {"row_label": "domain", "column_label": f"expert of layer {layer}", "value_label": label}
        return heat_map(excess, **({"rows": self.domains, "columns": range(excess.shape[1])} | words | options))


def domain_specialisation(table: RoutingTable, layers: Sequence[int] | None = None, *, seed: int = 0) -> DomainSpecialisation:
    """Domain specialisation as the OLMoE paper defines it (arXiv 2409.02060, section 5): N(expert, domain) / N(domain).

        special = domain_specialisation(table)
        special.share[0, 7]          # what share of each domain's tokens goes to expert 7 of the first layer, by domain

    Every domain's shares sum to k in each layer; experts without a preference have k/E everywhere (`uniform`). Intervals are from
    resampling the domain's documents (bootstrap-t, `hooked_moe.statistics.ratio_bootstrap`).

    Raises `ValueError` for layers that the table lacks.
    """
    chosen, n, documents = table.chosen_layers(layers), max(table.experts.values()), len(table.domains)
    axes = [table.layers.index(layer) for layer in chosen]
    counts, tokens = np.zeros((documents, len(chosen) * n), np.int64), np.zeros(documents, np.int64)
    for grid in table.grids("expert"):
        tokens += np.bincount(grid["document"], minlength=documents)
        places = grid["expert"][:, axes].astype(np.int64) + np.arange(len(chosen))[:, None] * n
        keys = grid["document"].astype(np.int64)[:, None, None] * counts.shape[1] + places
        counts += np.bincount(keys.ravel(), minlength=counts.size).reshape(counts.shape)
    names = list(dict.fromkeys(table.domains))
    of_domain = np.array(table.domains)
    parts = [ratio_bootstrap(counts[of_domain == name], tokens[of_domain == name][:, None], seed=seed) for name in names]
    ends = {
        end: np.stack([getattr(part, field) for part in parts], axis=-1).reshape(len(chosen), n, -1)
        for end, field in (("share", "estimate"), ("low", "low"), ("high", "high"))
    }
    return DomainSpecialisation(chosen, names, table.slots / n, **ends)


_VOCABULARY = schema_of(
    ("layer", pa.int16(), "index", "transformer block"),
    ("expert", pa.int16(), "index", "routed expert"),
    ("token", pa.int32(), "token id", "input token, or the next one"),
    ("count", pa.int64(), "tokens", "how often the token goes to the expert"),
    ("occurrences", pa.int64(), "tokens", "how often the token occurs"),
    ("share", pa.float64(), "1", "count / occurrences"),
)


@dataclass(frozen=True, repr=False)
class VocabularySpecialisation(Result):
    """The tokens of every expert, highest share first; tokens that never go to an expert have no row."""

    of: str
    rows: pa.Table

    def table(self) -> pa.Table:
        return self.rows

    def metadata(self) -> dict[str, Any]:
        return {"of": self.of}

    @classmethod
    def from_table(cls, table: pa.Table, metadata: Mapping[str, Any]) -> VocabularySpecialisation:
        return cls(metadata["of"], table.replace_schema_metadata(None))

    def tokens_of(self, layer: int, expert: int, n: int = 10) -> pa.Table:
        """The n tokens with the largest share that one expert gets."""
        own = (self.rows["layer"].to_numpy() == layer) & (self.rows["expert"].to_numpy() == expert)
        return self.rows.filter(pa.array(own)).slice(0, n)


def vocabulary_specialisation(
    table: RoutingTable,
    layers: Sequence[int] | None = None,
    *,
    of: Literal["input", "next"] = "input",
    minimum: int = 10,
) -> VocabularySpecialisation:
    """Vocabulary specialisation as the OLMoE paper defines it (arXiv 2409.02060, section 5): N(expert, token) / N(token).

        special = vocabulary_specialisation(table)
        special.tokens_of(layer=3, expert=7)

    `of` is "input", the token at the position, or "next", the one that follows it in the document. Only tokens that occur
    `minimum` times or more count: shares of rare ones are noise. The shares of a token sum to k in each layer. Memory grows with
    the number of different (layer, token, expert) only.

    Raises `ValueError` for layers that the table lacks and for another `of`.
    """
    if of not in ("input", "next"):
        raise ValueError(f"of must be 'input' or 'next', not {of!r}")
    chosen, n = table.chosen_layers(layers), max(table.experts.values())
    axes = [table.layers.index(layer) for layer in chosen]
    occurrences, counts = _Counts(), _Counts()
    last: tuple[int, int, np.ndarray] | None = None
    for grid in table.grids("expert"):
        token, experts = grid["token"].astype(np.int64), grid["expert"][:, axes].astype(np.int64)
        if of == "next":
            token, experts, last = _followed(grid, experts, last)
        occurrences.add(token)
        counts.add(((np.arange(len(chosen))[:, None] << 40) + (token[:, None, None] << 12) + experts).ravel())
    assert n <= 1 << 12
    place, token, expert = counts.keys >> 40, (counts.keys >> 12) & ((1 << 28) - 1), counts.keys & ((1 << 12) - 1)
    total = occurrences.counts[np.searchsorted(occurrences.keys, token)] if len(token) else token
    kept = total >= minimum
    place, token, expert, count, total = (x[kept] for x in (place, token, expert, counts.counts, total))
    share = count / np.maximum(total, 1)
    order = np.lexsort((token, -count, -share, expert, place))
    values = {"layer": np.array(chosen)[place], "expert": expert, "token": token, "count": count, "occurrences": total}
    columns = {name: column[order] for name, column in (values | {"share": share}).items()}
    return VocabularySpecialisation(of, table_with_schema(_VOCABULARY, columns))


def _followed(
    grid: dict[str, np.ndarray], experts: np.ndarray, last: tuple[int, int, np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray, tuple[int, int, np.ndarray]]:
    """The next token at each position that has one, with the experts of that position; `last` is where the chunk before ended."""
    document, position, token = (grid[name].astype(np.int64) for name in ("document", "position", "token"))
    ending = int(document[-1]), int(position[-1]), experts[-1]
    if last is not None:
        document, position = np.append(last[0], document), np.append(last[1], position)
        token, experts = np.append(-1, token), np.concatenate([last[2][None], experts])
    follows = (np.diff(document) == 0) & (np.diff(position) == 1)
    return token[1:][follows], experts[:-1][follows], ending


class _Counts:
    """How often each key was seen, over any number of chunks."""

    def __init__(self) -> None:
        self.keys, self.counts = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def add(self, keys: np.ndarray) -> None:
        new, counts = np.unique(keys, return_counts=True)
        self.keys, place = np.unique(np.append(self.keys, new), return_inverse=True)
        self.counts = np.bincount(place, np.append(self.counts, counts), len(self.keys)).astype(np.int64)


@dataclass(frozen=True, repr=False)
class StandingCommittee(GridResult):
    """The experts that carry most of the routing whatever the domain."""

    layers: list[int]
    domains: list[str]
    needed: float
    """The share of a domain's routing weight that its committee carries."""
    mass: Float[np.ndarray, "layer expert domain"]
    member: Bool[np.ndarray, "layer expert domain"]
    standing: Bool[np.ndarray, "layer expert"]

    AXES: ClassVar = {"layer": _LAYER, "expert": _EXPERT, "domain": _DOMAIN}
    COLUMNS: ClassVar = {
        "mass": Column("layer expert domain", "1", "share of the domain's routing weight that the expert gets"),
        "member": Column(
            "layer expert domain", "yes or no", "whether it is of the fewest experts that carry enough in the domain"
        ),
        "standing": Column("layer expert", "yes or no", "whether it is a member in every domain"),
    }

    def attributes(self) -> dict[str, Any]:
        return super().attributes() | {"needed": self.needed}

    def plot(self, value: str | None = "mass", across: str | None = "expert", **options: Any) -> Any:
        """Layer by expert: the share of the routing weight that each gets, averaged over domains."""
        return super().plot(value, across, **options)

    @property
    def committees(self) -> dict[int, list[int]]:
        """The standing experts of every layer."""
        return {layer: own.nonzero()[0].tolist() for layer, own in zip(self.layers, self.standing, strict=True)}

    @property
    def carried(self) -> Float[np.ndarray, "layer domain"]:
        """The share of a domain's routing weight that the standing experts carry."""
        return (self.mass * self.standing[..., None]).sum(axis=1)


def standing_committee(table: RoutingTable, share: float = 0.5, layers: Sequence[int] | None = None) -> StandingCommittee:
    """The experts that carry most of the routing whatever the domain (the standing committee of arXiv 2601.03425).

        committee = standing_committee(table, share=.5)
        committee.committees         # {layer: [experts]}
        committee.carried            # [layer domain]: how much of each domain's routing weight they carry

    Of every domain, the fewest experts that carry `share` of its routing weight, heaviest first, are its members; who is a member
    in all domains is standing. Raises `ValueError` for a share outside (0, 1], and for layers that the table lacks.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, not {share}")
    chosen, n = table.chosen_layers(layers), max(table.experts.values())
    axes, names = [table.layers.index(layer) for layer in chosen], list(dict.fromkeys(table.domains))
    of_document = np.array([names.index(name) for name in table.domains])
    shape = (len(chosen), n, len(names))
    mass = np.zeros(shape)
    for grid in table.grids("expert", "routing_weight"):
        domain = of_document[grid["document"]][:, None, None]
        keys = (np.arange(len(chosen))[:, None] * n + grid["expert"][:, axes].astype(np.int64)) * len(names) + domain
        mass += np.bincount(keys.ravel(), grid["routing_weight"][:, axes].ravel().astype(float), mass.size).reshape(shape)
    mass /= mass.sum(axis=1, keepdims=True)
    order = np.argsort(-mass, axis=1, kind="stable")
    before = np.cumsum(np.take_along_axis(mass, order, axis=1), axis=1) - np.take_along_axis(mass, order, axis=1)
    member = np.zeros(shape, bool)
    np.put_along_axis(member, order, before < share - 1e-12, axis=1)
    member &= mass > 0
    return StandingCommittee(chosen, names, share, mass, member, np.all(member, axis=-1))
