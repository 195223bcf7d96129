"""The output folder of a run, and the records in it: training.json and report.png."""

import contextlib
import importlib.metadata
import json
import math
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from poe.errors import OutputError, TrainingError, printable
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
        if resume and not resumable and any((run / name).is_file() for name in RESULTS):
            raise TrainingError(
                f"Nothing to resume: the run in {run} is finished. To train more, start again in another folder."
            )
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
            _remove_leftovers(run)


def check_output(folder: Path, resume: bool) -> Path:
    """Check the output folder of a run as `run_folder` does, and return it. Nothing stays behind."""
    with run_folder(folder, resume) as run:
        return run


def _remove_leftovers(run: Path) -> None:
    """Empty the folder of a run that failed before a checkpoint or a result."""
    if any((run / name).exists() for name in RESULTS) or has_checkpoint(run):
        return
    for path in [path for pattern in LEFTOVERS for path in run.glob(pattern) if not path.match(OWN_FILES)]:
        if path.match(UNFINISHED):
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_file():
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
    """Report the prepared data: rows read, kept, dropped and augmented, and how full the packed rows are."""
    for source, counts in summary["rows"].items():
        dropped = ", ".join(f"{reason} {n}" for reason, n in counts["dropped"].items()) or "none"
        repaired = ", ".join(f"{rule} {n}" for rule, n in counts.get("repaired", {}).items())
        line = f"{source}: {counts['read']} rows read, {counts['kept']} kept; dropped: {dropped}"
        progress.note(f"{line}; repaired: {repaired}" if repaired else line)
    shares = {name: share for name, share in summary["augmentation"].items() if isinstance(share, float) and share}
    if shares:
        progress.note(f"augmented, as shares of the rows: {', '.join(f'{n} {share:g}' for n, share in shares.items())}")
    progress.note(
        f"{summary['packed_rows']} rows of {summary['seq_len']} tokens, {summary['fill']:.1%} full, "
        f"{summary['trained_tokens']:,} of {summary['tokens']:,} tokens trained, in {seconds:.0f} s"
    )


def write_training_json(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a run. Raises `OutputError`."""
    write_file(folder / "training.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def outcome_record(history: History, **more: float) -> dict[str, Any]:
    """Return the estimate, the actual values and their ratios, for training.json; `more` are further actual values."""
    actual = {name: round(value, 2) for name, value in {**history.actual, **more}.items()}
    return {"estimate": history.estimate, "actual": actual, "ratio": compare_with_estimate(history.estimate, actual)}


def draw_report(run: Path, title: str = "") -> bool:
    """Draw `run`/report.png from `run`/metrics.jsonl; return False if matplotlib is not installed.

    The panels are: loss in nats per trained token; validation in bits per byte (thin lines: the lower stages of a PoE
    base); the factor of the learning rates; the norm of the gradient before clipping. An axis is logarithmic if its
    values span more than a factor of ten. Raises `OutputError` when there is no metrics.jsonl, or the picture cannot be
    written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    except ImportError:
        return False
    steps, evals = read_metrics(run)
    figure = Figure(figsize=(9, 6), layout="constrained")
    figure.suptitle(printable(title, 90), fontsize=12, x=0.01, horizontalalignment="left")
    panels = figure.subplot_mosaic([["loss"] * 3, ["val_bpb", "lr_factor", "grad_norm"]], height_ratios=[3, 2])
    titles = {
        "loss": "training loss (nats per trained token)",
        "val_bpb": "validation (bits per byte)",
        "lr_factor": "learning rates (share of peak)",
        "grad_norm": "gradient norm",
    }
    for name, panel_title in titles.items():
        axes, records = panels[name], evals if name == "val_bpb" else steps
        points = [(r["step"], r[name]) for r in records if name in r]
        axes.set_title(panel_title, fontsize=10, loc="left")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("step")
        if name in ("loss", "grad_norm"):
            axes.plot(*_columns(points), color="#b0b8c4", linewidth=1)
            axes.plot(*_columns(_smoothed(points)), color="#1d4ed8", linewidth=1.5)
        else:
            axes.plot(*_columns(points), "o-" if name == "val_bpb" else "-", color="#c2410c", markersize=3)
        if name == "val_bpb":
            for stage in range(len(evals[-1].get("stage_bpb", [])) - 1 if evals else 0):
                lower = [(r["step"], r["stage_bpb"][stage]) for r in evals]
                axes.plot(*_columns(lower), color="#c2410c", linewidth=0.8, alpha=0.5)
        if name != "lr_factor" and _spans_decades(points):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(0, None)
    with atomic_file(run / REPORT) as file:
        figure.savefig(file, dpi=120)
    return True


def _spans_decades(points: list[tuple[float, float]]) -> bool:
    values = [y for _, y in points if math.isfinite(y)]
    return bool(values) and 0 < 10 * min(values) < max(values)


def try_to_draw_report(run: Path, note: Callable[[str], None], title: str) -> None:
    """Draw report.png; a picture that cannot be drawn is reported, and does not end the run."""
    try:
        draw_report(run, title)
    except OutputError as error:
        note(f"there is no {REPORT}: {error}")


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return a moving average over at most a twentieth of the points."""
    radius = max(1, len(points) // 40)
    windows = [points[max(0, i - radius) : i + radius + 1] for i in range(len(points))]
    return [(x, sum(y for _, y in window) / len(window)) for (x, _), window in zip(points, windows, strict=True)]
