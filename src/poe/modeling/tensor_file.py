"""Read the header of safetensors files without torch, and write files with reproducible bytes.

A file is 8 bytes with the length of a JSON header (little-endian), the header, then the tensors' raw bytes. The
library's own writer orders metadata by its hash map, but saving a delta twice must give the same bytes.
"""

import contextlib
import hashlib
import json
import math
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .failures import DeltaError, printable

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# Bits of one element, for the dtypes that torch has and for those that only files have.
_BITS = {name: dtype.itemsize * 8 for dtype, name in DTYPES.items()} | {
    "U16": 16,
    "U32": 32,
    "U64": 64,
    "C64": 64,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
_MAX_HEADER_BYTES = 1 << 24  # of about 100,000 tensors
_LONGEST_NAME = 1_000
_MOST_DIMENSIONS = 32
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: safetensors dtype name, shape, and the start and end of its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return the tensors and the metadata in the header of a safetensors file.

    Raises `DeltaError` if the header is invalid or does not match the file's size.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait forever
        raise DeltaError(f"{path} is not a regular file: expected a safetensors file.")
    with open(path, "rb") as file:
        return parse_header(file.read(header_length(file.read(8), status.st_size, path)), status.st_size, path)


def header_length(start: bytes, size: int, name: str | os.PathLike[str]) -> int:
    """Return the length of a header from the first 8 bytes of a file of `size` bytes. Raises `DeltaError`."""
    length = int.from_bytes(start, "little")
    if size < 8 or not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
        raise DeltaError(f"{name} is not a safetensors file, or is truncated ({size} bytes). Fetch it again.")
    return length


def parse_header(text: bytes, size: int, name: str | os.PathLike[str]) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return the tensors and metadata of a header in a file of `size` bytes called `name`. Raises `DeltaError`."""
    first = 8 + len(text)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        entries = {
            key: Entry(
                str(value["dtype"]),
                _check_whole_numbers(value["shape"], _MOST_DIMENSIONS),
                *(first + n for n in _check_whole_numbers(value["data_offsets"], 2)),
            )
            for key, value in header.items()
        }
        metadata = {str(key): str(value) for key, value in metadata.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise DeltaError(f"{name} has a safetensors header that cannot be read ({error}). Fetch it again.") from error
    for key in (*entries, *metadata):
        if len(key) > _LONGEST_NAME or "\0" in key or not _is_unicode(key):
            raise DeltaError(f"{name} has a name that no writer of tensors chooses: {printable(key, 80)!r}.")
    end = first
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end or entry.end < end:
            raise DeltaError(
                f"{name} is damaged: the bytes of {printable(key, 200)} should begin where the tensor before it ends "
                f"({end}), got {entry.start} to {entry.end}. Fetch it again."
            )
        bits = _BITS.get(entry.dtype)
        if bits is not None and math.prod(entry.shape) * bits != (entry.end - entry.start) * 8:
            raise DeltaError(
                f"{name} is damaged: {printable(key, 200)} has shape {list(entry.shape)} and dtype {entry.dtype}, "
                f"which do not take {entry.end - entry.start} bytes. Fetch it again."
            )
        end = entry.end
    if end != size:
        raise DeltaError(f"{name} is truncated or has bytes that no tensor owns ({size} bytes). Fetch it again.")
    return entries, metadata


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _check_whole_numbers(values: object, most: int) -> tuple[int, ...]:
    """Return a JSON list of at most `most` whole numbers from 0 to 2^63. Raises `TypeError` for other values."""
    if (
        not isinstance(values, list)
        or len(values) > most
        or not all(type(value) is int and 0 <= value < 1 << 63 for value in values)
    ):
        raise TypeError(f"expected at most {most} whole numbers, got {str(values)[:80]}")
    return tuple(values)


def digest_entries(path: str | os.PathLike[str], entries: Mapping[str, Entry]) -> dict[str, str]:
    """Return the SHA-256 (hexadecimal) of each tensor's raw bytes, which are read in blocks."""
    digests = {}
    with open(path, "rb") as file:
        for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
            file.seek(entry.start)
            digest, left = hashlib.sha256(), entry.end - entry.start
            while left > 0:
                block = file.read(min(left, _BLOCK))
                if not block:
                    raise DeltaError(f"{path} ended inside tensor {name}. Fetch it again.")
                digest.update(block)
                left -= len(block)
            digests[name] = digest.hexdigest()
    return digests


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's values as little-endian, row-major bytes."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file atomically; its bytes depend only on its content.

    The file is written under a temporary name in the same folder, flushed to the disk and renamed. An `OSError` (full
    disk, no permission) leaves the previous file.
    """
    order, text, _ = _layout(tensors, metadata)
    folder = os.path.dirname(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".delta-", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for name in order:
                file.write(raw_bytes(tensors[name]))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def file_size(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> int:
    """Return the size in bytes of the file that `write_tensors` would write. Meta tensors are enough."""
    _, text, end = _layout(tensors, metadata)
    return 8 + len(text) + end


def _layout(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> tuple[list[str], bytes, int]:
    """Return the names in the order of the file, the header's text, and the size of the tensors in bytes."""
    # Widest elements first, like the library, so that each tensor is aligned to its element size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return order, text + b" " * (-len(text) % 8), offset
