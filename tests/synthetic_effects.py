"""A small made-up run directory: loss changes as real ones are (heavy tails, alike within a document), with the truth known.

In layer PLANTED_LAYER the loss change follows the routing weight; everywhere else it is blind to every ranking.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from hooked_moe.tables import DOCUMENTS, EFFECTS, TOKENS, write_json_atomic, write_parquet_atomic

PLANTED_LAYER = 2
DOMAINS = ("novel", "address", "reference")


def synthetic_effects(
    n_documents: int = 24,
    n_tokens: int = 40,
    layers: tuple[int, ...] = (0, 1, 2),
    n_experts: int = 16,
    k: int = 4,
    effect: float = 0.8,
    seed: int = 0,
) -> pa.Table:
    """An EFFECTS table. Expert n_experts - 1 is never selected; `effect` is nats per unit of routing weight."""
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
        "baseline_loss": baseline,
        "delta_loss": delta,
    }
    return pa.table([every[field.name].ravel().astype(field.type.to_pandas_dtype()) for field in EFFECTS], schema=EFFECTS)


def synthetic_run(directory: Path, n_experts: int = 16, **options: object) -> Path:
    """effects, tokens, documents and manifest of a finished measurement, in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    effects = synthetic_effects(n_experts=n_experts, **options)  # type: ignore[arg-type]
    write_parquet_atomic(effects, directory / "effects.parquet", row_group_size=1000)

    first = effects.filter((effects["layer"].to_numpy() == 0) & (effects["slot"].to_numpy() == 0))
    document, position = (first[name].to_numpy() for name in ("document", "position"))
    last = np.isnan(first["delta_loss"].to_numpy())
    random = np.random.default_rng(1)
    token = random.integers(0, 4096, len(document))
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
    n = int(document.max()) + 1
    documents = {
        "document": list(range(n)),
        "id": [f"doc-{i:03d}" for i in range(n)],
        "domain": [DOMAINS[i % len(DOMAINS)] for i in range(n)],
        "title": [f"Title <{i}> & more" for i in range(n)],
        "n_tokens": np.bincount(document).tolist(),
    }
    write_parquet_atomic(pa.table(documents, schema=DOCUMENTS), directory / "documents.parquet")
    write_json_atomic(synthetic_manifest(n, len(document)), directory / "manifest.json")
    return directory


def synthetic_manifest(documents: int, tokens: int) -> dict[str, object]:
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
