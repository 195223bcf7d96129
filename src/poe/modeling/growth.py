"""How a base becomes a deeper model of its own kind, without a copy of any of its tensors.

`build_layers` makes new decoder layers of the base's own class; `shell` makes a second instance of the base's class
whose modules are the base's, with those layers on top. The base object stays usable and is never written to.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .families import family_of, grown_config
from .heads import FoldedHead
from .placement import device_of, in_memory, leave_alone
from .recurrent import GrownStack, forbid_checkpoint


def build_layers(
    base: PreTrainedModel, count: int, below: int, *, seed: int = 0, dtype: torch.dtype | None = None
) -> nn.ModuleList:
    """Return `count` new decoder layers of the base's own class, to stand on `below` layers.

    They are initialized as the family does it, from `seed` alone and on the CPU, so the values do not depend on the
    device; then the modules that write into the residual stream are made to write zero, so the new layers are the
    identity. They are in `dtype` (default: the base's) on the device where the base's layer below them computes, and
    plain: no quantization or offloading of the base extends to them.
    """
    family = family_of(base)
    base_layers = family.layers_of(base)
    layer_class = type(base_layers[min(family.pattern_of(base.config), len(base_layers) - 1)])
    config = grown_config(base.config, family, below, count)
    layers_config = _layers_config(base)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        torch.manual_seed(seed)
        layers = nn.ModuleList(layer_class(config, below + index) for index in range(count))
        for module in layers.modules():
            base._init_weights(module)
            if getattr(module, "config", None) is config:
                # One object for all layers, so that set_attn_implementation reaches every one of them.
                setattr(module, "config", layers_config)  # noqa: B010
        for layer in layers:
            for path in family.outputs:
                _silence(layer.get_submodule(path))
    layers.to(device=device_of(base_layers[min(below, len(base_layers)) - 1]), dtype=dtype or base.dtype)
    if len(set(getattr(base, "hf_device_map", {}).values())) > 1:
        for layer in layers:
            layer.register_forward_pre_hook(_bring_to_device, with_kwargs=True)
    return layers.train(base.training)


def shell(
    base: PreTrainedModel, layers: Sequence[nn.Module], head: nn.Module, *, below: int | None = None
) -> PreTrainedModel:
    """Return a second instance of the base's class: its first `below` layers (default all), then `layers`, then `head`.

    Everything but `layers` and `head` is the base's own module, not a copy; the config is a grown copy with an untied
    head. The new model has the base's generation config and training mode. On a recurrent base `layers` run in the last
    cycle only, and the model refuses `save_pretrained`.
    """
    family = family_of(base)
    kept = family.layers_of(base)[:below]
    below = base.config.num_hidden_layers if below is None else below
    with torch.device("meta"):
        model = type(base)(grown_config(base.config, family, below, len(layers)))
    backbone, base_backbone = family.backbone_of(model), family.backbone_of(base)
    _record_outputs_once(base_backbone, backbone, family.layers, layers)
    child = family.layers.partition(".")[0]
    _share(base_backbone, backbone, {child})
    if family.recurrent:
        setattr(backbone, child, GrownStack(base_backbone.get_submodule(child), layers, base.config))
        forbid_checkpoint(model)
    else:
        setattr(backbone, child, nn.ModuleList([*kept, *layers]))
    _share(base, model, {family.backbone, family.head})
    setattr(model, family.head, head)
    added = range(len(kept), len(kept) + len(layers))
    leave_alone(model.config, base, [family.head, *(f"{family.backbone}.{family.layers}.{i}" for i in added)])
    if hasattr(base, "generation_config"):
        model.generation_config = copy.deepcopy(base.generation_config)
    for name in ("hf_device_map", "hf_quantizer", "is_quantized", "quantization_method"):
        if name in vars(base):
            setattr(model, name, getattr(base, name))
    return model.train(base.training)


def sync_attention(base: PreTrainedModel, model: PreTrainedModel) -> None:
    """Make `set_attn_implementation` on a shell, its siblings or the base reach all that share layers with it."""
    backbone = family_of(base).backbone_of(model)
    backbone.register_forward_pre_hook(SyncAttention(model.config, _layers_config(base)))


def make_standalone(base: PreTrainedModel, model: PreTrainedModel) -> PreTrainedModel:
    """Make a shell the only user of its base's modules: an ordinary model with one config and a linear head.

    The folded head becomes an `nn.Linear` with a weight of its own. `base` must not be used afterwards.
    """
    family = family_of(base)
    folded = family.head_of(model)
    assert isinstance(folded, FoldedHead)
    with torch.no_grad():
        head = nn.Linear(folded.in_features, folded.out_features, bias=folded.bias is not None, device="meta")
        head.weight = nn.Parameter(folded.weight.detach().clone())
        if folded.bias is not None:
            head.bias = nn.Parameter(folded.bias.detach())
    setattr(model, family.head, head)
    old = {id(base.config), id(_layers_config(base))}
    for module in model.modules():
        if id(getattr(module, "config", None)) in old:
            setattr(module, "config", model.config)  # noqa: B010
    return model.train(base.training)


class SyncAttention:
    """A forward pre-hook that keeps a shell and the layers it shares on one attention implementation.

    The shell's config builds the mask, the layers read the base's config: whichever was changed last (by
    `set_attn_implementation` on the base or on any shell) is followed by the other, before a mask is built.
    """

    def __init__(self, shell_config: PreTrainedConfig, layers_config: PreTrainedConfig) -> None:
        self.shell_config, self.layers_config = shell_config, layers_config
        self.agreed = layers_config._attn_implementation
        shell_config._attn_implementation_internal = self.agreed

    def __call__(self, module: nn.Module, args: Any) -> None:
        ours, theirs = self.shell_config._attn_implementation, self.layers_config._attn_implementation
        if ours == theirs == self.agreed:
            return
        self.agreed = ours if ours != self.agreed else theirs
        self.shell_config._attn_implementation_internal = self.agreed
        self.layers_config._attn_implementation_internal = self.agreed


def _layers_config(base: PreTrainedModel) -> PreTrainedConfig:
    """Return the config object that the base's own layers read."""
    for module in family_of(base).layers_of(base).modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            return config
    return base.config


def _silence(module: nn.Module) -> None:
    """Set a module's own parameters to zero, or to minus one in a norm that multiplies by one plus its weight."""
    parameters = list(module.parameters(recurse=False))
    for tensor in parameters:
        tensor.zero_()
    if not isinstance(module, nn.Linear) and parameters and module(torch.ones_like(parameters[0])).any():
        parameters[0].fill_(-1.0)


def _share(source: nn.Module, target: nn.Module, without: set[str]) -> None:
    """Make the children, parameters and buffers of `target` the very objects that `source` holds.

    What `target` does not have by its config (such as the heads of a PoE base's stages) is not given to it. Of its own
    parameters, those that are offloaded are read into memory: its hooks are not the target's.
    """
    children, parameters = dict(target.named_children()), dict(target.named_parameters(recurse=False))
    for name, child in source.named_children():
        if name not in without and name in children:
            setattr(target, name, child)
    for name, _ in source.named_parameters(recurse=False):
        if name in parameters:
            setattr(target, name, in_memory(source, name))
    for name, buffer in source.named_buffers(recurse=False):
        setattr(target, name, buffer)


def _record_outputs_once(base_backbone: nn.Module, backbone: nn.Module, name: str, layers: Sequence[nn.Module]) -> None:
    """Install transformers' output-recording hooks exactly once on every shared module.

    Each backbone installs them at its first forward that asks for hidden states; on shared layers they would then
    record every state twice.
    """
    maybe_install_capturing_hooks(base_backbone)  # type: ignore[arg-type]
    fresh = [layer for layer in layers if not getattr(layer, "_records_outputs", False)]
    backbone.set_submodule(name, nn.ModuleList(fresh))
    maybe_install_capturing_hooks(backbone)  # type: ignore[arg-type]
    for layer in fresh:
        layer._records_outputs = True  # type: ignore[assignment]


def _bring_to_device(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    device = next(module.parameters()).device

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        return type(value)(move(item) for item in value) if type(value) in (tuple, list) else value

    return move(args), {name: move(value) for name, value in kwargs.items()}
