"""Folders that are made once and found again by a fingerprint of their input: prepared rows and hidden states.

They are in `$POE_CACHE`, or in `~/.cache/poe` if that is not set, and only their owner can read and write them. A
folder has a marker that is written last, after everything else is on the disk, with the size and the SHA-256 of every
file. They are compared whenever the folder is found again, so a folder that was damaged or changed is made again. Each
folder may be deleted at any time.
"""

import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from poe.errors import OutputError, PoEError
from poe.files.output import flush, is_os_error, scratch_folder, sweep

_COMPLETE = "complete.json"
_ADVICE = "Free some space, or set another folder with the environment variable POE_CACHE. What is finished is kept."


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
    """Return the folder of a key and the result of `make`; call `make` only if there is no whole folder.

    `make` fills an empty folder and returns JSON values. The folder gets its name when it is complete, so an interrupt
    never leaves an incomplete folder under that name. If two processes make the same folder, the first one wins. Raises
    `OutputError` if the disk is full or not writable, or if the folder of the cache belongs to another user.
    """
    if (known := _read_whole(kind, key)) is not None:
        return cache_root() / kind / key, known
    try:
        parent = make_private_folder(kind)
        sweep(parent)
        with scratch_folder(parent) as scratch:
            result: dict[str, Any] = json.loads(json.dumps(make(scratch)))
            files = {name: [size, file_hash(scratch / name)] for name, size in _list_files(scratch).items()}
            flush(scratch)
            marker = scratch / _COMPLETE
            marker.write_text(json.dumps({"result": result, "files": files}), encoding="utf-8")
            flush(marker)
            _take_name(scratch, kind, key)
            flush(parent, recursive=False)
    except Exception as error:
        cause = error.__cause__ if isinstance(error, OutputError) else error
        if cause is None or isinstance(cause, PoEError) or not is_os_error(cause):
            raise
        reason = cause.strerror if isinstance(cause, OSError) else cause
        raise OutputError(f"The cache {cache_root() / kind} could not be written: {reason}. {_ADVICE}") from error
    return cache_root() / kind / key, result


def is_cached(kind: str, key: str) -> bool:
    """Return whether there is a whole folder of this key."""
    return _read_whole(kind, key) is not None


def make_private_folder(kind: str) -> Path:
    """Make a folder of the cache, in which no other user can put anything, and return it. Raises `OutputError`."""
    path = cache_root()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for part in Path(kind).parts:
            path /= part
            path.mkdir(mode=0o700, exist_ok=True)
            state = path.lstat()
            if stat.S_ISLNK(state.st_mode) or os.geteuid() not in (state.st_uid, 0):
                raise OutputError(
                    f"The cache {path} is a link or belongs to another user, who could change what this run reads: set "
                    "a folder of your own with the environment variable POE_CACHE."
                )
            if state.st_mode & 0o077 or state.st_mode & 0o700 != 0o700:
                path.chmod(0o700)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"The cache {path} could not be written: {error.strerror}. {_ADVICE}") from error
    return path


def _read_whole(kind: str, key: str) -> dict[str, Any] | None:
    """Return the result in the marker of a folder; None unless every file is there as it was written."""
    folder = cache_root() / kind / key
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        if not (folder / _COMPLETE).is_file():
            return None
        make_private_folder(kind)
        marker = json.loads((folder / _COMPLETE).read_text(encoding="utf-8"))
        files = {name: (size, digest) for name, (size, digest) in marker["files"].items()}
        if _list_files(folder) != {name: size for name, (size, _) in files.items()}:
            return None
        if all(file_hash(folder / name) == digest for name, (_, digest) in files.items()):
            return dict(marker["result"])
    return None


def _list_files(folder: Path) -> dict[str, int]:
    """Return the size of every file in a folder but the marker, by its path. Raises `OSError` for anything else."""
    sizes = {}
    for path in folder.rglob("*"):
        state = path.lstat()
        if stat.S_ISREG(state.st_mode):
            sizes[path.relative_to(folder).as_posix()] = state.st_size
        elif not stat.S_ISDIR(state.st_mode):
            raise OSError(errno.EINVAL, "not a file", str(path))
    sizes.pop(_COMPLETE, None)
    return sizes


def _take_name(scratch: Path, kind: str, key: str) -> None:
    """Rename a complete folder to its key. A damaged folder of that name is removed, a whole one stays."""
    folder = cache_root() / kind / key
    for _ in range(3):
        try:
            scratch.rename(folder)
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
        if _read_whole(kind, key) is not None:
            return
        with scratch_folder(folder.parent) as trash:
            if folder.is_dir() and not folder.is_symlink():
                folder.chmod(0o700)
            folder.rename(trash / key)  # at once: another process never finds a part of it
            _remove(trash / key)
    raise OSError(errno.EEXIST, "other processes keep writing it", str(folder))


def _remove(path: Path) -> None:
    """Remove a file, or a folder with everything in it, also if its permissions were taken away."""
    if not path.is_dir() or path.is_symlink():
        path.unlink()
        return
    for folder in (path, *(inner for inner in path.rglob("*") if inner.is_dir() and not inner.is_symlink())):
        folder.chmod(0o700)
    shutil.rmtree(path)
