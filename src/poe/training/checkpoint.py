"""Checkpoints: everything a run needs to continue as if it had not stopped, in safetensors and JSON.

A checkpoint is a folder, written under another name and renamed when it is whole, so that a run killed at any moment
finds either the new one or the one before it.
"""

import contextlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from poe.errors import OutputError, TrainingError
from poe.training.optim import MuonAdamW

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


def optimizer_tensors(optimizer: MuonAdamW, names: list[str]) -> tuple[Tensors, dict[str, Any]]:
    """Flatten an optimiser's state into tensors named `parameter::key`; with a process group, the own shard's.

    `names` are those of the parameters in the order of the optimiser's groups. The second value, JSON, is empty without
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

    Of a joined state, as of an unsharded one, a sharded optimiser takes its own part. Raises `TrainingError` for the
    state of a parameter that `names` lacks, of another shape, or of another shard.
    """
    shards = optimizer.shards
    here = (shards.rank, shards.world_size) if shards else (0, 1)
    saved = (numbers["rank"], numbers["world_size"]) if numbers else None
    if saved not in (None, here):
        raise TrainingError(
            f"The optimiser state is shard {saved[0]} of {saved[1]}, expected {here[0]} of {here[1]}: join all shards "
            "first, then any number of processes can take its part."
        )
    state: dict[int, dict[str, Any]] = {}
    index_of = {name: index for index, name in enumerate(names)}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in tensors.items():
        parameter, _, key = name.rpartition(_SEPARATOR)
        if parameter not in index_of:
            raise TrainingError(
                f"The checkpoint holds optimiser state of {parameter!r}, which this run does not train."
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
    of an unsharded optimiser stays as it is. Raises `TrainingError` when a part is missing or there twice.
    """
    ranks = sorted((numbers.get("rank", 0), numbers.get("world_size", 1)) for _, numbers in parts)
    if not ranks or ranks != [(rank, ranks[0][1]) for rank in range(ranks[0][1])]:
        named = ", ".join(f"{rank} of {world_size}" for rank, world_size in ranks) or "none"
        raise TrainingError(f"The optimiser state needs every shard of one run once, got {named}.")
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
            raise TrainingError(f"The optimiser state of {name!r} does not add up: its shards are not of one moment.")
        whole[name] = torch.cat([value for *_, value in found]).view(shape)
    return whole, {}
