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
import tempfile
from collections.abc import Iterable, Mapping, Sequence

import torch

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
    """Return the fingerprint (64 hexadecimal digits) of the tensors in one safetensors file or several shards."""
    described: dict[str, Description] = {}
    for path in paths:
        entries, _ = read_header(path)
        digests = digest_entries(path, entries)
        described |= {name: (entry.dtype, _shape(entry.shape), digests[name]) for name, entry in entries.items()}
    return hash_descriptions(described)


def fingerprint_files_cached(paths: Sequence[str]) -> str:
    """Return `fingerprint_files`, cached beside the Hub cache by each file's path, size and modification time."""
    real = sorted(os.path.realpath(path) for path in paths)
    state = [[path, os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in real]
    folder = os.path.join(_cache_home(), "poe", "fingerprints")
    record = os.path.join(folder, hashlib.sha256("\n".join(real).encode()).hexdigest()[:32] + ".json")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError), open(record, encoding="utf-8") as file:
        cached = json.load(file)
        if cached["files"] == state:
            return str(cached["fingerprint"])
    fingerprint = fingerprint_files(paths)
    with contextlib.suppress(OSError):  # a read-only or full cache only costs time
        os.makedirs(folder, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"files": state, "fingerprint": fingerprint}, file)
        os.replace(temporary, record)
    return fingerprint


def _shape(shape: Iterable[int]) -> str:
    return ",".join(str(size) for size in shape)


def _cache_home() -> str:
    """Return the Hugging Face cache folder, by the Hub client's rules."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.expanduser(os.environ.get("HF_HOME") or os.path.join(caches, "huggingface"))
