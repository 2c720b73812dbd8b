"""Fetching a checkpoint from the HuggingFace hub: safetensors and json only, at one commit, config first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import cast

import huggingface_hub
from huggingface_hub import errors

ALLOWED_FILES = ["*.safetensors", "*.json"]
"""No pickles and no code: nothing that is downloaded can run."""
IGNORED_FILES = ["*/*", "consolidated*"]
"""Other copies of the weights that repositories keep beside them."""

_TRANSPORT_ERRORS = cast(tuple[type[Exception], ...], errors.HfHubHTTPError.__bases__)
"""OSError, and the base error of the HTTP library that this version of huggingface_hub is built on."""


class HubError(OSError):
    """The hub did not give the checkpoint; the message says what to do."""


def download(
    hub_id: str,
    revision: str | None,
    cache_dir: str | PathLike[str] | None,
    local_files_only: bool,
    check_config: Callable[[Path], object],
) -> tuple[Path, str]:
    """The local directory of a hub checkpoint, and its commit.

    The revision is resolved to a commit first, so that all files are of one state of the repository. `check_config` is called
    with config.json before any weights are fetched, and may raise. With `local_files_only` (or HF_HUB_OFFLINE set) only the
    cache is looked at. Raises `HubError`.
    """
    local_files_only = local_files_only or huggingface_hub.is_offline_mode()
    cache = None if cache_dir is None else fspath(cache_dir)
    with _explained(hub_id, revision, local_files_only):
        commit = revision
        if not local_files_only:
            commit = huggingface_hub.HfApi().model_info(hub_id, revision=revision).sha
        config = Path(
            huggingface_hub.hf_hub_download(
                hub_id, "config.json", revision=commit, cache_dir=cache, local_files_only=local_files_only
            )
        )
    check_config(config)
    commit = config.parent.name  # the cache keeps each commit in a folder of that name, also where only the cache was asked
    with _explained(hub_id, revision, local_files_only):
        directory = huggingface_hub.snapshot_download(
            hub_id,
            revision=commit,
            cache_dir=cache,
            local_files_only=local_files_only,
            allow_patterns=ALLOWED_FILES,
            ignore_patterns=IGNORED_FILES,
        )
    return Path(directory), commit


@contextmanager
def _explained(hub_id: str, revision: str | None, local_files_only: bool) -> Iterator[None]:
    """Turn the hub library's errors into a `HubError` that says what to do."""
    where = f"{hub_id!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(
            f"{hub_id!r} is gated: ask for access at https://huggingface.co/{hub_id}, then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{hub_id!r} is neither a directory here nor a model on the hub: check the spelling; "
            "if it is private, log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{hub_id!r} has no revision {revision!r}: give a branch, a tag or a full commit hash") from error
    except errors.LocalEntryNotFoundError as error:
        if local_files_only:
            raise HubError(
                f"{where} is not (wholly) in the local cache: load it once online, without local_files_only and HF_HUB_OFFLINE, "
                "or give the cache_dir that holds it"
            ) from error
        raise HubError(_unreachable(where, error)) from error
    except errors.EntryNotFoundError as error:
        raise HubError(f"{where} has no config.json on the hub, so it is not a model in HuggingFace layout") from error
    except errors.HFValidationError as error:
        raise HubError(f"{hub_id!r} is not a hub id, which is 'org/name': {error}") from error
    except _TRANSPORT_ERRORS as error:
        raise HubError(_unreachable(where, error)) from error


def _unreachable(where: str, error: Exception) -> str:
    return (
        f"could not fetch {where} from the hub ({type(error).__name__}: {error}): check the connection, or pass "
        "local_files_only=True if it was downloaded before, or give a local directory"
    )
