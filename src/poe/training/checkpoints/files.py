"""Checkpoints: everything a run needs to continue as if it had not stopped, in safetensors and JSON.

A checkpoint is a folder `checkpoint-STEP` in the folder of its run. It is written under another name and takes its own
when all of it is on the disk, so a run killed at any moment finds a whole one. Its meta.json, written last, holds the
size and the SHA-256 of every other file: one that was damaged later is recognized, and the one before it is taken.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from poe.errors import OutputError, TrainingError
from poe.training.optim import MuonAdamW

Tensors = dict[str, torch.Tensor]
_SEPARATOR = "::"  # between a parameter's name and a key of its optimizer state
_META = "meta.json"
_NOTE = "note"
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError)
UNFINISHED = "checkpoint-*.new"  # what a run killed while it was writing leaves


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints in a run's folder, the newest (that of the highest step) first, whole or not."""
    found = [path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Return after how many steps a checkpoint was written."""
    return int(checkpoint.name.partition("-")[2])


def has_checkpoint(run: Path) -> bool:
    """Whether there is a checkpoint to try; whether it is whole, `load_checkpoint` finds out."""
    return any((path / _META).is_file() for path in checkpoints(run))


def save_checkpoint(
    run: Path, step: int, groups: Mapping[str, Mapping[str, torch.Tensor]], meta: Mapping[str, Any], keep: int = 1
) -> Path:
    """Write `groups` (file stem -> tensors) and `meta` as `run/checkpoint-STEP`, then remove all but the `keep` newest.

    Several processes may write one together: all call `write_group`, one of them `begin_checkpoint` before and
    `finish_checkpoint` after.

    Raises `OutputError` when the disk is full or not writable; the checkpoints that were there stay.
    """
    new = begin_checkpoint(run, step)
    for stem, tensors in groups.items():
        write_group(new, stem, tensors)
    return finish_checkpoint(new, meta, keep)


def unfinished(run: Path, step: int) -> Path:
    """Return where a checkpoint lies while it is written."""
    return run / f"checkpoint-{step}.new"


def begin_checkpoint(run: Path, step: int) -> Path:
    """Return an empty folder for the files of a checkpoint. Raises `OutputError`."""
    new = unfinished(run, step)
    with _said_plainly(new):
        for path in run.glob(UNFINISHED):
            shutil.rmtree(path)
        new.mkdir()
    return new


def write_group(new: Path, stem: str, tensors: Mapping[str, torch.Tensor], note: Any = None) -> None:
    """Write one file of tensors, and a note of JSON values in its header, into the folder of `begin_checkpoint`.

    Raises `OutputError`.
    """
    with _said_plainly(new):
        path = new / f"{stem}.safetensors"
        held = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        save_file(held, path, metadata=None if note is None else {_NOTE: json.dumps(note)})
        _flush(path)


def finish_checkpoint(new: Path, meta: Mapping[str, Any], keep: int = 1) -> Path:
    """Seal the folder with meta.json, give it its name, remove all but the `keep` newest. Raises `OutputError`."""
    folder = new.with_suffix("")
    with _said_plainly(new):
        files = {path.name: [path.stat().st_size, _digest(path)] for path in sorted(new.iterdir())}
        (new / _META).write_text(json.dumps({**meta, "files": files}), encoding="utf-8")
        _flush(new / _META)
        _flush(new)
        if folder.exists() and _is_whole(folder):  # a run that was stopped after this very step, and resumed
            shutil.rmtree(new)
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
        _flush(folder.parent)
    # What lies ahead of this step could not be read when the run was resumed, or the run would be there.
    ahead = [path for path in checkpoints(folder.parent) if step_of(path) > step_of(folder)]
    for path in [*ahead, *checkpoints(folder.parent)[len(ahead) + keep :]]:
        shutil.rmtree(path, ignore_errors=True)
    return folder


def load_checkpoint(
    run: Path, note: Callable[[str], None] = lambda text: None
) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Return the groups and the meta of the newest whole checkpoint; `note` is told of every broken one passed over.

    The meta's `notes` are those of `write_group`, by stem. Raises `TrainingError` when there is none.
    """
    passed_over = []
    for folder in checkpoints(run):
        try:
            meta = _checked_meta(folder)
            files = {path.stem: path for path in sorted(folder.glob("*.safetensors"))}
            meta["notes"] = {stem: _note(path) for stem, path in files.items()}
            return {stem: load_file(path) for stem, path in files.items()}, meta
        except _UNREADABLE as error:
            passed_over.append(f"{folder.name} is not whole ({error})")
            note(f"{passed_over[-1]}; trying the one before it")
    if passed_over:
        raise TrainingError(
            f"Nothing to resume in {run}: {'; '.join(passed_over)}. Remove what is there, and start the run again."
        )
    raise TrainingError(f"Nothing to resume: there is no checkpoint in {run}. Start without --resume.")


def remove_checkpoints(run: Path) -> None:
    """Remove every checkpoint of a run, unfinished ones too."""
    for path in [*checkpoints(run), *run.glob(UNFINISHED)]:
        with contextlib.suppress(OSError):
            shutil.rmtree(path)


def _checked_meta(folder: Path) -> dict[str, Any]:
    """Return the meta of a checkpoint; raises one of `_UNREADABLE`, with the reason, unless all of it is there."""
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


def _note(path: Path) -> Any:
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get(_NOTE, "null"))


def _is_whole(folder: Path) -> bool:
    try:
        _checked_meta(folder)
    except _UNREADABLE:
        return False
    return True


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _said_plainly(new: Path) -> Iterator[None]:
    """Turn what the disk says into an `OutputError`, leaving nothing half-written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        raise OutputError(
            f"The checkpoint {new.with_suffix('')} could not be written: {error}. The one before it, if any, is kept: "
            "free some space, then continue with --resume."
        ) from error


def optimizer_tensors(optimizer: MuonAdamW, names: list[str]) -> tuple[Tensors, dict[str, Any]]:
    """Flatten an optimizer's state into tensors named `parameter::key`; with a process group, the own shard's.

    `names` are those of the parameters in the order of the optimizer's groups. The second value, JSON, is empty without
    a process group; else it says which shard of how many this is (`rank`, `world_size`), and which elements of which
    shape a cut parameter's tensors are (`cut`: name -> [start, stop, shape]).
    """
    tensors: Tensors = {}
    cut: dict[str, Any] = {}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, state in optimizer.state_dict()["state"].items():
        piece = optimizer.shards.piece(params[index]) if optimizer.shards else None
        if piece and piece.stop - piece.start < params[index].numel():
            cut[names[index]] = [piece.start, piece.stop, list(params[index].shape)]
        tensors |= {f"{names[index]}{_SEPARATOR}{key}": value for key, value in state.items()}
    if optimizer.shards is None:
        return tensors, {}
    return tensors, {"rank": optimizer.shards.rank, "world_size": optimizer.shards.world_size, "cut": cut}


def restore_optimizer(optimizer: MuonAdamW, names: list[str], tensors: Tensors, numbers: dict[str, Any]) -> None:
    """Put back what `optimizer_tensors` returned here, or what `join_shards` made of all ranks' values.

    Of a joined state, as of an unsharded one, a sharded optimizer takes its own part. Raises `TrainingError` for the
    state of a parameter that `names` lacks, of another shape, or of another shard.
    """
    shards = optimizer.shards
    here = (shards.rank, shards.world_size) if shards else (0, 1)
    saved = (numbers["rank"], numbers["world_size"]) if numbers else None
    if saved not in (None, here):
        raise TrainingError(
            f"The optimizer state is shard {saved[0]} of {saved[1]}, expected {here[0]} of {here[1]}: join all shards "
            "first, then any number of processes can take its part."
        )
    state: dict[int, dict[str, Any]] = {}
    index_of = {name: index for index, name in enumerate(names)}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in tensors.items():
        parameter, _, key = name.rpartition(_SEPARATOR)
        if parameter not in index_of:
            raise TrainingError(
                f"The checkpoint holds optimizer state of {parameter!r}, which this run does not train."
            )
        index = index_of[parameter]
        if shards is not None and saved is None:
            if shards.piece(params[index]) is None:
                continue
            if value.shape == params[index].shape:  # the others, by step or by row, are never cut
                value = shards.cut(params[index], value)
        state.setdefault(index, {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def join_shards(parts: list[tuple[Tensors, dict[str, Any]]]) -> tuple[Tensors, dict[str, Any]]:
    """Make one whole state of what `optimizer_tensors` returned on every rank, in any order.

    Exact: it is the state that one process would hold, and any number of processes can continue from it. The one part
    of an unsharded optimizer stays as it is. Raises `TrainingError` when a part is missing or there twice.
    """
    ranks = sorted((numbers.get("rank", 0), numbers.get("world_size", 1)) for _, numbers in parts)
    if not ranks or ranks != [(rank, ranks[0][1]) for rank in range(ranks[0][1])]:
        named = ", ".join(f"{rank} of {world_size}" for rank, world_size in ranks) or "none"
        raise TrainingError(f"The optimizer state needs every shard of one run once, got {named}.")
    whole: Tensors = {}
    pieces: dict[str, list[tuple[int, int, list[int], torch.Tensor]]] = {}
    for tensors, numbers in parts:
        for name, value in tensors.items():
            piece = numbers.get("cut", {}).get(name.rpartition(_SEPARATOR)[0])
            if piece is None or value.ndim == 0:  # not cut, or a count of steps
                whole[name] = value
            else:
                pieces.setdefault(name, []).append((*piece, value))
    for name, found in pieces.items():
        found.sort(key=lambda piece: piece[:2])
        shape, end = found[0][2], 0
        for start, stop, _, value in found:
            end = stop if start == end and value.numel() == stop - start else -1
        if end != math.prod(shape):
            raise TrainingError(f"The optimizer state of {name!r} does not add up: its shards are not of one moment.")
        whole[name] = torch.cat([value for *_, value in found]).view(shape)
    return whole, {}
