"""Results of evaluations: their files, their tables, and the comparison of several by example."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from poe.errors import EvaluationError, escape_markdown, printable
from poe.evaluation.call_metrics import AT_FORMAT, Counts, Metric, add_by_row, summarize, summarize_differences
from poe.evaluation.chart import Panel, Point, draw_chart
from poe.evaluation.significance import adjust_p_values, compute_p_values
from poe.files.output import write_file

SCHEMA = 1
RESULTS, SCORES = "results.json", "scores.jsonl"
BASE, STAGE, DIFFERENCE = "base", "stage", "difference"
BITS = "bits_per_byte"
DETAILS = {  # metrics of the tables that charts and cards leave out
    *("name_precision", "name_recall", "call_precision", "call_recall", "hammer_name_f1", "hammer_argument_f1"),
    *("invented_tools", "invented_arguments", "teacher_forced_tokens"),
}
FREE = ", free"  # ends the label of replies without a constraint, beside constrained ones
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class SavedRun:
    """A finished evaluation: its results, and what each answer of its model adds to each metric, by suite and question.

    The model is the stage, or the base if no stage was measured. `rows` has the row of each question.
    """

    name: str
    results: dict[str, Any]
    counts: dict[str, dict[str, Counts]]
    rows: dict[str, dict[str, str]]


def _is_detail(metric: str) -> bool:
    return metric in DETAILS or AT_FORMAT in metric


def write_scores(path: Path, lines: Sequence[Mapping[str, Any]]) -> str:
    """Write what each answer adds to each metric, one line per answer, and return the SHA-256 of the file."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_file(path, text)
    return hashlib.sha256(text.encode()).hexdigest()


def write_table(results: Mapping[str, Any]) -> str:
    """Return results as Markdown: what was measured, a table for each suite, and whether the base is unchanged."""
    base, stage, settings = results["base"], results["stage"], results["settings"]
    title = f"Base `{base['fingerprint'][:12]}` ({escape_markdown(str(base['repo']))})"
    if stage is not None:
        title = f"Stage {escape_markdown(stage['name'])} `{stage['fingerprint'][:12]}` on {title[0].lower()}{title[1:]}"
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = [
        f"{title}. {_describe_decoding(settings)}, at most {settings['max_new_tokens']} tokens per reply, "
        f"seed {settings['seed']}, {settings['dtype']} on {settings['device']}; {versions}.\n"
    ]
    for name, scores in results["scores"].items():
        suite = results["suites"][name]
        dropped = ", ".join(f"{escape_markdown(reason)} {n}" for reason, n in suite["dropped"].items())
        several = f"{suite['asked']} questions from " if suite["asked"] > suite["rows"] else ""
        asked = f"{several}{suite['rows']} of {suite['read']} rows{f' (dropped: {dropped})' if dropped else ''}"
        constrained = [replies for label, replies in suite["replies"].items() if not label.endswith(FREE)]
        free = sum(replies.get("free_replies", 0) for replies in constrained)
        if free and settings["constrain"]:
            asked += f"; {free} replies were free, because their row has no tools or no grammar can be made of them"
        if (official := suite.get("official")) and official["compared"]:
            asked += (
                f"; {official['tool']} and our rules agree on {official['agreed']} of {official['compared']} replies"
            )
        parts.append(f"**{escape_markdown(name)}**: {asked}\n\n{_write_rows(scores)}")
    parts.append("Brackets are 95 % bootstrap intervals over rows, for a difference over the same rows of both.\n")
    if unchanged := results.get("base_unchanged"):
        word = "equal" if unchanged["is_equal"] else "DIFFERENT"
        parts.append(f"The base with the stage off and the base alone: {word} logits on fixed prompts.\n")
    return "\n".join(parts)


def draw_results(results: Mapping[str, Any]) -> str:
    """Return the chart of results, an SVG: the main metrics of each suite with their intervals."""
    panels: list[Panel] = []
    series: dict[str, None] = {}
    for suite, scores in results["scores"].items():
        columns = {label: values for label, values in scores.items() if not label.startswith(DIFFERENCE)}
        series |= dict.fromkeys(columns)
        names = dict.fromkeys(name for values in columns.values() for name in values if not _is_detail(name))
        for is_share in (True, False):
            rows: list[tuple[str, list[Point]]] = []
            for name in (name for name in names if (name != BITS) is is_share):
                found = {label: values[name] for label, values in columns.items() if values.get(name, {}).get("rows")}
                points = []
                for label, metric in found.items():
                    value, low, high = ((100 if is_share else 1) * metric[key] for key in ("value", "low", "high"))
                    points.append(Point(label, value, low, high, _write_value(metric, name, False)))
                rows += [(name, points)] if points else []
            if rows:
                title = f"{printable(suite, 60)}{', percent' if is_share else ''}"
                panels.append(Panel(title, rows, 100.0 if is_share else None))
    return draw_chart(panels, list(series), "The main metrics of each suite, with 95 % intervals")


def describe_for_card(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model card shows of an evaluation. Raises `EvaluationError` if it did not measure base and stage.

    `stage` and `base` are the fingerprints of the models, `suites` has the number of rows and the main metrics, and
    `base_logits` is the hash of the base's logits on fixed prompts, equal with the stage off and without it.
    """
    unchanged = results.get("base_unchanged")
    if results["stage"] is None:
        raise EvaluationError("The evaluation measured a base alone: evaluate the stage, without --off.")
    if any(BASE not in scores for scores in results["scores"].values()):
        raise EvaluationError("The evaluation measured a stage without its base: evaluate it without --stage-only.")
    if unchanged is not None and not unchanged["is_equal"]:
        raise EvaluationError("In the evaluation the base with the stage off was not the base alone: evaluate again.")
    suites = {}
    for name, scores in results["scores"].items():
        metrics = {
            metric: {label: [scores[label][metric][key] for key in ("value", "low", "high")] for label in (BASE, STAGE)}
            for metric, value in scores[STAGE].items()
            if not _is_detail(metric) and value["rows"] and scores[BASE].get(metric, {}).get("rows")
        }
        suites[name] = {"rows": results["suites"][name]["rows"], "metrics": metrics}
    settings = results["settings"]
    decoding = _describe_decoding({**settings, "both": False}).lower()
    return {
        "stage": results["stage"]["fingerprint"],
        "base": results["base"]["fingerprint"],
        "how": f"{decoding}, at most {settings['max_new_tokens']} tokens per reply, {settings['dtype']}",
        "suites": suites,
        "base_logits": unchanged and unchanged["stage_off"],
    }


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
    model = BASE if results["stage"] is None else STAGE
    counts: dict[str, dict[str, Counts]] = {}
    rows: dict[str, dict[str, str]] = {}
    for line in map(json.loads, content.splitlines()):
        if line["model"] == model:
            counts.setdefault(line["suite"], {})[line["question"]] = {k: tuple(v) for k, v in line["counts"].items()}
            rows.setdefault(line["suite"], {})[line["question"]] = line.get("row", line["question"])
    return SavedRun(path.parent.name, results, counts, rows)


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
        names_of_rows = [runs[0].rows[suite][question] for question in common]
        rows = [add_by_row([questions[question] for question in common], names_of_rows) for questions in asked]
        scores = _compare_rows(labels, rows, runs[0].results["settings"]["seed"])
        left = max(map(len, asked)) - len(common)
        note = f" (left out: up to {left} that not all have)" if left else ""
        parts.append(f"**{escape_markdown(suite)}**: {len(common)} questions{note}\n\n{_write_rows(scores)}")
    if not parts:
        raise EvaluationError(f"{' and '.join(names)} have no question in common: give evaluations of the same suites.")
    others = len(runs) - 1
    number = "" if others == 1 else f", adjusted for the {others} runs that are compared with the first (Holm)"
    parts.append(
        "Brackets are 95 % bootstrap intervals over questions. p is that of a two-sided randomization test over "
        f"questions{number}. It is not adjusted for the number of metrics and suites: of many, about one in twenty has "
        "p below 0.05 by chance, so choose the metric before you look.\n"
    )
    return "\n".join(parts)


def _compare_rows(labels: Sequence[str], rows: Sequence[Sequence[Counts]], seed: int) -> dict[str, Any]:
    """Return the metrics of each run on the same questions, and its differences from the first with their p-values."""
    scores = {labels[0]: as_values(summarize(rows[0], seed=seed))}
    tests = {label: compute_p_values(rows[0], own, seed=seed) for label, own in zip(labels[1:], rows[1:], strict=True)}
    for label, own in zip(labels[1:], rows[1:], strict=True):
        scores[label] = as_values(summarize(own, seed=seed))
        differences = as_values(summarize_differences(rows[0], own, seed=seed))
        for metric, difference in differences.items():
            found = {other: tested[metric] for other, tested in tests.items() if metric in tested}
            difference["p"] = adjust_p_values(found).get(label)
        scores[f"{label} {MINUS} {labels[0]}"] = differences
    return scores


def _describe_decoding(settings: Mapping[str, Any]) -> str:
    kind = "constrained and free" if settings["both"] else "constrained" if settings["constrain"] else "free"
    if not settings["temperature"]:
        return f"Greedy, {kind}"
    replies = f", {settings['samples']} replies to each question" if settings["samples"] > 1 else ""
    return f"Sampled at temperature {settings['temperature']:g}{replies}, {kind}"


def _write_rows(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of one suite: a row for each metric, and a column for each model or difference."""
    signs = [label.startswith(DIFFERENCE) or MINUS in label for label in scores]
    titles = [label.replace(DIFFERENCE, f"stage {MINUS} base") for label in scores]
    lines = [f"| metric | rows | {' | '.join(map(escape_markdown, titles))} |", "|---|" + "---:|" * (len(titles) + 1)]
    for metric in dict.fromkeys(name for values in scores.values() for name in values):
        values = [column.get(metric, {}) for column in scores.values()]
        rows = max(value.get("rows", 0) for value in values)
        if rows:
            cells = [_write_value(value, metric, sign) for value, sign in zip(values, signs, strict=True)]
            lines.append(f"| {metric} | {rows} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _write_value(metric: Mapping[str, Any], name: str, is_difference: bool) -> str:
    if metric.get("value") is None:
        return "-"
    factor, digits = (1, 4) if name == BITS else (100, 1)
    value, low, high = (factor * metric[key] for key in ("value", "low", "high"))
    plus = "+" if is_difference else ""
    text = f"{value:{plus}.{digits}f} [{low:{plus}.{digits}f}, {high:{plus}.{digits}f}]"
    p_value = f", p {metric['p']:.3f}" if metric.get("p") is not None else ""
    return text.replace("-", MINUS) + p_value


def as_values(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """Return metrics as JSON values."""
    return {name: asdict(metric) for name, metric in metrics.items()}
