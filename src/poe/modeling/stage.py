"""One stage in memory: its layers, its head delta, and the hooks for training it on a frozen base."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from .answering import limit_to_answer
from .delta_file import storage_error
from .exits import head_below, no_exit_reason
from .failures import DeltaError, FamilyError, StageError
from .fork import Activity, ForkedLinear, fork_layers
from .growth import build_layers, build_shell
from .heads import FoldedHead, automatic_rank, build_head
from .layer_pattern import Entries, continue_pattern
from .recognition import recognize_family
from .stage_config import StageConfig
from .tensor_file import Entry


class Stage(nn.Module):
    """The weights of one specialist: `layers` (decoder layers of the base's class) and `head` (its head delta).

    The state dict has the names of the delta format: `layers.{i}.<name>`, and `head.weight` or `head.a`, `head.b`.
    `parent` is the stage below it, `below` the number of layers under it. `source` is the location of its files
    (`repo`, `revision`, `fingerprint`), None until it is saved or loaded; `saved_name` and `saved_dtype` are name and
    dtype in those files.
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
        self.activity = Activity()
        self._parent = (parent,)  # in a tuple, so that the parent's weights are not counted as this stage's
        self.source: dict[str, str | None] | None = None
        self.saved_name: str | None = None
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
    def reads_prompt(self) -> bool:
        """Whether the stage and all below it act on the prompt, not on the answer alone."""
        return all(link.config.active == "all" for link in self.chain)

    @property
    def depth(self) -> int:
        """How many layers the model has that ends in this stage."""
        return self.below + len(self.layers)

    @property
    def foot(self) -> int:
        """How many of the base's own layers that model has; all of its other layers are stages'."""
        return self.below if self.parent is None else min(self.below, self.parent.foot)

    @property
    def head_depth(self) -> int:
        """After how many of the base's layers the base's head reads a state like that at the top of the model."""
        if self.parent is not None:
            return self.parent.head_depth
        return self.depth if self.config.layers == "fork" else self.below

    @property
    def stack(self) -> "list[nn.Module]":
        """The layers of that model above the base's own, the stage's own last."""
        under = [] if self.parent is None else self.parent.stack[: self.below - self.foot]
        return [*under, *self.layers]

    @property
    def pattern(self) -> list[Entries]:
        """The entries of its new layers in the config's lists with one entry per layer; empty for a fork."""
        return [] if self.config.layers == "fork" else [layer.config_entries for layer in self.layers]  # type: ignore[misc]

    @property
    def chain(self) -> "list[Stage]":
        """The stages from the base upwards, this one last."""
        return [*(self.parent.chain if self.parent is not None else []), self]

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the names and parameters that the stage adds; the parts of a fork that belong to the base are not."""
        if self.config.layers != "fork":
            yield from super().named_parameters(prefix, recurse, remove_duplicate)
            return
        start = f"{prefix}." if prefix else ""
        for path, module in self.layers.named_modules():
            if isinstance(module, ForkedLinear) and module.activity is self.activity:
                for name, parameter in module.changes().items():
                    yield f"{start}layers.{path}.{name}", parameter
        yield from self.head.named_parameters(f"{start}head", recurse, remove_duplicate)

    def num_parameters(self) -> int:
        """Return the number of parameters of the stage."""
        return sum(parameter.numel() for parameter in self.parameters())

    def delta_state_dict(self) -> dict[str, torch.Tensor]:
        """Return the stage's tensors by their names in the delta format (views, not copies)."""
        if self.config.layers == "fork":
            return {name: parameter.detach() for name, parameter in self.named_parameters()}
        return dict(self.state_dict())

    def storage_error(self, dtype: torch.dtype) -> float:
        """Return the relative error (in Frobenius norms) of saving the stage in `dtype`, such as `torch.int8`."""
        return storage_error(self.delta_state_dict(), dtype)

    @torch.no_grad()
    def load_delta(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy `tensors` into the stage. Raises `DeltaError`, before any copy, if names or shapes do not match."""
        self.check_fits(tensors)
        for name, tensor in self.delta_state_dict().items():
            tensor.copy_(tensors[name])

    def check_fits(self, tensors: Mapping[str, torch.Tensor | Entry]) -> None:
        """Raise `DeltaError` unless `tensors`, or those of a file's header, have the stage's names and shapes."""
        expected = {name: tuple(tensor.shape) for name, tensor in self.delta_state_dict().items()}
        check_names_and_shapes(self.name, expected, tensors)


def check_names_and_shapes(
    stage: str, expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, torch.Tensor | Entry]
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
    pattern: Sequence[Entries] | None = None,
) -> Stage:
    """Return a new stage on a base (and a parent). It does not change the output of what lies below it.

    `pattern` has the entries of its new layers (default: they continue the base's). Its values depend only on `seed`.
    They are in `dtype` (default: the base's), on the devices of the base's last layer and head. Raises `FamilyError`
    for a base that cannot be grown, `StageError` for a config that does not fit.
    """
    family = recognize_family(base)
    below_it = [] if parent is None else parent.chain
    if config.name in {name for link in below_it for name in (link.name, link.saved_name)}:
        raise StageError(
            f"Stage {config.name!r} would stand on a stage of that name: choose another one, because the stages of a "
            "chain are loaded together."
        )
    depth = base.config.num_hidden_layers if parent is None else parent.depth
    below = config.layers_below(depth)
    forks, activity = config.layers == "fork", Activity()
    if family.recurrent and below < depth:
        raise StageError(
            f"Stage {config.name!r}: attach_at is {below}, but a base of model type {family.model_type!r} is "
            "recurrent, and a stage stands above all its cycles: expected attach_at None."
        )
    if forks and getattr(base.config, "combiner", "last") != "last":
        raise FamilyError("A fork has one prediction, at its top, and this base's is a vote of all its stages.")
    if not forks and parent is None and (reason := no_exit_reason(base, below)):
        raise StageError(f"Stage {config.name!r}: attach_at is {below}, but {reason}.")
    head_depth = (depth if forks else below) if parent is None else parent.head_depth
    # Refuses a head that cannot carry a delta, before anything is built.
    folded = FoldedHead(head_below(base, head_depth), [])
    if forks:
        config = dataclasses.replace(config, num_layers=depth - below)
        foot, stack = (depth, []) if parent is None else (parent.foot, parent.stack)
        path = [*family.layers_of(base)[:foot], *stack]
        indices = [*range(foot), *(getattr(layer, "base_index", None) for layer in stack)]
        own: dict[str, Any] = {"seed": seed, "dtype": dtype or base.dtype, "unforked": family.unforked}
        layers = fork_layers(path[below:], indices[below:], config.rank, activity, **own)
    else:
        pattern = continue_pattern(base, below, config.num_layers) if pattern is None else pattern
        layers = build_layers(base, below, pattern, seed=seed, dtype=dtype)
    if config.head == "low_rank" and config.head_rank == "auto":
        rank = automatic_rank(folded.out_features, folded.in_features, sum(p.numel() for p in layers.parameters()))
        config = dataclasses.replace(config, head_rank=rank)
    generator = torch.Generator().manual_seed(seed)
    head = build_head(config, folded.out_features, folded.in_features, generator)
    head.to(device=folded.weight.device, dtype=dtype or base.dtype)
    stage = Stage(config, layers, head, below, parent)
    stage.activity = activity
    return stage


def assemble(base: PreTrainedModel, stage: Stage) -> PreTrainedModel:
    """Return the native model that ends in `stage`: the base's layers, those of all parents, the stage's, one head.

    It shares every tensor with the base and the stages.
    """
    head = FoldedHead(head_below(base, stage.head_depth), [link.head for link in stage.chain])
    model = build_shell(base, stage.stack, head, below=stage.foot)
    activities = [link.activity for link in stage.chain if link.config.active == "answer"]
    if activities:
        limit_to_answer(model, activities)
    if stage.generation_config is not None:
        model.generation_config = copy.deepcopy(stage.generation_config)
    return model


def detach_stage_input(stage: Stage, dtype: torch.dtype) -> None:
    """Detach the input of a stage, so gradients end there, and let its dtype differ from the base's `dtype`.

    Hooks on the first and last layer cast the hidden states (batch, tokens, width) to the stage's dtype and back. A
    fork computes in the base's dtype: its changes are cast, because they are added to the base's weights.
    """
    if stage.config.layers == "fork":
        stage.layers[0].register_forward_pre_hook(partial(_detach_input, dtype))
        return
    stage.layers[0].register_forward_pre_hook(partial(_detach_input, None))
    if next(stage.layers.parameters()).dtype != dtype:
        stage.layers[-1].register_forward_hook(partial(_cast_output, dtype))


def set_gradient_input(model: PreTrainedModel, stage: Stage) -> None:
    """Make `enable_input_require_grads` of a grown model apply to the stage's input instead of the embedding.

    Gradient checkpointing and PEFT call it. On the embedding, autograd would keep the graph of the whole frozen base.
    """
    model.enable_input_require_grads = partial(_set_input_gradients, stage.layers[0], True)  # type: ignore[method-assign]
    model.disable_input_require_grads = partial(_set_input_gradients, stage.layers[0], False)  # type: ignore[method-assign]


def _detach_input(dtype: torch.dtype | None, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden = args[0].detach().to(dtype or next(layer.parameters()).dtype)
    if getattr(layer, "_input_gradients", False) and torch.is_grad_enabled():
        hidden.requires_grad_(True)
    return (hidden, *args[1:])


def _cast_output(dtype: torch.dtype, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return output.to(dtype) if isinstance(output, torch.Tensor) else output


def _set_input_gradients(layer: nn.Module, value: bool) -> None:
    layer._input_gradients = value  # type: ignore[assignment]
