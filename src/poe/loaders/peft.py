"""Low-rank forks and PEFT's LoRA adapters are the same thing: one becomes the other, with equal logits.

PEFT computes `W x + (alpha / r) B A x`. A fork computes `W x + b a x`, so `a = A` and `b = (alpha / r) B`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn
from transformers import PreTrainedModel

from poe.errors import DeltaError, FamilyError, SourceError
from poe.files.output import atomic_folder
from poe.loaders.base import Base
from poe.modeling.access import read_json
from poe.modeling.families import family_of
from poe.modeling.fork import ForkedLinear
from poe.modeling.stage import Stage
from poe.modeling.stage_config import StageConfig
from poe.modeling.tensor_file import read_header, write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What changes the function that an adapter computes, and the only value that a fork can hold.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (False, None),
}


def export_peft(base: Base, stage: Stage, folder: Path, invocation_tokens: Sequence[int] | None = None) -> Path:
    """Write a low-rank fork as a PEFT LoRA adapter, atomically, and return its folder.

    `invocation_tokens` are the token ids that end the prompt, for a stage that is active on the answer: PEFT then reads
    it as Activated LoRA (`alora_invocation_tokens`), which acts from the first of these tokens on. None writes a plain
    LoRA, which acts on all tokens. Raises `FamilyError` for a stage that no LoRA can hold.
    """
    base.check_unchanged(stage)
    family = family_of(base.model)
    if (
        stage.config.layers != "fork"
        or stage.config.rank is None
        or stage.parent is not None
        or stage.config.head != "none"
    ):
        raise FamilyError(
            f"Stage {stage.name!r} cannot be a LoRA adapter: expected a fork with a rank and head 'none' on the base; "
            f"got layers {stage.config.layers!r}, rank {stage.config.rank}, head {stage.config.head!r}. "
            "export_native writes any stage as an ordinary checkpoint."
        )
    tensors: dict[str, torch.Tensor] = {}
    targets: set[str] = set()
    for index, layer in enumerate(stage.layers, start=stage.below):
        for path, module in layer.named_modules():
            if isinstance(module, ForkedLinear):
                name = f"{_PREFIX}{family.backbone}.{family.layers}.{index}.{path}"
                tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = (
                    module.a.detach(),
                    module.b.detach(),
                )
                targets.add(path.rpartition(".")[2])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.source.repo,
        "r": stage.config.rank,
        "lora_alpha": stage.config.rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(targets),
        "layers_to_transform": list(range(stage.below, stage.depth)),
        "layers_pattern": family.layers.rpartition(".")[2],
        "bias": "none",
        "inference_mode": True,
        **({"alora_invocation_tokens": list(invocation_tokens)} if invocation_tokens else {}),
    }
    target = folder.expanduser().absolute()
    with atomic_folder(target) as temporary:
        stored = {name: tensor.to("cpu", stage.saved_dtype or tensor.dtype) for name, tensor in tensors.items()}
        write_tensors(temporary / WEIGHTS, stored, {"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return target


def read_peft(folder: Path, base: PreTrainedModel, name: str) -> tuple[StageConfig, dict[str, torch.Tensor]]:
    """Return the config and the tensors of the fork that computes what a PEFT LoRA adapter for `base` computes.

    The change of a linear layer that the adapter does not have is zero. Raises `SourceError`
    for a folder that is no LoRA adapter in safetensors, or one whose function a fork cannot compute.
    """
    family = family_of(base)
    config = _read_config(folder)
    rank = _positive(config, "r", folder)
    scale = float(config.get("lora_alpha", rank)) / (rank**0.5 if config.get("use_rslora") else rank)
    try:
        read_header(folder / WEIGHTS)
        stored = load((folder / WEIGHTS).read_bytes())  # a copy: a mapped file could still change
    except (OSError, SafetensorError, DeltaError) as error:
        raise SourceError(
            f"{folder} has no {WEIGHTS} that can be read: {error}. Other formats are not opened."
        ) from error
    prefix, depth = f"{_PREFIX}{family.backbone}.{family.layers}.", base.config.num_hidden_layers
    tensors: dict[str, torch.Tensor] = {}
    indices: set[int] = set()
    for key, tensor in stored.items():
        index, _, path = key.removeprefix(prefix).partition(".")
        module, _, factor = path.rpartition(".lora_")
        if (
            not key.startswith(prefix)
            or not index.isdigit()
            or int(index) >= depth
            or factor not in ("A.weight", "B.weight")
        ):
            raise SourceError(
                f"{folder} holds {key}: expected low-rank factors of the linear layers of {depth} layers."
            )
        if tensor.shape[factor != "A.weight"] != rank:
            raise SourceError(
                f"{folder}: {key} has rank {tensor.shape[factor != 'A.weight']}, expected {rank} everywhere."
            )
        indices.add(int(index))
        tensors[f"{index}.{module}.{'a' if factor == 'A.weight' else 'b'}"] = tensor
    if not indices:
        raise SourceError(f"{folder}/{WEIGHTS} is empty: expected low-rank factors.")
    below = min(indices)
    moved = {}
    for key, tensor in tensors.items():
        index, _, rest = key.partition(".")
        moved[f"layers.{int(index) - below}.{rest}"] = tensor if key.endswith(".a") else tensor * scale
    for offset, layer in enumerate(family.layers_of(base)[below:]):
        for path, module in layer.named_modules():
            if isinstance(module, nn.Linear) and path not in family.unforked:
                at, like = f"layers.{offset}.{path}", next(iter(stored.values()))
                moved.setdefault(f"{at}.a", like.new_zeros(rank, module.in_features))
                moved.setdefault(f"{at}.b", like.new_zeros(module.out_features, rank))
    active = "answer" if config.get("alora_invocation_tokens") else "all"
    return StageConfig(name, depth - below, "none", attach_at=below, layers="fork", rank=rank, active=active), moved


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise SourceError(f"{folder} has no {CONFIG}: expected a PEFT adapter's folder.")
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        kind = config.get("peft_type")
        raise SourceError(f"{folder} is not a LoRA adapter: expected peft_type 'LORA', got {kind!r}.")
    for field, values in _PLAIN.items():
        if config.get(field) not in values:
            raise SourceError(
                f"{folder} cannot become a fork: {field} is {config[field]!r}, expected {values[0]!r}. A fork holds "
                "low-rank changes of linear layers alone."
            )
    return config


def _positive(config: dict[str, Any], field: str, folder: Path) -> int:
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SourceError(f"{folder}/{CONFIG}: {field} should be a positive whole number, got {value!r}.")
    return value
