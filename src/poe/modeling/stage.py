"""One stage in memory: its layers, its head delta, and the hooks for training it on a frozen base."""

import copy
import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from .delta_file import storage_error
from .exits import head_below, no_exit_reason
from .failures import DeltaError, StageError
from .growth import build_layers, build_shell
from .heads import FoldedHead, automatic_rank, build_head
from .recognition import recognize_family
from .stage_config import StageConfig


class Stage(nn.Module):
    """The weights of one specialist: `layers` (decoder layers of the base's class) and `head` (its head delta).

    The state dict has the names of the delta format: `layers.{i}.<name>`, and `head.weight` or `head.a`, `head.b`.
    `parent` is the stage below it, `below` the number of layers under it. `source` is the location of its files
    (`repo`, `revision`, `fingerprint`), None until it is saved or loaded; `saved_dtype` is the dtype of those files.
    """

    layers: nn.ModuleList
    head: nn.Module

    def __init__(
        self, config: StageConfig, layers: nn.ModuleList, head: nn.Module, below: int, parent: "Stage | None"
    ) -> None:
        super().__init__()
        self.config = config
        self.layers = layers
        self.head = head
        self.below = below
        self._parent = (parent,)  # in a tuple, so that the parent's weights are not counted as this stage's
        self.source: dict[str, str | None] | None = None
        self.saved_dtype: torch.dtype | None = None
        self.prompt: dict[str, Any] | None = None
        self.generation_config: GenerationConfig | None = None

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.config.name

    @property
    def parent(self) -> "Stage | None":
        """The stage below this one, None for the base."""
        return self._parent[0]

    @property
    def chain(self) -> "list[Stage]":
        """The stages from the base upwards, this one last."""
        return [*(self.parent.chain if self.parent is not None else []), self]

    def num_parameters(self) -> int:
        """Return the number of parameters of the stage."""
        return sum(parameter.numel() for parameter in self.parameters())

    def delta_state_dict(self) -> dict[str, torch.Tensor]:
        """Return the stage's tensors by their names in the delta format (views, not copies)."""
        return dict(self.state_dict())

    def storage_error(self, dtype: torch.dtype) -> float:
        """Return the relative error (in Frobenius norms) of saving the stage in `dtype`, such as `torch.int8`."""
        return storage_error(self.delta_state_dict(), dtype)

    @torch.no_grad()
    def load_delta(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy `tensors` into the stage. Raises `DeltaError`, before any copy, if names or shapes do not match."""
        stage_tensors = self.delta_state_dict()
        check_names_and_shapes(self.name, {n: tuple(t.shape) for n, t in stage_tensors.items()}, tensors)
        for name, tensor in stage_tensors.items():
            tensor.copy_(tensors[name])


def check_names_and_shapes(
    stage: str, expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Raise `DeltaError` unless `tensors` has the expected names and shapes."""
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise DeltaError(
            f"The delta of stage {stage!r} does not fit its config: missing {missing[:4] or 'nothing'}, "
            f"unexpected {extra[:4] or 'nothing'} ({len(missing)} and {len(extra)} in all). "
            "Is delta.safetensors from another stage than config.json?"
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise DeltaError(
                f"The delta of stage {stage!r} does not fit its base: {name} should be {shape}, "
                f"got {tuple(tensors[name].shape)}."
            )


def build_stage(
    base: PreTrainedModel,
    config: StageConfig,
    parent: Stage | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> Stage:
    """Return a new stage on a base (and a parent). It does not change the output of what lies below it.

    Its values depend only on `seed`. They are in `dtype` (default: the base's), on the devices of the base's last
    layer and head. Raises `FamilyError` for a base that cannot be grown, `StageError` for a config that does not fit.
    """
    family = recognize_family(base)
    depth = base.config.num_hidden_layers if parent is None else parent.below + len(parent.layers)
    below = config.layers_below(depth)
    if family.recurrent and below < depth:
        raise StageError(
            f"Stage {config.name!r}: attach_at is {below}, but a base of model type {family.model_type!r} is "
            "recurrent, and a stage stands above all its cycles: expected attach_at None."
        )
    if parent is None and (reason := no_exit_reason(base, below)):
        raise StageError(f"Stage {config.name!r}: attach_at is {below}, but {reason}.")
    attached = below if parent is None else parent.chain[0].below
    # Building the head first raises for a base head without a plain weight.
    folded = FoldedHead(head_below(base, attached), [])
    layers = build_layers(base, config.num_layers, below, seed=seed, dtype=dtype)
    if config.head == "low_rank" and config.head_rank == "auto":
        rank = automatic_rank(folded.out_features, folded.in_features, sum(p.numel() for p in layers.parameters()))
        config = dataclasses.replace(config, head_rank=rank)
    generator = torch.Generator().manual_seed(seed)
    head = build_head(config, folded.out_features, folded.in_features, generator)
    head.to(device=folded.weight.device, dtype=dtype or base.dtype)
    return Stage(config, layers, head, below, parent)


def assemble(base: PreTrainedModel, stage: Stage) -> PreTrainedModel:
    """Return the native model that ends in `stage`: the base's layers, those of all parents, the stage's, one head.

    It shares every tensor with the base and the stages.
    """
    chain = stage.chain
    layers = [layer for link in chain for layer in link.layers]
    head = FoldedHead(head_below(base, chain[0].below), [link.head for link in chain])
    model = build_shell(base, layers, head, below=chain[0].below)
    if stage.generation_config is not None:
        model.generation_config = copy.deepcopy(stage.generation_config)
    return model


def detach_stage_input(stage: Stage, dtype: torch.dtype) -> None:
    """Detach the input of a stage, so gradients end there, and let its dtype differ from the base's `dtype`.

    Hooks on the first and last layer cast the hidden states (batch, tokens, width) to the stage's dtype and back.
    """
    stage.layers[0].register_forward_pre_hook(_detach_input)
    if next(stage.layers.parameters()).dtype != dtype:
        stage.layers[-1].register_forward_hook(partial(_cast_output, dtype))


def set_gradient_input(model: PreTrainedModel, stage: Stage) -> None:
    """Make `enable_input_require_grads` of a grown model apply to the stage's input instead of the embedding.

    Gradient checkpointing and PEFT call it. On the embedding, autograd would keep the graph of the whole frozen base.
    """
    model.enable_input_require_grads = partial(_set_input_gradients, stage.layers[0], True)  # type: ignore[method-assign]
    model.disable_input_require_grads = partial(_set_input_gradients, stage.layers[0], False)  # type: ignore[method-assign]


def _detach_input(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden = args[0].detach().to(next(layer.parameters()).dtype)
    if getattr(layer, "_input_gradients", False) and torch.is_grad_enabled():
        hidden.requires_grad_(True)
    return (hidden, *args[1:])


def _cast_output(dtype: torch.dtype, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return output.to(dtype) if isinstance(output, torch.Tensor) else output


def _set_input_gradients(layer: nn.Module, value: bool) -> None:
    layer._input_gradients = value  # type: ignore[assignment]
