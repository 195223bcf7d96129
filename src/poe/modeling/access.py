"""Small files of a folder or Hub repository, fetched by name; and what the Hub's refusals mean."""

import json
import os
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from transformers.utils.hub import cached_file

from .failures import SourceError


@dataclass(frozen=True)
class Access:
    """How repositories are reached; the names are those of `from_pretrained`."""

    token: str | bool | None = None
    cache_dir: str | None = None
    local_files_only: bool = False
    force_download: bool = False

    def kwargs(self, repo: str) -> dict[str, Any]:
        """Return the fields that are set as keyword arguments for transformers.

        If `repo` is not a folder and nobody answers at the Hub's address, only local files are asked for: the Hub
        client would try for half a minute per file before it looks into its cache.
        """
        fields = {name: value for name, value in vars(self).items() if value not in (None, False)}
        if self.token is False:  # not "no matter": a stored token must not be sent
            fields["token"] = False
        if not os.path.isdir(repo) and not _hub_answers():
            fields["local_files_only"] = True
            fields.pop("force_download", None)
        return fields


def fetch(repo: str, filename: str, access: Access, revision: str | None = None) -> str | None:
    """Return the local path of a file in a folder or Hub repository, None if the repository has no such file.

    Without a network the cache decides what a repository has. Raises `SourceError` when the folder or repository is
    not there, or the Hub refuses.
    """
    if os.path.isdir(repo):
        path = os.path.join(repo, filename)
        return path if os.path.isfile(path) else None
    if is_path(repo):
        raise SourceError(f"There is no folder {repo}: expected a model folder or a Hub repository such as 'me/model'.")
    try:
        return cached_file(repo, filename, revision=revision, **access.kwargs(repo))
    except Exception as error:  # the client's own errors, of the HTTP library, of the file system
        if _is_missing(error):
            return None
        raise hub_error(f"{filename} of {repo} (revision {revision or 'main'})", repo, error) from error


def read_config(repo: str, access: Access, revision: str | None = None) -> tuple[dict[str, Any], str]:
    """Return a repository's config.json and its local path; `SourceError` if there is none or it is not JSON."""
    path = fetch(repo, "config.json", access, revision)
    if path is None:
        raise SourceError(
            f"{repo} (revision {revision or 'main'}) has no config.json, or it could not be reached: expected the "
            "folder or repository of a model or stage. Check the name, the network and your token."
        )
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} is not readable JSON ({first_line(error)}). Fetch it again.") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise SourceError(f"{path} is no config of a model: expected a JSON object with `model_type`. Fetch it again.")
    return config, path


def is_path(repo: str) -> bool:
    """Return whether a name can only mean a folder (a Hub name is `name` or `owner/name`)."""
    return (
        repo.startswith((".", "~")) or os.path.isabs(repo) or repo.count("/") > 1 or (os.sep != "/" and os.sep in repo)
    )


def hub_error(what: str, repo: str, error: BaseException) -> SourceError:
    """Return the error that says what could not be done with a Hub repository, why, and what to do about it."""
    hint = hub_hint(repo, error)
    if hint is None:
        hint = f"{first_line(error)} Check the name, the network and your token, or give a local folder."
    return SourceError(f"{what} could not be reached: {hint}")


def hub_hint(repo: str, error: BaseException) -> str | None:
    """Return what the Hub's answer behind an exception means and what to do, None if the Hub did not answer."""
    response = _answer(error)
    if response is None:
        return None
    page = f"{endpoint()}/{repo}"
    status, code = response.status_code, response.headers.get("X-Error-Code")
    if code == "EntryNotFound":
        return None
    if code == "GatedRepo":
        return f"{repo} is gated ({status}). Ask for access at {page}, then log in (`hf auth login`) or pass token=..."
    if code == "RevisionNotFound":
        return f"{repo} has no such revision ({status}). Expected a branch, a tag or a commit: see {page}."
    if status in (401, 404):
        return (
            f"there is no such repository, or it is private and your token may not see it ({status}). "
            "Check the name; if it is private, log in (`hf auth login`) or pass token=..."
        )
    if status == 403:
        return f"your token may not do this ({status}). Check its permissions at {endpoint()}/settings/tokens."
    if status == 429:
        return f"the Hub asks to slow down ({status}). Wait some minutes and try again; being logged in raises limits."
    return f"the Hub answered {status}. Try again later; what is cached opens with local_files_only=True."


def endpoint() -> str:
    """Return the Hub's address, by the Hub client's own rule."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _is_missing(error: BaseException) -> bool:
    """Return whether transformers says that a repository, or without a network the cache, has no such file.

    It says so by a bare OSError. What the Hub or the disk answered hangs on it as a response, a cause or a number.
    """
    bare = type(error) is OSError and error.errno is None and _answer(error) is None
    return bare and type(error.__cause__).__name__ in ("NoneType", "LocalEntryNotFoundError")


def _answer(error: BaseException | None) -> Any:
    """Return the HTTP response that an exception or one of its causes carries, None if there is none."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        response = getattr(error, "response", None)
        if isinstance(getattr(response, "status_code", None), int):
            return response
        error = error.__cause__ or error.__context__
    return None


def _hub_answers() -> bool:
    """Return whether a connection to the Hub can be opened; behind a proxy that cannot be known, so it is assumed."""
    address = urlsplit(endpoint())
    if getproxies().get(address.scheme) or not address.hostname:
        return True
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), timeout=5).close()
    except OSError:
        return False
    return True
