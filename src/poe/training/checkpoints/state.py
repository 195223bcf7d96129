"""The state of a run in a checkpoint: what all processes share, written by the main one, and what each has to itself.

`weights` and, where they are others, `best`; `optimizer-RANK` and `rng-RANK` from every process. A run may be continued
by another number of processes: the optimizer's shards are joined and divided anew.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from poe.training.checkpoints.files import (
    begin_checkpoint,
    finish_checkpoint,
    join_shards,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    unfinished,
    write_group,
)
from poe.training.checkpoints.rng import restore_rng, rng_state
from poe.training.optim import MuonAdamW
from poe.training.parallel.distributed import World

Named = Iterable[tuple[str, nn.Parameter]]
OPTIMIZER, RNG = "optimizer", "rng"


class State(NamedTuple):
    """What all processes have in common; `best` is empty where the weights are the best ones."""

    step: int
    weights: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    identity: Mapping[str, Any]
    history: Mapping[str, Any]


def write_state(run: Path, state: State, optimizer: MuonAdamW, parameters: Named, world: World, keep: int) -> None:
    """Write a checkpoint, every process its part, and keep the `keep` newest. Raises `OutputError`."""
    new = unfinished(run, state.step)
    if world.is_main:
        begin_checkpoint(run, state.step)
        write_group(new, "weights", state.weights)
        if state.best:
            write_group(new, "best", state.best)
    world.barrier()
    write_group(new, f"{OPTIMIZER}-{world.rank}", *optimizer_tensors(optimizer, _names(optimizer, parameters)))
    write_group(new, f"{RNG}-{world.rank}", *rng_state())
    world.barrier()
    if world.is_main:
        meta = {"step": state.step, "identity": state.identity, "history": state.history}
        finish_checkpoint(new, meta, keep)
    world.barrier()  # none may leave, and so end the others, while it is being written


def read_state(
    run: Path,
    optimizer: MuonAdamW,
    parameters: Named,
    world: World,
    note: Callable[[str], None],
    check: Callable[[Mapping[str, Any]], None],
) -> State:
    """Read the newest whole checkpoint, put back what a process has to itself, and return the rest.

    `check` is given the identity of the run that wrote it, before anything is put back. Raises `TrainingError`.
    """
    groups, meta = load_checkpoint(run, note)
    notes = meta["notes"]
    check(meta["identity"])
    shards = [(groups[stem], notes[stem]) for stem in groups if stem.startswith(f"{OPTIMIZER}-")]
    restore_optimizer(optimizer, _names(optimizer, parameters), *join_shards(shards))
    if (own := f"{RNG}-{world.rank}") in groups:  # fewer processes may have written it
        restore_rng(groups[own], notes[own])
    return State(meta["step"], groups["weights"], groups.get("best", {}), meta["identity"], meta["history"])


def _names(optimizer: MuonAdamW, parameters: Named) -> list[str]:
    """The names of the parameters in the order of the optimizer's groups."""
    names = {id(p): name for name, p in parameters}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
