"""Being asked to stop: Ctrl-C and SIGTERM let a run finish its step and save."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has saved a checkpoint."""


class StopRequest:
    """True from the first Ctrl-C or SIGTERM inside `watched`; a second one stops at once."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self.made = False

    def __bool__(self) -> bool:
        return self.made

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Catch the two signals; outside the main thread they are the caller's."""
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
        if self.made:
            raise KeyboardInterrupt
        self.made = True
        self._note("stopping after this step; once more to stop at once")
