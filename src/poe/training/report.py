"""What a run leaves behind besides weights: training.json, loss.png, and a folder that was checked beforehand."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from poe.errors import OutputError, TrainingError
from poe.training.checkpoint import has_checkpoint

# What a run that failed early may leave; it does not make a folder taken.
LEFTOVERS = ("dropped.jsonl", "metrics.jsonl")
VERSIONED = ("torch", "transformers", "safetensors", "tokenizers", "poe-cascade")


def prepare_output(folder: Path, resume: bool) -> Path:
    """Return `folder`, made if it is missing. Refuses one that holds something, unless `resume` finds a run there."""
    folder = folder.expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = sorted(p.name for p in folder.iterdir() if p.name not in LEFTOVERS)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "no permission to write")
    except OSError as error:
        raise OutputError(f"The output folder {folder} cannot be used: {error.strerror or error}.") from error
    resumable = has_checkpoint(folder / "checkpoint")
    if resume and not resumable:
        raise TrainingError(f"Nothing to resume: there is no checkpoint in {folder}. Start without --resume.")
    if content and not resume:
        hint = "It holds an unfinished run: continue it with --resume. " if resumable else ""
        raise OutputError(
            f"The output folder {folder} is not empty ({', '.join(content[:4])}{', ...' if len(content) > 4 else ''}). "
            f"{hint}Choose another with --out, or empty it."
        )
    return folder


def environment() -> dict[str, Any]:
    """Versions and hardware, as training.json records them."""
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


def write_training_json(folder: Path, record: Mapping[str, Any]) -> None:
    (folder / "training.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def plot_history(path: Path, history: Any) -> bool:
    """Draw training loss and val bits per byte to a PNG; returns False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps = [record["step"] for record in history.steps]
    axes.plot(steps, [record["loss"] for record in history.steps], color="#b0b8c4", linewidth=1, label="training loss")
    axes.set(xlabel="step", ylabel="loss (nats per trained token)", ylim=(0, None))
    if history.evals:
        right = axes.twinx()
        right.plot(
            [e["step"] for e in history.evals],
            [e["val_bpb"] for e in history.evals],
            "o-",
            color="#c2410c",
            label="val",
        )
        right.set(ylabel="val bits per byte", ylim=(0, None))
    figure.suptitle("training loss (grey) and validation bits per byte (orange)", fontsize=10)
    figure.savefig(path, dpi=120)
    return True
