"""What a Hub repository holds, without fetching it: its file names, and the header of its delta."""

import dataclasses
import os
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from poe.errors import PoEError, SourceError
from poe.modeling.access import Access, fetch, refused
from poe.modeling.delta_file import DELTA_NAME, DeltaHeader, parse_delta_header
from poe.modeling.lineage import Link
from poe.modeling.tensor_file import header_length, parse_header


def list_files(repo: str, access: Access, revision: str | None = None) -> list[str]:
    """Return the names of all files, with `/` between folders. Raises `SourceError` if the Hub refuses."""
    if os.path.isdir(repo):
        root = Path(repo)
        return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir())
    try:
        return sorted(HfApi(token=access.token).list_repo_files(repo, revision=revision))
    except Exception as error:  # the client's and the HTTP library's own errors have no common type
        raise refused(f"The list of files of {repo} (revision {revision or 'main'})", repo, error) from error


def delta_header(link: Link) -> tuple[DeltaHeader, int]:
    """Return a stage's header and the size of its delta in bytes; of a file that is not here, the header alone is read.

    Raises `SourceError` if it cannot be reached, `DeltaError` if it is not a delta's.
    """
    local = link.delta_path if os.path.isdir(link.repo) else _cached(link)
    if local is not None:
        return link.header, os.path.getsize(local)
    name = f"{DELTA_NAME} of {link.repo}"
    try:
        start, size = _span(link, 0, 8)
        text, _ = _span(link, 8, header_length(start, size, name))
    except PoEError:
        raise
    except Exception as error:
        raise refused(name, link.repo, error) from error
    return parse_delta_header(*parse_header(text, size, name), name), size


def _cached(link: Link) -> str | None:
    return fetch(link.repo, DELTA_NAME, dataclasses.replace(link.access, local_files_only=True), link.revision)


def _span(link: Link, start: int, length: int) -> tuple[bytes, int]:
    """Return some bytes of a delta on the Hub, and how many it has in all."""
    url = hf_hub_url(link.repo, DELTA_NAME, revision=link.revision)
    headers = {**build_hf_headers(token=link.access.token), "Range": f"bytes={start}-{start + length - 1}"}
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
        hf_raise_for_status(response)
        if response.status_code != 206:
            raise SourceError(f"{url} cannot be read in part ({response.status_code}). `poe verify` fetches it whole.")
        return response.read(), int(response.headers["Content-Range"].rpartition("/")[2])
