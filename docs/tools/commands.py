"""The page of commands: what each one's `--help` says, at the moment the site is built."""

from __future__ import annotations

import io
from contextlib import redirect_stdout, suppress
from importlib import import_module
from unittest.mock import patch

from hooked_moe.cli.main import COMMANDS, module_of
from hooked_moe.cli.study import STUDIES

INTRODUCTION = """# Every command and option

What `hooked-moe COMMAND --help` says; [Experiments](experiments.md) says which one answers what. `python -m hooked_moe` is the
same as `hooked-moe`, and each command is a script in `experiments/` too."""


def page() -> str:
    parts = [INTRODUCTION]
    for command, about in COMMANDS.items():
        parts.append(f"## {command}\n\n{about[0].upper()}{about[1:]}.\n\n```text\n{help_of(command)}\n```")
        if command == "study":
            parts += [f"### study {study}\n\n```text\n{help_of(command, study)}\n```" for study in STUDIES]
    return "\n\n".join(parts) + "\n"


def help_of(command: str, *arguments: str) -> str:
    """The text of a command's `--help`, for a console of 100 columns."""
    shown = io.StringIO()
    with patch.dict("os.environ", {"COLUMNS": "100"}), redirect_stdout(shown), suppress(SystemExit):
        import_module(module_of(command)).main([*arguments, "--help"])
    return shown.getvalue().strip()
