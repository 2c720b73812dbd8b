"""What commands answer to input that no command can use: one line that says what was wrong, and never a traceback."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hooked_moe import HookedMoE
from hooked_moe.checks import expanded_path
from hooked_moe.cli import console
from hooked_moe.cli.main import COMMANDS, main
from hooked_moe.cli.options import choose_device
from hooked_moe.counterfactuals.engine.memory import parse_bytes
from hooked_moe.kernels.cuda import nvrtc
from hooked_moe.loading.spill import Spill, spill_directory
from hooked_moe.paper.comparison import compare, read_run
from hooked_moe.tables import write_checked_json

ROOT = Path(__file__).resolve().parents[2]
MEASURING = ("audit", "control", "progressive", "redistribution", "prune")
pytestmark = pytest.mark.usefixtures("unchecked")


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The last line on stderr of a command that fails."""
    try:
        code = main(list(arguments))
    except SystemExit as end:  # the parser's way
        code = int(end.code or 0)
    assert code in (1, 2)
    return capsys.readouterr().err.splitlines()[-1]


# --- numbers and options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("digits", [400, 5000])  # Python itself reads 4,300
@pytest.mark.parametrize("sign", ["", "-"])
@pytest.mark.parametrize(
    ("command", "option"),
    [
        *((command, option) for command in MEASURING for option in ("--context", "--documents", "--memory")),
        *(("prune", option) for option in ("--random", "--evaluate", "--evaluate-tokens", "--shares")),
        *(("paper", option) for option in ("--documents", "--positions")),
        ("verify", "--tokens"),
        ("audit", "--device"),
    ],
)
def test_a_number_of_many_digits_is_named_in_a_short_line(
    command: str, option: str, sign: str, digits: int, capsys: pytest.CaptureFixture[str]
) -> None:
    line = answer(capsys, command, f"{option}={sign}{'9' * digits}")
    assert option in line
    assert len(line) < 500


def test_whole_numbers_are_read_as_they_were_and_no_others() -> None:
    assert [console.int_or_none(text) for text in ("0", "12", " 4", "-3", "+5", str(2**31 - 1))] == [0, 12, 4, -3, 5, 2**31 - 1]
    for text in ("", "1.0", "1e3", "²", "one", "--1", str(2**31), "9" * 400, "1_000"):
        assert console.int_or_none(text) is None, text


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("plan", "trace", "study", "compare-runs")])
def test_two_dashes_are_no_value(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    option = "--results" if command != "verify" else "--json"
    assert f"argument {option}: '--' is no value" in answer(capsys, command, f"{option}=--")


@pytest.mark.parametrize("name", ["hpu", "privateuseone", "mtia", "xpu", "maia", "meta", "", "cpu:0:0", "toaster", "9" * 400])
def test_a_device_that_this_pytorch_cannot_use_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"--device .* cannot be used here \(.*\); leave it out, or give cpu"):
        choose_device(name)


@pytest.mark.parametrize("amount", ["garbage", "", "4 GBit", "-4GB", "0", 0, -1, "9" * 400, "9" * 400 + "GB", 10**400, 1.5, True])
def test_a_memory_budget_that_is_none_is_named(amount: Any) -> None:
    with pytest.raises(ValueError, match="a memory budget is a number of bytes, or text such as '4GB' or '512MiB', not"):
        parse_bytes(amount)


def test_memory_is_checked_when_nothing_is_left_to_measure_too(capsys: pytest.CaptureFixture[str]) -> None:
    for command in MEASURING:  # before a model is loaded
        assert "--memory 'garbage': a memory budget is" in answer(capsys, command, "--memory", "garbage", "--model", "nowhere")


# --- what a run may hold --------------------------------------------------------------------------------------------------


def run_of(directory: Path, **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    write_checked_json({"model": {"config": config}, "protocol": {"name": "as_released"}}, directory / "manifest.json")
    return directory


def test_a_run_of_one_layer_is_compared(tmp_path: Path) -> None:
    directory = run_of(tmp_path, model_type="olmoe", n_layers=1)
    (directory / "progressive.csv").write_text("layer,order,removed,mean,median,p95\n0,descending,7,0.4,0.1,2.0\n")
    compared = compare(read_run(directory))
    assert {one.layer for one in compared if one.published.table == "Table 9"} == {0}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "holds no JSON object"),
        ("{", "is not readable JSON"),
        ('{"model": {}}', "has no checksum: an earlier version or another program wrote it"),
        ('{"model": {}, "checksum": "0"}', "was changed since it was written"),
        ({}, "does not say in model.config which model_type"),
        ({"model": 3}, "does not say in model.config"),
        ({"model": {"config": {"model_type": "olmoe", "n_layers": "six"}}}, "does not say in model.config"),
        ({"model": {"config": {"model_type": ["olmoe"], "n_layers": 6}}}, "does not say in model.config"),
    ],
)
def test_a_manifest_of_other_types_is_named(
    content: str | dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(content) if isinstance(content, str) else write_checked_json(content, path)
    line = answer(capsys, "compare", str(tmp_path))
    assert said in line
    assert str(tmp_path / "manifest.json") in line


def test_a_table_that_lacks_columns_or_is_none_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = run_of(tmp_path, model_type="olmoe", n_layers=6)
    (directory / "cells.csv").write_text("layer\n0\n")
    assert f"{directory / 'cells.csv'} lacks column ranking, d," in answer(capsys, "compare", str(directory))
    (directory / "cells.csv").write_text("a,b\n1\n")
    assert f"{directory / 'cells.csv'} cannot be read" in answer(capsys, "compare", str(directory))


# --- directories -----------------------------------------------------------------------------------------------------------


def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def expanduser(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", expanduser)
    monkeypatch.setattr(Path, "home", classmethod(expanduser))


def test_without_a_home_directory_paths_that_need_one_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], make_model: Callable[..., HookedMoE]
) -> None:
    no_home(monkeypatch)
    said = "begins with a home directory that is not known: set HOME, or give the path itself"
    assert said in answer(capsys, "audit", "--model", "~/model")
    assert said in answer(capsys, "audit", "--corpus", "~/corpus.txt")
    with pytest.raises(ValueError, match=said):
        make_model(n_layers=1, model_type="olmoe").save_pretrained("~/model")
    with pytest.raises(ValueError, match=said):
        expanded_path("~nobody/x")


def test_without_a_home_directory_kernels_are_compiled_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    no_home(monkeypatch)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(nvrtc, "compiled", lambda *_: b"code")
    assert nvrtc.cache_directory() is None
    with pytest.warns(RuntimeWarning, match=r"compiled kernels cannot be kept \(there is no home directory\).*XDG_CACHE_HOME"):
        assert nvrtc.machine_code("route.cu", {}, "sm_90") == b"code"


class FullFile(io.BytesIO):
    """A file on a full disk."""

    def write(self, _: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_directory_of_waiting_streams_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = r"residual streams that wait between layers cannot be kept in .*: No space left on device; free .* in TMPDIR"
    waiting = Spill(0, tmp_path).claim(1000)
    assert waiting is not None
    waiting._shared.file = FullFile()
    with pytest.raises(OSError, match=said) as refused:
        waiting.put(torch.zeros(10))
    assert refused.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(refused.value)
    waiting._shared.file = io.BytesIO(b"short")
    with pytest.raises(OSError, match="cannot be kept"):
        waiting.get(torch.zeros(10))
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: FullFile().write(b""))
    with pytest.raises(OSError, match=said):
        Spill(0, tmp_path).claim(1000)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "nowhere")])
    with pytest.raises(FileNotFoundError, match=r"no directory for temporary files.*name another in TMPDIR"):
        spill_directory(None)


# --- consoles and interrupts -------------------------------------------------------------------------------------------------


def process(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    variables = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)} | environment
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=variables, stdout=pipe, stderr=pipe, text=True)


def test_a_page_with_signs_prints_on_an_ascii_console() -> None:
    program = "from benchmarks.tables import Table, show; show([Table('t', 'm', ['a'], [['1 ± 2 µs']])])"
    done = process("-c", program, PYTHONIOENCODING="ascii")
    out, err = done.communicate()
    assert (done.returncode, err) == (0, "")
    assert "1 ? 2 ?s" in out


def test_a_reader_who_has_gone_ends_a_command_without_a_word() -> None:
    program = (
        "import sys; from hooked_moe.cli.console import run_command\n"
        "sys.exit(run_command(lambda _: [print('line ' * 100) for _ in range(10_000)] and None, None))"
    )
    child = process("-c", program)
    assert child.stdout is not None
    child.stdout.readline()
    child.stdout.close()
    assert child.stderr is not None
    assert child.stderr.read() == ""
    assert child.wait() == console.CLOSED_PIPE


INTERRUPTED = """
import os, signal, sys, time
from hooked_moe.cli.console import run_command
from hooked_moe.executors import in_parallel

def measure(document):
    os.write(1, b"measuring\\n")  # in one piece: two threads' `print` may put both words before both ends of line
    time.sleep(float(sys.argv[1]))

signal.signal(signal.SIGINT, signal.default_int_handler)  # which `nohup` and a shell's `&` may have switched off
sys.exit(run_command(lambda _: list(in_parallel(measure, range(8), 2)), None))
"""
"""A command whose threads go on for a while, as documents do."""


def measuring(seconds: float) -> subprocess.Popen[str]:
    child = process("-c", INTERRUPTED, str(seconds))
    assert child.stdout is not None
    assert child.stdout.readline() == "measuring\n"
    return child


def test_ctrl_c_leaves_one_line_with_threads_too() -> None:
    child = measuring(0.5)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate()
    assert (child.returncode, err) == (130, "\ninterrupted; the same command resumes from here\n")


def test_another_ctrl_c_ends_a_command_at_once_and_without_a_word() -> None:
    child = measuring(600)
    while child.poll() is None:
        child.send_signal(signal.SIGINT)
        time.sleep(0.2)
    _, err = child.communicate()
    assert (child.returncode, err) == (-signal.SIGINT, "")


def test_an_interrupt_while_a_command_is_imported_leaves_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("hooked_moe.cli.main.import_module", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["audit"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_an_interrupted_experiment_ends_the_paper_with_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from hooked_moe.cli import paper, progressive

    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(progressive, "progressive", interrupted)
    assert paper.main(["--models", "tiny-olmoe", "--documents", "2"]) == 130
    assert capsys.readouterr().err == "\ninterrupted; the same command resumes from here\n"


def test_a_message_of_many_lines_worth_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: Any) -> None:
        raise ValueError("begin" + "x" * 10**6 + "end")

    assert console.run_command(fail, None) == 1  # type: ignore[arg-type]
    line = capsys.readouterr().err
    assert len(line) < console.MOST_OF_AN_ERROR + 20
    assert line.startswith("error: begin")
    assert line.endswith("...\n")
    assert json.dumps(line)
