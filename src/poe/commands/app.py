"""What both programs share: options from recipes, errors as one message, exit codes."""

import contextlib
import dataclasses
import inspect
import logging
import sys
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import typer
import yaml
from rich.console import Console

from poe.errors import PoEError, RecipeError
from poe.stages.recipe import Plan

if TYPE_CHECKING:
    from poe.training.parallel.distributed import World

FAILED, INTERRUPTED = 1, 130
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

# Given as options of their own, or by the recipe's name.
NOT_OPTIONS = ("name", "data", "description")


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


def recipe_options(kind: type[Plan]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command an option for every field of a recipe, and hand what was given to it as `fields`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        hints = typing.get_type_hints(kind)
        parameters = [p for n, p in inspect_parameters(function).items() if n != "fields"]
        names = [f.name for f in dataclasses.fields(kind) if f.name not in NOT_OPTIONS]
        flags = {f.name for f in dataclasses.fields(kind) if f.default is False}

        def command(**given: Any) -> Any:
            fields = {n: given.pop(n) for n in names if n in given}
            chosen = {n: v if n in flags else parse_field(n, v, hints[n]) for n, v in fields.items() if v is not None}
            return function(**given, fields=chosen)

        for name in names:
            option = typer.Option(
                None,
                f"--{name.replace('_', '-')}",
                help=_describe(hints[name]),
                rich_help_panel="Recipe fields (default: the recipe's)",
                show_default=False,
            )
            parameters.append(
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=option,
                    annotation=bool | None if name in flags else str | None,
                )
            )
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        command.__doc__, command.__name__ = function.__doc__, function.__name__
        return command

    return decorate


def inspect_parameters(function: Callable[..., Any]) -> dict[str, Any]:

    return {
        name: p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, p in inspect.signature(function, eval_str=True).parameters.items()
    }


def parse_field(name: str, text: str, hint: Any) -> Any:
    """Read an option's text as its field's type. YAML has the words: 1e-4, true, null, {glaive: 2}."""
    if hint is str or get_origin(hint) is Literal:
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--{name.replace('_', '-')} {text!r} cannot be read: {error}") from None
    if isinstance(value, str):  # YAML 1.1 takes 1e-4 for a word
        try:
            value = float(value)
        except ValueError:
            return value
    return value


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
