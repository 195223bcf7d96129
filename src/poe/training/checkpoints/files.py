"""The files of a checkpoint: safetensors and JSON that a run needs to continue as if it had not stopped.

A checkpoint is a folder `checkpoint-STEP` in the folder of its run. It is written under a temporary name and renamed
when all files are on the disk, so a run that is killed at any moment leaves a whole checkpoint. Its meta.json is
written last and holds the size and the SHA-256 of every other file. A file that was damaged later is therefore
recognized, and the previous checkpoint is loaded.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from poe import __version__
from poe.errors import OutputError, TrainingError
from poe.files.output import flush

Tensors = dict[str, torch.Tensor]
_META = "meta.json"
_LAYOUT = 2  # version of the content of a checkpoint; increase it when that changes
_VERSION = {"layout": _LAYOUT, "version": __version__}
_NOTE = "note"  # the key of a group's JSON values in the header of its file
_READ_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError)
UNFINISHED = "checkpoint-*.new"  # a run that was killed while it wrote a checkpoint leaves such a folder


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints in a run's folder, whole or damaged, the highest step first."""
    folders = [path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in folders if path.is_dir()), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Return the number of steps that were done when the checkpoint was written."""
    return int(checkpoint.name.partition("-")[2])


def has_checkpoint(run: Path) -> bool:
    """Return whether there is a checkpoint to load; `load_checkpoint` checks whether it is whole."""
    return any((path / _META).is_file() for path in list_checkpoints(run))


def unfinished_folder(run: Path, step: int) -> Path:
    """Return the folder of a checkpoint while it is being written."""
    return run / f"checkpoint-{step}.new"


def begin_checkpoint(run: Path, step: int) -> Path:
    """Make the empty folder of a new checkpoint and return it. Raises `OutputError`.

    To write a checkpoint, one process calls this, every process calls `write_group`, and one calls `finish_checkpoint`.
    """
    new = unfinished_folder(run, step)
    with _convert_disk_errors(new):
        for path in run.glob(UNFINISHED):
            shutil.rmtree(path)
        new.mkdir()
    return new


def write_group(new: Path, stem: str, tensors: Mapping[str, torch.Tensor], note: Any = None) -> None:
    """Write `tensors` as one file into the folder of `begin_checkpoint`, with JSON values `note` in its header.

    Raises `OutputError`.
    """
    with _convert_disk_errors(new):
        path = new / f"{stem}.safetensors"
        on_cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        save_file(on_cpu, path, metadata=None if note is None else {_NOTE: json.dumps(note)})
        flush(path, recursive=False)


def finish_checkpoint(new: Path, meta: Mapping[str, Any], keep: int = 1) -> Path:
    """Write meta.json, rename the folder, and remove all checkpoints but the `keep` newest.

    Raises `OutputError` when the disk is full or not writable; the earlier checkpoints are kept.
    """
    folder = new.with_suffix("")
    with _convert_disk_errors(new):
        files = {path.name: [path.stat().st_size, _digest(path)] for path in sorted(new.iterdir())}
        (new / _META).write_text(json.dumps({**meta, **_VERSION, "files": files}), encoding="utf-8")
        flush(new / _META, recursive=False)
        flush(new, recursive=False)
        if folder.exists() and _is_whole(folder):  # the run was stopped right after this step, and resumed
            shutil.rmtree(new)
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
        flush(folder.parent, recursive=False)
    # A checkpoint of a later step is damaged: a resumed run would have started from it.
    later = [path for path in list_checkpoints(folder.parent) if step_of(path) > step_of(folder)]
    for path in [*later, *list_checkpoints(folder.parent)[len(later) + keep :]]:
        shutil.rmtree(path, ignore_errors=True)
    return folder


def load_checkpoint(
    run: Path, note: Callable[[str], None] = lambda text: None
) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Return the groups and the meta of the newest whole checkpoint; `note` receives a line for every damaged one.

    `meta["notes"]` holds the notes of `write_group` by file stem. Raises `TrainingError` when no checkpoint is whole.
    """
    damaged = []
    for folder in list_checkpoints(run):
        try:
            meta = _read_checked_meta(folder)
            check_version(meta, folder)
            files = {path.stem: path for path in sorted(folder.glob("*.safetensors"))}
            meta["notes"] = {stem: _read_note(path) for stem, path in files.items()}
            return {stem: load_file(path) for stem, path in files.items()}, meta
        except _READ_ERRORS as error:
            damaged.append(f"{folder.name} is not whole ({error})")
            note(f"{damaged[-1]}; trying the one before it")
    if damaged:
        raise TrainingError(
            f"Nothing to resume in {run}: {'; '.join(damaged)}. Remove these checkpoints, and start the run again."
        )
    raise TrainingError(f"Nothing to resume: there is no checkpoint in {run}. Start without --resume.")


def check_version(meta: Mapping[str, Any], folder: Path) -> None:
    """Raise `TrainingError` for the meta of a checkpoint that another version of the package wrote differently."""
    if meta.get("layout") != _LAYOUT:
        raise TrainingError(
            f"{folder} was written by poe-cascade {meta.get('version', 'of an older version')}, and this is "
            f"{__version__}, which writes checkpoints differently: continue with the version that began the run, or "
            "start it again in another folder."
        )


def remove_checkpoints(run: Path) -> None:
    """Remove every checkpoint of a run, unfinished ones included."""
    for path in [*list_checkpoints(run), *run.glob(UNFINISHED)]:
        with contextlib.suppress(OSError):
            shutil.rmtree(path)


def _read_checked_meta(folder: Path) -> dict[str, Any]:
    """Return the meta of a checkpoint. Raises one of `_READ_ERRORS`, with the reason, unless every file is intact."""
    if not (folder / _META).is_file():
        raise ValueError(f"{_META} is missing")
    meta = json.loads((folder / _META).read_text(encoding="utf-8"))
    for name, (size, digest) in meta["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != size:
            raise ValueError(f"{name} has {path.stat().st_size:,} bytes, not {size:,}")
        if _digest(path) != digest:
            raise ValueError(f"{name} was changed")
    return dict(meta)


def _read_note(path: Path) -> Any:
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get(_NOTE, "null"))


def _is_whole(folder: Path) -> bool:
    try:
        _read_checked_meta(folder)
    except _READ_ERRORS:
        return False
    return True


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _convert_disk_errors(new: Path) -> Iterator[None]:
    """Remove the unfinished folder `new` and raise `OutputError` when the disk reports an error."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        raise OutputError(
            f"The checkpoint {new.with_suffix('')} could not be written: {error}. The one before it, if any, is kept: "
            "free some space, then continue with --resume."
        ) from error
