"""Fetch files of a folder or Hub repository by name, and explain the errors of the Hub."""

import json
import os
import socket
import stat
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from transformers.utils.hub import cached_file, is_offline_mode

from .failures import SourceError
from .saves import finish_save

MOST_JSON_BYTES, DEEPEST_JSON = 1 << 25, 100  # of a config; the largest index of shards has a third of that


@dataclass(frozen=True)
class Access:
    """Options for reaching repositories, with the names of `from_pretrained`."""

    token: str | bool | None = None
    cache_dir: str | None = None
    local_files_only: bool = False
    force_download: bool = False

    def kwargs(self, repo: str) -> dict[str, Any]:
        """Return the fields that are set as keyword arguments for transformers.

        If the Hub cannot be reached, they restrict it to local files: the Hub client would otherwise try for half a
        minute per file before it reads its cache.
        """
        fields = {name: value for name, value in vars(self).items() if value not in (None, False)}
        if self.token is False:  # False means: send no stored token
            fields["token"] = False
        if not os.path.isdir(repo) and not _can_reach_hub():
            fields["local_files_only"] = True
            fields.pop("force_download", None)
        return fields


def fetch(repo: str, filename: str, access: Access, revision: str | None = None) -> str | None:
    """Return the local path of a file in a folder or Hub repository, None if it has no such file.

    Without a network the Hub client's cache is used. Raises `SourceError` if the folder or repository does not exist,
    or the Hub refuses.
    """
    if os.path.isdir(repo):
        path = os.path.join(repo, filename)
        if not os.path.lexists(path):
            return None
        check_file(path)
        return path
    if os.path.isfile(repo):
        gguf = " A GGUF file is for llama.cpp: open the model that it was made from." if repo.endswith(".gguf") else ""
        raise SourceError(f"{repo} is a file: expected the folder of a model or stage, with its config.json.{gguf}")
    if is_path(repo):
        raise SourceError(
            f"There is no folder {repo} (from the folder {os.getcwd()}): expected a model folder or a Hub repository "
            "such as 'me/model'."
        )
    try:
        return cached_file(repo, filename, revision=revision, **access.kwargs(repo))
    except Exception as error:  # errors of the Hub client, the HTTP library or the file system
        if _is_missing(error):
            return None
        raise hub_error(f"{filename} of {repo} (revision {revision or 'main'})", repo, error) from error


def read_config(repo: str, access: Access, revision: str | None = None) -> tuple[dict[str, Any], str]:
    """Return a repository's config.json and its local path. Raises `SourceError` if it is missing or not JSON."""
    finish_save(repo)
    path = fetch(repo, "config.json", access, revision)
    if path is None:
        raise SourceError(_explain_missing_config(repo, access, revision))
    config = read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise SourceError(f"{path} is not a model config: expected a JSON object with `model_type`. Fetch it again.")
    for name in ("generation_config.json", "adapter_config.json"):  # transformers opens them by itself
        if os.path.isdir(repo) and os.path.lexists(os.path.join(repo, name)):
            read_json(os.path.join(repo, name))
    return config, path


def _explain_missing_config(repo: str, access: Access, revision: str | None) -> str:
    """Return the reason why there is no config.json: none in a folder or repository, offline, or no way to the Hub."""
    expected = "expected the folder or repository of a model or stage"
    if os.path.isdir(repo):
        return f"The folder {repo} has no config.json: {expected}."
    fetch_it = f"fetch it once where there is a network (hf download {repo}), or give a local folder"
    if access.local_files_only or is_offline_mode():
        by = "local_files_only" if access.local_files_only else "the environment variable HF_HUB_OFFLINE"
        return f"{repo} is not in the cache of the Hub client, and {by} forbids the network: {fetch_it}."
    if not _can_reach_hub():
        return (
            f"{repo} is no folder here and not in the cache of the Hub client, and {hub_url()} cannot be reached: "
            f"check the network, {fetch_it}."
        )
    return f"The repository {repo} (revision {revision or 'main'}) has no config.json: {expected}."


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the JSON object in a file of a folder or repository.

    Raises `SourceError` if it is not a regular file, larger than `MOST_JSON_BYTES`, not JSON, not an object, or nested
    more deeply than `DEEPEST_JSON`.
    """
    check_file(path, MOST_JSON_BYTES)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not readable JSON ({first_line(error)}). Fetch it again.") from error
    if not isinstance(content, dict):
        raise SourceError(f"{path}: expected a JSON object, got {type(content).__name__}. Fetch it again.")
    level: list[Any] = [content]
    for _ in range(DEEPEST_JSON):
        level = [
            child
            for value in level
            for child in (value.values() if isinstance(value, dict) else value)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return content
    raise SourceError(f"{path} is nested more deeply than {DEEPEST_JSON} levels. Fetch it again.")


def check_file(path: str | os.PathLike[str], most_bytes: int | None = None) -> None:
    """Raise `SourceError` unless a path is a regular file, or a link to one, of at most `most_bytes`.

    Opening a pipe would wait forever, and a device or a sparse file has no end.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}.") from error
    if not stat.S_ISREG(status.st_mode):
        raise SourceError(f"{path} is not a regular file: expected a file of a model or stage. Remove it.")
    if most_bytes is not None and status.st_size > most_bytes:
        raise SourceError(f"{path} has {status.st_size:,} bytes: expected at most {most_bytes:,}. Remove it.")


def is_path(repo: str) -> bool:
    """Return whether a name can only be a folder's (a Hub name is `name` or `owner/name`)."""
    return repo.startswith((".", "~")) or os.path.isabs(repo) or repo.count("/") > 1 or "\\" in repo or repo[1:2] == ":"


def hub_error(what: str, repo: str, error: BaseException) -> SourceError:
    """Return the error for something (`what`) on the Hub that could not be reached, with the reason and a remedy."""
    hint = explain_hub_response(repo, error)
    if hint is None:
        hint = f"{first_line(error)} Check the name, the network and your token, or give a local folder."
    return SourceError(f"{what} could not be reached: {hint}")


def explain_hub_response(repo: str, error: BaseException) -> str | None:
    """Return the meaning of the Hub's response behind an exception and a remedy, None if there is no response."""
    response = _find_response(error)
    if response is None:
        return None
    page = f"{hub_url()}/{repo}"
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
        return f"your token may not do this ({status}). Check its permissions at {hub_url()}/settings/tokens."
    if status == 429:
        return f"too many requests to the Hub ({status}). Wait some minutes and try again; log in for higher limits."
    return f"the Hub answered {status}. Try again later; what is cached opens with local_files_only=True."


def hub_url() -> str:
    """Return the Hub's URL, by the Hub client's rule."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _is_missing(error: BaseException) -> bool:
    """Return whether an error of transformers means that a repository (or, without a network, the cache) has no file.

    transformers then raises a bare OSError. Errors of the Hub or the disk have a response, a cause or a number.
    """
    bare = type(error) is OSError and error.errno is None and _find_response(error) is None
    return bare and type(error.__cause__).__name__ in ("NoneType", "LocalEntryNotFoundError")


def _find_response(error: BaseException | None) -> Any:
    """Return the HTTP response of an exception or of one of its causes, None if there is none."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        response = getattr(error, "response", None)
        if isinstance(getattr(response, "status_code", None), int):
            return response
        error = error.__cause__ or error.__context__
    return None


def _can_reach_hub() -> bool:
    """Return whether a connection to the Hub can be opened. Behind a proxy it is assumed."""
    address = urlsplit(hub_url())
    if getproxies().get(address.scheme) or not address.hostname:
        return True
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), timeout=5).close()
    except OSError:
        return False
    return True
