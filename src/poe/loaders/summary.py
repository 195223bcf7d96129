"""A cascade as a small table."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from poe.modeling.placement import is_offloaded, quantization_of

if TYPE_CHECKING:
    from poe.cascade import Cascade


def table(cascade: "Cascade") -> str:
    """Return what is frozen and what trains, in parameters and bytes, one line for the base and one per stage.

    The base's line says whether it is quantized or offloaded. Bytes are those of the weights as they are held, with the
    scales of quantized ones, wherever they are.
    """
    rows = [("", "stands on", "layers", "head", "frozen", "trainable", "size")]
    layers = str(cascade.config.num_hidden_layers)
    quantized = quantization_of(cascade.base)
    facts = [f"quantized ({quantized})"] if quantized else []
    facts += ["partly offloaded"] if is_offloaded(cascade.base) else []
    name = ", ".join([f"base {cascade.config.model_type}", *facts])
    rows.append((name, "", layers, "", *_sizes(cascade.base)))
    for name, stage in cascade.stages.items():
        mark = f"{name} *" if name == cascade.active else name
        head = f"rank {stage.config.head_rank}" if stage.config.head == "low_rank" else stage.config.head
        below = stage.config.parent or f"base[:{stage.below}]"
        rows.append((mark, below, f"+{len(stage.layers)}", head, *_sizes(stage)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _sizes(module: nn.Module) -> tuple[str, str, str]:
    frozen = trainable = size = 0
    for parameter in module.parameters():
        size += sum({t.data_ptr() or id(t): t.numel() * t.element_size() for t in _held(parameter)}.values())
        # 4 bit weights of bitsandbytes lie two to a byte; their state knows the shape.
        numbers = math.prod(getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape))
        if parameter.requires_grad:
            trainable += numbers
        else:
            frozen += numbers
    return f"{frozen:,}", f"{trainable:,}", _bytes(size)


def _held(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """Return the plain tensors in which a weight is held: itself, or its packed numbers and their scales."""
    if hasattr(parameter, "__tensor_flatten__"):
        for name in parameter.__tensor_flatten__()[0]:
            yield from _held(getattr(parameter, name))
        return
    yield parameter
    state = vars(getattr(parameter, "quant_state", None) or parameter)
    yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
