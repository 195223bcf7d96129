"""`delta.safetensors`: the trained tensors of one stage, written atomically and checked when read."""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load

from .failures import DeltaError, FingerprintError, PoEError, StageError
from .fingerprint import fingerprint_files, fingerprint_tensors
from .int8 import SCALE, dequantize, quantize
from .tensor_file import DTYPES, Entry, file_size, read_header, write_tensors

DELTA_NAME = "delta.safetensors"
FORMATS = ("1", "2")  # 2: changes of the base's own layers (forks)
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz", ".dill", ".h5", ".msgpack")
_FIELDS = ("stage", "attach_at", "base_fingerprint", "parent_fingerprint", "self_fingerprint")
_FLOATS = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class DeltaHeader:
    """The header of a delta file. Fingerprints have 64 hexadecimal digits; `parent_fingerprint` is "" without a parent.

    `attach_at` is the number of layers below the stage, in decimal, and `active` the tokens on which it acts. No
    tensor's name or shape contains them.
    """

    stage: str
    attach_at: str
    base_fingerprint: str
    parent_fingerprint: str
    self_fingerprint: str
    active: str
    tensors: Mapping[str, Entry]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the stage was saved: int8 if its matrices are int8, else that of its tensors."""
        names = {entry.dtype for entry in self.tensors.values()}
        stored = "I8" if "I8" in names else next(iter(self.tensors.values())).dtype
        return next(dtype for dtype, name in DTYPES.items() if name == stored)

    @property
    def parameters(self) -> dict[str, Entry]:
        """The tensors without the scales of int8 matrices."""
        return {name: entry for name, entry in self.tensors.items() if not _is_scale(name, self.tensors)}

    def find_misfit(self, stage: Mapping[str, Any]) -> str | None:
        """Return how the tensors differ from the `stage` of a config.json, None if they fit. Reads no weights."""
        parts = self.parameters
        layers = {name.split(".")[1] for name in parts if name.startswith("layers.")}
        if len(layers) != stage["num_layers"]:
            return f"config.json declares {stage['num_layers']} layers, {DELTA_NAME} has {len(layers)}."
        heads = {"dense": {"head.weight"}, "low_rank": {"head.a", "head.b"}}.get(stage["head"], set())
        if {name for name in parts if name.startswith("head.")} != heads:
            return f"config.json declares the head {stage['head']!r}, {DELTA_NAME} has another one."
        if "head.a" in heads and parts["head.a"].shape[:1] != (stage.get("head_rank"),):
            return f"config.json declares a head of rank {stage.get('head_rank')}, {DELTA_NAME} has another one."
        return None

    @property
    def num_parameters(self) -> int:
        """The number of parameters of the stage, without the scales of int8 matrices."""
        return sum(math.prod(entry.shape) for entry in self.parameters.values())


def write_delta(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    *,
    stage: str,
    attach_at: int,
    base_fingerprint: str,
    parent_fingerprint: str = "",
    active: str = "all",
    dtype: torch.dtype = torch.bfloat16,
) -> str:
    """Write a stage's tensors in `dtype` atomically and return their fingerprint. Equal tensors give equal bytes.

    `torch.int8` stores matrices as int8 with a scale per row, and other tensors in bfloat16. Raises `DeltaError`
    before writing if a value is not finite in that dtype, `OSError` if the disk refuses.
    """
    if DTYPES.get(dtype) not in (*_FLOATS, "I8"):
        raise StageError(f"Expected a delta dtype of float32, bfloat16 or float16, or int8, got {dtype}.")
    if dtype == torch.int8:
        check_finite(stage, tensors)
    stored = as_stored(tensors, dtype)
    check_finite(stage, stored)
    fingerprint = fingerprint_tensors(stored)
    metadata = _metadata(stored, stage, attach_at, active, base_fingerprint, parent_fingerprint, fingerprint)
    write_tensors(path, stored, metadata)
    return fingerprint


def delta_size(
    tensors: Mapping[str, torch.Tensor],
    *,
    stage: str,
    attach_at: int,
    has_parent: bool = False,
    active: str = "all",
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Return the size in bytes of the file that `write_delta` would write. Reads names and shapes, not values."""
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if dtype == torch.int8 and tensor.dim() == 2:
            stored[name] = torch.empty(tensor.shape, dtype=torch.int8, device="meta")
            stored[name + SCALE] = torch.empty(tensor.shape[:1], dtype=torch.float32, device="meta")
        else:
            stored_dtype = torch.bfloat16 if dtype == torch.int8 else dtype
            stored[name] = torch.empty(tensor.shape, dtype=stored_dtype, device="meta")
    placeholder = "0" * 64  # the length of every fingerprint
    parent = placeholder if has_parent else ""
    return file_size(stored, _metadata(stored, stage, attach_at, active, placeholder, parent, placeholder))


def format_of(names: Iterable[str]) -> str:
    """Return the format of a delta with tensors of these names: 2 if it changes layers of the base, else 1."""
    ends = {name.rpartition(".")[2] for name in names if name.startswith("layers.")}
    return "2" if ends & {"a", "b", "delta"} else "1"


def _metadata(
    names: Iterable[str], stage: str, attach_at: int, active: str, base: str, parent: str, fingerprint: str
) -> dict[str, str]:
    poe_format = format_of(names)
    return {
        "format": "pt",
        "poe_format": poe_format,
        **({"active": active} if poe_format == "2" else {}),
        "stage": stage,
        "attach_at": str(attach_at),
        "base_fingerprint": base,
        "parent_fingerprint": parent,
        "self_fingerprint": fingerprint,
    }


def as_stored(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return a stage's tensors in the form of a delta file of `dtype`, on the CPU."""
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if dtype == torch.int8 and tensor.dim() == 2:
            stored[name], stored[name + SCALE] = quantize(tensor.detach().cpu())
        else:
            stored_dtype = torch.bfloat16 if dtype == torch.int8 else dtype
            stored[name] = tensor.detach().to(device="cpu", dtype=stored_dtype)
    return stored


def from_stored(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a delta file's tensors in the form of the stage: int8 matrices become fp32, others stay."""
    return {
        name: dequantize(tensor, stored[name + SCALE]) if tensor.dtype == torch.int8 else tensor
        for name, tensor in stored.items()
        if not _is_scale(name, stored)
    }


def storage_error(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> float:
    """Return the relative error of storing tensors in `dtype`: the norm of the change over the norm of the values."""
    change = values = 0.0
    for name, tensor in tensors.items():
        exact = tensor.detach().cpu().double()
        change += float((from_stored(as_stored({name: tensor}, dtype))[name].double() - exact).square().sum())
        values += float(exact.square().sum())
    return math.sqrt(change / values) if values else 0.0


def read_delta_header(path: str | os.PathLike[str]) -> DeltaHeader:
    """Return a delta file's header. Raises `DeltaError` if it is missing, truncated or of another format."""
    if not os.path.isfile(path):
        raise DeltaError(f"There is no {path}: expected a stage folder with {DELTA_NAME} in it.")
    return parse_delta_header(*read_header(path), path)


def parse_delta_header(
    entries: Mapping[str, Entry], metadata: Mapping[str, str], path: str | os.PathLike[str]
) -> DeltaHeader:
    """Return a delta's header from that of its safetensors file; `path` is for messages. Raises `DeltaError`."""
    if metadata.get("poe_format") not in FORMATS:
        raise DeltaError(
            f"{path} is of delta format {metadata.get('poe_format')!r}, expected {' or '.join(FORMATS)}. "
            "Was it written by a newer version? Update poe-cascade."
        )
    missing = [field for field in _FIELDS if field not in metadata]
    if missing:
        raise DeltaError(f"{path} lacks {', '.join(missing)} in its metadata. Fetch it again.")
    _check_types(path, entries)
    known = {field: metadata[field] for field in _FIELDS}
    return DeltaHeader(**known, active=metadata.get("active", "all"), tensors=entries)


def verify_delta(path: str | os.PathLike[str], header: DeltaHeader) -> None:
    """Raise `FingerprintError` unless the file's tensors match the fingerprint in its header."""
    _check_fingerprint(path, header.self_fingerprint, fingerprint_files([path]))


def read_delta(path: str | os.PathLike[str], stage: str, fingerprint: str | None = None) -> dict[str, torch.Tensor]:
    """Return a stage's tensors from a delta file, on the CPU, with int8 matrices as fp32.

    With `fingerprint`, the tensors that were read must have it, so nothing that happens to the file between a check and
    this call matters. Raises `FingerprintError`, and `DeltaError` for a value that is not finite or a scale that is not
    positive.
    """
    try:
        read_header(path)
        with open(path, "rb") as file:
            tensors = load(file.read())  # a copy: a mapped file could still change
    except PoEError:
        raise
    except Exception as error:  # safetensors does not export its error type everywhere
        raise DeltaError(f"{path} cannot be read as safetensors ({error}). Fetch it again.") from error
    if fingerprint is not None:
        _check_fingerprint(path, fingerprint, fingerprint_tensors(tensors))
    check_finite(stage, tensors)
    for name, tensor in tensors.items():
        if _is_scale(name, tensors) and not (tensor > 0).all():
            raise DeltaError(f"Stage {stage!r}: {name} should hold positive scales. Fetch it again.")
    return from_stored(tensors)


def _check_fingerprint(path: str | os.PathLike[str], expected: str, got: str) -> None:
    if got != expected:
        raise FingerprintError(
            f"{path} was changed after it was written: expected fingerprint {expected[:12]}, got {got[:12]}. "
            "Fetch it again from its author, or pass verify=False if you changed it yourself."
        )


def _is_scale(name: str, tensors: Mapping[str, object]) -> bool:
    """Return whether a name belongs to the scales of another tensor."""
    return name.endswith(SCALE) and name.removesuffix(SCALE) in tensors


def _check_types(path: str | os.PathLike[str], entries: Mapping[str, Entry]) -> None:
    """Raise `DeltaError` unless each tensor is floating point, or an int8 matrix with a scale per row."""
    for name, entry in entries.items():
        if entry.dtype == "I8":
            scale = entries.get(name + SCALE)
            if len(entry.shape) != 2 or scale is None or (scale.dtype, scale.shape) != ("F32", entry.shape[:1]):
                got = "none" if scale is None else f"{scale.dtype} {list(scale.shape)}"
                raise DeltaError(
                    f"{path}: {name} is of type I8 and shape {list(entry.shape)}; expected a matrix "
                    f"with {name}{SCALE}, an F32 per row, got {got}. Fetch it again."
                )
        elif entry.dtype not in _FLOATS:
            raise DeltaError(f"{path}: {name} is of type {entry.dtype}; expected {', '.join(_FLOATS)} or I8.")
        elif _is_scale(name, entries) and entries[name.removesuffix(SCALE)].dtype != "I8":
            raise DeltaError(f"{path}: {name} belongs to no int8 matrix. Fetch it again.")


def check_finite(stage: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `DeltaError` that names the first tensor with an infinite or undefined value."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise DeltaError(
                f"Stage {stage!r}: {name} holds values that are not finite. "
                "The training run diverged or the file is damaged; use an earlier checkpoint."
            )


def check_no_pickles(folder: str | os.PathLike[str]) -> None:
    """Raise `DeltaError` if a file in a stage folder could hold a pickle."""
    pickles = sorted(
        os.path.relpath(os.path.join(where, name), folder)
        for where, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(PICKLES)
    )
    if pickles:
        raise DeltaError(
            f"{folder} holds {', '.join(pickles[:5])}: expected no file that can carry a pickle. "
            "A stage has delta.safetensors and text files: remove the others."
        )
