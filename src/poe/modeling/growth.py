"""Build a deeper model of the base's own kind without copying any of its tensors.

`build_layers` makes new decoder layers of the base's class. `build_shell` makes a second instance of the base's class
that holds the base's modules and those layers on top. The base stays usable and is never changed.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .failures import StageError
from .families import family_of, grown_config
from .heads import FoldedHead
from .placement import device_of, exclude_from_quantization, load_parameter
from .recurrent import GrownStack, disable_save_pretrained


def build_layers(
    base: PreTrainedModel,
    below: int,
    pattern: Sequence[Mapping[str, Any]],
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> nn.ModuleList:
    """Return new decoder layers of the base's class, for the place above `below` layers.

    `pattern` has the entries of each layer in the config's lists (layer_pattern.py); a layer keeps them as
    `config_entries`.
    The family initializes them on the CPU from `seed`, so the values do not depend on the device. The modules
    that write into the residual stream then write zero, so the new layers are the identity. They are in `dtype`
    (default: the base's) on the device of the layer below them, in plain tensors without quantization or offloading.
    """
    family = family_of(base)
    base_layers = family.layers_of(base)
    layer_class = type(base_layers[min(family.template_layer(base.config), len(base_layers) - 1)])
    config = grown_config(base.config, family, below, pattern)
    layers_config = _layers_config(base)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        torch.manual_seed(seed)
        layers = nn.ModuleList(layer_class(config, below + index) for index in range(len(pattern)))
        for module in layers.modules():
            base._init_weights(module)
            if getattr(module, "config", None) is config:
                # All layers share one config, so set_attn_implementation reaches each of them.
                setattr(module, "config", layers_config)  # noqa: B010
        for layer, entries in zip(layers, pattern, strict=True):
            setattr(layer, "config_entries", dict(entries))  # noqa: B010
            for path in family.outputs:
                _zero_output(layer.get_submodule(path))
    layers.to(device=device_of(base_layers[min(below, len(base_layers)) - 1]), dtype=dtype or base.dtype)
    if len(set(getattr(base, "hf_device_map", {}).values())) > 1:
        for layer in layers:
            layer.register_forward_pre_hook(_move_inputs, with_kwargs=True)
    return layers.train(base.training)


def build_shell(
    base: PreTrainedModel, layers: Sequence[nn.Module], head: nn.Module, *, below: int | None = None
) -> PreTrainedModel:
    """Return a second instance of the base's class: its first `below` layers (default all), then `layers`, then `head`.

    All other modules are the base's own. The config is a grown copy with an untied head. The new model has the base's
    generation config and training mode. On a recurrent base `layers` run in the last cycle only, and `save_pretrained`
    raises.
    """
    family = family_of(base)
    kept = family.layers_of(base)[:below]
    below = base.config.num_hidden_layers if below is None else below
    above = [_describe_layer(layer) for layer in layers]
    with torch.device("meta"):
        model = type(base)(grown_config(base.config, family, below, above))
    backbone, base_backbone = family.backbone_of(model), family.backbone_of(base)
    _install_output_hooks(base_backbone, backbone, family.layers, layers)
    child = family.layers.partition(".")[0]
    _share_modules(base_backbone, backbone, {child, *_renew_rotary(base_backbone, backbone)})
    if family.recurrent:
        setattr(backbone, child, GrownStack(base_backbone.get_submodule(child), layers, base.config))
        disable_save_pretrained(model)
    else:
        setattr(backbone, child, nn.ModuleList([*kept, *layers]))
    _share_modules(base, model, {family.backbone, family.head})
    setattr(model, family.head, head)
    added = range(len(kept), len(kept) + len(layers))
    exclude_from_quantization(
        model.config, base, [family.head, *(f"{family.backbone}.{family.layers}.{i}" for i in added)]
    )
    if hasattr(base, "generation_config"):
        model.generation_config = copy.deepcopy(base.generation_config)
    for name in ("hf_device_map", "hf_quantizer", "is_quantized", "quantization_method"):
        if name in vars(base):
            setattr(model, name, getattr(base, name))
    return model.train(base.training)


def sync_attention(base: PreTrainedModel, model: PreTrainedModel) -> None:
    """Make `set_attn_implementation` on the base or any shell reach all models that share its layers."""
    backbone = family_of(base).backbone_of(model)
    backbone.register_forward_pre_hook(SyncAttention(model.config, _layers_config(base)))
    if not family_of(base).recurrent:  # such a base has a cache for every cycle
        backbone.register_forward_pre_hook(partial(_check_cache, model.config.num_hidden_layers), with_kwargs=True)


def make_standalone(base: PreTrainedModel, model: PreTrainedModel) -> PreTrainedModel:
    """Make a shell independent of its base: an ordinary model with one config and a linear head.

    The folded head becomes an `nn.Linear` with its own weight. Do not use `base` after the call.
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
    """A forward pre-hook that keeps a shell and the layers that it shares on one attention implementation.

    The shell's config decides the mask, but the layers read the base's config. `set_attn_implementation` may change
    either of them; before a mask is built, the other one follows the latest change.
    """

    def __init__(self, shell_config: PreTrainedConfig, layers_config: PreTrainedConfig) -> None:
        self.shell_config, self.layers_config = shell_config, layers_config
        self.agreed = layers_config._attn_implementation
        shell_config._attn_implementation_internal = self.agreed

    def __call__(self, module: nn.Module, args: Any) -> None:
        shell_attention, layers_attention = (
            self.shell_config._attn_implementation,
            self.layers_config._attn_implementation,
        )
        if shell_attention == layers_attention == self.agreed:
            return
        self.agreed = shell_attention if shell_attention != self.agreed else layers_attention
        self.shell_config._attn_implementation_internal = self.agreed
        self.layers_config._attn_implementation_internal = self.agreed


def _layers_config(base: PreTrainedModel) -> PreTrainedConfig:
    """Return the config object of the base's layers."""
    for module in family_of(base).layers_of(base).modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            return config
    return base.config


def _describe_layer(layer: nn.Module) -> int | Mapping[str, Any]:
    """Return the index of the base's layer that a stage's layer is a fork of, or the entries of a new layer."""
    index = getattr(layer, "base_index", None)
    return index if isinstance(index, int) else getattr(layer, "config_entries")  # noqa: B009


def _zero_output(module: nn.Module) -> None:
    """Make a module return zero: set its parameters to zero, or to -1 in a norm that multiplies by 1 + weight."""
    parameters = list(module.parameters(recurse=False))
    for tensor in parameters:
        tensor.zero_()
    if not isinstance(module, nn.Linear) and parameters and module(torch.ones_like(parameters[0])).any():
        parameters[0].fill_(-1.0)


def _share_modules(source: nn.Module, target: nn.Module, excluded: set[str]) -> None:
    """Make `target` hold the children, parameters and buffers of `source`, except `excluded` children.

    Parts that `target` does not have (such as the stage heads of a PoE base) are skipped. Offloaded parameters are read
    into memory, because the hooks of `source` do not serve `target`.
    """
    children, parameters = dict(target.named_children()), dict(target.named_parameters(recurse=False))
    for name, child in source.named_children():
        if name not in excluded and name in children:
            setattr(target, name, child)
    for name, _ in source.named_parameters(recurse=False):
        if name in parameters:
            setattr(target, name, load_parameter(source, name))
    for name, buffer in source.named_buffers(recurse=False):
        setattr(target, name, buffer)


def _renew_rotary(base_backbone: nn.Module, backbone: nn.Module) -> list[str]:
    """Give `backbone` rotary positions of its own if it has types of layers that the base's lack; return their names.

    They have no parameters, only frequencies that follow from the config.
    """
    renewed = []
    for name, child in backbone.named_children():
        kinds, known = getattr(child, "layer_types", ()), getattr(getattr(base_backbone, name), "layer_types", ())
        if not set(kinds) <= set(known):
            buffer = next(getattr(base_backbone, name).buffers())
            with buffer.device:
                setattr(backbone, name, type(child)(child.config))
            renewed.append(name)
    return renewed


def _install_output_hooks(
    base_backbone: nn.Module, backbone: nn.Module, name: str, layers: Sequence[nn.Module]
) -> None:
    """Install transformers' output-recording hooks once on each shared module.

    Each backbone installs them at its first forward pass that returns hidden states. On shared layers that would record
    every state twice.
    """
    maybe_install_capturing_hooks(base_backbone)  # type: ignore[arg-type]
    new = [layer for layer in layers if not getattr(layer, "_records_outputs", False)]
    backbone.set_submodule(name, nn.ModuleList(new))
    maybe_install_capturing_hooks(backbone)  # type: ignore[arg-type]
    for layer in new:
        layer._records_outputs = True  # type: ignore[assignment]


def _check_cache(depth: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise `StageError` for a cache that a model of another depth has filled: some layers would miss tokens."""
    cache = kwargs.get("past_key_values")
    layers = cache.layers if type(cache) is DynamicCache else []
    if getattr(module, "smear", None) is not None:  # it keeps the embeddings after the layers' keys
        layers = layers[:-1] if len(layers) == depth + 1 else layers
    lengths = [layer.get_seq_length() for layer in layers if isinstance(layer, DynamicLayer)]
    if len(lengths) < len(layers):  # some layers keep no keys
        return
    if any(lengths) and (len(lengths) != depth or len(set(lengths)) > 1):
        raise StageError(
            f"The key-value cache has {sum(map(bool, lengths))} layers with tokens, and this model has {depth}: it was "
            "filled by another model. Use one cache for each stage. Forks that are active on the answer can share one."
        )


def _move_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    device = next(module.parameters()).device

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        return type(value)(move(item) for item in value) if type(value) in (tuple, list) else value

    return move(args), {name: move(value) for name, value in kwargs.items()}
