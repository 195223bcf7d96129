"""Folders that are made once and found again by a fingerprint of their input.

They are in `$POE_CACHE`, or in `~/.cache/poe` if that is not set. Each of them may be deleted at any time.
"""

import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from poe.errors import OutputError, PoEError

_COMPLETE = "complete.json"


def cache_root() -> Path:
    """Return the folder that holds all cached folders."""
    return Path(os.environ.get("POE_CACHE") or Path.home() / ".cache" / "poe").expanduser()


def fingerprint(*parts: Any) -> str:
    """Return a hash of JSON values, of the code in `calls/`, `data/` and `demo/`, and of library versions.

    A cached folder is made again when any of them changes.
    """
    text = json.dumps([code_version(), library_versions(), *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@cache
def code_version() -> str:
    """Return a hash of every source file that decides what a row becomes: `calls/`, `data/` and `demo/`."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(path for room in ("calls", "data", "demo") for path in (package / room).rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@cache
def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide what a row becomes; "" for one that is not installed."""
    versions = {}
    for name in ("transformers", "tokenizers", "jinja2", "jsonschema"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ""
    return versions


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_folder(kind: str, key: str, make: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """Return the folder of a key and the result of `make`; call `make` only if the folder does not exist.

    `make` fills an empty folder and returns JSON values. The folder gets its name when it is complete, so an interrupt
    never leaves an incomplete folder under that name. If two processes make the same folder, the first one wins. Raises
    `OutputError` if the disk is full or not writable.
    """
    root = cache_root() / kind
    folder = root / key
    if (folder / _COMPLETE).is_file():
        return folder, json.loads((folder / _COMPLETE).read_text(encoding="utf-8"))
    scratch = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{key[:8]}-", dir=root))
        result = make(scratch)
        (scratch / _COMPLETE).write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")
        try:
            scratch.rename(folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not (folder / _COMPLETE).is_file():
                raise
    except OSError as error:
        if isinstance(error, PoEError):
            raise
        raise OutputError(
            f"Prepared data could not be written to {root}: {error.strerror}. Free some space, or name another "
            "folder with the environment variable POE_CACHE."
        ) from error
    finally:
        if scratch is not None and scratch.exists():
            shutil.rmtree(scratch, ignore_errors=True)
    return folder, result
