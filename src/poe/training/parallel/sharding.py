"""A frozen base that does not fit on one device: its layers divided among the processes (FSDP2).

Every process holds a slice of each of the base's layers; a layer is brought together when it computes and its slices of
the others' are dropped at once. There is no gradient to divide and nothing to write back. What stands outside the
layers stays whole in every process: the embedding and the head (tied or not), because every stage's head delta is
folded into the head at every step, and the final norm. The stage is whole, too; its optimizer's state is the
optimizer's affair.
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
    """Divide the layers of the cascade's base among the processes of `world`, and bring the rest to its device.

    Load the base on the CPU: it moves to the device layer by layer. From then on the base and every model that grows
    from it compute in all processes at once or not at all, `generate` included. A base that is divided stays as it is.
    Raises `RecipeError` for a base that is quantized, offloaded, on several devices, or recurrent.
    """
    base = cascade.base
    family = family_of(base)
    if is_sharded(base):
        return
    if quantization_of(base) or is_offloaded(base) or len(set(getattr(base, "hf_device_map", {}).values())) > 1:
        raise RecipeError(
            "shard_base divides a base that is held as it is: expected no quantization_config, and no device_map that "
            "offloads or spreads it. Use the one or the other."
        )
    if family.recurrent:
        raise RecipeError(
            f"shard_base divides layers that run once each: a base of model type {family.model_type!r} is recurrent. "
            "Train on it without shard_base."
        )
    _ = cascade.base_source  # of a base that came from memory, the fingerprint of its whole tensors
    mesh = DeviceMesh.from_group(world.group, world.device.type)  # type: ignore[arg-type]
    for layer in family.layers_of(base):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    _bring(base, world.device)
    for stage in cascade.stages.values():
        stage.to(world.device)
    _generate_together(base)


def gather_ahead(model: PreTrainedModel, world: World) -> None:
    """Let a model that stands on a divided base fetch the next layer while one computes."""
    backbone = family_of(model).backbone_of(model)
    whole = {p for p in backbone.parameters() if not isinstance(p, DTensor)}
    layers = family_of(model).layers_of(model)
    mesh = DeviceMesh.from_group(world.group, world.device.type)  # type: ignore[arg-type]
    if not any(_has_computed(layer) for layer in layers):  # layers have one model that fetches for them, the first
        fully_shard(backbone, mesh=mesh, ignored_params=whole)
    _generate_together(model)


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model's layers are divided among processes."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def resident_bytes(model: nn.Module) -> int:
    """The bytes of a model's parameters in this process, each tensor counted once."""
    here = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(tensor.numel() * tensor.element_size() for tensor in here)


@torch.no_grad()
def _bring(base: nn.Module, device: torch.device) -> None:
    """Move what is not divided. Tied weights are one parameter and stay one."""
    for module in base.modules():
        for parameter in module.parameters(recurse=False):
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(device)
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


def _generate_together(model: Any) -> None:
    """Make transformers' `generate` go on in every process until the last has finished, as for its own FSDP models."""
    model._is_fsdp_managed_module = True


def _has_computed(layer: nn.Module) -> bool:
    state = fully_shard.state(layer) if isinstance(next(layer.parameters()), DTensor) else None  # type: ignore[attr-defined]
    return state is not None and state._is_root is not None
