"""What both programs share: options from recipes, errors as one message, exit codes."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from poe.errors import PoEError

if TYPE_CHECKING:
    from poe.training.parallel.distributed import World

FAILED, INTERRUPTED = 1, 130
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def run(app: typer.Typer) -> None:
    """Run a program: 0 done, 1 failed with one message, 2 wrong usage, 130 interrupted (typer's own, the last two)."""
    quieten()
    try:
        app()
    except PoEError as error:
        err.print(f"error: {error}", markup=False, style="red")
        sys.exit(FAILED)


@contextlib.contextmanager
def interruptible(command: str, folder: Path, world: "World") -> Iterator[None]:
    """Turn a Ctrl-C, whenever it comes, into one line that says what was kept and how to go on.

    Of several processes one says it, and the others wait: a launcher ends all when the first of them ends.
    """
    try:
        yield
    except KeyboardInterrupt:
        go_on = f"To go on: {command} --out {folder} --resume, same options."
        steps = [int(path.parent.name.partition("-")[2]) for path in folder.glob("**/checkpoint-*[0-9]/meta.json")]
        if steps:
            said = f"Stopped; saved at step {max(steps)}. {go_on}"
        elif (folder / "sweep.json").exists():
            said = f"Stopped; the candidates that were finished are kept. {go_on}"
        else:
            said = "Stopped before there was anything to keep: nothing was written."
        with world.one_speaks("interrupted") as mine:
            err.quiet = not mine
            err.print(said, markup=False)
        raise typer.Exit(INTERRUPTED) from None


def quieten() -> None:
    """Keep the libraries' chatter off the screen; their errors still reach it."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
