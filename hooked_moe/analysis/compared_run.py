"""One of two runs to compare: what it is of, as its files say, and why it cannot be compared where it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from hooked_moe.analysis.saving_table import ALL_LAYERS, SAVINGS
from hooked_moe.tables import Ledger, read_checked_json, read_csv, read_parquet

_NEEDED = ("effects.parquet", "documents.parquet", "experts.parquet", "savings.csv")


@dataclass(frozen=True)
class ComparedRun:
    """An analysed audit."""

    directory: Path
    manifest: dict[str, Any]
    layers: tuple[int, ...]
    """Those of savings.csv."""
    seed: int
    savings: pa.Table
    experts: pa.Table
    documents: pa.Table

    @property
    def name(self) -> str:
        """ "tiny-olmoe/held-out-1f086e18"."""
        return f"{self.directory.parent.name}/{self.directory.name}"

    @property
    def shape(self) -> tuple[Any, Any]:
        """Layers of the model, and experts of a layer: where these agree, an expert of one run has a counterpart in the other."""
        config = self.manifest["model"]["config"]
        return config.get("n_layers"), config.get("num_experts")

    def pruning(self) -> list[dict[str, Any]]:
        """The rows of pruning.csv; none where nothing was pruned, or the file is not what its ledger says."""
        path = self.directory / "pruning.csv"
        if not path.is_file() or "pruning.csv" in Ledger(self.directory).faults():
            return []
        return read_csv(path).to_pylist()


def read_compared_run(directory: Path) -> ComparedRun:
    """Raises FileNotFoundError and ValueError that say what to do, for what is no analysed audit."""
    manifest_path = directory / "manifest.json"
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is no directory; give that of a run, results/<model>/<run>")
    if not manifest_path.is_file():
        raise FileNotFoundError(
            f"{directory} is no finished run: it has no manifest.json. Give the directory that `hooked-moe audit` names"
        )
    manifest = read_checked_json(manifest_path)
    if not (isinstance(manifest.get("model"), dict) and isinstance(manifest["model"].get("config"), dict)):
        raise ValueError(f"{manifest_path} does not say what model it is of; it was not written by `hooked-moe audit`")
    if "budget" in manifest:
        raise ValueError(
            f"{directory} is a budgeted audit, which made a sample of the removals; compare-runs takes audits of all: give "
            "`hooked-moe audit` the same settings without --budget"
        )
    absent = [name for name in _NEEDED if not (directory / name).is_file()]
    if absent and "protocol" in manifest:
        raise ValueError(
            f"{directory} is a run of --protocol as_released, which measures no savings; compare-runs takes audits as defined "
            "(`hooked-moe compare` puts released runs beside the published tables)"
        )
    if absent:
        raise FileNotFoundError(
            f"{directory} lacks {', '.join(absent)}: give `hooked-moe audit` with the settings of that run, which measures "
            "what is absent and analyses it"
        )
    ledger = Ledger(directory)
    stale = {name: fault for name, fault in ledger.faults().items() if name in _NEEDED}
    if stale:
        name, fault = next(iter(stale.items()))
        raise ValueError(f"{directory / name} is not of this run's measurement ({fault})")
    savings = read_csv(directory / "savings.csv", SAVINGS)
    layers = sorted({int(layer) for layer in savings["layer"].to_pylist() if layer != ALL_LAYERS})
    seed = ledger.settings("analysis").get("seed", 0)
    tables = (read_parquet(directory / name) for name in ("experts.parquet", "documents.parquet"))
    return ComparedRun(directory, manifest, tuple(layers), seed, savings, *tables)


def what_differs(one: ComparedRun, other: ComparedRun) -> list[tuple[str, str, str]]:
    """Entries of the manifests that differ, in both: of the model, the corpus, the measurement and its parts, the versions."""
    flat = [dict(_entries(run.manifest)) for run in (one, other)]
    names = sorted({*flat[0], *flat[1]}, key=lambda name: (_ORDER.index(name.partition(".")[0]), name))
    pairs = ((name, *(side.get(name, "absent") for side in flat)) for name in names)
    return [(name, first, second) for name, first, second in pairs if first != second]


_ORDER = ("model", "corpus", "measurement", "parts", "versions")


def _entries(manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    def walk(prefix: str, node: Any) -> Iterator[tuple[str, str]]:
        if isinstance(node, dict) and node:
            for key, inner in node.items():
                yield from walk(f"{prefix}.{key}", inner)
        else:
            text = str(node)
            yield prefix, text[:12] if prefix.endswith("sha256") else text

    for part in _ORDER:
        if part in manifest:
            yield from walk(part, manifest[part])
