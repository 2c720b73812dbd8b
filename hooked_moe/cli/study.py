"""Studies of several models of one architecture: what training does, rather than what one model is.

    hooked-moe study grafts         # which layers and parts carry the difference between two trainings
    hooked-moe study checkpoints    # how an audit's numbers grow with training
    hooked-moe study factors        # which training choice makes an expert matter: the shipped responses, analysed

`hooked-moe study <name> --help` shows a study's options and examples; docs/studies.md says what each answers.
"""

from __future__ import annotations

import argparse
from types import ModuleType

from hooked_moe.cli import study_checkpoints, study_factors, study_grafts
from hooked_moe.cli.console import parser_of, run_command

STUDIES: dict[str, ModuleType] = {"grafts": study_grafts, "checkpoints": study_checkpoints, "factors": study_factors}


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("study", __doc__)
    commands = parser.add_subparsers(dest="study", required=True, metavar="name")
    for name, module in STUDIES.items():
        about = (module.__doc__ or "").splitlines()[0]
        own = commands.add_parser(
            name, help=about, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(own)
    args = parser.parse_args(arguments)
    return run_command(STUDIES[args.study].run, args)
