"""Results of evaluations: their files, their tables, and the comparison of several by example."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from poe.errors import EvaluationError, escape_markdown, printable
from poe.evaluation.call_metrics import Counts, Metric, summarize, summarize_differences
from poe.files.output import write_file

SCHEMA = 1
RESULTS, SCORES = "results.json", "scores.jsonl"
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class SavedRun:
    """A finished evaluation: its results, and what each answer of its model adds to each metric, by suite and question.

    The model is the stage, or the base if no stage was measured.
    """

    name: str
    results: dict[str, Any]
    counts: dict[str, dict[str, Counts]]


def write_scores(path: Path, lines: Sequence[Mapping[str, Any]]) -> str:
    """Write what each answer adds to each metric, one line per answer, and return the SHA-256 of the file."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_file(path, text)
    return hashlib.sha256(text.encode()).hexdigest()


def write_table(results: Mapping[str, Any]) -> str:
    """Return results as Markdown: what was measured, a table for each suite, and whether the base is unchanged."""
    base, stage, settings = results["base"], results["stage"], results["settings"]
    decoding = "constrained" if settings["constrain"] else "free"
    title = f"Base `{base['fingerprint'][:12]}` ({escape_markdown(str(base['repo']))})"
    if stage is not None:
        title = f"Stage {escape_markdown(stage['name'])} `{stage['fingerprint'][:12]}` on {title[0].lower()}{title[1:]}"
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = [
        f"{title}. Greedy, {decoding}, at most {settings['max_new_tokens']} tokens per reply, seed {settings['seed']}, "
        f"{settings['dtype']} on {settings['device']}; {versions}.\n"
    ]
    for name, scores in results["scores"].items():
        suite = results["suites"][name]
        dropped = ", ".join(f"{escape_markdown(reason)} {n}" for reason, n in suite["dropped"].items())
        asked = f"{suite['asked']} of {suite['read']} rows{f' (dropped: {dropped})' if dropped else ''}"
        free = sum(replies.get("free_replies", 0) for replies in suite["replies"].values())
        if free and settings["constrain"]:
            asked += f"; {free} replies were free, because their row has no tools or no grammar can be made of them"
        parts.append(f"**{escape_markdown(name)}**: {asked}\n\n{_write_rows(scores)}")
    parts.append("Brackets are 95 % bootstrap intervals over rows, for a difference over the same rows of both.\n")
    if unchanged := results.get("base_unchanged"):
        word = "equal" if unchanged["is_equal"] else "DIFFERENT"
        parts.append(f"The base with the stage off and the base alone: {word} logits on fixed prompts.\n")
    return "\n".join(parts)


def read_run(folder: Path) -> SavedRun:
    """Read a finished evaluation. Raises `EvaluationError` if its files are missing, of another version, or edited."""
    path = folder.expanduser() / RESULTS
    try:
        results = json.loads(path.read_bytes())
        schema = results.get("schema")
        content = path.with_name(SCORES).read_bytes() if schema == SCHEMA else b""
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise EvaluationError(
            f"{folder} is no finished evaluation ({printable(str(error), 100)}): run `poe eval`."
        ) from None
    if schema != SCHEMA:
        raise EvaluationError(f"{path} has schema {printable(str(schema), 20)}, expected {SCHEMA}: evaluate again.")
    if hashlib.sha256(content).hexdigest() != results.get("scores_sha256"):
        raise EvaluationError(f"{path.with_name(SCORES)} is not the file that {RESULTS} describes: evaluate again.")
    model = "base" if results["stage"] is None else "stage"
    counts: dict[str, dict[str, Counts]] = {}
    for line in map(json.loads, content.splitlines()):
        if line["model"] == model:
            counts.setdefault(line["suite"], {})[line["question"]] = {k: tuple(v) for k, v in line["counts"].items()}
    return SavedRun(path.parent.name, results, counts)


def compare_runs(runs: Sequence[SavedRun]) -> str:
    """Return a Markdown table for each suite that all runs have: each metric, and its difference from the first run.

    Runs are aligned by question; those that only some of them have are left out and counted. Raises `EvaluationError`
    if the runs have no question in common.
    """
    names = [run.name for run in runs]
    labels = names if len(set(names)) == len(names) else [f"{name} ({i})" for i, name in enumerate(names, 1)]
    parts = []
    for suite in runs[0].counts:
        asked = [run.counts.get(suite, {}) for run in runs]
        common = [question for question in asked[0] if all(question in questions for questions in asked)]
        if not common:
            continue
        rows = [[questions[question] for question in common] for questions in asked]
        seed = runs[0].results["settings"]["seed"]
        scores = {labels[0]: as_values(summarize(rows[0], seed=seed))}
        for label, own in zip(labels[1:], rows[1:], strict=True):
            scores[label] = as_values(summarize(own, seed=seed))
            scores[f"{label} {MINUS} {labels[0]}"] = as_values(summarize_differences(rows[0], own, seed=seed))
        left = max(map(len, asked)) - len(common)
        note = f" (left out: up to {left} that not all have)" if left else ""
        parts.append(f"**{escape_markdown(suite)}**: {len(common)} questions{note}\n\n{_write_rows(scores)}")
    if not parts:
        raise EvaluationError(f"{' and '.join(names)} have no question in common: give evaluations of the same suites.")
    return "\n".join(parts)


def _write_rows(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of one suite: a row for each metric, and a column for each model or difference."""
    titles = [f"stage {MINUS} base" if label == "difference" else label for label in scores]
    lines = [f"| metric | rows | {' | '.join(map(escape_markdown, titles))} |", "|---|" + "---:|" * (len(titles) + 1)]
    for metric in dict.fromkeys(name for values in scores.values() for name in values):
        values = [column.get(metric, {}) for column in scores.values()]
        rows = max(value.get("rows", 0) for value in values)
        if rows:
            signs = [label == "difference" or MINUS in label for label in scores]
            cells = [_write_value(value, metric, sign) for value, sign in zip(values, signs, strict=True)]
            lines.append(f"| {metric} | {rows} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _write_value(metric: Mapping[str, Any], name: str, is_difference: bool) -> str:
    if metric.get("value") is None:
        return "-"
    factor, digits = (1, 4) if name == "bits_per_byte" else (100, 1)
    value, low, high = (factor * metric[key] for key in ("value", "low", "high"))
    plus = "+" if is_difference else ""
    text = f"{value:{plus}.{digits}f} [{low:{plus}.{digits}f}, {high:{plus}.{digits}f}]"
    return text.replace("-", MINUS)


def as_values(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """Return metrics as JSON values."""
    return {name: asdict(metric) for name, metric in metrics.items()}
