"""Forked layers: a stage's own version of the base's layers, `W + dW`, that shares every tensor of the base.

A fork is a copy of a decoder layer's structure, not of its weights. Each linear layer in it becomes a `ForkedLinear`,
which holds the base's layer and a trained change; every other module (norms, rotary positions, activations) is the
base's own object. A new fork computes exactly what the base's layer computes.
"""

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .failures import FamilyError
from .placement import is_plain

_PACKED = (torch.uint8, torch.int8, torch.int16, torch.int32)  # of buffers that hold quantized weights


class Activity:
    """On which tokens of a forward pass a stage's changes act: all of them, a mask, or all but the first ones.

    `tokens` is None (all), a bool tensor (B, T), or how many leading tokens of the pass the layers below read alone.
    """

    def __init__(self) -> None:
        self.tokens: torch.Tensor | int | None = None


class ForkedLinear(nn.Module):
    """A linear layer of the base with a trained change of its weight W (out, in).

    With a rank the change is `b @ a`: `a` (rank, in) random, `b` (out, rank) zero at first (LoRA, arXiv 2106.09685,
    with alpha = rank). Without one it is `delta` (out, in), zero at first. W itself is never written to.
    """

    a: nn.Parameter
    b: nn.Parameter
    delta: nn.Parameter

    def __init__(
        self,
        base: "nn.Linear | ForkedLinear",
        rank: int | None,
        generator: torch.Generator,
        dtype: torch.dtype,
        activity: Activity,
    ) -> None:
        super().__init__()
        self.activity = activity
        self.base = base
        self.in_features: int = base.in_features
        self.out_features: int = base.out_features
        if rank is None:
            if not _has_plain_weight(base):
                raise FamilyError(
                    f"A fork without a rank adds to plain weights, and those of the base's {type(base).__name__} are "
                    "quantized: give a rank, or open the base without quantization."
                )
            self.delta = nn.Parameter(torch.zeros(base.out_features, base.in_features, dtype=dtype))
            return
        if rank > min(self.in_features, self.out_features):
            raise FamilyError(
                f"A fork of rank {rank} is larger than a weight of {self.out_features} x {self.in_features}: choose a "
                "smaller rank, or None for a full change."
            )
        start = torch.empty(rank, self.in_features)
        nn.init.kaiming_uniform_(start, a=5**0.5, generator=generator)
        self.a = nn.Parameter(start.to(dtype))
        self.b = nn.Parameter(torch.zeros(self.out_features, rank, dtype=dtype))

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's bias (out,), or None."""
        return self.base.bias

    @property
    def is_full(self) -> bool:
        """Whether the change has full rank."""
        return hasattr(self, "delta")

    @property
    def weight(self) -> torch.Tensor:
        """The changed weight (out, in), in the base's dtype; the sum runs in fp32 at least."""
        if not _has_plain_weight(self.base):
            raise FamilyError(
                f"A fork is merged into plain weights, and those of the base's {type(self.base).__name__} are "
                "quantized: open the base without quantization."
            )
        change = self.change()
        return (self.base.weight.detach().to(change.dtype) + change).to(self.base.weight.dtype)

    def change(self) -> torch.Tensor:
        """Return the change of the weight (out, in), in fp32 at least."""
        wide = torch.promote_types(self.base.weight.dtype, torch.float32)
        return self.delta.to(wide) if self.is_full else self.b.to(wide) @ self.a.to(wide)

    def changes(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by name: `delta`, or `a` and `b`."""
        return dict(self._parameters)  # type: ignore[arg-type]

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return (or fill into `destination`) what a plain linear layer would: the changed weight, and the bias."""
        destination = {} if destination is None else destination
        for name in ("weight", "bias"):
            tensor: torch.Tensor | None = getattr(self, name)
            if tensor is not None:
                destination[prefix + name] = tensor if keep_vars else tensor.detach()
        return destination

    def extra_repr(self) -> str:
        rank = "full" if self.is_full else len(self.a)
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={rank}"

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (B, T, in) to (B, T, out); where the stage is not active, the layer below decides alone."""
        tokens = self.activity.tokens
        if tokens is None or (isinstance(tokens, int) and tokens == 0):
            return self._change(hidden_states, None if self.is_full else self.base(hidden_states))
        if hidden_states.dim() != 3:
            raise FamilyError(
                "A stage that is active on the answer needs linear layers that see (batch, tokens, width), got "
                f"{tuple(hidden_states.shape)}: use active='all' on this base."
            )
        outputs: torch.Tensor = self.base(hidden_states)
        if isinstance(tokens, torch.Tensor):
            return torch.where(tokens.unsqueeze(-1), self._change(hidden_states, outputs), outputs)
        if tokens >= hidden_states.shape[1]:
            return outputs
        if self.is_full:  # as one product: a product of fewer rows may round differently
            changed = self._change(hidden_states, outputs)[:, tokens:]
        else:
            changed = self._change(hidden_states[:, tokens:], outputs[:, tokens:])
        return torch.cat([outputs[:, :tokens], changed], dim=1)

    def _change(self, hidden_states: torch.Tensor, outputs: torch.Tensor | None) -> torch.Tensor:
        """Return the changed layer's outputs; `outputs` are those of the layer below, needed for low rank."""
        if outputs is None or self.is_full:
            return functional.linear(hidden_states, self.weight.to(hidden_states.dtype), self.bias)
        low = functional.linear(functional.linear(hidden_states.to(self.a.dtype), self.a), self.b)
        return outputs + low.to(outputs.dtype)


def fork_layers(
    layers: Sequence[nn.Module],
    base_indices: Sequence[int | None],
    rank: int | None,
    activity: Activity,
    *,
    seed: int,
    dtype: torch.dtype,
    unforked: Collection[str] = (),
) -> nn.ModuleList:
    """Return decoder layers like `layers` with every linear layer forked and everything else shared.

    Linear layers at the paths `unforked` are shared too.
    `base_indices` are the indices of the base's layers that they are or go back to, None for a stage's new layer; each
    fork has its own as `base_index`. Random values depend on `seed` alone.
    Raises `FamilyError` for a layer without linear layers, and for one with other matrices, which a fork would silently
    leave as they are: packed or fused weights, experts, convolutions.
    """
    options = (rank, torch.Generator().manual_seed(seed), dtype, activity)
    forks = nn.ModuleList()
    for layer, base_index in zip(layers, base_indices, strict=True):
        forked: Any = _fork(layer, "", unforked, options)
        if forked is layer:
            raise FamilyError(f"A {type(layer).__name__} has no linear layer that a fork could change.")
        forked.base_index = base_index
        forks.append(forked)
    return forks


def _has_plain_weight(module: "nn.Linear | ForkedLinear") -> bool:
    """Return whether the layer of the base below has a weight in plain numbers."""
    while isinstance(module, ForkedLinear):
        module = module.base
    weight: Any = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and is_plain(weight)


def _fork(module: nn.Module, path: str, unforked: Collection[str], options: tuple[Any, ...]) -> nn.Module:
    """Return `module` itself if it holds no linear layer to fork, else a copy whose linear layers are forked."""
    if path in unforked or isinstance(module, nn.Embedding):
        return module
    if isinstance(module, (nn.Linear, ForkedLinear)):
        return ForkedLinear(module, *options)
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if tensor.dim() > 1 and (isinstance(tensor, nn.Parameter) or tensor.dtype in _PACKED):
            raise FamilyError(
                f"A fork changes linear layers (nn.Linear), and {path or 'the layer'} is a {type(module).__name__} "
                f"with a {name} of shape {tuple(tensor.shape)}, which it cannot change: use new layers "
                "(layers='new'), or a base with plain linear layers."
            )
    children = {
        name: _fork(child, f"{path}.{name}".removeprefix("."), unforked, options)
        for name, child in module.named_children()
    }
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    if hasattr(module, "_hf_hook"):
        raise FamilyError(
            "A fork stands on a base in the memory of one device, and this one is offloaded or spread over several: "
            "open it without a device_map."
        )
    copied: Any = module.__new__(type(module))
    copied.__dict__ = dict(vars(module))
    for name, value in vars(module).items():
        if isinstance(value, dict) and name.startswith("_"):  # children, parameters, buffers, hooks
            copied.__dict__[name] = type(value)() if name.endswith("hooks") else copy.copy(value)
    copied.__dict__.pop("_records_outputs", None)
    copied._modules.update(children)
    return copied
