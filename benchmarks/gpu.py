"""What share of a GPU's bandwidth and matrix rate the kernels and the exhaustive audit achieve, after the tests that need one.

    python -m benchmarks.gpu                    # tests, compute-sanitizer, then tables, into benchmarks/GPU.md: under 8 minutes
    python -m benchmarks.gpu --no-tests --layers 4
    python -m benchmarks.gpu --small            # seconds, on a CPU too; shows that it works, measures nothing

The card's bandwidth is that of a copy, bytes read and written; its matrix rate is that of a large product in the model's dtype.
Both are measured here. Bytes are those that an operation cannot do without; operations are counted as in benchmarks/roofline.py.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.all import versions
from benchmarks.tables import Table, parse, parser, print_page, show
from benchmarks.timing import seconds_of, summary
from hooked_moe import HookedMoE, HookedMoEConfig
from hooked_moe.counterfactuals import expert_effects
from hooked_moe.counterfactuals.work import removal_work
from hooked_moe.kernels import dispatch
from hooked_moe.kernels.prefix_attention import window_attention
from hooked_moe.kernels.routing import RoutingRule, group_by_expert, route
from hooked_moe.kernels.swiglu import gather_rows, swiglu
from hooked_moe.kernels.target_loss import log_sum_change, target_loss
from hooked_moe.kernels.weighted_sum import masked_combine
from hooked_moe.tables import write_text_atomic

HERE = Path(__file__).resolve().parent
SMALL = {
    "d_model": 64, "layers": 2, "experts": 8, "active": 2, "d_expert": 32, "vocabulary": 256, "context": 32, "tokens": 64,
    "repeats": 1, "tests": False,
}  # fmt: skip
BANDWIDTH_TARGET, ATTENTION_TARGET, AUDIT_TARGET = 0.8, 0.6, 0.5
RELEASED_HOURS = 8.44
"""Of the released run of 20 cells (arXiv 2606.10703), 8,000 removals of the more than six million of its corpus."""
PAPER_TEXTS = 100


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(options(), argv, SMALL)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.small:
        print("benchmarks.gpu needs a CUDA device, and torch finds none; --small shows on a CPU that it works", file=sys.stderr)
        return 2
    missing = dispatch.why_kernels_cannot_run(device)
    if missing is not None and not args.small:
        print(f"the kernels cannot run here: {missing}", file=sys.stderr)
        return 2
    checks = run_checks() if args.tests else {}
    with torch.inference_mode(), dispatch.using("auto" if missing is None else "reference"):
        bench = Bench(args, device)
        tables = [audit(bench), by_operations(bench), by_bytes(bench)]
    page = "\n".join([*heading(device, bench.machine, checks), *map(str, reversed(tables))])
    if args.small:
        show(tables[::-1])
    else:
        write_text_atomic(page, args.out)
        print_page(page)
    return int(any(code != 0 for code in checks.values()))


def options() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.add_argument("--no-tests", dest="tests", action="store_false", help="tables only")
    result.add_argument("--out", type=Path, default=HERE / "GPU.md", help="the page (default: %(default)s)")
    result.add_argument("--d-model", type=int, default=2048, help="in heads of 128, as all defaults those of OLMoE-1B-7B")
    result.add_argument("--layers", type=int, default=16)
    result.add_argument("--experts", type=int, default=64)
    result.add_argument("--active", type=int, default=8)
    result.add_argument("--d-expert", type=int, default=1024)
    result.add_argument("--vocabulary", type=int, default=50304)
    result.add_argument("--context", type=int, default=512)
    result.add_argument("--tokens", type=int, default=32768, help="that single kernels are timed on (default: %(default)s)")
    return result


def run_checks() -> dict[str, int]:
    """Exit codes of the tests that need a GPU, plainly and, for single kernels, under compute-sanitizer."""
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/kernels/test_gpu.py"]
    commands = {"tests": tests}
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        print("compute-sanitizer was not found: kernels do not run under it", file=sys.stderr)
    else:
        commands["compute-sanitizer"] = [sanitizer, "--error-exitcode", "1", *tests, "-k", "definition"]
    return {name: subprocess.run(command, cwd=HERE.parent).returncode for name, command in commands.items()}


@dataclass(frozen=True)
class Machine:
    bandwidth: float
    """Bytes per second, read and written, of a copy."""
    rate: float
    """Floating-point operations per second of a matrix product."""


class Bench:
    """Sizes, and how to time on the device."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.dtype = torch.bfloat16
        self.machine = self._machine()

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def seconds(self, run: Callable[[], object]) -> list[float]:
        """Of every repeat, on the device's clock, after two runs to warm up."""
        for _ in range(2):
            run()
        if self.device.type == "cpu":
            return [seconds_of(run) for _ in range(self.args.repeats)]
        found = []
        for _ in range(self.args.repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3)
        return found

    def _machine(self) -> Machine:
        size, side = (1 << 20, 256) if self.args.small else (1 << 30, 8192)
        source = torch.empty(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        a, b = self.draw(side, side), self.draw(side, side)
        copied = min(self.seconds(lambda: target.copy_(source)))
        multiplied = min(self.seconds(lambda: torch.mm(a, b.T)))
        return Machine(2 * size / copied, 2 * side**3 / multiplied)


def by_bytes(bench: Bench) -> Table:
    """Operations that only move memory."""
    rows = []
    for name, moved, run in memory_operations(bench):
        seconds = bench.seconds(run)
        rate = moved / median(seconds)
        rows.append(
            [name, f"{moved / 1e6:,.0f}", summary(seconds), f"{rate / 1e9:,.0f}", f"{rate / bench.machine.bandwidth:.0%}"]
        )
    return Table(
        f"Kernels at the speed of memory: {bench.args.tokens:,} tokens, d_model {bench.args.d_model}, {bench.args.experts} "
        f"experts top-{bench.args.active}, {bench.args.active} variants",
        f"The card copies {bench.machine.bandwidth / 1e9:,.0f} GB/s. Target: {BANDWIDTH_TARGET:.0%} of it.",
        ["kernel", "MB", "time", "GB/s", "of a copy"],
        rows,
    )


def memory_operations(bench: Bench) -> Iterator[tuple[str, float, Callable[[], object]]]:
    """Name, bytes that it has to move, and what runs it."""
    args, size = bench.args, bench.dtype.itemsize
    tokens, slots, width, n = args.tokens, args.active, args.d_model, args.tokens * args.active
    logits = torch.randn(tokens, args.experts, device=bench.device)
    _, indices = route(logits, RoutingRule(slots))
    order, place, _ = group_by_expert(indices, args.experts)
    yield "route", tokens * (4 * args.experts + 12 * slots), lambda: route(logits, RoutingRule(slots))
    yield "group_by_expert", 24 * n, lambda: group_by_expert(indices, args.experts)
    x, both = bench.draw(tokens, width), bench.draw(n, 2 * args.d_expert)
    yield "gather_rows", (tokens + n) * width * size + 8 * n, lambda: gather_rows(x, order, place)
    yield "swiglu", 3 * n * args.d_expert * size, lambda: swiglu(both)
    few = max(1, tokens // 8)  # of which there are as many variants as slots
    rows, weights = bench.draw(few * slots, width), bench.draw(slots, 1, few, slots)
    places = torch.randperm(few * slots, device=bench.device).view(1, few, slots)
    base = x[None, :few]
    moved = (few * slots + few + slots * few) * width * size
    yield "masked_combine", moved, lambda: masked_combine(rows, places, weights, base)


def by_operations(bench: Bench) -> Table:
    """Operations of matrix products."""
    args, length, variants = bench.args, bench.args.context, bench.args.active
    heads, d_head = attention_heads(args)
    q, own_k, own_v = (bench.draw(variants, 1, length, heads, d_head) for _ in range(3))
    keys, values = bench.draw(1, length, heads, d_head), bench.draw(1, length, heads, d_head)
    attention = variants * heads * 4 * d_head * length * (length + 1) / 2
    seconds = bench.seconds(lambda: window_attention(q, own_k, own_v, keys, values, None, 1, d_head**-0.5))
    library, best = min(library_attention(bench, q, keys, values), key=lambda found: median(found[1]))
    share = median(best) / median(seconds)
    n = variants * length
    x, weight = torch.randn(n, args.d_model, device=bench.device), bench.draw(args.vocabulary, args.d_model)
    targets = torch.randint(args.vocabulary, (n,), device=bench.device)
    product = 2.0 * n * args.d_model * args.vocabulary
    log_p = F.linear(x[:length], weight.float()).log_softmax(-1)
    shifts = x.view(variants, length, -1)

    def shifted() -> Tensor:
        return log_sum_change(log_p, shifts, weight)

    return Table(
        f"Kernels of products: {variants} variants of {length} tokens, {heads} heads of {d_head}, vocabulary {args.vocabulary:,}",
        f"The card multiplies at {bench.machine.rate / 1e12:,.3g} TFLOP/s. Target of prefix_attention: {ATTENTION_TARGET:.0%} of "
        f"the speed of the best causal attention in torch over as many keys; here {share:.0%} of that of {library}. "
        "target_loss multiplies each state as two halves, which counts once.",
        ["", "GFLOP", "time", "TFLOP/s", "of the matrix rate"],
        [
            work_row(bench, "prefix_attention", attention, seconds),
            work_row(bench, f"the best in torch, {library}", attention, best),
            work_row(bench, "target_loss", product, bench.seconds(lambda: target_loss(x, weight, targets))),
            work_row(bench, "log_sum_change, by torch", product, bench.seconds(shifted)),
        ],
    )


def work_row(bench: Bench, name: str, work: float, seconds: Sequence[float]) -> list[str]:
    rate = work / median(seconds)
    return [name, f"{work / 1e9:,.3g}", summary(seconds), f"{rate / 1e12:,.3g}", f"{rate / bench.machine.rate:.1%}"]


def library_attention(bench: Bench, q: Tensor, keys: Tensor, values: Tensor) -> Iterator[tuple[str, list[float]]]:
    """torch's own kernels that take these shapes: causal attention of all variants, each over as many keys as it has."""
    rows, k, v = (x.transpose(-2, -3).flatten(0, -4) for x in (q, keys, values))
    k, v = k.expand(len(rows), -1, -1, -1), v.expand(len(rows), -1, -1, -1)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(backend):
            try:
                yield backend.name, bench.seconds(lambda: F.scaled_dot_product_attention(rows, k, v, is_causal=True))
            except RuntimeError as error:  # there is none for this device
                print(f"{backend.name}: {error}", file=sys.stderr)


def attention_heads(args: argparse.Namespace) -> tuple[int, int]:
    d_head = min(128, args.d_model // 2)
    return args.d_model // d_head, d_head


def audit(bench: Bench) -> Table:
    """Every removal of one text, and what other ways would take for it."""
    args = bench.args
    cfg = config(args, bench.device, bench.dtype)
    model = HookedMoE(cfg).eval()
    tokens = torch.randint(0, cfg.d_vocab, (1, args.context), device=bench.device)
    seconds = bench.seconds(lambda: expert_effects(model, tokens))
    del model
    removals = (args.context - 1) * args.active * args.layers
    work = sum(removal_work(cfg, args.context, range(cfg.n_layers)).values())
    rate = work / median(seconds)
    forward = median(seconds_of_forward(bench, tokens)) * removals
    corpus = PAPER_TEXTS * median(seconds)
    return Table(
        f"The audit of every removal: {cfg.n_layers} layers, {cfg.num_experts} experts top-{cfg.experts_per_token}, d_model "
        f"{cfg.d_model}, d_expert {cfg.d_expert}, vocabulary {cfg.d_vocab:,}, context {args.context}, random, bfloat16",
        f"{removals:,} removals and {work / 1e12:,.3g} TFLOP a text: {rate / 1e12:,.3g} TFLOP/s, "
        f"{rate / bench.machine.rate:.1%} of the matrix rate. Target: {AUDIT_TARGET:.0%}. Other rows are multiplied from "
        "measured ones; the released run's time is its authors'.",
        ["", "removals", "time"],
        [
            ["one text", f"{removals:,}", summary(seconds)],
            [f"{PAPER_TEXTS} texts, at that speed", f"{PAPER_TEXTS * removals:,}", f"{corpus:,.3g} s"],
            ["one text, a forward of transformers for each removal", f"{removals:,}", f"{forward:,.3g} s"],
            ["the released run of 20 cells", "8,000", f"{RELEASED_HOURS} hours"],
        ],
    )


def config(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> HookedMoEConfig:
    heads, d_head = attention_heads(args)
    return HookedMoEConfig(
        n_layers=args.layers,
        d_model=args.d_model,
        d_vocab=args.vocabulary,
        n_ctx=args.context,
        n_heads=heads,
        n_key_value_heads=heads,
        d_head=d_head,
        qk_norm="full",
        num_experts=args.experts,
        experts_per_token=args.active,
        d_expert=args.d_expert,
        dtype=dtype,
        device=device,
    )


def seconds_of_forward(bench: Bench, tokens: Tensor) -> list[float]:
    """Of one forward of transformers' OLMoE of the same sizes: per row, in batches of 8."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    args = bench.args
    heads, _ = attention_heads(args)
    sizes = OlmoeConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.d_model,
        intermediate_size=args.d_expert,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_experts=args.experts,
        num_experts_per_tok=args.active,
        max_position_embeddings=args.context,
        pad_token_id=None,
        eos_token_id=None,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(bench.dtype)
    try:
        with bench.device:
            model = OlmoeForCausalLM(sizes).eval()
    finally:
        torch.set_default_dtype(before)
    model.config._attn_implementation, model.config._experts_implementation = "sdpa", "grouped_mm"
    rows = tokens.expand(8, -1)
    return [seconds / len(rows) for seconds in bench.seconds(lambda: model(rows, use_cache=False))]


def heading(device: torch.device, machine: Machine, checks: dict[str, int]) -> Iterator[str]:
    yield "# On a GPU\n"
    yield "Written by `make gpu`. Times are medians, with the lowest and the highest.\n"
    yield "| | |\n| --- | --- |"
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    facts = {"card": card, "CUDA of torch": str(torch.version.cuda), **versions()}
    facts |= {"copies": f"{machine.bandwidth / 1e9:,.0f} GB/s", "multiplies": f"{machine.rate / 1e12:,.3g} TFLOP/s, bfloat16"}
    facts |= {name: "passed" if code == 0 else f"FAILED with code {code}" for name, code in checks.items()}
    for name, value in facts.items():
        yield f"| {name} | {value} |"
    yield ""


if __name__ == "__main__":
    sys.exit(main())
