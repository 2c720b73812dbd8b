"""Which layers and parts carry the difference between two trainings: many grafts, one readout, shares with intervals."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from hooked_moe.checks import unknown_name
from hooked_moe.progress import progress_bar
from hooked_moe.statistics import RatioInterval, ratio_bootstrap
from hooked_moe.statistics.coalitions import banzhaf_values, shapley_values
from hooked_moe.surgery.grafting import Grafts
from hooked_moe.surgery.parts import BLOCK_PARTS, PARTS, Place
from hooked_moe.tables import COALITION_SHARES, GRAFTS, table_with_schema
from hooked_moe.transformer import Transformer

SWEEPS = ("ends", "suffix", "prefix", "single", "part", "layer_part")
DIRECTIONS = ("a<-b", "b<-a")
NULL_SWEEPS = ("suffix", "single", "part")
NULL_DIRECTIONS = ("a<-other", "b<-other")
MAXIMUM_PLAYERS = 10
"""Exact shares take 2^players readouts."""


class DocumentValues(NamedTuple):
    """A readout, document by document: a sum and the number of observations in it. The value is sum over sum."""

    total: Float[np.ndarray, " document"]
    n: Float[np.ndarray, " document"]


Readout = Callable[[Transformer], "DocumentValues | float"]


@runtime_checkable
class GraftMaker(Protocol):
    """What grafts are taken from: two models in memory (`Grafts`), or two checkpoints (`CheckpointGrafts`)."""

    @property
    def places(self) -> Collection[Place]: ...

    def model(self, from_b: Collection[Place]) -> Transformer: ...


class Graft(NamedTuple):
    """One row of a sweep."""

    sweep: str
    layers: str
    parts: str
    places: frozenset[Place]


def graft_sweep(
    a: Transformer | GraftMaker,
    b: Transformer | None,
    readout: Readout,
    sweeps: Sequence[str] = SWEEPS,
    directions: Sequence[str] = DIRECTIONS,
    progress: bool = False,
) -> pa.Table:
    """Grafts of two trainings, each with its readout and the share of their difference that it carries; columns as in `GRAFTS`.

    Sweeps: "ends" (everything, all blocks, all outside, nothing), "suffix" (layers i to the last), "prefix" (0 to i), "single"
    layers, each "part" in all layers, each "layer_part". Direction "a<-b" asks what suffices: a with parts of b. "b<-a" asks what
    is necessary: b without them. Where the two shares of a row differ, parts interact.

    `readout` maps a model to a number, or to sums and counts by document (`DocumentValues`), which give intervals over documents,
    paired: the same documents in every graft. Both trainings are fixed: an interval says nothing about another pair. `a` may be a
    `GraftMaker`, with `b` None. Models are not changed. Raises `ValueError` for models that cannot exchange parts,
    `UnknownNameError` for other sweeps or directions.

    >>> from hooked_moe import HookedMoE
    >>> from hooked_moe.surgery import untrained
    >>> a = HookedMoE.from_pretrained("tiny-olmoe")
    >>> table = graft_sweep(a, untrained(a), lambda model: float(model("Call me Ishmael.", return_type="loss")), ["ends"])
    >>> table["parts"].to_pylist()[::2]
    ['none', 'everything', 'blocks', 'outer']
    """
    _check_names("sweep", sweeps, SWEEPS)
    _check_names("direction", directions, DIRECTIONS)
    maker = _maker(a, b)
    grafts = [graft for sweep in sweeps for graft in _grafts_of(sweep, maker.places)]
    values = _Readouts(maker, readout, progress, 2 + len(directions) * len(grafts))
    everything = frozenset(maker.places)
    rows = [
        (graft, way, values.of(graft.places if way == "a<-b" else everything - graft.places))
        for graft in grafts
        for way in directions
    ]
    return _table(rows, values.of(frozenset()), values.of(everything))


def null_sweep(
    a: Transformer,
    b: Transformer,
    other: Transformer,
    readout: Readout,
    sweeps: Sequence[str] = NULL_SWEEPS,
    progress: bool = False,
) -> pa.Table:
    """The same grafts from a model that has nothing of the difference: a new one (`untrained`), or one from another seed.

    Direction "a<-other" is a with parts of it, and its share what they carry of the way from a to b: below 0 where they cost.
    "b<-other" is b with parts of it, and its share what of the difference is lost: what any graft of these parts costs b that
    brings nothing. A graft from the other training is to be read beside these. Columns and errors as in `graft_sweep`.

    Zhang, Bengio & Singer (2019, arXiv 1902.01996) reinitialise single layers so.

    >>> from hooked_moe import HookedMoE
    >>> from hooked_moe.surgery import untrained
    >>> a, b = HookedMoE.from_pretrained("tiny-olmoe"), HookedMoE.from_pretrained("tiny-olmoe-facts")
    >>> table = null_sweep(a, b, untrained(a), lambda model: float(model("Call me Ishmael.", return_type="loss")), ["single"])
    >>> sorted(set(table["direction"].to_pylist()))
    ['a<-other', 'b<-other']
    """
    _check_names("sweep", sweeps, SWEEPS)
    rows: list[tuple[Graft, str, DocumentValues]] = []
    ends = []
    for host, way in zip((a, b), NULL_DIRECTIONS, strict=True):
        maker = Grafts(host, other)
        grafts = [graft for sweep in sweeps for graft in _grafts_of(sweep, maker.places)]
        values = _Readouts(maker, readout, progress, 1 + len(grafts))
        ends.append(values.of(frozenset()))
        rows += [(graft, way, values.of(graft.places)) for graft in grafts]
    return _table(rows, *ends)


def _check_names(kind: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise unknown_name(kind, name, known, f"There are {', '.join(known)}.")


def coalition_shares(
    a: Transformer | GraftMaker,
    b: Transformer | None,
    readout: Readout,
    players: Literal["layers", "parts"] = "layers",
    progress: bool = False,
) -> pa.Table:
    """Exact Shapley and Banzhaf shares of layers, or of parts, in the difference of two trainings: `COALITION_SHARES`.

    All 2^players grafts are read out. The players are every layer's block (or every part, in all layers), and all that is outside
    of blocks. Raises `ValueError` for more than 10 of them.
    """
    maker = _maker(a, b)
    own = _players(maker.places, players)
    if len(own) > MAXIMUM_PLAYERS:
        raise ValueError(f"{len(own)} {players} have 2^{len(own)} coalitions; exact shares are for {MAXIMUM_PLAYERS} at most")
    values = _Readouts(maker, readout, progress, 1 << len(own))
    coalitions = [
        values.of(frozenset().union(*(places for bit, places in enumerate(own.values()) if coalition >> bit & 1)))
        for coalition in range(1 << len(own))
    ]
    gain = np.stack([_difference(value, coalitions[0]) for value in coalitions])
    whole = gain[-1]
    alone = np.stack([gain[1 << bit] for bit in range(len(own))])
    without = np.stack([whole - gain[(1 << len(own)) - 1 - (1 << bit)] for bit in range(len(own))])
    columns: dict[str, object] = {"player": list(own)}
    for name, shares in (
        ("shapley", shapley_values(gain)),
        ("banzhaf", banzhaf_values(gain)),
        ("first", alone),
        ("last", without),
    ):
        interval = _share(shares, whole)
        columns |= {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return table_with_schema(COALITION_SHARES, columns)


def _maker(a: Transformer | GraftMaker, b: Transformer | None) -> GraftMaker:
    if isinstance(a, Transformer):
        if b is None:
            raise ValueError("graft_sweep(a, b, ...): b is the other training; None goes with a GraftMaker")
        return Grafts(a, b)
    return a


class _Readouts:
    """The readout of every graft, each taken once."""

    def __init__(self, maker: GraftMaker, readout: Readout, progress: bool, expected: int) -> None:
        self._maker, self._readout = maker, readout
        self._known: dict[frozenset[Place], DocumentValues] = {}
        self._bar = progress_bar(expected, "grafts", "graft", shown=progress)

    def of(self, places: frozenset[Place]) -> DocumentValues:
        if places not in self._known:
            value = self._readout(self._maker.model(places))
            if not isinstance(value, DocumentValues):
                value = DocumentValues(np.array([float(value)]), np.ones(1))
            self._known[places] = value
        self._bar.update()
        return self._known[places]


def _grafts_of(sweep: str, places: Collection[Place]) -> Iterator[Graft]:
    """The grafts of a sweep, in order."""
    layers = sorted({layer for layer, _ in places if layer is not None})
    outer = frozenset(place for place in places if place[0] is None)
    blocks = frozenset(places) - outer
    last = layers[-1]
    if sweep == "ends":
        yield Graft(sweep, "none", "none", frozenset())
        yield Graft(sweep, "all", "everything", blocks | outer)
        yield Graft(sweep, "all", "blocks", blocks)
        yield Graft(sweep, "none", "outer", outer)
    spans = {
        "suffix": [(first, last) for first in reversed(layers)],
        "prefix": [(0, end) for end in layers],
        "single": [(layer, layer) for layer in layers],
    }
    for first, end in spans.get(sweep, []):
        span = str(first) if first == end else f"{first}-{end}"
        yield Graft(sweep, span, "blocks", frozenset(place for place in blocks if first <= (place[0] or 0) <= end))
    if sweep == "part":
        for part, own in _by_part(places).items():
            yield Graft(sweep, "all" if part in BLOCK_PARTS else "none", part, own)
    if sweep == "layer_part":
        for part, own in _by_part(blocks).items():
            for place in sorted(own, key=lambda place: place[0] or 0):
                yield Graft(sweep, str(place[0]), part, frozenset([place]))


def _by_part(places: Collection[Place]) -> dict[str, frozenset[Place]]:
    present = {part for _, part in places}
    return {part: frozenset(place for place in places if place[1] == part) for part in PARTS if part in present}


def _players(places: Collection[Place], kind: str) -> Mapping[str, frozenset[Place]]:
    outer = frozenset(place for place in places if place[0] is None)
    blocks = frozenset(places) - outer
    if kind == "parts":
        own = _by_part(blocks)
    elif kind == "layers":
        layers = sorted({layer for layer, _ in blocks if layer is not None})
        own = {f"layer {layer}": frozenset(place for place in blocks if place[0] == layer) for layer in layers}
    else:
        raise unknown_name("kind of players", kind, ("layers", "parts"))
    return {**own, "outer": outer}


def _difference(value: DocumentValues, base: DocumentValues) -> Float[np.ndarray, " document"]:
    """By document; the counts are the same, for the documents are."""
    if not np.array_equal(value.n, base.n):
        raise ValueError("the readout counted different observations in two grafts: shares need the same in all of them")
    return value.total - base.total


def _share(parts: Float[np.ndarray, "part document"], whole: Float[np.ndarray, " document"]) -> RatioInterval:
    """Of a difference of either sign."""
    sign = 1.0 if whole.sum() >= 0 else -1.0
    return ratio_bootstrap(sign * parts.T, sign * whole[:, None])


def _table(rows: Sequence[tuple[Graft, str, DocumentValues]], a: DocumentValues, b: DocumentValues) -> pa.Table:
    whole = _difference(b, a)
    carried = np.stack([_difference(value, a) if way.startswith("a") else _difference(b, value) for _, way, value in rows])
    value = ratio_bootstrap(np.stack([value.total for _, _, value in rows]).T, a.n[:, None])
    share = _share(carried, whole)
    columns: dict[str, object] = {
        "sweep": [graft.sweep for graft, _, _ in rows],
        "layers": [graft.layers for graft, _, _ in rows],
        "parts": [graft.parts for graft, _, _ in rows],
        "direction": [way for _, way, _ in rows],
        "n_documents": [len(a.total)] * len(rows),
    }
    for name, interval in (("value", value), ("share", share)):
        columns |= {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return table_with_schema(GRAFTS, columns)
