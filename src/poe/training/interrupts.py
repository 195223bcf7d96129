"""Stopping a run. Ctrl-C, SIGTERM and SIGHUP (a closed terminal) do the same.

While a run trains, the first signal abandons the step or the validation at the next module of the network, and the run
saves the state before it. A save is finished first. At any other time a signal raises `KeyboardInterrupt`, so what is
half done is cleaned up.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """The run was stopped by a signal, after it saved a checkpoint or its result. The message is what was saved."""


class AbandonedPassError(Exception):
    """A forward or backward pass was left because of a stop signal; no weight has changed."""


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

    def leave_pass(self) -> None:
        """Raise `AbandonedPassError` if a stop is requested."""
        if self.requested:
            raise AbandonedPassError

    @contextmanager
    def leave_passes(self, on_module: Callable[[], None]) -> Iterator[None]:
        """Leave the forward and backward passes inside the block when a stop is requested, at the next module.

        `on_module` is called after every module. Modules that torch.compile traces cannot be left.
        """

        def check(*_: Any) -> None:
            on_module()
            self.leave_pass()

        def check_both_passes(module: nn.Module, args: Any, output: Any) -> None:
            check()
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(check)

        handle = register_module_forward_hook(check_both_passes)
        try:
            yield
        finally:
            handle.remove()

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
