"""Describe a folder or repository from its configs and headers, and summarize a cascade in memory."""

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from poe.loaders.repository import embedded_folders, locate, read_remote_header
from poe.modeling.access import Access, fetch, read_config, read_json
from poe.modeling.lineage import BaseSource, find_base, is_stage, resolve_lineage
from poe.modeling.placement import is_offloaded, quantization_of
from poe.modeling.stage import Stage


def describe(repo: str, base: str | None = None, access: Access | None = None) -> list[tuple[str, str]]:
    """Return (label, value) pairs for a base, or for a stage and everything it stands on. Reads no weights.

    Raises `SourceError` if it cannot be reached, `LineageError` or `DeltaError` if it is broken.
    """
    access = access or Access()
    location = locate(repo)
    config, _ = read_config(location, access)
    if not is_stage(config):
        source, config = find_base(location, access)
        return [("base", location), *_describe_network(config), ("fingerprint", _describe_fingerprint(source))]
    lineage = resolve_lineage(
        location, access, base=None if base is None else locate(base), embedded=embedded_folders()
    )
    top = lineage.stages[-1]
    rows = [("stage", f"{top.name} ({location})")]
    for files in reversed(lineage.stages):
        config, (header, size) = files.config["stage"], read_remote_header(files)
        head = f"rank {config['head_rank']}" if config["head"] == "low_rank" else config["head"]
        label = "  is" if files is top else "  stands on"
        rows.append(
            (
                label,
                f"{files.name}: {_describe_layers(config)}, head {head}, "
                f"{header.num_parameters:,} parameters, {size:,} bytes, fingerprint {header.self_fingerprint[:12]}",
            )
        )
    expected = top.config["base"]["fingerprint"][:12]
    rows.append(("  on base", f"{lineage.base.repo} (revision {lineage.base.revision or 'none'})"))
    rows.append(("  fingerprint", f"named {expected}, found {_describe_fingerprint(lineage.base)}"))
    rows += _describe_network(lineage.base_config)
    prompt = top.config.get("prompt") or {}
    rows.append(
        ("prompt", f"{prompt.get('name')} {prompt.get('version')}, stops at {' '.join(prompt.get('stop', []))}")
    )
    rows += _describe_training(fetch(top.repo, "training.json", access, top.revision))
    return rows


def _describe_layers(config: Mapping[str, Any]) -> str:
    if config.get("layers") != "fork":
        return f"{config['num_layers']} layers above {config['attach_at']}"
    rank = "full rank" if config["rank"] is None else f"rank {config['rank']}"
    return f"fork of {config['num_layers']} layers above {config['attach_at']}, {rank}, active on {config['active']}"


def summarize(base: PreTrainedModel, stages: Mapping[str, Stage], active: str | None) -> str:
    """Return a table of frozen and trainable parameters and bytes: one line for the base and one per stage.

    `*` marks the active stage. The base's line shows if the base is quantized or partly offloaded. Bytes are those of
    the weights in their current form, with the scales of quantized weights, on any device.
    """
    rows = [("", "stands on", "layers", "head", "frozen", "trainable", "size")]
    method = quantization_of(base)
    notes = [f"quantized ({method})"] if method else []
    notes += ["partly offloaded"] if is_offloaded(base) else []
    label = ", ".join([f"base {base.config.model_type}", *notes])
    rows.append((label, "", str(base.config.num_hidden_layers), "", *_format_counts(base)))
    for name, stage in stages.items():
        label = f"{name} *" if name == active else name
        head = f"rank {stage.config.head_rank}" if stage.config.head == "low_rank" else stage.config.head
        below = stage.config.parent or f"base[:{stage.below}]"
        rows.append((label, below, f"+{len(stage.layers)}", head, *_format_counts(stage)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def count_trainable(model: PreTrainedModel) -> str:
    """Return how many parameters of a model are trained, in the words of PEFT's `print_trainable_parameters`."""
    frozen, trainable, _ = _count_weights(model)
    total = frozen + trainable
    return f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"


def _describe_network(config: dict[str, Any]) -> list[tuple[str, str]]:
    kind, layers, width, vocabulary = (
        config.get(name) for name in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")
    )
    return [("network", f"{kind}, {layers} layers of width {width}, vocabulary {vocabulary}")]


def _describe_fingerprint(base: BaseSource) -> str:
    """Return a folder's fingerprint. A repository's fingerprint would need its weights, so it is not computed."""
    if base.repo is None or os.path.isdir(base.repo):
        return base.fingerprint[:12]
    return "unknown without the weights: `poe verify` fetches them"


def _describe_training(path: str | None) -> list[tuple[str, str]]:
    if path is None:
        return []
    try:
        record = read_json(path)
        rows = [
            ("trained", f"{record['steps']} steps, {record['tokens']:,} tokens, data {record['data']['spec']}"),
            ("val bpb", f"{record['val_bpb']:.4f} (step {record['best_step']})"),
        ]
        for split, models in record.get("evaluation", {}).items():
            shares = {k: v for k, v in models["stage"].items() if v is not None and k != "rows"}
            rows.append((split, ", ".join(f"{k} {v:.3f}" for k, v in shares.items())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [("trained", "training.json is not a record of a run of poe-train")]
    return rows


def _format_counts(module: nn.Module) -> tuple[str, str, str]:
    frozen, trainable, size = _count_weights(module)
    return f"{frozen:,}", f"{trainable:,}", _format_bytes(size)


def _count_weights(module: nn.Module) -> tuple[int, int, int]:
    """Return the numbers of frozen and trainable parameters, and the size of both in bytes."""
    frozen = trainable = size = 0
    for parameter in module.parameters():
        # Two views of one storage count once.
        size += sum({t.data_ptr() or id(t): t.numel() * t.element_size() for t in _plain_parts(parameter)}.values())
        # bitsandbytes packs two 4-bit weights into a byte; its quant_state has the real shape.
        numbers = math.prod(getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape))
        if parameter.requires_grad:
            trainable += numbers
        else:
            frozen += numbers
    return frozen, trainable, size


def _plain_parts(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the plain tensors that hold a weight: the weight itself, or its packed values and their scales."""
    if hasattr(parameter, "__tensor_flatten__"):
        for name in parameter.__tensor_flatten__()[0]:
            yield from _plain_parts(getattr(parameter, name))
        return
    yield parameter
    state = vars(getattr(parameter, "quant_state", None) or parameter)
    yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _format_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
