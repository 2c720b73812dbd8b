"""`hooked-moe plan`: what it counts against what torch counts, its sizes against published ones, and what it says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hooked_moe import HookedMoE
from hooked_moe.cli import device_rates, plan
from hooked_moe.cli.audit_plan import Text, affordable, plan_of, windows_of
from hooked_moe.cli.device_rates import DEVICES
from hooked_moe.cli.plan import Rate
from hooked_moe.components import experts
from hooked_moe.counterfactuals import expert_effects, first_order_effects
from hooked_moe.counterfactuals.engine import fan_out
from hooked_moe.counterfactuals.work import ATTENTION, attended_pairs, first_order_work, parameters, removal_work
from hooked_moe.kernels.cpu.grouped_matmul import grouped_matmul_loop
from hooked_moe.loading.published import published_config, published_names
from hooked_moe.loading.registry import PRETRAINED
from hooked_moe.measurement.budget import Budget

LATENT = {"n_key_value_heads": 4, "qk_norm": None, "clip_qkv": None, "qkv_bias": False, "kv_lora_rank": 12, "d_rotary": 4}
LATENT |= {"d_value": 6, "d_shared": 24, "shared_gate": True, "dense_layers": (0,), "d_mlp": 20}
STATED = {
    "Qwen/Qwen2-57B-A14B": 57.4,
    "deepseek-ai/DeepSeek-V2": 236,
    "mistralai/Mixtral-8x22B-v0.1": 141,
    "zai-org/GLM-4.5": 353,
    "deepseek-ai/DeepSeek-R1": 671,
    "allenai/OLMoE-1B-7B-0125": 6.92,
}
"""Billions of parameters, without layers for multi-token prediction."""


def said(arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert plan.main(arguments.split()) == 0
    return capsys.readouterr().out


class _WholeProgram(contextlib.nullcontext[None]):
    """In place of torch's record of the module at work, which cannot follow gradients that begin at a module's input."""

    parents = frozenset({"Global"})


def counting() -> FlopCounterMode:
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _WholeProgram()
    return counter


@pytest.mark.parametrize("options", [{}, LATENT], ids=["grouped-query", "latent"])
def test_the_work_of_an_audit_is_what_torch_counts(
    options: dict[str, object], make_model: Callable[..., HookedMoE], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention is left out of both, for torch counts whole squares of queries and keys."""
    model = make_model(**options)
    tokens = torch.randint(0, model.cfg.d_vocab, (1, 24))
    monkeypatch.setattr(experts, "grouped_matmul", grouped_matmul_loop)  # torch does not count grouped_mm
    monkeypatch.setattr(fan_out, "window_attention", lambda q, k, v, *rest, **limits: q.new_zeros(*q.shape[:-1], v.shape[-1]))
    with counting() as counter:
        expert_effects(model, tokens)
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    planned = plan_of(model.cfg, Text(documents=1, tokens=24))
    attention = removal_work(model.cfg, 24, model.cfg.moe_layers)[ATTENTION]
    assert counted == pytest.approx(planned.work - planned.first_order - attention, rel=0.01)

    def counted_with(picks: torch.Tensor) -> int:
        with counting() as counter:
            expert_effects(model, tokens, picks=picks)
        return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))

    every = torch.ones(len(model.cfg.moe_layers), 1, 24, model.cfg.experts_per_token, dtype=torch.bool)
    some = every.clone()
    some[..., 0] = False
    rest = planned.with_share(1 / model.cfg.experts_per_token).removals
    spared = counted_with(every) - counted_with(some)
    assert spared == pytest.approx(rest.work - rest.attention, rel=0.05)  # the last token has nothing to predict
    with counting() as counter:
        first_order_effects(model, tokens)
    upwards = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    assert 0.4 * first_order_work(model.cfg, 24) < upwards < 1.1 * first_order_work(model.cfg, 24)


def test_work_grows_with_documents_and_not_with_experts() -> None:
    cfg = published_config("allenai/OLMoE-1B-7B-0924")
    one, ten = (plan_of(cfg, Text(documents=n)) for n in (1, 10))
    assert ten.work == pytest.approx(10 * one.work)
    assert one.n_removals == 512 * 16 * 8
    more = plan_of(cfg.replace(num_experts=128), Text(documents=1))
    assert one.work < more.work < 1.02 * one.work
    assert more.weights > 1.9 * one.weights
    assert plan_of(cfg, Text(1), [15]).removals.blocks == pytest.approx(0, abs=one.work * 1e-3)  # nothing is after the last layer


def test_a_budget_leaves_the_texts_and_the_estimates() -> None:
    plan = plan_of(published_config("allenai/OLMoE-1B-7B-0924"), Text(10))
    tenth = affordable(plan, Budget(share=0.1), lambda plan: plan.work)
    assert tenth.n_removals == pytest.approx(plan.n_removals / 10, abs=1)
    assert tenth.work == pytest.approx(plan.work - 0.9 * plan.removals.work)
    assert (tenth.disk, tenth.memory) == (plan.disk, plan.memory)


def test_a_time_buys_the_share_that_takes_as_long() -> None:
    plan = plan_of(published_config("allenai/OLMoE-1B-7B-0924"), Text(10))
    bought = affordable(plan, Budget(seconds=20.0), lambda plan: plan.work / 1e13)
    assert (bought.work - bought.first_order) / 1e13 == pytest.approx(20)
    assert affordable(plan, Budget(seconds=1e6), lambda plan: plan.work / 1e13).share == 0.99


def test_what_is_narrower_takes_less_memory_or_time() -> None:
    cfg = published_config("allenai/OLMoE-1B-7B-0924").replace(dtype=torch.float32)
    plan, stored = plan_of(cfg), plan_of(cfg.replace(store=torch.bfloat16))
    experts = 16 * 64 * 3 * 2048 * 1024
    assert plan.weights - stored.weights == 2 * experts
    assert plan.streamed_weights - stored.streamed_weights == 2 * experts * 2 // 16
    changed = plan_of(cfg, products=torch.bfloat16)
    assert changed.work == plan.work
    assert 0.9 * plan.removals.work < changed.narrow_work < plan.removals.work
    assert changed.beside > plan.beside  # products of the clean run are kept
    fast = Rate(1e12, 4e12, "", None)
    assert fast.seconds(changed) == pytest.approx(fast.seconds(plan) - 0.75 * changed.narrow_work / 1e12)


def test_long_documents_are_cut_into_windows() -> None:
    cfg = published_config("allenai/OLMoE-1B-7B-0924")
    assert windows_of(cfg, 512) == [512]
    assert windows_of(cfg, 1100) == [512, 512, 76]
    assert windows_of(cfg.replace(n_ctx=100), 250) == [100, 100, 50]


@pytest.mark.parametrize(("length", "window"), [(1, None), (9, None), (9, 9), (9, 4), (9, 1), (3, 8)])
def test_pairs_of_a_token_and_one_that_it_sees(length: int, window: int | None) -> None:
    seen = sum(max(0, t - (window or length) + 1) <= s <= t for t in range(length) for s in range(length))
    assert attended_pairs(length, window) == seen


@pytest.mark.parametrize("options", [{}, LATENT], ids=["grouped-query", "latent"])
def test_parameters_are_those_of_the_model(options: dict[str, object], make_model: Callable[..., HookedMoE]) -> None:
    """But for norms, biases and sinks."""
    model = make_model(**options)
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)
    gates = sum(p.numel() for name, p in model.named_parameters() if "gate" in name and p.ndim == 1)
    assert parameters(model.cfg) == pytest.approx(matrices + gates, rel=0.02)


def test_every_model_with_a_short_name_has_its_sizes_here() -> None:
    assert {entry.hub_id for entry in PRETRAINED} == set(published_names())


@pytest.mark.parametrize("name", STATED)
def test_sizes_of_published_models_are_those_that_their_makers_state(name: str) -> None:
    assert f"{parameters(published_config(name)) / 1e9:.3g}" == f"{STATED[name]:.3g}"


def test_a_plan_says_work_time_memory_and_disk(capsys: pytest.CaptureFixture[str]) -> None:
    text = said("--model olmoe --device h100 --dtype bfloat16", capsys)
    assert "6.9 B parameters, 16 layers of 64 experts, 8 active" in text
    assert "4,718,592 removals" in text
    assert "30% of the 989 TFLOP/s" in text
    assert "an assumption" in text
    assert "fits into 80 GB" in text
    assert "more than 141 GB" in said("--model kimi-k2 --device h200 --dtype bfloat16", capsys)
    assert "in float32" in said("--model olmoe --device h100", capsys)  # as the audit is
    assert "47,186 removals (1%; the others are estimated)" in said("--model olmoe --device h100 --budget 1%", capsys)
    text = said("--model olmoe --device h100 --budget 10s --products bfloat16", capsys)
    assert "the sample 10 s of them, at 30% of the TFLOP/s (67 in float32 and 989 in bfloat16) that its maker" in text


def test_a_rate_is_given_measured_or_published(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "50% of the 100 TFLOP/s given" in said("--model olmoe --tflops 100", capsys)
    assert "20% of the 100 TFLOP/s given" in said("--model olmoe --tflops 100 --utilisation .2", capsys)
    monkeypatch.setattr(plan, "sustained_rate", lambda dtype, device: 2e12)
    assert "50% of the 2 TFLOP/s that torch.mm keeps up here" in said("--model tiny-olmoe --device cpu", capsys)
    assert "outside of products" in said("--model tiny-olmoe --measure", capsys)
    assert DEVICES["h100"].peak(torch.float32) == 67e12


def test_products_are_timed() -> None:
    assert device_rates.sustained_rate(torch.float32, torch.device("cpu"), seconds=0.001, size=32) > 1e6
    assert device_rates.memory_of(torch.device("cpu")) > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model olmo", "did you mean 'olmoe'"),
        ("--model allenai/OLMoE-1B-7B-0925", "Its sizes are not in the package"),
        ("--model olmoe --device h10", "did you mean 'h100'"),
        ("--model olmoe --device h100 --measure", "--measure is for a device of this machine"),
        ("--model olmoe --tflops 3 --measure", "leave one out"),
        ("--model olmoe --tflops -3", "--tflops -3.0: give a positive number"),
        ("--model olmoe --tflops nan", "--tflops nan: give a positive number"),
        ("--model olmoe --device h100 --utilisation 30", "--utilisation 30.0: give a share"),
        ("--model olmoe --device h100 --layers 16", "layer 16 is out of range"),
        ("--model olmoe --device h100 --tokens 1", "give at least 1 document of 2 tokens"),
        ("--model deepseek-v3 --device h100 --layers 0", "layer 0 is dense"),
        ("--model olmoe --device h100 --dtype bfloat16 --products bfloat16", "no narrower than --dtype bfloat16: leave it out"),
        ("--model olmoe --device h100 --dtype float16 --store float16", "no narrower than --dtype float16: leave it out"),
        ("--model olmoe --device h100 --budget 3", "--budget '3': give a share"),
        ("--model olmoe --device h100 --budget 1s", "1 s are too few for 200 removals: the products of the texts alone take 5"),
    ],
)
def test_what_cannot_be_planned_is_answered(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(arguments.split()) == 1
    assert message in capsys.readouterr().err


def test_a_directory_needs_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Path(plan.__file__).parents[1] / "pretrained" / "tiny-qwen-moe" / "config.json"
    (tmp_path / "config.json").write_bytes(config.read_bytes())
    assert "4.6 M parameters, 6 layers of 60 experts" in said(f"--model {tmp_path} --device h100", capsys)
