"""Progress bars: off unless asked for, complete at the end, and rates of what is done now."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import tqdm.auto

from hooked_moe import HookedMoE, expert_effects
from hooked_moe.circuits import (
    attribution_patch_experts,
    circuit,
    get_act_patch_expert,
    get_act_patch_router,
    path_patch,
    router_flips,
)
from hooked_moe.counterfactuals import (
    At,
    LogitDifference,
    expert_means,
    first_order_effects,
    mask_effects,
    progressive_effects,
    token_effects,
)
from hooked_moe.progress import progress_bar
from hooked_moe.routing import routing_table, top_tokens

ROOT = Path(__file__).resolve().parents[1]
TOKENS = torch.arange(14).reshape(2, 7) % 11
METRIC = At(-1, LogitDifference(3, 5))

LONG_CALLS: dict[str, Callable[..., Any]] = {
    "expert_effects": lambda m, **o: expert_effects(m, TOKENS, **o),
    "expert_effects, sequences": lambda m, **o: expert_effects(m, TOKENS, scope="sequence", **o),
    "expert_effects, in parts": lambda m, **o: expert_effects(m, TOKENS, memory_budget="68MB", **o),
    "progressive_effects": lambda m, **o: progressive_effects(m, TOKENS, **o),
    "mask_effects": lambda m, **o: mask_effects(m, TOKENS, {1: torch.ones(1, 6, dtype=torch.bool)[:, None, None]}, **o),
    "token_effects": lambda m, **o: token_effects(m, TOKENS, lambda clean, at: clean.resid_post[None], **o),
    "first_order_effects": lambda m, **o: first_order_effects(m, TOKENS, **o),
    "expert_means": lambda m, **o: expert_means(m, [TOKENS, TOKENS], **o),
    "get_act_patch_expert": lambda m, **o: get_act_patch_expert(m, TOKENS, TOKENS.flip(1), METRIC, **o),
    "get_act_patch_expert, logits": lambda m, **o: get_act_patch_expert(
        m, TOKENS, TOKENS.flip(1), lambda logits: logits[:, -1, 3], positions=[5], **o
    ),
    "get_act_patch_router": lambda m, **o: get_act_patch_router(m, TOKENS, TOKENS.flip(1), METRIC, **o),
    "attribution_patch_experts": lambda m, **o: attribution_patch_experts(m, TOKENS, TOKENS.flip(1), METRIC, "ig", **o),
    "path_patch": lambda m, **o: path_patch(m, TOKENS, TOKENS.flip(1), ("head", 0, 0), ["logits", ("router", 1)], METRIC, **o),
    "router_flips": lambda m, **o: router_flips(m, TOKENS, TOKENS.flip(1), **o),
    "circuit": lambda m, **o: circuit(m, TOKENS, TOKENS.flip(1), METRIC, k=2, **o),
    "routing_table": lambda m, **o: routing_table(m, TOKENS, **o),
    "top_tokens": lambda m, **o: top_tokens(m, TOKENS, n=2, **o),
}


@pytest.fixture
def model(make_model: Callable[..., HookedMoE]) -> HookedMoE:
    return make_model(n_layers=2)


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every bar that is made."""
    made: list[Any] = []

    class Kept(tqdm.auto.tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options, file=io.StringIO())
            self.shown = not self.disable  # which closing changes
            made.append(self)

    monkeypatch.setattr("hooked_moe.progress.tqdm", Kept)
    return made


@pytest.mark.parametrize("name", LONG_CALLS)
def test_a_long_call_shows_a_bar_that_ends_complete_and_only_if_asked(name: str, model: HookedMoE, bars: list[Any]) -> None:
    quiet = LONG_CALLS[name](model)
    assert not any(bar.shown for bar in bars)
    bars.clear()
    shown = LONG_CALLS[name](model, progress=True)
    shown_bars = [bar for bar in bars if bar.shown]
    assert shown_bars
    for bar in shown_bars:
        assert bar.n == bar.total > 0
    assert type(shown) is type(quiet)


def test_parts_are_counted(model: HookedMoE, bars: list[Any]) -> None:
    expert_effects(model, TOKENS, progress=True)
    expert_effects(model, TOKENS, memory_budget="68MB", progress=True)
    whole, in_parts = (bar.total for bar in bars)
    assert whole == model.cfg.n_layers
    assert in_parts % model.cfg.n_layers == 0


def test_what_was_there_before_does_not_count_into_the_rate() -> None:
    out = io.StringIO()
    with progress_bar(1000, "measuring", "tok", shown=True, done=990, file=out, mininterval=0) as bar:
        time.sleep(0.05)
        bar.update(1)
        values = bar.format_dict
    assert (values["n"], values["initial"]) == (991, 990)
    text = bar.format_meter(**values | {"rate": None})
    rate = (
        float(text.split("tok/s")[0].rsplit(" ", 1)[1])
        if "tok/s" in text
        else 1 / float(text.split("s/tok")[0].rsplit(" ", 1)[1])
    )
    assert rate < 25  # one token in 0.05 s, not 991


@pytest.mark.parametrize("script", ["audit", "verify"])
def test_a_script_that_is_interrupted_while_it_imports_says_so_in_one_line(script: str) -> None:
    """The import of torch is where a second of every start goes: Ctrl-C there, as the interpreter raises it."""
    code = (
        "import builtins, runpy, sys\n"
        "real = builtins.__import__\n"
        "def interrupted(name, *args, **options):\n"
        "    if name == 'torch':\n"
        "        raise KeyboardInterrupt\n"
        "    return real(name, *args, **options)\n"
        "builtins.__import__ = interrupted\n"
        f"sys.argv = ['{script}', '--model', 'tiny-olmoe']\n"
        f"runpy.run_path('experiments/{script}.py', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip(), done.stdout) == (130, "interrupted", "")
