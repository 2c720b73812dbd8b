"""Whatever a user makes torch's defaults (device, dtype, autocast, inference mode), the package computes the same."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_moe import HookedMoE, KeyValueCache, load_corpus
from hooked_moe.corpus import Corpus
from hooked_moe.counterfactuals import (
    KL,
    Displacement,
    LogitDifference,
    LossAfter,
    Mean,
    expert_effects,
    expert_means,
    expert_observations,
    first_order_effects,
    mask_effects,
    progressive_effects,
    token_effects,
)
from hooked_moe.measurement import TokenizedCorpus, open_measurement
from hooked_moe.measurement.expert_weights import expert_weights
from hooked_moe.measurement.noise_floor import noise_floor
from hooked_moe.measurement.pruned_losses import PrunedLosses
from hooked_moe.measurement.verification import verify
from hooked_moe.paper.padded_rows import PaddedTexts, observe_rows
from hooked_moe.paper.sequence_removals import SequenceRemoval, sequence_removals
from tests.support.hf_models import save, tiny_olmoe

ROOT = Path(__file__).parents[1]

# What the sources say

FACTORIES = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "tensor"}
FACTORIES |= {"zeros"}
DTYPE_FROM_VALUES = {"arange", "as_tensor", "randint", "randperm"}
"""Whole numbers are int64 whatever the default; the values given say the rest."""


def made_without_saying(source: str) -> list[tuple[int, str]]:
    """Line and name of every call that makes a tensor without its device, or a dtype where that is torch's default."""
    tree = ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    parameters = {id(made) for call in calls if call.func.attr == "Parameter" for made in call.args}
    found = []
    for call in calls:
        if call.func.attr not in FACTORIES or ast.unparse(call.func.value) != "torch" or id(call) in parameters:
            continue
        given = {keyword.arg for keyword in call.keywords}
        if "device" not in given or not ("dtype" in given or call.func.attr in DTYPE_FROM_VALUES):
            found.append((call.lineno, f"torch.{call.func.attr}"))
    return found


def test_every_tensor_that_is_made_says_its_dtype_and_device() -> None:
    """But for parameters, which `Transformer` makes on its config's device, and converts to its config's dtype."""
    source = "torch.zeros(2)\ntorch.zeros(2, dtype=a, device=b)\ntorch.arange(3, device=b)\nnn.Parameter(torch.empty(3))"
    assert made_without_saying(source) == [(1, "torch.zeros")]
    found = {
        f"{path.relative_to(ROOT)}:{line}": name
        for room in ("hooked_moe", "weights_conversion")
        for path in (ROOT / room).rglob("*.py")
        for line, name in made_without_saying(path.read_text(encoding="utf-8"))
    }
    assert found == {}


# What the entry points compute


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default device": lambda: torch.device("meta"),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
}
"""A GPU, as notebooks make it the default, is played by the meta device: what lands there by mistake has no values."""
EVERY_STATE = pytest.mark.parametrize(
    "state",
    [pytest.param(name, marks=pytest.mark.slow if name in ("float16", "float64", "no gradients") else ()) for name in STATES],
)

TOKENS = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(1))
MASK = torch.ones(2, 12, dtype=torch.bool)
MASK[1, :3] = False
KEEP = torch.rand(3, 1, 1, 10, generator=torch.Generator().manual_seed(2)) > 0.3


def texts_of(tokens: Tensor) -> Corpus:
    corpus = load_corpus()
    return dataclasses.replace(corpus, documents=corpus.documents[: len(tokens)])


class Numbers:
    """A tokenizer of made-up numbers: a token for every letter."""

    bos_id, eos_id, pad_id, adds_bos = None, 1, 0, None

    def encode(self, text: str, prepend_bos: bool | None = None) -> list[int]:
        return [ord(letter) % 61 for letter in text[:40]]

    def to_str_tokens(self, ids: list[int]) -> list[str]:
        return [str(number) for number in ids]


def pruned_losses(model: HookedMoE, path: Path) -> Any:
    model.tokenizer = Numbers()  # type: ignore[assignment]
    corpus = TokenizedCorpus(model, texts_of(TOKENS), 16)
    losses = PrunedLosses(model, corpus, [0, 1], 16, path / "prunings", {"of": "this test"})
    return losses.of({1: [2]}).total


def measured(model: HookedMoE, path: Path) -> Any:
    model.tokenizer = Numbers()  # type: ignore[assignment]
    corpus = TokenizedCorpus(model, texts_of(TOKENS), 16)
    with open_measurement(model, corpus, results=path) as run:
        run.require("position", progress=False)
        return [(run.directory / name).read_bytes() for name in ("effects.parquet", "routing.parquet", "tokens.parquet")]


Entry = Callable[[HookedMoE, Path], Any]
ENTRIES: dict[str, Entry] = {
    "expert_effects": lambda m, p: expert_effects(
        m, TOKENS, attention_mask=MASK, readouts=[KL(), LogitDifference(3, 5), Displacement(), LossAfter(2)]
    ),
    "expert_effects, sequence": lambda m, p: expert_effects(m, TOKENS, [1], "sequence", positions=[2, 5]),
    "expert_effects, from_position": lambda m, p: expert_effects(m, TOKENS, [1], "from_position", "renormalize"),
    "expert_effects, mean": lambda m, p: expert_effects(m, TOKENS, [1], removal=Mean(expert_means(m, TOKENS))),
    "expert_means": lambda m, p: expert_means(m, TOKENS),
    "expert_observations": lambda m, p: expert_observations(m, TOKENS),
    "progressive_effects": lambda m, p: progressive_effects(m, TOKENS, order="random"),
    "mask_effects": lambda m, p: mask_effects(m, TOKENS, {2: KEEP}, "reroute"),
    "token_effects": lambda m, p: token_effects(m, TOKENS, lambda clean, where: 2 * clean.resid_post[None], attention_mask=MASK),
    "first_order_effects": lambda m, p: first_order_effects(m, TOKENS),
    "verify": lambda m, p: verify(m, TOKENS[:1]),
    "noise_floor": lambda m, p: noise_floor(m, TOKENS),
    "expert_weights": lambda m, p: expert_weights(m, [0, 1]),
    "pruned losses": pruned_losses,
    "a measurement": measured,
    "sequence_removals": lambda m, p: sequence_removals(m, TOKENS[0], [SequenceRemoval(1, frozenset([2]), 4)]),
    "observe_rows": lambda m, p: observe_rows(m, PaddedTexts.of(TOKENS.tolist(), 0, "left"), [1], progress=False),
}
PLAIN: dict[str, Entry] = {
    "forward": lambda m, p: m(TOKENS, "both", attention_mask=MASK, loss_per_token=True),
    "forward with a cache": lambda m, p: m(TOKENS, past_kv_cache=KeyValueCache(3)),
    "run_with_cache": lambda m, p: dict(m.run_with_cache(TOKENS)[1]),
    "generate": lambda m, p: m.generate(TOKENS, 3, do_sample=False, verbose=False),
    "sample": lambda m, p: m.generate(TOKENS, 3, generator=torch.Generator("cpu").manual_seed(3), verbose=False),
    "run_variants": lambda m, p: m.run_variants(TOKENS, [("blocks.1.mlp.experts.2.hook_out", lambda x, hook: 0 * x)]),
    "remove_experts": lambda m, p: m.remove_experts({1: [2], 0: [3], 2: [4]}),
    "save_pretrained": lambda m, p: m.save_pretrained(p / "saved"),
}
"""What runs the model as it is: under autocast, in the dtypes that the user asked for."""


def values_of(result: Any) -> Any:
    """All numbers in it, for comparison."""
    if isinstance(result, Tensor):
        assert result.device.type == "cpu"
        return result.detach().clone()
    if dataclasses.is_dataclass(result):
        return {field.name: values_of(getattr(result, field.name)) for field in dataclasses.fields(result)}
    if isinstance(result, dict):
        return {key: values_of(value) for key, value in result.items()}
    if isinstance(result, list | tuple):
        return [values_of(value) for value in result]
    return torch.from_numpy(result) if isinstance(result, np.ndarray) else result


def assert_equal(got: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, Tensor):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{where}: {text}")
    elif isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal(got[key], value, f"{where}[{key}]")
    elif isinstance(expected, list):
        for number, (one, other) in enumerate(zip(got, expected, strict=True)):
            assert_equal(one, other, f"{where}[{number}]")
    else:
        assert got == expected, where


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_olmoe(), tmp_path_factory.mktemp("checkpoint") / "model")


def loaded(directory: Path, stream: bool = False) -> HookedMoE:
    model = HookedMoE.from_pretrained(directory, device="cpu", stream=stream)
    model.cfg = model.cfg.replace(model_name="model")
    return model


@pytest.fixture(scope="module")
def expected(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    results: dict[str, Any] = {}

    def of(name: str) -> Any:
        if name not in results:
            entry = (ENTRIES | PLAIN)[name]
            results[name] = values_of(entry(loaded(directory), tmp_path_factory.mktemp("expected")))
        return results[name]

    return of


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", [*ENTRIES, *PLAIN])
@EVERY_STATE
def test_results_do_not_depend_on_the_defaults_of_torch(
    state: str, name: str, directory: Path, expected: Callable[[str], Any], tmp_path: Path
) -> None:
    if state == "autocast" and name in PLAIN:
        pytest.skip("autocast is there to change the dtypes of a model that is run as it is")
    reference, model = expected(name), loaded(directory)
    with STATES[state](), torch.no_grad() if name in PLAIN else nullcontext():
        result = (ENTRIES | PLAIN)[name](model, tmp_path)
    assert_equal(values_of(result), reference, name)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("stream", [False, True])
@EVERY_STATE
def test_a_model_loads_and_trains_whatever_the_defaults_of_torch_were(state: str, stream: bool, directory: Path) -> None:
    reference = loaded(directory, stream)
    with STATES[state]():
        model, made = loaded(directory, stream), HookedMoE(reference.cfg)
        if not stream:
            made.remove_experts({layer: [0] for layer in range(3)})
    assert {(p.dtype, p.device.type) for m in (model, made) for p in m.parameters()} <= {
        (torch.float32, "cpu"),
        (torch.float32, "meta"),  # the blocks that are not in memory
    }
    assert torch.equal(model(TOKENS), reference(TOKENS))
    if not stream:
        for trained in (model, made):
            trained(TOKENS, return_type="loss").backward()
            assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained.parameters())
