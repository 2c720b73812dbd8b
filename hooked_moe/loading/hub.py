"""Fetching from the HuggingFace hub: models (safetensors, json and templates only, config first) and single files of data sets.

What is fetched is of one commit: a branch or tag is resolved once, and everything is asked for by the commit. When all is there,
the cache is told which commit the branch or tag was, so that the same name leads to it offline.

Online, the hub is always asked what a branch or tag is now. If it does not answer, that is an error, also where an earlier state
is in the cache: the two may differ without a sign of it. The message says that the earlier state is there and how to load it.
A full commit hash cannot come to mean anything else: that is loaded from the cache, with a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Literal

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.file_download import REGEX_COMMIT_HASH, repo_folder_name
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from hooked_moe.checks import expanded_path
from hooked_moe.loading.beside import refuse_adapter
from hooked_moe.loading.hub_errors import ANSWERS, HubError, explained, is_outage, one_line, reason, root
from hooked_moe.warn_user import warn_user

NEEDED_FILES = ["*.safetensors", "*.json"]
ALLOWED_FILES = [*NEEDED_FILES, "*.jinja"]
"""No pickles and no code: nothing that is downloaded can run. Chat templates are text here, to be saved along."""
IGNORED_FILES = ["[!a]*/*", "a[!d]*/*", "consolidated*"]
"""Other copies of the weights, which repositories keep beside them, most in folders; additional_chat_templates is one to have."""


def download(
    hub_id: str,
    revision: str | None,
    cache_dir: str | PathLike[str] | None,
    local_files_only: bool,
    check_config: Callable[[Path], object],
    weights: bool = True,
) -> tuple[Path, str]:
    """The local directory of a model on the hub, with its weights or without them, and its commit.

    `check_config` is called with config.json before any weights are fetched, and may raise. With `local_files_only` (or
    HF_HUB_OFFLINE set) only the cache is looked at. Raises `HubError`.
    """
    model = Repository(
        kind="model",
        hub_id=hub_id,
        revision=revision,
        cache_dir=None if cache_dir is None else fspath(cache_dir),
        offline=local_files_only or constants.HF_HUB_OFFLINE,
        allowed=ALLOWED_FILES if weights else ["*.json", "*.jinja"],
        ignored=IGNORED_FILES,
        otherwise="give a local directory",
    ).resolved()
    refuse_adapter(set(model.listed), model)
    config = model.file("config.json")
    check_config(config)
    commit = config.parent.name  # the cache keeps each commit in a folder of that name, also where only the cache was asked
    directory = replace(model, commit=commit).snapshot()
    if weights:
        model.name_commit(directory)
    return directory, commit


def download_file(
    hub_id: str, file: str, revision: str | None, cache_dir: str | PathLike[str] | None, local_files_only: bool, otherwise: str
) -> Path:
    """The local path of a file in a data set on the hub. `otherwise` is what one can do without it. Raises `HubError`."""
    data_set = Repository(
        kind="dataset",
        hub_id=hub_id,
        revision=revision,
        cache_dir=None if cache_dir is None else fspath(cache_dir),
        offline=local_files_only or constants.HF_HUB_OFFLINE,
        allowed=[file],
        ignored=(),
        otherwise=otherwise,
    ).resolved()
    path = data_set.file(file)
    data_set.name_commit(path.parents[file.count("/")])
    return path


@dataclass(frozen=True)
class Repository:
    """A model or data set on the hub, and what is wanted of it."""

    kind: Literal["model", "dataset"]
    hub_id: str
    revision: str | None
    """As the user gives it: a branch, a tag, a commit, or None for the main branch."""
    cache_dir: str | None
    offline: bool
    allowed: Sequence[str]
    ignored: Sequence[str]
    otherwise: str
    commit: str | None = None
    """What the revision is, where the hub was asked."""
    listed: tuple[str, ...] = ()
    """The files of that commit, wanted or not."""

    @property
    def asked(self) -> str | None:
        """The revision to ask for: the commit, once it is known."""
        return self.commit or self.revision

    def resolved(self) -> Repository:
        """The same at the commit that its revision is now; offline, as it is."""
        if self.offline:
            return self
        hub = huggingface_hub.HfApi()
        with self.explained():
            try:
                ask = hub.model_info if self.kind == "model" else hub.dataset_info
                info = ask(self.hub_id, revision=self.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            except ANSWERS as error:
                if not (is_outage(error) and REGEX_COMMIT_HASH.fullmatch(self.revision or "") and self.cached_commit()):
                    raise
                warn_user(
                    f"could not ask the hub for {self} ({reason(error)}); a commit never changes, so it is loaded from the "
                    "local cache"
                )
                return replace(self, offline=True)
        if info.sha is None:
            raise HubError(
                f"{constants.ENDPOINT} does not say which commit {self} is: check HF_ENDPOINT, or give a full commit hash"
            )
        return replace(self, commit=info.sha, listed=tuple(sibling.rfilename for sibling in info.siblings or ()))

    def file(self, name: str) -> Path:
        with self.explained():
            return Path(
                huggingface_hub.hf_hub_download(
                    self.hub_id,
                    name,
                    repo_type=self.kind,
                    revision=self.asked,
                    cache_dir=self.cache_dir,
                    local_files_only=self.offline,
                )
            )

    def snapshot(self) -> Path:
        """The directory with all files that are wanted."""
        with self.explained():
            directory = self._snapshot(self.asked, self.offline)
        wanted = filter_repo_objects(self.listed, allow_patterns=list(self.allowed), ignore_patterns=list(self.ignored))
        missing = [name for name in wanted if not (directory / name).is_file()]
        if missing:  # without a list of the files, the client is content with those that are here, and does not say why
            with self.explained():
                list(huggingface_hub.HfApi().list_repo_tree(self.hub_id, repo_type=self.kind, revision=self.asked))
            raise HubError(
                f"could not fetch all of {self} from {constants.ENDPOINT}, which stopped answering; missing are {len(missing)} "
                f"files ({', '.join(missing[:3])}{', ...' if missing[3:] else ''}): try again later; what is here is kept"
            )
        return directory

    def name_commit(self, snapshot: Path) -> None:
        """Note in the cache that the revision is the commit of this snapshot, as the hub's client does: `refs/main` holds it.

        To be called when everything is there. The client notes it before it fetches, and if that is cut short, an earlier state
        that is all there cannot be found offline any more.
        """
        name = self.revision or constants.DEFAULT_REVISION
        ref = snapshot.parents[1] / "refs" / name
        if self.offline or name == snapshot.name or (ref.is_file() and ref.read_text() == snapshot.name):
            return
        from hooked_moe.tables import write_text_atomic  # pyarrow is not for everyone who loads a model

        try:
            ref.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(snapshot.name, ref)
        except OSError as error:
            warn_user(
                f"could not note in the cache that {self} is commit {snapshot.name} ({one_line(error)}): to load it offline, "
                f"give revision={snapshot.name!r}"
            )

    def cached_commit(self) -> str | None:
        """The commit that would be loaded offline, where one would be, as far as the cache knows."""
        try:
            directory = self._snapshot(self.revision, offline=True)
        except errors.LocalEntryNotFoundError:
            return None
        needed = NEEDED_FILES if self.kind == "model" else self.allowed
        return directory.name if all(any(directory.glob(pattern)) for pattern in needed) else None

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn the errors of the hub's client into a `HubError`."""
        try:
            yield
        except ANSWERS as error:
            if self.offline and isinstance(error, errors.LocalEntryNotFoundError):
                raise HubError(self._not_cached(error)) from error
            line = explained(error, "model" if self.kind == "model" else "data set", self.hub_id, self.revision)
            raise HubError(line + self._instead(error)) from error

    def __str__(self) -> str:
        name = repr(self.hub_id) if self.kind == "model" else f"the data set {self.hub_id!r}"
        return name + (f" at revision {self.revision!r}" if self.revision else "")

    def _instead(self, error: Exception) -> str:
        """What else can be done where it is the hub that failed."""
        if not isinstance(root(error), errors.HfHubHTTPError) and not is_outage(error):
            return ""
        commit = self.cached_commit()
        if commit is not None:
            return f"; or load commit {commit}, which is in the local cache, with local_files_only=True or HF_HUB_OFFLINE=1"
        return f"; or {self.otherwise}" if is_outage(error) else ""

    def _not_cached(self, error: errors.LocalEntryNotFoundError) -> str:
        missing = _missing_files(error)
        what = f"only partly in the local cache ({missing})" if missing else "not in the local cache"
        cache = expanded_path(self.cache_dir or constants.HF_HUB_CACHE)
        snapshots = cache / repo_folder_name(repo_id=self.hub_id, repo_type=self.kind) / "snapshots"
        others = [self._state(folder.name) for folder in sorted(snapshots.glob("*")) if folder.name != self.asked]
        return (
            f"{self} is {what}: load it once online, without local_files_only and HF_HUB_OFFLINE, or give the cache_dir that "
            f"holds it, or {self.otherwise}"
        ) + (f". The cache has other commits of it, to be given as revision: {', '.join(others)}" if others else "")

    def _state(self, commit: str) -> str:
        """A commit in the cache, and what the cache lacks of it, if that is known."""
        try:
            self._snapshot(commit, offline=True)
        except errors.LocalEntryNotFoundError as error:
            return f"{commit} ({_missing_files(error)})"
        return commit

    def _snapshot(self, revision: str | None, offline: bool) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                self.hub_id,
                repo_type=self.kind,
                revision=revision,
                cache_dir=self.cache_dir,
                local_files_only=offline,
                allow_patterns=list(self.allowed),
                ignore_patterns=list(self.ignored),
            )
        )


def _missing_files(error: Exception) -> str:
    """Which files of a state the cache lacks, in the client's words; empty where there is none of it, or no list of its files."""
    return str(error).partition("is incomplete: ")[2].partition(". Outgoing")[0]
