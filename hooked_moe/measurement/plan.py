"""The plan of a measurement: what identifies it, and what its directory is claimed for."""

from __future__ import annotations

import json
from typing import Any

from hooked_moe.expert_mask import RemovalName
from hooked_moe.loading.fingerprint import model_fingerprint, versions
from hooked_moe.measurement.budget import Budget
from hooked_moe.measurement.part_spec import ProductsName
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.transformer import Transformer


def measurement_plan(
    model: Transformer,
    tokenized: TokenizedCorpus,
    layers: tuple[int, ...],
    removal: RemovalName,
    budget: Budget | None = None,
    products: ProductsName | None = None,
    weights_sha256: str | None = None,
) -> dict[str, Any]:
    """A description as JSON values: two measurements with the same one give the same tables."""
    corpus = tokenized.corpus
    plan: dict[str, Any] = {
        "format": 4,
        "model": model_fingerprint(model, weights_sha256),
        "corpus": {
            "name": corpus.name,
            "sha256": corpus.sha256,
            "documents": len(corpus.documents),
            "tokens": sum(tokenized.lengths()),
            "tokens_sha256": tokenized.sha256(),
        },
        "measurement": {
            "layers": list(layers),
            "removal": removal,
            "context": tokenized.n_ctx,
            "tokens_per_document": "all" if tokenized.limit is None else tokenized.limit,
            "bos": tokenized.bos,
        },
        "versions": versions(),
    }
    if products is not None:
        plan["measurement"]["products"] = products
    if budget is not None:
        plan["measurement"]["budget"] = budget.as_json()
    return json.loads(json.dumps(plan))  # tuples become lists, as in the plan that is read back
