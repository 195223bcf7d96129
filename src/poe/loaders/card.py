"""The model card and the notice of a stage folder, from what is known about the run."""

from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from poe.modeling.stage import Stage


def stage_card(stage: Stage, config: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    """Return README.md: card metadata that the Hub reads, then how to use the stage and how it was made.

    Of `training` (the record that becomes training.json) it uses, where present: `license`, `recipe`, `data`
    (`sources`), `trajectory` (rows with `step` and `val_bpb`) and `evaluation` (split -> model -> shares).
    """
    base = config["base"]
    sources: Mapping[str, Any] = training.get("data", {}).get("sources", {})
    on_hub = base["repo"] and not base["repo"].startswith(".")
    data = ModelCardData(
        base_model=base["repo"] if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        license=training.get("license"),
        datasets=[hub for source in sources.values() if (hub := source.get("hub_id"))] or None,
        tags=["poe", "poe-stage", config["base_config"].get("model_type", "unknown")],
    )
    head = {"dense": "a dense head delta", "none": "the head unchanged"}.get(
        stage.config.head, f"a head delta of rank {stage.config.head_rank}"
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {stage.name}",
        f"A specialist of {stage.config.num_layers} new decoder layers and {head} ({stage.num_parameters():,} "
        f"parameters) on the frozen base `{base['repo'] or 'that was never saved'}`. It changes nothing in the base: "
        "loading it makes the base a deeper model of its own kind.",
        "## Use",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("<this repository>", trust_remote_code=True)\n'
        'tokenizer = AutoTokenizer.from_pretrained("<this repository>", trust_remote_code=True)\n```',
        'With the package: `poe.Cascade.from_pretrained("<this repository>")`.',
    ]
    if training.get("recipe"):
        recipe = yaml.safe_dump(_plain(training["recipe"]), sort_keys=False, allow_unicode=True).strip()
        parts += ["## Recipe", f"```yaml\n{recipe}\n```"]
    if sources:
        lines = [
            f"| {name} | {source['conversations']:,} | {source['epochs']} | {source['licence']} |"
            for name, source in sources.items()
        ]
        parts += ["## Data", "| source | conversations | epochs | licence |\n|---|---:|---:|---|\n" + "\n".join(lines)]
    if training.get("trajectory"):
        points = "\n".join(f"| {point['step']} | {point['val_bpb']:.4f} |" for point in training["trajectory"])
        parts += ["## Validation", f"| step | bits per byte |\n|---:|---:|\n{points}"]
    if training.get("evaluation"):
        shares = ("exact", "names", "valid", "abstained")
        lines = [
            f"| {split} | {model} | {s['rows']} | " + " | ".join("-" if s[k] is None else f"{s[k]:.3f}" for k in shares)
            for split, models in training["evaluation"].items()
            for model, s in models.items()
        ]
        head = "| split | model | rows | exact calls | right tools | valid calls | right abstention |"
        parts += ["## Held-out questions", head + "\n|---|---|---:|---:|---:|---:|---:|\n" + "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def notice(config: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    """Return NOTICE: whose work this stage stands on. Of `training` it uses the `sources` of `data`."""
    base = config["base"]
    lines = [
        f"Base model: {base['repo'] or 'never saved'}, revision {base['revision'] or 'none'}, "
        f"fingerprint {base['fingerprint']}. Its licence applies to it and may apply to this stage.",
        f"Licence of this stage: {training.get('license') or 'not stated'}.",
    ]
    for name, source in training.get("data", {}).get("sources", {}).items():
        lines.append(f"Training data: {name}, licence {source['licence']}.")
    lines.append("The Python files beside this one are part of PoE, Apache-2.0.")
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    """Return nested data that `yaml.safe_dump` accepts."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
