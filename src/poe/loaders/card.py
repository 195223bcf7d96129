"""The model card and the notice of a stage folder, made from its config.json and training.json."""

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from poe.errors import escape_controls, escape_markdown
from poe.loaders.repository import short_name
from poe.modeling.access import is_path

SHARES = {"exact": "exact calls", "names": "right tools", "valid": "valid calls", "abstained": "right abstention"}
EXAMPLE = [{"role": "user", "content": "What is the weather in Lisbon?"}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def stage_card(
    config: Mapping[str, Any],
    training: Mapping[str, Any],
    *,
    parameters: int,
    example: str | None = None,
    plot: str | None = None,
    repo: str | None = None,
) -> str:
    """Return README.md: metadata for the Hub, an example, results, other ways to load, limits, how the stage was made.

    `config` is the stage's config.json. Of `training` (training.json) it uses, if present: `license`, `recipe`,
    `data` (`sources`, `rows`), `trajectory`, `evaluation` or in its place `measured` (what `poe eval` measured later),
    `example` (the stage's `reply` to the example prompt), and the counts of the run. `example` is the rendered prompt,
    `plot` the file name of a plot in the same folder, `repo` the stage's Hub repository.
    """
    reply = escape_controls(str((training.get("example") or {}).get("reply") or ""))
    config, training = _printable(config), _printable(training)
    stage, base = config["stage"], config["base"]
    head = {"dense": "a dense head delta", "none": "the head unchanged"}.get(
        stage["head"], f"a head delta of rank {stage['head_rank']}"
    )
    below = f"the stage {_name_source(config['parent']['repo'])} and " if config.get("parent") else ""
    name = repo or "<this repository>"
    parts = [
        f"---\n{_metadata(config, training).to_yaml()}\n---",
        f"# {stage['name']}",
        *_restrictions(training),
        f"A specialist of {_layers(stage)} and {head} ({parameters:,} parameters) on {below}"
        f"the frozen base {_name_source(base['repo'])}. It changes nothing in the base: "
        f"loading it gives a {'' if _is_fork(stage) else 'deeper '}model of the base's own kind.",
        *_ask(name, base, example, reply),
        *_results(training, plot),
        *_doors(name, stage),
        *_limits(config, training),
        *_making(training, config.get("prompt") or {}, example),
    ]
    return "\n\n".join(parts) + "\n"


def notice(config: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    """Return NOTICE: the base, data and code that this stage uses, with their licenses."""
    config, training = _printable(config), _printable(training)
    base = config["base"]
    lines = [
        f"Base model: {base['repo'] or 'never saved'}, revision {base['revision'] or 'none'}, "
        f"fingerprint {base['fingerprint']}. Its license applies to it and may apply to this stage.",
        f"License of this stage: {training.get('license') or 'not stated'}.",
    ]
    for name, source in _sources(training).items():
        where = f" ({source['hub_id']})" if source.get("hub_id") else ""
        lines.append(f"Training data: {name}, license {source.get('license') or 'not stated'}{where}.")
    lines += [f"NOT FOR COMMERCIAL USE: the license of {name} forbids it." for name in non_commercial(training)]
    lines.append("The Python files beside this one are part of PoE, Apache-2.0.")
    return "\n".join(lines) + "\n"


def non_commercial(training: Mapping[str, Any]) -> list[str]:
    """Return the names of the data sources, and of "this stage", with a non-commercial license."""
    named = {name: source.get("license") for name, source in _sources(training).items()}
    named["this stage"] = training.get("license")
    return [name for name, text in named.items() if re.search(r"\bnc\b|non[- ]?commercial", str(text), re.IGNORECASE)]


def example_prompt(tokenizer: Any) -> str | None:
    """Return a question rendered by the tokenizer's chat template, with a tool if the template supports tools."""
    if tokenizer is None or not tokenizer.chat_template:
        return None
    for tools in ([TOOL], None):
        try:
            text = tokenizer.apply_chat_template(EXAMPLE, tools=tools, tokenize=False, add_generation_prompt=True)
        except Exception:  # a chat template can raise any error
            continue
        return str(text)
    return None


def _metadata(config: Mapping[str, Any], training: Mapping[str, Any]) -> ModelCardData:
    base = config["base"]["repo"]
    on_hub = base is not None and not is_path(base)
    sources = _sources(training)
    hub_ids = [source["hub_id"] for source in sources.values() if source.get("hub_id")]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=hub_ids[0] if len(hub_ids) == 1 else "held-out",
            dataset_name=split,
            dataset_split=split,  # results of one data set and split are one entry of the index
            metric_type=kind.replace(" ", "_"),
            metric_name=kind,
            metric_value=value,
        )
        for split, kind, value in _measured(training)
    ]
    return ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        license=training.get("license"),
        datasets=hub_ids or None,
        tags=["poe", "poe-stage", config["base_config"].get("model_type", "unknown")],
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=config["stage"]["name"] if results else None,
        eval_results=results or None,
    )


def _measured(training: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    rows = [
        (suite, name.replace("_", " "), values["stage"][0])
        for suite, found in ((training.get("measured") or {}).get("suites") or {}).items()
        for name, values in found["metrics"].items()
    ]
    rows = rows or [
        (split, kind, models["stage"][share])
        for split, models in (training.get("evaluation") or {}).items()
        for share, kind in SHARES.items()
        if models.get("stage", {}).get(share) is not None
    ]
    if training.get("val_bpb") is not None:
        rows.append(("validation rows", "bits per byte", round(training["val_bpb"], 6)))
    return rows


def _restrictions(training: Mapping[str, Any]) -> list[str]:
    if not (names := non_commercial(training)):
        return []
    listed = escape_markdown(" and ".join(names))
    return [f"> **Not for commercial use:** the license of {listed} forbids it. See [NOTICE](NOTICE)."]


def _is_fork(stage: Mapping[str, Any]) -> bool:
    return stage.get("layers") == "fork"


def _layers(stage: Mapping[str, Any]) -> str:
    if not _is_fork(stage):
        return f"{stage['num_layers']} new decoder layers"
    rank = "full rank" if stage["rank"] is None else f"rank {stage['rank']}"
    tokens = "the answer alone, the base reads the prompt" if stage["active"] == "answer" else "all tokens"
    return f"changes ({rank}) of {stage['num_layers']} layers from {stage['attach_at']} up, active on {tokens},"


def _ask(repo: str, base: Mapping[str, Any], example: str | None, reply: str) -> list[str]:
    """How to load the stage and ask it a question, and what it replied at the end of its training."""
    has_tool = TOOL["function"]["name"] in (example or "")
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n",
        f'model = AutoModelForCausalLM.from_pretrained("{repo}", trust_remote_code=True)',
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")',
    ]
    if example:
        lines += [f"messages = {json.dumps(EXAMPLE)}"]
        lines += [f"tools = {json.dumps([TOOL])}"] if has_tool else []
        lines += [
            "inputs = tokenizer.apply_chat_template(",
            f"    messages, {'tools=tools, ' if has_tool else ''}add_generation_prompt=True, "
            'return_dict=True, return_tensors="pt"',
            ")",
            "output = model.generate(**inputs, max_new_tokens=200, do_sample=False)",
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))',
        ]
    parts = ["## Ask it", "```python\n" + "\n".join(lines) + "\n```"]
    if reply:
        parts += ["At the end of its training the stage replied:", _fenced("text", reply)]
    if base["repo"] is None or is_path(base["repo"]):
        parts.append(
            "Its base is not on the Hub: pass its folder as `base=...`, or set the environment variable `POE_BASE`. "
            f"The right base has the fingerprint `{base['fingerprint']}`."
        )
    return parts


def _results(training: Mapping[str, Any], plot: str | None) -> list[str]:
    measured = training.get("measured")
    asked = _suites(measured) if measured else _evaluation(training.get("evaluation") or {})
    parts = [*asked, *_validation(training, plot)]
    return ["## Results", *parts] if parts else []


def _doors(repo: str, stage: Mapping[str, Any]) -> list[str]:
    note, option = (", on all tokens", " --all-tokens") if stage.get("active") == "answer" else ("", "")
    text = (
        "With the package (`pip install poe-cascade`), where stages can be stacked, combined, and switched off:\n\n"
        f'```python\nfrom poe import Cascade\n\ncascade = Cascade.from_pretrained("{repo}")\n```\n\n'
        f"As an ordinary checkpoint{note}, for llama.cpp, vLLM, and other programs that have neither:"
        f"\n\n```bash\npoe export {repo} --native out{option}\n```"
    )
    return ["## Other ways to load it", text]


def _making(training: Mapping[str, Any], prompt: Mapping[str, Any], example: str | None) -> list[str]:
    """How the stage was made: its data, the run, and folded away: recipe, validation, prompt format."""
    parts = _data(training.get("data") or {})
    if training.get("steps"):
        machine = training.get("environment") or {}
        versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
        parts.append(
            f"{training['steps']:,} steps over {training.get('tokens', 0):,} tokens in "
            f"{training.get('seconds', 0):,} seconds on "
            f"{escape_markdown(str(machine.get('device', 'an unknown device')))} "
            f"({escape_markdown(versions) or 'versions not recorded'}). "
            "[training.json](training.json) holds everything that was recorded."
        )
    if training.get("recipe"):
        recipe = yaml.safe_dump(_plain(training["recipe"]), sort_keys=False, allow_unicode=True).strip()
        parts.append(_folded("Recipe", _fenced("yaml", recipe)))
    if points := training.get("trajectory"):
        rows = "\n".join(f"| {point['step']:,} | {point['val_bpb']:.4f} |" for point in points)
        parts.append(_folded("Validation", f"| step | bits per byte |\n|---:|---:|\n{rows}"))
    if text := _prompt(prompt, example):
        parts.append(_folded("Prompt format", text))
    return ["## How it was made", *parts] if parts else []


def _folded(title: str, text: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"


def _prompt(prompt: Mapping[str, Any], example: str | None) -> str:
    parts = []
    if prompt:
        stops = ", ".join(_code(stop) for stop in prompt.get("stop", [])) or "the end of the text"
        parts.append(
            f"Format {_code(prompt.get('name'))}, version {_code(prompt.get('version'))}; an answer ends at {stops}."
        )
    if example:
        parts.append(f"The template renders the example above as:\n\n{_fenced('text', escape_controls(example))}")
    return "\n\n".join(parts)


def _data(data: Mapping[str, Any]) -> list[str]:
    sources = data.get("sources") or {}
    if not sources:
        return []
    counts = data.get("rows") or {}
    lines = ["| source | rows read | conversations trained on | epochs | license |\n|---|---:|---:|---:|---|"]
    for name, source in sources.items():
        read = counts.get(name, {}).get("read")
        label = escape_markdown(name)
        hub_id = _code(source["hub_id"]).replace("|", "\\|") if source.get("hub_id") else None
        label += f" ({hub_id})" if hub_id else ""
        lines.append(
            f"| {label} | {'-' if read is None else f'{read:,}'} | {source.get('conversations', 0):,} | "
            f"{source.get('epochs', '-')} | {escape_markdown(str(source.get('license') or 'not stated'))} |"
        )
    parts = ["\n".join(lines)]
    drops = [
        f"- {escape_markdown(f'{name}: {reason}')}: {number:,}"
        for name, count in counts.items()
        for reason, number in (count.get("dropped") or {}).items()
    ]
    return [*parts, "Rows that were left out, and why:\n\n" + "\n".join(drops)] if drops else parts


def _validation(training: Mapping[str, Any], plot: str | None) -> list[str]:
    points = training.get("trajectory") or []
    if not points:
        return []
    best = min(points, key=lambda point: point["val_bpb"])
    text = f"Bits per byte on validation rows: {points[0]['val_bpb']:.4f} before training, {best['val_bpb']:.4f} after"
    return [f"{text} (step {best['step']:,}).", *([f"![The course of the training]({plot})"] if plot else [])]


def _evaluation(evaluation: Mapping[str, Any]) -> list[str]:
    if not evaluation:
        return []
    lines = [
        "| split | model | rows | " + " | ".join(SHARES.values()) + " |\n|---|---|---:" + "|---:" * len(SHARES) + "|"
    ]
    for split, models in evaluation.items():
        for model, scores in models.items():
            shares = ["-" if scores.get(key) is None else f"{scores[key]:.3f}" for key in SHARES]
            lines.append(
                f"| {escape_markdown(split)} | {escape_markdown(model)} | {scores.get('rows', '-')} | "
                + " | ".join(shares)
                + " |"
            )
    return [
        "Held-out questions:",
        "\n".join(lines),
        "A call is exact only if its name and arguments equal the reference as JSON values. `base` is the same model "
        "with the stage switched off.",
    ]


def _suites(measured: Mapping[str, Any]) -> list[str]:
    """The tables of what `poe eval` measured, and the evidence that the base is unchanged."""
    parts = [f"Measured by `poe eval`: {escape_markdown(measured['how'])}. Brackets are 95 % intervals over rows."]
    for name, found in measured["suites"].items():
        lines = ["| metric | base | stage |", "|---|---:|---:|"]
        for metric, values in found["metrics"].items():
            cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*values[label]) for label in ("base", "stage")]
            lines.append(f"| {escape_markdown(metric.replace('_', ' '))} | {' | '.join(cells)} |")
        parts += [f"**{escape_markdown(name)}**, {found['rows']:,} rows:", "\n".join(lines)]
    if measured.get("base_logits"):
        parts.append(
            "With the stage switched off the model is its base: the logits of both on fixed prompts have the SHA-256 "
            f"`{measured['base_logits']}`."
        )
    return parts


def _limits(config: Mapping[str, Any], training: Mapping[str, Any]) -> list[str]:
    base, longest = config["base"], (training.get("data") or {}).get("seq_len")
    lines = [
        f"- It needs exactly its base (fingerprint `{base['fingerprint'][:12]}`): other weights of the same name are "
        "refused. What the base cannot do or says wrongly, this model inherits."
    ]
    if longest:
        lines.append(f"- It was trained on conversations of up to {longest:,} tokens; longer ones are untested.")
    if training.get("measured"):
        lines.append("- It was measured on the rows above and on nothing else.")
    elif training.get("evaluation"):
        lines.append("- It was measured on the held-out questions above and on nothing else.")
    else:
        lines.append("- How well it answers has not been measured.")
    lines.append(
        "- It may call a wrong tool, or a right one wrongly: check calls against their schema before running them."
    )
    return ["## Limits", "\n".join(lines)]


def _sources(training: Mapping[str, Any]) -> Mapping[str, Any]:
    return (training.get("data") or {}).get("sources") or {}


def _printable(value: Any) -> Any:
    """Return nested data in which all text is one line, with control characters escaped."""
    if isinstance(value, Mapping):
        return {_printable(str(key)): _printable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_printable(item) for item in value]
    return escape_controls(value).replace("\n", "\\n").replace("\t", "\\t") if isinstance(value, str) else value


def _code(text: object) -> str:
    """Return text as inline code; it may have backticks."""
    mark = "`" * (1 + max((len(run) for run in re.findall("`+", str(text))), default=0))
    space = " " if "`" in str(text) else ""
    return f"{mark}{space}{text}{space}{mark}"


def _name_source(repo: str | None) -> str:
    return "that was never saved" if repo is None else _code(short_name(repo))


def _fenced(language: str, text: str) -> str:
    mark = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{mark}{language}\n{text}\n{mark}"


def _plain(value: Any) -> Any:
    """Return nested data that `yaml.safe_dump` accepts."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
