"""The state of a run as a checkpoint.

The main process writes `weights` and, if they differ, `best`; every process writes `optimizer-RANK` and `rng-RANK`. Any
number of processes can continue a run: the optimizer's shards are joined and divided again.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from poe.training.checkpoints.files import (
    begin_checkpoint,
    finish_checkpoint,
    load_checkpoint,
    unfinished_folder,
    write_group,
)
from poe.training.checkpoints.optimizer_state import join_shards, optimizer_tensors, restore_optimizer
from poe.training.checkpoints.rng import restore_rng, rng_state
from poe.training.optim import MuonAdamW
from poe.training.parallel.distributed import World

NamedParameters = Iterable[tuple[str, nn.Parameter]]
OPTIMIZER, RNG = "optimizer", "rng"


class RunState(NamedTuple):
    """The state that all processes share; `best_weights` is empty when the current weights are the best."""

    step: int
    weights: Mapping[str, Tensor]
    best_weights: Mapping[str, Tensor]
    identity: Mapping[str, Any]
    history: Mapping[str, Any]


def save_state(
    run: Path, state: RunState, optimizer: MuonAdamW, parameters: NamedParameters, world: World, keep: int
) -> None:
    """Write a checkpoint, every process its own part, and keep the `keep` newest. Raises `OutputError`."""
    new = unfinished_folder(run, state.step)
    if world.is_main:
        begin_checkpoint(run, state.step)
        write_group(new, "weights", state.weights)
        if state.best_weights:
            write_group(new, "best", state.best_weights)
    world.barrier()
    names = _optimizer_order(optimizer, parameters)
    write_group(new, f"{OPTIMIZER}-{world.rank}", *optimizer_tensors(optimizer, names))
    write_group(new, f"{RNG}-{world.rank}", *rng_state())
    world.barrier()
    if world.is_main:
        meta = {"step": state.step, "identity": state.identity, "history": state.history}
        finish_checkpoint(new, meta, keep)
    world.barrier()  # a process that ended now would make the launcher end the main one while it writes


def load_state(
    run: Path,
    optimizer: MuonAdamW,
    parameters: NamedParameters,
    world: World,
    note: Callable[[str], None],
    check_identity: Callable[[Mapping[str, Any]], None],
) -> RunState:
    """Read the newest whole checkpoint, restore the optimizer and the random generators, and return the shared state.

    `check_identity` receives the saved identity before anything is restored. Raises `TrainingError`.
    """
    groups, meta = load_checkpoint(run, note)
    notes = meta["notes"]
    check_identity(meta["identity"])
    shards = [(groups[stem], notes[stem]) for stem in groups if stem.startswith(f"{OPTIMIZER}-")]
    restore_optimizer(optimizer, _optimizer_order(optimizer, parameters), *join_shards(shards))
    if (own_rng := f"{RNG}-{world.rank}") in groups:  # missing if fewer processes wrote the checkpoint
        restore_rng(groups[own_rng], notes[own_rng])
    return RunState(meta["step"], groups["weights"], groups.get("best", {}), meta["identity"], meta["history"])


def _optimizer_order(optimizer: MuonAdamW, parameters: NamedParameters) -> list[str]:
    """Return the names of the parameters in the order of the optimizer's groups."""
    names = {id(p): name for name, p in parameters}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
