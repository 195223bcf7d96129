"""How a base holds its weights: plain or quantized, in memory or offloaded, on one device or on several.

Both are transformers' own work (`quantization_config`, `device_map`) and stay as they are; a stage stands beside such a
base in plain tensors, on the device that computes. Only the output head must be plain and in memory, because every
stage's head delta is added to it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Where the quantization methods of transformers keep the names of the modules that they leave alone.
_LEFT_ALONE = ("llm_int8_skip_modules", "modules_to_not_convert")


def is_plain(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's values are what it holds: not packed, not 8 bit, no subclass that only looks so."""
    return type(tensor) in (torch.Tensor, nn.Parameter) and tensor.dtype in _PLAIN


def quantization_of(base: PreTrainedModel) -> str | None:
    """Return by what a base is quantized, such as `torchao, Int8Tensor`; None if it is not."""
    config = getattr(base.config, "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    names = [] if config is None else [str(getattr(method, "value", method))]
    packed = [p for p in base.parameters() if not is_plain(p)]
    odd = {str(p.dtype) if type(p) is nn.Parameter else type(p).__name__ for p in packed}
    return ", ".join([*names, *sorted(odd)]) or None


def is_offloaded(base: PreTrainedModel) -> bool:
    """Return whether some weights are out of memory, or in the CPU's while another device computes."""
    return any(p.device.type == "meta" for p in base.parameters())


def device_of(module: nn.Module) -> torch.device:
    """Return where a module computes: its hooks' execution device if its weights are offloaded, else where they are."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    places = (getattr(hook, "execution_device", None) for part in module.modules() for hook in _hooks(part))
    # A GPU's place is a number, and the first one's is 0.
    return torch.device(next((place for place in places if place is not None), "cpu"))


@torch.no_grad()
def in_memory(module: nn.Module, name: str) -> nn.Parameter:
    """Return a module's own parameter, read into memory if it is offloaded, where only that module's hooks bring it."""
    parameter = module.get_parameter(name)
    hook = next((hook for hook in _hooks(module) if getattr(hook, "offload", False)), None)
    if hook is None or parameter.device.type != "meta":
        return parameter
    return nn.Parameter(hook.weights_map[name].to(device_of(module)), requires_grad=False)


@torch.no_grad()
def bring_head_back(base: PreTrainedModel) -> None:
    """Put an offloaded output head into memory, on the device where it computes; `device_map="auto"` offloads it first.

    Only that head's weights are read; a head that is in memory stays as it is.
    """
    head = base.get_output_embeddings()
    for hook in _hooks(head) if isinstance(head, nn.Module) else ():
        if not getattr(hook, "offload", False):
            continue
        for name, _ in list(head.named_parameters(recurse=False)):
            setattr(head, name, in_memory(head, name))  # if it is tied to an embedding in memory, it stays that
        hook.offload = False  # it still brings what comes in to the head's device


def leave_alone(config: PreTrainedConfig, base: PreTrainedModel, names: list[str]) -> None:
    """Write into the config of a model grown from a quantized base that the modules `names` are not quantized.

    Without it a checkpoint that `save_pretrained` writes of that model could not be opened again.
    """
    quantization = getattr(config, "quantization_config", None)
    for field in _LEFT_ALONE:
        if hasattr(quantization, field):
            chosen = getattr(getattr(base, "hf_quantizer", None), "modules_to_not_convert", None)
            known = getattr(quantization, field) or chosen or []
            setattr(quantization, field, list(dict.fromkeys([*known, *names])))


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Return the hooks by which accelerate moves a module's weights and inputs."""
    hook = getattr(module, "_hf_hook", None)
    yield from getattr(hook, "hooks", () if hook is None else (hook,))
