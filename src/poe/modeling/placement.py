"""Where and how a base stores its weights: plain or quantized, in memory or offloaded, on one or several devices.

transformers implements both (`quantization_config`, `device_map`). A stage on such a base stays in plain tensors on the
device that computes. Only the output head must be plain and in memory, because each stage's head delta is added to it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

COMPILED = "_orig_mod"  # torch.compile wraps a module in another, which holds it under this name
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The config fields in which the quantization methods of transformers list the modules that they exclude.
_EXCLUSION_FIELDS = ("llm_int8_skip_modules", "modules_to_not_convert")


def is_plain(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is an ordinary floating-point one: not packed, not 8-bit, not a subclass."""
    return type(tensor) in (torch.Tensor, nn.Parameter) and tensor.dtype in _PLAIN


def quantization_of(base: PreTrainedModel) -> str | None:
    """Return the quantization of a base, such as `torchao, Int8Tensor`; None if it is not quantized."""
    config = getattr(base.config, "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    names = [] if config is None else [str(getattr(method, "value", method))]
    packed = [p for p in base.parameters() if not is_plain(p)]
    types = {str(p.dtype) if type(p) is nn.Parameter else type(p).__name__ for p in packed}
    return ", ".join([*names, *sorted(types)]) or None


def is_offloaded(base: PreTrainedModel) -> bool:
    """Return whether some weights are offloaded to the disk, or to CPU memory while another device computes."""
    return any(p.device.type == "meta" for p in base.parameters())


def device_of(module: nn.Module) -> torch.device:
    """Return the device on which a module computes: that of its weights, or of its hooks if they are offloaded."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    devices = (getattr(hook, "execution_device", None) for part in module.modules() for hook in _hooks(part))
    # A hook names a GPU by its number, and 0 is the first GPU.
    return torch.device(next((device for device in devices if device is not None), "cpu"))


@torch.no_grad()
def load_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """Return a module's own parameter. If it is offloaded, it is read into memory."""
    parameter = module.get_parameter(name)
    hook = next((hook for hook in _hooks(module) if getattr(hook, "offload", False)), None)
    if hook is None or parameter.device.type != "meta":
        return parameter
    return nn.Parameter(hook.weights_map[name].to(device_of(module)), requires_grad=False)


def read_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the state dict of a model, in which offloaded parameters are read into memory one by one."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        path, _, own = name.rpartition(".")
        is_offloaded = isinstance(tensor, nn.Parameter) and tensor.is_meta
        yield plain_name(name), load_parameter(model.get_submodule(path), own) if is_offloaded else tensor


def plain_name(name: str) -> str:
    """Return the name of a module or tensor without the wrappers of torch.compile."""
    return ".".join(part for part in name.split(".") if part not in ("", COMPILED))


@torch.no_grad()
def load_head_into_memory(base: PreTrainedModel) -> None:
    """Load an offloaded output head into memory, on the device on which it computes.

    `device_map="auto"` offloads the head first. Only the head's weights are read; a head in memory stays unchanged.
    """
    head = base.get_output_embeddings()
    for hook in _hooks(head) if isinstance(head, nn.Module) else ():
        if not getattr(hook, "offload", False):
            continue
        for name, _ in list(head.named_parameters(recurse=False)):
            setattr(head, name, load_parameter(head, name))  # a head that is tied to an embedding in memory stays tied
        hook.offload = False  # the hook still moves inputs to the head's device


def exclude_from_quantization(config: PreTrainedConfig, base: PreTrainedModel, names: list[str]) -> None:
    """Add the modules `names` to the quantization exclusions of the config of a model grown from a quantized base.

    Otherwise a checkpoint that `save_pretrained` writes of that model could not be loaded.
    """
    quantization = getattr(config, "quantization_config", None)
    for field in _EXCLUSION_FIELDS:
        if hasattr(quantization, field):
            defaults = getattr(getattr(base, "hf_quantizer", None), "modules_to_not_convert", None)
            excluded = getattr(quantization, field) or defaults or []
            setattr(quantization, field, list(dict.fromkeys([*excluded, *names])))


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Yield the hooks with which accelerate moves a module's weights and inputs."""
    hook = getattr(module, "_hf_hook", None)
    yield from getattr(hook, "hooks", () if hook is None else (hook,))


def missing_device(device: torch.device) -> str:
    """Return a sentence if this machine does not have a device, else nothing."""
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            build = "" if torch.version.cuda or torch.version.hip else ", because this build of torch is for CPUs"
            return f"There is no device {device}: torch sees {count} GPUs{build}."
    elif device.type == "mps" and not torch.backends.mps.is_available():
        return "There is no device mps: torch sees no GPU of Apple."
    elif device.type not in ("cpu", "mps", "meta", "xpu", "npu", "hpu"):
        return f"There is no device {device}: expected cpu, cuda, or mps."
    return ""
