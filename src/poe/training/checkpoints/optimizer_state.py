"""The optimizer's state as named tensors: one shard per process, and the whole state joined from all shards."""

import math
from typing import Any

import torch

from poe.errors import TrainingError
from poe.training.checkpoints.files import Tensors
from poe.training.optim import MuonAdamW

_SEPARATOR = "::"  # between the name of a parameter and a key of its optimizer state


def optimizer_tensors(optimizer: MuonAdamW, names: list[str]) -> tuple[Tensors, dict[str, Any]]:
    """Return an optimizer's state as tensors named `parameter::key`, and a JSON description of the shard.

    With a process group it is the state of this process's shard. `names` are the names of the parameters in the order
    of the optimizer's groups. The description is empty without a process group; else it holds `rank`, `world_size` and
    `cut`: the elements that the tensors of a cut parameter cover (name -> [start, stop, shape]).
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


def restore_optimizer(optimizer: MuonAdamW, names: list[str], tensors: Tensors, shard: dict[str, Any]) -> None:
    """Load the result of `optimizer_tensors` from this process, or of `join_shards` from all processes.

    A sharded optimizer takes its own part of a joined or unsharded state. Raises `TrainingError` for the state of a
    parameter that `names` lacks, of another shape, or of another shard.
    """
    shards = optimizer.shards
    expected = (shards.rank, shards.world_size) if shards else (0, 1)
    saved = (shard["rank"], shard["world_size"]) if shard else None
    if saved not in (None, expected):
        raise TrainingError(
            f"The optimizer state is shard {saved[0]} of {saved[1]}, expected {expected[0]} of {expected[1]}: join all "
            "shards first, then any number of processes can load its part."
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
            if value.shape == params[index].shape:  # a step count or a row variance has another shape: never cut
                value = shards.cut(params[index], value)
        state.setdefault(index, {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def join_shards(parts: list[tuple[Tensors, dict[str, Any]]]) -> tuple[Tensors, dict[str, Any]]:
    """Join the results of `optimizer_tensors` from every rank, in any order, into one whole state.

    The result is exactly the state of a single process, and any number of processes can continue from it. The one part
    of an unsharded optimizer is returned unchanged. Raises `TrainingError` when a part is missing or occurs twice.
    """
    ranks = sorted((shard.get("rank", 0), shard.get("world_size", 1)) for _, shard in parts)
    if not ranks or ranks != [(rank, ranks[0][1]) for rank in range(ranks[0][1])]:
        listed = ", ".join(f"{rank} of {world_size}" for rank, world_size in ranks) or "none"
        raise TrainingError(f"The optimizer state needs every shard of one run once, got {listed}.")
    whole: Tensors = {}
    pieces: dict[str, list[tuple[int, int, list[int], torch.Tensor]]] = {}
    for tensors, shard in parts:
        for name, value in tensors.items():
            piece = shard.get("cut", {}).get(name.rpartition(_SEPARATOR)[0])
            if piece is None or value.ndim == 0:  # not cut, or a step count
                whole[name] = value
            else:
                pieces.setdefault(name, []).append((*piece, value))
    for name, cut_pieces in pieces.items():
        cut_pieces.sort(key=lambda piece: piece[:2])
        shape, end = cut_pieces[0][2], 0
        for start, stop, _, value in cut_pieces:
            end = stop if start == end and value.numel() == stop - start else -1
        if end != math.prod(shape):
            raise TrainingError(
                f"The shards of the optimizer state of {name!r} do not cover it exactly: they are not from one moment."
            )
        whole[name] = torch.cat([value for *_, value in cut_pieces]).view(shape)
    return whole, {}
