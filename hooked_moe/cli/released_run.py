"""`--protocol as_released`: the options that it takes, the run that it opens, the cells that it prints."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa

from hooked_moe.checks import quoted
from hooked_moe.cli.console import int_or_none
from hooked_moe.cli.options import check_run_name, choose_device, dtype_named, first_documents, parse_layers
from hooked_moe.corpus import load_corpus
from hooked_moe.loading.hub import download
from hooked_moe.loading.pretrained import read_config
from hooked_moe.loading.registry import locate
from hooked_moe.model import HookedMoE
from hooked_moe.paper import ReleasedCell, ReleasedRun, open_released, released_cells, released_cells_table
from hooked_moe.paper.protocols import Released, released_protocol
from hooked_moe.paper.published import PAIRS, published_model, released_comparisons
from hooked_moe.tables import read_parquet, write_derived

MOST_POSITIONS = 1_000_000
"""Of a cell: positions are drawn with replacement where texts have fewer, so that no text says how many are too many."""
FIXED = {
    "unit": "article",
    "removal": "zero",
    "context": None,
    "tokens": "512",
    "bos": None,
    "stream": False,
    "store": None,
    "products": None,
    "memory": None,
    "scope": "position",
    "shard": None,
    "object_store": None,
    "ray": None,
    "ray_workers": None,
    "ray_cpus": None,
    "ray_gpus": None,
}
"""Options that the released protocol leaves no choice in, with their defaults."""


def add_protocol_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--protocol",
        choices=["defined", "as_released"],
        default="defined",
        help="as_released: sampling, scope, metrics, padding and precision of the paper's code, in a directory of its own; only "
        "--model, --revision, --corpus, --documents, --layers, --positions, --dtype, --device, --results, --run go with it",
    )


def open_released_run(args: argparse.Namespace) -> ReleasedRun:
    """The released protocol's run that the arguments name; says what it is.

    Raises `ValueError` for options that the protocol fixes, and what `open_released` raises.
    """
    given = [f"--{name.replace('_', '-')}" for name, default in FIXED.items() if getattr(args, name, default) != default]
    if given:
        raise ValueError(f"{', '.join(given)}: --protocol as_released fixes that; leave it out, or use --protocol defined")
    check_run_name(args.run)
    released = released_family(args.model, args.revision)
    dtype = args.dtype or released.dtype
    device = choose_device(args.device)
    model = HookedMoE.from_pretrained(args.model, dtype=dtype_named(dtype, device), device=device, revision=args.revision)
    unit = "row" if args.corpus == "wikitext-2" else "article"
    corpus = first_documents(load_corpus(args.corpus, unit=unit), args.documents)
    layers = None if args.layers == "all" else parse_layers(args.layers, model.cfg)
    run = open_released(model, corpus, layers, results=args.results, name=args.run, log=print)
    print(f"{model.cfg.model_name} as released: layers {', '.join(map(str, run.layers))}; weights in {dtype}")
    if dtype != released.dtype:
        print(f"note: the released code ran this family in {released.dtype}; give --dtype {released.dtype} for that")
    print(f"results: {run.directory}\n")
    return run


def released_family(name: str, revision: str | None) -> Released:
    """The released protocol of a model that is not loaded yet, from its config alone: weights of other families stay on the hub.

    Raises `ValueError` for a family that the paper did not audit.
    """

    def protocol(config: Path) -> Released:
        return released_protocol(read_config(config)[1].model_type)

    location = locate(name)
    directory = location.directory
    if directory is None:
        assert location.hub_id is not None
        directory, _ = download(location.hub_id, revision, None, False, check_config=protocol)
    return protocol(directory / "config.json")


def released_positions(text: str, default: int = PAIRS) -> int:
    """How many positions a cell has: `default` for "all", for the released protocol samples."""
    if text == "all":
        return default
    number = int_or_none(text)
    if number is None or not 3 <= number <= MOST_POSITIONS:
        raise ValueError(f"--positions {quoted(text)}: give a number from 3 to {MOST_POSITIONS:,}; the paper's is {default}")
    return number


def write_released_cells(run: ReleasedRun, n: int, *tables: pa.Table) -> list[ReleasedCell]:
    """The cells of some comparisons, and cells.csv of all that the run has measured at `n` positions."""
    ddof = run.released.ddof
    found = [name for name in (f"audit-{n}.parquet", f"control-{n}.parquet") if (run.directory / name).is_file()]
    measured = pa.concat_tables([read_parquet(run.directory / name) for name in found])
    cells = released_cells_table(released_cells(measured, ddof))
    write_derived(run.directory, "cells", {"cells.csv": cells}, found, "hooked-moe audit --protocol as_released")
    return released_cells(pa.concat_tables(tables), ddof)


def print_cells(cells: list[ReleasedCell]) -> None:
    print("Removed from the whole text: the highest- against the lowest-ranked active expert, as released")
    print("  layer    n       d 95% interval         p_t     p_W    rho   t-test alone     both tests")
    ranking = None
    for cell in cells:
        if cell.ranking != ranking:
            ranking = cell.ranking
            print(ranking)
        if cell.note:
            print(f"  {cell.layer:>5} {cell.n:>4}  {cell.note}")
            continue
        interval = f"[{cell.d_low:+.3f},{cell.d_high:+.3f}]"
        rho = "      " if np.isnan(cell.rho) else f"{cell.rho:+.3f}"
        numbers = f"{cell.d:+.3f} {interval:<16} {cell.p_t:>7.4f} {cell.p_wilcoxon:>7.4f} {rho}"
        print(f"  {cell.layer:>5} {cell.n:>4}  {numbers}   {cell.t_test_alone:<15}  {cell.agreement}")


def compare_positions(run: ReleasedRun, comparisons: pa.Table) -> str | None:
    """Where OLMoE's audit was rerun: whether the positions are the released ones. None where there is nothing to compare."""
    published = published_model(run.model.cfg.model_type)
    if published is None or published.name != "olmoe" or published.n_layers != run.model.cfg.n_layers:
        return None
    theirs, ours = released_comparisons(), comparisons

    def pairs(table: pa.Table, name: str) -> set[tuple[str, int, int]]:
        return set(zip(*(table[column].to_pylist() for column in (name, "text", "position")), strict=True))

    wanted, found = pairs(theirs, "metric"), pairs(ours, "ranking")
    return f"{len(wanted & found)} of the {len(wanted)} released positions were measured"
