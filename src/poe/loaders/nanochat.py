"""Read nanochat's checkpoints (github.com/karpathy/nanochat) without unpickling objects, and translate their names.

nanochat keeps per-layer scalars in one vector for all layers, and value embeddings beside the layers. A PoE base keeps
them in their layer. nanochat rotates queries and keys in the opposite direction; swapping the two halves of each head
gives the same scores. The head and the embeddings may have surplus rows (padding to a multiple of 64).
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from poe.errors import SourceError

# nanochat's name -> the name in a PoE base; {i} is the number of a layer
_PATTERNS = {
    r"transformer\.wte\.weight": "model.embed_tokens.weight",
    r"transformer\.h\.(?P<i>\d+)\.attn\.c_(?P<m>[qkv])\.weight": "model.layers.{i}.self_attn.{m}_proj.weight",
    r"transformer\.h\.(?P<i>\d+)\.attn\.c_proj\.weight": "model.layers.{i}.self_attn.o_proj.weight",
    r"transformer\.h\.(?P<i>\d+)\.attn\.ve_gate\.weight": "model.layers.{i}.self_attn.value_gate.weight",
    r"transformer\.h\.(?P<i>\d+)\.mlp\.c_fc\.weight": "model.layers.{i}.mlp.up_proj.weight",
    r"transformer\.h\.(?P<i>\d+)\.mlp\.c_proj\.weight": "model.layers.{i}.mlp.down_proj.weight",
    r"value_embeds\.(?P<i>\d+)\.weight": "model.layers.{i}.self_attn.value_embed.weight",
    r"smear_gate\.weight": "model.smear.gate.weight",
    r"smear_lambda": "model.smear.scale",
    r"backout_lambda": "model.backout_scale",
    r"lm_head\.weight": "lm_head.weight",
    r"lm_head_stage\.weight": "head.weight",
}
_PER_LAYER = {"resid_lambdas": "model.layers.{i}.resid_scale", "x0_lambdas": "model.layers.{i}.first_scale"}


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """Return the tensors of the one checkpoint in `folder`, by their original names, and its path.

    It is a `*.safetensors` file, or a `model_*.pt`, which is read with `weights_only`. Raises `SourceError`.
    """
    paths = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("model_*.pt"))
    if len(paths) != 1:
        raise SourceError(
            f"{folder}: expected one *.safetensors or one model_*.pt, found {[p.name for p in paths] or 'none'}. "
            "Keep only the one to import."
        )
    return read_tensors(paths[0]), paths[0]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint file by their original names. Raises `SourceError` for other content."""
    try:
        content = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # errors of the archive, of the header, or of a refused class
        raise SourceError(f"{path} is not a file of only tensors: {error}. Nothing was imported.") from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise SourceError(f"{path}: expected a mapping of names to tensors, got {type(content).__name__}.")
    return {str(name).removeprefix("_orig_mod."): tensor for name, tensor in content.items()}


def translate(tensors: Mapping[str, Tensor], head_dim: int, path: Path) -> dict[str, Tensor]:
    """Return the tensors in the layout and with the names of a PoE base. A stage's head delta is `head.weight`.

    Raises `SourceError` with all unknown names if there are any.
    """
    translated: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        if name in _PER_LAYER:
            for index, value in enumerate(tensor.reshape(-1, 1)):
                translated[_PER_LAYER[name].format(i=index)] = value
            continue
        for pattern, new_name in _PATTERNS.items():
            if match := re.fullmatch(pattern, name):
                full_name = new_name.format(**match.groupdict())
                rotated = full_name.endswith(("q_proj.weight", "k_proj.weight"))
                if name.endswith(".weight") and (tensor.ndim != 2 or (rotated and tensor.shape[0] % head_dim)):
                    raise SourceError(f"{path}: {name} is {tuple(tensor.shape)}, which fits no head of {head_dim}.")
                translated[full_name] = swap_halves(tensor, head_dim) if rotated else tensor
                break
        else:
            unknown.append(name)
    if unknown:
        raise SourceError(
            f"{path} holds {len(unknown)} tensors that nanochat's layout does not have: {', '.join(sorted(unknown))}. "
            "Nothing was written."
        )
    return translated


def swap_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Swap the two halves of each head's rows in a projection (heads * head_dim, D)."""
    return weight.unflatten(0, (-1, head_dim)).roll(head_dim // 2, 1).flatten(0, 1)
