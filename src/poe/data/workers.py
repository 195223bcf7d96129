"""Map a function over processes and return the results in order, so the number of workers does not change them."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from poe.errors import DataError

T = TypeVar("T")
R = TypeVar("R")

_function: Callable[[Any], Any] | None = None  # in a worker process
_CAN_FORK = sys.platform == "linux"  # macOS can fork, but its system libraries fail in a forked process


def default_workers() -> int:
    """Return `$POE_WORKERS`, or one process per usable core, at most eight.

    Return 1 where processes cannot be forked: each process would import all modules again, and a script without
    `if __name__ == "__main__"` would run again in each process.
    """
    if (setting := os.environ.get("POE_WORKERS", "")).isdigit():
        return max(1, int(setting))
    if not _CAN_FORK:
        return 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, usable)


def ordered_map(function: Callable[[T], R], tasks: Iterable[T], workers: int) -> Iterator[R]:
    """Yield `function(task)` for every task, in order. With `workers` > 1, that many processes work a few tasks ahead.

    `function` is sent to each process once. Its exceptions are raised here. A process that dies (out of memory, killed)
    raises `DataError`.
    """
    if workers <= 1:
        yield from map(function, tasks)
        return
    method = "fork" if _CAN_FORK else "spawn"
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), _start_worker, (function,))
    pending: deque[Future[R]] = deque()
    try:
        for task in tasks:
            pending.append(pool.submit(_run_task, task))
            if len(pending) > 3 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "A process that prepared rows was killed, possibly for lack of memory. Try again with fewer workers "
            "(POE_WORKERS=1)."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they reach all processes; the parent stops the pool
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent is gone, also if the parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _run_task(task: Any) -> Any:
    assert _function is not None
    return _function(task)
