"""Many processes as one run: what the launcher says, and the few things that the processes tell one another.

`torchrun` and `accelerate launch` start the same program once per device and describe the group in the environment
(RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). Numbers travel through the process group (gloo on CPUs, NCCL
on GPUs); words, and waiting that may take long, through the launcher's key-value store, as JSON. Without a launcher
there is one process and none of this happens.
"""

import contextlib
import gc
import hashlib
import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from poe.errors import RecipeError, TrainingError
from poe.stages.recipe import Plan
from poe.training.precision import default_device

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # a process that waits longer for the others gives up
LAST_WORDS = 10.0  # seconds that the others wait until one has said why the run ends
_LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this one is.

    `rank` counts over all nodes from 0, `local_rank` over this node; process 0 is the main one, the only one that
    writes and reports. `device` is where this process computes. All processes call the same methods in the same order.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    store: "dist.Store | None" = None
    _turns: "count[int]" = field(default_factory=count, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> "dist.ProcessGroup | None":
        """The process group, None for one process alone."""
        return dist.group.WORLD if self.size > 1 else None

    def own_rows(self, rows: int) -> slice:
        """This process's part of a step's rows: equal parts, in the order of the ranks."""
        own = rows // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def shares(self, rows: int, at_once: int) -> Iterator[range]:
        """This process's parts of `rows` rows, at most `at_once` each: as many parts in every process, some empty."""
        for start in range(0, rows, at_once * self.size):
            first = start + self.rank * at_once
            yield range(min(first, rows), min(first + at_once, rows))

    def all_sum(self, *values: float) -> list[float]:
        """The sum of each value over all processes, in float64; the same bits in every process."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def any_of(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set in any process."""
        return [total > 0 for total in self.all_sum(*flags)]

    def barrier(self) -> None:
        """Wait until all processes are here, for at most `COLLECTIVE_TIMEOUT`."""
        self.all_sum(0.0)

    def share(self, value: T | None = None) -> T:
        """Return the main process's `value` (what JSON holds) in every process; it may take as long as it wants."""
        if self.size == 1:
            return value  # type: ignore[return-value]
        key = f"poe/share/{next(self._turns)}"
        if self.is_main:
            self._set(key, value)
        return self._wait(key)

    @contextlib.contextmanager
    def in_order(self) -> Iterator[None]:
        """Let the main process through the block first, then the first of every other node, then the rest.

        What a process puts into a cache is thus made once per disk and found by the others. If the block fails in one
        process, those that wait for it raise its message as a `TrainingError`.
        """
        if self.size == 1:
            yield
            return
        key = f"poe/turn/{next(self._turns)}"
        first = self.rank - self.local_rank  # launchers number the processes node by node
        if not self.is_main and (failure := self._wait(f"{key}/{first if self.local_rank else 0}")):
            self._set(f"{key}/{self.rank}", failure)
            raise TrainingError(failure)
        try:
            yield
        except BaseException as error:
            self._speaker(str(error))  # it is this process's to say
            self._set(f"{key}/{self.rank}", str(error) or type(error).__name__)
            raise
        self._set(f"{key}/{self.rank}", "")

    def same(self, facts: dict[str, Any]) -> None:
        """Raise `TrainingError` where a fact (what JSON holds) is not that of the main process."""
        own = json.loads(json.dumps(facts))
        theirs = self.share(own)
        if changed := [f"{k}: {theirs.get(k)!r} -> {v!r}" for k, v in own.items() if theirs.get(k) != v]:
            raise TrainingError(
                f"Rank {self.rank} of {self.size} would train something else than rank 0 (there -> here): "
                f"{'; '.join(changed)}. Start all of them with the same options, data and package."
            )

    @contextlib.contextmanager
    def one_speaks(self, text: str) -> Iterator[bool]:
        """Yield True in one of the processes that have `text` to say; the others go on when it has said it.

        A launcher ends all processes when the first of them fails: none leaves before the message is out.
        """
        speaker = self._speaker(text)
        key = f"poe/said/{_digest(text)}"
        try:
            yield speaker == self.rank
        finally:
            with contextlib.suppress(RuntimeError):
                if speaker == self.rank:
                    self._set(key, True)
                else:
                    self._wait(key, LAST_WORDS)

    def _speaker(self, text: str) -> int:
        """The rank of the first process that asked to say `text`; this one's where the store is gone."""
        if self.store is None:
            return self.rank
        with contextlib.suppress(RuntimeError):
            said_by = self.store.compare_set(f"poe/speaker/{_digest(text)}", "", str(self.rank))
            return int(said_by.decode())
        return self.rank

    def _set(self, key: str, value: Any) -> None:
        if self.store is not None:
            self.store.set(key, json.dumps(value))

    def _wait(self, key: str, at_most: float | None = None) -> Any:
        """The JSON value of a key, once it is there. Rank 0 or the launcher holds the store: it ends with them."""
        assert self.store is not None
        deadline = None if at_most is None else time.monotonic() + at_most
        while not self.store.check([key]):
            if deadline is not None and time.monotonic() > deadline:
                return None
            time.sleep(0.02)
        return json.loads(self.store.get(key).decode())


ALONE = World()


@contextlib.contextmanager
def joined_world() -> Iterator[World]:
    """Join the processes that the launcher started, and leave them at the end, whatever happens.

    One process without a launcher is `World()` on the default device. When another process dies, what waits for it
    here becomes a `TrainingError` that says how to go on. Raises `TrainingError` for an incomplete environment.
    """
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if size == 1:
        yield World(device=default_device())
        return
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise TrainingError(
            f"WORLD_SIZE is {size}, but {' and '.join(missing)} is not set: start the processes with torchrun or "
            "accelerate launch, or unset RANK and WORLD_SIZE to train with one."
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = _device(local_rank)
    try:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT)))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("poe/group", store),
            rank=rank,
            world_size=size,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )
    except RuntimeError as error:
        raise TrainingError(f"Process {os.environ['RANK']} did not find the others: {error}") from error
    world = World(rank, size, local_rank, device, store)
    try:
        yield world
    except BaseException as error:
        _hold_signals()
        traceback.clear_frames(error.__traceback__)
        if _is_lost(error):
            raise TrainingError(
                f"Another of the {size} processes stopped, so this run stops too. The newest checkpoint, if any, was "
                "kept: go on from it with --resume and the same options; the number of processes may be another."
            ) from error
        raise
    finally:
        # gloo ends its threads when nobody holds the group any more; left to the interpreter's own end, they abort it
        dist.destroy_process_group()
        gc.collect()


def even_rows(plan: Plan, world: World) -> int:
    """The rows of a step, over all processes. Raises `RecipeError` when they cannot share them evenly."""
    rows = plan.tokens_per_step // plan.seq_len
    if rows % world.size:
        fitting = world.size * plan.seq_len
        near = max(1, round(plan.tokens_per_step / fitting)) * fitting
        numbers = [n for n in range(1, rows + 1) if rows % n == 0]
        raise RecipeError(
            f"Recipe {plan.name!r}: tokens_per_step ({plan.tokens_per_step}) is {rows} rows of {plan.seq_len} tokens, "
            f"which {world.size} processes cannot share evenly. Expected a multiple of {fitting}, such as {near}, or "
            f"one of these numbers of processes: {', '.join(map(str, numbers))}."
        )
    return rows


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise TrainingError(
            f"This node has {torch.cuda.device_count()} GPUs, so there is none for its process {local_rank + 1}: start "
            "no more processes per node than it has GPUs (--nproc-per-node)."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _is_lost(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone (gloo raises a bare RuntimeError)."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and any(mark in str(error) for mark in _LOST)


def _hold_signals() -> None:
    """From here on the process only says why it ends: the launcher's SIGTERM must not cut it off."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
