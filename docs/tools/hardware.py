"""The page of hardware by model, as `hooked-moe plan` counts it.

python -m docs.tools.hardware       # writes docs/hardware.md
"""

from __future__ import annotations

from pathlib import Path

import torch

from hooked_moe.cli.audit_plan import Plan, plan_of
from hooked_moe.cli.device_rates import DEVICES, PEAK_UTILISATION
from hooked_moe.cli.plan import count, duration
from hooked_moe.counterfactuals.work import parameters
from hooked_moe.loading.published import published_config
from hooked_moe.loading.registry import PRETRAINED

PAGE = Path(__file__).resolve().parents[1] / "hardware.md"
SHOWN = (
    "olmoe",
    "qwen1.5-moe",
    "deepseek-v2-lite",
    "moonlight-16b-a3b",
    "gpt-oss-20b",
    "glm-4.7-flash",
    "qwen3-30b-a3b",
    "mixtral-8x7b",
    "qwen2-57b-a14b",
    "glm-4.5-air",
    "gpt-oss-120b",
    "mixtral-8x22b",
    "deepseek-v2",
    "glm-4.5",
    "deepseek-v3",
    "kimi-k2",
)
"""One of each size; the siblings of a model take what it takes."""
TIMED = ("a100", "h100", "b200")
IN_README = (
    "olmoe",
    "qwen1.5-moe",
    "deepseek-v2-lite",
    "gpt-oss-20b",
    "qwen3-30b-a3b",
    "mixtral-8x7b",
    "glm-4.5-air",
    "deepseek-v3",
)


def plan_for(name: str) -> Plan:
    """The plan of a model with a short name, in bfloat16 on a GPU."""
    hub_id = next(entry.hub_id for entry in PRETRAINED if entry.name == name)
    return plan_of(published_config(hub_id).replace(dtype=torch.bfloat16, device=torch.device("cuda")))


def row(name: str, devices: tuple[str, ...] = TIMED) -> str:
    """One model: parameters, memory whole and streamed, operations, and the time of products by device."""
    plan = plan_for(name)
    rates = [PEAK_UTILISATION * DEVICES[device].peak(torch.bfloat16) for device in devices]
    memory = (f"{plan.memory / 1e9:,.0f} GB", f"{plan.streamed_memory / 1e9:,.0f} GB")
    times = (duration(plan.work / rate) for rate in rates)
    return "| " + " | ".join((f"`{name}`", count(parameters(plan.cfg)), *memory, f"{plan.work:.1e}", *times)) + " |"


def page() -> str:
    heads = ["model", "parameters", "memory", "with `--stream`", "operations", *TIMED]
    share = f"{PEAK_UTILISATION:.0%}"
    peaks = ", ".join(f"{DEVICES[device].bfloat16:,.0f} for {DEVICES[device].about}" for device in TIMED)
    table = "\n".join(
        [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *(row(name) for name in SHOWN)],
    )
    return f"""# Hardware by model

What an audit takes: 72 documents of 512 tokens, every active expert removed at every position of every layer, in bfloat16. It is
counted by

```
hooked-moe plan --model olmoe --device h100 --dtype bfloat16
```

which takes other texts, layers, dtypes and devices, measures this machine (`--measure`), or takes a rate of yours (`--tflops`).
It has the audit's `--budget`, `--products` and `--store` too, and like the audit it is in float32 if it is not told otherwise.

{table}

**Operations** are those of matrix products, counted from the config: the texts through all blocks, all removals of a layer
through the blocks after it, their predictions, and the first-order estimates. The count is tested against torch's own on small
models.

**Times** are those of products at {share} of the peak that the maker publishes (in TFLOP/s: {peaks}).
That share is an assumption: no card has been measured. On two cores of a CPU the audit reaches half of what `torch.mm` keeps up
in bfloat16, and two thirds in float32 ([Speed](speed.md)). Reading the weights, writing tables (34 bytes a removal) and the
analysis come on top, and so does the download. Weights that do not fit on the card are streamed from the disk
(`--stream`): each sweep over the layers reads all of them once, which takes their size over the disk's rate.

**Memory** is weights at 2 bytes a parameter and, beside them, what is in flight at most; `--memory` bounds the latter. With
`--stream` two neighbouring blocks are there at a time, one of them read ahead, and what is outside of blocks. Checkpoints in fp8
or mxfp4 are widened while they are read, so the table holds for them too.
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
