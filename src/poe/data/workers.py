"""A map over processes whose results come in order, so that the number of workers changes nothing but the time."""

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from poe.errors import DataError

T = TypeVar("T")
R = TypeVar("R")

_work: Callable[[Any], Any] | None = None
_FORKS = sys.platform == "linux"  # macOS has fork too, but its own libraries do not survive it


def default_workers() -> int:
    """`$POE_WORKERS`, else one process per core that this process may use, at most eight.

    One where processes cannot be forked: there each would import everything anew, and a script without
    `if __name__ == "__main__"` would run again in each.
    """
    if (asked := os.environ.get("POE_WORKERS", "")).isdigit():
        return max(1, int(asked))
    if not _FORKS:
        return 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, usable)


def ordered_map(work: Callable[[T], R], tasks: Iterable[T], workers: int) -> Iterator[R]:
    """Yield `work(task)` for every task, in order. With `workers` > 1, that many processes work ahead by a few tasks.

    `work` is handed to the processes once. What it raises is raised here; a process that dies (out of memory, killed)
    is a `DataError`.
    """
    if workers <= 1:
        yield from map(work, tasks)
        return
    method = "fork" if _FORKS else "spawn"
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), _begin, (work,))
    waiting: deque[Future[R]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(_do, task))
            if len(waiting) > 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "A process that prepared rows was ended from outside (out of memory?). Try again with fewer workers "
            "(POE_WORKERS=1)."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the pool


def _do(task: Any) -> Any:
    assert _work is not None
    return _work(task)
