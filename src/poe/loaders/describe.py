"""What a folder or repository is, from its configs and headers alone: no weight is read."""

import json
from pathlib import Path
from typing import Any

from poe.loaders.places import embedded_folders, place
from poe.modeling.lineage import Access, base_source, is_stage, read_config, resolve


def describe(repo: str, base: str | None = None, access: Access | None = None) -> list[tuple[str, str]]:
    """Return (label, value) pairs for a base, or for a stage and everything it stands on.

    Raises `SourceError` if it cannot be reached, `LineageError` or `DeltaError` if it is broken.
    """
    access = access or Access()
    where = place(repo)
    config, _ = read_config(where, access)
    if not is_stage(config):
        source, config = base_source(where, access)
        return [("base", where), *_shape(config), ("fingerprint", source.fingerprint[:12])]
    lineage = resolve(where, access, base=None if base is None else place(base), embedded=embedded_folders())
    own = lineage.links[-1]
    rows = [("stage", f"{own.name} ({where})")]
    for link in reversed(lineage.links):
        stage, header = link.config["stage"], link.header
        head = f"rank {stage['head_rank']}" if stage["head"] == "low_rank" else stage["head"]
        size = Path(link.delta_path).stat().st_size
        label = "  is" if link is own else "  stands on"
        rows.append(
            (
                label,
                f"{link.name}: {stage['num_layers']} layers above {stage['attach_at']}, head {head}, "
                f"{header.num_parameters:,} parameters, {size:,} bytes, fingerprint {header.self_fingerprint[:12]}",
            )
        )
    rows.append(("  on base", lineage.base.describe()))
    rows += _shape(lineage.base_config)
    prompt = own.config.get("prompt") or {}
    rows.append(
        ("prompt", f"{prompt.get('name')} {prompt.get('version')}, stops at {' '.join(prompt.get('stop', []))}")
    )
    rows += _training(Path(own.folder) / "training.json")
    return rows


def _shape(config: dict[str, Any]) -> list[tuple[str, str]]:
    kind, layers, width, vocabulary = (
        config.get(name) for name in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")
    )
    return [("network", f"{kind}, {layers} layers of width {width}, vocabulary {vocabulary}")]


def _training(path: Path) -> list[tuple[str, str]]:
    if not path.is_file():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        ("trained", f"{record['steps']} steps, {record['tokens']:,} tokens, data {record['data']['spec']}"),
        ("val bpb", f"{record['val_bpb']:.4f} (step {record['best_step']})"),
    ]
    for split, models in record.get("evaluation", {}).items():
        shares = {k: v for k, v in models["stage"].items() if v is not None and k != "rows"}
        rows.append((split, ", ".join(f"{k} {v:.3f}" for k, v in shares.items())))
    return rows
