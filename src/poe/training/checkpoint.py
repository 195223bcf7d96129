"""Checkpoints: everything a run needs to continue as if it had not stopped, in safetensors and JSON.

A checkpoint is a folder, written under another name and renamed when it is whole, so that a run killed at any moment
finds either the new one or the one before it.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from poe.errors import OutputError, TrainingError

Tensors = dict[str, torch.Tensor]
_SEPARATOR = "::"  # between a parameter's name and a key of its optimiser state


def save_checkpoint(folder: Path, groups: dict[str, Tensors], meta: dict[str, Any]) -> None:
    """Write `groups` (file stem -> tensors) and `meta`, replacing the checkpoint in `folder` when all is on disk.

    Raises `OutputError` when the disk is full or not writable; the checkpoint that was there stays.
    """
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        for stem, tensors in groups.items():
            save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, new / f"{stem}.safetensors")
        (new / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        for path in new.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        raise OutputError(
            f"The checkpoint {folder} could not be written: {error}. The one before it, if any, is kept: free some "
            "space, then continue with --resume."
        ) from error


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Return the groups and meta of the newest whole checkpoint. Raises `TrainingError` when there is none."""
    for candidate in (folder, folder.with_name(folder.name + ".old")):
        meta_file = candidate / "meta.json"
        if not meta_file.is_file():
            continue
        try:
            meta = json.loads(meta_file.read_text(encoding="utf-8"))
            return {path.stem: load_file(path) for path in sorted(candidate.glob("*.safetensors"))}, meta
        except (OSError, ValueError, SafetensorError) as error:
            raise TrainingError(
                f"The checkpoint {candidate} cannot be read: {error}. Remove it, and start the run again."
            ) from error
    raise TrainingError(f"Nothing to resume: there is no checkpoint in {folder.parent}. Start without --resume.")


def has_checkpoint(folder: Path) -> bool:
    return any((folder.with_name(folder.name + end) / "meta.json").is_file() for end in ("", ".old"))


def remove_checkpoint(folder: Path) -> None:
    for end in ("", ".old", ".new"):
        with contextlib.suppress(OSError):
            shutil.rmtree(folder.with_name(folder.name + end))


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> tuple[Tensors, dict[str, Any]]:
    """Flatten an optimiser's state into tensors named `parameter::key`, and its plain numbers by the same names.

    `names` are those of the parameters in the order of the optimiser's groups.
    """
    tensors: Tensors = {}
    numbers: dict[str, Any] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            name = f"{names[index]}{_SEPARATOR}{key}"
            if isinstance(value, torch.Tensor):
                tensors[name] = value
            else:
                numbers[name] = value
    return tensors, numbers


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: list[str], tensors: Tensors, numbers: dict[str, Any]
) -> None:
    """Put back what `optimizer_tensors` returned."""
    state: dict[int, dict[str, Any]] = {}
    index_of = {name: index for index, name in enumerate(names)}
    for name, value in [*tensors.items(), *numbers.items()]:
        parameter, _, key = name.rpartition(_SEPARATOR)
        if parameter not in index_of:
            raise TrainingError(
                f"The checkpoint holds optimiser state of {parameter!r}, which this run does not train."
            )
        state.setdefault(index_of[parameter], {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
