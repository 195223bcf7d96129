"""`delta.safetensors`: what one stage trained, written so that a crash leaves the old file or none, read with doubt."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import load_file

from .failures import DeltaError, FingerprintError
from .fingerprint import fingerprint_files, fingerprint_tensors
from .tensor_file import DTYPES, Entry, read_header, write_tensors

DELTA_NAME = "delta.safetensors"
POE_FORMAT = "1"
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz", ".dill", ".h5", ".msgpack")
_FIELDS = ("stage", "base_fingerprint", "parent_fingerprint", "self_fingerprint")
_FLOATS = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class DeltaHeader:
    """What a delta file says about itself; fingerprints are 64 hexadecimal digits, `parent_fingerprint` "" if none."""

    stage: str
    base_fingerprint: str
    parent_fingerprint: str
    self_fingerprint: str
    tensors: Mapping[str, Entry]


def write_delta(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    *,
    stage: str,
    base_fingerprint: str,
    parent_fingerprint: str = "",
    dtype: torch.dtype = torch.bfloat16,
) -> str:
    """Write a stage's tensors in `dtype`, atomically and with the same bytes every time; return their fingerprint.

    Raises `DeltaError` before writing if a value is not finite in that dtype, `OSError` if the disk refuses.
    """
    if DTYPES.get(dtype) not in _FLOATS:
        raise DeltaError(f"A delta is saved in float32, bfloat16 or float16, got {dtype}.")
    stored = {name: tensor.detach().to(device="cpu", dtype=dtype) for name, tensor in tensors.items()}
    check_finite(stage, stored)
    fingerprint = fingerprint_tensors(stored)
    metadata = {
        "format": "pt",
        "poe_format": POE_FORMAT,
        "stage": stage,
        "base_fingerprint": base_fingerprint,
        "parent_fingerprint": parent_fingerprint,
        "self_fingerprint": fingerprint,
    }
    write_tensors(path, stored, metadata)
    return fingerprint


def read_delta_header(path: str | os.PathLike[str]) -> DeltaHeader:
    """Return what a delta file declares; raises `DeltaError` if it is missing, truncated or of another format."""
    if not os.path.isfile(path):
        raise DeltaError(f"There is no {path}: expected a stage folder with {DELTA_NAME} in it.")
    return parse_delta_header(*read_header(path), path)


def parse_delta_header(
    entries: Mapping[str, Entry], metadata: Mapping[str, str], path: str | os.PathLike[str]
) -> DeltaHeader:
    """Return what a safetensors header says as a delta's; `path` is for messages. Raises `DeltaError`."""
    if metadata.get("poe_format") != POE_FORMAT:
        raise DeltaError(
            f"{path} is of delta format {metadata.get('poe_format')!r}, expected {POE_FORMAT!r}. "
            "Was it written by a newer version? Update poe-cascade."
        )
    missing = [field for field in _FIELDS if field not in metadata]
    if missing:
        raise DeltaError(f"{path} does not say its {', '.join(missing)}. Fetch it again.")
    odd = sorted({entry.dtype for entry in entries.values()} - set(_FLOATS))
    if odd:
        raise DeltaError(f"{path} holds tensors of type {', '.join(odd)}; expected {', '.join(_FLOATS)}.")
    return DeltaHeader(**{field: metadata[field] for field in _FIELDS}, tensors=entries)


def verify_delta(path: str | os.PathLike[str], header: DeltaHeader) -> None:
    """Raise `FingerprintError` unless the file's tensors are those that its header was written for."""
    got = fingerprint_files([path])
    if got != header.self_fingerprint:
        raise FingerprintError(
            f"{path} was changed after it was written: expected fingerprint {header.self_fingerprint[:12]}, "
            f"got {got[:12]}. Fetch it again from its author, or pass verify=False if you changed it yourself."
        )


def read_delta(path: str | os.PathLike[str], stage: str) -> dict[str, torch.Tensor]:
    """Return a delta file's tensors on the CPU; raises `DeltaError` if one holds a value that is not finite."""
    try:
        tensors = load_file(os.fspath(path))
    except Exception as error:  # the library raises its own type, which is not exported everywhere
        raise DeltaError(f"{path} cannot be read as safetensors ({error}). Fetch it again.") from error
    check_finite(stage, tensors)
    return tensors


def check_finite(stage: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `DeltaError` naming the first tensor with an infinite or undefined value."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise DeltaError(
                f"Stage {stage!r}: {name} holds values that are not finite. "
                "The training run diverged or the file is damaged; use an earlier checkpoint."
            )


def refuse_pickles(folder: str | os.PathLike[str]) -> None:
    """Raise `DeltaError` naming any file in a stage folder that could hold a pickle."""
    found = sorted(
        os.path.relpath(os.path.join(where, name), folder)
        for where, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(PICKLES)
    )
    if found:
        raise DeltaError(
            f"{folder} holds {', '.join(found[:5])}: expected no file that can carry a pickle. "
            "A stage is delta.safetensors and text; remove what is not."
        )
