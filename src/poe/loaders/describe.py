"""What a folder or repository is, from its configs and headers alone: no weight is read."""

import json
import os
from pathlib import Path
from typing import Any

from poe.loaders.places import embedded_folders, place
from poe.loaders.remote import delta_header
from poe.modeling.access import Access, fetch, read_config
from poe.modeling.lineage import BaseSource, base_source, is_stage, resolve


def describe(repo: str, base: str | None = None, access: Access | None = None) -> list[tuple[str, str]]:
    """Return (label, value) pairs for a base, or for a stage and everything it stands on.

    Raises `SourceError` if it cannot be reached, `LineageError` or `DeltaError` if it is broken.
    """
    access = access or Access()
    where = place(repo)
    config, _ = read_config(where, access)
    if not is_stage(config):
        source, config = base_source(where, access)
        return [("base", where), *_shape(config), ("fingerprint", _fingerprint(source))]
    lineage = resolve(where, access, base=None if base is None else place(base), embedded=embedded_folders())
    own = lineage.links[-1]
    rows = [("stage", f"{own.name} ({where})")]
    for link in reversed(lineage.links):
        stage, (header, size) = link.config["stage"], delta_header(link)
        head = f"rank {stage['head_rank']}" if stage["head"] == "low_rank" else stage["head"]
        label = "  is" if link is own else "  stands on"
        rows.append(
            (
                label,
                f"{link.name}: {stage['num_layers']} layers above {stage['attach_at']}, head {head}, "
                f"{header.num_parameters:,} parameters, {size:,} bytes, fingerprint {header.self_fingerprint[:12]}",
            )
        )
    named = own.config["base"]["fingerprint"][:12]
    rows.append(("  on base", f"{lineage.base.repo} (revision {lineage.base.revision or 'none'})"))
    rows.append(("  fingerprint", f"named {named}, found {_fingerprint(lineage.base)}"))
    rows += _shape(lineage.base_config)
    prompt = own.config.get("prompt") or {}
    rows.append(
        ("prompt", f"{prompt.get('name')} {prompt.get('version')}, stops at {' '.join(prompt.get('stop', []))}")
    )
    rows += _training(fetch(own.repo, "training.json", access, own.revision))
    return rows


def _shape(config: dict[str, Any]) -> list[tuple[str, str]]:
    kind, layers, width, vocabulary = (
        config.get(name) for name in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")
    )
    return [("network", f"{kind}, {layers} layers of width {width}, vocabulary {vocabulary}")]


def _fingerprint(base: BaseSource) -> str:
    """Return a folder's fingerprint; a repository's weights would have to be fetched for it."""
    if base.repo is None or os.path.isdir(base.repo):
        return base.fingerprint[:12]
    return "out of reach without the weights: `poe verify` fetches them"


def _training(path: str | None) -> list[tuple[str, str]]:
    if path is None:
        return []
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = [
            ("trained", f"{record['steps']} steps, {record['tokens']:,} tokens, data {record['data']['spec']}"),
            ("val bpb", f"{record['val_bpb']:.4f} (step {record['best_step']})"),
        ]
        for split, models in record.get("evaluation", {}).items():
            shares = {k: v for k, v in models["stage"].items() if v is not None and k != "rows"}
            rows.append((split, ", ".join(f"{k} {v:.3f}" for k, v in shares.items())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [("trained", "training.json is not the record of a run of poe-train")]
    return rows
