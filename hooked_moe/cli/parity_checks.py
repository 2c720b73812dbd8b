"""The checks of `hooked-moe verify`, each a function from a model or its runs to results.

Whether a model is the published one, and whether it is run as transformers runs it. None of them raises for a check that fails.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.cli.published_checkpoints import GOLDEN_INPUT, Published
from hooked_moe.config import HookedMoEConfig
from hooked_moe.hooks.hook_point import HookPoint
from hooked_moe.loading.checkpoint import Checkpoint
from hooked_moe.loading.pretrained import plan_copies
from hooked_moe.loading.sizes import check_sizes
from hooked_moe.measurement.noise_floor import noise_floor
from hooked_moe.measurement.verification import LOSS_TOLERANCE, Check, verify
from hooked_moe.model import HookedMoE
from weights_conversion import Conversion

GOLDEN_TOLERANCE = 1e-2
"""As in the tests of transformers that the golden logits are from: they ran on other hardware."""
LOGITS_TOLERANCE, MEAN_LOSS_TOLERANCE = 5e-5, 2e-6
"""Against transformers, both in float32. transformers agrees with itself (other kernels) to 2e-5 in logits."""
HALF_AGREEMENT = 0.98
"""Share of (token, layer, slot) selections in half precision that are those of the same weights in float32."""
MUTUAL_AGREEMENT = 0.97
"""The same between two bfloat16 runs, ours and transformers': each has its own rounding, so that their errors add up."""
OLDEST_TRANSFORMERS = (5, 15)
"""The first release with the softmax scale of DeepSeek-V2 right; from release 5 on, routers give their selection."""
NOISE_CEILING = 10
"""The noise floor may be this many times the tolerance of one loss: it is the largest of all positions, layer after layer."""
VERIFICATION_TOKENS = 128
"""The verifications run on the first N tokens: they cost a forward pass for each of the removals they sample."""

Relation = Literal["at most", "at least", "exactly"]
Routing = dict[int, Int[Tensor, "batch pos slot"]]
"""The experts selected, by layer."""


@dataclass(frozen=True)
class Result:
    """What came of one check. `value` and `threshold` are None where there is nothing to measure."""

    name: str
    outcome: Literal["passed", "failed", "not run"]
    detail: str
    value: int | float | None = None
    relation: Relation | None = None
    """How the value must compare with the threshold."""
    threshold: int | float | None = None


def judged(name: str, value: int | float, relation: Relation, threshold: int | float, detail: str) -> Result:
    """Compare; nan fails in every relation."""
    passed = {"at most": value <= threshold, "at least": value >= threshold, "exactly": value == threshold}[relation]
    return Result(name, "passed" if passed else "failed", detail, value, relation, threshold)


def not_run(name: str, why: str) -> Result:
    return Result(name, "not run", why)


# --- the files -----------------------------------------------------------------------------------------------------------


def tensors_on_disk(directory: Path, conversion: Conversion, cfg: HookedMoEConfig) -> Iterator[Result]:
    """The checkpoint has exactly the tensors that its config describes, and they fill the model.

    From the headers alone. Raises `CheckpointError` where loading would, with the tensors that do not fit.
    """
    checkpoint = Checkpoint(directory)
    check_sizes(cfg, conversion, checkpoint)
    model = HookedMoE(cfg.replace(device=torch.device("meta")))
    plan = plan_copies(model, conversion, checkpoint)
    files = len({tensor.file for tensor in checkpoint.tensors.values()})
    described = len(plan.copied) + len(plan.repeated) + len(plan.left_out)
    yield judged("tensors", len(checkpoint.tensors), "exactly", described, f"as config.json describes; files: {files}")
    stored = sum(_size(checkpoint, name) for name in plan.copied)
    implied = sum(parameter.numel() for parameter in model.parameters())
    yield judged("parameters", stored, "exactly", implied, "numbers in those tensors, against the model of config.json")


def census(directory: Path, expected: Published) -> Iterator[Result]:
    """The checkpoint is as large as the published one."""
    checkpoint = Checkpoint(directory)
    source = f"of {expected.hub_id}, counted from the safetensors headers on the hub"
    parameters = sum(_size(checkpoint, name) for name in checkpoint.tensors)
    yield judged("census: parameters", parameters, "exactly", expected.parameters, source)
    stored = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    yield judged("census: bytes", stored, "exactly", expected.stored_bytes, f"as stored; those {source}")
    yield judged("census: tensors", len(checkpoint.tensors), "exactly", expected.tensors, source)


def _size(checkpoint: Checkpoint, name: str) -> int:
    return torch.Size(checkpoint.tensors[name].shape).numel()


# --- the model by itself -------------------------------------------------------------------------------------------------


def golden_logits(model: HookedMoE, expected: Published) -> Result:
    """The logits are those that transformers' authors found with the same weights. Only float32 is comparable."""
    if max(GOLDEN_INPUT) >= model.cfg.d_vocab:
        return Result("golden logits", "failed", f"the vocabulary of {model.cfg.d_vocab} tokens lacks some of {GOLDEN_INPUT}")
    with torch.inference_mode():
        logits = model(torch.tensor([GOLDEN_INPUT], dtype=torch.long, device="cpu"))[0].mean(-1).cpu()
    difference = float((logits - torch.tensor(expected.golden_logits, dtype=torch.float32, device="cpu")).abs().max())
    detail = "largest |difference| of the mean logit at 8 tokens from transformers' slow tests"
    return judged("golden logits", difference, "at most", GOLDEN_TOLERANCE, detail)


def verifications(model: HookedMoE, tokens: Int[Tensor, "1 pos"]) -> Iterator[Result]:
    """The checks that gate every measurement, and what removing nothing seems to do."""
    tokens = tokens[:, :VERIFICATION_TOKENS]
    for check in verify(model, tokens):
        yield _of_check(check)
    half = tokens.shape[1] // 2
    floor = noise_floor(model, tokens[:, : 2 * half].view(2, half))
    ceiling = NOISE_CEILING * LOSS_TOLERANCE[model.cfg.dtype]
    yield judged(
        "noise floor", floor, "at most", ceiling, "largest effect of removing nothing, nats: smaller effects are rounding"
    )


def _of_check(check: Check) -> Result:
    """A check of the library passes by more than its value, which `detail` says; the value is compared as here."""
    relation: Relation = "at least" if check.name == "losses differ" else "at most"
    outcome: Literal["passed", "failed"] = "passed" if check.passed else "failed"
    return Result(check.name, outcome, check.detail, check.value, relation, check.threshold)


# --- the model against transformers, and in half precision -----------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What a model did with a text; on the CPU, so that it outlives the model."""

    logits: Float[Tensor, "1 pos d_vocab"]
    losses: Float[Tensor, " pos-1"]
    routing: Routing


@torch.inference_mode()
def our_run(model: HookedMoE, tokens: Int[Tensor, "1 pos"], routing: Routing | None = None) -> Run:
    """One forward pass, with the experts that `routing` gives if it is given."""

    def reroute(indices: Tensor, hook: HookPoint) -> Tensor | None:
        return None if routing is None else routing[hook.layer()].to(indices.device)

    def is_routing(name: str) -> bool:
        return name.endswith("hook_expert_indices")

    with model.hooks([(is_routing, reroute)]):
        (logits, losses), cache = model.run_with_cache(tokens, names_filter=is_routing, return_type="both", loss_per_token=True)
    selected = {layer: cache["expert_indices", layer].cpu() for layer in model.cfg.moe_layers}
    return Run(logits.cpu(), losses[0].cpu(), selected)


def transformers_version() -> str | None:
    """None where it is not installed."""
    try:
        return importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None


def why_without_transformers() -> str | None:
    """None if transformers can be compared with."""
    version = transformers_version()
    if version is None:
        return "transformers is not installed: pip install transformers"
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
        return f"transformers {version} is older than {oldest}: pip install 'transformers>={oldest}'"
    return None


@torch.inference_mode()
def transformers_run(
    directory: Path, dtype: torch.dtype, device: torch.device, tokens: Int[Tensor, "1 pos"], layers: list[int]
) -> Run:
    """The same from a fresh model of transformers with its plainest kernels. `layers` are those with experts."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype,
        attn_implementation="eager",
        experts_implementation="eager",
        trust_remote_code=False,
        local_files_only=True,
    )
    model = model.eval().to(device)
    routing: Routing = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            routing[layer] = output[2].view(*tokens.shape, -1).cpu()

        return hook

    for layer in layers:
        moe = model.model.layers[layer].mlp
        (moe.router if hasattr(moe, "router") else moe.gate).register_forward_hook(keep(layer))
    logits = model(tokens.to(device), use_cache=False).logits.float().cpu()
    losses = torch.nn.functional.cross_entropy(logits[0, :-1].double(), tokens[0, 1:].cpu(), reduction="none")
    return Run(logits, losses, routing)


def same_as_transformers(ours: Run, theirs: Run) -> Iterator[Result]:
    """Logits, losses and routing, both in float32."""
    logits = float((ours.logits - theirs.logits).abs().max())
    yield judged("transformers: logits", logits, "at most", LOGITS_TOLERANCE, "largest |difference|, float32")
    losses = _mean_difference(ours, theirs)
    yield judged("transformers: losses", losses, "at most", MEAN_LOSS_TOLERANCE, "mean |difference| over tokens, nats, float32")
    agreement = Agreement.of(ours.routing, theirs.routing)
    yield judged("transformers: routing", agreement.sets, "exactly", 1.0, "share of token-layers with the same experts, float32")


def half_precision(
    load: Callable[[torch.dtype], HookedMoE], dtype: torch.dtype, tokens: Int[Tensor, "1 pos"]
) -> tuple[Run, list[Result]]:
    """The weights rounded to `dtype`: run in `dtype`, and run in float32. One model is held at a time."""
    model = load(dtype)
    half = our_run(model, tokens)
    wide = our_run(model.float(), tokens)
    forced = our_run(model.to(dtype), tokens, wide.routing)  # exact: the weights are values of `dtype`
    name = str(dtype).removeprefix("torch.")
    agreement = Agreement.of(half.routing, wide.routing)
    return half, [
        judged(
            f"{name}: routing",
            agreement.selections,
            "at least",
            HALF_AGREEMENT,
            f"share of selections (token, layer, slot) as with the same rounded weights in float32; {agreement}",
        ),
        judged(
            f"{name}: losses",
            _mean_difference(forced, wide),
            "at most",
            LOSS_TOLERANCE[dtype],
            "mean |difference| from float32 over tokens, routed as in float32, nats; mean losses differ by "
            f"{_difference_of_means(forced, wide):.2g}, and by {_difference_of_means(half, wide):.2g} routed freely",
        ),
    ]


def half_against_transformers(ours: Run, theirs: Run, dtype: torch.dtype) -> Result:
    name = str(dtype).removeprefix("torch.")
    agreement = Agreement.of(ours.routing, theirs.routing)
    detail = f"share of selections (token, layer, slot) as in transformers, both in {name}; {agreement}"
    return judged(f"{name}: routing of transformers", agreement.selections, "at least", MUTUAL_AGREEMENT, detail)


@dataclass(frozen=True)
class Agreement:
    """How much of two routings is common, whatever the order of the slots."""

    selections: float
    """Share of (token, layer, slot) selections."""
    sets: float
    """Share of (token, layer) pairs with the same experts in all slots."""
    lowest_layer: float
    """Share of selections in the layer where it is least."""

    @classmethod
    def of(cls, one: Routing, other: Routing) -> Agreement:
        shares = torch.stack(
            [(one[layer][..., :, None] == other[layer][..., None, :]).any(-1).double().mean(-1) for layer in one]
        )
        return cls(float(shares.mean()), float((shares == 1).double().mean()), float(shares.flatten(1).mean(1).min()))

    def __str__(self) -> str:
        return f"{self.lowest_layer:.4f} in the lowest layer; all experts of a (token, layer) the same: {self.sets:.4f}"


def _mean_difference(one: Run, other: Run) -> float:
    return float((one.losses.double() - other.losses.double()).abs().mean())


def _difference_of_means(one: Run, other: Run) -> float:
    return abs(float(one.losses.double().mean() - other.losses.double().mean()))
