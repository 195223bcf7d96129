"""Stopping a run. Ctrl-C, SIGTERM and SIGHUP (a closed terminal) do the same.

While a run trains or saves, the first signal lets it finish the step or the save. At any other time it raises
`KeyboardInterrupt`, so what is half done is cleaned up.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """The run was stopped by a signal, after it saved a checkpoint or its result. The message is what was saved."""


@contextmanager
def stop_signals_raise() -> Iterator[None]:
    """Raise `KeyboardInterrupt` for every stop signal inside the block."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handle_stop_signals(interrupt):
        yield


class StopRequest:
    """True after the first stop signal inside `catch_signals`; a second one stops the run at once."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._end = ""
        self.requested = False

    def __bool__(self) -> bool:
        return self.requested

    @contextmanager
    def catch_signals(self, end: str) -> Iterator[None]:
        """Take note of the stop signals inside the block. `end` is where the run stops: "after this step"."""
        self._end = end
        with _handle_stop_signals(self._request):
            yield

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._note(f"stopping {self._end}; press Ctrl-C again to stop at once")


@contextmanager
def _handle_stop_signals(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Handle the stop signals inside the block. Python allows this in the main thread only; others do nothing.

    A signal that is ignored stays ignored: `nohup` ignores SIGHUP.
    """
    previous: dict[signal.Signals, Any] = {}
    try:
        for number in STOP_SIGNALS:
            if (before := signal.getsignal(number)) not in (signal.SIG_IGN, None):
                signal.signal(number, handler)
                previous[number] = before
    except ValueError:
        pass
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
