"""Several processes as one run: the process group, and the values that the processes exchange.

`torchrun` and `accelerate launch` start the same program once per device and describe the group in the environment
(RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). Numbers travel through the process group (gloo on CPUs, NCCL
on GPUs). JSON values, and waits that may be long, go through the launcher's key-value store. Without a launcher there
is a single process and no group.
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
from functools import cached_property
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from poe.errors import RecipeError, TrainingError
from poe.stages.recipe import Plan
from poe.training.precision import choose_device

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # how long a process waits for the others before it fails
REPORT_TIMEOUT_S = 10.0  # how long the other processes wait until one has reported the error
_LOST_PROCESS_MESSAGES = (
    "gloo",
    "NCCL",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
)


@dataclass(frozen=True)
class World:
    """The processes of a run, and the place of this process among them.

    `rank` counts from 0 over all nodes, `local_rank` over this node. The process with rank 0 is the main process, the
    only one that writes and reports. `device` is the device of this process. All processes must call the same methods
    in the same order.
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
        """The process group; None for a single process."""
        return dist.group.WORLD if self.size > 1 else None

    @cached_property
    def _patient_group(self) -> "dist.ProcessGroup":
        """The same processes on CPUs, for waits that may be long."""
        return dist.new_group(backend="gloo", timeout=timedelta(days=30))

    def own_rows(self, num_rows: int) -> slice:
        """Return this process's rows of a step: equal parts, in the order of the ranks."""
        own = num_rows // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def split_rows(self, num_rows: int, rows_per_part: int) -> Iterator[range]:
        """Yield this process's parts of `num_rows` rows; all processes get equally many, of which some are empty."""
        for start in range(0, num_rows, rows_per_part * self.size):
            first = start + self.rank * rows_per_part
            yield range(min(first, num_rows), min(first + rows_per_part, num_rows))

    def all_reduce(self, *values: float) -> list[float]:
        """Return the sum of each value over all processes, in float64; the bits are the same in every process."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def any_process(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set in any process."""
        return [total > 0 for total in self.all_reduce(*flags)]

    def barrier(self) -> None:
        """Wait until all processes call this, for at most `COLLECTIVE_TIMEOUT`."""
        self.all_reduce(0.0)

    def broadcast(self, value: T | None = None) -> T:
        """Return the main process's `value`, a JSON value, in every process. There is no timeout."""
        if self.size == 1:
            return value  # type: ignore[return-value]
        key = f"poe/broadcast/{next(self._turns)}"
        if self.is_main:
            self._set(key, value)
        return self._wait(key)

    def gather(self, value: T) -> list[T]:
        """Return the JSON values of all processes, in the order of the ranks, in the main process, and [] in others.

        All wait until the last one calls this. There is no timeout, but the death of a process is an error.
        """
        if self.size == 1:
            return [value]
        key = f"poe/gather/{next(self._turns)}"
        self._set(f"{key}/{self.rank}", value)
        dist.barrier(self._patient_group)  # a wait for the key of a process that died would not end
        return [self._wait(f"{key}/{rank}") for rank in range(self.size)] if self.is_main else []

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the block in the main process first, then in the first process of every other node, then in the rest.

        So a cache is filled once per disk, and the other processes read it. If the block fails in one process, the
        processes that wait for it raise its message as a `TrainingError`.
        """
        if self.size == 1:
            yield
            return
        key = f"poe/turn/{next(self._turns)}"
        first_on_node = self.rank - self.local_rank  # launchers number the processes node by node
        if not self.is_main and (failure := self._wait(f"{key}/{first_on_node if self.local_rank else 0}")):
            self._set(f"{key}/{self.rank}", failure)
            raise TrainingError(failure)
        try:
            yield
        except BaseException as error:
            self._claim_report(str(error))  # this process reports the error
            self._set(f"{key}/{self.rank}", str(error) or type(error).__name__)
            raise
        self._set(f"{key}/{self.rank}", "")

    def check_equal(self, facts: dict[str, Any]) -> None:
        """Raise `TrainingError` if a fact, a JSON value, differs from that of the main process."""
        own = json.loads(json.dumps(facts))
        main = self.broadcast(own)
        if different := [f"{k}: {main.get(k)!r} -> {v!r}" for k, v in own.items() if main.get(k) != v]:
            raise TrainingError(
                f"Rank {self.rank} of {self.size} would do something else than rank 0 (rank 0 -> this rank): "
                f"{'; '.join(different)}. Start all of them with the same options, data and package."
            )

    @contextlib.contextmanager
    def report_once(self, text: str) -> Iterator[bool]:
        """Yield True in one of the processes that call this with `text`; the others leave the block after that one.

        A launcher ends all processes when the first of them fails, so no process may leave before the report is out.
        """
        reporter = self._claim_report(text)
        key = f"poe/reported/{_digest(text)}"
        try:
            yield reporter == self.rank
        finally:
            with contextlib.suppress(RuntimeError):
                if reporter == self.rank:
                    self._set(key, True)
                else:
                    self._wait(key, REPORT_TIMEOUT_S)

    def _claim_report(self, text: str) -> int:
        """Return the rank of the first process that claimed to report `text`; this rank if the store is gone."""
        if self.store is None:
            return self.rank
        with contextlib.suppress(RuntimeError):
            reporter = self.store.compare_set(f"poe/reporter/{_digest(text)}", "", str(self.rank))
            return int(reporter.decode())
        return self.rank

    def _set(self, key: str, value: Any) -> None:
        if self.store is not None:
            self.store.set(key, json.dumps(value))

    def _wait(self, key: str, timeout_s: float | None = None) -> Any:
        """Return the JSON value of a key when it is set; None after `timeout_s`.

        The wait ends with an error when the process that holds the store ends: rank 0 or the launcher.
        """
        assert self.store is not None
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self.store.check([key]):
            if deadline is not None and time.monotonic() > deadline:
                return None
            time.sleep(0.02)
        return json.loads(self.store.get(key).decode())


SINGLE_PROCESS = World()


@contextlib.contextmanager
def join_world(device_name: str = "auto") -> Iterator[World]:
    """Join the processes that the launcher started, and leave the group at the end, after errors as well.

    A single process without a launcher is `World()` on the device `device_name` (`choose_device`). With a launcher each
    process has the GPU of its local rank, or the CPU. When another process dies, a wait for it raises a `TrainingError`
    with the way to continue. Raises `TrainingError` for an incomplete environment.
    """
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if size == 1:
        yield World(device=choose_device(device_name))
        return
    if device_name != "auto":
        raise TrainingError(
            f"device {device_name} does not apply to the {size} processes of a launcher: each takes the GPU of its "
            "local rank, or the CPU. Leave it out, or hide GPUs with CUDA_VISIBLE_DEVICES."
        )
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise TrainingError(
            f"WORLD_SIZE is {size}, but {' and '.join(missing)} is not set: start the processes with torchrun or "
            "accelerate launch, or unset RANK and WORLD_SIZE to train with one."
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = _choose_device(local_rank)
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
        raise TrainingError(f"Process {os.environ['RANK']} could not connect to the others: {error}") from error
    world = World(rank, size, local_rank, device, store)
    try:
        yield world
    except BaseException as error:
        _ignore_sigterm()
        traceback.clear_frames(error.__traceback__)
        if _is_lost_process(error):
            raise TrainingError(
                f"Another of the {size} processes stopped, so this run stops too. What it had saved was kept: start "
                "it again with the same options, a training with --resume; the number of processes may change."
            ) from error
        raise
    finally:
        # gloo ends its threads when the last reference to the group is gone; at the interpreter's exit they abort it
        dist.destroy_process_group()
        gc.collect()


def count_rows_per_step(plan: Plan, world: World) -> int:
    """Return the rows of a step over all processes. Raises `RecipeError` if they cannot be divided evenly."""
    rows = plan.tokens_per_step // plan.seq_len
    if rows % world.size:
        multiple = world.size * plan.seq_len
        nearest = max(1, round(plan.tokens_per_step / multiple)) * multiple
        sizes = [n for n in range(1, rows + 1) if rows % n == 0]
        raise RecipeError(
            f"Recipe {plan.name!r}: tokens_per_step ({plan.tokens_per_step}) is {rows} rows of {plan.seq_len} tokens, "
            f"which {world.size} processes cannot share evenly. Expected a multiple of {multiple}, such as {nearest}, "
            f"or one of these numbers of processes: {', '.join(map(str, sizes))}."
        )
    return rows


def _choose_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise TrainingError(
            f"This node has {torch.cuda.device_count()} GPUs, but the launcher started its process {local_rank + 1}: "
            "start no more processes per node than it has GPUs (--nproc-per-node)."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _is_lost_process(error: BaseException) -> bool:
    """Return whether a collective failed because another process ended; gloo raises a bare RuntimeError."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and any(message in str(error) for message in _LOST_PROCESS_MESSAGES)


def _ignore_sigterm() -> None:
    """Ignore SIGTERM from now on, so that the launcher cannot end this process before it has reported its error."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
