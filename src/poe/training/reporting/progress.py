"""Progress of a run: live bars on a terminal (steps, epoch, validation), plain lines in a log."""

import contextlib
import io
import sys
import time
from collections.abc import Iterator
from typing import IO, Any, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.segment import Segment
from rich.table import Table

from poe.errors import escape_controls

LINE_INTERVAL_S = 10.0


class StandardError(io.TextIOBase):
    """Standard error, where a report may get lost but never ends a run.

    A terminal can be closed, `| head` can end, and the disk of a log can be full.
    """

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # None and closed streams included
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._stream.flush()

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return bool(self._stream.isatty())
        return False

    def fileno(self) -> int:
        return int(self._stream.fileno())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    @property
    def _stream(self) -> Any:
        # While bars are shown, rich replaces sys.stderr by a stream that prints above them, through this one.
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)


STANDARD_ERROR = StandardError()


class PlainConsole(Console):
    """A console for text from files: brackets are no markup, and no character of the text controls the terminal."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(highlight=False, soft_wrap=True, markup=False, emoji=False, **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield the segments of a renderable, with escaped control characters; styles stay."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(escape_controls(segment.text), segment.style)


def console() -> Console:
    """Return the console for reports: standard error, so that results on standard output can be piped."""
    return PlainConsole(file=cast(IO[str], STANDARD_ERROR))


class Progress:
    """Shows step, epoch, loss, tokens/s and time left, and a line for every validation.

    It shows bars if standard error is a terminal, and plain lines if it is a file, a pipe, or `TERM=dumb`.
    """

    def __init__(self, title: str, quiet: bool = False) -> None:
        self.title = title
        self.quiet = quiet
        self.console = console()
        self._live: RichProgress | None = None
        self._last_line = 0.0
        self._smooth_loss: float | None = None
        self._steps = 0
        self._steps_per_epoch = 0.0
        self._started = time.monotonic()
        self._first = 0
        self._work, self._work_started, self._share, self._last_beat = "", 0.0, 0.0, 0.0
        self._step: int | None = None

    def start(self, step: int, num_steps: int, steps_per_epoch: float) -> None:
        """Show the bars of a run that starts, or continues, after `step` steps."""
        self._steps, self._steps_per_epoch = num_steps, steps_per_epoch
        self._first, self._started = step, time.monotonic()
        if self.quiet or not self.console.is_interactive:
            return
        self._live = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._step_bar = self._live.add_task(self.title, total=num_steps, completed=step, text="")
        self._epoch_bar = self._live.add_task("", total=steps_per_epoch, visible=num_steps > steps_per_epoch, text="")
        self._eval_bar = self._live.add_task("validation", total=None, visible=False, text="")
        self._live.start()

    def begin(self, work: str, step: int | None = None) -> None:
        """Start to show the progress of a step, by the number of steps before it, or of a validation."""
        self._work, self._step, self._work_started, self._share = work, step, time.monotonic(), 0.0

    def show_share(self, share: float) -> None:
        """Show the share of the current step or validation that is done, 0 to 1."""
        self._share = share
        if self._live is not None and self._step is not None:
            self._live.update(self._step_bar, completed=self._step + share)
        self.beat()

    def beat(self) -> None:
        """Print a line in a log about a step or a validation that takes long, every `LINE_INTERVAL_S` seconds."""
        now = time.monotonic()
        if self.quiet or self._live is not None or now - max(self._work_started, self._last_beat) < LINE_INTERVAL_S:
            return
        self._last_beat = now
        share = f"{self._share:.0%} done after " if self._share else ""
        self.note(f"{self._work}: {share}{now - self._work_started:.0f} s")

    def show_step(self, step: int, loss: float, tokens_per_s: float) -> None:
        """Show a finished step. A log gets a line at most every `LINE_INTERVAL_S` seconds, and for the last step."""
        smooth = self._smooth_loss
        self._smooth_loss = loss if smooth is None else 0.9 * smooth + 0.1 * loss
        text = f"step {step}/{self._steps}  loss {self._smooth_loss:.3f}  {tokens_per_s:,.0f} tok/s"
        if self._live is not None:
            epoch = min(int((step - 1) / self._steps_per_epoch), self._epochs - 1)  # in which the step began, from 0
            self._live.update(self._step_bar, completed=step, text=text)
            self._live.update(
                self._epoch_bar,
                description=f"epoch {epoch + 1}/{self._epochs}",
                completed=step - epoch * self._steps_per_epoch,
            )
        elif not self.quiet and (time.monotonic() - self._last_line > LINE_INTERVAL_S or step == self._steps):
            self._last_line = time.monotonic()
            left = (time.monotonic() - self._started) / max(step - self._first, 1) * (self._steps - step)
            epoch_text = f"  epoch {step / self._steps_per_epoch:.2f}/{self._steps / self._steps_per_epoch:.2f}"
            self.console.print(f"{self.title}: {text}{epoch_text}  {left / 60:.1f} min left")

    @property
    def _epochs(self) -> int:
        return max(1, -int(-self._steps // self._steps_per_epoch))

    def show_validation(self, row: int, num_rows: int) -> None:
        """Show how many validation rows are done."""
        if self._live is not None:
            self._live.update(self._eval_bar, completed=row, total=num_rows, visible=row < num_rows)

    def report_validation(self, step: int, bpb: float) -> None:
        """Report the result of a validation, in bits per byte."""
        self.note(f"step {step}: val bpb {bpb:.4f}")

    def show_table(self, table: Table, line: str) -> None:
        """Show `table` on a terminal, or `line` in a log."""
        if self.quiet:
            return
        if self.console.is_interactive:
            self.console.print(table)
        else:
            self.note(line)

    def note(self, text: str) -> None:
        """Print a line with the title of the run."""
        if not self.quiet:
            self.console.print(f"{self.title}: {text}", markup=False)

    def stop(self) -> None:
        """Remove the bars."""
        if self._live is not None:
            self._live.stop()
            self._live = None
