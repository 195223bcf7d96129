"""The output folder of a run, and the records in it: training.json and report.png."""

import contextlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from poe.errors import OutputError, TrainingError
from poe.files.output import OWN_FILES, atomic_file, locked_folder, write_file
from poe.training.checkpoints.files import UNFINISHED, has_checkpoint
from poe.training.reporting.estimate import compare_with_estimate
from poe.training.reporting.history import History
from poe.training.reporting.metrics import METRICS, read_metrics
from poe.training.reporting.progress import Progress
from poe.training.reporting.tracking import TENSORBOARD, WANDB

REPORT = "report.png"
CHUNKS = "chunks.jsonl"  # the state of streamed packing
# Files of a run that failed early. A folder with nothing else counts as empty.
LEFTOVERS = ("dropped.jsonl", CHUNKS, METRICS, OWN_FILES, UNFINISHED, TENSORBOARD, WANDB)
RESULTS = ("delta.safetensors", "model.safetensors")
VERSIONED = ("torch", "transformers", "safetensors", "tokenizers", "poe-cascade")


@contextlib.contextmanager
def run_folder(folder: Path, resume: bool) -> Iterator[Path]:
    """Make and lock the output folder of a run for the block, and yield it.

    A run that fails before a checkpoint or a result leaves it as it was. Raises `OutputError` for a folder that is not
    empty, cannot be written, or is in use, `TrainingError` if `resume` finds no checkpoint.
    """
    with locked_folder(folder) as run:
        content = sorted(p.name for p in run.iterdir() if not any(p.match(pattern) for pattern in LEFTOVERS))
        resumable = has_checkpoint(run)
        if resume and not resumable:
            raise TrainingError(f"Nothing to resume: there is no checkpoint in {run}. Start without --resume.")
        if content and not resume:
            hint = "It holds an unfinished run: continue it with --resume. " if resumable else ""
            raise OutputError(
                f"The output folder {run} is not empty ({', '.join(content[:4])}{', ...' if len(content) > 4 else ''})."
                f" {hint}Choose another with --out, or empty it."
            )
        try:
            yield run
        finally:
            remove_leftovers(run)


def check_output(folder: Path, resume: bool) -> Path:
    """Check the output folder of a run as `run_folder` does, and return it. Nothing stays behind."""
    with run_folder(folder, resume) as run:
        return run


def remove_leftovers(run: Path, *, keep_dropped: bool = True) -> None:
    """Empty the folder of a run that failed before a checkpoint or a result, so that it can be used again.

    With `keep_dropped` a list of dropped rows stays, which explains why no data was left.
    """
    if any((run / name).exists() for name in RESULTS) or has_checkpoint(run):
        return
    for path in [path for pattern in LEFTOVERS for path in run.glob(pattern) if not path.match(OWN_FILES)]:
        if path.match(UNFINISHED):
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_file() and (path.name != "dropped.jsonl" or not keep_dropped or path.stat().st_size == 0):
            path.unlink()  # the trackers' folders may explain the failure: they stay


def environment() -> dict[str, Any]:
    """Return versions and hardware, for training.json."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    versions = {}
    for name in VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": platform.python_version(),
        "versions": versions,
        "device": device,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def note_data(summary: Mapping[str, Any], seconds: float, progress: Progress) -> None:
    """Report the prepared data: rows read, kept and dropped by source, and how full the packed rows are."""
    for source, counts in summary["rows"].items():
        dropped = ", ".join(f"{reason} {n}" for reason, n in counts["dropped"].items()) or "none"
        repaired = ", ".join(f"{rule} {n}" for rule, n in counts.get("repaired", {}).items())
        line = f"{source}: {counts['read']} rows read, {counts['kept']} kept; dropped: {dropped}"
        progress.note(f"{line}; repaired: {repaired}" if repaired else line)
    progress.note(
        f"{summary['packed_rows']} rows of {summary['seq_len']} tokens, {summary['fill']:.1%} full, "
        f"{summary['trained_tokens']:,} of {summary['tokens']:,} tokens trained, in {seconds:.0f} s"
    )


def write_training_json(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a run. Raises `OutputError`."""
    write_file(folder / "training.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def outcome_record(history: History) -> dict[str, Any]:
    """Return the estimate, the actual values and their ratios, for training.json."""
    actual = {name: round(value, 2) for name, value in history.actual.items()}
    return {"estimate": history.estimate, "actual": actual, "ratio": compare_with_estimate(history.estimate, actual)}


def draw_report(run: Path) -> bool:
    """Draw `run`/report.png from `run`/metrics.jsonl; return False if matplotlib is not installed.

    The panels are: loss in nats per label; validation in bits per byte (thin lines: the lower stages of a PoE base);
    the factor of the learning rates; the norm of the gradient before clipping; tokens per second. Raises `OutputError`
    when there is no metrics.jsonl, or the picture cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    steps, evals = read_metrics(run)
    figure = Figure(figsize=(8, 7), layout="constrained")
    panels = figure.subplot_mosaic([["loss", "loss"], ["val_bpb", "lr_factor"], ["grad_norm", "tokens_per_s"]])
    titles = {
        "loss": "training loss (nats per trained token)",
        "val_bpb": "validation (bits per byte)",
        "lr_factor": "learning rates (share of their peak)",
        "grad_norm": "gradient norm",
        "tokens_per_s": "tokens per second",
    }
    for name, title in titles.items():
        points = [(r["step"], r[name]) for r in (evals if name == "val_bpb" else steps) if name in r]
        panels[name].set_title(title, fontsize=10, loc="left")
        panels[name].grid(alpha=0.3)
        panels[name].spines[["top", "right"]].set_visible(False)
        if name in ("loss", "grad_norm", "tokens_per_s"):
            panels[name].plot(*_columns(points), color="#b0b8c4", linewidth=1)
            panels[name].plot(*_columns(_smoothed(points)), color="#1d4ed8", linewidth=1.5)
        else:
            panels[name].plot(*_columns(points), "o-" if name == "val_bpb" else "-", color="#c2410c", markersize=3)
        if name == "val_bpb":
            for stage in range(len(evals[-1].get("stage_bpb", [])) - 1 if evals else 0):
                points = [(r["step"], r["stage_bpb"][stage]) for r in evals]
                panels[name].plot(*_columns(points), color="#c2410c", linewidth=0.8, alpha=0.5)
        panels[name].set_ylim(0, None)
    for name in ("grad_norm", "tokens_per_s"):
        panels[name].set_xlabel("step")
    with atomic_file(run / REPORT) as file:
        figure.savefig(file, dpi=120)
    return True


def try_to_draw_report(run: Path, note: Callable[[str], None]) -> None:
    """Draw report.png; a picture that cannot be drawn is reported, and does not end the run."""
    try:
        draw_report(run)
    except OutputError as error:
        note(f"there is no {REPORT}: {error}")


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return a moving average over at most a twentieth of the points."""
    radius = max(1, len(points) // 40)
    windows = [points[max(0, i - radius) : i + radius + 1] for i in range(len(points))]
    return [(x, sum(y for _, y in window) / len(window)) for (x, _), window in zip(points, windows, strict=True)]
