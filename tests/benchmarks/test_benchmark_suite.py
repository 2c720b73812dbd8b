"""Every benchmark runs, prints the rows it should, and finds what it compares to be equal. Nothing here is timed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import all as suite
from benchmarks import (
    checkpoints,
    circuits,
    executors,
    forward,
    peers,
    products,
    removals,
    roofline,
    routing,
    scaling,
    streaming,
    tracing,
)
from benchmarks.tables import Table
from benchmarks.timing import ratio, summary, timed
from hooked_moe import HookedMoE
from hooked_moe.components import experts
from hooked_moe.counterfactuals import expert_effects
from hooked_moe.counterfactuals.engine import fan_out
from hooked_moe.counterfactuals.work import ATTENTION, removal_work
from hooked_moe.kernels.cpu.grouped_matmul import grouped_matmul_loop

pytestmark = pytest.mark.usefixtures("unchecked")  # as the scripts run it
OTHERS = [name for name, package in (("TransformerLens", "transformer-lens"), ("nnsight", "nnsight")) if peers.installed(package)]


def column(table: Table, name: str) -> list[str]:
    return [row[table.header.index(name)] for row in table.rows]


@pytest.mark.parametrize(
    "script",
    [circuits, tracing, removals, forward, roofline, products, scaling, streaming, executors, routing, suite],
    ids=lambda script: script.__name__,
)
def test_help_has_examples(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        script.main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert f"python -m {script.__name__} --small" in printed
    assert "--threads" in printed


def test_removals_agree_with_those_of_every_peer(capsys: pytest.CaptureFixture[str]) -> None:
    (table,) = removals.main(["--small", "--contexts", "16", "24"])
    assert str(table) in capsys.readouterr().out
    for context in ("16", "24"):
        rows = [row for row in table.rows if row[0] == context]
        assert [row[1] for row in rows if row[2].endswith("(best)")] == ["transformers", *OTHERS]
        assert {row[1] for row in rows} == {"hooked_moe", "transformers", "TransformerLens", "nnsight"}
        assert rows[0][2] == str((int(context) - 1) * 2 * 2)  # slots and layers
    differences = [float(cell) for cell in column(table, "largest difference, nats") if cell]
    assert len(differences) >= 2 * (1 + len(OTHERS))
    assert 0 <= max(differences) <= removals.TOLERANCE


def test_routing_tables_have_the_experts_of_every_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    table, analyses = routing.main(["--small"])
    assert column(table, "by") == ["hooked_moe", "hooks, arrays", "hooks, rows"]
    assert min(map(float, column(table, "same expert"))) > 0.999
    assert len(analyses.rows) == 5
    monkeypatch.setitem(routing.CANDIDATES, "hooks, rows", lambda model, corpus: routing.with_rows(model, corpus) + 1)
    with pytest.raises(ValueError, match=r"hooks, rows finds the same expert in 0\.0000 of the rows only"):
        routing.main(["--small"])


@pytest.mark.slow
def test_audits_in_threads_and_on_ray_leave_the_same_bytes() -> None:
    (table,) = executors.main(["--small", "--threads", "1"])
    assert len(table.rows) == 6
    for verdict in filter(None, column(table, "same tables")):
        equal, of = map(int, verdict.split(" of "))  # with "others to" there would be more to read
        assert equal == of > 5


def test_tables_that_differ_are_found_out(tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("one", "same", "near", "far", "none")]
    for place, shift in zip(places, (0.0, 0.0, 1e-6, 1e-3, None), strict=True):
        place.mkdir()
        if shift is not None:
            pq.write_table(pa.table({"layer": [0, 1], "kl": [0.5, float("nan")]}), place / "a.parquet")
            pq.write_table(pa.table({"kl": [0.5 + shift, float("nan")]}), place / "b.parquet")
    assert executors.same_tables(places[0], places[1]) == "2 of 2"
    assert executors.same_tables(places[0], places[2]) == "1 of 2; others to 1.0e-06"
    with pytest.raises(ArithmeticError, match=r"b\.parquet: numbers differ by 0\.001"):
        executors.same_tables(places[0], places[3])
    with pytest.raises(ArithmeticError, match="do not have the same tables"):
        executors.same_tables(places[0], places[4])


def test_a_removal_that_is_not_exact_is_found_out() -> None:
    args = removals.parse(removals.options(), ["--small"], peers.SMALL)
    reference = peers.random_olmoe(args, 16)
    tokens = torch.randint(0, args.vocabulary, (1, 16))
    effects = expert_effects(peers.ours(reference), tokens)
    other = peers.by_transformers(reference)
    assert removals.largest_difference(other, effects, tokens, size=3) <= removals.TOLERANCE
    wrong = replace(effects, delta_loss=effects.delta_loss + 1e-3)
    with pytest.raises(ArithmeticError, match="removals differ by"):
        removals.largest_difference(other, wrong, tokens, size=3)


def test_patches_agree_with_those_of_every_peer() -> None:
    patches, attribution = circuits.main(["--small"])
    names = ["hooked_moe", "hooked_moe, a hook", "hooked_moe, hooks in a batch", "transformers, a forward hook"]
    assert column(patches, "by")[:4] == names
    assert len(patches.rows) == 2 * (4 + 2 * ("TransformerLens" in OTHERS) + ("nnsight" in OTHERS))
    differences = [float(cell) for cell in column(patches, "largest difference, logits") if cell]
    assert 0 <= max(differences) <= circuits.TOLERANCE
    assert column(attribution, "what") == ["two forwards and a backward", "atp", "ig, 5 steps", "exact"]


def test_a_patch_that_is_not_exact_is_found_out() -> None:
    given = circuits.task(HookedMoE.from_pretrained("tiny-olmoe").eval(), 6)
    found = circuits.get_act_patch_expert(given.model, given.corrupt, given.clean, given.metric)
    sample = circuits.patches_of(given, found, 2)
    wrong = [patch._replace(effect=patch.effect + 1e-3) for patch in sample]
    with pytest.raises(ArithmeticError, match="patches differ by"):
        circuits.largest_difference(given, circuits.by_hooks(given), wrong)


def test_tracing_agrees_with_a_forward_for_each_patch() -> None:
    (table,) = tracing.main(["--small"])
    assert column(table, "patched") == list(tracing.PATCHED)
    assert 0 <= max(map(float, column(table, "largest difference, logits"))) <= tracing.TOLERANCE
    model = HookedMoE.from_pretrained("tiny-olmoe-facts").eval()
    found = tracing.measure(model, tracing.batch_of(model, 2, 6, [5]), ["logit_difference"], necessity=False)
    wrong = replace(found, rescue=found.rescue + 1e-3)
    with pytest.raises(ArithmeticError, match="patches differ by"):
        tracing.largest_difference(model, wrong, tracing.patches_of(model, found, 2))


def test_forward_compares_dtypes_batches_and_caches() -> None:
    plain, cache = forward.main(["--small"])
    models = ["hooked_moe", "transformers, sdpa and grouped_mm", "transformers, eager"]
    expected = [[dtype, batch, model] for dtype in ("float32", "bfloat16") for batch in ("1", "2") for model in models]
    assert [list(row[:3]) for row in plain.rows] == expected
    exact = [float(row[-1]) for row in plain.rows if row[0] == "float32" and row[-1]]
    assert len(exact) == 4
    assert max(exact) <= forward.TOLERANCE
    assert column(cache, "model") == ["hooked_moe", "hooked_moe, without those that TransformerLens has not", "TransformerLens"]
    whole, alike, _ = (int(number) for number in column(cache, "activations"))
    assert whole > alike > 40


def test_kernels_of_transformers_are_the_ones_asked_for() -> None:
    args = removals.parse(removals.options(), ["--small"], peers.SMALL)
    reference = peers.random_olmoe(args, 8)

    def operations(kernels: tuple[str, str]) -> set[str]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            peers.forward(peers.with_kernels(reference, kernels), torch.arange(8)[None])
        return {event.name for event in profile.events() or []}

    assert {"aten::scaled_dot_product_attention", "aten::_grouped_mm"} <= operations(peers.FAST)
    assert not {"aten::scaled_dot_product_attention", "aten::_grouped_mm"} & operations(peers.EAGER)


def test_roofline_has_every_phase_and_leaves_the_model_as_it_was() -> None:
    before = experts.Experts.project_in
    totals, phases = roofline.main(["--small"])
    assert experts.Experts.project_in is before
    assert column(totals, "model in") == ["float32", "bfloat16"]
    assert column(phases, "phase") == list(roofline.PHASES)
    shares = [float(cell.rstrip("%")) for cell in column(phases, "of the time")]
    assert sum(shares) == pytest.approx(100, abs=1)
    assert min(shares) >= 0


@pytest.mark.parametrize("random", [[], ["--random"]])
def test_products_are_in_four_forms_and_half_of_the_change_is_nearer_than_half_of_all(random: list[str]) -> None:
    (table,) = products.main(["--small", *random])
    assert column(table, "form") == ["float32", "products in bfloat16", "products in float16", "all in bfloat16"]
    exact, bfloat16, float16, all_in_bfloat16 = [float(cell) for cell in column(table, "off by, median")]
    assert exact == 0 <= float16 <= bfloat16 < all_in_bfloat16


def test_clocks_give_each_second_to_the_innermost_function() -> None:
    class Both:
        def outer(self) -> None:
            self.inner()
            self.inner()

        def inner(self) -> None:
            torch.randn(300, 300) @ torch.randn(300, 300)

    originals = Both.outer, Both.inner
    with roofline.clocked([(Both, "outer", "out"), (Both, "inner", "in")]) as spent:
        Both().outer()
    assert spent["in"] > spent["out"] > 0
    assert (Both.outer, Both.inner) == originals


@pytest.mark.parametrize("layers", [[0, 1, 2], [1]], ids=["all", "one"])
@pytest.mark.parametrize("family", ["olmoe", "deepseek"])
def test_flops_are_those_that_torch_counts(
    family: str, layers: list[int], make_model: Callable[..., HookedMoE], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for attention: torch counts whole squares of queries and keys."""
    latent = {"n_key_value_heads": 4, "qk_norm": None, "clip_qkv": None, "qkv_bias": False, "kv_lora_rank": 12, "d_rotary": 4}
    latent |= {"d_value": 6, "d_shared": 24, "shared_gate": True, "dense_layers": (0,), "d_mlp": 20}
    layers = [layer for layer in layers if family == "olmoe" or layer > 0]
    model = make_model(**(latent if family == "deepseek" else {}))
    tokens = torch.randint(0, model.cfg.d_vocab, (1, 9))
    monkeypatch.setattr(experts, "grouped_matmul", grouped_matmul_loop)  # torch does not count grouped_mm
    monkeypatch.setattr(fan_out, "window_attention", lambda q, k, v, *rest, **limits: q.new_zeros(*q.shape[:-1], v.shape[-1]))
    with FlopCounterMode(display=False) as counter:
        expert_effects(model, tokens, layers)
    products = {str(op): count for op, count in counter.get_flop_counts()["Global"].items() if "attention" not in str(op)}
    work = removal_work(model.cfg, 9, layers)
    assert sum(products.values()) == sum(work.values()) - work[ATTENTION]


def test_flops_of_attention_count_each_pair_of_a_token_and_one_before_it(make_model: Callable[..., HookedMoE]) -> None:
    cfg = make_model().cfg
    runs = 3 + 3 * (1 + 2)  # the clean run in three layers, three variants from layer 0 on in two, those from layer 1 on in one
    pairs = sum(1 for token in range(9) for _ in range(token + 1))
    assert removal_work(cfg, 9, [0, 1, 2])[ATTENTION] == runs * pairs * cfg.n_heads * 2 * (cfg.d_head + cfg.d_head)


def test_scaling_has_an_exponent_for_every_quantity() -> None:
    exponents, points = scaling.main(["--small"])
    assert column(exponents, "quantity") == ["context", "layers", "experts", "documents"]
    assert len(points.rows) == 12
    slope, error = scaling.exponent([1, 2, 4, 8], [3.0, 12.0, 48.0, 192.0])
    assert (slope, error) == (pytest.approx(2), pytest.approx(0, abs=1e-6))
    work = [float(cell) for cell in column(exponents, "of the work")]
    assert work[3] == 1
    assert 1 <= work[0] <= 2


def test_a_streamed_audit_finds_the_same_effects_in_five_reads_of_the_checkpoint(tmp_path: Path) -> None:
    (table,) = streaming.main(["--small", "--precisions", "float32", "--dir", str(tmp_path), "--memory-limit", "8GB"])
    assert column(table, "weights") == ["streamed", "in memory"]
    streamed, in_memory = (float(cell) for cell in column(table, "reads"))
    assert in_memory == 1
    assert 1 < streamed <= 5  # of blocks, five; what is outside of them is read once
    assert all(float(cell) > 0 for cell in column(table, "of the checkpoint"))
    known = {"float32": np.zeros(3)}
    streaming.check_equal("float32", known, np.full(3, 1e-6))
    with pytest.raises(ArithmeticError, match=r"the effects differ by 0\.001 nats in float32"):
        streaming.check_equal("float32", known, np.array([0.0, 1e-3, 0.0]))


def test_max_layers_are_those_of_the_model_or_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = streaming.parse(streaming.options(), ["--layers", "max", "--dir", str(tmp_path), "--small"], streaming.SMALL)
    assert streaming.layers_that_fit(args) == checkpoints.LAYERS_OF_LITE
    usage = streaming.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(streaming.shutil, "disk_usage", lambda path: usage._replace(free=8_000_000))
    assert 2 <= streaming.layers_that_fit(args) < 8
    args.layers = "full"
    assert "skipped: " in str(streaming.lacking_disk(args))


def test_a_checkpoint_is_written_once_and_loads(tmp_path: Path) -> None:
    cfg = checkpoints.deepseek_v2_lite(3, small=True)
    checkpoints.write(cfg, tmp_path / "new")
    model = HookedMoE.from_pretrained(tmp_path / "new", dtype=torch.bfloat16)
    assert model.cfg.replace(model_name="custom") == cfg.replace(model_name="custom", bos_token_id=model.cfg.bos_token_id)
    size = sum(p.numel() * p.itemsize for p in model.parameters())
    assert size == sum(checkpoints.nbytes(shapes, cfg.dtype) for shapes in checkpoints.tensors_of(cfg).values())
    index = tmp_path / "new" / "model.safetensors.index.json"
    assert json.loads(index.read_text())["metadata"]["total_size"] == size
    written = index.stat().st_mtime_ns
    checkpoints.write(cfg, tmp_path / "new")
    assert index.stat().st_mtime_ns == written
    with pytest.raises(FileExistsError, match="holds something else"):
        checkpoints.write(checkpoints.deepseek_v2_lite(2, small=True), tmp_path / "new")


def test_the_page_says_where_it_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main(["--small", "--threads", "1", "--only", "scaling", "--out", str(tmp_path / "page.md")]) == 0
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    for what in (
        "CPU",
        "memory",
        torch.__version__,
        "transformer-lens",
        "commit",
        "python -m benchmarks.scaling --small --threads 1",
    ):
        assert what in page
    assert "| context | 16 to 64 |" in page
    assert "is written" in capsys.readouterr().out


def test_a_part_of_the_suite_leaves_the_rest_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    monkeypatch.setattr(suite, "run", lambda name, given, threads: (0, f"{name} {measured.append(name) or len(measured)}\n"))
    page = tmp_path / "page.md"
    whole = [name for name in suite.SUITE if name != "routing"]
    assert suite.main(["--only", *whole, "--out", str(page)]) == 0
    before = page.read_text()
    assert suite.main(["--only", "routing", "scaling", "--out", str(page)]) == 0
    after = page.read_text()
    texts = [line for line in after.splitlines() if line.split(" ")[0] in suite.SUITE]
    kept = [line for line in before.splitlines() if line.split(" ")[0] in whole and not line.startswith("scaling")]
    assert [line for line in texts if line in kept] == kept
    assert [line.split(" ")[0] for line in texts] == [name for name in suite.SUITE for _ in suite.SUITE[name]]
    assert after.split("## ")[0] == before.split("## ")[0]  # the machine, and when all of it was measured
    assert after.count("load average") == len(suite.SUITE)


def test_times_are_taken_in_turns_and_told_briefly() -> None:
    turns: list[str] = []
    seconds = timed({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, repeats=2, warm_up=1)
    assert turns == ["a", "b"] * 3
    assert [len(times) for times in seconds.values()] == [2, 2]
    assert summary([0.002, 0.001, 0.5]) == "2.00 ms (1.00 to 500)"
    assert summary([12.0]) == "12.0 s (12.0 to 12.0)"
    assert summary([2e-7]) == "0.200 µs (0.200 to 0.200)"
    assert ratio([2.0, 3.0, 800.0], [1.0, 1.0, 2.0]) == "3.00 (2.00 to 400)"
