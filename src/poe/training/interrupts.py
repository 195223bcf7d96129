"""Stopping a run: after Ctrl-C or SIGTERM it finishes its step and saves a checkpoint."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """The run was stopped by Ctrl-C or SIGTERM, after it saved a checkpoint."""


class StopRequest:
    """True after the first Ctrl-C or SIGTERM inside `catch_signals`; a second one stops the run at once."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self.requested = False

    def __bool__(self) -> bool:
        return self.requested

    @contextmanager
    def catch_signals(self) -> Iterator[None]:
        """Handle the two signals inside the block. Python allows this in the main thread only; others do nothing."""
        try:
            previous = {s: signal.signal(s, self._request) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            yield
            return
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._note("stopping after this step; press Ctrl-C again to stop at once")
