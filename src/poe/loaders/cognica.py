"""Read stages in the layout of Cognica's published releases, or of a nanochat stage checkpoint, as a delta.

Such a file has the stage's layers, numbered as layers of the whole model, `lm_head_stage`, the scalars of all layers,
and copies of at least the base's head and at most the whole base. The copies must equal the base, which proves that the
right base was named. They are not written again.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from poe.errors import FingerprintError, SourceError
from poe.loaders.nanochat import read_checkpoint, translate

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def read_stage(folder: Path, below: PreTrainedModel, base_head: Tensor) -> dict[str, Tensor]:
    """Return the stage's tensors by their names in the delta format.

    `below` is the model that the stage stands on (a PoE base, or one grown by the parent), `base_head` (V, D) the head
    of the base itself. Pickled tokenizers are not opened, because the tokenizer is the base's. Raises `SourceError` for
    an unknown layout or one that does not fit, `FingerprintError` if the file's copies differ from the base.
    """
    tensors, path = read_checkpoint(folder)
    renamed = translate(tensors, below.config.head_dim, path)
    depth = below.config.num_hidden_layers
    has_scalars = bool(getattr(below.config, "layer_scalars", False))
    delta: dict[str, Tensor] = {}
    numbers: set[int] = set()
    copies: dict[str, Tensor] = {}
    for name, tensor in renamed.items():
        match = _LAYER.fullmatch(name)
        if name == "head.weight":
            delta[name] = tensor[: base_head.shape[0]]
        elif match is None or int(match[1]) < depth:
            copies[name] = tensor
        elif has_scalars or not _is_neutral_scalar(name, tensor, path):
            if tensor.ndim > 1:
                numbers.add(int(match[1]))
            delta[f"layers.{int(match[1]) - depth}.{match[2]}"] = tensor
    if not numbers or sorted(numbers) != list(range(depth, depth + len(numbers))):
        raise SourceError(
            f"{path}: expected the layers of a stage on {depth} layers, numbered from {depth} on without a gap; got "
            f"{sorted(numbers) or 'none'}."
        )
    _check_copies(copies, {**below.state_dict(), "lm_head.weight": base_head}, path)
    return delta


def _check_copies(copies: Mapping[str, Tensor], base_tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise unless the file's copies of base tensors equal the base's."""
    for name, tensor in copies.items():
        base_tensor = base_tensors.get(name)
        if base_tensor is None:
            if not _is_neutral_scalar(name, tensor, path):
                raise SourceError(f"{path} holds {name}, which the base does not have: expected its own base.")
        elif not torch.equal(tensor[: base_tensor.shape[0]].to(base_tensor.dtype), base_tensor.cpu()):
            raise FingerprintError(f"{path} was trained on another base: its copy of {name} differs from this one's.")


def _is_neutral_scalar(name: str, tensor: Tensor, path: Path) -> bool:
    """Return whether a tensor is a layer scalar without effect, which a base without scalars can ignore."""
    if not name.endswith(("resid_scale", "first_scale")):
        return False
    if tensor.item() != float(name.endswith("resid_scale")):
        raise SourceError(
            f"{path} scales its layers ({name} is {tensor.item():g}), but the base has no such scalars: expected the "
            "base that it was trained on."
        )
    return True
