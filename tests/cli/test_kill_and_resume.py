"""Every experiment, killed at random moments and given again: it ends with the bytes of one that nothing disturbed."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hooked_moe import HookedMoE
from hooked_moe.cli.main import main
from hooked_moe.report.figures.drawing import Drawing
from tests.support.kills import Stage, contents, moments_of, with_kills
from tests.support.number_text import number_reader, write_corpus

pytestmark = pytest.mark.usefixtures("unchecked")  # other tests check the types of what is killed here

SHORT, LONG, MANY = (14, 16, 11), (60, 70, 65), (14, 16, 15, 9, 20, 16, 12, 20, 16, 16)
TWO_STAGES = (
    ("audit", "--corpus", "short.jsonl", "--run", "run", "--positions", "20"),
    ("audit", "--corpus", "short.jsonl", "--run", "run", "--scope", "both"),
)
OTHERS = (
    ("control", "--corpus", "short.jsonl", "--run", "run"),
    ("progressive", "--corpus", "short.jsonl", "--run", "run", "--positions", "9"),
    ("redistribution", "--corpus", "short.jsonl", "--run", "run"),
)
STREAMED = (
    ("audit", "--corpus", "short.jsonl", "--run", "streamed", "--stream", "--positions", "20"),
    ("audit", "--corpus", "short.jsonl", "--run", "streamed", "--stream", "--scope", "both", "--memory", "200MB"),
)
PRUNED = (
    ("prune", "--corpus", "many.jsonl", "--shares", "0.34", "--criteria", "reap", "--random", "1"),
    ("prune", "--corpus", "many.jsonl", "--shares", "0.5", "--criteria", "table", "--random", "1", "--evaluate", "5"),
)
RELEASED = (
    ("audit", "--corpus", "long.jsonl", "--protocol", "as_released", "--positions", "4"),
    ("control", "--corpus", "long.jsonl", "--protocol", "as_released", "--positions", "5"),
    ("redistribution", "--corpus", "long.jsonl", "--protocol", "as_released"),
    ("progressive", "--corpus", "long.jsonl", "--protocol", "as_released", "--positions", "3"),
)
PAPER = (("paper", "--corpus", "long.jsonl", "--positions", "4"),)


@pytest.fixture
def workplace(make_model: Callable[..., HookedMoE], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a model and corpora; figures are drawn as empty pictures, which saves seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(Drawing, "render", lambda self, *kinds, **_: dict.fromkeys(kinds, b"<svg/>"))
    number_reader(make_model, n_layers=1, n_ctx=64, d_head=8, model_type="olmoe").save_pretrained(tmp_path / "model")
    for name, lengths in (("short", SHORT), ("long", LONG), ("many", MANY)):
        write_corpus(tmp_path / f"{name}.jsonl", lengths)
    return tmp_path


def stages(lines: Sequence[Sequence[str]], results: Path) -> list[Stage]:
    """The command lines, with results of their own."""
    options = {"paper": ("--models", "model")}
    return [
        functools.partial(main, [name, *rest, *options.get(name, ("--model", "model")), "--results", str(results)])
        for name, *rest in lines
    ]


def assert_kills_change_nothing(lines: Sequence[Sequence[str]], kills: int, seed: int, workplace: Path) -> None:
    moments = [moments_of(stage) for stage in stages(lines, workplace / "undisturbed")]
    killed = with_kills(stages(lines, workplace / "killed"), moments, kills, random.Random(seed))
    assert killed >= kills // 2
    undisturbed, resumed = contents(workplace / "undisturbed"), contents(workplace / "killed")
    assert resumed.keys() == undisturbed.keys()
    assert [name for name, content in undisturbed.items() if resumed[name] != content] == []


@pytest.mark.parametrize(
    ("lines", "kills"), [(TWO_STAGES, 12), ((TWO_STAGES[0], *OTHERS), 4), (RELEASED, 8)], ids=["two stages", "others", "released"]
)
def test_24_kills_change_nothing(lines: Sequence[Sequence[str]], kills: int, workplace: Path) -> None:
    assert_kills_change_nothing(lines, kills, 0, workplace)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("lines", "kills"),
    [((*TWO_STAGES, *OTHERS), 20), (STREAMED, 10), (PRUNED, 8), (RELEASED, 6), (PAPER, 8)],
    ids=["defined", "streamed", "pruned", "released", "paper"],
)
def test_200_kills_change_nothing(lines: Sequence[Sequence[str]], kills: int, seed: int, workplace: Path) -> None:
    assert_kills_change_nothing(lines, kills, seed + 1, workplace)
