"""`hooked-moe`: its table of commands, and what it answers to a command line that names none."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from hooked_moe import __version__
from hooked_moe.cli.main import COMMANDS, main, module_of

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    "audit": "audit",
    "routing_weight_control": "control",
    "progressive_ablation": "progressive",
    "redistribution": "redistribution",
    "prune": "prune",
    "causal_tracing": "trace",
    "compare_published": "compare",
    "compare_runs": "compare-runs",
    "paper": "paper",
    "plan": "plan",
    "verify": "verify",
}


def python(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # as if installed
    return subprocess.run([sys.executable, *arguments], cwd=directory, env=environment, capture_output=True, text=True)


def docstring(command: str) -> str:
    spec = find_spec(module_of(command))
    assert spec is not None
    assert spec.origin is not None
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""


def test_help_lists_every_command_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^  (\S+)  +\S", printed, flags=re.MULTILINE) == list(COMMANDS)
    assert max(map(len, printed.splitlines())) <= 120


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hooked-moe {__version__}\n"


def test_without_a_command_it_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("usage: hooked-moe <command>")


@pytest.mark.parametrize("command", ["audti", "Audit", "verfy", "--audit", "progresive"])
def test_an_unknown_command_is_answered_with_the_nearest(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--model", "tiny-olmoe"]) == 2
    said = capsys.readouterr().err
    assert f"error: unknown command {command!r}; did you mean '" in said
    assert "`hooked-moe --help` lists the commands" in said


def test_a_command_unlike_all_others_is_named_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["x"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'x'. `hooked-moe --help` lists the commands.\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_is_its_docstring_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: hooked-moe {command} ")
    assert docstring(command) in printed
    assert f"\n    hooked-moe {command}" in docstring(command)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["audti"]])
def test_naming_the_commands_loads_no_torch(arguments: list[str]) -> None:
    program = f"import sys; from hooked_moe.cli.main import main; main({arguments}); print('torch' in sys.modules)"
    done = python("-c", program, directory=ROOT)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_the_module_is_the_command(tmp_path: Path) -> None:
    done = python("-m", "hooked_moe", "--version", directory=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"hooked-moe {__version__}\n", "")
    done = python("-m", "hooked_moe", "audit", "--model", "tiny-olmo", directory=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: unknown model 'tiny-olmo'; did you mean 'tiny-olmoe'")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_of_an_experiment_is_its_command(script: str) -> None:
    """Read, not run, which saves seconds: each calls the command, which is imported there, and exits with what it returns."""
    source = (ROOT / "experiments" / f"{script}.py").read_text(encoding="utf-8")
    command = SCRIPTS[script]
    assert "from hooked_moe.cli.main import main\n" in source
    assert source.endswith(f'if __name__ == "__main__":\n    sys.exit(main(["{command}", *sys.argv[1:]]))\n')
    assert f"The same as `hooked-moe {command}`" in source
    assert docstring(command).splitlines()[0] == (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]
