"""A small made-up run directory: loss changes as real ones are (heavy tails, alike within a document), with the truth known.

In layer PLANTED_LAYER the loss change follows the routing weight; everywhere else it is blind to every ranking but the
first-order estimate, which tracks it in every layer.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from hooked_moe.tables import (
    DOCUMENTS,
    EFFECTS,
    EFFECTS_SEQUENCE,
    EXPERT_WEIGHTS,
    PROGRESSIVE,
    ROUTING,
    TOKEN_TEXTS,
    TOKENS,
    write_checked_json,
    write_parquet_atomic,
)

PLANTED_LAYER = 2
DOMAINS = ("novel", "address", "reference")
PARTS = ("position", "sequence", "progressive")
ORDERS = ("descending", "ascending", "random")
HOSTILE_TEXTS = (
    *(
        "</script><script>alert(1)</script>",
        "<b>bold</b>",
        "&amp;",
        "\"'",
        "\u202egnp.exe",
        "\u2028",
        "\x00",
        "\n\n",
        "\t",
        "<!--",
    ),
)
"""Tokens that a page must show as text."""


def synthetic_effects(
    n_documents: int = 24,
    n_tokens: int = 40,
    layers: tuple[int, ...] = (0, 1, 2),
    n_experts: int = 16,
    k: int = 4,
    effect: float = 0.8,
    seed: int = 0,
) -> pa.Table:
    """An EFFECTS table with kl. Expert n_experts - 1 is never selected; `effect` is nats per unit of routing weight."""
    random = np.random.default_rng(seed)
    n_positions, n_layers = n_documents * n_tokens, len(layers)
    shape = (n_positions, n_layers, k)
    document = np.repeat(np.arange(n_documents), n_tokens)
    position = np.tile(np.arange(n_tokens), n_documents)

    popularity = np.linspace(1.5, -1.5, n_experts - 1)
    noise = random.gumbel(size=(n_positions, n_layers, n_experts - 1))
    expert = np.argsort(-(popularity + noise), axis=2)[:, :, :k]
    expert = random.permuted(expert, axis=2)  # which expert sits in which slot says nothing
    weight = -np.sort(-random.dirichlet(np.full(k + 4, 2.0), size=shape[:2])[..., :k], axis=2)
    loudness = 1 + random.permutation(n_experts) / n_experts
    steadiness = random.uniform(5, 40, size=n_experts)[expert]
    norm = loudness[expert] * random.gamma(steadiness) / steadiness * (1 + np.arange(n_layers))[:, None]

    mood = random.normal(size=(n_documents, n_layers, 1))[document]  # shared by a document's positions
    delta = 0.02 * random.standard_t(3, size=shape) * np.exp(0.4 * mood) + 0.01
    if PLANTED_LAYER in layers:
        delta[:, layers.index(PLANTED_LAYER)] += effect * (weight - weight.mean())[:, layers.index(PLANTED_LAYER)]
    baseline = np.broadcast_to(random.gamma(4, 0.8, size=(n_positions, 1, 1)), shape).copy()
    last = position == n_tokens - 1
    delta[last], baseline[last] = np.nan, np.nan

    first_order = 0.7 * delta + 0.01 * random.standard_t(5, size=shape)  # NaN at a document's end, as delta
    kl = 0.012 * random.gamma(1.5, size=shape) * np.exp(0.4 * mood)
    if PLANTED_LAYER in layers:
        kl[:, layers.index(PLANTED_LAYER)] *= np.exp(4 * effect * weight[:, layers.index(PLANTED_LAYER)])
    every = {
        "document": np.broadcast_to(document[:, None, None], shape),
        "position": np.broadcast_to(position[:, None, None], shape),
        "layer": np.broadcast_to(np.array(layers)[:, None], shape),
        "slot": np.broadcast_to(np.arange(k), shape),
        "expert": expert,
        "routing_weight": weight,
        "output_norm": norm,
        "gap_norm": weight * norm,
        "rest_cosine": np.tanh(random.normal(size=shape)),
        "rest_norm": norm.mean(axis=2, keepdims=True) * random.gamma(20, 0.05, size=shape),
        "baseline_loss": baseline,
        "delta_loss": delta,
        "first_order": first_order,
        "first_order_curved": 0.9 * delta + 0.1 * first_order,
        "kl": kl,  # also at a document's end, as measured
    }
    columns = [every[field.name].ravel().astype(field.type.to_pandas_dtype()) for field in EFFECTS]
    return pa.table(columns, schema=EFFECTS)


def synthetic_sequence(effects: pa.Table, seed: int = 2) -> pa.Table:
    """An EFFECTS_SEQUENCE table of the same removals: the same loss change in the last layer, a shaken one below it."""
    layer, delta = (effects[name].to_numpy() for name in ("layer", "delta_loss"))
    shaken = delta + (layer < layer.max()) * 0.01 * np.random.default_rng(seed).standard_t(3, size=len(delta))
    columns = {**{name: effects[name] for name in EFFECTS_SEQUENCE.names}, "delta_loss": shaken.astype(np.float32)}
    return pa.table(columns, schema=EFFECTS_SEQUENCE)


def synthetic_routing(effects: pa.Table, n_experts: int = 16, seed: int = 3) -> pa.Table:
    """A ROUTING table that counts the selections of `effects`; probabilities and entropies are made up around them."""
    random = np.random.default_rng(seed)
    document, layer, expert = (effects[name].to_numpy().astype(int) for name in ("document", "layer", "expert"))
    layers, axis = np.unique(layer, return_inverse=True)
    shape = (document.max() + 1, len(layers), n_experts)
    n_tokens = np.bincount(np.ravel_multi_index((document, axis, expert), shape), minlength=np.prod(shape)).reshape(shape)
    k = int(effects["slot"].to_numpy().max()) + 1
    tokens = n_tokens.sum(axis=2, keepdims=True) // k
    probability = (n_tokens + 0.5) * random.uniform(0.8, 1.2, size=shape)
    columns = {
        "document": np.broadcast_to(np.arange(shape[0])[:, None, None], shape),
        "layer": np.broadcast_to(layers[:, None], shape),
        "expert": np.broadcast_to(np.arange(n_experts), shape),
        "n_tokens": n_tokens,
        "document_tokens": np.broadcast_to(tokens, shape),
        "sum_probability": probability / probability.sum(axis=2, keepdims=True) * tokens,
        "sum_entropy": n_tokens * random.uniform(1.0, np.log(n_experts), size=shape),
        "max_activation": np.where(n_tokens > 0, random.gamma(9, 0.3, size=shape), np.nan),
    }
    return pa.table([columns[f.name].ravel().astype(f.type.to_pandas_dtype()) for f in ROUTING], schema=ROUTING)


def synthetic_expert_weights(layers: tuple[int, ...] = (0, 1, 2), n_experts: int = 16, seed: int = 4) -> pa.Table:
    """An EXPERT_WEIGHTS table."""
    random = np.random.default_rng(seed)
    n = len(layers) * n_experts
    rms = random.gamma(50, 0.001, size=n)
    columns = {
        "layer": np.repeat(layers, n_experts),
        "expert": np.tile(np.arange(n_experts), len(layers)),
        "router_row_norm": random.gamma(30, 0.02, size=n),
        "weight_norm": rms * 150,
        "mean_abs_weight": rms * random.uniform(0.70, 0.80, size=n),
        "rms_weight": rms,
    }
    return pa.table([columns[f.name].astype(f.type.to_pandas_dtype()) for f in EXPERT_WEIGHTS], schema=EXPERT_WEIGHTS)


def synthetic_progressive(effects: pa.Table, seed: int = 5) -> pa.Table:
    """A PROGRESSIVE table: the loss changes of single removals summed in each order, and something for their company."""
    layers, slots = (np.unique(effects[name].to_numpy()) for name in ("layer", "slot"))
    shape = (-1, len(layers), len(slots))
    delta = effects["delta_loss"].to_numpy().reshape(shape)
    kept = ~np.isnan(delta).any(axis=(1, 2))
    document, position, baseline = (
        effects[name].to_numpy().reshape(shape)[kept][:, 0, 0] for name in ("document", "position", "baseline_loss")
    )
    delta = delta[kept]
    random = np.random.default_rng(seed)
    by_order = {"descending": delta, "ascending": delta[..., ::-1], "random": random.permuted(delta, axis=2)}
    cumulative = np.stack([by_order[order].cumsum(axis=2) for order in ORDERS], axis=2)  # [P, L, order, K]
    size = cumulative.shape
    cumulative = cumulative + 0.02 * np.arange(size[3]) ** 2
    columns = {
        "document": np.broadcast_to(document[:, None, None, None], size),
        "position": np.broadcast_to(position[:, None, None, None], size),
        "layer": np.broadcast_to(layers[:, None, None], size),
        "order": np.broadcast_to(np.array(ORDERS, object)[:, None], size),
        "removed": np.broadcast_to(slots + 1, size),
        "baseline_loss": np.broadcast_to(baseline[:, None, None, None], size),
        "delta_loss": cumulative,
        "kl": cumulative**2,
    }
    return pa.table([pa.array(columns[f.name].ravel(), f.type) for f in PROGRESSIVE], schema=PROGRESSIVE)


def synthetic_run(
    directory: Path,
    n_experts: int = 16,
    parts: tuple[str, ...] = ("position",),
    vocabulary: int = 4096,
    **options: object,
) -> Path:
    """Every file of a finished measurement, in `directory`. `parts` are those of PARTS that were measured."""
    directory.mkdir(parents=True, exist_ok=True)
    effects = synthetic_effects(n_experts=n_experts, **options)  # type: ignore[arg-type]
    layers = tuple(int(layer) for layer in np.unique(effects["layer"].to_numpy()))
    write_parquet_atomic(effects, directory / "effects.parquet", row_group_size=1000)
    write_parquet_atomic(synthetic_routing(effects, n_experts), directory / "routing.parquet")
    write_parquet_atomic(synthetic_expert_weights(layers, n_experts), directory / "expert_weights.parquet")
    if "sequence" in parts:
        write_parquet_atomic(synthetic_sequence(effects), directory / "effects_sequence.parquet", row_group_size=1000)
    if "progressive" in parts:
        write_parquet_atomic(synthetic_progressive(effects), directory / "progressive.parquet", row_group_size=1000)

    first = effects.filter((effects["layer"].to_numpy() == layers[0]) & (effects["slot"].to_numpy() == 0))
    document, position = (first[name].to_numpy() for name in ("document", "position"))
    last = np.isnan(first["delta_loss"].to_numpy())
    random = np.random.default_rng(1)
    token = random.integers(0, vocabulary, len(document))
    tokens = {
        "document": document,
        "position": position,
        "window": position // 16,
        "context_position": position % 16,
        "token": token,
        "target": np.where(last, -1, np.roll(token, -1)),
        "baseline_loss": first["baseline_loss"].to_numpy(),
    }
    write_parquet_atomic(pa.table(tokens).cast(TOKENS), directory / "tokens.parquet")
    texts = {"document": document, "position": position, "text": [synthetic_text(int(one)) for one in token]}
    write_parquet_atomic(pa.table(texts).cast(TOKEN_TEXTS), directory / "token_texts.parquet")
    n = int(document.max()) + 1
    documents = {
        "document": list(range(n)),
        "id": [f"doc-{i:03d}" for i in range(n)],
        "domain": [DOMAINS[i % len(DOMAINS)] for i in range(n)],
        "title": [f"Title <{i}> & more" for i in range(n)],
        "n_tokens": np.bincount(document).tolist(),
    }
    write_parquet_atomic(pa.table(documents, schema=DOCUMENTS), directory / "documents.parquet")
    write_checked_json(synthetic_manifest(n, len(document), parts), directory / "manifest.json")
    return directory


def synthetic_text(token: int) -> str:
    """The text of a token id; one in eight is hostile."""
    return HOSTILE_TEXTS[token % len(HOSTILE_TEXTS)] if token % 8 == 0 else f" w{token}"


def synthetic_manifest(documents: int, tokens: int, parts: tuple[str, ...] = ("position",)) -> dict[str, object]:
    return json.loads(
        json.dumps(
            {
                "format": 1,
                "model": {
                    "name": "made-up-moe",
                    "source": "synthetic",
                    "revision": None,
                    "weights_sha256": "0" * 64,
                    "config": {"n_layers": 3, "n_experts": 16, "experts_per_token": 4},
                },
                "corpus": {"name": "made-up <corpus>", "sha256": "f" * 64, "documents": documents, "tokens": tokens},
                "parts": {name: {"measured": name in parts} for name in PARTS},
                "protocol": {"name": "defined", "scope": "position", "removal": "zero", "context": 16},
                "verification": [
                    {
                        "name": "an inactive expert changes nothing",
                        "passed": True,
                        "value": 0.0,
                        "threshold": 0.0,
                        "detail": "64 removals",
                    },
                    {
                        "name": "routed sum equals block output",
                        "passed": True,
                        "value": 2.4e-7,
                        "threshold": 1e-5,
                        "detail": "",
                    },
                ],
                "noise_floor": {"max_abs_nats": 2.1e-6, "mean_abs_nats": 1.3e-7, "removals": 512},
                "versions": {"python": "3.11", "torch": "2.13.0"},
            }
        )
    )
