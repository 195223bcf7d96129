"""The additive head: a stage's change of the base's output projection, folded with it into one matmul."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .failures import FamilyError, StageError
from .placement import is_plain
from .stage_config import StageConfig


class HeadDelta(nn.Module):
    """The change of the head by one stage."""

    def delta(self) -> torch.Tensor | None:
        """Return the change of the head (vocabulary, width) in fp32, None if there is none."""
        raise NotImplementedError


class DenseHead(HeadDelta):
    """A head delta of full rank: `weight` (vocabulary, width), initially zero."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(vocabulary, width))

    def delta(self) -> torch.Tensor:
        return self.weight.float()


class LowRankHead(HeadDelta):
    """A head delta `b @ a`: `a` (rank, width) initially random, `b` (vocabulary, rank) initially zero."""

    def __init__(self, vocabulary: int, width: int, rank: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if rank > min(vocabulary, width):
            raise StageError(
                f"A low-rank head of rank {rank} is larger than the head itself ({vocabulary} x {width}): "
                "choose a smaller head_rank, or head='dense'."
            )
        self.a = nn.Parameter(torch.randn(rank, width, generator=generator) * width**-0.5)
        self.b = nn.Parameter(torch.zeros(vocabulary, rank))

    def delta(self) -> torch.Tensor:
        return self.b.float() @ self.a.float()


class NoHead(HeadDelta):
    """No change of the head."""

    def delta(self) -> None:
        return


def build_head(config: StageConfig, vocabulary: int, width: int, generator: torch.Generator | None = None) -> HeadDelta:
    """Return a new head delta of kind `config.head`, on the CPU in fp32, with a value of zero."""
    if config.head == "dense":
        return DenseHead(vocabulary, width)
    if config.head == "low_rank":
        assert config.head_rank != "auto"  # build_stage has replaced "auto"
        return LowRankHead(vocabulary, width, config.head_rank, generator)
    return NoHead()


def automatic_rank(vocabulary: int, width: int, layer_parameters: int) -> int:
    """Return the rank for `head_rank="auto"`.

    It is the largest power of two with no more parameters in the head delta, rank x (vocabulary + width), than in the
    stage's layers, but at least 8 and at most the width and the vocabulary.
    """
    rank = layer_parameters // (vocabulary + width)
    power = max(8, 1 << max(0, rank.bit_length() - 1))
    return min(power, 1 << (min(vocabulary, width).bit_length() - 1))


class FoldedHead(nn.Module):
    """The head of a grown model: the base's weight plus each stage's delta, folded into one (vocabulary, width) matrix.

    It has the attributes of the `nn.Linear` that it replaces. The sum runs in fp32 in chain order and is cast to the
    base's dtype, so every way of loading computes the same weight. Gradients reach only `deltas[-1]`, the last stage's
    own. Without gradients the folded weight is cached until one of its parts changes. The state dict is that of a
    linear layer, so `save_pretrained` writes an ordinary checkpoint.
    """

    def __init__(self, base_head: nn.Module, deltas: Sequence[nn.Module]) -> None:
        super().__init__()
        weight = base_head.weight
        if not isinstance(weight, torch.Tensor) or not is_plain(weight) or weight.dim() != 2:
            raise FamilyError(
                "The base's output head must be a plain (vocabulary x width) matrix in floating point, got "
                f"{type(base_head).__name__} with {type(weight).__name__}: exclude it from quantization "
                "(modules_to_not_convert, llm_int8_skip_modules)."
            )
        if weight.device.type == "meta":
            raise FamilyError(
                "The base's output head is offloaded, so a stage's head cannot be folded into it: "
                "choose a device_map that keeps the head in memory, or open the base with Cascade.from_pretrained."
            )
        self.base = base_head
        self.deltas = nn.ModuleList(deltas)
        self.out_features, self.in_features = weight.shape
        self._folded: torch.Tensor | None = None
        self._key: tuple[Any, ...] | None = None

    @property
    def bias(self) -> torch.Tensor | None:
        """The base head's bias, or None."""
        bias: torch.Tensor | None = getattr(self.base, "bias", None)
        return bias

    @property
    def weight(self) -> torch.Tensor:
        """The folded weight (vocabulary, width), in the base's dtype on the base's device."""
        if not any(True for _ in self.deltas.parameters()):
            return self._base_weight()
        last_delta = self.deltas[-1]
        if torch.is_grad_enabled() and any(p.requires_grad for p in last_delta.parameters()):
            self._folded = None
            return self._fold()
        # Fused optimizers do not raise a tensor's version, so nothing is cached while there are gradients.
        if torch.compiler.is_compiling() or any(p.grad is not None for p in last_delta.parameters()):
            return self._fold().detach()
        key = tuple(_state(tensor) for tensor in self._parts())
        if self._folded is None or key != self._key:
            # Not an inference tensor: autograd may have to save it in a later training step.
            with torch.inference_mode(False), torch.no_grad():
                self._folded, self._key = self._fold(), key
        return self._folded

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden states (..., width) to logits (..., vocabulary)."""
        weight = self.weight
        if weight.is_meta:
            raise FamilyError(
                "The head of this model was offloaded after the stage was added (accelerate's cpu_offload or "
                "disk_offload), and a stage's head is computed from it. Open the base with "
                "Cascade.from_pretrained(..., device_map=...), which offloads the base and keeps its head in memory."
            )
        if hidden.device != weight.device:
            hidden = hidden.to(weight.device)
        if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
            hidden = hidden.to(weight.dtype)
        return nn.functional.linear(hidden, weight, self.bias)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return the state dict of a linear layer (also in `destination`): `weight`, and `bias` if there is one."""
        destination = {} if destination is None else destination
        for name in ("weight", "bias"):
            tensor: torch.Tensor | None = getattr(self, name)
            if tensor is not None:
                # Without deltas the weight may be a tied embedding, which would not be saved: copy it.
                tensor = tensor.clone() if tensor is self.base.weight else tensor
                destination[prefix + name] = tensor if keep_vars else tensor.detach()
        return destination

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, deltas={len(self.deltas)}"

    def _base_weight(self) -> torch.Tensor:
        weight = self.base.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def _parts(self) -> Iterator[torch.Tensor]:
        yield self._base_weight()
        yield from self.deltas.parameters()

    def _fold(self) -> torch.Tensor:
        base = self._base_weight().detach()
        weight = base.float()
        for module in self.deltas:
            assert isinstance(module, HeadDelta)
            change = module.delta()
            if change is not None:
                change = change if module is self.deltas[-1] else change.detach()
                weight = weight + change.to(weight.device)
        return weight.to(base.dtype)


def _state(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return a key that changes when a tensor is written to, moved or cast."""
    version = -1 if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), version, tensor.device, tensor.dtype
