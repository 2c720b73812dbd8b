"""Verification before a measurement: once for each scope, recorded in the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from hooked_moe.counterfactuals import Scope
from hooked_moe.counterfactuals.engine.steps import Steps, in_turn, run_without_grad
from hooked_moe.expert_mask import RemovalName
from hooked_moe.measurement.noise_floor import noise_floor
from hooked_moe.measurement.part_spec import ProductsName
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.measurement.verification import EXACTNESS, MINIMUM_TOKENS, Check, verify
from hooked_moe.transformer import Transformer

Done = TypeVar("Done")


def verify_once(
    manifest: dict[str, Any],
    model: Transformer,
    tokenized: TokenizedCorpus,
    removal: RemovalName,
    scope: Scope,
    log: Callable[[str], object],
    beside: Sequence[Steps[Done]] = (),
    products: ProductsName | None = None,
    picked: bool = False,
) -> list[Done]:
    """Make the checks that gate a measurement in this scope and by these products, unless the manifest has them; what they find
    is added to it. `picked`: the measurement makes single removals only.

    Returns what the tasks `beside` them return, which share their pass through the layers where weights are streamed. Raises
    `ValueError` if a check fails, and for a corpus without a document that is long enough.
    """
    known = [check["name"] for check in manifest.get("verification", [])]
    if EXACTNESS[scope] in known:
        return run_without_grad(in_turn(beside, model.streams))
    windows = sorted((window.tokens for windows in tokenized.documents for window in windows), key=len, reverse=True)
    if len(windows[0]) < MINIMUM_TOKENS:
        raise ValueError(
            f"the longest document of {tokenized.corpus.name!r} has {len(windows[0])} tokens, and verifying the model "
            f"takes {MINIMUM_TOKENS}: give a corpus with longer documents"
        )
    length = min(len(windows[0]), 128)
    batch = np.stack([window[:length] for window in windows if len(window) >= length][:4])
    longest = torch.from_numpy(windows[0][None])
    of_change = products if scope == "position" else None
    tasks: list[Steps[Any]] = [verify.steps(model, longest, removal, (scope,), products=of_change, picked=picked), *beside]
    if "noise_floor" not in manifest:
        tasks.append(noise_floor.steps(model, torch.from_numpy(batch)))
    checks, *results = run_without_grad(in_turn(tasks, model.streams))
    checks = [check for check in checks if check.name not in known or not check.passed]
    for check in checks:
        log(_as_line(check))
    failed = [check.name for check in checks if not check.passed]
    if failed:
        raise ValueError(
            f"verification failed ({', '.join(failed)}); nothing was measured, because the effects could not be trusted"
        )
    manifest["verification"] = manifest.get("verification", []) + [dataclasses.asdict(check) for check in checks]
    if "noise_floor" not in manifest:
        floor = results.pop()
        log(f"  noise floor: {floor:.3g} nats\n")
        manifest["noise_floor"] = {"max_abs_nats": floor, "windows": len(batch), "tokens_per_window": length}
    return results


def _as_line(check: Check) -> str:
    verdict = "pass" if check.passed else "FAIL"
    return f"  {verdict}  {check.name}: {check.value:.3g} (threshold {check.threshold:.3g}) - {check.detail}"
