"""Runs every benchmark in a process of its own and writes benchmarks/RESULTS.md, one page.

python -m benchmarks.all                    # a quarter of an hour on two quiet cores
python -m benchmarks.all --only removals roofline --threads 1      # these anew, the page's others as they are
python -m benchmarks.all --small            # a minute; shows that it works, and prints what it finds instead
"""

from __future__ import annotations

import argparse
import ast
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.tables import write_or_print

HERE = Path(__file__).resolve().parent
OLMOE = ["--d-model", "2048", "--d-expert", "1024", "--vocabulary", "50304", "--layers", "2"]
WHOLE_LITE = ["--layers", "full", "--tokens", "64", "--only-streamed", "--precisions", "stored-bfloat16"]
SUITE: dict[str, list[list[str]]] = {
    "circuits": [["--tokens", "12", "48"]],
    "tracing": [["--repeats", "3"]],
    "removals": [["--contexts", "256", "512", "1024", "2048", "--batches", "1", "4", "--repeats", "3"]],
    "forward": [["--repeats", "5"]],
    "generation": [["--repeats", "5"], ["--repeats", "3", "--new", "32", *OLMOE]],
    "roofline": [["--repeats", "5"], ["--repeats", "3", *OLMOE]],
    "products": [["--context", "256", "--repeats", "5"], ["--random", "--context", "256", "--repeats", "3"]],
    "scaling": [["--repeats", "2"]],
    "streaming": [
        ["--documents", "4", "--tokens", "64"],
        ["--documents", "1", *WHOLE_LITE],
        ["--documents", "4", *WHOLE_LITE, "--budget", "1%"],
    ],
    "executors": [["--documents", "24"]],
    "routing": [["--repeats", "3"]],
}
"""What each is given, run by run."""
PACKAGES = ("torch", "transformers", "transformer-lens", "nnsight")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")
"""Of the CPU: those that matter to matrix products."""


def main(argv: Sequence[str] | None = None) -> int:
    args = options().parse_args(argv)
    out = args.out if args.out is not None or args.small else HERE / "RESULTS.md"
    started, code = time.perf_counter(), 0
    sections = {}
    for name in args.only:
        texts, begun = [], when()
        for given in [["--small"]] if args.small else SUITE[name]:
            found, text = run(name, given, args.threads)
            code = code or found
            texts.append(text)
        sections[name] = "\n".join([f"## {title(HERE / f'{name}.py')}\n", f"{begun}\n", *texts])
    if out is not None and out.is_file() and set(args.only) < set(SUITE):
        page = with_sections(out.read_text(encoding="utf-8"), sections)
    else:
        page = "\n".join([*heading(time.perf_counter() - started), *sections.values()])
    write_or_print(page, out)
    return code


def options() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--small", action="store_true", help="seconds each; shows that they work, measures nothing")
    result.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own choice, %(default)s")
    result.add_argument("--only", nargs="+", choices=SUITE, default=list(SUITE))
    result.add_argument("--out", type=Path, help="the page (default: benchmarks/RESULTS.md; with --small it is printed)")
    return result


def run(name: str, given: Sequence[str], threads: int) -> tuple[int, str]:
    """A benchmark's exit code, and what it printed under its command."""
    command = ["-m", f"benchmarks.{name}", *given, "--threads", str(threads)]
    print(f"{shlex.join(command)} ...", file=sys.stderr, flush=True)
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}  # as the page is written, whatever the locale
    done = subprocess.run([sys.executable, *command], cwd=HERE.parent, env=environment, stdout=subprocess.PIPE, encoding="utf-8")
    printed = done.stdout if done.returncode == 0 else f"It failed with code {done.returncode}.\n"
    return done.returncode, f"`python {shlex.join(command)}`\n\n{printed}"


def with_sections(page: str, sections: Mapping[str, str]) -> str:
    """A page with some of its sections replaced or added, all in the order of `SUITE`."""
    head, *others = re.split(r"^(?=## )", page, flags=re.MULTILINE)
    names = {f"## {title(HERE / f'{name}.py')}": name for name in SUITE}
    kept = {names[text.partition("\n")[0]]: text.rstrip("\n") + "\n" for text in others if text.partition("\n")[0] in names}
    both = {**kept, **sections}
    return head + "\n".join(both[name] for name in SUITE if name in both)


def when() -> str:
    """At which commit a section is made, when, on which machine, and how busy that is with other work."""
    place = machine()
    return (
        f"Commit {commit()}, {datetime.now(UTC):%Y-%m-%d}, on {place['CPU']} ({place['extensions']}), load average "
        f"{os.getloadavg()[0]:.1f} before it began."
    )


def title(script: Path) -> str:
    """The first line of its docstring."""
    doc = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or script.stem
    return doc.splitlines()[0].rstrip(".")


def heading(seconds: float) -> Iterator[str]:
    yield "# Benchmarks\n"
    yield "Times are medians, with the lowest and the highest; ratios are of runs that took turns in one process.\n"
    yield "| | |\n| --- | --- |"
    for name, value in (machine() | versions() | {"run": f"{datetime.now(UTC):%Y-%m-%d}, {seconds / 60:.0f} minutes"}).items():
        yield f"| {name} | {value} |"
    yield ""


def machine() -> dict[str, str]:
    """What Linux says of it; elsewhere, what Python knows."""
    info = Path("/proc/cpuinfo")
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line) if info.is_file() else {}
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "CPU": f"{fields.get('model name') or platform.machine()}, {os.cpu_count()} cores",
        "extensions": ", ".join(flag for flag in FLAGS if flag in fields.get("flags", "").split()) or "unknown",
        "memory": f"{memory / 2**30:.0f} GiB",
        "large pages": f"THP_MEM_ALLOC_ENABLE={os.environ.get('THP_MEM_ALLOC_ENABLE', '')}",
    }


def versions() -> dict[str, str]:
    packages = {package: version_of(package) for package in PACKAGES}
    return {"python": platform.python_version(), **packages, "commit": commit()}


def commit() -> str:
    described = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    return described.stdout.strip() or "unknown"


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
