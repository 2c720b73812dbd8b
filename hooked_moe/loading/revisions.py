"""Revisions of a model on the hub: whether they exist, before anything is downloaded, and their deletion from the cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

from hooked_moe.checks import unknown_name
from hooked_moe.loading.hub_errors import ANSWERS, HubError, explained

_COMMIT = re.compile(r"[0-9a-f]{40}")


def check_revisions(hub_id: str, revisions: Sequence[str]) -> None:
    """Raise `UnknownNameError` for a revision that is no branch or tag of a model on the hub; commits are taken as they are.

    Raises `HubError` where the hub does not list them.
    """
    try:
        refs = huggingface_hub.HfApi().list_repo_refs(hub_id)
    except ANSWERS as error:
        raise HubError(explained(error, "model", hub_id, None)) from error
    known = [ref.name for ref in (*refs.branches, *refs.tags)]
    for revision in revisions:
        if revision not in known and not _COMMIT.fullmatch(revision):
            raise unknown_name(f"revision of {hub_id}", revision, known, f"The hub lists {len(known)} branches and tags of it.")


def delete_revision(hub_id: str, commit: str, cache_dir: str | None = None) -> int:
    """Delete a commit of a model from the hub's cache, but for files that other commits share; returns the bytes freed.

    Raises `ValueError` for a commit that the cache does not have.
    """
    cache = huggingface_hub.scan_cache_dir(Path(cache_dir or constants.HF_HUB_CACHE))
    if not any(commit == revision.commit_hash for repo in cache.repos if repo.repo_id == hub_id for revision in repo.revisions):
        raise ValueError(f"the cache {cache_dir or constants.HF_HUB_CACHE} has no commit {commit} of {hub_id}")
    strategy = cache.delete_revisions(commit)
    strategy.execute()
    return int(strategy.expected_freed_size)
