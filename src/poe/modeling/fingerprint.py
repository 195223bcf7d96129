"""Fingerprints of weights: equal for one file and for any shards of it, different if one bit of a tensor differs.

The hashed text has one line per tensor, sorted by name (as UTF-8 bytes):

    name \\0 dtype \\0 shape \\0 digest \\n

dtype is the safetensors name (`BF16`, `F32`, `I64`, ...). shape is decimal numbers joined by commas (`32000,4096`;
empty for a scalar). digest is the lower-case hexadecimal SHA-256 of the raw little-endian row-major bytes. The
fingerprint is the SHA-256 of that text. It covers parameters and persistent buffers. Tied tensors count once: the
output head is left out if it equals an input embedding of the same dtype and shape bit for bit, because only some files
of tied models contain it.

A base's fingerprint is that of its files as stored, in any dtype it is loaded in. A base without files has the
fingerprint of the tensors that `save_pretrained` would write. For most families they are the state dict; the files of
some (hrm_text) join projections into one tensor.
"""

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from .failures import DeltaError, FingerprintError
from .tensor_file import DTYPES, digest_entries, raw_bytes, read_header

TIED_HEADS = ("lm_head.weight",)
Description = tuple[str, str, str]  # dtype, shape, digest


def hash_descriptions(described: Mapping[str, Description]) -> str:
    """Return the fingerprint of tensors from their descriptions: name -> (dtype, shape, digest)."""
    counted = dict(described)
    for head in TIED_HEADS:
        twin = counted.get(head)
        if twin is not None and any(value == twin for name, value in counted.items() if "embed" in name):
            del counted[head]
    text = hashlib.sha256()
    for name in sorted(counted, key=str.encode):
        text.update("\0".join((name, *counted[name])).encode() + b"\n")
    return text.hexdigest()


def fingerprint_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the fingerprint (64 hexadecimal digits) of tensors in memory, such as a state dict."""
    return hash_descriptions(
        {
            name: (DTYPES[tensor.dtype], _shape(tensor.shape), hashlib.sha256(raw_bytes(tensor)).hexdigest())
            for name, tensor in tensors.items()
        }
    )


def fingerprint_files(paths: Iterable[str | os.PathLike[str]]) -> str:
    """Return the fingerprint (64 hexadecimal digits) of the tensors in one safetensors file or several shards.

    Reads all bytes. Raises `DeltaError` for a damaged file or a tensor that two shards hold.
    """
    described: dict[str, Description] = {}
    for path in paths:
        entries, _ = read_header(path)
        if twice := sorted(described.keys() & entries.keys()):
            raise DeltaError(f"{path} holds {twice[0]}, which another shard holds too: expected each tensor once.")
        digests = digest_entries(path, entries)
        described |= {name: (entry.dtype, _shape(entry.shape), digests[name]) for name, entry in entries.items()}
    return hash_descriptions(described)


def file_state(path: str | os.PathLike[str]) -> list[Any]:
    """Return what identifies the content of a file without reading it; a link's is that of its target.

    Everybody can set a modification time, but only the file system sets the time of the last change and the inode.
    """
    status = os.stat(path)
    numbers = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return [os.path.realpath(path), *numbers]


def fingerprint_files_cached(paths: Sequence[str]) -> str:
    """Return `fingerprint_files`, cached beside the Hub cache by `file_state`.

    Only a record that no other user can write is used, because the cache may be in a shared folder.
    """
    states = sorted(file_state(path) for path in paths)
    folder = os.path.join(_cache_home(), "poe", "fingerprints")
    key = hashlib.sha256("\n".join(state[0] for state in states).encode()).hexdigest()[:32]
    record = os.path.join(folder, f"{key}.json")
    with (
        contextlib.suppress(OSError, ValueError, KeyError, TypeError),
        open(record, encoding="utf-8", opener=_open_at_once) as file,
    ):
        cached = json.load(file) if _is_private(file.fileno()) else {}
        if cached["files"] == states:
            return str(cached["fingerprint"])
    fingerprint = fingerprint_files(paths)
    if sorted(file_state(path) for path in paths) != states:
        raise FingerprintError(f"{paths[0]} was changed while it was read: try again when nothing writes to it.")
    with contextlib.suppress(OSError):  # a read-only or full cache only costs time
        os.makedirs(folder, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder)  # private: mode 0600
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"files": states, "fingerprint": fingerprint}, file)
        os.replace(temporary, record)
    return fingerprint


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting for a writer, if it is a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _is_private(handle: int) -> bool:
    """Return whether an open file is a regular one that only this user can have written."""
    status = os.fstat(handle)
    owner = os.getuid() if hasattr(os, "getuid") else status.st_uid
    return stat.S_ISREG(status.st_mode) and status.st_uid == owner and not status.st_mode & 0o022


def _shape(shape: Iterable[int]) -> str:
    return ",".join(str(size) for size in shape)


def _cache_home() -> str:
    """Return the Hugging Face cache folder, by the Hub client's rules."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.expanduser(os.environ.get("HF_HOME") or os.path.join(caches, "huggingface"))
