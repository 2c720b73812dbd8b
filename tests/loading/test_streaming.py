"""Weights one block at a time: the same numbers, each weight read once a sweep, and nothing lost when a run is cut short."""

from __future__ import annotations

import gc
import json
import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import hooked_moe.measurement.shard_files as shard_files
import hooked_moe.measurement.shards as shards
from hooked_moe import HookedMoE
from hooked_moe.corpus import Corpus, Document
from hooked_moe.counterfactuals import Scope, expert_effects
from hooked_moe.counterfactuals.engine import fan_out
from hooked_moe.counterfactuals.engine.memory import demand_of, variant_bytes
from hooked_moe.counterfactuals.first_order import first_order_effects
from hooked_moe.counterfactuals.first_order import least_budget as least_budget_of_gradients
from hooked_moe.counterfactuals.readouts import LossAfter
from hooked_moe.expert_mask import ExpertMask
from hooked_moe.loading import streaming
from hooked_moe.loading.fingerprint import weights_sha256
from hooked_moe.loading.spill import Spill, Waiting
from hooked_moe.loading.streaming import StreamedBlocks
from hooked_moe.measurement import open_measurement
from hooked_moe.measurement.budget import Budget
from hooked_moe.measurement.document_tables import TABLES
from hooked_moe.measurement.noise_floor import noise_floor
from hooked_moe.measurement.part_spec import PartSpec
from hooked_moe.measurement.shards import measure_part
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.measurement.verification import verify
from hooked_moe.tokenizer import Tokenizer
from tests.conftest import random_model

FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"architecture": "olmoe", "model_type": "olmoe"},
    "deepseek_v2": {
        "architecture": "deepseek",
        "model_type": "deepseek_v2",
        "n_layers": 4,
        "d_shared": 24,
        "tie_word_embeddings": True,
    },
}


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    random_model(**FAMILIES[request.param]).save_pretrained(path)
    return path


@pytest.fixture
def whole(directory: Path) -> HookedMoE:
    return HookedMoE.from_pretrained(directory)


@pytest.fixture
def streamed(directory: Path) -> HookedMoE:
    return HookedMoE.from_pretrained(directory, stream=True)


def blocks_of(model: HookedMoE) -> StreamedBlocks:
    blocks = model.blocks
    assert isinstance(blocks, StreamedBlocks)
    return blocks


def read_so_far(blocks: StreamedBlocks) -> int:
    """How many blocks were read, that ahead included."""
    if blocks._ahead is not None:
        blocks._ahead[1].result()
    return blocks.blocks_read


def in_memory(model: HookedMoE) -> set[int]:
    """The layers whose weights are loaded."""
    return {int(name.split(".")[1]) for name, p in model.named_parameters() if "blocks" in name and p.device.type != "meta"}


REPEATED = pytest.mark.usefixtures("unchecked")  # many calls, like those whose types other tests here check


def least_budget(model: HookedMoE, length: int, queries: int = 1) -> int:
    """For some positions of one layer at a time, each with a variant per slot."""
    demand = demand_of(model.cfg, length)
    return demand.fixed + demand.row + queries * model.cfg.experts_per_token * demand.variant_token


def test_everything_but_the_memory_is_the_same(whole: HookedMoE, streamed: HookedMoE, tokens: Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(streamed(tokens), whole(tokens))
        assert len(in_memory(streamed)) == 1
        _, cache = streamed.run_with_cache(tokens)
        _, expected = whole.run_with_cache(tokens)
        assert cache.keys() == expected.keys()
        assert all(torch.equal(cache[name], expected[name]) for name in expected)
        edit = [("blocks.2.mlp.hook_routed_out", lambda x, hook: x * 0)]
        assert torch.equal(streamed.run_with_hooks(tokens, fwd_hooks=edit), whole.run_with_hooks(tokens, fwd_hooks=edit))
    assert weights_sha256(streamed) == weights_sha256(whole)


@pytest.mark.parametrize("allowance", [0, 1 << 30], ids=["on disk", "in memory"])
def test_effects_are_equal_to_the_bit_and_a_sweep_reads_each_weight_once(
    allowance: int, whole: HookedMoE, streamed: HookedMoE, tokens: Tensor, tmp_path: Path
) -> None:
    blocks = blocks_of(streamed)
    blocks.spill = Spill(allowance, tmp_path)
    read: list[int] = []
    original = blocks._read
    blocks._read = lambda layer: (read.append(layer), original(layer))[1]  # type: ignore[method-assign]
    for options in ({}, {"readouts": [LossAfter(2)]}, {"removal": "reroute", "positions": [1, 4]}):
        expected = expert_effects(whole, tokens, **options)
        read.clear()
        found = expert_effects(streamed, tokens, **options)
        for name in ("delta_loss", "baseline_loss", "rest_cosine", "expert_index"):
            assert torch.equal(getattr(found, name).nan_to_num(7.0), getattr(expected, name).nan_to_num(7.0)), name
        for name, table in expected.readouts.items():
            assert torch.equal(found.readouts[name].nan_to_num(7.0), table.nan_to_num(7.0))
        layers = list(range(whole.cfg.n_layers))
        assert [layer for layer in read if layer != 0 or read.index(layer) == 0][: len(layers)] in (layers, layers[1:])
        assert len(read) <= len(layers) + 1  # and the first block, ahead of the next sweep
    assert (blocks.spill.written > 0) == (allowance == 0)
    assert blocks.spill.allowance == allowance
    assert not list(tmp_path.iterdir())


def test_a_small_budget_still_takes_one_sweep(whole: HookedMoE, streamed: HookedMoE) -> None:
    tokens = torch.randint(0, 61, (3, 9), generator=torch.Generator().manual_seed(4))
    budget = least_budget(whole, 9, queries=9)
    blocks = blocks_of(streamed)
    before = blocks.blocks_read
    found = expert_effects(streamed, tokens, memory_budget=budget)
    assert blocks.blocks_read - before <= whole.cfg.n_layers + 1
    expected = expert_effects(whole, tokens, memory_budget=budget)
    assert torch.equal(found.delta_loss.nan_to_num(7.0), expected.delta_loss.nan_to_num(7.0))


@pytest.mark.parametrize("allowance", [0, 1 << 30])
def test_experts_removed_from_whole_sequences_take_one_sweep_too(
    allowance: int, whole: HookedMoE, streamed: HookedMoE, tmp_path: Path
) -> None:
    tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(4))
    blocks = blocks_of(streamed)
    blocks.spill = Spill(allowance, tmp_path)
    before = blocks.blocks_read
    found = expert_effects(streamed, tokens, scope="sequence")
    assert blocks.blocks_read - before <= whole.cfg.n_layers + 1
    assert (blocks.spill.written > 0) == (allowance == 0)
    assert blocks.spill.allowance == allowance
    expected = expert_effects(whole, tokens, scope="sequence")
    assert torch.equal(found.delta_loss.nan_to_num(7.0), expected.delta_loss.nan_to_num(7.0))


@pytest.mark.parametrize("allowance", [0, 1 << 30], ids=["on disk", "in memory"])
def test_first_order_effects_are_equal_to_the_bit_and_read_each_weight_up_and_down_the_layers(
    allowance: int, whole: HookedMoE, streamed: HookedMoE, tmp_path: Path
) -> None:
    tokens = torch.randint(0, 61, (3, 9), generator=torch.Generator().manual_seed(4))
    blocks = blocks_of(streamed)
    blocks.spill = Spill(allowance, tmp_path)
    one_row = least_budget_of_gradients(whole.cfg, 9)
    for budget in (None, one_row):
        read = blocks.blocks_read
        found = first_order_effects(streamed, tokens, memory_budget=budget)
        assert blocks.blocks_read - read <= 2 * whole.cfg.n_layers + 1
        expected = first_order_effects(whole, tokens, memory_budget=budget)
        for name in ("first_order", "first_order_curved", "expert_index"):
            assert torch.equal(getattr(found, name).nan_to_num(7.0), getattr(expected, name).nan_to_num(7.0)), name
    assert blocks.spill.written > 0, "under a budget, nothing waits in memory"
    assert blocks.spill.allowance == allowance
    assert not list(tmp_path.iterdir())


def test_blocks_are_read_ahead_in_the_order_in_which_they_are_taken(streamed: HookedMoE) -> None:
    blocks, n_layers = blocks_of(streamed), streamed.cfg.n_layers
    _ = blocks[0]
    up = range(n_layers)
    for order in (up, reversed(up), up):
        before = read_so_far(blocks)
        for layer in order:
            _ = blocks[layer]
        assert read_so_far(blocks) - before <= n_layers + 1


@REPEATED
def test_all_that_waits_takes_one_file(streamed: HookedMoE, tmp_path: Path) -> None:
    blocks_of(streamed).spill = Spill(0, tmp_path)
    tokens = torch.randint(0, 61, (8, 9), generator=torch.Generator().manual_seed(4))
    budget = least_budget(streamed, 9)
    open_files, hard = len(os.listdir("/dev/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files + 20, hard[1]))
    try:
        expert_effects(streamed, tokens, [1], memory_budget=budget)  # in 72 parts
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, hard)
    assert len(os.listdir("/dev/fd")) <= open_files + 1


@REPEATED
def test_variants_that_wait_in_files_are_in_memory_one_work_at_a_time(
    streamed: HookedMoE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks_of(streamed).spill = Spill(0, tmp_path)
    tokens = torch.randint(0, 61, (6, 9), generator=torch.Generator().manual_seed(4))
    budget = least_budget(streamed, 9, queries=9)
    held, original = [], fan_out.advance

    def counted(variants: Tensor, *rest: Any) -> None:
        alive = {id(x) for x in gc.get_objects() if type(x) is Tensor and x.shape == (3, 1, 9, 32)}
        held.append(len(alive))
        original(variants, *rest)

    monkeypatch.setattr(fan_out, "advance", counted)
    expert_effects(streamed, tokens, [1], memory_budget=budget)
    assert max(held) <= 2  # the work's own, and at most what its branch made


@REPEATED
@pytest.mark.parametrize("scope", ["position", "sequence"])
def test_under_a_memory_budget_nothing_waits_in_memory(
    scope: Scope, streamed: HookedMoE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spill = blocks_of(streamed).spill = Spill(1 << 30, tmp_path)
    tokens = torch.randint(0, 61, (6, 9), generator=torch.Generator().manual_seed(4))
    allowed, original = [], Spill.claim

    def recorded(spill: Spill, *inputs: Any, **options: Any) -> Waiting | None:
        waiting = original(spill, *inputs, **options)
        allowed.append(spill.allowance)
        return waiting

    monkeypatch.setattr(Spill, "claim", recorded)
    within = expert_effects(streamed, tokens, scope=scope, memory_budget=least_budget(streamed, 9, queries=9))
    assert set(allowed) == {1 << 30}
    written = spill.written
    assert written >= 6 * 9 * 2 * 3 * variant_bytes(streamed.cfg)
    without = expert_effects(streamed, tokens, scope=scope)
    assert spill.written == written
    torch.testing.assert_close(within.delta_loss, without.delta_loss, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("scope", ["position", "sequence", "from_position"])
def test_verification_reads_each_weight_twice_and_finds_what_it_finds_in_memory(
    scope: Scope, whole: HookedMoE, streamed: HookedMoE
) -> None:
    tokens = torch.randint(0, 61, (1, 12), generator=torch.Generator().manual_seed(4))
    before = read_so_far(blocks_of(streamed))
    found = verify(streamed, tokens, scopes=[scope])
    assert read_so_far(blocks_of(streamed)) - before <= 2 * whole.cfg.n_layers
    assert found == verify(whole, tokens, scopes=[scope])
    assert all(check.passed for check in found)
    before = read_so_far(blocks_of(streamed))
    rows = tokens.view(2, 6)
    assert noise_floor(streamed, rows) == noise_floor(whole, rows)
    assert read_so_far(blocks_of(streamed)) - before <= whole.cfg.n_layers


# Measuring a corpus


class Characters(Tokenizer):
    """A tokenizer of characters."""

    def __init__(self) -> None:
        self.bos_id, self.adds_bos = None, None

    def encode(self, text: str, prepend_bos: bool | None = None) -> list[int]:
        return [ord(c) % 61 for c in text]

    def decode(self, tokens: Any, special: bool = True) -> str:
        return "".join(chr(61 + token) for token in tokens)


TEXTS = ("call me ishmael. some years ago", "it is a truth", "in the beginning god created the heaven", "fellow citizens")


def corpus_of(model: HookedMoE, texts: Sequence[str] = TEXTS) -> TokenizedCorpus:
    model.tokenizer = Characters()
    documents = [Document(id=str(i), domain="novel", title=text, text=text) for i, text in enumerate(texts)]
    return TokenizedCorpus(model, Corpus("four", documents, sha256="0"), n_ctx=16)


def measure(model: HookedMoE, directory: Path) -> Path:
    spec = PartSpec("position", tuple(model.cfg.moe_layers))
    measure_part(model, corpus_of(model), spec, directory / "shards", directory, {"plan": "p"}, progress=False)
    return directory


def assert_same_tables(one: Path, other: Path) -> None:
    for name in TABLES["position"]:
        found, expected = (pq.read_table(run / f"{name}.parquet") for run in (one, other))
        assert found.to_pandas().equals(expected.to_pandas()), name


def test_a_corpus_is_measured_up_and_down_the_layers_once_to_the_same_tables(
    whole: HookedMoE, streamed: HookedMoE, tmp_path: Path
) -> None:
    """To the bit on one thread, as the tests run: of several, a document has its share where weights are in memory and all where
    they are streamed, and products on more threads round otherwise."""
    blocks = blocks_of(streamed)
    before = blocks.blocks_read
    measure(streamed, tmp_path / "streamed")
    assert max(len(windows) for windows in corpus_of(streamed).documents) > 1
    assert blocks.blocks_read - before <= 2 * whole.cfg.n_layers + 1
    measure(whole, tmp_path / "whole")
    assert_same_tables(tmp_path / "whole", tmp_path / "streamed")
    estimates = pq.read_table(tmp_path / "streamed" / "effects.parquet").select(["first_order", "first_order_curved"])
    assert all(np.isfinite(column).mean() > 0.9 for column in estimates)


@pytest.mark.parametrize("scope", ["position", "sequence"])
def test_a_run_reads_the_checkpoint_five_times_at_most_and_finds_what_it_finds_in_memory(
    scope: Any, whole: HookedMoE, streamed: HookedMoE, tmp_path: Path
) -> None:
    """Checksum, with the losses that verification begins with; verification, with norms of weights; removals, and for first-order
    effects the way back."""
    effects = {}
    for model in (whole, streamed):
        directory = tmp_path / ("streamed" if model.streams else "whole")
        with open_measurement(model, corpus_of(model), results=directory, name="run") as run:
            run.require(scope, progress=False)
        names = [name for name in run.manifest["files"] if name != "documents.parquet"]
        effects[model.streams] = {name: pq.read_table(run.directory / name).to_pandas() for name in names}
    for name, table in effects[True].items():
        assert table.equals(effects[False][name]), name
    assert read_so_far(blocks_of(streamed)) <= 4 * whole.cfg.n_layers
    sizes = [tensor.nbytes for tensor in blocks_of(streamed).checkpoint.tensors.values()]
    assert blocks_of(streamed).bytes_read <= 4 * sum(sizes)


@pytest.mark.usefixtures("unchecked")  # sound models make the same calls, with their types checked
def test_what_a_removal_leaves_behind_is_found_where_losses_are_of_the_reading_before(
    streamed: HookedMoE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = ExpertMask.for_layer, []

    def stale(self: ExpertMask, *inputs: Any) -> Any:
        if not calls:
            streamed.ln_final.w.mul_(1.01)
        calls.append(inputs)
        return original(self, *inputs)

    monkeypatch.setattr(ExpertMask, "for_layer", stale)
    with (
        open_measurement(streamed, corpus_of(streamed), results=tmp_path, name="run") as run,
        pytest.raises(ValueError, match=r"verification failed \(loss, no stale state\)"),
    ):
        run.require("position", progress=False)


@pytest.mark.parametrize("texts", [["ab"], ["it", "is"], ["a truth"]])
def test_texts_too_short_to_verify_with_are_refused_before_anything_is_measured(
    texts: list[str], streamed: HookedMoE, tmp_path: Path
) -> None:
    with (
        open_measurement(streamed, corpus_of(streamed, texts), results=tmp_path, name="run") as run,
        pytest.raises(ValueError, match="takes 8: give a corpus with longer documents"),
    ):
        run.require("position", progress=False)


def test_a_budgeted_run_reads_the_checkpoint_five_times_at_most(whole: HookedMoE, streamed: HookedMoE, tmp_path: Path) -> None:
    """Those four, with estimates in place of removals; and the removals that are drawn from them."""
    sampled = {}
    for model in (whole, streamed):
        directory = tmp_path / ("streamed" if model.streams else "whole")
        with open_measurement(model, corpus_of(model), results=directory, name="run", budget=Budget(share=0.3)) as run:
            run.require_sample(progress=False)
        sampled[model.streams] = pq.read_table(run.directory / "sampled_effects.parquet").to_pandas()
    assert sampled[True].equals(sampled[False])
    assert read_so_far(blocks_of(streamed)) <= 5 * whole.cfg.n_layers


FULL_DISK = OSError(28, "No space left on device")


@REPEATED
@pytest.mark.parametrize(
    ("owner", "name", "calls", "fault"),
    [
        (shard_files, "write_parquet_atomic", 4, FULL_DISK),
        (Waiting, "put", 5, FULL_DISK),
        (Waiting, "put", 6, KeyboardInterrupt()),
        (Waiting, "get", 5, KeyboardInterrupt()),
    ],
    ids=["shards on a full disk", "waiting on a full disk", "interrupted", "interrupted early"],
)
def test_a_streamed_run_that_is_cut_short_goes_on_to_the_same_bytes(
    owner: Any, name: str, calls: int, fault: BaseException, streamed: HookedMoE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spill = blocks_of(streamed).spill = Spill(0, tmp_path)
    measure(streamed, tmp_path / "straight")
    monkeypatch.setattr(shards.PartMeasurement, "groups", lambda part, pending, places: [[index] for index in pending])
    original, left = getattr(owner, name), iter(range(calls))

    def faulty(*inputs: Any, **options: Any) -> Any:
        if next(left, None) is None:
            raise fault
        return original(*inputs, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, faulty)
        with pytest.raises(type(fault)):
            measure(streamed, tmp_path / "cut")
    assert not list(tmp_path.glob("*.spill"))
    assert spill.allowance == 0
    measure(streamed, tmp_path / "cut")
    for name in TABLES["position"]:
        files = (tmp_path / run / f"{name}.parquet" for run in ("straight", "cut"))
        assert len({file.read_bytes() for file in files}) == 1, name


def test_a_block_that_an_interrupt_left_with_some_weights_is_read_again(
    whole: HookedMoE, streamed: HookedMoE, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, left = streaming._set_parameter, iter(())

    def faulty(*inputs: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        original(*inputs)

    for start in (0, 1):  # while a block is unloaded, and while one is loaded
        streamed.blocks[0]
        with monkeypatch.context() as patch:
            left = iter(range(2 + start * len(list(streamed.blocks[0].parameters()))))
            patch.setattr(streaming, "_set_parameter", faulty)
            with pytest.raises(KeyboardInterrupt):
                streamed.blocks[1]
        with torch.no_grad():
            assert torch.equal(streamed(tokens), whole(tokens))
    assert len(in_memory(streamed)) == 1


# What streaming cannot do, and what it says


def test_what_needs_all_weights_is_refused(streamed: HookedMoE, tmp_path: Path) -> None:
    for run in (
        lambda: streamed.save_pretrained(tmp_path),
        lambda: streamed.remove_experts({1: [0]}),
        lambda: streamed.to(torch.float64),
    ):
        with pytest.raises(ValueError, match="needs all weights in memory, and this model streams them"):
            run()
    with pytest.raises(IndexError, match="layer 9 is out of range"):
        streamed.blocks[9]


def test_broken_weights_are_named_once(directory: Path, tmp_path: Path, tokens: Tensor) -> None:
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if "layers.2" in name and "down_proj" in name)
    weights[name][0, 0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    streamed = HookedMoE.from_pretrained(tmp_path, stream=True)
    with pytest.warns(UserWarning, match=f"NaN or infinite weights.*\n  {name}") as streamed_note:
        streamed(tokens)
    with pytest.warns(UserWarning, match=name) as note:
        HookedMoE.from_pretrained(tmp_path)
    assert {one.filename for one in (*streamed_note, *note)} == {__file__}  # the line that did it, not one of the package


def test_a_wrong_checkpoint_is_refused_before_anything_is_run(directory: Path, tmp_path: Path) -> None:
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))
    layers = config["num_hidden_layers"]
    with pytest.raises(ValueError, match=f"config.json describes {layers + 1} layers, and the tensors are of {layers}"):
        HookedMoE.from_pretrained(tmp_path, stream=True)


def test_what_waits_in_a_file_comes_back_to_the_bit(tmp_path: Path) -> None:
    spill = Spill(0, tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        xs = [torch.randn(3, 4, 5).to(dtype) for _ in range(3)]
        places = [spill.claim(x.nbytes) for x in xs]
        for x, waiting in zip(xs, places, strict=True):
            assert waiting is not None
            waiting.put(x[:2])
            waiting.put(x)
        for x, waiting in zip(xs, places, strict=True):
            assert waiting is not None
            out = torch.empty_like(x)
            waiting.get(out)
            assert torch.equal(out, x)
            waiting.put(x[:1])
            waiting.close()
    assert not list(tmp_path.iterdir())
