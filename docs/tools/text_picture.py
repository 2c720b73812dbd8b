"""Draw a passage of a held-out document, its tokens coloured by what one expert does at each.

python -m docs.tools.text_picture       # writes docs/expert.svg: half a minute
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from hooked_moe.loading.registry import locate
from hooked_moe.tokenizer import Tokenizer

PICTURE = Path(__file__).resolve().parents[1] / "expert.svg"
MODEL, DOCUMENT, LAYER, EXPERT = "tiny-olmoe", "Sense and Sensibility, chapter 34", 5, 11
"""The passage and the expert, chosen for being readable; they are no sample."""
N_TOKENS = 118
MOST = 2.0
"""Nats at which the colours are full."""
HELPS, HURTS = (37, 99, 175), (194, 94, 16)
SEEN = 15
"""How often a token is seen, at least, to be listed."""
COLUMNS, CHARACTER, LINE, MARGIN, TOP = 96, 8.43, 27, 22, 64


@dataclass(frozen=True)
class Token:
    text: str
    effect: float | None
    """The change of the loss of the next token, in nats; None where the expert is not active."""


def effects_in(run: Path) -> dict[str, list[Token]]:
    """What the expert does at every token of every document, by title."""
    directory = locate(MODEL).directory
    assert directory is not None
    tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
    columns = ["document", "position", "delta_loss"]
    of_expert = (pc.field("layer") == LAYER) & (pc.field("expert") == EXPERT)
    rows = pq.read_table(run / "effects.parquet", columns=columns, filters=of_expert).to_pylist()
    effects = {(row["document"], row["position"]): row["delta_loss"] for row in rows}
    titles = pq.read_table(run / "documents.parquet", columns=["title"])["title"].to_pylist()
    documents: dict[str, list[Token]] = {title: [] for title in titles}
    for row in pq.read_table(run / "tokens.parquet", columns=["document", "position", "token", "target"]).to_pylist():
        if row["target"] >= 0:  # else there is no next token, and no effect
            place = row["document"], row["position"]
            documents[titles[row["document"]]].append(Token(tokenizer.decode([row["token"]]), effects.get(place)))
    return documents


def largest(tokens: list[Token], count: int = 7) -> list[tuple[str, float, int]]:
    """Tokens with the largest mean effect, among those at which the expert is active often enough."""
    seen: dict[str, list[float]] = defaultdict(list)
    for token in tokens:
        if token.effect is not None:
            seen[token.text].append(token.effect)
    means = [(text, sum(values) / len(values), len(values)) for text, values in seen.items() if len(values) >= SEEN]
    return sorted(means, key=lambda row: -row[1])[:count]


def colour(effect: float) -> str:
    """White at zero, full at `MOST`."""
    strength = min(1.0, abs(effect) / MOST) ** 0.7
    return "rgb({}, {}, {})".format(*(round(255 + (full - 255) * strength) for full in (HELPS if effect > 0 else HURTS)))


def passage(tokens: list[Token]) -> tuple[list[str], int]:
    """The tokens as boxes with text, and how many lines they take."""
    parts: list[str] = []
    line = column = 0
    for token in tokens:
        if "\n" in token.text:
            line, column = line + (column > 0), 0
            continue
        if column + len(token.text) > COLUMNS:
            line, column = line + 1, 0
        shown = token if column else replace(token, text=token.text.lstrip(" "))
        parts.append(box(shown, MARGIN + column * CHARACTER, TOP + line * LINE))
        column += len(shown.text)
    return parts, line + 1


def box(token: Token, x: float, y: float) -> str:
    words = escape(token.text)
    if token.effect is None:
        return f'<text x="{x:.1f}" y="{y}" class="off">{words}</text>'
    strong = ' style="fill: #fff"' if abs(token.effect) > 0.6 * MOST else ""
    return (
        f'<g><title>{words.strip()}: {token.effect:+.2f} nats</title><rect x="{x:.1f}" y="{y - 16}" rx="3" height="22" '
        f'width="{len(token.text) * CHARACTER:.1f}" fill="{colour(token.effect)}" class="on"/>'
        f'<text x="{x:.1f}" y="{y}"{strong}>{words}</text></g>'
    )


def legend(y: float) -> list[str]:
    parts = []
    for number, value in enumerate((-2, -1, -0.5, 0, 0.5, 1, 2)):
        x = MARGIN + 46 * number
        parts.append(f'<rect x="{x}" y="{y}" width="44" height="18" rx="3" fill="{colour(value)}" class="on"/>')
        parts.append(f'<text x="{x + 22}" y="{y + 32}" class="small" text-anchor="middle">{value:+g}</text>'.replace("+0<", "0<"))
    words = (
        "nats by which the loss of the next token rises when the expert",
        "is removed at this one; grey tokens do not go to it",
    )
    x = MARGIN + 46 * 7 + 12
    return [*parts, *(f'<text x="{x}" y="{y + 13 + 18 * n}" class="small">{part}</text>' for n, part in enumerate(words))]


def picture(shown: list[Token], everything: list[Token]) -> str:
    lines, count = passage(shown)
    width = round(2 * MARGIN + COLUMNS * CHARACTER)
    below = TOP + count * LINE
    listed = ",  ".join(f"“{text.strip()}” {mean:+.2f}" for text, mean, _ in largest(everything))
    active = sum(token.effect is not None for token in everything)
    height = below + 92
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="A passage of '
            f'{DOCUMENT}, each token coloured by what expert {EXPERT} does there">',
            STYLE,
            f'<rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>',
            f'<text x="{MARGIN}" y="30" class="title">Expert {EXPERT} of layer {LAYER} of {MODEL}, reading {DOCUMENT}</text>',
            *lines,
            *legend(below - 8),
            f'<text x="{MARGIN}" y="{below + 56}" class="small">{active:,} of {len(everything):,} held-out tokens go to it. '
            f"Largest mean effects, of tokens seen there {SEEN} times at least:</text>",
            f'<text x="{MARGIN}" y="{below + 76}" class="small mono">{escape(listed)}</text>',
            "</svg>",
            "",
        ]
    )


STYLE = """<style>
text { font: 14px ui-monospace, "DejaVu Sans Mono", monospace; fill: #111827; white-space: pre }
.off { fill: #8b93a1 } .on { stroke: #d1d5db; stroke-width: .5 }
.title { font: 600 16px system-ui, sans-serif } .small { font: 12.5px system-ui, sans-serif; fill: #374151 }
.mono { font: 12.5px ui-monospace, "DejaVu Sans Mono", monospace }
</style>"""


def main(run: str) -> None:
    documents = effects_in(Path(run))
    everything = [token for tokens in documents.values() for token in tokens]
    PICTURE.write_text(picture(documents[DOCUMENT][:N_TOKENS], everything), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
