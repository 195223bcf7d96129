"""Stages in the layout of Cognica's published releases, or of a nanochat stage checkpoint, read for a delta.

Such a file holds the stage's layers under the numbers that they have above the base, `lm_head_stage`, the scalars of
all layers, and copies of what lies below: at least the base's head, at most the whole base. What is there of the base
must be the base's own, which makes the copies a proof that the right base was named; they are not written again.
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
    """Return the stage's own tensors under the delta format's names.

    `below` is the model that the stage stands on (a PoE base, or one grown by the parent), `base_head` (V, D) the
    head of the base itself. Pickled tokenizers are not opened: the tokenizer is the base's. Raises `SourceError` for
    a layout that is not known or does not fit, `FingerprintError` if the file's copies differ from the base.
    """
    tensors, path = read_checkpoint(folder)
    ours = translate(tensors, below.config.head_dim, path)
    depth = below.config.num_hidden_layers
    has_scalars = bool(getattr(below.config, "layer_scalars", False))
    delta: dict[str, Tensor] = {}
    numbers: set[int] = set()
    copies: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        match = _LAYER.fullmatch(name)
        if name == "head.weight":
            delta[name] = tensor[: base_head.shape[0]]
        elif match is None or int(match[1]) < depth:
            copies[name] = tensor
        elif has_scalars or not _neutral(name, tensor, path):
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


def _check_copies(copies: Mapping[str, Tensor], known: Mapping[str, Tensor], path: Path) -> None:
    """Refuse a file whose tensors of the base are not those of the base."""
    for name, tensor in copies.items():
        mine = known.get(name)
        if mine is None:
            if not _neutral(name, tensor, path):
                raise SourceError(f"{path} holds {name}, which the base does not have: expected its own base.")
        elif not torch.equal(tensor[: mine.shape[0]].to(mine.dtype), mine.cpu()):
            raise FingerprintError(f"{path} was trained on another base: its copy of {name} differs from this one's.")


def _neutral(name: str, tensor: Tensor, path: Path) -> bool:
    """Whether `name` is a scalar that does nothing, which a base without scalars need not have."""
    if not name.endswith(("resid_scale", "first_scale")):
        return False
    if tensor.item() != float(name.endswith("resid_scale")):
        raise SourceError(
            f"{path} scales its layers ({name} is {tensor.item():g}), the base has no such scalars: expected the base "
            "that it was trained on."
        )
    return True
