"""`hooked-moe <command> ...`: finds the command's module and hands it the remaining arguments.

A command is a row of `COMMANDS` and a module of its name in this room, with a docstring that shows examples and a function
`main(arguments)` that returns the exit code. Only the module of the command that runs is imported, so that `--help` and
`--version` do not wait for torch.
"""

from __future__ import annotations

import sys
from importlib import import_module

from hooked_moe.checks import UnknownNameError, unknown_name
from hooked_moe.version import __version__

COMMANDS = {
    "audit": "remove every routed expert at every token, and report what the routing statistics knew about it",
    "plan": "say what an audit of a model takes: operations, memory, disk and time, before a download",
    "control": "rank the active experts by the token's own scores: routing weight, gap norm, first-order estimate",
    "progressive": "remove one, two, ... all active experts at one token, in three orders",
    "redistribution": "compare each expert's contribution with the rest of the routed sum",
    "prune": "remove experts for good by every ranking, and compare the cost with what the effect table predicted",
    "trace": "find the experts that carry facts: corrupt a prompt's subject, and restore one expert at a time",
    "study": "compare models of one architecture: grafts between trainings, checkpoints, training factors",
    "compare-runs": "put two audits side by side: models, texts or settings, with paired differences",
    "compare": "put measured runs beside the published tables of arXiv 2606.10703",
    "paper": "run every experiment of the paper, as defined and as released, on the shipped models",
    "verify": "check a checkpoint: its tensors, its logits, and agreement with transformers",
}
"""What each does, in one line. The module of "compare-runs" is `compare_runs`."""


def main(arguments: list[str] | None = None) -> int:
    """The exit code: the command's own, 2 for a command line that names none."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        print(usage(), file=sys.stderr)
        return 2
    first, *rest = arguments
    if first in ("-h", "--help"):
        print(usage())
        return 0
    if first == "--version":
        print(f"hooked-moe {__version__}")
        return 0
    try:
        module = module_of(first)
    except UnknownNameError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        result: int = import_module(module).main(rest)
    except KeyboardInterrupt:  # before the command began: while it was imported
        print("\ninterrupted", file=sys.stderr)
        return 130
    return result


def module_of(command: str) -> str:
    """The module of a command. Raises `UnknownNameError`, which suggests the nearest, for one that does not exist."""
    if command not in COMMANDS:
        raise unknown_name("command", command, COMMANDS, "`hooked-moe --help` lists the commands.")
    return f"hooked_moe.cli.{command.replace('-', '_')}"


def usage() -> str:
    """The commands, one line each."""
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {about}" for name, about in COMMANDS.items())
    return (
        "usage: hooked-moe <command> [options]\n\n"
        "Causal experiments on single experts of mixture-of-experts language models.\n\n"
        f"commands:\n{listed}\n\n"
        "`hooked-moe <command> --help` shows a command's options and examples; `hooked-moe --version` the version."
    )
