"""The parts that both programs share: their commands, errors as one message, exit codes, `--version`."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from poe import __version__
from poe.errors import PoEError, explain_memory
from poe.stages.familiar_fields import advise
from poe.training.reporting.progress import PlainConsole, console

if TYPE_CHECKING:
    from poe.training.parallel.distributed import World

FAILED, INTERRUPTED = 1, 130
out, err = PlainConsole(), console()

Repo = Annotated[str, typer.Argument(help="A base or a stage: folder, Hub id, or 'demo'.", show_default=False)]
Device = Annotated[
    str, typer.Option(help="Device to run on: auto (the GPU, if there is one), cpu, cuda, cuda:1, or mps.")
]
Base = Annotated[str | None, typer.Option(help="The stage's base, if it is not where the stage's config says.")]


class Command(TyperCommand):
    """A command that silences the libraries before it runs. Help and completion do not import them.

    An option of another trainer is answered with the option that does the same job here.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # Typer's NoSuchOption has no public name
            if advice := advise(getattr(error, "option_name", "")):
                error.message, error.possibilities = f"{error.message}.{advice}", None  # type: ignore[attr-defined]
            raise

    def invoke(self, ctx: Any) -> Any:
        silence_libraries()
        return super().invoke(ctx)


class Program(typer.Typer):
    """A Typer application with `Command` as the class of its commands."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(no_args_is_help=True, rich_markup_mode="rich", **settings)

    def command(self, name: str | None = None, *, cls: type[TyperCommand] = Command, **settings: Any) -> Any:  # type: ignore[override]
        return super().command(name, cls=cls, **settings)


def print_version(wanted: bool) -> None:
    """Print the versions that a bug report needs, and exit."""
    if wanted:
        versions = {"poe-cascade": __version__, **{name: metadata.version(name) for name in ("torch", "transformers")}}
        out.print(", ".join(f"{name} {number}" for name, number in versions.items()), markup=False)
        raise typer.Exit


def add_version(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Print the versions and exit."),
    ] = False,
) -> None:
    """Add `--version` to a program, as the callback of its Typer application."""


def run(app: typer.Typer, name: str) -> None:
    """Run a program under its name and exit.

    Exit codes: 0 success, 1 failed with one message, 2 wrong usage, 130 interrupted. Typer sets the last two.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _open_missing_streams()
    code: Any = FAILED
    advice = (
        "Lower --max-new-tokens where there is one, give fewer or shorter texts, choose a smaller base, or use a "
        "machine with more memory."
    )
    try:
        with explain_memory("This command", advice):
            app(prog_name=name)
    except PoEError as error:
        err.print(f"error: {error}", markup=False, style="red")
    except OSError as error:  # where no room expected it: still one message
        err.print(f"error: {error}. Check the place, its permissions and its free space.", markup=False, style="red")
    except SystemExit as stop:
        code = stop.code
    sys.exit(_flush_streams() or code)


def _open_missing_streams() -> None:
    """Open /dev/null in place of closed standard streams: else a result could get the number of one of them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number


def _flush_streams() -> int:
    """Flush standard output and standard error, and return the exit code for results that were not received."""
    code = 0
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError) as error:
            if stream is sys.stdout:
                code = FAILED
                if not isinstance(error, BrokenPipeError):
                    err.print(f"error: standard output could not be written: {error}", markup=False, style="red")
            with contextlib.suppress(OSError, ValueError):  # the interpreter flushes them once more
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


@contextlib.contextmanager
def join_processes(device: str = "auto") -> "Iterator[World]":
    """Join the processes of a launcher. The main one prints; an error is printed once, by a process that raised it."""
    from poe.training.parallel.distributed import SINGLE_PROCESS, join_world

    world = SINGLE_PROCESS
    try:
        with join_world(device) as world:
            out.quiet = err.quiet = not world.is_main
            yield world
    except PoEError as error:
        if world.size == 1:
            raise
        with world.report_once(str(error)) as is_reporter:
            err.quiet = not is_reporter
            rank = "" if world.is_main else f" (rank {world.rank} of {world.size})"
            err.print(f"error{rank}: {error}", markup=False, style="red")
        raise typer.Exit(FAILED) from None
    finally:
        out.quiet = err.quiet = False


@contextlib.contextmanager
def interruptible(command: str, folder: Path, world: "World") -> Iterator[None]:
    """Turn Ctrl-C or another stop signal into exit code 130 and one line: what was saved, and how to continue.

    Of several processes, one prints the line and the others wait for it, because a launcher ends all processes when
    the first one ends.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        steps = [int(path.parent.name.partition("-")[2]) for path in folder.glob("**/checkpoint-*[0-9]/meta.json")]
        has_candidates = (folder / "sweep.json").exists()
        saved = str(stop)
        if not saved and steps:
            saved = f"saved at step {max(steps)}"
        elif not saved and has_candidates:
            saved = "the finished candidates are saved"
        text = f"Stopped; {saved}." if saved else "Stopped before the first checkpoint: nothing was saved."
        if steps or has_candidates:
            text += f" To continue: {command} --out {folder} --resume, with the same options."
        with world.report_once("interrupted") as is_reporter:
            err.quiet = not is_reporter
            err.print(text, markup=False)
        raise typer.Exit(INTERRUPTED) from None


def silence_libraries() -> None:
    """Turn off the progress bars and warnings of the libraries. Their errors are still printed."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
