"""Verification before a measurement: once for each scope, recorded in the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int

from hooked_moe.counterfactuals import Scope
from hooked_moe.counterfactuals.engine.steps import Steps, in_turn, run_without_grad
from hooked_moe.expert_mask import RemovalName
from hooked_moe.loading.fingerprint import WeightsChecksum, weights_sha256
from hooked_moe.measurement.noise_floor import noise_floor
from hooked_moe.measurement.part_spec import ProductsName
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.measurement.verification import EXACTNESS, MINIMUM_TOKENS, Check, Clean, clean_losses, verify
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
    clean: Clean | None = None,
) -> list[Done]:
    """Make the checks that gate a measurement in this scope and by these products, unless the manifest has them; what they find
    is added to it. `picked`: the measurement makes single removals only. `clean`: from `first_reading`.

    Returns what the tasks `beside` them return, which share their pass through the layers where weights are streamed. Raises
    `ValueError` if a check fails, and for a corpus without a document that is long enough.
    """
    known = [check["name"] for check in manifest.get("verification", [])]
    if EXACTNESS[scope] in known:
        return run_without_grad(in_turn(beside, model.streams))
    windows = _longest_first(tokenized)
    if len(windows[0]) < MINIMUM_TOKENS:
        raise ValueError(
            f"the longest document of {tokenized.corpus.name!r} has {len(windows[0])} tokens, and verifying the model "
            f"takes {MINIMUM_TOKENS}: give a corpus with longer documents"
        )
    length = min(len(windows[0]), 128)
    batch = np.stack([window[:length] for window in windows if len(window) >= length][:4])
    of_change = products if scope == "position" else None
    checking = verify.steps(model, _as_batch(windows[0]), removal, (scope,), products=of_change, picked=picked, clean=clean)
    tasks: list[Steps[Any]] = [checking, *beside]
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


def first_reading(model: Transformer, tokenized: TokenizedCorpus) -> tuple[str, Clean | None]:
    """The checksum of the weights, and of a streamed model, from the same reading of them, the losses that verification begins
    with."""
    longest = _longest_first(tokenized)[0]
    if not model.streams or len(longest) < MINIMUM_TOKENS:
        return weights_sha256(model), None
    tasks: list[Steps[Any]] = [_checksum(model), clean_losses.steps(model, _as_batch(longest))]
    sha256, clean = run_without_grad(in_turn(tasks, streamed=True))
    return sha256, clean


def _checksum(model: Transformer) -> Steps[str]:
    """`weights_sha256`, with a pause after every layer."""
    checksum = WeightsChecksum(model)
    for layer in range(model.cfg.n_layers):
        if layer:
            yield
        checksum.add_layer(layer)
    return checksum.finish()


def _longest_first(tokenized: TokenizedCorpus) -> list[Int[np.ndarray, " pos"]]:
    windows = (window.tokens for windows in tokenized.documents for window in windows)
    return sorted(windows, key=len, reverse=True)


def _as_batch(window: Int[np.ndarray, " pos"]) -> Int[torch.Tensor, "1 pos"]:
    return torch.from_numpy(window[None])


def _as_line(check: Check) -> str:
    verdict = "pass" if check.passed else "FAIL"
    return f"  {verdict}  {check.name}: {check.value:.3g} (threshold {check.threshold:.3g}) - {check.detail}"
