"""What the hub or its client refused, in one line: which model, what went wrong, what to do."""

from __future__ import annotations

import json
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants, errors

from hooked_moe.checks import printable

TRANSPORT_ERROR: type[Exception] = errors.HfHubHTTPError.__bases__[0]
"""The base error of the HTTP library that this version of huggingface_hub is built on."""
ANSWERS: tuple[type[Exception], ...] = (
    TRANSPORT_ERROR,
    OSError,
    errors.EntryNotFoundError,
    errors.HFValidationError,
    json.JSONDecodeError,
)
"""What the client raises where the hub, the connection, the cache or the name is at fault."""
LOG_IN = "log in with `hf auth login`"


class HubError(OSError):
    """The hub did not give the model or the data set; the message says what to do."""


def root(error: Exception) -> Exception:
    """What the hub or the connection said, where the client wraps it in "not in the cache either"."""
    cause = error.__cause__
    return cause if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(cause, Exception) else error


def is_outage(error: Exception) -> bool:
    """Whether the hub could not be asked: no answer, one that is not the hub's, or one that it cannot answer now."""
    error = root(error)
    if isinstance(error, errors.HfHubHTTPError):
        return _is_passing(error.response.status_code)
    return isinstance(error, (TRANSPORT_ERROR, ConnectionError, TimeoutError, json.JSONDecodeError))


def explained(error: Exception, kind: str, hub_id: str, revision: str | None) -> str:
    """The line for an error of the client, `kind` being "model" or "data set"."""
    error = root(error)
    name = repr(hub_id) if kind == "model" else f"the data set {hub_id!r}"
    where = name + (f" at revision {revision!r}" if revision else "")
    page = f"{constants.ENDPOINT}/{'' if kind == 'model' else 'datasets/'}{hub_id}"
    match error:
        case errors.GatedRepoError():
            return f"{name} is gated ({reason(error)}): ask for access at {page}, or {LOG_IN} as a user who has it"
        case errors.RepositoryNotFoundError():
            what = "neither a directory here nor a model" if kind == "model" else "not"
            return f"{name} is {what} on the hub ({reason(error)}): check the spelling; if it is private, {LOG_IN}"
        case errors.RevisionNotFoundError():
            return f"{name} has no revision {revision!r} ({reason(error)}): give a branch, a tag or a full commit hash"
        case errors.RemoteEntryNotFoundError():
            return f"{where} has no {_file_of(error)} on the hub ({reason(error)}): {_other_place(error)}"
        case errors.HFValidationError():
            return f"{hub_id!r} is not a hub id, which is 'org/name': {one_line(error)}"
        case errors.HfHubHTTPError():
            return f"could not fetch {where} from the hub ({reason(error)}{_added(error)}): {_advice(error)}"
        case json.JSONDecodeError():
            return (
                f"could not fetch {where}: what answers at {constants.ENDPOINT} is not the hub: check HF_ENDPOINT, and that no "
                "proxy or login page of the network stands in between"
            )
        case OSError(errno=int()) if not isinstance(error, (ConnectionError, TimeoutError)):
            return (
                f"could not store {where} ({one_line(error)}): make room in the cache directory and see that it can be written "
                "to, or give another as cache_dir"
            )
    return f"could not fetch {where} from {constants.ENDPOINT} ({reason(error)}): check the connection and try again"


def reason(error: Exception) -> str:
    """What went wrong, in a few words: "503 Service Unavailable"."""
    error = root(error)
    if isinstance(error, errors.HfHubHTTPError):
        return f"{error.response.status_code} {error.response.reason_phrase}".strip()
    return f"{type(error).__name__}: {one_line(error)}"


def one_line(error: Exception) -> str:
    """The text of an error without its line breaks, cut where it becomes a page."""
    return printable(" ".join(str(error).split()))


def _added(error: errors.HfHubHTTPError) -> str:
    """What the hub says besides the status."""
    added = printable(" ".join(error.response.headers.get("X-Error-Message", "").split())).rstrip(".")
    return f": {added}" if added else ""


def _advice(error: errors.HfHubHTTPError) -> str:
    response = error.response
    match response.status_code:
        case 401:
            return f"{LOG_IN}; a token that is set in HF_TOKEN must be valid"
        case 403:
            return f"give a token that may read it: {LOG_IN}"
        case 429:
            wait = response.headers.get("Retry-After", "")
            wait = f"{wait} seconds" if wait.isdecimal() else "some minutes"
            return f"too much was asked of the hub from here: wait {wait}, or {LOG_IN}, which raises the limit"
        case 404:
            return "check the spelling, and HF_ENDPOINT if it is set"
        case status if _is_passing(status):
            return "the trouble is the hub's own: try again later"
    return "check the revision, and HF_ENDPOINT if it is set"


def _is_passing(status: int) -> bool:
    return status in (408, 429) or status >= 500


def _file_of(error: errors.HfHubHTTPError) -> str:
    _, resolved, path = unquote(urlsplit(str(error.response.request.url)).path).partition("/resolve/")
    return path.partition("/")[2] if resolved else "such file"


def _other_place(error: errors.HfHubHTTPError) -> str:
    if _file_of(error) == "config.json":
        return "it is not a model in HuggingFace layout; give another one, or another revision"
    return "give another revision"
