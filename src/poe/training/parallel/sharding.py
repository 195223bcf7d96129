"""A frozen base that does not fit on one device: its layers are sharded over the processes (FSDP2).

Every process holds a slice of each layer of the base. A layer is gathered when it computes, and the slices of the
other processes are dropped right after. The base has no gradients to reduce. The embedding, the head and the final norm
stay whole in every process, because every stage's head delta is folded into the head at every step. The stage is whole
as well; the optimizer shards its state.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from poe.cascade import Cascade
from poe.errors import RecipeError
from poe.modeling.families import family_of
from poe.modeling.placement import is_offloaded, quantization_of
from poe.training.parallel.distributed import World


def shard_base(cascade: Cascade, world: World) -> None:
    """Shard the layers of the cascade's base over the processes of `world`, and move the rest to its device.

    Load the base on the CPU: it moves to the device layer by layer. Then all processes must run the base, and
    every model grown from it, at the same time; this includes `generate`. A sharded base is not changed again. Raises
    `RecipeError` for a base that is quantized, offloaded, on several devices, or recurrent.
    """
    base = cascade.base
    family = family_of(base)
    if is_sharded(base):
        return
    if quantization_of(base) or is_offloaded(base) or len(set(getattr(base, "hf_device_map", {}).values())) > 1:
        raise RecipeError(
            "shard_base needs a base with plain weights: expected no quantization_config, and no device_map that "
            "offloads or spreads it. Remove one of the two options."
        )
    if family.recurrent:
        raise RecipeError(
            f"shard_base needs layers that run once each: a base of model type {family.model_type!r} is recurrent. "
            "Train on it without shard_base."
        )
    _ = cascade.base_source  # the fingerprint of a base from memory needs its whole tensors
    mesh = DeviceMesh.from_group(world.group, world.device.type)  # type: ignore[arg-type]
    for layer in family.layers_of(base):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    _move_whole_tensors(base, world.device)
    for stage in cascade.stages.values():
        stage.to(world.device)
    _synchronize_generate(base)


def prefetch_layers(model: PreTrainedModel, world: World) -> None:
    """Let a model on a sharded base gather the next layer while one computes."""
    backbone = family_of(model).backbone_of(model)
    whole = {p for p in backbone.parameters() if not isinstance(p, DTensor)}
    layers = family_of(model).layers_of(model)
    mesh = DeviceMesh.from_group(world.group, world.device.type)  # type: ignore[arg-type]
    if not any(_has_root(layer) for layer in layers):  # layers can be prefetched for one model only, the first that ran
        fully_shard(backbone, mesh=mesh, ignored_params=whole)
    _synchronize_generate(model)


def is_sharded(model: nn.Module) -> bool:
    """Return whether the layers of a model are sharded over processes."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def resident_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters in this process, each tensor counted once."""
    local = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


@torch.no_grad()
def _move_whole_tensors(base: nn.Module, device: torch.device) -> None:
    """Move the tensors that are not sharded. Tied weights are one parameter and stay tied."""
    for module in base.modules():
        for parameter in module.parameters(recurse=False):
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(device)
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


def _synchronize_generate(model: Any) -> None:
    """Let transformers' `generate` run in every process until the last has finished, as for its own FSDP models."""
    model._is_fsdp_managed_module = True


def _has_root(layer: nn.Module) -> bool:
    """Return whether a sharded layer has run, and therefore belongs to a model that prefetches it."""
    state = fully_shard.state(layer) if isinstance(next(layer.parameters()), DTensor) else None  # type: ignore[attr-defined]
    return state is not None and state._is_root is not None
