"""Folders and Hub repositories: the names that users type, and contents that are read without fetching a file."""

import dataclasses
import os
import re
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from poe.errors import PoEError, SourceError
from poe.modeling.access import Access, fetch, hub_error, is_path
from poe.modeling.delta_file import DELTA_NAME, DeltaHeader, parse_delta_header
from poe.modeling.lineage import StageSource
from poe.modeling.tensor_file import header_length, parse_header

EMBEDDED_BASE = Path(__file__).parents[1] / "assets" / "demo"


def locate(repo: str | os.PathLike[str]) -> str:
    """Return a folder's absolute path, the embedded base's path for "demo", or a Hub name unchanged."""
    name = os.path.expanduser(os.fspath(repo))
    if os.path.isdir(name):
        return os.path.abspath(name)
    if name != "demo":
        return name
    if not embedded_folders():
        raise SourceError(f"The embedded base is missing from this installation: expected {EMBEDDED_BASE}.")
    return str(EMBEDDED_BASE)


def embedded_folders() -> list[str]:
    """Return the folders of the bases inside this package. They are searched for a base that a stage cannot find."""
    return [str(EMBEDDED_BASE)] if (EMBEDDED_BASE / "config.json").is_file() else []


def list_files(repo: str, access: Access, revision: str | None = None) -> list[str]:
    """Return the names of all files, with `/` between folders. Raises `SourceError` if the Hub refuses."""
    if os.path.isdir(repo):
        root = Path(repo)
        return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir())
    try:
        return sorted(HfApi(token=access.token).list_repo_files(repo, revision=revision))
    except Exception as error:  # the errors of the Hub client and of the HTTP library have no common type
        raise hub_error(f"The list of files of {repo} (revision {revision or 'main'})", repo, error) from error


def read_remote_header(stage: StageSource) -> tuple[DeltaHeader, int]:
    """Return a stage's delta header and the size of its delta in bytes, without fetching the delta's weights.

    Raises `SourceError` if the delta cannot be reached, `DeltaError` if it is not a delta file.
    """
    local = stage.delta_path if os.path.isdir(stage.repo) else _find_cached_delta(stage)
    if local is not None:
        return stage.header, os.path.getsize(local)
    name = f"{DELTA_NAME} of {stage.repo}"
    try:
        start, size = _read_span(stage, 0, 8)
        text, _ = _read_span(stage, 8, header_length(start, size, name))
    except PoEError:
        raise
    except Exception as error:
        raise hub_error(name, stage.repo, error) from error
    return parse_delta_header(*parse_header(text, size, name), name), size


def _find_cached_delta(stage: StageSource) -> str | None:
    return fetch(stage.repo, DELTA_NAME, dataclasses.replace(stage.access, local_files_only=True), stage.revision)


def _read_span(stage: StageSource, start: int, length: int) -> tuple[bytes, int]:
    """Return `length` bytes of a delta on the Hub from byte `start`, and the size of the whole file in bytes."""
    url = hf_hub_url(stage.repo, DELTA_NAME, revision=stage.revision)
    headers = {**build_hf_headers(token=stage.access.token), "Range": f"bytes={start}-{start + length - 1}"}
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
        hf_raise_for_status(response)
        if response.status_code != 206:
            raise SourceError(
                f"{url} cannot be read in part: expected HTTP status 206, got {response.status_code}. "
                "`poe verify` fetches the whole file."
            )
        return response.read(), int(response.headers["Content-Range"].rpartition("/")[2])


def short_name(repo: str | None) -> str:
    """Return a repository's name, or the last part of a folder's path, to show to people."""
    if repo is None or not is_path(repo):
        return repo or "a base that was never saved"
    return re.split(r"[/\\]", repo.rstrip("/\\"))[-1] or repo
