"""A live line on a terminal, plain lines in a log."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

PLAIN_EVERY_S = 10.0


def console() -> Console:
    """The console that runs report to: standard error, so that results can be piped."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


class Progress:
    """Shows step, loss, tokens/s and time left, and a line for every validation."""

    def __init__(self, title: str, quiet: bool = False) -> None:
        self.title = title
        self.quiet = quiet
        self.console = console()
        self._live: RichProgress | None = None
        self._last_line = 0.0
        self._smooth_loss: float | None = None
        self._steps = 0
        self._started = time.monotonic()
        self._first = 0

    def start(self, step: int, num_steps: int) -> None:
        self._steps, self._first, self._started = num_steps, step, time.monotonic()
        if self.quiet or not sys.stderr.isatty():
            return
        self._live = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn(
                "{task.completed}/{task.total} steps · loss {task.fields[loss]:.3f} · {task.fields[speed]:,.0f} tok/s"
            ),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._live.add_task(self.title, total=num_steps, completed=step, loss=float("nan"), speed=0.0)
        self._live.start()

    def step(self, step: int, loss: float, tokens_per_s: float) -> None:
        smooth = self._smooth_loss
        self._smooth_loss = loss if smooth is None else 0.9 * smooth + 0.1 * loss
        if self._live is not None:
            self._live.update(self._task, completed=step, loss=self._smooth_loss, speed=tokens_per_s)
        elif not self.quiet and (time.monotonic() - self._last_line > PLAIN_EVERY_S or step == self._steps):
            self._last_line = time.monotonic()
            left = (time.monotonic() - self._started) / max(step - self._first, 1) * (self._steps - step)
            self.console.print(
                f"{self.title}: step {step}/{self._steps}  loss {self._smooth_loss:.3f}  {tokens_per_s:,.0f} tok/s  "
                f"{left / 60:.1f} min left"
            )

    def evaluated(self, step: int, bpb: float) -> None:
        self.note(f"step {step}: val bpb {bpb:.4f}")

    def note(self, text: str) -> None:
        if not self.quiet:
            self.console.print(f"{self.title}: {text}")

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
