"""A cascade as a small table."""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from poe.cascade import Cascade


def table(cascade: "Cascade") -> str:
    """Return what is frozen and what trains, in parameters and bytes, one line for the base and one per stage."""
    rows = [("", "stands on", "layers", "head", "frozen", "trainable", "size")]
    layers = str(cascade.config.num_hidden_layers)
    rows.append((f"base {cascade.config.model_type}", "", layers, "", *_sizes(cascade.base)))
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
        size += parameter.numel() * parameter.element_size()
        if parameter.requires_grad:
            trainable += parameter.numel()
        else:
            frozen += parameter.numel()
    return f"{frozen:,}", f"{trainable:,}", _bytes(size)


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
