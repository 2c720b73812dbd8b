"""Draw a block and its hook points, from the table that declares them.

python -m docs.tools.block_picture      # writes docs/block.svg
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from hooked_moe.hooks.hook_table import HOOK_TABLE, HookSpec

PICTURE = Path(__file__).resolve().parents[1] / "block.svg"
BLOCK = "blocks.{i}."
ROW, WIDTH, LEFT, TITLE = 19, 900, 200, 30
STREAM_X = 44
ROUTER = ("router_logits", "router_scores", "selection_bias", "expert_indices", "expert_weights")
BOXES = (
    ("norm", "ln1."),
    ("attention", "attn."),
    ("norm", "ln2."),
    ("router", "mlp.router"),
    ("experts: each active one", "mlp.expert"),
    ("shared experts (where there are)", "mlp.shared"),
    ("one dense MLP (in dense layers, in place of router and experts)", "mlp.dense"),
)
"""What a box is called, and whose hook points it holds, in the order in which they are computed."""
COLOURS = {"ln1.": "#eef2f7", "attn.": "#e3eefc", "ln2.": "#eef2f7", "mlp.router": "#fdeedd", "mlp.expert": "#e6f4e6"}


def box_of(spec: HookSpec) -> str:
    """The box of a hook point of a block; "" where it is on the residual stream."""
    name = spec.name.removeprefix(BLOCK)
    for prefix in ("ln1.", "attn.", "ln2."):
        if name.startswith(prefix):
            return prefix
    if not name.startswith("mlp."):
        return ""
    if "shared" in name:
        return "mlp.shared"
    if name.removeprefix("mlp.hook_") in ROUTER:
        return "mlp.router"
    return "mlp.expert" if "expert" in name or "routed" in name else "mlp.dense"


def rows_of(box: str) -> list[HookSpec]:
    return [spec for spec in HOOK_TABLE if spec.name.startswith(BLOCK) and box_of(spec) == box]


def text(x: float, y: float, words: str, style: str = "") -> str:
    return f'<text x="{x}" y="{y}" {style}>{escape(words)}</text>'


def hook_point(x: float, y: float, spec: HookSpec, prefix: str = "") -> list[str]:
    """A dot, the name after `blocks.{i}.`, the shape, and in which layers it is where that is not everywhere."""
    name = spec.name.removeprefix(BLOCK).removeprefix(prefix)
    shape = f"[{spec.shape.replace(' ', ', ')}]"
    usual = ("every layer", "layers with experts", "layers with shared experts", "dense layers")
    where = "" if spec.where.words in usual else f"  {spec.where.words}"
    return [
        f'<circle cx="{x}" cy="{y - 4}" r="3.5" fill="#c2410c"/>',
        text(x + 10, y, name, 'class="name"'),
        text(x + 250, y, shape + where, 'class="shape"'),
    ]


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path d="M{x1} {y1} L{x2} {y2}" class="line" marker-end="url(#tip)"/>'


def picture() -> str:
    """The drawing as SVG, top to bottom as a token passes."""
    parts: list[str] = []
    stream = {spec.name.removeprefix(BLOCK): spec for spec in rows_of("")}
    on_stream = ["hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post"]
    assert list(stream) == on_stream, "the table has another hook point on the residual stream: give it a place in the picture"
    y = TITLE + 30
    top = y

    def on_the_stream(name: str) -> None:
        nonlocal y
        parts.extend(hook_point(STREAM_X, y, stream[name]))
        y += 22

    def added(name: str) -> None:
        """What comes back into the stream."""
        nonlocal y
        parts.append(arrow(LEFT + 10, y - 4, STREAM_X + 12, y - 4))
        parts.append(text(STREAM_X - 4, y, "+", 'class="plus"'))
        parts.extend(hook_point(LEFT + 18, y, stream[name]))
        y += 26

    def box(title: str, key: str) -> None:
        nonlocal y
        rows = rows_of(key)
        height = ROW * len(rows) + 30
        colour = COLOURS.get(key, "#f3eefb")
        parts.append(
            f'<rect x="{LEFT}" y="{y}" width="{WIDTH - LEFT - 20}" height="{height}" rx="8" fill="{colour}" class="box"/>'
        )
        prefix = key if key.endswith(".") else "mlp."
        parts.append(text(LEFT + 12, y + 18, f"{title}: {prefix}", 'class="title"'))
        for number, spec in enumerate(rows):
            parts.extend(hook_point(LEFT + 18, y + 38 + ROW * number, spec, prefix))
        y += height + 12

    on_the_stream("hook_resid_pre")
    parts.append(arrow(STREAM_X, y, LEFT - 4, y + 14))
    for title, key in BOXES[:2]:
        box(title, key)
    y += 8
    added("hook_attn_out")
    on_the_stream("hook_resid_mid")
    parts.append(arrow(STREAM_X, y, LEFT - 4, y + 14))
    for title, key in BOXES[2:]:
        box(title, key)
    y += 8
    added("hook_mlp_out")
    on_the_stream("hook_resid_post")
    height = y + 6
    line = f'<path d="M{STREAM_X} {top} L{STREAM_X} {y - 30}" class="stream"/>'
    heading = text(
        20, TITLE, "A block: every dot is a hook point, named blocks.{i}. and what stands beside it", 'class="heading"'
    )
    return "\n".join([HEAD.format(width=WIDTH, height=height), heading, line, *parts, "</svg>", ""])


HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"
aria-label="A block and its hook points">
<style>
text {{ font: 13px system-ui, sans-serif; fill: #1f2937 }}
.name {{ font: 13px ui-monospace, monospace }} .shape {{ font: 12px ui-monospace, monospace; fill: #6b7280 }}
.title {{ font-weight: 600 }} .heading {{ font: 600 16px system-ui, sans-serif }} .plus {{ font: 700 16px system-ui, sans-serif }}
.box {{ stroke: #cbd5e1 }} .line {{ stroke: #64748b; fill: none }} .stream {{ stroke: #94a3b8; stroke-width: 4; fill: none }}
</style>
<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">
<path d="M0 0 L8 4 L0 8 z" fill="#64748b"/></marker></defs>
<rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>"""


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
